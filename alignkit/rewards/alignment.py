"""Alignment of image and prompt by CLIP."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from alignkit.emoji import resolve
from alignkit.rewards.clip import ClipEncoder
from alignkit.rewards.reward import Reward


class Alignment(Reward):
    """Cosine of image and prompt embedding (CLIPScore without its factor; Hessel et al. 2021, arXiv 2104.08718).

    PickScore is 100 times this cosine under its own weights (`model: yuvalkirstain/PickScore_v1`).

    Args:
        model: a folder or Hub name of a `transformers.CLIPModel` with its tokenizer.
    """

    range = (-1.0, 1.0)

    def __init__(self, model: str = "emoji/training/clip"):
        super().__init__()
        self.encoder = ClipEncoder(resolve(model))
        self.resolution = self.encoder.resolution

    def score(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        return (self.encoder.embed_images(images) * self.encoder.embed_prompts(prompts)).sum(-1)
