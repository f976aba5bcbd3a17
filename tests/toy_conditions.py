"""Conditions without a model, good and bad, and small ones of transformers' classes with random weights."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    BitConfig,
    ConvNextConfig,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessor,
    GLPNConfig,
    GLPNForDepthEstimation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    UperNetConfig,
    UperNetForSemanticSegmentation,
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


def save_dpt_hybrid(folder: Path, size: int = 64) -> str:
    """As `Intel/dpt-hybrid-midas`: a convolutional stem, images of one size."""
    torch.manual_seed(0)
    stem = BitConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8], depths=[1, 1, 1], out_features=["stage1", "stage2", "stage3"],
        global_padding="same", embedding_dynamic_padding=True, num_groups=2,
    )  # fmt: skip
    config = DPTConfig(
        is_hybrid=True, backbone_config=stem, backbone_featmap_shape=[1, 8, 4, 4], neck_ignore_stages=[0, 1],
        reassemble_factors=[1, 1, 1, 0.5], backbone_out_indices=[0, 1, 2, 3], image_size=size, patch_size=16,
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16,
        neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
    )  # fmt: skip
    DPTForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessor(size={"height": size, "width": size}, resample=2).save_pretrained(folder)
    return str(folder)


def save_plain_dpt(folder: Path, size: int = 64) -> str:
    """As `Intel/dpt-large`: a ViT whose patches the neck takes for a square."""
    torch.manual_seed(0)
    config = DPTConfig(
        image_size=size, patch_size=16, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=16, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
    )  # fmt: skip
    DPTForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessor(size={"height": size, "width": size}, resample=2).save_pretrained(folder)
    return str(folder)


def save_dpt_on_dinov2(folder: Path) -> str:
    """As `facebook/dpt-dinov2-base-nyu`: statistics of pixels from 0 to 255, no size, sides of a multiple of 14."""
    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=1, image_size=56, patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False,
    )  # fmt: skip
    config = DPTConfig(
        backbone_config=backbone, hidden_size=16, patch_size=14, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        readout_type="ignore",
    )  # fmt: skip
    DPTForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessor(
        do_resize=False, do_rescale=False, ensure_multiple_of=1, do_pad=True, size_divisor=14,
        image_mean=[123.675, 116.28, 103.53], image_std=[58.395, 57.12, 57.375],
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def save_depth_anything(folder: Path, size: int = 28) -> str:
    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=1, image_size=size, patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=16, neck_hidden_sizes=[4, 8, 8, 8], fusion_hidden_size=8,
        head_hidden_size=4, patch_size=14,
    )  # fmt: skip
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessor(
        size={"height": size, "width": size}, keep_aspect_ratio=True, ensure_multiple_of=14
    ).save_pretrained(folder)
    return str(folder)


def save_upernet(folder: Path, num_labels: int = 5, size: int = 64) -> str:
    torch.manual_seed(0)
    backbone = ConvNextConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=16, auxiliary_in_channels=16, auxiliary_channels=8, num_labels=num_labels
    )
    UperNetForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessor(size={"shortest_edge": size}).save_pretrained(folder)
    return str(folder)
