"""What one learns by looking: grids over two settings, where words look, where a reward looks."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from app.generate import Cancelled, Models, Settings, draw, in_turn

MAX_CELLS = 64
IG_STEPS, IG_BATCH = 24, 8  # points between gray and the picture, and how many are scored at a time
REWARDS = ("aesthetic", "alignment", "compressibility", "incompressibility")  # which need nothing but the emoji world


def _lora_weight(settings: Settings, value: float) -> Settings:
    if not settings.loras:
        raise ValueError("The LoRA's weight is an axis: choose a LoRA.")
    return replace(settings, loras=dict.fromkeys(settings.loras, value))


def _truncation(settings: Settings, value: float) -> Settings:
    if not settings.concepts:
        raise ValueError("The truncation is an axis: choose a concept.")
    return replace(settings, truncation=int(value) or None)


def _strength(settings: Settings, value: float) -> Settings:
    if not settings.concepts:
        raise ValueError("AlignIT's strength is an axis: choose a concept.")
    return replace(settings, alignit=True, strength=value)


AXES: dict[str, Callable[[Settings, float], Settings]] = {
    "seed": lambda settings, value: replace(settings, seed=int(value)),
    "guidance": lambda settings, value: replace(settings, guidance_scale=value),
    "LoRA weight": _lora_weight,
    "truncation": _truncation,
    "AlignIT strength": _strength,
}


@in_turn
def grid(
    models: Models,
    settings: Settings,
    x: tuple[str, list[float]],
    y: tuple[str, list[float]],
    tell: Callable[[int, int], None],
    stop: threading.Event,
) -> Image.Image:
    """One picture for each pair of values of two axes (keys of AXES), with the values beside them."""
    (x_name, xs), (y_name, ys) = x, y
    if x_name == y_name:
        raise ValueError(f"Both axes are the {x_name}: choose two different ones.")
    if not xs or not ys or len(xs) * len(ys) > MAX_CELLS:
        raise ValueError(f"A grid has 1 to {MAX_CELLS} pictures, got {len(xs)} x {len(ys)}.")
    cells = [[AXES[x_name](AXES[y_name](settings, below), across) for across in xs] for below in ys]
    for cell in sum(cells, []):
        cell.check()  # all of them before the first is drawn
    rows = [[draw(models, cell, tell=tell, stop=stop) for cell in row] for row in cells]
    return labelled(rows, [f"{x_name} {value:g}" for value in xs], [f"{y_name} {value:g}" for value in ys])


def labelled(rows: list[list[Image.Image]], columns: list[str], lines: list[str]) -> Image.Image:
    """Pictures of one size in a grid, small ones enlarged, with a head over each column and at the left of each row."""
    zoom = max(1, 128 // rows[0][0].width)
    width, height = zoom * rows[0][0].width, zoom * rows[0][0].height
    font = ImageFont.load_default(size=13)
    left, top = 10 + round(max(font.getlength(line) for line in lines)), 24
    sheet = Image.new("RGB", (left + len(columns) * (width + 4), top + len(lines) * (height + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for j, text in enumerate(columns):
        pen.text((left + j * (width + 4) + width / 2, top / 2), text, "black", font, anchor="mm")
    for i, (row, text) in enumerate(zip(rows, lines, strict=True)):
        pen.text((5, top + i * (height + 4) + height / 2), text, "black", font, anchor="lm")
        for j, picture in enumerate(row):
            enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + j * (width + 4), top + i * (height + 4)))
    return sheet


@in_turn
def attention(
    models: Models, settings: Settings, tell: Callable[[int, int], None], stop: threading.Event
) -> list[tuple[Image.Image, str]]:
    """The picture, then where each word of its prompt looks: its attention, averaged over layers, heads and steps."""
    from alignkit.alignment import mean_map
    from alignkit.attention import record_attention

    settings.check()
    settings = replace(settings, concepts=[], controlnet=None, alignit=False)
    # first, since loading a LoRA exchanges the projections that are listened to
    models.composed(settings) if settings.loras else models.plain(settings.base)
    network = models.base(settings.base).unet
    with record_attention(network) as record:
        picture = draw(models, settings, tell=tell, stop=stop)
    maps = mean_map(record)  # [S, h, w], as fine as the finest layer's
    tokenizer = models.base(settings.base).tokenizer
    shown, word, positions = [(picture, "the picture")], "", []
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(tokenizer(settings.prompt).input_ids)):
        if token in tokenizer.all_special_tokens:
            continue
        word, positions = word + token.removesuffix("</w>"), [*positions, i]
        if token.endswith("</w>"):
            shown.append((overlay(picture, maps[positions].mean(0).numpy()), word))
            word, positions = "", []
    return shown


@in_turn
def reward_map(
    name: str,
    picture: Image.Image,
    prompt: str,
    method: str,
    tell: Callable[[], None] = lambda: None,
    stop: threading.Event | None = None,
) -> tuple[Image.Image, float]:
    """Where a reward's gradient looks, and its score. method: saliency (|gradient|) or integrated gradients.

    Integrated gradients (Sundararajan et al. 2017) go from a gray picture to this one. `tell()` is called after each
    of `reward_calls(method)` evaluations of the reward.
    """
    import torch
    from captum.attr import IntegratedGradients, Saliency

    from alignkit.data import to_tensor
    from alignkit.rewards import build_reward

    if name not in REWARDS:
        raise ValueError(f"There is no reward {name!r} here: {', '.join(REWARDS)}.")
    picture.thumbnail((512, 512))
    reward = build_reward(name)

    def score(images: torch.Tensor) -> torch.Tensor:
        if stop is not None and stop.is_set():
            raise Cancelled
        scores = reward(images.clamp(0, 1), [prompt or "a picture"] * len(images))
        tell()
        return scores

    image = to_tensor(picture)[None].requires_grad_()
    with torch.no_grad():
        value = float(score(image))
    if method == "saliency":
        found = Saliency(score).attribute(image)
    else:
        gray = torch.full_like(image, 0.5)
        found = IntegratedGradients(score).attribute(image, gray, n_steps=IG_STEPS, internal_batch_size=IG_BATCH)
    return overlay(picture, found.detach().abs().sum((0, 1)).numpy()), value


def reward_calls(method: str) -> int:
    return 2 if method == "saliency" else 1 + IG_STEPS // IG_BATCH


def overlay(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """A heat map, [H, W] or coarser, over a faded picture; a handful of very hot pixels do not dim the rest."""
    import matplotlib

    heat = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR))
    low, high = heat.min(), np.quantile(heat, 0.99)
    colours: Any = matplotlib.colormaps["inferno"]((heat - low) / max(high - low, 1e-12))[..., :3]
    gray = np.asarray(picture.convert("L"), dtype=float)[..., None] / 255
    return Image.fromarray((255 * (0.35 * gray + 0.65 * colours)).round().astype(np.uint8))
