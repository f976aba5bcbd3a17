"""NeTI against Textual Inversion and P+ on held-out concepts of the emoji world, by the evaluator.

    python tests/benchmarks/neti_emoji.py --sweep        # learning rates, on concepts that are not scored
    python tests/benchmarks/neti_emoji.py --run          # the cells that are missing; needs the sweep
    python tests/benchmarks/neti_emoji.py --run --arm neti --tier A
    python tests/benchmarks/neti_emoji.py                # the tables of what is there
    python tests/benchmarks/neti_emoji.py --picture docs/neti.png   # of the concepts that were run on this machine
    python tests/benchmarks/neti_emoji.py --picture tier_b.png --tier B

Twelve concepts of tier A and twelve of tier B, five pictures each, one training seed, 15 prompts with three sampling
seeds. A cell trains one concept by the trainer's own command line and scores it: one of tier A at several steps, and a
mapper at several truncations, one of tier B at the end. It is found again by its settings and the hash of the world's
weights, so only what is missing is run. Differences between methods are paired over concepts (bootstrap, 95 %). Two
arms have a rate that no sweep chose, at which they learn as much of a concept as NeTI does; one is no method, but
scenes that are what the prompts say, with the concept itself in them, after a round trip through the VAE. Cells train
and draw in bfloat16, or as --mixed_precision says (each keeps which); one that is scored at several steps takes three
to five minutes of one core, any other two, real scenes seconds: all 172 cells, some six hours of one core.
"""

import hashlib
import json
import re
import subprocess
import sys
import textwrap
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "neti" / "emoji.yaml"
RESULTS = Path(__file__).parent / "results" / "neti_emoji.jsonl"
DTYPES = {"bf16": "bfloat16", "no": "float32"}  # of drawing, by the training's mixed_precision
SAMPLING_SEEDS = 3
CONCEPTS, SWEPT = 12, 2  # of each tier that are scored; of tier A, behind those, that choose the learning rate
STEPS = (50, 100, 200, 300)
TRUNCATIONS = (1, 4, 16)  # units of the mapper that are kept, beside all of them
RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
REAL = "real scenes"
ARMS = {
    "neti": {},
    "neti without bypass": {"mapper.bypass": "false"},
    "textual_inversion": {"method": "textual_inversion"},
    "p_plus": {"method": "p_plus"},
    "textual_inversion, faster": {"method": "textual_inversion"},
    "p_plus, faster": {"method": "p_plus"},
    REAL: {},
}
TIERS = {"neti": "AB", "textual_inversion": "AB", "p_plus": "AB", REAL: "AB"}  # of the others, A
UNSWEPT = {"textual_inversion, faster": 1e-2, "p_plus, faster": 1e-2, REAL: None}  # arm: its learning rate
FIGURES = ("image_similarity", "identity", "text_similarity")
SHOWN_ARMS, SHOWN_PROMPTS = ("neti", "textual_inversion", "p_plus"), (0, 7, 11)  # of the picture


def key(arm: str, tier: str, number: int, rate: float | None) -> dict:
    """What a cell is found by. `number`: which concept of the tier."""
    from alignkit.emoji.measure import world_hash

    settings = CONFIG.read_text(encoding="utf-8") + json.dumps([ARMS[arm], STEPS, TRUNCATIONS], sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:12]
    return {
        "arm": arm,
        "tier": tier,
        "number": number,
        "learning_rate": rate,
        "config": digest,
        "world_hash": world_hash(),
    }


def cells() -> list[dict]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def find(wanted: dict) -> dict | None:
    return next((cell for cell in cells() if wanted.items() <= cell.items()), None)


def folder_of(wanted: dict) -> Path:
    name = "_".join(str(value) for value in wanted.values()).replace(" ", "-")
    return ROOT / "runs" / "benchmarks" / f"neti_{name}"


