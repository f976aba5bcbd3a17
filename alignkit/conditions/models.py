"""Models of transformers that read a control off an image with gradient.

Their image processors go through numpy or uint8, which cuts it, so what these do to an image is done in torch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.rewards import probe_images
from alignkit.rewards.clip import IMAGENET_STATISTICS, LOADING, image_statistics, interpolation_of, processor_config
from alignkit.rewards.reward import frozen


def load_model(cls: Any, path: str) -> tuple[nn.Module, list[str]]:
    """A frozen model in float32, with NaN in place of the weights that its file lacks; and their names.

    transformers fills those with random numbers, and only warns: `refuse_incomplete` tells whether they matter.
    """
    model, info = cls.from_pretrained(path, **LOADING, output_loading_info=True)
    tensors, lacking = model.state_dict(), sorted(info["missing_keys"])
    for name in lacking:
        if name in tensors and tensors[name].is_floating_point():
            tensors[name].fill_(torch.nan)
    return frozen(model), lacking


@torch.no_grad()
def refuse_incomplete(path: str, lacking: list[str], predict: Callable[[Tensor], Tensor]) -> None:
    """ValueError where a prediction depends on a weight that the file lacks, as a backbone without a head.

    DPT's published files lack some that no image reaches, so one is looked at.
    """
    if lacking and not predict(probe_images(1, 64, 64)).isfinite().all():
        raise ValueError(
            f"{path} is incomplete, it lacks {', '.join(lacking[:3])} ({len(lacking)} in all): expected a model that "
            "was trained for this task, not a backbone alone"
        )


def preprocessing(path: str, resolution: int | None) -> Callable[[Tensor], dict[str, Any]]:
    """Arguments of `model_input` for a model, on the device of the images it is called with.

    They are those of its `preprocessor_config.json`; `resolution` overrides the shortest side that it states.
    """
    config = processor_config(path)
    size = config.get("size") or {}
    size = {"shortest_edge": size} if isinstance(size, int) else size
    stated = size.get("shortest_edge") or min(size.get("height", 0), size.get("width", 0)) or None
    multiple = config.get("ensure_multiple_of") or config.get("size_divisor") or 1
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
