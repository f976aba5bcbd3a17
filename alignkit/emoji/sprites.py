"""The sprites: names, class nouns, plurals and the split into named, known and held out."""

import csv
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from alignkit.emoji import ROOT, SPRITE_DIR

NOUN_PLURALS = {
    "animal": "animals", "bird": "birds", "sea creature": "sea creatures", "insect": "insects", "fruit": "fruits",
    "vegetable": "vegetables", "flower": "flowers", "plant": "plants", "vehicle": "vehicles", "food": "foods",
    "drink": "drinks", "instrument": "instruments", "ball": "balls", "building": "buildings",
    "garment": "garments", "tool": "tools", "thing": "things",
}  # fmt: skip


@dataclass(frozen=True)
class Sprite:
    """One emoji. `tier` is "named" (evaluated), "known" (trained too) or "tier_b" (never shown to the base model)."""

    index: int
    tier: str
    noun: str
    name: str
    plural: str
    codepoint: str


@cache
def catalogue() -> tuple[Sprite, ...]:
    """Every sprite, trained ones first. A sprite's label in a class map is its index + 1, since 0 is the background."""
    with open(ROOT / "catalogue.tsv", encoding="utf-8") as file:
        return tuple(Sprite(index=i, **row) for i, row in enumerate(csv.DictReader(file, delimiter="\t")))


@cache
def by_name(name: str) -> Sprite:
    for sprite in catalogue():
        if name in (sprite.name, sprite.plural):
            return sprite
    raise KeyError(f"{name!r} is not a sprite of the emoji world.")


@cache
def of_tier(*tiers: str) -> tuple[Sprite, ...]:
    return tuple(s for s in catalogue() if s.tier in tiers)


@cache
def picture(name: str) -> Image.Image:
    """RGBA picture of a sprite, square."""
    return Image.open(SPRITE_DIR / f"{name.replace(' ', '_')}.png").convert("RGBA")


@cache
def mean_color(name: str) -> np.ndarray:
    """Mean RGB in [0, 1] over the opaque pixels, [3]."""
    rgba = np.asarray(picture(name), dtype=np.float32) / 255
    return (rgba[..., :3] * rgba[..., 3:]).sum((0, 1)) / rgba[..., 3].sum()