def run_cell(wanted: dict, mixed_precision: str) -> None:
    from alignkit.emoji import concepts

    concept = concepts.concepts(wanted["tier"])[wanted["number"]]
    scores = (
        score_real_scenes(concept, wanted)
        if wanted["arm"] == REAL
        else train_and_score(concept, wanted, mixed_precision)
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    with open(RESULTS, "a", encoding="utf-8") as file:
        found = {"concept": concept.name, "commit": commit, "mixed_precision": mixed_precision, "scores": scores}
        file.write(json.dumps(wanted | found) + "\n")


def train_and_score(concept, wanted: dict, mixed_precision: str) -> list[dict]:
    from alignkit.emoji import concepts
    from alignkit.personalization import evaluate

    folder = folder_of(wanted)
    images = concepts.write(concept, folder / "images", seed=wanted["number"])
    command = [sys.executable, "training/neti.py", "--config", str(CONFIG), "--output_dir", str(folder / "run")]
    command += ["--train_data_dir", str(images), "--super_category_token", concept.sprite.noun.split()[-1]]
    command += ["--learning_rate", str(wanted["learning_rate"]), "--max_train_steps", str(STEPS[-1])]
    command += ["--validation_steps", "50", "--validation_prompts", '["a {}"]', "--validation_seeds", "[0]"]
    command += ["--mixed_precision", mixed_precision]
    for setting, value in ARMS[wanted["arm"]].items():
        command += [f"--{setting}", value]
    subprocess.run(command, cwd=ROOT, check=True)
    points = [(STEPS[-1], None)]
    if wanted["tier"] == "A" and wanted["number"] < CONCEPTS and wanted["arm"] not in UNSWEPT:
        points += [(step, None) for step in STEPS[:-1]]
        points += [(STEPS[-1], kept) for kept in TRUNCATIONS if wanted["arm"] == "neti"]
    scores = []
    for step, truncation in points:
        (row,) = evaluate(
            [str(folder / "run" / "steps" / str(step))], [str(images)], truncation=truncation, seeds=SAMPLING_SEEDS,
            dtype=DTYPES[mixed_precision], output_dir=str(folder / f"grid_{step}_{truncation}"),
        )  # fmt: skip
        scores.append({"step": step, "truncation": truncation} | {figure: row[figure] for figure in FIGURES})
    return scores


def score_real_scenes(concept, wanted: dict) -> list[dict]:
    """The same scores of scenes that are right: what a method could reach, where likeness costs the text nothing."""
    from alignkit.base import load_base
    from alignkit.emoji import concepts, scenes
    from alignkit.emoji.fit import to_float
    from alignkit.personalization import EMOJI_PROMPTS, Scorer

    prompts = [prompt for prompt in EMOJI_PROMPTS for _ in range(SAMPLING_SEEDS)]
    rng = np.random.default_rng(wanted["number"])
    drawn = to_float(np.stack([scenes.render(scene_of(concept, prompt, rng)).image for prompt in prompts]))
    shown = to_float(concepts.pictures(concept, 5, seed=wanted["number"]))
    base = load_base("emoji")
    with torch.no_grad():
        drawn = base.decode(base.encode(drawn)).clamp(0, 1)
    told = SimpleNamespace(placeholder_token="<thing>", super_category_token=concept.sprite.noun.split()[-1])
    scores = Scorer(None)(drawn, shown, prompts, told, "textual_inversion")
    means = {figure: round(float(scores[figure].mean()), 4) for figure in FIGURES}
    return [{"step": STEPS[-1], "truncation": None} | means]


def scene_of(concept, prompt: str, rng: np.random.Generator):
    """A scene that is what one of EMOJI_PROMPTS says."""
    from alignkit.emoji import scenes, sprites

    color = re.search(r"on an? (\w+) background", prompt)
    other = re.search(r"(left of|right of|next to|and) an? (\w+)", prompt)
    chosen = [concept.sprite] * (2 if prompt.startswith("two ") else 1)
    relation = None
    if other:
        chosen.append(sprites.by_name(other[2]))
        relation = other[1] if other[1] in ("left of", "right of") else None
    background = scenes.sample_background(rng, color[1] if color else None)
    said = {"tint": concept.tint, "tint_strength": 0.9 * bool(concept.tint)}
    said |= {"angle": 25.0} if "tilted" in prompt else {}
    said |= {"size": 46.0, "x": 32.0} if "large" in prompt else {"size": 20.0} if "small" in prompt else {}
    placed = scenes.place(rng, chosen, background["horizon"], False, relation)
    own = len(placed) - bool(other)  # by place: the other thing may be the same sprite, in its own colour
    objects = (*(replace(one, **said) for one in placed[:own]), *placed[own:])
    return scenes.Scene(**background, objects=objects)


def at(cell: dict, step: int = STEPS[-1], truncation: int | None = None) -> dict:
    return next(s for s in cell["scores"] if (s["step"], s["truncation"]) == (step, truncation))


def best_rate(arm: str) -> float | None:
    """With the highest mean of image and text similarity on the swept concepts, or what UNSWEPT says."""
    if arm in UNSWEPT:
        return UNSWEPT[arm]
    means = {}
    for rate in RATES:
        found = [find(key(arm, "A", CONCEPTS + i, rate)) for i in range(SWEPT)]
        if None in found:
            raise SystemExit(f"The sweep of {arm} is not complete: run this script with --sweep first.")
        means[rate] = np.mean([at(cell)["image_similarity"] + at(cell)["text_similarity"] for cell in found])
    return max(means, key=means.get)


def sweep() -> list[dict]:
    return [key(arm, "A", CONCEPTS + i, rate) for arm in swept_arms() for rate in RATES for i in range(SWEPT)]


def swept_arms() -> list[str]:
    return [arm for arm in ARMS if arm not in UNSWEPT]


def run() -> list[dict]:
    rates = {arm: best_rate(arm) for arm in ARMS}
    return [key(arm, tier, i, rates[arm]) for i in range(CONCEPTS) for arm in ARMS for tier in TIERS.get(arm, "A")]


def steps_to(cell: dict, figure: str, level: float) -> float:
    """Steps until a concept's curve first has this level, between two scored steps on a line; the last if never."""
    curve = [(step, at(cell, step)[figure]) for step in STEPS]
    if curve[0][1] >= level:
        return float(curve[0][0])
    for (step, low), (next_step, high) in zip(curve, curve[1:], strict=False):
        if low < level <= high:
            return step + (next_step - step) * (level - low) / (high - low)
    return float(STEPS[-1])


def table() -> str:
    """Markdown: means of each arm and tier over steps, NeTI's gain over the others, and what truncation does.

    The steps that NeTI needs are those to the image similarity that another arm has after all of its own, so that one
    without bypass shows what the bypass does; a concept that never gets there counts as the last step.
    """
    from alignkit.metrics import paired_bootstrap

    rates = {arm: best_rate(arm) for arm in ARMS}
    done = {
        (arm, tier): [find(key(arm, tier, i, rates[arm])) for i in range(CONCEPTS)]
        for arm in ARMS
        for tier in TIERS.get(arm, "A")
    }
    lines = ["| tier | arm | learning rate | concepts | step | " + " | ".join(FIGURES) + " |"]
    lines += ["|---" * (5 + len(FIGURES)) + "|"]

    def row(arm, tier, label, **where):
        there = [at(cell, **where) for cell in done[arm, tier] if cell]
        if there:
            means = " | ".join(f"{np.mean([s[figure] for s in there]):.3f}" for figure in FIGURES)
            lines.append(f"| {tier} | {arm} | {rates[arm] or ''} | {len(there)} | {label} | {means} |")

    for arm, tier in done:
        for step in STEPS if tier == "A" and arm not in UNSWEPT else STEPS[-1:]:
            row(arm, tier, step, step=step)
    for truncation in TRUNCATIONS:
        row("neti", "A", f"{STEPS[-1]}, {truncation} units", truncation=truncation)
    lines += ["", "| tier | NeTI minus | figure | mean | 95 % interval |", "|---|---|---|---|---|"]
    for (arm, tier), others in done.items():
        pairs = [(a, b) for a, b in zip(done["neti", tier], others, strict=True) if a and b]
        for figure in FIGURES if arm != "neti" and len(pairs) > 1 else ():
            one, other = ([at(cell)[figure] for cell in side] for side in zip(*pairs, strict=True))
            mean, low, high = paired_bootstrap(one, other)
            lines.append(f"| {tier} | {arm} | {figure} | {mean:+.3f} | {low:+.3f} to {high:+.3f} |")
    lines += ["", "| tier A: image similarity of | NeTI's steps to it | 95 % interval |", "|---|---|---|"]
    for arm in ARMS:
        pairs = [(a, b) for a, b in zip(done["neti", "A"], done[arm, "A"], strict=True) if a and b]
        if arm != "neti" and len(pairs) > 1:
            needed = [steps_to(a, "image_similarity", at(b)["image_similarity"]) for a, b in pairs]
            mean, low, high = paired_bootstrap(needed, [0.0] * len(needed))
            lines.append(f"| {arm}, {STEPS[-1]} steps | {mean:.0f} | {low:.0f} to {high:.0f} |")
    lines += ["", "| tier A: units kept | figure | change | 95 % interval |", "|---|---|---|---|"]
    kept = (*TRUNCATIONS, None)
    there = [cell for cell in done["neti", "A"] if cell]
    for few, more in zip(kept, kept[1:], strict=False) if len(there) > 1 else ():
        for figure in FIGURES:
            sides = ([at(cell, truncation=units)[figure] for cell in there] for units in (more, few))
            mean, low, high = paired_bootstrap(*sides)
            lines.append(f"| {few} to {more or 'all'} | {figure} | {mean:+.3f} | {low:+.3f} to {high:+.3f} |")
    return "\n".join(lines)


def sweep_table() -> str:
    """Markdown: what every rate gave at the last step, the mean over the concepts that choose it."""
    lines = ["| arm | learning rate | " + " | ".join(FIGURES) + " |", "|---" * (2 + len(FIGURES)) + "|"]
    for arm in swept_arms():
        for rate in RATES:
            there = [find(key(arm, "A", CONCEPTS + i, rate)) for i in range(SWEPT)]
            if all(there):
                means = (f"{np.mean([at(cell)[figure] for cell in there]):.3f}" for figure in FIGURES)
                lines.append(f"| {arm} | {rate} | {' | '.join(means)} |")
    return "\n".join(lines)


def picture(tier: str = "A", number: int = 6) -> Image.Image:
    """The first concepts that every method has: a row each of one that was shown, and each method's first seed."""
    from alignkit.personalization import EMOJI_PROMPTS

    rates = {arm: best_rate(arm) for arm in SHOWN_ARMS}
    rows = [[folder_of(key(arm, tier, i, rates[arm])) for arm in SHOWN_ARMS] for i in range(CONCEPTS)]
    rows = [row for row in rows if all((path / f"grid_{STEPS[-1]}_None").exists() for path in row)][:number]
    if not rows:
        raise SystemExit("No concept has been run with all methods on this machine: use --run first.")
    side, top = 128, 46
    columns = [(name, prompt) for name in SHOWN_ARMS for prompt in SHOWN_PROMPTS]
    sheet = Image.new("RGB", (side * (1 + len(columns)), top + side * len(rows)), "white")
    write = ImageDraw.Draw(sheet)
    write.text((4, 2), "one of five\nthat were shown", "black")
    for x, (name, prompt) in enumerate(columns, start=1):
        words = "\n".join([name, *textwrap.wrap(EMOJI_PROMPTS[prompt].format("<>"), 21)])
        write.text((x * side + 4, 2), words, "black")
    for y, row in enumerate(rows):
        place = top + side * y
        with Image.open(row[0] / "images" / "0.png") as shown:
            sheet.paste(shown.resize((side, side), Image.Resampling.NEAREST), (0, place))
        for x, (name, prompt) in enumerate(columns, start=1):
            folder = row[SHOWN_ARMS.index(name)] / f"grid_{STEPS[-1]}_None"
            with Image.open(folder / f"{STEPS[-1]}.png") as grid:
                sheet.paste(grid.crop((0, side * prompt, side, side * (prompt + 1))), (x * side, place))
    return sheet


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="run the missing cells of the sweep")
    parser.add_argument("--run", action="store_true", help="run the missing cells that are scored")
    parser.add_argument("--arm", action="append", choices=ARMS, help="these alone")
    parser.add_argument("--tier", action="append", choices=("A", "B"), help="these alone")
    parser.add_argument("--picture", metavar="FILE", help="write what the methods draw of some concepts")
    parser.add_argument(
        "--mixed_precision",
        choices=DTYPES,
        default="bf16",
        help="bf16 halves the time on CPUs that have it (avx512_bf16, amx_bf16), on others it is ten times as slow",
    )
    args = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    for wanted in [*(sweep() if args.sweep else ()), *(run() if args.run else ())]:
        chosen = wanted["arm"] in (args.arm or ARMS) and wanted["tier"] in (args.tier or "AB")
        if chosen and find(wanted) is None:
            run_cell(wanted, args.mixed_precision)
    if args.picture:
        picture(*(args.tier or "A")[:1]).save(args.picture)
    print(sweep_table())
    if not args.sweep:
        print(f"\n{table()}")


if __name__ == "__main__":
    main()
