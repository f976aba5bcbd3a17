"""Rewards that must teach nothing: the negative controls of the AlignProp experiments."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.rewards.aesthetic import Aesthetic
from alignkit.rewards.alignment import Alignment


class DetachedAesthetic(Aesthetic):
    """The aesthetic score with a gradient that knows nothing of it: a fixed random direction in pixel space.

    A score with no gradient at all is refused by the probe before training starts.
    """

    def score(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        noise = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(0), dtype=images.dtype)
        direction = (images * noise).mean((1, 2, 3))
        return super().score(images.detach(), prompts, **columns) + direction - direction.detach()


class ShuffledAlignment(Alignment):
    """Text-image alignment with each image judged by its neighbour's prompt."""

    def score(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        return super().score(images, [*prompts[1:], prompts[0]], **columns)
