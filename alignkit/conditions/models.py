"""How a transformers model wants its images, from its `preprocessor_config.json`, without its image processor.

The processors go through numpy or uint8, which cuts the gradient. Models are read in float32: weights in half precision
would round the gradient of every pixel.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from alignkit.rewards.clip import IMAGENET_STATISTICS, image_statistics, interpolation_of, processor_config


def preprocessing(
    path: str, model: PretrainedConfig, resolution: int | None = None
) -> Callable[[Tensor], dict[str, Any]]:
    """Arguments of `model_input` for a model of this config, on the device of the images it is called with.

    They are those of its `preprocessor_config.json`; `resolution` overrides the shortest side that it states.

    Raises:
        ValueError: a resolution for a model that takes images of one size alone.
    """
    config = processor_config(path)
    size = config.get("size") or {}
    size = {"shortest_edge": size} if isinstance(size, int) else size
    stated = size.get("shortest_edge") or min(size.get("height", 0), size.get("width", 0)) or None
    multiple = config.get("ensure_multiple_of") or config.get("size_divisor") or 1
    if getattr(model, "is_hybrid", False):  # DPT on a convolutional stem: its positions are not interpolated
        sides = model.image_size
        stated = tuple(sides) if isinstance(sides, Sequence) else (sides, sides)
        if resolution is not None:
            raise ValueError(f"resolution: {path} takes images of {stated[0]} x {stated[1]} alone: leave it null")
    mean, std = image_statistics(path, *IMAGENET_STATISTICS)

    def arguments(images: Tensor) -> dict[str, Any]:
        return {
            "resolution": resolution or stated,
            "multiple": multiple,
            "mode": interpolation_of(config),
            "mean": mean.to(images),
            "std": std.to(images),
        }

    return arguments
