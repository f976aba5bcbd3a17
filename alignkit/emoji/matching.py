"""An evaluator that learned nothing: what is not background, in connected pieces, each matched against the sprites.

Touching sprites are one piece and tinted ones match worse, so it undercounts; it is there because it cannot be fooled
in the way a network can.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from alignkit.emoji.scenes import SIZE
from alignkit.emoji.sprites import catalogue, picture

TEMPLATE = 20  # pixels, both ways
SMALLEST = 40  # pixels of the smallest piece that counts
DIFFERS = 0.13  # distance in RGB from which a pixel is not background


@dataclass(frozen=True)
class Piece:
    """A connected piece: its sprite's name as matched, the distance of the match (0 is perfect), its bounding box."""

    name: str
    distance: float
    box: tuple[slice, slice]


def to_segment(pixels: np.ndarray, end: np.ndarray, darkest: float) -> np.ndarray:
    """Distance in RGB from the shades of one colour, from `darkest` times it to itself."""
    share = np.clip((pixels @ end) / max(float(end @ end), 1e-6), darkest, 1.0)
    return np.linalg.norm(pixels - share[..., None] * end, axis=-1)


def foreground(image: np.ndarray) -> np.ndarray:
    """image [64, 64, 3] in [0, 1] -> bool [64, 64]: neither wall nor floor nor the floor in shadow."""
    wall = np.median(image[:3].reshape(-1, 3), axis=0)
    floor = np.median(image[-3:].reshape(-1, 3), axis=0)
    distance = np.minimum(np.linalg.norm(image - wall, axis=-1), to_segment(image, floor, 0.55))
    return ndimage.binary_opening(distance > DIFFERS, iterations=1)


@cache
def templates() -> tuple[np.ndarray, np.ndarray]:
    """Colours [sprites, 2, T, T, 3] as they are and mirrored, and opacity [sprites, 2, T, T, 1]."""
    colors, opacity = [], []
    for sprite in catalogue():
        cut = picture(sprite.name)
        rgba = np.asarray(cut.crop(cut.getbbox()).resize((TEMPLATE, TEMPLATE)), dtype=np.float32) / 255
        pair = np.stack([rgba, rgba[:, ::-1]])
        colors.append(pair[..., :3])
        opacity.append(pair[..., 3:])
    return np.stack(colors), np.stack(opacity)


def match(crop: np.ndarray, background: np.ndarray) -> tuple[str, float]:
    """The sprite that explains a crop [T, T, 3] best on that background, and the root mean square error."""
    colors, opacity = templates()
    error = ((opacity * colors + (1 - opacity) * background - crop) ** 2).mean((2, 3, 4)).min(axis=1)
    best = int(error.argmin())
    return catalogue()[best].name, float(np.sqrt(error[best]))


def pieces(image: np.ndarray) -> list[Piece]:
    """image [64, 64, 3] in [0, 1] -> what stands in it, largest first."""
    mask = foreground(image)
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    floor = np.median(image[-3:].reshape(-1, 3), axis=0)
    wall = np.median(image[:3].reshape(-1, 3), axis=0)
    found = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        area = int((labels[box] == number).sum())
        if area < SMALLEST:
            continue
        crop = image[box]
        zoom = (TEMPLATE / crop.shape[0], TEMPLATE / crop.shape[1], 1)
        background = floor if (box[0].start + box[0].stop) / 2 > SIZE / 2 else wall
        found.append((area, Piece(*match(ndimage.zoom(crop, zoom, order=1), background), box)))
    return [piece for _, piece in sorted(found, key=lambda item: -item[0])]
