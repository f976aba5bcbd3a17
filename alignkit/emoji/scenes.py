"""Scenes of the emoji world: sampled as data, rendered to 64 x 64 pixels, with exact labels.

A scene is a wall and a floor in shades of one named colour, and one to four sprites that stand on the floor. A sprite's
depth decides where its foot is (nearer is lower) and, with jitter, how large it is; nearer sprites cover farther ones.
"""

import colorsys
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
from PIL import Image

from alignkit.emoji import sprites
from alignkit.emoji.sprites import Sprite

SIZE = 64  # pixels, both ways

# hue, saturation and value in [0, 1]; a scene's shade varies around them
BACKGROUNDS = {
    "red": (0.0, 0.75, 0.8), "orange": (0.08, 0.8, 0.95), "yellow": (0.15, 0.7, 0.95), "green": (0.36, 0.6, 0.65),
    "blue": (0.6, 0.7, 0.8), "purple": (0.77, 0.55, 0.65), "pink": (0.92, 0.4, 0.95), "brown": (0.07, 0.6, 0.45),
    "gray": (0.0, 0.0, 0.55), "white": (0.0, 0.0, 0.96), "black": (0.0, 0.0, 0.1),
}  # fmt: skip
# a tint's hue and saturation
TINTS = {
    "red": (0.0, 0.8), "yellow": (0.14, 0.8), "green": (0.35, 0.7), "blue": (0.6, 0.75), "purple": (0.78, 0.6),
    "gray": (0.0, 0.0),
}  # fmt: skip
RELATIONS = ("left of", "right of", "in front of", "behind", "next to")


@dataclass(frozen=True)
class Placed:
    """One sprite in a scene. Positions and sizes in pixels; `x` is its centre, `y` its foot; `depth` 1 is nearest."""

    sprite: Sprite
    x: float
    y: float
    size: float
    depth: float
    tint: str | None = None
    tint_strength: float = 0.0
    mirrored: bool = False
    angle: float = 0.0  # degrees, counter-clockwise


@dataclass(frozen=True)
class Scene:
    background: str
    wall: tuple[float, float, float]  # RGB in [0, 1]
    floor: tuple[float, float, float]
    horizon: float  # pixels from the top
    objects: tuple[Placed, ...] = ()
    relation: str | None = None  # of the first object to the second
    blur: float = 0.0  # standard deviation in pixels, of the whole picture
    noise: float = 0.0  # standard deviation, of a range of 1


@dataclass(frozen=True)
class Rendered:
    """A picture with its exact labels, all [64, 64] but the image.

    image: uint8 RGB [64, 64, 3]. class_map: 0 for background, else sprite index + 1. instance_map: 0, else object
    number + 1.
    depth: float32 in [0, 1], 1 nearest; the wall is 0, the floor rises to 1 at the lower edge, a sprite is a plane.
    """

    image: np.ndarray
    class_map: np.ndarray
    instance_map: np.ndarray
    depth: np.ndarray

    @property
    def edges(self) -> np.ndarray:
        """Where the instance changes to the right or below, bool [64, 64]."""
        edges = np.zeros_like(self.instance_map, dtype=bool)
        edges[:, :-1] |= np.diff(self.instance_map, axis=1) != 0
        edges[:-1] |= np.diff(self.instance_map, axis=0) != 0
        return edges


