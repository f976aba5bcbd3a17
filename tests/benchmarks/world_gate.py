"""The gate before the emoji world is frozen: can the base be personalised, and does that cost what AlignIT repairs?

    python tests/benchmarks/world_gate.py --run      # the concepts that are missing: five minutes of one core each
    python tests/benchmarks/world_gate.py            # the table of what is there

Six concepts. Tier A concepts are known sprites in a tint that the base never saw on them. Of five pictures of each,
- full fine-tuning of the U-Net has to reach 0.8 of the real-to-real identity similarity, and
- Textual Inversion (one vector, plain) has to lose at least 10 points of the other contents of prompts: the second
  object and the background, against the base with the sprite's own name.
Both begin with the noun's embedding for the new word. How to fine-tune was chosen on a seventh concept.
"""

import json
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from alignkit.artifacts import read_events
from alignkit.base import Base, load_base
from alignkit.emoji import measure, prompts, scenes, sprites
from alignkit.emoji.concepts import EmojiConcept, concepts, pictures
from alignkit.emoji.evaluator import Evaluator
from alignkit.emoji.fit import to_float

RESULTS = Path(__file__).parent / "results" / "world_gate.jsonl"
PLACEHOLDER = "~"  # one token, in no caption
NUMBER = 6
FULL = {"steps": 400, "learning_rate": 1e-3, "end_factor": 0.0}
INVERSION = {"steps": 300, "learning_rate": 5e-3, "end_factor": 1.0}


