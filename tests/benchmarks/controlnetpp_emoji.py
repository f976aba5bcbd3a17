"""What the consistency reward gains on the emoji world, by the evaluator: one cell a (condition, arm, seed).

    python tests/benchmarks/controlnetpp_emoji.py --run                            # the cells that are missing
    python tests/benchmarks/controlnetpp_emoji.py --run --condition segmentation --seed 0
    python tests/benchmarks/controlnetpp_emoji.py                                  # the tables of what is there
    python tests/benchmarks/controlnetpp_emoji.py --card                           # written, with strips, to results/

The first stage is a cell of its own, trained once a (condition, seed); all arms go on from its weights with the same
data, noise and number of steps. A cell trains by the trainer's own command line and is scored by `alignkit evaluate
controllability`. It is found again by condition, arm, seed, config and the hash of the world's weights, so only what is
missing is run. Cells train and draw in bfloat16, or as --mixed_precision says: take one for all arms of a seed. On one
idle core a first stage costs eleven minutes and more, an arm six, its evaluation three (three times that in float32):
two hours for all arms of a condition and a seed.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "controlnetpp_emoji.jsonl"
DTYPES = {"bf16": "bfloat16", "no": "float32"}  # of drawing, by the training's mixed_precision
SEEDS = (0, 1, 2)
CONDITIONS = ("segmentation", "depth", "lineart")
FIRST_STAGE, STEPS = "first stage", 500  # updates of every arm behind the first stage
NUMBER = 256  # images of the evaluation

NO_REWARD, SAME_TIME, REWARD = "no reward", "no reward, time of the reward", "reward"
LAMBDA_0, DETACHED, OTHER = "control: lambda 0", "control: detached", "control: other labels"
ARMS = {
    FIRST_STAGE: {"reward_weight": 0},
    NO_REWARD: {"reward_weight": 0},
    REWARD: {},
    SAME_TIME: {"reward_weight": 0},
    "reward, t <= 100": {"reward_timesteps": "[0, 100]"},
    "reward, t <= 400": {"reward_timesteps": "[0, 400]"},
    "reward, all t": {"reward_timesteps": "[0, 999]"},
    LAMBDA_0: {"reward_weight": 0},  # has to be `no reward`, bit for bit
    DETACHED: {},  # this, too
    OTHER: {},
}
LAMBDAS = {f"reward, lambda {weight}": {"reward_weight": weight} for weight in (10, 30, 100)}  # of line art
CONTROLS = {  # conditions in tests/benchmarks/controls.py
    "segmentation": {DETACHED: "DetachedSegmentation", OTHER: "PermutedSegmentation"},
    "depth": {DETACHED: "DetachedDepth", OTHER: "MirroredDepth"},
    "lineart": {DETACHED: "DetachedLineArt", OTHER: "MirroredLineArt"},
}


def arms_of(condition: str) -> dict[str, dict]:
    """Name -> what it has other than the config."""
    controls = {
        arm: {"condition.name": f"tests.benchmarks.controls:{name}"} for arm, name in CONTROLS[condition].items()
    }
    return ARMS | (LAMBDAS if condition == "lineart" else {}) | controls


def config_of(condition: str) -> Path:
    return ROOT / "configs" / "controlnetpp" / f"emoji_{condition}.yaml"


@cache  # read once: it is of all the weights
def current_world() -> str:
    from alignkit.emoji.measure import world_hash

    return world_hash()


def key(condition: str, arm: str, seed: int) -> dict:
    """What a cell is found by."""
    settings = [arms_of(condition)[arm], STEPS, NUMBER]
    text = config_of(condition).read_text(encoding="utf-8") + json.dumps(settings)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return {"condition": condition, "arm": arm, "seed": seed, "config": digest, "world_hash": current_world()}


def cells() -> list[dict]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def find(condition: str, arm: str, seed: int) -> dict | None:
    wanted = key(condition, arm, seed)
    return next((cell for cell in cells() if wanted.items() <= cell.items()), None)


def folder_of(cell: dict) -> Path:
    words = f"{cell['condition']} {cell['arm']} {cell['seed']} {cell['config']} {cell['world_hash']}"
    return ROOT / "runs" / "benchmarks" / "controlnetpp" / "_".join(words.replace("<=", "").replace(":", "").split())


def command(condition: str, arm: str, seed: int, mixed_precision: str) -> list[str]:
    """The trainer's command line; ValueError where this arm's length is that of others that have not run yet."""
    config = config_of(condition)
    overrides = {"output_dir": folder_of(key(condition, arm, seed)), "seed": seed, "reward_start": 0}
    overrides |= {"mixed_precision": mixed_precision} | arms_of(condition)[arm]
    if arm == FIRST_STAGE:
        steps = settings_of(condition)["reward_start"]
    else:
        first = folder_of(key(condition, FIRST_STAGE, seed))
        overrides |= {"controlnet_model_name_or_path": first, "lr_warmup_steps": 0, "seed": seed + 1000}
        steps = STEPS
    if arm == SAME_TIME:
        timed = [find(condition, other, seed) for other in (REWARD, NO_REWARD)]
        if None in timed:
            raise ValueError(f"{SAME_TIME!r} lasts as long as {REWARD!r} beside {NO_REWARD!r}: run these two before it")
        steps = round(STEPS * max(1.0, timed[0]["train_seconds"] / timed[1]["train_seconds"]))
    overrides |= {"max_train_steps": steps, "validation_steps": 0}
    line = [sys.executable, "training/controlnetpp.py", "--config", str(config)]
    for name, value in overrides.items():
        line += [f"--{name}", str(value)]
    return line


def settings_of(condition: str) -> dict:
    return yaml.safe_load(config_of(condition).read_text(encoding="utf-8"))


def run_cell(condition: str, arm: str, seed: int, mixed_precision: str) -> None:
    from alignkit.artifacts import sha256
    from alignkit.controlnet import WEIGHTS
    from alignkit.evaluate import controllability

    cell = key(condition, arm, seed)
    folder, line = folder_of(cell), command(condition, arm, seed, mixed_precision)
    first = folder_of(key(condition, FIRST_STAGE, seed))
    if arm != FIRST_STAGE and not (first / WEIGHTS).is_file():  # scored on another machine: weights are not kept
        train(command(condition, FIRST_STAGE, seed, mixed_precision))
    steps = int(line[line.index("--max_train_steps") + 1])
    started = time.monotonic()
    train(line)
    seconds = time.monotonic() - started  # of a run that was stopped half-way, only the rest: look at both arms' alike
    cell |= {
        "commit": commit(),
        "mixed_precision": mixed_precision,
        "steps": steps,
        "train_seconds": round(seconds),
        "sha256": sha256(folder / WEIGHTS),
    }
    if arm != FIRST_STAGE:
        cell["first_stage"] = sha256(first / WEIGHTS)
    twin = next((c for c in cells() if all(c[k] == cell[k] for k in ("condition", "sha256", "mixed_precision"))), None)
    if twin:  # a control that has to be another arm, bit for bit, and is: its pictures are that arm's
        real, scores = twin["real"], twin["scores"]
    else:
        real, scores = controllability(
            [str(folder)],
            condition,
            number=NUMBER,
            guidance_scale=settings_of(condition)["guidance_scale"],
            dtype=DTYPES[mixed_precision],
        )
    for row in (real, scores):
        row.pop("model", None)
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(cell | {"real": real, "scores": scores}) + "\n")


def train(line: list[str]) -> None:
    # for the controls, which a config names by tests.benchmarks
    subprocess.run(line, cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


METRICS = {"segmentation": ["mIoU"], "depth": ["RMSE"], "lineart": ["SSIM", "MS-SSIM"]}
SHOWN = 8  # scenes of a strip, the first of the evaluation


def table(condition: str) -> str:
    """Markdown: every seed's scores, beside what real scenes reach after a VAE round trip."""
    figures = [*METRICS[condition], "alignment", "diversity", "KID"]
    rows = [
        f"**{condition}**\n",
        "| arm | seed | precision | steps | minutes | " + " | ".join(figures) + " | weights |",
    ]
    rows.append("|---" * (len(figures) + 6) + "|")
    ceiling = None
    for arm in arms_of(condition):
        for seed in SEEDS:
            cell = find(condition, arm, seed)
            if cell:
                ceiling = cell["real"]
                values = " | ".join(f"{cell['scores'][figure]:.4f}" for figure in figures)
                told = [arm, seed, cell["mixed_precision"], cell["steps"], round(cell["train_seconds"] / 60)]
                rows.append(f"| {' | '.join(map(str, told))} | {values} | {cell['sha256'][:8]} |")
    if ceiling:
        values = " | ".join(f"{ceiling[figure]:.4f}" for figure in figures)
        rows.append(f"| real scenes, VAE round trip | | | | | {values} | |")
    return "\n".join(rows)


