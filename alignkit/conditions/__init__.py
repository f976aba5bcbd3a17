"""Conditions: control signals that ControlNets follow, extracted from images, compared and scored.

`build_condition("segmentation")` is one of ours, `build_condition("package.module:Class")` one of yours:
docs/conditions.md.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from alignkit.conditions.condition import Condition, PerImage, gray, model_input
from alignkit.named import build_named, refuse_judges
from alignkit.rewards import probe_gradient
from alignkit.rewards.reward import frozen

__all__ = [
    "CONDITIONS", "Condition", "ConditionConfig", "PerImage",
    "build_condition", "frozen", "gray", "model_input", "probe_condition", "score",
]  # fmt: skip

# Paths, not classes: a condition's libraries load only when it is asked for.
CONDITIONS = {
    "canny": "alignkit.conditions.edges:Canny",
    "depth": "alignkit.conditions.depth:Depth",
    "lineart": "alignkit.conditions.edges:LineArt",
    "segmentation": "alignkit.conditions.segmentation:Segmentation",
    "softedge": "alignkit.conditions.edges:SoftEdge",
}


@dataclass
class ConditionConfig:
    """The control signal."""

    name: str = "segmentation"
    """segmentation, depth, softedge, lineart, canny, or package.module:Class."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the condition's class."""


def build_condition(name: str, *, evaluator: bool = False, **args: Any) -> Condition:
    """A frozen condition by its name in CONDITIONS or by `package.module:Class`, built with `args`.

    Raises:
        ValueError: no such condition, not a Condition, arguments that its class does not take, or, unless `evaluator`,
            a model that only evaluation may open.
    """
    if not evaluator:
        refuse_judges(name, args, "evaluator", "identity")
    return frozen(build_named(name, CONDITIONS, Condition, args))


def score(condition: Condition, images: Tensor, targets: Tensor, batch_size: int = 32) -> dict[str, float]:
    """The condition's metrics over a whole set: images [N,3,H,W] in [0,1], targets [N,H,W]."""
    metrics = {name: metric.to(images.device) for name, metric in condition.metrics().items()}
    for some, wanted in zip(images.split(batch_size), targets.split(batch_size), strict=True):
        extracted = condition.extract(some)
        for metric in metrics.values():
            metric.update(extracted, wanted)
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def probe_condition(condition: Condition, height: int, width: int, device: torch.device | str = "cpu") -> None:
    """Compares non-constant images with the targets of others, and checks that each has a gradient.

    Raises:
        ValueError: the condition declares itself not differentiable, is detached, not finite, or has a zero or
            non-finite gradient with respect to some image; it says which and what to do.
    """
    name = type(condition).__name__
    if not condition.differentiable:
        raise ValueError(
            f"{name} declares differentiable = False, so it cannot be a reward: set reward_weight to 0 for ordinary "
            "ControlNet training, or use a differentiable substitute."
        )

    def loss(images: Tensor) -> Tensor:
        return condition(images, condition.extract(images.detach().flip(0, 3)))

    probe_gradient(name, loss, 2, height, width, device)
