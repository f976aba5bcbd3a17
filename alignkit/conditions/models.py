"""How a transformers model wants its images, from its `preprocessor_config.json`, without its image processor.

The processors go through numpy or uint8, which cuts the gradient. Models are read in float32: weights in half precision
would round the gradient of every pixel.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.image_processing_base import ImageProcessingMixin

from alignkit.rewards.clip import image_statistics

BILINEAR = 2  # of PIL's filters; all other models here use 3, bicubic
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preprocessing(path: str, resolution: int | None) -> Callable[[Tensor], dict[str, Any]]:
    """Arguments of `model_input` for a model, on the device of the images it is called with.

    `resolution` overrides the shortest side that the preprocessor states.
    """
    try:
        config, _ = ImageProcessingMixin.get_image_processor_dict(path)
    except OSError:
        config = {}
    size = config.get("size") or {}
    size = {"shortest_edge": size} if isinstance(size, int) else size
    stated = size.get("shortest_edge") or min(size.get("height", 0), size.get("width", 0)) or None
    multiple = config.get("ensure_multiple_of") or config.get("size_divisor") or 1
    mean, std = image_statistics(path, *IMAGENET)

    def arguments(images: Tensor) -> dict[str, Any]:
        return {
            "resolution": resolution or stated,
            "multiple": multiple,
            "mode": "bilinear" if config.get("resample") == BILINEAR else "bicubic",
            "mean": mean.to(images),
            "std": std.to(images),
        }

    return arguments