def gains(condition: str) -> str:
    """Markdown: what each arm has more than `no reward` of the same seed, and its share of the way to real scenes.

    The first stage's row is the baseline's own slope, with the sign turned. Means over seeds, with standard errors
    where there are several; alignment and diversity as shares of what the arm without the reward has.
    """
    rows = [
        "| arm minus `no reward` | seeds | figure | of the way to real scenes | alignment | diversity |",
        "|---" * 6 + "|",
    ]
    for arm in arms_of(condition):
        both = [(find(condition, arm, seed), find(condition, NO_REWARD, seed)) for seed in SEEDS]
        both = [(cell["scores"], without) for cell, without in both if cell and without]
        if arm == NO_REWARD or not both:
            continue
        for figure in METRICS[condition]:
            more = [scores[figure] - without["scores"][figure] for scores, without in both]
            left = [without["real"][figure] - without["scores"][figure] for _, without in both]
            way = [a / b for a, b in zip(more, left, strict=True)]
            kept = [
                interval([scores[name] / without["scores"][name] - 1 for scores, without in both], "+.1%")
                for name in ("alignment", "diversity")
            ]
            rows.append(
                f"| {arm} | {len(both)} | {figure} {interval(more, '+.4f')} | {interval(way, '+.0%')} | "
                + " | ".join(kept)
                + " |"
            )
    return "\n".join(rows)


