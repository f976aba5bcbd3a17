"""What AlignProp gains on the emoji world, by the evaluator, and how fast: one cell an (arm, seed), three seeds.

    python tests/benchmarks/alignprop_emoji.py --run                  # the cells that are missing
    python tests/benchmarks/alignprop_emoji.py --run --arm DDPO --seed 0
    python tests/benchmarks/alignprop_emoji.py                        # the tables of what is there
    python tests/benchmarks/alignprop_emoji.py --plot docs/race.png   # and the race's curves

A cell trains a LoRA by the trainer's own command line and has `alignkit evaluate reward` compare it with the base. It
is found again by arm, seed, config and the hash of the world's weights, so only what is missing is run. All cells train
and draw in bfloat16, in half of the time on CPUs that have it. A cell costs some eight minutes of one core, one of the
race twelve, of DDPO half an hour; all of them, four hours of two cores.

The second table is a race: the arms from AlignProp to DDPO train on one reward from one base with one kind of LoRA, and
are evaluated on the way, at the same prompts and noise. A run is prolonged from point to point, which changes nothing
in it: it resumes bit for bit, at a constant learning rate. Its time is that of the updates alone. The third table sums
the race up over the seeds.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "alignprop_emoji.jsonl"
SEEDS = (0, 1, 2)
GOAL = 0.5  # standard deviations of the base's aesthetic score: where the race is timed
RACE_IMAGES = 100  # drawn for each point of a curve
PRECISION = {"mixed_precision": "bf16"}  # of every arm


@dataclass(frozen=True)
class Arm:
    config: str
    overrides: dict[str, str] = field(default_factory=dict)
    prompts: str = "singles"  # that it is evaluated on
    updates: tuple[int, ...] = ()  # of a race: after which of them it is evaluated
    scored: int = 1  # images that the reward sees for each image of the batch

    @property
    def script(self) -> str:
        return f"training/{Path(self.config).parts[0]}.py"


def _racer(config: str, updates: tuple[int, ...], scored: int = 1, **plan) -> Arm:
    overrides = {"early_stop.enabled": "false", "validation_steps": "0"}
    return Arm(config, overrides | {f"plan.{name}": value for name, value in plan.items()}, "singles", updates, scored)


SHORT = (5, 10, 20, 30, 45, 60)  # updates of 16 images
ARMS = {
    # to the end, as the weighted sum goes: early stop would end it at a third of the updates
    "aesthetic": Arm("alignprop/emoji_aesthetic", {"early_stop.enabled": "false"}),
    "alignment on pairs": Arm("alignprop/emoji_pairs", prompts="pairs"),
    "exactly three": Arm("alignprop/emoji_three", prompts="three"),
    "alignment": Arm("alignprop/emoji_alignment"),
    "aesthetic + alignment": Arm(
        "alignprop/emoji_aesthetic",
        {
            "rewards": '[{"name": "aesthetic", "loss": "hinge", "target": 2.2}, {"name": "alignment", "weight": 6.0}]',
        },
    ),
    "the demo": Arm("alignprop/emoji"),
    "control: detached reward": Arm(
        "alignprop/emoji_aesthetic",
        {"rewards": '[{"name": "tests.benchmarks.controls:DetachedAesthetic", "loss": "hinge", "target": 2.2}]'},
    ),
    "control: shuffled prompts": Arm(
        "alignprop/emoji_alignment", {"rewards": '[{"name": "tests.benchmarks.controls:ShuffledAlignment"}]'}
    ),
    "AlignProp": _racer("alignprop/emoji_aesthetic", SHORT),
    "DRaFT-1": _racer("alignprop/emoji_aesthetic", SHORT, name="draft_k", settings="{k: 1}"),
    "DRaFT-LV": _racer("alignprop/emoji_aesthetic", SHORT, 3, name="draft_lv", settings="{copies: 2}"),
    "ReFL": _racer("alignprop/emoji_aesthetic", SHORT, name="refl", settings="{}"),
    "DRTune": _racer("alignprop/emoji_aesthetic", SHORT, name="drtune", settings="{}"),
    "DDPO": _racer("ddpo/emoji", (16, 32, 64, 128, 256)),  # to 4,096 images
}


def key(arm: str, seed: int) -> dict:
    """What a cell is found by."""
    from alignkit.emoji.measure import world_hash

    spec = ARMS[arm]
    text = (ROOT / "configs" / f"{spec.config}.yaml").read_text(encoding="utf-8")
    settings = yaml.safe_load(text)
    files = [ROOT / settings[name] for name in ("prompt_file", "validation_prompt_file")]
    files += [Path(__file__).parent / "controls.py"] * ("rewards" in spec.overrides)
    text += json.dumps(PRECISION | spec.overrides, sort_keys=True) + spec.prompts + json.dumps(spec.updates)
    text += "".join(f.read_text(encoding="utf-8") for f in files)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return {"arm": arm, "seed": seed, "config": digest, "world_hash": world_hash()}


def cells() -> list[dict]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def command(arm: str, seed: int, folder: Path) -> list[str]:
    """The trainer's command line."""
    spec = ARMS[arm]
    line = [sys.executable, spec.script, "--config", f"configs/{spec.config}.yaml"]
    line += ["--output_dir", str(folder), "--seed", str(seed)]
    for name, value in (PRECISION | spec.overrides).items():
        line += [f"--{name}", value]
    return line


