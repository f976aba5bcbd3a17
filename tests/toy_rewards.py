"""Rewards for tests, named in configs as `tests.toy_rewards:Class`."""

import torch
from torch import Tensor

from alignkit.rewards import Reward


class Red(Reward):
    """How much redder than blue an image is, within (-1, 1)."""

    range = (-1.0, 1.0)

    def score(self, images: Tensor, prompts, **columns) -> Tensor:
        return torch.tanh(8 * (images[:, 0] - images[:, 2]).mean((1, 2)))


class Flat(Reward):
    """Minus the spread of an image's pixels: what it likes best is one colour."""

    def score(self, images: Tensor, prompts, **columns) -> Tensor:
        return -(images - images.mean((1, 2, 3), keepdim=True)).square().mean((1, 2, 3))


class Detached(Red):
    def score(self, images: Tensor, prompts, **columns) -> Tensor:
        return super().score(images, prompts).detach()


class NaNFor(Red):
    """Not a number for one prompt."""

    def __init__(self, prompt: str):
        super().__init__()
        self.prompt = prompt

    def score(self, images: Tensor, prompts, **columns) -> Tensor:
        bad = torch.tensor([float("nan") if prompt == self.prompt else 0.0 for prompt in prompts])
        return super().score(images, prompts) + bad


class Wanted(Red):
    """Red times the column `wanted`."""

    def score(self, images: Tensor, prompts, wanted=None, **columns) -> Tensor:
        return super().score(images, prompts) * torch.tensor(wanted)
