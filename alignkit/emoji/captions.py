"""Captions of scenes: a small grammar with the words that the methods need."""

from dataclasses import replace

import numpy as np

from alignkit.emoji.scenes import BACKGROUNDS, TINTS, Placed, Scene
from alignkit.emoji.sprites import NOUN_PLURALS, Sprite, catalogue, of_tier

OPENINGS = ("a photo of", "a picture of", "an image of", "a drawing of", "a painting of", "a rendering of")
NUMBERS = {2: "two", 3: "three", 4: "four"}


def article(words: str) -> str:
    vowel = words[0] in "aeiou" and not words.startswith(("unicorn", "ufo"))
    return f"{'an' if vowel else 'a'} {words}"


def attributes(placed: Placed, rng: np.random.Generator) -> str:
    """The adjectives of a sprite, with a trailing space; a strong attribute is mentioned more often than not."""
    words = []
    if placed.size > 34 and rng.random() < 0.4:
        words.append("large")
    if placed.size < 22 and rng.random() < 0.25:
        words.append("small")
    if abs(placed.angle) > 12 and rng.random() < 0.8:
        words.append("tilted")
    if placed.tint and rng.random() < 0.95:
        words.append(placed.tint)
    return "".join(f"{word} " for word in words)


def named(sprite: Sprite, rng: np.random.Generator, plural: bool, noun_share: float) -> str:
    """A sprite's own name or, in `noun_share` of the cases, its class noun."""
    if rng.random() < noun_share:
        return NOUN_PLURALS[sprite.noun] if plural else sprite.noun
    return sprite.plural if plural else sprite.name


def subject(scene: Scene, rng: np.random.Generator, noun_share: float) -> str:
    groups: dict[Sprite, list[Placed]] = {}
    for placed in scene.objects:
        groups.setdefault(placed.sprite, []).append(placed)
    phrases = []
    for sprite, members in groups.items():
        name = named(sprite, rng, len(members) > 1, noun_share)
        if len(members) == 1:
            phrases.append(article(attributes(members[0], rng) + name))
        else:
            tint = f"{members[0].tint} " if members[0].tint and all(m.tint == members[0].tint for m in members) else ""
            number = "exactly " * (rng.random() < 0.15) + NUMBERS[len(members)]
            phrases.append(f"{number} {tint}{name}")
    if scene.relation:
        return f"{phrases[0]} {scene.relation} {phrases[1]}"
    if len(phrases) == 2 and rng.random() < 0.15:
        return f"{phrases[0]} next to {phrases[1]}"
    return ", ".join(phrases[:-1]) + " and " + phrases[-1] if len(phrases) > 1 else phrases[0]


def caption(scene: Scene, rng: np.random.Generator, noun_share: float = 0.1) -> str:
    """Describe a scene; what is said is true, but not everything is said."""
    place = article(f"{scene.background} background")
    if not scene.objects:
        return place
    words = subject(scene, rng, noun_share)
    if rng.random() < 0.3:
        words = f"{rng.choice(OPENINGS)} {words}"
    return f"{words} on {place}" if rng.random() < 0.9 else words


def mutated(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one thing changed, for a caption that is almost right: a hard negative of contrastive training.

    Its positions are not those of a real scene: caption it, do not render it.
    """
    kinds = ["background"]
    if scene.objects:
        kinds += ["sprite", "sprite", "count"] + ["tint"] * any(o.tint for o in scene.objects)
        kinds += ["relation"] * 2 * (scene.relation is not None)
    kind = rng.choice(kinds)
    objects = scene.objects
    if kind == "background":
        return replace(scene, background=str(rng.choice([b for b in BACKGROUNDS if b != scene.background])))
    if kind == "relation":
        return replace(scene, objects=(objects[1], objects[0], *objects[2:]))
    if kind == "count":
        first = [o for o in objects if o.sprite == objects[0].sprite]
        number = rng.choice([n for n in (1, 2, 3, 4) if n != len(first)])
        rest = tuple(o for o in objects if o.sprite != objects[0].sprite)
        return replace(scene, objects=(first[0],) * number + rest, relation=None)
    old = objects[rng.integers(len(objects))]
    if kind == "tint":
        old = next(o for o in objects if o.tint)
        tint = str(rng.choice([t for t in TINTS if t != old.tint]))
        return replace(scene, objects=tuple(replace(o, tint=tint) if o.sprite == old.sprite else o for o in objects))
    present = {o.sprite for o in objects}
    pool = [s for s in of_tier("named", "known") if s not in present]
    alike = [s for s in pool if s.noun == old.sprite.noun]
    pool = alike if alike and rng.random() < 0.5 else pool
    new = pool[rng.integers(len(pool))]
    return replace(scene, objects=tuple(replace(o, sprite=new) if o.sprite == old.sprite else o for o in objects))


def vocabulary() -> list[str]:
    """Every word of the grammar, for the tokenizer."""
    words = set(
        [
            "a",
            "an",
            "and",
            "on",
            "of",
            "in",
            "front",
            "behind",
            "left",
            "right",
            "next",
            "to",
            "background",
            "exactly",
            "large",
            "small",
            "tilted",
            "mirrored",
            "the",
            "with",
        ]
    )
    words |= set(" ".join(OPENINGS).split()) | set(NUMBERS.values()) | set(BACKGROUNDS) | set(TINTS)
    for sprite in catalogue():
        words |= set(f"{sprite.name} {sprite.plural} {sprite.noun} {NOUN_PLURALS[sprite.noun]}".split())
    return sorted(words)
