"""All four parts in one call on the emoji world, and what each adds, by the evaluator: one picture and one table.

    python -m alignkit.emoji.concepts runs/data/thing --tier A --seed 0          # a sprite in a tint never seen on it
    python tests/benchmarks/compose_emoji.py --lora runs/alignprop/emoji --concept runs/neti/emoji \
        --controlnet runs/controlnetpp/emoji_lineart --condition lineart --tier A --seed 0

Each of 16 scenes holds the concept and another sprite on a named colour; its control is what the ControlNet is shown.
All arms draw the same prompts from the same noise:

- base: the class noun in the concept's place
- LoRA, ControlNet, concept, concept + AlignIT: one part (or two) alone
- all four
- all four, best of 4; steered; ascent: with the training judge's alignment as reward, at sampling time
- base, best of 4; steered; ascent: the same without the parts

Figures: the evaluator's aesthetic score and cosine with the prompt; whether the second object is there and the
background right; likeness to the concept's pictures by the identity judge; the distance to the control that was shown
(the condition's own metrics). The reward is never what is reported. Some ten minutes of two idle cores, half of it the
ascent.
"""

import json
import subprocess
import warnings
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import alignkit
from alignkit import conditions
from alignkit.artifacts import save_strip
from alignkit.emoji import concepts, measure, scenes, sprites
from alignkit.emoji.captions import article
from alignkit.emoji.evaluator import Evaluator
from alignkit.emoji.fit import to_float

RESULTS = Path(__file__).parent / "results"
REWARDED = {
    "best of 4": {"best_of": 4},
    "steered": {"reward_scale": 0.1},
    "ascent": {"ascent": {"steps": 10}},
}


def asked(concept: concepts.EmojiConcept, number: int) -> tuple[list[dict], Tensor]:
    """Prompts with {} for the concept, what is in them beside it, and pictures of such scenes [N, 3, 64, 64]."""
    rng = np.random.default_rng(7)
    named = [s for s in sprites.of_tier("named") if s != concept.sprite]
    wanted, images = [], []
    for _ in range(number):
        second, background = named[rng.integers(len(named))], scenes.sample_background(rng)
        placed = scenes.place(rng, [concept.sprite, second], background["horizon"], False, None)
        if concept.tint:
            placed = (replace(placed[0], tint=concept.tint, tint_strength=0.9), placed[1])
        images.append(scenes.render(scenes.Scene(**background, objects=placed)).image)
        color = background["background"]
        prompt = f"{{}} and {article(second.name)} on {article(color + ' background')}"
        wanted.append({"prompt": prompt, "second": second.name, "background": color})
    return wanted, to_float(np.stack(images))


def arms(args: Namespace, controls: Tensor) -> dict[str, tuple]:
    """Name -> (composed pipeline, whether the prompt says the concept, the call's settings)."""
    shared = {"loras": {"style": args.lora}, "concepts": [args.concept]}
    free = alignkit.compose("emoji", **shared)
    held = alignkit.compose("emoji", **shared, controlnet=args.controlnet)
    plain, control = {"lora_scale": 0.0}, {"control_image": controls}
    every = control | {"alignit": True}
    found = {
        "base": (free, False, plain),
        "LoRA": (free, False, {}),
        "ControlNet": (held, False, plain | control),
        "concept": (free, True, plain),
        "concept + AlignIT": (free, True, plain | {"alignit": True}),
        "all four": (held, True, every),
    }
    for name, settings in REWARDED.items():
        found[f"all four, {name}"] = (held, True, every | settings)
        found[f"base, {name}"] = (free, False, plain | settings)
    return {name: arm for name, arm in found.items() if not args.arm or name in args.arm}


def draw(args: Namespace, composed, says: bool, settings: dict, wanted: list[dict]) -> Tensor:
    composed.pipe.set_progress_bar_config(disable=True)
    (own,) = (concept.concept for concept in composed.concepts.values())
    reward = alignkit.build_reward("alignment") if {"best_of", "reward_scale", "ascent"} & set(settings) else None
    images = []
    for i, want in enumerate(wanted):
        one = settings | (
            {"control_image": settings["control_image"][i : i + 1]} if "control_image" in settings else {}
        )
        images.append(
            composed(
                want["prompt"].format(f"a {own.phrase}" if says else article(own.noun)), seed=100 * i, reward=reward,
                num_inference_steps=args.num_inference_steps, guidance_scale=5.0, output_type="pt", **one,
            ).images
        )  # fmt: skip
    return torch.cat(images).float().clamp(0, 1)


def figures(
    images: Tensor, wanted: list[dict], noun: str, real: Tensor, condition, targets: Tensor
) -> dict[str, float]:
    evaluator = Evaluator()
    right = [b == want["background"] for b, want in zip(evaluator.background(images), wanted, strict=True)]
    scores = {
        "aesthetic": evaluator.aesthetic(images).mean(),
        "alignment": evaluator.alignment(images, [want["prompt"].format(article(noun)) for want in wanted]).mean(),
        "second": evaluator.present(images, [want["second"] for want in wanted]).float().mean(),
        "background": np.mean(right),
        "identity": (evaluator.embed_identity(images) @ evaluator.embed_identity(real).T).mean(),
        **conditions.score(condition, images, targets),
    }
    return {name: round(float(value), 4) for name, value in scores.items()}


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    warnings.filterwarnings("ignore", "No placeholder in")  # of the arms that say the class noun
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lora", default="runs/alignprop/emoji")
    parser.add_argument("--controlnet", default="runs/controlnetpp/emoji_lineart")
    parser.add_argument("--condition", default="lineart")
    parser.add_argument("--concept", default="runs/neti/emoji")
    parser.add_argument("--tier", default="A", choices=["A", "B"])
    parser.add_argument("--seed", type=int, default=0, help="which concept, as of alignkit.emoji.concepts")
    parser.add_argument("--number", type=int, default=16, help="scenes")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--arm", action="append", help="this one alone; may be repeated")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    args = parser.parse_args()

    concept = concepts.concepts(args.tier)[args.seed]
    wanted, pictures = asked(concept, args.number)
    condition = conditions.build_condition(args.condition)
    targets = condition.extract(pictures)
    controls = condition.control(targets).float()
    real = to_float(concepts.pictures(concept, 5, seed=args.seed))

    rows, strip = [], [pictures, controls]
    for name, (composed, says, settings) in arms(args, controls).items():
        images = draw(args, composed, says, settings, wanted)
        (own,) = (c.concept for c in composed.concepts.values())
        rows.append({"arm": name} | figures(images, wanted, own.noun, real, condition, targets))
        strip.append(images)
        print(json.dumps(rows[-1]), flush=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    save_strip(args.output_dir / "compose_emoji.png", [images[:8] for images in strip])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    settings = {name: str(value) for name, value in vars(args).items() if name != "output_dir"}
    key = {"world_hash": measure.world_hash(), "commit": commit, "concept_name": concept.name, **settings}
    with open(args.output_dir / "compose_emoji.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(key | row) + "\n" for row in rows)
    print(f"\nscenes, controls, then an arm a row: {args.output_dir / 'compose_emoji.png'}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
