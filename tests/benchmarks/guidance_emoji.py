"""What a reward gains at sampling time, without training, on the emoji world: best of n, steering, ascent.

    python tests/benchmarks/guidance_emoji.py --run     # the rows that are missing
    python tests/benchmarks/guidance_emoji.py           # the table of what is there

32 held-out pairs of objects, each drawn once by the bare base and once in every other way, from the same noise. Two
rewards of the training judges lead: the aesthetic score and the alignment with the prompt. The figures are the
evaluator's, which lead nothing, and differences from the base are paired over prompts (bootstrap, 95 %). Best of n is
given as many pictures as it wants; the column of cost counts evaluations of the network, a backward pass as two.
In bfloat16, which halves the time on CPUs that have it: some twenty minutes of one core, most of it the ascent. Each
row leaves a strip in runs/benchmarks/guidance_emoji: the first eight pictures, the base's above.
"""

import json
from argparse import ArgumentParser
from pathlib import Path

import torch

import alignkit
from alignkit import evaluate
from alignkit.artifacts import read_events, save_strip
from alignkit.base import load_base
from alignkit.emoji.evaluator import Evaluator
from alignkit.emoji.measure import world_hash
from alignkit.metrics import paired_bootstrap

RESULTS = Path(__file__).parent / "results" / "guidance_emoji.jsonl"
STRIPS = Path(__file__).parents[2] / "runs" / "benchmarks" / "guidance_emoji"
REWARDS = ("aesthetic", "alignment")
NUMBER, STEPS = 32, 25
WAYS = {  # settings of a call, and what a picture costs in pictures
    "best of 4": ({"best_of": 4}, 4),
    "steered": ({"reward_scale": 0.1}, 3),
    "ascent": ({"ascent": {"steps": 5}}, 5 * 3 + 1 + 1),  # the last reward, and the picture itself
}
FIGURES = ("aesthetic", "alignment", "present", "background")


def draw(composed, prompts: list[str], **settings) -> torch.Tensor:
    """[N, 3, 64, 64], picture i from the noise of the seeds from 100 i on."""
    options = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "pt"} | settings
    images = [composed(prompt, seed=100 * i, **options).images for i, prompt in enumerate(prompts)]
    return torch.cat(images).float().clamp(0, 1)


def run(missing: list[tuple[str, str]], key: dict) -> None:
    """Draws for each (reward, way) and adds its row to the results, as they come: the ascent takes long."""
    asked = evaluate.prompt_set("pairs", unseen=True)
    asked = asked[:: max(1, len(asked) // NUMBER)][:NUMBER]
    prompts, evaluator = [p.prompt for p in asked], Evaluator()
    composed = alignkit.compose(load_base("emoji", dtype=torch.bfloat16))
    composed.pipe.set_progress_bar_config(disable=True)
    base = draw(composed, prompts)
    reference = evaluate.score(evaluator, "pairs", asked, base)
    spread = float(reference["aesthetic"].std())
    for reward, way in missing:
        settings, cost = WAYS[way]
        images = draw(composed, prompts, reward=alignkit.build_reward(reward), **settings)
        scores = evaluate.score(evaluator, "pairs", asked, images)
        row = {"reward": reward, "way": way, "cost": cost} | evaluate.summary(scores, reference)
        for name in FIGURES:
            gains = paired_bootstrap(scores[name].numpy(), reference[name].numpy())
            row[f"{name}_gain"] = [round(float(g) / (spread if name == "aesthetic" else 1), 3) for g in gains]
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(key | row) + "\n")
        STRIPS.mkdir(parents=True, exist_ok=True)
        save_strip(STRIPS / f"{reward} {way}.png".replace(" ", "_"), [base[:8], images[:8]])


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="run the rows that are missing")
    args = parser.parse_args()
    key = {"world_hash": world_hash(), "number": NUMBER, "num_inference_steps": STEPS}
    order = [(reward, way) for reward in REWARDS for way in WAYS]
    found = {(row["reward"], row["way"]): row for row in read_events(RESULTS) if key.items() <= row.items()}
    if args.run:
        run([one for one in order if one not in found], key)
        found = {(row["reward"], row["way"]): row for row in read_events(RESULTS) if key.items() <= row.items()}
    print(table([found[one] for one in order if one in found]))


def table(rows: list[dict]) -> str:
    """Markdown; gains of the aesthetic score in standard deviations of the base's."""
    lines = ["| reward | way | cost | aesthetic, SD | alignment | both objects | background |", "|---" * 7 + "|"]
    for row in rows:
        gains = [row[f"{name}_gain"] for name in FIGURES]
        cells = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*gain) for gain in gains]
        lines.append(f"| {row['reward']} | {row['way']} | {row['cost']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