def interval(values: Sequence[float], form: str) -> str:
    """Mean, and the standard error of several."""
    text = format(statistics.mean(values), form)
    if len(values) == 1:
        return text
    return f"{text} ± {format(statistics.stdev(values) / len(values) ** 0.5, form.removeprefix('+'))}"


def strip(condition: str, seed: int, path: Path) -> list[str]:
    """Draws controls, real scenes and each arm's images of them below each other; returns what the rows are.

    Of the arms whose weights are still in `runs/`: nothing is drawn where there are none.
    """
    from alignkit.artifacts import save_strip
    from alignkit.base import load_base
    from alignkit.conditions import build_condition
    from alignkit.controlnet import WEIGHTS, draw_controlled, load_controlnet
    from alignkit.controls import open_controls
    from alignkit.evaluate import EVALUATORS, first_examples

    folders = {arm: folder_of(key(condition, arm, seed)) for arm in arms_of(condition) if find(condition, arm, seed)}
    folders = {arm: folder for arm, folder in folders.items() if (folder / WEIGHTS).is_file()}
    if not folders:
        return []
    model = {"model": EVALUATORS[condition]} if condition in EVALUATORS else {}
    judge, base = build_condition(condition, evaluator=True, **model), load_base("emoji")
    data = open_controls("emoji", judge)
    prompts, real, targets = first_examples(data, judge, SHOWN, base.image_size(), "cpu")
    rows = {"control": judge.control(targets).float(), "real scene": real}
    for arm, folder in folders.items():
        controlnet = load_controlnet(str(folder), base.network, base.vae_scale_factor)
        rows[arm] = draw_controlled(
            base,
            controlnet,
            rows["control"],
            prompts,
            range(SHOWN),
            num_inference_steps=20,
            guidance_scale=settings_of(condition)["guidance_scale"],
        )
    save_strip(path, list(rows.values()))
    return list(rows)


def write_card(conditions: Sequence[str]) -> Path:
    """Tables and strips of what is there, beside the cells."""
    parts = ["# ControlNet++ on the emoji world", "By `python tests/benchmarks/controlnetpp_emoji.py --card`."]
    for condition in conditions:
        if not any(find(condition, arm, seed) for arm in arms_of(condition) for seed in SEEDS):
            continue
        parts += [table(condition), gains(condition)]
        for seed in SEEDS:
            path = RESULTS.with_name(f"controlnetpp_{condition}_{seed}.png")
            rows = strip(condition, seed, path)
            if rows:
                parts.append(f"![{condition}, seed {seed}]({path.name})\n\nRows, seed {seed}: {', '.join(rows)}.")
    card = RESULTS.with_suffix(".md")
    card.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return card


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="run the cells that are missing")
    parser.add_argument("--card", action="store_true", help="write tables and strips to results/controlnetpp_emoji.md")
    parser.add_argument("--condition", choices=CONDITIONS, action="append")
    parser.add_argument("--arm", choices=[*ARMS, *LAMBDAS], action="append")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument(
        "--mixed_precision",
        choices=DTYPES,
        default="bf16",
        help="bf16 halves the time on CPUs that have it (avx512_bf16, amx_bf16), on others it is ten times as slow",
    )
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    RESULTS.parent.mkdir(exist_ok=True)
    if args.run:
        for seed in args.seed or SEEDS:
            for condition in args.condition or CONDITIONS:
                # an arm needs the first stage, the one of equal time also the two that it is timed by: in this order
                for arm in arms_of(condition):
                    if arm in (args.arm or arms_of(condition)) and not find(condition, arm, seed):
                        run_cell(condition, arm, seed, args.mixed_precision)
    conditions = args.condition or CONDITIONS
    print("\n\n".join(f"{table(condition)}\n\n{gains(condition)}" for condition in conditions))
    if args.card:
        print(write_card(conditions))


if __name__ == "__main__":
    main()
