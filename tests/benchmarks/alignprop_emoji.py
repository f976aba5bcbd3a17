"""What AlignProp gains on the emoji world, by the evaluator: one cell an (arm, seed), three seeds.

    python tests/benchmarks/alignprop_emoji.py --run                  # the cells that are missing
    python tests/benchmarks/alignprop_emoji.py --run --arm aesthetic --seed 0
    python tests/benchmarks/alignprop_emoji.py                        # the table of what is there

A cell trains a LoRA by the trainer's own command line and has `alignkit evaluate reward` compare it with the base. It
is found again by arm, seed, config and the hash of the world's weights, so only what is missing is run. A cell costs
ten to fifteen minutes of two cores; all of them, some five hours.
"""

import hashlib
import json
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "alignprop_emoji.jsonl"
SEEDS = (0, 1, 2)

# arm: config, overrides, prompts it is evaluated on
ARMS = {
    "aesthetic": ("emoji", {}, "singles"),
    "alignment on pairs": ("emoji_pairs", {}, "pairs"),
    "exactly three": ("emoji_three", {}, "three"),
    "alignment": ("emoji_alignment", {}, "singles"),
    "aesthetic + alignment": ("emoji_sum", {}, "singles"),
    "control: detached reward": (
        "emoji",
        {"rewards": '[{"name": "tests.benchmarks.controls:DetachedAesthetic", "loss": "hinge", "target": 2.2}]'},
        "singles",
    ),
    "control: shuffled prompts": (
        "emoji_alignment",
        {"rewards": '[{"name": "tests.benchmarks.controls:ShuffledAlignment"}]'},
        "singles",
    ),
}


def key(arm: str, seed: int) -> dict:
    """What a cell is found by."""
    from alignkit.emoji.measure import world_hash

    config, overrides, prompts = ARMS[arm]
    text = (ROOT / "configs" / "alignprop" / f"{config}.yaml").read_text(encoding="utf-8")
    settings = yaml.safe_load(text)
    files = [ROOT / settings[name] for name in ("prompt_file", "validation_prompt_file")]
    files += [Path(__file__).parent / "controls.py"] * bool(overrides)
    text += json.dumps(overrides, sort_keys=True) + prompts + "".join(f.read_text(encoding="utf-8") for f in files)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return {"arm": arm, "seed": seed, "config": digest, "world_hash": world_hash()}


def cells() -> list[dict]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def run_cell(arm: str, seed: int) -> None:
    from alignkit.evaluate import reward

    config, overrides, prompts = ARMS[arm]
    cell = key(arm, seed)
    name = f"{arm.replace(' ', '_').replace(':', '')}_{seed}_{cell['config']}_{cell['world_hash']}"
    folder = ROOT / "runs" / "benchmarks" / name
    command = [sys.executable, "training/alignprop.py", "--config", f"configs/alignprop/{config}.yaml"]
    command += ["--output_dir", str(folder), "--seed", str(seed)]
    for name, value in overrides.items():
        command += [f"--{name}", value]
    subprocess.run(command, cwd=ROOT, check=True)
    base, lora = reward(lora=[str(folder)], prompts=prompts)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    for row in (base, lora):
        del row["model"]
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(cell | {"commit": commit, "base": base, "lora": lora}) + "\n")


def table() -> str:
    """Markdown: for each arm, every seed's gain in the figures that the arm is about."""
    figures = ["aesthetic_gain_sd", "present", "alignment", "exact", "pieces_matching", "present_kept"]
    rows = ["| arm | seed | " + " | ".join(figures) + " |", "|---" * (len(figures) + 2) + "|"]
    current = [cell for cell in cells() if key(cell["arm"], cell["seed"]).items() <= cell.items()]
    for cell in sorted(current, key=lambda c: (list(ARMS).index(c["arm"]), c["seed"])):
        values = []
        for figure in figures:
            before, after = cell["base"].get(figure), cell["lora"].get(figure)
            alone = figure in ("aesthetic_gain_sd", "present_kept")
            values.append("" if after is None else f"{after}" if alone else f"{before} → {after}")
        rows.append(f"| {cell['arm']} | {cell['seed']} | " + " | ".join(values) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="run the cells that are missing")
    parser.add_argument("--arm", choices=list(ARMS), action="append")
    parser.add_argument("--seed", type=int, action="append")
    args = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    if args.run:
        for seed in args.seed or SEEDS:
            for arm in args.arm or ARMS:
                wanted = key(arm, seed)
                if not any(wanted.items() <= cell.items() for cell in cells()):
                    run_cell(arm, seed)
    print(table())


if __name__ == "__main__":
    main()
