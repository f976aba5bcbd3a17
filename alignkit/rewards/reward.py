"""What a reward is: a frozen module that scores images differentiably."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Interpolation in half precision may step over the edge by a rounding error; a wrong value range is off by far more.
RANGE_TOLERANCE = 1e-3


class Reward(nn.Module):
    """`reward(images [B,3,H,W] in [0,1], prompts, **columns) -> scores [B]`, higher is better.

    A subclass loads its model in `__init__` (see `frozen`) and computes `score`; calling the reward checks what goes in
    and what comes out. `columns` are the further columns of the prompt file, one value a prompt: a count, an object.

    Attributes:
        resolution: side in pixels that images are resized to before scoring, None when they are scored as they come.
        range: lowest and highest possible score.
        differentiable: False refuses the reward in trainers that need its gradient.
    """

    resolution: int | None = None
    range: tuple[float, float] = (-math.inf, math.inf)
    differentiable: bool = True

    def score(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        """Checked images [B,3,H,W] in [0,1] (float32 or float64) -> [B]; sample i depends on image i alone."""
        raise NotImplementedError(f"{type(self).__name__} does not define score(images, prompts, **columns).")

    def check(self, prompts: Sequence[str], **columns: Sequence[Any]) -> None:
        """Raises ValueError for prompts whose columns `score` could not take; a training asks before it starts."""

    def forward(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        """Images [B,3,H,W] in [0,1], B prompts, columns of B values -> [B] float32 (float64 for float64 images).

        Raises:
            ValueError: wrong shape or range of the images, number of prompts or values, or shape of the scores.
        """
        name = type(self).__name__
        check_images(images, name)
        for key, values in {"prompts": prompts, **columns}.items():
            if isinstance(values, str) or len(values) != len(images):
                got = repr(values) if isinstance(values, str) else len(values)
                raise ValueError(f"{name}: expected a list of {len(images)} {key}, one an image, got {got}.")
        # A trainer's autocast would round pixels to 8 bits of mantissa, coarser than what a reward should see.
        with torch.autocast(images.device.type, enabled=False):
            scores = self.score(images if images.dtype == torch.float64 else images.float(), prompts, **columns)
        if scores.shape != (len(images),):
            raise ValueError(
                f"{name}: expected scores of shape ({len(images)},), one an image, got {tuple(scores.shape)}. Reduce "
                "over pixels, not over the batch; of an image-text matrix take the diagonal."
            )
        return scores if scores.dtype == torch.float64 else scores.float()

    def train(self, mode: bool = True) -> "Reward":
        """Rewards stay in eval mode, also inside a module that trains."""
        return super().train(False)


def frozen(module: nn.Module) -> nn.Module:
    """The module in eval mode, its parameters without gradient: else every backward pass fills all their `.grad`."""
    return module.requires_grad_(False).eval()


def check_images(images: Tensor, name: str) -> None:
    """Raises ValueError unless images are a floating point [B,3,H,W] within [0,1]."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"{name}: expected floating point images [B,3,H,W], got {images.dtype} of shape {tuple(images.shape)}."
        )
    low, high = images.detach().aminmax()
    if not (low.isfinite() and high.isfinite()):
        raise ValueError(f"{name}: expected images in [0, 1], got values that are not finite.")
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise ValueError(
            f"{name}: expected images in [0, 1], got [{low:.3g}, {high:.3g}]. Convert the VAE's [-1, 1] exactly once, "
            "by images / 2 + 0.5: `Base.decode` already has, and a double denormalisation halves the contrast."
        )


def column(columns: dict[str, Sequence[Any]], name: str, default: Any, prompts: Sequence[str]) -> list[Any]:
    """The values of a prompt file's column, `default` where there are none.

    Raises:
        ValueError: a prompt has neither a value nor a default.
    """
    values = [default if value is None else value for value in columns.get(name, [None] * len(prompts))]
    for prompt, value in zip(prompts, values, strict=True):
        if value is None:
            raise ValueError(
                f"expected a value of {name!r} for the prompt {prompt!r}, got none: add a column {name!r} to the "
                f"prompt file, or one value for all prompts to the reward's args ({name}: ...)."
            )
    return values


def names_of(objects: Sequence[str | Sequence[str]]) -> list[list[str]]:
    """Of each image, whose object is a name or several. Raises ValueError where one has none."""
    names = [[one] if isinstance(one, str) else list(one) for one in objects]
    if not all(names):
        raise ValueError('expected an object, as "cat", or several, as ["cat", "rose"], got an empty list.')
    return names


def least(
    score: Callable[[Tensor, list[str]], Tensor], images: Tensor, objects: Sequence[str | Sequence[str]]
) -> Tensor:
    """Scores [B] of images [B,3,H,W] that each have a name or several: the lowest of what `score` gives for its names.

    `score` takes an image for each name. Raises as `names_of`.
    """
    names = names_of(objects)
    rows = [i for i, own in enumerate(names) for _ in own]
    scores = score(images[rows], [name for own in names for name in own])
    return torch.stack([own.amin() for own in scores.split([len(own) for own in names])])
