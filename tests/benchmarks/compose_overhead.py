"""What all four parts cost while drawing: CPU time of each against the bare pipeline, a ratio within one run.

    python tests/benchmarks/compose_overhead.py [--model emoji] [--repeats 5] [--steps 10] [--images 4]

Parts without training, since weights do not change what they cost: a LoRA of rank 8 on attention, a new ControlNet, a
NeTI concept. What is bare, and what stock diffusers itself takes for a LoRA and a ControlNet, stands beside: what is
above that is ours. Arms take turns, so that what else the machine does falls on all of them; medians.
"""

import statistics
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

import torch
from diffusers import AutoPipelineForText2Image

import alignkit
from alignkit import concepts
from alignkit.artifacts import load_lora, save_lora
from alignkit.base import add_lora, load_base
from alignkit.controlnet import new_controlnet, save_controlnet


def parts(model: str, folder: Path) -> dict:
    base = load_base(model)
    concepts.create("neti", base, "<thing>", "animal").save(folder / "concept")
    save_controlnet(folder / "controlnet", new_controlnet(base.unet, base.vae_scale_factor))
    add_lora(base.unet, 8, 8, ["to_q", "to_k", "to_v", "to_out.0"])
    save_lora(folder / "lora", base.unet)
    return {"loras": {"style": folder / "lora"}, "controlnet": folder / "controlnet", "concepts": [folder / "concept"]}


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--images", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        all_of = parts(args.model, Path(folder))
        bare = load_base(args.model).pipeline()
        composed = {
            "LoRA": alignkit.compose(args.model, loras=all_of["loras"]),
            "ControlNet": alignkit.compose(args.model, controlnet=all_of["controlnet"]),
            "concept": alignkit.compose(args.model, concepts=all_of["concepts"]),
            "all four": alignkit.compose(args.model, **all_of),
        }
        stock = load_base(args.model).pipeline()
        load_lora(stock, all_of["loras"]["style"])
        stock = AutoPipelineForText2Image.from_pipe(stock, controlnet=composed["ControlNet"].pipe.controlnet)
        side = bare.unet.config.sample_size * bare.vae_scale_factor
        control, options = torch.rand(1, 3, side, side), {"num_inference_steps": args.steps, "output_type": "latent"}
        options["num_images_per_prompt"] = args.images
        word, thing, shown = "a cat", "a <thing>", {"control_image": control}
        arms = {
            "bare": lambda: bare(word, **options),
            "stock diffusers: LoRA and ControlNet": lambda: stock(word, image=control, **options),
            "LoRA": lambda: composed["LoRA"](word, **options),
            "ControlNet": lambda: composed["ControlNet"](word, **shown, **options),
            "concept": lambda: composed["concept"](thing, **options),
            "concept, AlignIT": lambda: composed["concept"](thing, alignit=True, **options),
            "all four": lambda: composed["all four"](thing, alignit=True, **shown, **options),
        }
        for pipe in (bare, stock, *(one.pipe for one in composed.values())):
            pipe.set_progress_bar_config(disable=True)
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(args.repeats + 1):
            for name, arm in arms.items():
                started = time.process_time()
                arm()
                if turn:  # the first is for warming up
                    seconds[name].append(time.process_time() - started)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    for name, time_of in median.items():
        print(f"{name:38} {time_of:6.2f} s  {time_of / median['bare']:.2f} times the bare pipeline")
    ours = median["all four"] / median["stock diffusers: LoRA and ControlNet"]
    print(f"all four against stock LoRA and ControlNet: {ours:.2f}")


if __name__ == "__main__":
    main()
