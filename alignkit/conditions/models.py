"""transformers' models that read conditions, and how they want their images, by their `preprocessor_config.json`.

Their image processors go through numpy or uint8, which cuts the gradient. Models are read in float32: weights in half
precision would round the gradient of every pixel.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from alignkit import plan
from alignkit.artifacts import read_pretrained
from alignkit.emoji import resolve
from alignkit.random_init import JUDGES
from alignkit.rewards.clip import IMAGENET_STATISTICS, image_statistics, interpolation_of, processor_config
from alignkit.rewards.reward import frozen

UNCHANGED = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # mean and standard deviation


def find_model(name: str) -> str:
    """The model's folder or Hub name; in a plan, which needs the shapes alone, the folder that JUDGES has of it."""
    path = resolve(name)
    return JUDGES.get(path, path) if plan.predicting() else path


def load_model(kind: type, path: str) -> nn.Module:
    """The frozen model of an AutoModel class at a path of `find_model`."""
    if plan.predicting() and path in JUDGES.values():
        with torch.device("meta"):
            return frozen(kind.from_config(AutoConfig.from_pretrained(path)))
    return frozen(read_pretrained(kind, path, dtype=torch.float32))


def takes_squares(model: PretrainedConfig) -> bool:
    """Whether a DPT's neck arranges its patches as a square: all on a plain ViT, and all that segment."""
    if model.model_type != "dpt":
        return False
    return model.backbone_config is None or "DPTForSemanticSegmentation" in (model.architectures or ())


def preprocessing(
    path: str, model: PretrainedConfig, resolution: int | None = None
) -> Callable[[Tensor], dict[str, Any]]:
    """Arguments of `model_input` for a model of this config, on the device of the images it is called with.

    They are those of its `preprocessor_config.json`; `resolution` overrides the shortest side that it states. A DPT
    that takes its patches for a square is given one, squashed, as its processor does.

    Raises:
        ValueError: a resolution for a model that takes images of one size alone.
    """
    config = processor_config(path)
    size = config.get("size") or {}
    size = {"shortest_edge": size} if isinstance(size, int) else size
    stated = size.get("shortest_edge") or min(size.get("height", 0), size.get("width", 0)) or None
    if config.get("do_resize") is False:
        stated = None
    multiple = max(config.get("ensure_multiple_of") or 1, config.get("size_divisor") or 1)
    if getattr(model, "is_hybrid", False):  # DPT on a convolutional stem: its positions are not interpolated
        sides = model.image_size
        stated = tuple(sides) if isinstance(sides, Sequence) else (sides, sides)
        if resolution is not None:
            raise ValueError(f"resolution: {path} takes images of {stated[0]} x {stated[1]} alone: leave it null")
    elif takes_squares(model):
        side = resolution or stated or model.image_size
        stated, resolution = (side, side), None
    unstated = UNCHANGED if model.model_type == "glpn" else IMAGENET_STATISTICS  # GLPN's processor normalises nothing
    mean, std = image_statistics(path, *unstated)

    def arguments(images: Tensor) -> dict[str, Any]:
        return {
            "resolution": resolution or stated,
            "multiple": multiple,
            "mode": interpolation_of(config),
            "mean": mean.to(images),
            "std": std.to(images),
        }

    return arguments
