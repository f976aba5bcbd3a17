"""Do the emoji world's evaluators see what the eye sees? 200 generated images, labelled by looking.

    python tests/benchmarks/calibration.py --draw    # the images, in numbered grids: runs/benchmarks/calibration/*.png
    python tests/benchmarks/calibration.py           # the table: both evaluators beside results/calibration.json

The labels are one labeller's answers in the order of the grids: for singles and pairs "1" where every named object can
be recognised, for counts how many objects there are, whatever they are. They belong to one version of the weights,
whose hash stands beside them.
"""

import json
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from alignkit.base import load_base
from alignkit.emoji import measure, prompts, sprites
from alignkit.emoji.evaluator import Evaluator, matched_counts

RESULTS = Path(__file__).parent / "results" / "calibration.json"
FOLDER = Path(__file__).parents[2] / "runs" / "benchmarks" / "calibration"
NUMBERS = {"singles": 80, "pairs": 60, "counts": 60}
SEED = 10_000  # of the first image's noise; no figure elsewhere is of these
COLUMNS, SCALE, LABEL = 5, 3, 14


def drawn() -> dict[str, tuple[list[prompts.Prompt], torch.Tensor]]:
    """Prompts that were held out from the base and an image of each, by kind."""
    base, found = load_base("emoji"), {}
    for kind, asked in (("singles", prompts.singles()), ("pairs", prompts.pairs()), ("counts", prompts.counts())):
        asked = asked[: NUMBERS[kind]]
        found[kind] = asked, measure.draw(base, [p.prompt for p in asked], seed=SEED)
    return found


def grids(kind: str, asked: list[prompts.Prompt], images: torch.Tensor, rows: int = 4) -> None:
    """PNGs of 20 images, each under its number and what was asked for."""
    for start in range(0, len(asked), rows * COLUMNS):
        side = images.shape[-1] * SCALE
        grid = Image.new("RGB", (COLUMNS * (side + 8), rows * (side + LABEL + 8)), "white")
        for i, (prompt, image) in enumerate(zip(asked[start:], images[start : start + rows * COLUMNS], strict=False)):
            pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            left, top = (i % COLUMNS) * (side + 8), (i // COLUMNS) * (side + LABEL + 8)
            grid.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (left, top + LABEL))
            what = f"{prompt.count} {prompt.objects[0]}" if kind == "counts" else ", ".join(prompt.objects)
            ImageDraw.Draw(grid).text((left, top), f"{start + i} {what}", fill="black")
        grid.save(FOLDER / f"{kind}_{start:03}.png")


def answers(
    evaluator: Evaluator, kind: str, asked: list[prompts.Prompt], images: torch.Tensor
) -> dict[str, np.ndarray]:
    """Evaluator -> what it says of every image, as the labels say it."""
    matched = matched_counts(images)
    if kind == "counts":
        return {
            "learned": evaluator.count(images).int().numpy(),
            "by matching": np.array([len(pieces) for pieces in matched]),
        }
    index = torch.tensor([[sprites.by_name(n).index for n in p.objects] for p in asked])
    there = (evaluator.counts(images).gather(1, index) > 0.5).all(1)
    by_matching = [set(p.objects) <= set(pieces) for p, pieces in zip(asked, matched, strict=True)]
    return {"learned": there.int().numpy(), "by matching": np.array(by_matching, dtype=int)}


def table() -> str:
    """Markdown."""
    said = json.loads(RESULTS.read_text(encoding="utf-8"))
    if said["world_hash"] != measure.world_hash():
        raise SystemExit(f"{RESULTS.name} is of the weights {said['world_hash']}, these are {measure.world_hash()}.")
    evaluator = Evaluator()
    rows = ["| kind | images | evaluator | agrees | mean by looking | mean by it |", "|---" * 6 + "|"]
    for kind, (asked, images) in drawn().items():
        labels = np.array([int(digit) for digit in said[kind]])
        for name, found in answers(evaluator, kind, asked, images).items():
            rows.append(
                f"| {kind} | {len(labels)} | {name} | {np.mean(found == labels):.3f} | {labels.mean():.3f} "
                f"| {found.mean():.3f} |"
            )
    return "\n".join(rows)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="draw the grids, to be labelled")
    if parser.parse_args().draw:
        FOLDER.mkdir(parents=True, exist_ok=True)
        for kind, (asked, images) in drawn().items():
            grids(kind, asked, images)
        print(f"{measure.world_hash()}: {FOLDER}")
    else:
        print(table())
