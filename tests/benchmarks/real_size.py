"""Every method at the real size: SD 1.5's architecture with random weights on the CPU; prints time and peak memory.

    python tests/benchmarks/real_size.py                    # 512 pixels; minutes on two cores, within 20 GB
    python tests/benchmarks/real_size.py --shrink 40 --resolution 64

Each part is a process of its own, so that the peak of its resident memory is its own. Training is the trainers' own
dry run of two steps, of which the second is timed; AlignIT draws one image in as few denoising steps.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

import torch
from PIL import Image

from alignkit.alignit import Concept, alignit
from alignkit.base import load_base

STEPS = 2  # denoising steps of what draws images
PARTS = ("alignprop", "controlnetpp", "neti", "alignit")


def arguments(part: str, folder: Path, shrink: int, resolution: int) -> list[str]:
    """The command line of a part's process."""
    if part == "alignit":
        return [__file__, "--draw", "--shrink", str(shrink), "--resolution", str(resolution)]
    options = {
        "alignprop": [
            "--config=configs/alignprop/sd15.yaml",
            "--rewards=[{name: compressibility, args: {}}]",
            "--monitors=[]",
            "--plan.settings={distribution: fixed, k: 1}",
            "--num_validation_images=1",
        ],
        "controlnetpp": [
            "--config=configs/controlnetpp/sd15_lineart.yaml",
            f"--train_data_dir={folder}",
            "--reward_timesteps=[0, 999]",
            "--num_validation_images=1",
        ],
        "neti": [
            "--config=configs/neti/sd15.yaml",
            f"--train_data_dir={folder}",
            "--gradient_checkpointing=true",
            "--validation_prompts=['a photo of a {}']",
            "--validation_seeds=[0]",
        ],
    }[part]
    return [
        f"training/{part}.py",
        *options,
        f"--output_dir={folder}/run",
        "--dry_run=true",
        "--random_init=true",
        f"--shrink={shrink}",
        f"--resolution={resolution}",
        "--train_batch_size=1",
        "--gradient_accumulation_steps=1",
        f"--num_inference_steps={STEPS}",
        "--mixed_precision=no",
    ]


def write_images(folder: Path, side: int) -> None:
    """Two pictures with captions, as the trainers of ControlNet++ and NeTI read them."""
    rows = []
    for name in ("one", "two"):
        Image.effect_noise((side, side), 64).convert("RGB").save(folder / f"{name}.png")
        rows.append(json.dumps({"image": f"{name}.png", "text": f"picture {name}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))


@torch.no_grad()
def draw_with_alignit(shrink: int, resolution: int) -> None:
    """Textual Inversion's concept in a prompt; prints the seconds of a step."""
    pipe = load_base("sd15", random_init=True, shrink=shrink).pipeline()
    pipe.load_textual_inversion({"<t>": torch.randn(pipe.text_encoder.config.hidden_size)})
    with alignit(pipe, [Concept("<t>", "x")]):
        started = time.perf_counter()
        pipe("a <t> on a hat", num_inference_steps=STEPS, height=resolution, width=resolution, output_type="pt")
        print(f"{(time.perf_counter() - started) / STEPS:.2f} s a step")


def measure(part: str, shrink: int, resolution: int) -> tuple[float, float]:
    """Seconds of a step and GiB of peak resident memory, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), resolution)
        command = [sys.executable, *arguments(part, Path(folder), shrink, resolution)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
    found = re.search(r"([\d.]+) s a step", output)
    if status or not found:
        raise RuntimeError(f"{part} failed:\n{output}")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return float(found[1]), usage.ru_maxrss * unit / 2**30


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float]]:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--part", choices=PARTS, action="append", help="only this one; may be repeated")
    parser.add_argument("--draw", action="store_true", help="AlignIT's part alone, in this process")
    args = parser.parse_args(argv)
    if args.draw:
        draw_with_alignit(args.shrink, args.resolution)
        return {}
    print("| part | seconds a step | peak of resident memory, GiB |\n|---|---|---|", flush=True)
    results = {}
    for part in args.part or PARTS:
        results[part] = measure(part, args.shrink, args.resolution)
        print("| {} | {:.2f} | {:.2f} |".format(part, *results[part]), flush=True)
    return results


if __name__ == "__main__":
    main()
