"""Alignment of image and prompt by CLIP, and the preferences of people by a CLIP that was tuned on them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from alignkit.emoji import resolve
from alignkit.rewards.clip import load_encoder
from alignkit.rewards.reward import Reward


class Alignment(Reward):
    """Cosine of image and prompt embedding (CLIPScore without its factor; Hessel et al. 2021, arXiv 2104.08718).

    Args:
        model: a folder or Hub name of a `transformers` CLIPModel, SiglipModel or Siglip2Model with its tokenizer, or a
            model of open_clip: "open_clip:ARCHITECTURE", "local-dir:FOLDER" or "hf-hub:OWNER/NAME".
        weights: with open_clip:ARCHITECTURE, a `.safetensors` file.
    """

    range = (-1.0, 1.0)

    def __init__(self, model: str = "emoji/training/clip", weights: str | None = None):
        super().__init__()
        self.encoder = load_encoder(resolve(model), weights)
        self.resolution = self.encoder.resolution

    def score(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        return (self.encoder.embed_images(images) * self.encoder.embed_prompts(prompts)).sum(-1)


class PickScore(Alignment):
    """Logit of image and prompt by a CLIP tuned on pairs that people chose from (Kirstain et al. 2023, 2305.01569).

    The cosine times the model's own factor, 100: some 18 to 24. ReNO's loss is 30 - r, VADER's |1 - r / 100|.
    """

    range = (-100.0, 100.0)

    def __init__(self, model: str = "yuvalkirstain/PickScore_v1"):
        super().__init__(model)

    def score(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        return self.encoder.logit_scale * super().score(images, prompts, **columns)


class HPSv2(Alignment):
    """Human Preference Score v2 or v2.1 (Wu et al. 2023, arXiv 2306.09341): the cosine by a tuned ViT-H/14.

    The two versions differ in their weights and in scale: SDXL has 0.277 by v2 and 0.306 by v2.1. Images are not
    cropped: the longest side becomes 224 and the rest black, as in the authors' evaluation.

    Args:
        weights: `HPS_v2_compressed` or `HPS_v2.1_compressed` as `.safetensors`: `alignkit convert checkpoint`.
        architecture: of open_clip.
    """

    def __init__(self, weights: str, architecture: str = "ViT-H-14"):
        super().__init__(f"open_clip:{architecture}", weights)
        self.encoder.resize = "longest"
