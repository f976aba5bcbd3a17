"""Small judges of the emoji world that transformers has no class for, a counter and an aesthetic head; and its CLIPs.

The two are plain modules with `save_pretrained(folder)` and `from_pretrained(folder)` (safetensors and config.json).
fp16 weights on disk come back as fp32. `alignkit.rewards` makes rewards of them.
"""

from dataclasses import dataclass

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from alignkit.emoji import resolve


def conv_block(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1), nn.GroupNorm(8, out_channels), nn.SiLU()
    )


class DensityCounter(nn.Module, PyTorchModelHubMixin):
    """Counts objects by their density (Lempitsky & Zisserman 2010, "Learning to count objects in images").

    The target to train on has unit mass an object, spread over it, so that an object's size does not matter and the
    map's sum is the count. Unlike a detector's, its output changes smoothly with the image everywhere.

    Args:
        widths: channels at 1/2, 1/4 and 1/8 of the image's size, multiples of 8.
    """

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 96)):
        super().__init__()
        half, quarter, eighth = widths
        self.enter = nn.Sequential(conv_block(3, half, stride=2), conv_block(half, half))
        self.down_quarter = nn.Sequential(conv_block(half, quarter, stride=2), conv_block(quarter, quarter))
        self.down_eighth = nn.Sequential(conv_block(quarter, eighth, stride=2), conv_block(eighth, eighth))
        self.up_quarter = nn.Conv2d(eighth, quarter, 1)
        self.mix_quarter = conv_block(quarter, half)
        self.mix_half = conv_block(half, half)
        self.density = nn.Conv2d(half, 1, 1)
        # softplus(-6) = 0.0025: some two objects on a 32 x 32 map, the order of what is to be learned. The weights are
        # small but not zero, so that an untrained counter still has a gradient with respect to its image.
        nn.init.normal_(self.density.weight, std=0.01)
        nn.init.constant_(self.density.bias, -6.0)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B,3,H,W] in [0,1] -> density [B,1,H/2,W/2] >= 0 (sizes rounded up); its sum is the image's count."""
        half = self.enter(images * 2 - 1)
        quarter = self.down_quarter(half)
        eighth = self.down_eighth(quarter)
        quarter = quarter + F.interpolate(self.up_quarter(eighth), size=quarter.shape[-2:], mode="nearest")
        half = half + F.interpolate(self.mix_quarter(quarter), size=half.shape[-2:], mode="nearest")
        return F.softplus(self.density(self.mix_half(half)))


class AestheticHead(nn.Module, PyTorchModelHubMixin):
    """Scores an image by its CLIP embedding: embedding_dim -> hidden_dim -> 1, with a GELU between."""

    def __init__(self, embedding_dim: int, hidden_dim: int = 64):
        super().__init__()
        self.embedding_dim = embedding_dim
        self.hidden = nn.Linear(embedding_dim, hidden_dim)
        self.score = nn.Linear(hidden_dim, 1)

    def forward(self, embeddings: Tensor) -> Tensor:
        """L2-normalised image embeddings [B,D] -> scores [B]."""
        # Entries of a unit vector are of order 1/sqrt(D), a linear layer's initialisation expects order 1.
        return self.score(F.gelu(self.hidden(embeddings * self.embedding_dim**0.5))).squeeze(-1)


@dataclass
class Clip:
    """A contrastive model of one role with its tokenizer, without gradient: what measures, not what is optimised."""

    model: nn.Module
    tokenizer: object

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Images [B, 3, 64, 64] in [0, 1] -> embeddings of unit length [B, D]."""
        features = self.model.get_image_features(pixel_values=(images - 0.5) / 0.25)
        return F.normalize(features.pooler_output, dim=-1)

    @torch.no_grad()
    def embed_texts(self, prompts: list[str]) -> Tensor:
        """B prompts -> embeddings of unit length [B, D]."""
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        return F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)


def load_clip(role: str) -> Clip:
    """The CLIP of a judging role; the evaluator's is of another kind, a ConvNeXt beside the text tower."""
    from transformers import AutoModel, CLIPTokenizer

    folder = resolve(f"emoji/{role}/clip")
    return Clip(AutoModel.from_pretrained(folder).float().eval(), CLIPTokenizer.from_pretrained(folder))
