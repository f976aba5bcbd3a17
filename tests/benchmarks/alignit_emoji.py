"""What AlignIT gives back on the emoji world, by the evaluator: one cell a (customiser, tier, concept).

    python tests/benchmarks/alignit_emoji.py --run                        # the cells that are missing
    python tests/benchmarks/alignit_emoji.py --run --customiser lora --tier A
    python tests/benchmarks/alignit_emoji.py                              # the table of what is there
    python tests/benchmarks/alignit_emoji.py --leak                       # of what was trained on this machine

A cell trains the concept by its trainer's own command line from five pictures and draws 12 prompts, each with a second
object, a background and, in half of them, a count, from three seeds, the same noise in every arm:

- base: the base model, with the class noun
- customised: what was trained
- alignit
- oracle: the base's U-Net with the concept's keys and values alone, where a customiser changes more than text, keys and
  values; else that is what AlignIT does already
- control, random rows: random token embeddings in the concept's place
- control, noun's rows: AlignIT at strength 0; without such a customiser, this is the base

"others" is the share of second objects, backgrounds and counts that are right. "identity" is the mean cosine of the
identity judge with the concept's pictures; since that judge embeds whole pictures, it is taken of four prompts of its
own, which ask for the concept alone on a background. A cell costs some five minutes of one idle core; twelve concepts
of two tiers, two hours a customiser. Concepts are the replicates: intervals are paired bootstraps over them. The leak
is the relative change of the other tokens' keys and values against the base's, in a real sampling run of one prompt of
each concept, mean over layers.
"""

import hashlib
import json
import subprocess
import sys
from argparse import ArgumentParser
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from alignkit import alignment
from alignkit import concepts as learned_concepts
from alignkit.alignit import Concept, alignit
from alignkit.base import load_base
from alignkit.customized import Customized, load
from alignkit.emoji import concepts, measure, scenes, sprites
from alignkit.emoji.captions import article
from alignkit.emoji.evaluator import Evaluator
from alignkit.emoji.fit import to_float

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "alignit_emoji.jsonl"
DTYPES = {"bf16": "bfloat16", "no": "float32"}  # of drawing, by the training's mixed_precision
NUMBER, SEEDS = 12, (0, 1, 2)
PROMPTS, ALONE = 12, 4  # with other things in them; with the concept alone

# customiser: trainer, config, overrides
CUSTOMISERS = {
    "textual_inversion": ("neti", "neti/emoji", {"method": "textual_inversion"}),
    "p_plus": ("neti", "neti/emoji", {"method": "p_plus"}),
    "neti": ("neti", "neti/emoji", {}),
    "neti, learnt under AlignIT": ("neti", "neti/emoji", {"alignit": "true"}),
    "custom_diffusion": ("customize", "customize/emoji_custom_diffusion", {}),
    "lora": ("customize", "customize/emoji_lora", {}),
    "dreambooth": ("customize", "customize/emoji_dreambooth", {}),
}
CHANGES_MORE = ("lora", "dreambooth")  # than text, keys and values: what AlignIT cannot give back


def key(customiser: str, tier: str, number: int) -> dict:
    """What a cell is found by."""
    _, config, overrides = CUSTOMISERS[customiser]
    text = (ROOT / "configs" / f"{config}.yaml").read_text(encoding="utf-8") + json.dumps([overrides, PROMPTS, ALONE])
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    concept = concepts.concepts(tier)[number]
    cell = {"customiser": customiser, "tier": tier, "concept": concept.name, "config": digest}
    return cell | {"world_hash": measure.world_hash()}


def cells() -> list[dict]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def noun_of(concept: concepts.EmojiConcept) -> str:
    """What the base knows it as: the sprite's own name where it has seen the sprite, else its kind."""
    return concept.sprite.name if concept.tint else concept.sprite.noun


