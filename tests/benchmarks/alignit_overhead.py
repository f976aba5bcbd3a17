"""What AlignIT costs a step at SD 1.5's shapes: counted FLOPs, and time measured in one run (minutes on two cores).

    python tests/benchmarks/alignit_overhead.py [--side 32] [--repeats 5]

Random weights of SD 1.5's architecture, one prompt with guidance. Arms: the plain U-Net; AlignIT of Textual Inversion
(rows exchanged in the embedding); AlignIT of a LoRA (two sets of W_k and W_v, through the context bank).
"""

import time
from argparse import ArgumentParser
from contextlib import nullcontext

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from alignkit.alignit import Concept, alignit
from alignkit.base import add_lora, load_base


@torch.no_grad()
def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=64, help="of the latents; 64 is 512 pixels")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    base = load_base("sd15", random_init=True)
    pipe, x_t = base.pipeline(), torch.randn(2, 4, args.side, args.side)
    pipe.load_textual_inversion({"<t>": torch.randn(pipe.text_encoder.config.hidden_size)})
    prompt, concept = "a <t> on a hat", Concept("<t>", "x")
    arms = {"plain": nullcontext, "Textual Inversion": lambda: alignit(pipe, [concept])}
    results = {name: measure(pipe, prompt, x_t, arm, args.repeats) for name, arm in arms.items()}
    add_lora(base.unet, 4, 4, ["to_q", "to_k", "to_v", "to_out.0"])
    results["plain LoRA"] = measure(pipe, prompt, x_t, nullcontext, args.repeats)
    results["LoRA"] = measure(pipe, prompt, x_t, lambda: alignit(pipe, [concept]), args.repeats)
    for name, reference in (("Textual Inversion", "plain"), ("LoRA", "plain LoRA")):
        (flops, seconds), (flops_0, seconds_0) = results[name], results[reference]
        print(
            f"AlignIT of {name}: FLOPs {100 * (flops / flops_0 - 1):+.2f} % ({flops / 1e9:.0f} against "
            f"{flops_0 / 1e9:.0f} GFLOP), time {100 * (seconds / seconds_0 - 1):+.1f} % ({seconds:.2f} s a call)"
        )


def measure(pipe, prompt, x_t, arm, repeats) -> tuple[int, float]:
    """FLOPs of a call of the U-Net, and the median of its seconds."""
    with arm():
        embeds, negative = pipe.encode_prompt(prompt, "cpu", 1, True)
        text = torch.cat([negative, embeds])
        with FlopCounterMode(display=False) as counter:
            pipe.unet(x_t, 500, text)
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            pipe.unet(x_t, 500, text)
            times.append(time.perf_counter() - started)
    return counter.get_total_flops(), float(np.median(times))


if __name__ == "__main__":
    main()