def train(
    base, images: torch.Tensor, parameters: list, seed: int, steps: int, learning_rate: float, end_factor: float
) -> None:
    """Ordinary denoising loss on the concept's pictures, under "a ~" and the openings of captions.

    The rate goes linearly to `end_factor` of itself.
    """
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, end_factor, steps)
    generator = torch.Generator().manual_seed(seed)
    latents = base.encode(images).detach()
    texts = [f"a {PLACEHOLDER}", f"a photo of a {PLACEHOLDER}", f"a picture of a {PLACEHOLDER}"]
    for parameter in parameters:
        parameter.requires_grad_(True)
    for step in range(steps):
        x_0 = latents[torch.randint(len(latents), (8,), generator=generator)]
        noise = torch.randn(x_0.shape, generator=generator)
        timestep = torch.randint(0, base.scheduler.config.num_train_timesteps, (8,), generator=generator)
        tokens = base.tokenizer([texts[step % 3]] * 8, padding="max_length", return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            prompt_embeds = base.text_encoder(tokens.input_ids).last_hidden_state
            output = base.unet(base.schedule.add_noise(x_0, noise, timestep), timestep, prompt_embeds).sample
        loss = F.mse_loss(output.float(), base.schedule.target(x_0, noise, timestep))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    for parameter in parameters:
        parameter.requires_grad_(False)


def identity(evaluator: Evaluator, drawn: torch.Tensor, real: torch.Tensor) -> float:
    return float((evaluator.embed_identity(drawn) @ evaluator.embed_identity(real).T).mean())


def others(evaluator: Evaluator, base, sprite: sprites.Sprite, word: str, seed: int) -> float:
    """Share of the other contents that are there: the second object, and the background."""
    rng = np.random.default_rng(seed)
    named = [s.name for s in sprites.of_tier("named") if s != sprite]
    seconds = [named[i] for i in rng.permutation(len(named))[:24]]
    colors = [list(scenes.BACKGROUNDS)[i % len(scenes.BACKGROUNDS)] for i in range(24)]
    asked = [
        f"{prompts.article(word)} and {prompts.article(n)} on {prompts.article(c + ' background')}"
        for n, c in zip(seconds, colors, strict=True)
    ]
    images = measure.draw(base, asked, seed=seed)
    right = [b == c for b, c in zip(evaluator.background(images), colors, strict=True)]
    return (measure.share(evaluator.present(images, seconds)) + measure.share(right)) / 2


def run(sprite: sprites.Sprite, tint: str, seed: int) -> dict:
    evaluator = Evaluator()
    concept = EmojiConcept(sprite, tint)
    shown, other = (to_float(pictures(concept, number, s)) for number, s in ((5, seed), (16, seed + 1)))
    real = identity(evaluator, other, shown)
    plain = load_base("emoji")
    before = others(evaluator, plain, sprite, sprite.name, seed)

    tuned, _ = with_new_word(sprite)
    train(tuned, shown, list(tuned.unet.parameters()), seed, **FULL)
    texts = [f"a {PLACEHOLDER} on {prompts.article(c + ' background')}" for c in scenes.BACKGROUNDS]
    full = identity(evaluator, measure.draw(tuned, texts, seed=seed), shown)

    inverted, token = with_new_word(sprite)
    table = inverted.text_encoder.get_input_embeddings().weight
    frozen = table.data.clone()
    train_row(inverted, table, token, shown, seed)
    assert torch.equal(table.data[torch.arange(len(table)) != token], frozen[torch.arange(len(table)) != token])
    inversion = identity(evaluator, measure.draw(inverted, texts, seed=seed), shown)
    return {
        "concept": f"{tint} {sprite.name}",
        "seed": seed,
        "world_hash": measure.world_hash(),
        "full": FULL,
        "inversion": INVERSION,
        "real_to_real": round(real, 4),
        "full_fine_tuning": round(full, 4),
        "share_of_real": round(full / real, 4),
        "textual_inversion": round(inversion, 4),
        "others_base": round(before, 4),
        "others_inversion": round(others(evaluator, inverted, sprite, PLACEHOLDER, seed), 4),
        "others_full": round(others(evaluator, tuned, sprite, PLACEHOLDER, seed), 4),
    }


def with_new_word(sprite: sprites.Sprite) -> tuple[Base, int]:
    """The base, and the token of PLACEHOLDER, whose embedding is the noun's."""
    base = load_base("emoji")
    table = base.text_encoder.get_input_embeddings().weight
    token = base.tokenizer(PLACEHOLDER).input_ids[1]
    table.data[token] = table.data[base.tokenizer(sprite.noun.split()[-1]).input_ids[1]]
    return base, token


def train_row(base: Base, table: torch.nn.Parameter, token: int, images: torch.Tensor, seed: int) -> None:
    """Textual Inversion: of the embedding table, only the placeholder's row moves."""
    table.requires_grad_(True)
    hook = table.register_hook(lambda grad: grad * (torch.arange(len(grad)) == token)[:, None])
    train(base, images, [table], seed, **INVERSION)
    hook.remove()


def found() -> dict[str, dict]:
    """The rows of today's weights and settings, by concept."""
    key = {"world_hash": measure.world_hash(), "full": FULL, "inversion": INVERSION}
    return {row["concept"]: row for row in read_events(RESULTS) if key.items() <= row.items()}


def table_of(rows: list[dict]) -> str:
    """Markdown, and what the gate says."""
    figures = ("real_to_real", "full_fine_tuning", "share_of_real", "others_base", "others_full", "others_inversion")
    lines = ["| concept | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    lines += [f"| {row['concept']} | " + " | ".join(f"{row[name]:.3f}" for name in figures) + " |" for row in rows]
    share = np.mean([row["share_of_real"] for row in rows])
    lost = np.mean([row["others_base"] - row["others_inversion"] for row in rows])
    lines += ["", f"Full fine-tuning reaches {share:.2f} of the real-to-real identity (gate: 0.8)."]
    lines += [f"Textual Inversion loses {100 * lost:.0f} points of the other contents (gate: at least 10)."]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="run the concepts that are missing")
    if parser.parse_args().run:
        for number, concept in enumerate(concepts("A")[:NUMBER]):
            if f"{concept.tint} {concept.sprite.name}" not in found():
                row = run(concept.sprite, concept.tint, number)
                with open(RESULTS, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    if rows := list(found().values()):
        print(table_of(rows))