def folder_of(customiser: str, tier: str, number: int) -> Path:
    cell = key(customiser, tier, number)
    words = f"{customiser} {tier} {cell['concept']} {cell['config']} {cell['world_hash']}"
    return ROOT / "runs" / "benchmarks" / "alignit" / "_".join(words.replace(",", "").split())


def train(customiser: str, tier: str, number: int, mixed_precision: str) -> Path:
    """Trains, or goes on where an earlier call stopped. Returns the folder, ready to be loaded."""
    trainer, config, overrides = CUSTOMISERS[customiser]
    concept, folder = concepts.concepts(tier)[number], folder_of(customiser, tier, number)
    pictures = concepts.write(concept, folder / "pictures", seed=number)
    command = [sys.executable, f"training/{trainer}.py", "--config", f"configs/{config}.yaml"]
    command += ["--output_dir", str(folder), "--validation_steps", "0", "--report_to", "none"]
    command += ["--mixed_precision", "no" if customiser == "dreambooth" else mixed_precision]
    if trainer == "neti":
        command += ["--train_data_dir", str(pictures), "--super_category_token", noun_of(concept).split()[-1]]
    else:
        command += ["--instance_data_dir", str(pictures), "--class_noun", noun_of(concept)]
    for option, value in overrides.items():
        command += [f"--{option}", value]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


def asked(concept: concepts.EmojiConcept, seed: int) -> list[dict]:
    """Prompts with {} for the concept and other things, and what is to be in them."""
    rng = np.random.default_rng(seed)
    named = [s for s in sprites.of_tier("named") if s != concept.sprite]
    found = []
    for i in range(PROMPTS):
        second = named[rng.integers(len(named))]
        color = list(scenes.BACKGROUNDS)[rng.integers(len(scenes.BACKGROUNDS))]
        count = 2 if i % 2 else 1
        others = f"two {second.plural}" if count == 2 else article(second.name)
        place = f"on {article(color + ' background')}"
        text = f"a {{}} and {others} {place}" if i % 4 < 2 else f"{others} and a {{}} {place}"
        found.append({"prompt": text, "second": second.name, "count": count, "background": color})
    return found


def alone(seed: int) -> list[str]:
    """Prompts with {} for the concept and nothing else but a background."""
    colors = np.random.default_rng(seed).permutation(list(scenes.BACKGROUNDS))[:ALONE]
    return [f"a {{}} on {article(color + ' background')}" for color in colors]


def draw(pipe, texts: list[str], seed: int) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(1000 * seed + i) for i in range(len(texts))]
    return pipe(
        texts, generator=generators, num_inference_steps=25, guidance_scale=5.0, output_type="pt"
    ).images.float().clamp(0, 1)  # fmt: skip


def random_rows(base, noun: str, seed: int) -> Concept:
    learned = learned_concepts.create("textual_inversion", base, "<random>", noun.split()[-1])
    vectors = learned.module.vectors.data
    drawn = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed))
    vectors.copy_(drawn * vectors.norm() / drawn.norm())
    return Concept("<random>", noun, learned=learned)


def base_arms(base, noun: str, seed: int) -> dict:
    """Name -> (pipeline, context, the concept's words) of what no customiser has a part in."""
    random = random_rows(base, noun, seed)
    return {
        "base": (base, nullcontext(), noun),
        "control, random rows": (base, alignit(base, [random]), random.phrase),
    }


def arms(customiser: str, base, customized: Customized) -> dict:
    """The same, of one customiser."""
    concept = customized.concept
    found = {
        "customised": (customized.pipe, customized.plain(), concept.phrase),
        "alignit": (customized.pipe, customized.aligned(), concept.phrase),
    }
    if customiser in CHANGES_MORE:
        found["oracle"] = (base, alignit(base, [concept], custom=customized.pipe), concept.phrase)
        found["control, noun's rows"] = (customized.pipe, customized.aligned(strength=0.0), concept.phrase)
    return found


