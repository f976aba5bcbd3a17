"""Number of objects, by a density counter."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from alignkit.emoji import resolve
from alignkit.emoji.judges import DensityCounter
from alignkit.rewards.reward import Reward, column, frozen


class Count(Reward):
    """Minus the distance d between the counted and the wanted number of objects, in objects; 0 is right.

    Below half an object the distance is rounded off to d^2 (above it is d - 0.25; Huber 1964), so that the gradient
    fades as the count comes right instead of jumping from side to side.

    Args:
        model: a folder of `alignkit.emoji.judges.DensityCounter`.
        count: the wanted number where the prompt file has no column `count`.
    """

    range = (-float("inf"), 0.0)

    def __init__(self, model: str = "emoji/training/counter", count: float | None = None):
        super().__init__()
        self.counter = frozen(DensityCounter.from_pretrained(resolve(model), strict=True))
        self.count = count

    def check(self, prompts: Sequence[str], **columns: Sequence[Any]) -> None:
        self.wanted(prompts, columns)

    def wanted(self, prompts: Sequence[str], columns: dict[str, Sequence[Any]]) -> list[float]:
        return [float(number) for number in column(columns, "count", self.count, prompts)]

    def score(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        counted = self.counter(images).sum((1, 2, 3))
        wanted = torch.tensor(self.wanted(prompts, columns)).to(counted)
        return -F.smooth_l1_loss(counted, wanted, beta=0.5, reduction="none")
