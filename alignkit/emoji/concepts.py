"""Concepts to personalise the emoji world with, and their pictures.

Tier A: known sprites in a tint that the base never saw on them. Tier B: sprites that it never saw.

    python -m alignkit.emoji.concepts runs/data/thing --tier A --seed 3      # five pictures of one
"""

from argparse import ArgumentParser
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from alignkit.emoji import scenes, sprites


@dataclass(frozen=True)
class EmojiConcept:
    sprite: sprites.Sprite
    tint: str | None = None

    @property
    def name(self) -> str:
        return f"{self.tint} {self.sprite.name}" if self.tint else self.sprite.name


def concepts(tier: str, seed: int = 0) -> list[EmojiConcept]:
    """All of tier A or B, in a seeded order; of tier A, a sprite may come in several tints."""
    if tier not in ("A", "B"):
        raise ValueError(f"tier: expected A or B, got {tier!r}.")
    if tier == "A":
        named = sprites.of_tier("named")
        found = [EmojiConcept(s, t) for s in named for t in scenes.TINTS if scenes.held_out("tint", s.name, t)]
    else:
        found = [EmojiConcept(s) for s in sprites.of_tier("tier_b")]
    return [found[i] for i in np.random.default_rng(seed).permutation(len(found))]


def pictures(concept: EmojiConcept, number: int, seed: int) -> np.ndarray:
    """uint8 [number, 64, 64, 3]: the concept alone, on any background, in any size."""
    rng = np.random.default_rng((96, seed))
    images = []
    for _ in range(number):
        background = scenes.sample_background(rng)
        placed = scenes.place(rng, [concept.sprite], background["horizon"], False, None)[0]
        if concept.tint:
            placed = replace(placed, tint=concept.tint, tint_strength=0.9)
        images.append(scenes.render(scenes.Scene(**background, objects=(placed,))).image)
    return np.stack(images)


def write(concept: EmojiConcept, folder: str | Path, number: int = 5, seed: int = 0) -> Path:
    """Writes the pictures as PNG files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures(concept, number, seed)):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--tier", default="A", choices=["A", "B"])
    parser.add_argument("--seed", type=int, default=0, help="which concept, and the noise of its pictures")
    parser.add_argument("--number", type=int, default=5)
    args = parser.parse_args()
    chosen = concepts(args.tier)[args.seed]
    write(chosen, args.folder, args.number, args.seed)
    print(f"{args.number} pictures of a {chosen.name} in {args.folder}; its super-category is {chosen.sprite.noun!r}")