def figures(pipe, context, words: str, tier: str, number: int) -> dict[str, float]:
    """An arm's, means over seeds."""
    concept, evaluator = concepts.concepts(tier)[number], Evaluator()
    real = evaluator.embed_identity(to_float(concepts.pictures(concept, 5, seed=number)))
    wanted = asked(concept, number)
    index = torch.tensor([[sprites.by_name(want["second"]).index] for want in wanted])
    counts = torch.tensor([float(want["count"]) for want in wanted])
    several, rows = counts > 1, []
    with context:
        for seed in SEEDS:
            images = draw(pipe, [want["prompt"].format(words) for want in wanted], seed)
            single = draw(pipe, [prompt.format(words) for prompt in alone(number)], seed)
            found = evaluator.counts(images).gather(1, index)[:, 0]
            right = [b == want["background"] for b, want in zip(evaluator.background(images), wanted, strict=True)]
            rows.append(
                {
                    "second": float((found > 0.5).float().mean()),
                    "background": float(np.mean(right)),
                    "count": float((found[several].round() == counts[several]).float().mean()),
                    "identity": float((evaluator.embed_identity(single) @ real.T).mean()),
                }
            )
    mean = {name: round(float(np.mean([row[name] for row in rows])), 4) for name in rows[0]}
    return mean | {"others": round((mean["second"] + mean["background"] + mean["count"]) / 3, 4)}


def base_figures(base, noun: str, tier: str, number: int, mixed_precision: str) -> dict[str, dict]:
    """Of `base_arms`, drawn once for all customisers that call the concept's class the same."""
    concept = concepts.concepts(tier)[number]
    words = f"base {tier} {concept.name} as {noun} {mixed_precision} {measure.world_hash()} {PROMPTS} {ALONE}.json"
    path = ROOT / "runs" / "benchmarks" / "alignit" / "_".join(words.split())
    if not path.exists():
        found = {arm: figures(*how, tier, number) for arm, how in base_arms(base, noun, number).items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def run_cell(customiser: str, tier: str, number: int, mixed_precision: str) -> None:
    base, own = (load_base("emoji", dtype=getattr(torch, DTYPES[mixed_precision])).pipeline() for _ in range(2))
    customized = load(own, train(customiser, tier, number, mixed_precision))
    found = base_figures(base, customized.concept.noun, tier, number, mixed_precision)
    found |= {arm: figures(*how, tier, number) for arm, how in arms(customiser, base, customized).items()}
    # at strength 0 all keys and values are the base's, bit for bit (tests/test_alignit.py), and here all else is, too
    found.setdefault("control, noun's rows", found["base"])
    cell = key(customiser, tier, number) | {"mixed_precision": mixed_precision, "arms": found}
    cell["commit"] = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(cell) + "\n")
    print(json.dumps(cell), flush=True)


def bootstrap(values: np.ndarray, statistic, draws: int = 10000) -> tuple[float, float]:
    """95 % interval of a statistic of rows [concepts, ...]."""
    rng = np.random.default_rng(0)
    drawn = [statistic(values[rng.integers(len(values), size=len(values))]) for _ in range(draws)]
    return tuple(np.nanpercentile(drawn, [2.5, 97.5]))


def share_back(rows: np.ndarray) -> float:
    """Of what the customiser cost the others, the share that comes back; rows of (base, customised, alignit)."""
    base, customised, aligned = rows.mean(0)
    return (aligned - customised) / (base - customised) if base > customised else float("nan")


def change(rows: np.ndarray) -> float:
    """In percent of the first of two columns."""
    before, after = rows.mean(0)
    return 100 * (after / before - 1)