def held_out(*parts: str, share: float = 0.15) -> bool:
    """Whether a combination is kept from training: a fixed pseudo-random `share` of all, whatever their order."""
    digest = hashlib.sha256("|".join(sorted(parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def holds_unseen(chosen: Sequence[Sprite], background: str | None = None) -> bool:
    """Whether a scene of these sprites (on that background) has a pair, a count or a background that is held out."""
    numbers = Counter(sprite.name for sprite in chosen)
    return (
        any(held_out("pair", a, b) for a, b in combinations(numbers, 2))
        or any(n > 1 and held_out("count", name, str(n)) for name, n in numbers.items())
        or any(background and held_out("background", name, background) for name in numbers)
    )


def foot(depth: float, horizon: float) -> float:
    """Pixel row where something of that depth touches the floor."""
    return horizon + 5 + depth * (SIZE - 2 - horizon - 5)


def sample_background(rng: np.random.Generator, name: str | None = None) -> dict:
    """Fields of a Scene: a named colour in a random shade, and a floor that is a darker one."""
    name = name or str(rng.choice(list(BACKGROUNDS)))
    hue, saturation, value = BACKGROUNDS[name]
    hue += rng.uniform(-0.02, 0.02) * (saturation > 0)
    saturation *= rng.uniform(0.75, 1.1)
    value = value + rng.uniform(-0.1, 0.1) if name not in ("white", "black") else value + rng.uniform(-0.05, 0.04)
    wall = colorsys.hsv_to_rgb(hue % 1, min(saturation, 1), min(max(value, 0), 1))
    shade = rng.uniform(0.72, 0.88)
    floor = tuple(shade * c + (0.06 if name == "black" else 0) for c in wall)
    return {"background": name, "wall": wall, "floor": floor, "horizon": rng.uniform(26, 40)}


def place(
    rng: np.random.Generator, chosen: list[Sprite], horizon: float, overlapping: bool, relation: str | None
) -> tuple[Placed, ...]:
    """Put sprites on the floor, apart or overlapping, in the relation that is asked of the first two."""
    low, high = {1: (24, 46), 2: (20, 34), 3: (17, 27)}.get(len(chosen), (15, 24))
    overlapping = overlapping or relation in ("in front of", "behind")
    for attempt in range(200):
        depths = rng.uniform(0, 1, len(chosen))
        if relation in ("in front of", "behind"):
            near, far = rng.uniform(0.6, 1), rng.uniform(0, 0.3)
            depths[:2] = (near, far) if relation == "in front of" else (far, near)
        # nearer is larger, but size has a jitter of its own
        sizes = low + (high - low) * np.clip(0.5 * depths + 0.5 * rng.uniform(0, 1, len(chosen)), 0, 1)
        sizes *= 1 if attempt < 100 else 0.85
        xs = np.array([rng.uniform(s / 2, SIZE - s / 2) for s in sizes])
        if relation in ("in front of", "behind"):
            xs[1] = np.clip(
                xs[0] + rng.choice([-1, 1]) * rng.uniform(0.35, 0.6) * sizes[:2].mean(),
                sizes[1] / 2,
                SIZE - sizes[1] / 2,
            )
        if relation == "left of" and xs[1] - xs[0] < 0.7 * sizes[:2].mean():
            continue
        if relation == "right of" and xs[0] - xs[1] < 0.7 * sizes[:2].mean():
            continue
        ys = np.array([foot(d, horizon) for d in depths])
        if well_spread(xs, ys - sizes / 2, sizes, overlapping):
            break
    return tuple(
        Placed(sprite, float(x), float(y), float(size), float(depth))
        for sprite, x, y, size, depth in zip(chosen, xs, ys, sizes, depths, strict=True)
    )


def well_spread(xs: np.ndarray, ys: np.ndarray, sizes: np.ndarray, overlapping: bool) -> bool:
    """Whether no two sprites come nearer than their mean size (0.55 of it where overlap is wanted)."""
    for i in range(len(xs)):
        for j in range(i):
            near = (0.45 if overlapping else 0.9) * (sizes[i] + sizes[j]) / 2
            if np.hypot(xs[i] - xs[j], 0.8 * (ys[i] - ys[j])) < near:
                return False
    return True


def vary(rng: np.random.Generator, placed: Placed, seen_tints_only: bool = True) -> Placed:
    """Give a sprite its attributes: some are tinted, mirrored or tilted.

    `seen_tints_only` leaves out the (sprite, tint) combinations of concept tier A.
    """
    tint, strength = None, 0.0
    if rng.random() < 0.2:
        tint, strength = str(rng.choice(list(TINTS))), rng.uniform(0.6, 0.95)
        if seen_tints_only and held_out("tint", placed.sprite.name, tint):
            tint, strength = None, 0.0
    angle = rng.choice([-1, 1]) * rng.uniform(15, 40) if rng.random() < 0.12 else rng.uniform(-4, 4)
    return replace(placed, tint=tint, tint_strength=strength, mirrored=bool(rng.random() < 0.5), angle=float(angle))


def sprite_pixels(placed: Placed) -> np.ndarray:
    """RGBA float32 in [0, 1] at the size that the scene asks for, [h, w, 4]."""
    picture = sprites.picture(placed.sprite.name)
    if placed.mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = max(4, round(placed.size))
    picture = picture.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
    if abs(placed.angle) > 1:
        picture = picture.rotate(placed.angle, Image.Resampling.BICUBIC, expand=True)
        picture = picture.crop(picture.getbbox())  # or the corners that turned away would hold it above the floor
    rgba = np.asarray(picture, dtype=np.float32) / 255
    if placed.tint is None:
        return rgba
    hue, saturation = TINTS[placed.tint]
    luminance = rgba[..., :3] @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    color = np.array(colorsys.hsv_to_rgb(hue, saturation, 1.0), dtype=np.float32)
    tinted = (0.25 + 0.9 * luminance)[..., None] * color
    rgb = (1 - placed.tint_strength) * rgba[..., :3] + placed.tint_strength * np.clip(tinted, 0, 1)
    return np.concatenate([rgb, rgba[..., 3:]], axis=-1).astype(np.float32)


ROWS, COLUMNS = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)


def render(scene: Scene, rng: np.random.Generator | None = None) -> Rendered:
    """Draw a scene, farthest sprite first. `rng` is needed only where the scene has noise."""
    on_floor = scene.horizon <= ROWS
    image = np.where(on_floor[..., None], np.float32(scene.floor), np.float32(scene.wall))
    depth = np.where(on_floor, (ROWS - scene.horizon) / (SIZE - scene.horizon), 0).astype(np.float32)
    class_map = np.zeros((SIZE, SIZE), dtype=np.int64)
    instance_map = np.zeros((SIZE, SIZE), dtype=np.int64)
    for number, placed in sorted(enumerate(scene.objects), key=lambda item: item[1].depth):
        width = 0.42 * placed.size
        shadow = np.exp(-((((COLUMNS - placed.x) / width) ** 2 + ((ROWS - placed.y + 0.5) / (0.3 * width)) ** 2) ** 2))
        image = image * (1 - 0.35 * shadow * on_floor)[..., None]
        rgba = sprite_pixels(placed)
        h, w = rgba.shape[:2]
        left, top = round(placed.x - w / 2), round(placed.y) - h
        y0, y1, x0, x1 = max(top, 0), min(top + h, SIZE), max(left, 0), min(left + w, SIZE)
        if y0 >= y1 or x0 >= x1:
            continue
        rgba = rgba[y0 - top : y1 - top, x0 - left : x1 - left]
        alpha = rgba[..., 3:]
        image[y0:y1, x0:x1] = alpha * rgba[..., :3] + (1 - alpha) * image[y0:y1, x0:x1]
        covered = alpha[..., 0] > 0.5
        class_map[y0:y1, x0:x1][covered] = placed.sprite.index + 1
        instance_map[y0:y1, x0:x1][covered] = number + 1
        depth[y0:y1, x0:x1][covered] = placed.depth
    if scene.blur:
        from scipy.ndimage import gaussian_filter

        image = gaussian_filter(image, (scene.blur, scene.blur, 0))
    if scene.noise:
        image = image + rng.normal(0, scene.noise, image.shape)
    return Rendered((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), class_map, instance_map, depth)


@dataclass(frozen=True)
class World:
    """What a draw of scenes may hold. The defaults are the base model's training distribution."""

    tiers: tuple[str, ...] = ("named", "known")
    named_share: float = 0.6  # of the draws, where both named and known sprites are allowed
    kinds: dict[str, float] = field(
        default_factory=lambda: {"empty": 0.02, "single": 0.43, "count": 0.2, "pair": 0.27, "several": 0.08}
    )
    overlap: float = 0.15  # share of scenes with several sprites in which they may overlap
    with_held_out: bool = False  # allow the held-out pairs, counts, tints and backgrounds

    def draw_sprite(self, rng: np.random.Generator) -> Sprite:
        tiers = self.tiers
        if "named" in tiers and len(tiers) > 1:
            others = tuple(tier for tier in tiers if tier != "named")
            tiers = ("named",) if rng.random() < self.named_share else others
        pool = sprites.of_tier(*tiers)
        return pool[rng.integers(len(pool))]

    def draw(self, rng: np.random.Generator) -> Scene:
        """A random scene."""
        background = sample_background(rng)
        kind = rng.choice(list(self.kinds), p=np.array(list(self.kinds.values())) / sum(self.kinds.values()))
        chosen, relation = self.choose(rng, kind)
        while not self.with_held_out and holds_unseen(chosen, background["background"]):
            background = sample_background(rng)
        overlapping = rng.random() < self.overlap
        objects = place(rng, chosen, background["horizon"], overlapping, relation)
        objects = tuple(vary(rng, o, not self.with_held_out) for o in objects)
        if kind == "count":  # the sprites of a count look alike in colour
            objects = tuple(replace(o, tint=objects[0].tint, tint_strength=objects[0].tint_strength) for o in objects)
        return Scene(**background, objects=objects, relation=relation)

    def choose(self, rng: np.random.Generator, kind: str) -> tuple[list[Sprite], str | None]:
        """Which sprites, and in which relation, for a scene of that kind."""
        while True:
            first, second = self.draw_sprite(rng), self.draw_sprite(rng)
            number = int(rng.integers(2, 5))
            if kind == "empty":
                return [], None
            if kind == "single":
                return [first], None
            if kind == "count" and (self.with_held_out or not holds_unseen([first] * number)):
                return [first] * number, None
            if first == second or (not self.with_held_out and holds_unseen((first, second))):
                continue
            if kind == "pair":
                relation = str(rng.choice(RELATIONS)) if rng.random() < 0.5 else None
                return [first, second], None if relation == "next to" else relation
            if kind == "several":
                third = self.draw_sprite(rng) if rng.random() < 0.5 else first
                if third == second or (not self.with_held_out and holds_unseen((first, second, third))):
                    continue
                return [first, second, third], None