def run_cell(arm: str, seed: int) -> None:
    from alignkit.evaluate import reward

    spec, cell = ARMS[arm], key(arm, seed)
    name = f"{arm.replace(' ', '_').replace(':', '')}_{seed}_{cell['config']}_{cell['world_hash']}"
    folder = ROOT / "runs" / "benchmarks" / name
    line, loras = command(arm, seed, folder), []
    for updates in spec.updates:
        lora = folder / f"after_{updates}"
        if not lora.exists():
            subprocess.run([*line, "--max_train_steps", str(updates)], cwd=ROOT, check=True)
            lora.mkdir()
            shutil.copy(folder / "pytorch_lora_weights.safetensors", lora)
        loras.append(str(lora))
    if spec.updates:
        base, *rows = reward(lora=loras, prompts=spec.prompts, number=RACE_IMAGES, dtype="bfloat16")
        cell["curve"] = curve(spec, folder, rows)
    else:
        subprocess.run(line, cwd=ROOT, check=True)
        base, *rows = reward(lora=[str(folder)], prompts=spec.prompts, dtype="bfloat16")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    for row in (base, rows[-1]):
        del row["model"]
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(cell | {"commit": commit, "base": base, "lora": rows[-1]}) + "\n")


def curve(spec: Arm, folder: Path, rows: Sequence[dict]) -> list[dict]:
    """Images that the reward has scored, seconds of training, gain and kept objects, after each of `spec.updates`."""
    from alignkit.artifacts import read_events

    events = read_events(folder / "events.jsonl")
    batch = next(event["global_batch"] for event in events if event["type"] == "start")
    seconds = [batch / event["images_per_second"] for event in events if event["type"] == "scalars"]
    return [
        {
            "images": updates * batch * spec.scored,
            "seconds": round(sum(seconds[:updates]), 1),
            "gain": row["aesthetic_gain_sd"],
            "present_kept": row["present_kept"],
        }
        for updates, row in zip(spec.updates, rows, strict=True)
    ]


def first_reached(points: Sequence[dict], what: str) -> float | None:
    """Images or seconds at which the gain first is GOAL, linear between points, from (0, 0); None where it is not."""
    before = {"gain": 0.0, what: 0.0}
    for point in points:
        if point["gain"] >= GOAL:
            share = (GOAL - before["gain"]) / (point["gain"] - before["gain"])
            return before[what] + share * (point[what] - before[what])
        before = point
    return None


def race(current: Sequence[dict]) -> str:
    """Markdown: gain against images and time for each arm and seed, and how much longer it took than AlignProp."""
    rows = [
        f"| arm | seed | gain in SD at (images scored; minutes) | first +{GOAL} SD | times AlignProp: images | time |",
        "|---" * 6 + "|",
    ]
    reference = {cell["seed"]: cell["curve"] for cell in current if cell["arm"] == "AlignProp"}
    for cell in current:
        points = cell["curve"]
        gains = ", ".join(f"{p['gain']:+.2f} ({p['images']:,}; {p['seconds'] / 60:.1f})" for p in points)
        images, seconds = first_reached(points, "images"), first_reached(points, "seconds")
        reached = "not reached" if images is None else f"{images:,.0f} images, {seconds / 60:.1f} min"
        ratios = [times(points, reference.get(cell["seed"], []), what) for what in ("images", "seconds")]
        rows.append(f"| {cell['arm']} | {cell['seed']} | {gains} | {reached} | {' | '.join(ratios)} |")
    return "\n".join(rows)


def times(points: Sequence[dict], reference: Sequence[dict], what: str) -> str:
    """How many times as much as the reference it took; a lower bound where it has not got there."""
    theirs, ours = first_reached(reference, what), first_reached(points, what)
    if theirs is None:
        return ""
    return f"more than {points[-1][what] / theirs:.1f} times" if ours is None else f"{ours / theirs:.1f} times"


