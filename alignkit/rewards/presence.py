"""Presence and absence of a named object, by a segmenter."""

import difflib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import SegformerForSemanticSegmentation

from alignkit.artifacts import read_pretrained
from alignkit.emoji import resolve
from alignkit.rewards.clip import IMAGENET_STATISTICS, image_statistics
from alignkit.rewards.reward import Reward, column, frozen, least, names_of


class Presence(Reward):
    """Log odds of an object: the log of its odds p / (1 - p), averaged over the pixels.

    0 when the average odds are even. It is computed from the logits, without a threshold and without saturation, so
    that an image in which nothing is found has a gradient, too. It has no upper limit: the loss `hinge` with a target
    of 5 or so (odds of 150 to 1) stops pushing when the object is recognised. Of several objects it is the lowest, so
    that all of them are there where it is high.

    Args:
        model: a folder or Hub name of a `transformers.SegformerForSemanticSegmentation`.
        object: a label of its config or a list of them, where the prompt file has no column `object`.
    """

    def __init__(self, model: str = "emoji/training/segmenter", object: str | Sequence[str] | None = None):
        super().__init__()
        path = resolve(model)
        self.segmenter = frozen(read_pretrained(SegformerForSemanticSegmentation, path, dtype=torch.float32))
        mean, std = image_statistics(path, *IMAGENET_STATISTICS)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.object = object
        for name in [object] if isinstance(object, str) else object or []:
            self.label(name)

    def label(self, name: str) -> int:
        """The label's number, or a ValueError that names the nearest labels."""
        labels = {label.lower(): int(number) for number, label in self.segmenter.config.id2label.items()}
        if name.lower() not in labels:
            nearest = difflib.get_close_matches(name.lower(), labels, cutoff=0) or sorted(labels)
            raise ValueError(f"expected an object that the segmenter knows, got {name!r}: nearest are {nearest}.")
        return labels[name.lower()]

    def check(self, prompts: Sequence[str], **columns: Sequence[Any]) -> None:
        for names in names_of(column(columns, "object", self.object, prompts)):
            for name in names:
                self.label(name)

    def score(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        return least(self.log_odds, images, column(columns, "object", self.object, prompts))

    def log_odds(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """[B] of B images and as many names."""
        labels = [self.label(name) for name in names]
        pixels = ((images - self.mean) / self.std).to(self.segmenter.dtype)
        logits = self.segmenter(pixel_values=pixels).logits  # [B,C,h,w]
        named = F.one_hot(torch.tensor(labels, device=logits.device), logits.shape[1]).bool()[:, :, None, None]
        log_odds = logits.masked_fill(~named, 0).sum(1) - logits.masked_fill(named, -torch.inf).logsumexp(1)  # [B,h,w]
        return log_odds.flatten(1).logsumexp(1) - math.log(log_odds[0].numel())


class Absence(Presence):
    """Log odds against an object: minus the same. `loss: hinge` stops when it, or all of several, are gone."""

    def log_odds(self, images: Tensor, names: Sequence[str]) -> Tensor:
        return -super().log_odds(images, names)
