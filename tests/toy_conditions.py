"""Conditions without a model, good and bad, and small ones of transformers' classes with random weights."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    GLPNConfig,
    GLPNForDepthEstimation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
)

from alignkit.conditions import Condition


class Red(Condition):
    """The red channel."""

    column = "red"

    def predict(self, images: Tensor) -> Tensor:
        return images[:, 0]


class Rounded(Red):
    """As the released HED wrapper: through 8 bits and back, which has no gradient."""

    def predict(self, images: Tensor) -> Tensor:
        return (255 * super().predict(images)).to(torch.uint8).float() / 255


class Unusable(Red):
    differentiable = False


class Detached(Red):
    """Compares rightly, with a gradient that is exactly zero."""

    def compare(self, predicted: Tensor, targets: Tensor) -> Tensor:
        return super().compare(predicted.detach(), targets) + 0 * predicted.sum((1, 2))


def save_segmenter(folder: Path, num_labels: int = 5, size: int = 16) -> str:
    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
        strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8, num_labels=num_labels,
    )  # fmt: skip
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessor(
        size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    ).save_pretrained(folder)
    return str(folder)


def save_estimator(folder: Path, size: int = 16) -> str:
    torch.manual_seed(0)
    config = GLPNConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
        strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8, max_depth=1,
    )  # fmt: skip
    GLPNForDepthEstimation(config).save_pretrained(folder)
    SegformerImageProcessor(
        size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    ).save_pretrained(folder)
    return str(folder)