def table() -> str:
    """Markdown: a row for each customiser and tier. What comes back counts where at least 10 points were lost."""
    done = cells()
    head = ["customiser", "tier", "concepts", "others: base", "customised", "AlignIT", "oracle", "points lost",
            "share back", "identity: customised", "AlignIT", "change, %", "oracle", "random rows",
            "noun's rows"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for customiser in CUSTOMISERS:
        for tier in "AB":
            wanted = [key(customiser, tier, number) for number in range(NUMBER)]
            found = [next((cell for cell in done if one.items() <= cell.items()), None) for one in wanted]
            own = [cell["arms"] for cell in found if cell]
            if not own:
                continue

            def mean(arm: str, figure: str, own: list[dict] = own) -> str:
                return f"{np.mean([c[arm][figure] for c in own]):.3f}" if arm in own[0] else ""

            others = np.array([[c[arm]["others"] for arm in ("base", "customised", "alignit")] for c in own])
            low, high = bootstrap(others, share_back)
            identity = np.array([[c[arm]["identity"] for arm in ("customised", "alignit")] for c in own])
            fell, rose = bootstrap(identity, change)
            row = [customiser, tier, str(len(own))]
            row += [mean(arm, "others") for arm in ("base", "customised", "alignit", "oracle")]
            row += [f"{100 * (others[:, 0] - others[:, 1]).mean():.1f}"]
            row += [f"{share_back(others):.2f} [{low:.2f}, {high:.2f}]"]
            row += [mean(arm, "identity") for arm in ("customised", "alignit")]
            row += [f"{change(identity):+.1f} [{fell:+.1f}, {rose:+.1f}]", mean("oracle", "identity")]
            row += [mean(f"control, {rows}", "identity") for rows in ("random rows", "noun's rows")]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def leaks(customiser: str, tier: str, number: int) -> dict[str, dict[str, float]]:
    """Arm -> keys and values -> mean over layers, of a concept that was trained."""
    base, own = (load_base("emoji").pipeline() for _ in range(2))
    customized = load(own, folder_of(customiser, tier, number))
    prompt = asked(concepts.concepts(tier)[number], number)[0]["prompt"]
    settings = alignment.Settings(seed=number)
    records = {arm: alignment.record(arm, base, customized, prompt, settings) for arm in alignment.ARMS}
    rows = alignment.other_rows(base, customized, prompt)
    found = {arm: alignment.leak(records["base"], records[arm], rows) for arm in ("customised", "alignit")}
    return {
        arm: {side: float(np.mean(list(layers.values()))) for side, layers in sides.items()}
        for arm, sides in found.items()
    }


def leak_table() -> str:
    """Markdown: the leak before and after, of the concepts that were trained on this machine."""
    lines = ["| customiser | tier | concepts | keys: customised | AlignIT | values: customised | AlignIT |"]
    lines += ["|---" * 7 + "|"]
    for customiser in CUSTOMISERS:
        for tier in "AB":
            there = [i for i in range(NUMBER) if (folder_of(customiser, tier, i) / "README.md").exists()]
            found = [leaks(customiser, tier, number) for number in there]
            if found:
                means = [np.mean([f[arm][side] for f in found])
                         for side in ("keys", "values") for arm in ("customised", "alignit")]  # fmt: skip
                figures = " | ".join(f"{mean:.4f}" for mean in means)
                lines.append(f"| {customiser} | {tier} | {len(found)} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="run the cells that are missing")
    parser.add_argument("--customiser", choices=list(CUSTOMISERS), action="append")
    parser.add_argument("--tier", choices=["A", "B"], action="append")
    parser.add_argument("--leak", action="store_true", help="measure it instead, half a minute a concept")
    parser.add_argument("--concepts", type=int, default=NUMBER, help="the first so many of each tier")
    parser.add_argument(
        "--mixed_precision",
        choices=DTYPES,
        default="bf16",
        help="bf16 halves the time on CPUs that have it (avx512_bf16, amx_bf16), on others it is ten times as slow",
    )
    args = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    if args.run:
        for number in range(args.concepts):
            for tier in args.tier or "AB":
                for customiser in args.customiser or CUSTOMISERS:
                    wanted = key(customiser, tier, number)
                    if not any(wanted.items() <= cell.items() for cell in cells()):
                        run_cell(customiser, tier, number, args.mixed_precision)
    print(leak_table() if args.leak else table())


if __name__ == "__main__":
    main()
