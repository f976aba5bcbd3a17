"""Presence, absence and number of objects by an open-vocabulary detector: OWL-ViT, OWLv2 or Grounding DINO.

A detector gives each of its boxes a logit of being the named object, and thresholds it; whoever sums the boxes above
the threshold has no gradient where there are none. Here a box's logit is taken relative to the threshold's,
z = logit - logit(threshold), and a box that overlaps a likelier one is moved below all others, so that each object
counts once. With z_1 >= z_2 >= ... what is asked is a comparison of single boxes, in log odds:

    present:    z_1                     the likeliest box is above the threshold
    absent:     -z_1
    exactly n:  min(z_n, -z_(n+1))      the nth is above it, the next one is not

All three are positive exactly where the thresholded detections agree, and have a gradient everywhere.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForZeroShotObjectDetection, AutoTokenizer

from alignkit.artifacts import read_pretrained
from alignkit.rewards.clip import (
    CLIP_STATISTICS,
    IMAGENET_STATISTICS,
    fit,
    image_statistics,
    interpolation_of,
    processor_config,
)
from alignkit.rewards.reward import Reward, column, frozen, least, names_of

MAX_OVERLAP = 0.5  # of two boxes that are two objects, as intersection over union
FAR = 100.0  # below all logits of a detector


class Detection(Reward):
    """What the three rewards share: a detector, and the sorted log odds of its boxes.

    Args:
        model: a folder or Hub name of a `transformers` OwlViTForObjectDetection, Owlv2ForObjectDetection or
            GroundingDinoForObjectDetection with its tokenizer.
        object: a noun phrase, where the prompt file has no column `object`; for presence and absence, or several.
        threshold: probability from which a box counts.
    """

    def __init__(
        self,
        model: str = "google/owlvit-base-patch32",
        object: str | Sequence[str] | None = None,
        threshold: float = 0.3,
    ):
        super().__init__()
        if not 0 < threshold < 1:
            raise ValueError(f"expected a threshold between 0 and 1, got {threshold}.")
        kind = AutoConfig.from_pretrained(model).model_type
        if kind not in ("owlvit", "owlv2", "grounding-dino"):
            raise ValueError(f"{model}: expected an OWL-ViT, an OWLv2 or a Grounding DINO, got {kind!r}.")
        self.is_owlvit, self.is_owlv2 = kind.startswith("owl"), kind == "owlv2"
        self.detector = frozen(read_pretrained(AutoModelForZeroShotObjectDetection, model, dtype=torch.float32))
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        processor = processor_config(model)
        self.interpolation = interpolation_of(processor if self.is_owlvit else {"resample": 2} | processor)
        if self.is_owlvit:
            self.resolution = self.detector.config.vision_config.image_size
        else:
            size = processor.get("size", {})
            self.shortest, self.longest = size.get("shortest_edge", 800), size.get("longest_edge", 1333)
        mean, std = image_statistics(model, *(CLIP_STATISTICS if self.is_owlvit else IMAGENET_STATISTICS))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.object = object
        self.threshold_logit = math.log(threshold / (1 - threshold))

    def log_odds(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """Images [B,3,H,W] in [0,1], B names -> [B,N] relative to the threshold, each object once, descending."""
        logits, boxes = self.detect(images, names)
        with torch.no_grad():  # which box is of which object is a choice, not a quantity
            # one image after the other: OWLv2 has 3,600 boxes, and 13 million pairs of them
            repeated = torch.stack([repeats(*one) for one in zip(logits, boxes, strict=True)])
        return (logits - self.threshold_logit - FAR * repeated).sort(-1, descending=True).values

    def detect(self, images: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Logits [B,N] of the boxes [B,N,4] (centre, width, height; in shares of the image)."""
        if self.is_owlvit:
            tokens = self.tokenize([f"a photo of a {name}" for name in names], padding="max_length")
            pixels = (
                self.pad_and_resize(images)
                if self.is_owlv2
                else fit(images, self.resolution, "squash", self.interpolation)
            )
            output = self.detector(pixel_values=(pixels - self.mean) / self.std, **tokens)
            return output.logits[..., 0], output.pred_boxes
        tokens = self.tokenize([f"{name.lower()}." for name in names], padding=True)
        output = self.detector(pixel_values=(self.fit_within(images) - self.mean) / self.std, **tokens)
        # the words of the phrase: not the marks that begin and end it, nor its full stop
        special = [*self.tokenizer.all_special_ids, self.tokenizer.convert_tokens_to_ids(".")]
        words = ~torch.isin(tokens["input_ids"], torch.tensor(special, device=images.device))
        logits = output.logits[..., : words.shape[1]]  # [B,N,tokens]
        return logits.masked_fill(~words[:, None], -torch.inf).amax(-1), output.pred_boxes

    def tokenize(self, texts: list[str], padding: bool | str) -> dict[str, Tensor]:
        config = self.detector.config
        max_length = config.text_config.max_position_embeddings if self.is_owlvit else config.max_text_len
        tokens = self.tokenizer(texts, padding=padding, max_length=max_length, truncation=True, return_tensors="pt")
        return dict(tokens.to(self.mean.device))

    def pad_and_resize(self, images: Tensor) -> Tensor:
        """OWLv2's size: black below and to the right up to a square; blurred before it is made smaller."""
        from kornia.filters import gaussian_blur2d

        height, width = images.shape[-2:]
        side = max(height, width)
        images = F.pad(images, (0, side - width, 0, side - height))
        sigma = (side / self.resolution - 1) / 2
        if sigma > 0:
            kernel = 2 * math.ceil(3 * sigma) + 1
            images = gaussian_blur2d(images, (kernel, kernel), (sigma, sigma), border_type="reflect")
        return F.interpolate(images, size=(self.resolution, self.resolution), mode="bilinear")

    def fit_within(self, images: Tensor) -> Tensor:
        """Grounding DINO's size: the shortest side, unless the longest would exceed its own limit."""
        height, width = images.shape[-2:]
        shortest, longest = min(height, width), max(height, width)
        side = min(self.shortest, self.longest * shortest / longest)
        small, large = round(side), int(side * longest / shortest)  # rounded as the official processor does
        size = (small, large) if height < width else (large, small)
        return F.interpolate(images, size=size, mode=self.interpolation, antialias=True)


