"""What AlignIT costs a step at SD 1.5's shapes: counted FLOPs, and time measured in one run (minutes on two cores).

    python tests/benchmarks/alignit_overhead.py [--side 32] [--repeats 5]

Random weights of SD 1.5's architecture, one prompt with guidance, a timestep that was not seen before at every call.
AlignIT of Textual Inversion (rows exchanged in the embedding), of P+ and NeTI (text by layer and timestep, through the
context bank) against the plain U-Net; of Custom Diffusion and a LoRA (two sets of W_k and W_v) against the U-Net with
it. A whole U-Net of DreamBooth costs what Custom Diffusion does. The check for what came up inside is Python alone, the
same beside a fast GPU, and is told apart.
"""

import time
from argparse import ArgumentParser
from contextlib import nullcontext
from functools import partial
from tempfile import TemporaryDirectory
from timeit import timeit

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from alignkit.alignit import Concept, alignit
from alignkit.base import add_lora, load_base
from alignkit.concepts import create
from alignkit.customized import load_custom_diffusion, save_custom_diffusion


@torch.no_grad()
def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=64, help="of the latents; 64 is 512 pixels")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    base = load_base("sd15", random_init=True)
    pipe, x_t = base.pipeline(), torch.randn(2, 4, args.side, args.side)
    pipe.load_textual_inversion({"<t>": torch.randn(pipe.text_encoder.config.hidden_size)})
    token, prompt = Concept("<t>", "x"), "a {} on a hat"

    def compare(concepts: dict[str, Concept]) -> None:
        """AlignIT of these against the pipeline as it is."""
        flops_0, seconds_0 = measure(pipe, prompt.format("<t>"), x_t, nullcontext, args.repeats)
        for name, concept in concepts.items():
            arm = partial(alignit, pipe, [concept])
            flops, seconds = measure(pipe, prompt.format(concept.phrase), x_t, arm, args.repeats)
            print(
                f"AlignIT of {name}: FLOPs {100 * (flops / flops_0 - 1):+.2f} % ({flops / 1e9:.0f} against "
                f"{flops_0 / 1e9:.0f} GFLOP), time {100 * (seconds / seconds_0 - 1):+.1f} % ({seconds:.2f} s a call), "
                f"check {1000 * measure_check(pipe, arm):.2f} ms",
                flush=True,
            )

    learned = {kind: create(kind, base, "<u>", "x") for kind in ("p_plus", "neti")}
    rows = {"P+": Concept("<u>", "x", learned=learned["p_plus"]), "NeTI": Concept("<u>", "x", learned=learned["neti"])}
    compare({"Textual Inversion": token} | rows)
    with TemporaryDirectory() as folder:
        stock = dict(pipe.unet.attn_processors)
        load_custom_diffusion(pipe, save_custom_diffusion(folder, pipe.unet))
    compare({"Custom Diffusion": token})
    pipe.unet.set_attn_processor(stock)
    add_lora(base.unet, 4, 4, ["to_q", "to_k", "to_v", "to_out.0"])
    compare({"a LoRA": token})


def measure(pipe, prompt, x_t, arm, repeats) -> tuple[int, float]:
    """FLOPs of a call of the U-Net, and the median of its seconds."""
    with arm():
        embeds, negative = pipe.encode_prompt(prompt, "cpu", 1, True)
        text = torch.cat([negative, embeds])
        with FlopCounterMode(display=False) as counter:
            pipe.unet(x_t, 500, text)
        times = []
        for i in range(repeats):
            started = time.perf_counter()
            pipe.unet(x_t, 501 + i, text)
            times.append(time.perf_counter() - started)
    return counter.get_total_flops(), float(np.median(times))


def measure_check(pipe, arm) -> float:
    """Seconds of what AlignIT looks at before every call of the U-Net."""
    with arm():
        check = next(reversed(pipe.unet._forward_pre_hooks.values()))
        return timeit(lambda: check(pipe.unet, ()), number=20) / 20


if __name__ == "__main__":
    main()
