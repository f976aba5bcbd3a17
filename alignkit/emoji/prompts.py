"""Prompts of the emoji world with the facts that they state, for training and for evaluation, seen or held out."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from alignkit.emoji.captions import NUMBERS, article
from alignkit.emoji.scenes import BACKGROUNDS, Scene, held_out, place, sample_background
from alignkit.emoji.sprites import by_name, of_tier


@dataclass(frozen=True)
class Prompt:
    """`objects` are sprite names, `count` how many of the (only) object; `background` a colour."""

    prompt: str
    objects: tuple[str, ...]
    count: int
    background: str


def shuffled(items: list, seed: int) -> list:
    return [items[i] for i in np.random.default_rng(seed).permutation(len(items))]


def backgrounds_of(*names: str) -> list[str]:
    """Colours that the base has seen behind each of these sprites."""
    return [b for b in BACKGROUNDS if not any(held_out("background", n, b) for n in names)]


def singles(seed: int = 0, unseen: bool = True) -> list[Prompt]:
    """ "a cat on a red background": every named sprite on every colour that is held out for it (or is not)."""
    names = [s.name for s in of_tier("named")]
    return shuffled(
        [
            Prompt(f"{article(n)} on {article(b + ' background')}", (n,), 1, b)
            for n in names
            for b in BACKGROUNDS
            if held_out("background", n, b) == unseen
        ],
        seed,
    )


def pairs(seed: int = 0, unseen: bool = True) -> list[Prompt]:
    """ "a cat and a dog on a red background": pairs of named sprites that never met in training (or did)."""
    rng = np.random.default_rng(seed)
    found = []
    for first, second in combinations([s.name for s in of_tier("named")], 2):
        if held_out("pair", first, second) != unseen:
            continue
        if rng.random() < 0.5:
            first, second = second, first
        colors = backgrounds_of(first, second)
        color = colors[rng.integers(len(colors))]
        found.append(
            Prompt(
                f"{article(first)} and {article(second)} on {article(color + ' background')}", (first, second), 1, color
            )
        )
    return shuffled(found, seed)


def counts(number: int | None = None, seed: int = 0, unseen: bool = True) -> list[Prompt]:
    """ "three cats on a red background": counts that the base has not seen of that sprite (or has)."""
    rng = np.random.default_rng(seed)
    found = []
    for sprite in of_tier("named"):
        for n in [number] if number else NUMBERS:
            if held_out("count", sprite.name, str(n)) != unseen:
                continue
            for color in backgrounds_of(sprite.name):
                found.append(
                    Prompt(
                        f"{NUMBERS[n]} {sprite.plural} on {article(color + ' background')}", (sprite.name,), n, color
                    )
                )
    return [found[i] for i in rng.permutation(len(found))]


def exactly(number: int, seed: int = 0, unseen: bool = True) -> list[Prompt]:
    """ "exactly three cats on a red background"."""
    return [Prompt(f"exactly {p.prompt}", p.objects, p.count, p.background) for p in counts(number, seed, unseen)]


def scene_of(prompt: Prompt, rng: np.random.Generator) -> Scene:
    """A scene that is what the prompt says: its objects apart from each other, in their own colours."""
    background = sample_background(rng, prompt.background)
    chosen = [by_name(name) for name in prompt.objects] * prompt.count
    return Scene(**background, objects=place(rng, chosen, background["horizon"], overlapping=False, relation=None))
