"""What the consistency reward gains on the emoji world, by the evaluator: one cell a (condition, arm, seed).

    python tests/benchmarks/controlnetpp_emoji.py --run                            # the cells that are missing
    python tests/benchmarks/controlnetpp_emoji.py --run --condition segmentation --seed 0
    python tests/benchmarks/controlnetpp_emoji.py                                  # the table of what is there

The first stage is a cell of its own, trained once a (condition, seed); all arms go on from its weights with the same
data, noise and number of steps. A cell trains by the trainer's own command line and is scored by `alignkit evaluate
controllability`. It is found again by condition, arm, seed, config and the hash of the world's weights, so only what is
missing is run. All cells train and draw in bfloat16. On one idle core a first stage costs some eleven minutes, an arm
six, its evaluation three: about two hours for a condition, one and a half more for segmentation's controls and
thresholds.
"""

import hashlib
import json
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "controlnetpp_emoji.jsonl"
SEEDS = (0, 1, 2)
CONDITIONS = ("segmentation", "depth", "lineart")
FIRST_STAGE, STEPS = "first stage", 500  # updates of every arm behind the first stage
NUMBER = 256  # images of the evaluation
PRECISION = {"mixed_precision": "bf16"}  # of every arm

NO_REWARD, SAME_TIME, REWARD = "no reward", "no reward, time of the reward", "reward"
ARMS = {
    FIRST_STAGE: {"reward_weight": 0},
    NO_REWARD: {"reward_weight": 0},
    REWARD: {},
    SAME_TIME: {"reward_weight": 0},
}
SEGMENTATION_ARMS = ARMS | {
    "reward, t <= 100": {"reward_timesteps": "[0, 100]"},
    "reward, t <= 400": {"reward_timesteps": "[0, 400]"},
    "reward, all t": {"reward_timesteps": "[0, 999]"},
    "control: lambda 0": {"reward_weight": 0},  # has to be `no reward`, bit for bit
    "control: detached": {"condition.name": "tests.benchmarks.controls:DetachedSegmentation"},  # this, too
    "control: other labels": {"condition.name": "tests.benchmarks.controls:PermutedSegmentation"},
}


def arms_of(condition: str) -> dict[str, dict]:
    return SEGMENTATION_ARMS if condition == "segmentation" else ARMS


def config_of(condition: str) -> Path:
    return ROOT / "configs" / "controlnetpp" / f"emoji_{condition}.yaml"


def key(condition: str, arm: str, seed: int) -> dict:
    """What a cell is found by."""
    from alignkit.emoji.measure import world_hash

    settings = [PRECISION, arms_of(condition)[arm], STEPS, NUMBER]
    text = config_of(condition).read_text(encoding="utf-8") + json.dumps(settings)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return {"condition": condition, "arm": arm, "seed": seed, "config": digest, "world_hash": world_hash()}


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


def run_cell(condition: str, arm: str, seed: int) -> None:
    from alignkit.artifacts import sha256
    from alignkit.controlnet import WEIGHTS
    from alignkit.evaluate import controllability

    cell = key(condition, arm, seed)
    folder, config = folder_of(cell), config_of(condition)
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    overrides = {"output_dir": folder, "seed": seed, "reward_start": 0, **PRECISION, **arms_of(condition)[arm]}
    if arm == FIRST_STAGE:
        steps = settings["reward_start"]
    else:
        first = folder_of(key(condition, FIRST_STAGE, seed))
        overrides |= {"controlnet_model_name_or_path": first, "lr_warmup_steps": 0, "seed": seed + 1000}
        steps = STEPS
    if arm == SAME_TIME:
        slower = find(condition, REWARD, seed)["train_seconds"] / find(condition, NO_REWARD, seed)["train_seconds"]
        steps = round(STEPS * max(1.0, slower))
    overrides |= {"max_train_steps": steps, "validation_steps": 0}
    command = [sys.executable, "training/controlnetpp.py", "--config", str(config)]
    for name, value in overrides.items():
        command += [f"--{name}", str(value)]
    started = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, env=environment())
    seconds = time.monotonic() - started  # of a run that was stopped half-way, only the rest: look at both arms' alike
    real, scores = controllability(
        [str(folder)], condition, number=NUMBER, guidance_scale=settings["guidance_scale"], dtype="bfloat16"
    )
    for row in (real, scores):
        del row["model"]
    cell |= {"commit": commit(), "steps": steps, "train_seconds": round(seconds), "sha256": sha256(folder / WEIGHTS)}
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(cell | {"real": real, "scores": scores}) + "\n")


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}  # for the controls, which a config names by tests.benchmarks


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


METRICS = {"segmentation": ["mIoU"], "depth": ["RMSE"], "lineart": ["SSIM", "MS-SSIM"]}


def table(condition: str) -> str:
    """Markdown: every seed's scores, beside what real scenes reach after a VAE round trip."""
    figures = [*METRICS[condition], "alignment", "diversity", "KID"]
    rows = [f"**{condition}**\n", "| arm | seed | steps | minutes | " + " | ".join(figures) + " | weights |"]
    rows.append("|---" * (len(figures) + 5) + "|")
    ceiling = None
    for arm in arms_of(condition):
        for seed in SEEDS:
            cell = find(condition, arm, seed)
            if cell:
                ceiling = cell["real"]
                values = " | ".join(f"{cell['scores'][figure]:.4f}" for figure in figures)
                minutes = cell["train_seconds"] / 60
                rows.append(f"| {arm} | {seed} | {cell['steps']} | {minutes:.0f} | {values} | {cell['sha256'][:8]} |")
    if ceiling:
        values = " | ".join(f"{ceiling[figure]:.4f}" for figure in figures)
        rows.append(f"| real scenes, VAE round trip | | | | {values} | |")
    return "\n".join(rows)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="run the cells that are missing")
    parser.add_argument("--condition", choices=CONDITIONS, action="append")
    parser.add_argument("--arm", choices=list(SEGMENTATION_ARMS), action="append")
    parser.add_argument("--seed", type=int, action="append")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    RESULTS.parent.mkdir(exist_ok=True)
    if args.run:
        for seed in args.seed or SEEDS:
            for condition in args.condition or CONDITIONS:
                # an arm needs the first stage, the one of equal time also the two that it is timed by: in this order
                for arm in arms_of(condition):
                    if arm in (args.arm or SEGMENTATION_ARMS) and not find(condition, arm, seed):
                        run_cell(condition, arm, seed)
    print("\n\n".join(table(condition) for condition in args.condition or CONDITIONS))


if __name__ == "__main__":
    main()
