"""Rewards and conditions that must teach nothing: the negative controls of the experiments."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.conditions.depth import Depth
from alignkit.conditions.edges import LineArt
from alignkit.conditions.segmentation import IGNORE, Segmentation
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


class PermutedSegmentation(Segmentation):
    """Asks for classes that are not there: every class but the background is exchanged for another one."""

    def compare(self, predicted: Tensor, targets: Tensor) -> Tensor:
        others = 1 + torch.randperm(self.num_classes - 1, generator=torch.Generator().manual_seed(0))
        exchanged = torch.cat([torch.zeros(1, dtype=torch.long), others]).to(targets.device)
        return super().compare(predicted, torch.where(targets == IGNORE, IGNORE, exchanged[targets % self.num_classes]))


class Mirrored:
    """Asks for the mirror image of what the ControlNet is shown."""

    def compare(self, predicted: Tensor, targets: Tensor) -> Tensor:
        return super().compare(predicted, targets.flip(-1))


class MirroredDepth(Mirrored, Depth):
    pass


class MirroredLineArt(Mirrored, LineArt):
    pass


class Detached:
    """The consistency loss with a gradient that is too small to change the last bit of the diffusion loss's.

    One with no gradient at all is refused by the probe before training starts.
    """

    def compare(self, predicted: Tensor, targets: Tensor) -> Tensor:
        hidden = predicted.detach()
        return super().compare(hidden + 1e-30 * (predicted - hidden), targets)


class DetachedSegmentation(Detached, Segmentation):
    pass


class DetachedDepth(Detached, Depth):
    pass


class DetachedLineArt(Detached, LineArt):
    pass