def race_over_seeds(current: Sequence[dict]) -> str:
    """Markdown: of each arm, the race's figures as mean (least to most) over seeds.

    A run that has not got to the goal counts with where it ended, so that the mean is a lower bound.
    """
    rows = [
        f"| arm | seeds | images to the first +{GOAL} SD | minutes | times AlignProp: images | time |",
        "|---" * 6 + "|",
    ]
    curves: dict[str, dict[int, Sequence[dict]]] = {}
    for cell in current:
        curves.setdefault(cell["arm"], {})[cell["seed"]] = cell["curve"]
    reference = curves.get("AlignProp", {})
    for arm, runs in curves.items():
        beside = {s: run for s, run in runs.items() if first_reached(reference.get(s, []), "images") is not None}
        figures = [
            spread(runs, [taken(run, "images") for run in runs.values()], ",.0f"),
            spread(runs, [taken(run, "seconds") / 60 for run in runs.values()], ".1f"),
            *(
                spread(beside, [taken(run, what) / taken(reference[s], what) for s, run in beside.items()], ".1f")
                for what in ("images", "seconds")
            ),
        ]
        rows.append(f"| {arm} | {len(runs)} | {' | '.join(figures)} |")
    return "\n".join(rows)


def taken(points: Sequence[dict], what: str) -> float:
    """Images or seconds to the goal, or to the end where it is not reached."""
    reached = first_reached(points, what)
    return points[-1][what] if reached is None else reached


def spread(runs: dict[int, Sequence[dict]], values: Sequence[float], form: str) -> str:
    if not runs:
        return ""
    bound = "more than " * any(first_reached(run, "images") is None for run in runs.values())
    return f"{bound}{sum(values) / len(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def current_cells() -> list[dict]:
    """Those of today's configs and weights, by arm and seed."""
    found = [cell for cell in cells() if cell["arm"] in ARMS and key(cell["arm"], cell["seed"]).items() <= cell.items()]
    return sorted(found, key=lambda cell: (list(ARMS).index(cell["arm"]), cell["seed"]))


def plot(racers: Sequence[dict]) -> Figure:
    """The race: gain against images and against minutes, a line a seed."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colors = {arm: f"C{i}" for i, arm in enumerate(dict.fromkeys(cell["arm"] for cell in racers))}
    for axes, what, label in zip(panels, ("images", "seconds"), ("images scored", "minutes of training"), strict=True):
        axes.axhline(GOAL, color="gray", linewidth=0.8, linestyle=":")
        for cell in racers:
            x = [point[what] / (60 if what == "seconds" else 1) for point in cell["curve"]]
            first = cell is next(other for other in racers if other["arm"] == cell["arm"])
            gains = [point["gain"] for point in cell["curve"]]
            axes.plot(x, gains, ".-", color=colors[cell["arm"]], label=cell["arm"] if first else None)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("aesthetic gain, SD of the base's scores")
    panels[0].legend()
    return figure


def table() -> str:
    """Markdown: for each arm, every seed's gain in the figures that the arm is about; the race; that over the seeds."""
    figures = ["aesthetic_gain_sd", "present", "alignment", "exact", "pieces_matching", "present_kept"]
    rows = ["| arm | seed | " + " | ".join(figures) + " |", "|---" * (len(figures) + 2) + "|"]
    current = current_cells()
    for cell in current:
        values = []
        for figure in figures:
            before, after = cell["base"].get(figure), cell["lora"].get(figure)
            alone = figure in ("aesthetic_gain_sd", "present_kept")
            values.append("" if after is None else f"{after}" if alone else f"{before} → {after}")
        rows.append(f"| {cell['arm']} | {cell['seed']} | " + " | ".join(values) + " |")
    racers = [cell for cell in current if "curve" in cell]
    return "\n\n".join(["\n".join(rows), race(racers), race_over_seeds(racers)])


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="run the cells that are missing")
    parser.add_argument("--arm", choices=list(ARMS), action="append")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--plot", metavar="FILE", help="write the race's curves as a picture")
    args = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    if args.run:
        for seed in args.seed or SEEDS:
            for arm in args.arm or ARMS:
                wanted = key(arm, seed)
                if not any(wanted.items() <= cell.items() for cell in cells()):
                    run_cell(arm, seed)
    if args.plot:
        plot([cell for cell in current_cells() if "curve" in cell]).savefig(args.plot, dpi=100)
    print(table())


if __name__ == "__main__":
    main()
