"""Semantic segmentation: a class for every pixel."""

import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassJaccardIndex
from transformers import (
    AutoConfig,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    AutoTokenizer,
)

from alignkit.conditions.condition import Condition, model_input
from alignkit.conditions.models import find_model, load_model, preprocessing

# Of a label: says nothing of that pixel, as in the files of ADE20K and COCO-Stuff; also where there are more classes.
IGNORE = 255
# By model_type: those whose queries have a class and a mask each. DETR, which is also called universal, has others.
UNIVERSAL = ("eomt", "eomt_dinov3", "mask2former", "maskformer", "oneformer")


class Segmentation(Condition):
    """Class labels by a segmenter; cross-entropy, as ControlNet++ (section 3.3).

    The logits are resized to the labels, as in the training of transformers' own segmenters; ControlNet++'s code
    resizes the labels to the logits, which loses what is thinner than the network's stride.

    Args:
        model: a folder or Hub name of a semantic segmenter (SegFormer, UperNet, DPT, ...) or a universal one
            (Mask2Former, MaskFormer, OneFormer).
        palette: a JSON file with an [R, G, B] of 0 to 255 for every class, for a ControlNet that was trained on some;
            otherwise a fixed set of colours that differ.
        resolution: shortest side at which the model sees images; null is its preprocessor's.
    """

    column = "label"

    def __init__(
        self, model: str = "emoji/training/segmenter", palette: str | None = None, resolution: int | None = None
    ):
        super().__init__()
        path = find_model(model)
        model_type = AutoConfig.from_pretrained(path).model_type
        self.universal = model_type in UNIVERSAL
        kind = AutoModelForUniversalSegmentation if self.universal else AutoModelForSemanticSegmentation
        self.segmenter = load_model(kind, path)
        self.input = preprocessing(path, self.segmenter.config, resolution)
        self.num_classes = self.segmenter.config.num_labels
        task = task_tokens(path, self.segmenter.config.task_seq_len) if model_type == "oneformer" else None
        self.register_buffer("task", task, persistent=False)
        colors = distinct_colors(self.num_classes) if palette is None else read_palette(palette, self.num_classes)
        self.register_buffer("palette", torch.cat([colors, torch.zeros(1, 3)]), persistent=False)  # last: unlabelled

    def predict(self, images: Tensor) -> Tensor:
        """Logits [B,C,H,W] (log scores, for a universal segmenter)."""
        size = images.shape[-2:]
        told = {} if self.task is None else {"task_inputs": self.task.expand(len(images), -1)}
        output = self.segmenter(pixel_values=model_input(images, **self.input(images)), **told)
        if not self.universal:
            return F.interpolate(output.logits, size=size, mode="bilinear", align_corners=False)
        classes = output.class_queries_logits.softmax(-1)[..., :-1]  # without "no object"
        masks = F.interpolate(output.masks_queries_logits, size=size, mode="bilinear", align_corners=False)
        return torch.einsum("bqc,bqhw->bchw", classes, masks.sigmoid()).add(1e-6).log()

    def compare(self, predicted: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, the mean over an image's labelled pixels; 0 where none is labelled."""
        per_pixel = F.cross_entropy(predicted, targets, ignore_index=IGNORE, reduction="none")
        return per_pixel.sum((1, 2)) / (targets != IGNORE).sum((1, 2)).clamp(min=1)

    def as_targets(self, predicted: Tensor) -> Tensor:
        return predicted.argmax(1)

    def control(self, targets: Tensor) -> Tensor:
        colors = self.palette[targets.masked_fill(targets == IGNORE, self.num_classes)]
        return colors.permute(0, 3, 1, 2).contiguous()

    def read(self, picture: Image.Image) -> Tensor:
        if picture.mode not in ("L", "I", "I;16"):
            raise ValueError(
                f"expected one class number a pixel (PNG of mode L or I;16), got mode {picture.mode}: colours do not "
                "survive resizing, so convert palette or RGB labels to numbers"
            )
        labels = torch.from_numpy(np.asarray(picture).astype(np.int64))
        known = (labels >= 0) & (labels < self.num_classes) | (labels == IGNORE)
        unknown = labels[~known].unique().tolist()
        if unknown:
            raise ValueError(
                f"expected classes 0 to {self.num_classes - 1}, or {IGNORE} for unlabelled, got {unknown[:5]}"
            )
        return labels

    def save(self, folder: str | os.PathLike) -> None:
        """Writes palette.json, the [R, G, B] of every class, as `palette` reads it."""
        colors = self.palette[:-1].mul(255).round().int().tolist()
        (Path(folder) / "palette.json").write_text(json.dumps(colors) + "\n", encoding="utf-8")

    def metrics(self) -> dict[str, Metric]:
        """Intersections and unions are summed over all images; classes that occur nowhere do not count."""
        return {"mIoU": MeanIoU(self.num_classes)}


class MeanIoU(MulticlassJaccardIndex):
    def __init__(self, num_classes: int):
        super().__init__(num_classes, ignore_index=IGNORE, validate_args=False)

    def update(self, extracted: Tensor, targets: Tensor) -> None:
        if not extracted.is_meta:  # a plan has no classes to count, nor how many are labelled
            super().update(extracted, targets)


def task_tokens(path: str, length: int) -> Tensor:
    """[1, length]: what OneFormer, which does several tasks, is told of this one, as its own processor writes it."""
    tokens = AutoTokenizer.from_pretrained(path)(
        ["the task is semantic"], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return tokens.input_ids * tokens.attention_mask


def distinct_colors(number: int) -> Tensor:
    """[number,3] in [0,1]: class 0, often the background, is dark gray, the others are points of a grid in the cube.

    A ControlNet has to tell them apart, so that none may be a shade of another: the nearest two of 150 are 0.17 apart,
    of 259 0.14. Neighbours in number are far apart.
    """
    levels = 2
    while levels**3 - levels < number - 1:
        levels += 1
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, levels)] * 3)
    grid = grid[(grid != grid[:, :1]).any(1)]  # no grays: class 0 and what is unlabelled are
    stride = round(0.618034 * len(grid))
    while math.gcd(stride, len(grid)) > 1:
        stride += 1
    colors = torch.cat([torch.full((1, 3), 0.25), grid[stride * torch.arange(number - 1) % len(grid)]])
    return colors.mul(255).round() / 255


def read_palette(path: str, number: int) -> Tensor:
    try:
        colors = torch.tensor(json.loads(Path(path).read_text(encoding="utf-8")), dtype=torch.float32)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"palette {path}: expected a JSON list of [R, G, B]: {error}") from error
    if colors.shape != (number, 3) or colors.min() < 0 or colors.max() > 255:
        raise ValueError(f"palette {path}: expected {number} colours [R, G, B] of 0 to 255, got {list(colors.shape)}")
    return colors / 255