class ObjectPresence(Detection):
    """Log odds of the likeliest box, relative to the threshold: positive where a detector finds the object.

    Of several objects it is the lowest: positive where all are found. The detector looks once for each.
    """

    def check(self, prompts: Sequence[str], **columns: Sequence[Any]) -> None:
        names_of(column(columns, "object", self.object, prompts))

    def score(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        return least(self.likeliest, images, column(columns, "object", self.object, prompts))

    def likeliest(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """[B], of the likeliest box of each image's name."""
        return self.log_odds(images, names)[:, 0]


class ObjectAbsence(ObjectPresence):
    """Minus the same: positive where a detector finds none of the objects. `loss: hinge` stops when they are gone."""

    def likeliest(self, images: Tensor, names: Sequence[str]) -> Tensor:
        return -super().likeliest(images, names)


class ObjectCount(Detection):
    """Log odds that the detector counts just as many objects as wanted: positive where it does.

    Args:
        count: the wanted number, where the prompt file has no column `count`.
    """

    def __init__(
        self,
        model: str = "google/owlvit-base-patch32",
        object: str | None = None,
        count: int | None = None,
        threshold: float = 0.3,
    ):
        super().__init__(model, object, threshold)
        self.count = count

    def check(self, prompts: Sequence[str], **columns: Sequence[Any]) -> None:
        _, counts = self.wanted(prompts, columns)
        if min(counts) < 0:
            raise ValueError(f"expected counts of at least 0, got {counts}.")

    def wanted(self, prompts: Sequence[str], columns: dict[str, Sequence[Any]]) -> tuple[list[str], list[int]]:
        """The object and its number, of each image."""
        names = column(columns, "object", self.object, prompts)
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"expected one object to count in each image, got {names}.")
        return names, [int(count) for count in column(columns, "count", self.count, prompts)]

    def score(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        names, counts = self.wanted(prompts, columns)
        z = self.log_odds(images, names)
        if not all(0 <= count < z.shape[1] for count in counts):
            raise ValueError(f"expected counts of 0 to {z.shape[1] - 1}, as the detector has boxes, got {counts}.")
        rows, n = torch.arange(len(z), device=z.device), torch.tensor(counts, device=z.device)
        not_more = -z[rows, n]
        enough = torch.where(n > 0, z[rows, (n - 1).clamp(min=0)], not_more)
        return torch.minimum(enough, not_more)


def repeats(logits: Tensor, boxes: Tensor) -> Tensor:
    """[N]: which of one image's boxes overlap a likelier one."""
    likelier = logits > logits[:, None]  # [than box i, box j is]
    return (likelier & (overlap(boxes) > MAX_OVERLAP)).any(-1)


def overlap(boxes: Tensor) -> Tensor:
    """Intersection over union of all pairs of boxes [N,4] (centre, width, height) -> [N,N]."""
    centre, size = boxes[:, :2], boxes[:, 2:]
    low, high = centre - size / 2, centre + size / 2
    shared = torch.minimum(high[:, None], high) - torch.maximum(low[:, None], low)
    intersection, area = shared.clamp(min=0).prod(-1), size.prod(-1)
    return intersection / (area[:, None] + area - intersection).clamp(min=1e-12)
