"""Reads a picture of the emoji world: which sprites, how many of each, their tint, the background's colour.

The evaluator and the identity judge are Readers: convolutions with a density, which also name what they count.
"""

from dataclasses import dataclass

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from alignkit.emoji.judges import conv_block


@dataclass(frozen=True)
class Reading:
    """What a Reader says of B images.

    density [B, 1, h, w] of objects (sums to their number), class_logits [B, sprites, h, w], tint_logits
    [B, tints + 1, h, w] (the last: no tint), background_logits [B, backgrounds], embedding [B, D] of the objects,
    of unit length.
    """

    density: Tensor
    class_logits: Tensor
    tint_logits: Tensor
    background_logits: Tensor
    embedding: Tensor

    @property
    def counts(self) -> Tensor:
        """Expected number of each sprite, [B, sprites]."""
        return (self.density * self.class_logits.softmax(dim=1)).sum((-2, -1))


class Reader(nn.Module, PyTorchModelHubMixin):
    """A small convolutional network with a head per question, at 1/4 of the image's size."""

    def __init__(
        self,
        num_sprites: int,
        num_tints: int,
        num_backgrounds: int,
        widths: tuple = (32, 64, 128),
        embedding_dim: int = 96,
    ):
        super().__init__()
        half, quarter, eighth = widths
        self.enter = nn.Sequential(conv_block(3, half, stride=2), conv_block(half, half))
        self.quarter = nn.Sequential(
            conv_block(half, quarter, stride=2), conv_block(quarter, quarter), conv_block(quarter, quarter)
        )
        self.eighth = nn.Sequential(
            conv_block(quarter, eighth, stride=2), conv_block(eighth, eighth), conv_block(eighth, eighth)
        )
        self.up = nn.Conv2d(eighth, quarter, 1)
        self.mix = nn.Sequential(conv_block(quarter, quarter), nn.Conv2d(quarter, embedding_dim, 1))
        self.density = nn.Conv2d(quarter, 1, 1)
        nn.init.constant_(self.density.bias, -5.0)
        self.sprite = nn.Conv2d(embedding_dim, num_sprites, 1)
        self.tint = nn.Conv2d(embedding_dim, num_tints + 1, 1)
        self.background = nn.Linear(half + quarter, num_backgrounds)

    def forward(self, images: Tensor) -> Reading:
        """images [B, 3, H, W] in [0, 1]."""
        half = self.enter(images * 2 - 1)
        quarter = self.quarter(half)
        eighth = self.eighth(quarter)
        mixed = quarter + F.interpolate(self.up(eighth), size=quarter.shape[-2:], mode="bilinear")
        hidden = self.mix[0](mixed)
        features = self.mix[1](hidden)
        density = F.softplus(self.density(hidden).float())
        pooled = (features * density).sum((-2, -1)) / density.sum((-2, -1)).clamp(min=1e-3)
        return Reading(
            density,
            self.sprite(features).float(),
            self.tint(features).float(),
            self.background(torch.cat([half.mean((-2, -1)), quarter.mean((-2, -1))], dim=1)).float(),
            F.normalize(pooled.float(), dim=-1),
        )
