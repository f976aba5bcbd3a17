"""Aesthetic score: a head on CLIP's image embedding."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.artifacts import load_tensors
from alignkit.emoji import resolve
from alignkit.emoji.judges import AestheticHead
from alignkit.rewards.clip import load_encoder
from alignkit.rewards.reward import Reward, frozen


class Aesthetic(Reward):
    """Head on the L2-normalised CLIP image embedding, as LAION's improved aesthetic predictor (Schuhmann 2022).

    Args:
        clip: the CLIP that the head was trained on, as `model` of `alignment`.
        head: a folder of `alignkit.emoji.judges.AestheticHead`, or a `.safetensors` file of LAION's predictor.
        weights: as `weights` of `alignment`.
    """

    def __init__(
        self,
        clip: str = "emoji/training/clip",
        head: str = "emoji/training/aesthetic",
        weights: str | None = None,
    ):
        super().__init__()
        self.encoder = load_encoder(resolve(clip), weights)
        self.resolution = self.encoder.resolution
        self.head, embedding_dim = load_head(resolve(head))
        if embedding_dim != self.encoder.embedding_dim:
            raise ValueError(
                f"expected a head for embeddings of {self.encoder.embedding_dim} numbers ({clip}), got one for "
                f"{embedding_dim} ({head}): name the CLIP that the head was trained on."
            )

    def score(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        return self.head(self.encoder.embed_images(images)).reshape(-1)


def load_head(path: str) -> tuple[nn.Module, int]:
    """The frozen head [B,D] -> [B] or [B,1], and its D.

    Raises:
        ValueError: a pickle, a damaged or missing file, or one that holds no head.
    """
    if path.endswith((".pth", ".pt", ".bin", ".ckpt")):
        raise ValueError(
            f"expected a folder or .safetensors file, got the pickle {path}: `alignkit convert checkpoint` it first."
        )
    if path.endswith(".safetensors"):
        head = collapse(load_tensors(path))
        return frozen(head), head.in_features
    head = AestheticHead.from_pretrained(path, strict=True)
    return frozen(head), head.embedding_dim


def collapse(state_dict: dict[str, Tensor]) -> nn.Linear:
    """LAION's MLP (`layers.<n>.weight` and `.bias`) as the one affine map it is: it has dropout, but no activations."""
    if "layers.0.weight" not in state_dict:
        raise ValueError(f"expected layers.0.weight, ... as in LAION's head, got {', '.join(state_dict)}.")
    numbers = sorted(int(key.split(".")[1]) for key in state_dict if key.endswith(".weight"))
    embedding_dim = state_dict["layers.0.weight"].shape[1]
    weight, bias = torch.eye(embedding_dim), torch.zeros(embedding_dim)
    for number in numbers:
        layer, shift = state_dict[f"layers.{number}.weight"].float(), state_dict.get(f"layers.{number}.bias")
        if shift is None or layer.shape[1:] != bias.shape or layer.shape[:1] != shift.shape:
            got = "no bias" if shift is None else f"{list(layer.shape)} and {list(shift.shape)}"
            raise ValueError(f"expected layers.{number} of [n, {len(bias)}] with a bias [n], got {got}: no LAION head.")
        bias, weight = layer @ bias + shift.float(), layer @ weight
    if len(bias) != 1:
        raise ValueError(f"expected a head that ends in one score, got {len(bias)} numbers.")
    head = nn.Linear(embedding_dim, 1)
    head.load_state_dict({"weight": weight, "bias": bias})
    return head
