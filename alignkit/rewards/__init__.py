"""Rewards: differentiable scores of images, and weighted sums of them.

`build_reward("alignment")` is one of ours, `build_reward("package.module:Class")` one of yours: docs/rewards.md.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alignkit.named import build_named, refuse_judges
from alignkit.rewards.reward import Reward, column, frozen

__all__ = [
    "REWARDS", "Combined", "Reward", "RewardConfig", "WeightedRewards",
    "build_reward", "column", "combine", "frozen", "probe", "probe_gradient", "shape_loss",
]  # fmt: skip

# Paths, not classes: a scorer's libraries load only when it is asked for.
REWARDS = {
    "absence": "alignkit.rewards.presence:Absence",
    "aesthetic": "alignkit.rewards.aesthetic:Aesthetic",
    "alignment": "alignkit.rewards.alignment:Alignment",
    "compressibility": "alignkit.rewards.jpeg:Compressibility",
    "count": "alignkit.rewards.count:Count",
    "hpsv2": "alignkit.rewards.alignment:HPSv2",
    "image_reward": "alignkit.rewards.image_reward:ImageReward",
    "incompressibility": "alignkit.rewards.jpeg:Incompressibility",
    "object_absence": "alignkit.rewards.detection:ObjectAbsence",
    "object_count": "alignkit.rewards.detection:ObjectCount",
    "object_presence": "alignkit.rewards.detection:ObjectPresence",
    "pickscore": "alignkit.rewards.alignment:PickScore",
    "presence": "alignkit.rewards.presence:Presence",
    "ssim": "alignkit.rewards.ssim:Ssim",
}


@dataclass
class RewardConfig:
    """One term of the loss: weight * loss(reward)."""

    name: str
    """A reward of ours (alignment, aesthetic, count, ...) or package.module:Class."""
    weight: float = 1.0
    """Factor of this term in the sum."""
    loss: Literal["negative", "distance", "hinge"] = "negative"
    """negative: -r. distance: |r - target|. hinge: max(target - r, 0), no gradient above the target."""
    target: float | None = None
    """For distance and hinge, in the reward's own unit."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the reward's class."""

    def __post_init__(self):
        if self.loss not in ("negative", "distance", "hinge"):
            raise ValueError(f"{self.name}: expected the loss negative, distance or hinge, got {self.loss!r}.")
        if (self.loss == "negative") != (self.target is None):
            needs = "no target" if self.loss == "negative" else "a target"
            raise ValueError(f"{self.name}: the loss {self.loss!r} takes {needs}, got target {self.target}.")
        if not math.isfinite(self.weight):
            raise ValueError(f"{self.name}: expected a finite weight, got {self.weight}.")


def shape_loss(rewards: Tensor, loss: str, target: float | None = None) -> Tensor:
    """Rewards [B] -> losses [B]: |r - target| as in AlignProp, max(target - r, 0) as in ImageReward's ReFL, or -r."""
    if loss == "distance":
        return (rewards - target).abs()
    if loss == "hinge":
        return F.relu(target - rewards)
    return -rewards


def build_reward(name: str, **args: Any) -> Reward:
    """A frozen reward by its name in REWARDS or by `package.module:Class`, built with `args`.

    Raises:
        ValueError: no such reward, not a Reward, arguments that its class does not take, the evaluator's model, or
            weights of another shape than its model's.
    """
    refuse_judges(name, args, "evaluator", "identity")
    return frozen(build_named(name, REWARDS, Reward, args))


class Combined(NamedTuple):
    values: dict[str, Tensor]  # label -> rewards [B], without weight or loss shape
    loss: Tensor  # [B]


class WeightedRewards(nn.Module):
    """Sum of weighted, shaped rewards: loss [B] = sum_i w_i * loss_i(r_i). Build it with `combine`.

    `rewards` are the terms' modules, `labels` their names in results and curves, `configs` their weights and losses.
    """

    def __init__(self, configs: Sequence[RewardConfig], rewards: Sequence[Reward]):
        super().__init__()
        self.configs = list(configs)
        self.rewards = nn.ModuleList(rewards)
        self.labels = unique([config.name.rpartition(":")[2] for config in configs])

    def check(self, prompts: Sequence[str], **columns: Sequence[Any]) -> None:
        """Raises ValueError with the first prompt whose columns one of the rewards could not take."""
        for i, prompt in enumerate(prompts):
            row = {name: [values[i]] for name, values in columns.items()}
            for label, reward in zip(self.labels, self.rewards, strict=True):
                try:
                    reward.check([prompt], **row)
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{label}, prompt {i + 1}, {prompt!r}: {error}") from error

    def forward(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Combined:
        """Images [B,3,H,W] in [0,1], B prompts, columns of B values -> values by label and loss, all [B]."""
        values = {
            label: reward(images, prompts, **columns) for label, reward in zip(self.labels, self.rewards, strict=True)
        }
        terms = [
            config.weight * shape_loss(value, config.loss, config.target)
            for config, value in zip(self.configs, values.values(), strict=True)
        ]
        return Combined(values, torch.stack(terms).sum(0))


def combine(configs: Sequence[RewardConfig]) -> WeightedRewards:
    """Builds the rewards and sums them.

    Raises:
        ValueError: no reward at all, or one that cannot be built.
    """
    if not configs:
        raise ValueError("expected at least one reward, got an empty list.")
    return WeightedRewards(configs, [build_reward(config.name, **config.args) for config in configs])


def unique(names: list[str]) -> list[str]:
    """Names with a number behind the second and later ones of the same name."""
    return [f"{name}_{names[:i].count(name) + 1}" if name in names[:i] else name for i, name in enumerate(names)]


def probe(
    reward: Reward | WeightedRewards,
    prompts: Sequence[str] = ("a photo", "a drawing"),
    *,
    height: int = 64,
    width: int = 64,
    device: torch.device | str = "cpu",
    **columns: Sequence[Any],
) -> None:
    """Scores one non-constant image a prompt and checks that each has a gradient; of a sum, each term is probed alone.

    Costs one forward and backward pass. `columns` as in a call of the reward.

    Raises:
        ValueError: the reward declares itself not differentiable, is detached, not finite, or has a zero or non-finite
            gradient with respect to some image; it says which and what to do.
    """
    if isinstance(reward, WeightedRewards):
        for term in reward.rewards:
            probe(term, prompts, height=height, width=width, device=device, **columns)
        return
    name = type(reward).__name__
    if not reward.differentiable:
        raise ValueError(
            f"{name} declares differentiable = False, and this method needs the gradient of its reward: use it to "
            "monitor or evaluate, or train on a differentiable substitute (compressibility for a JPEG file's size)."
        )
    probe_gradient(name, lambda images: reward(images, prompts, **columns), len(prompts), height, width, device)


def probe_gradient(
    name: str,
    score: Callable[[Tensor], Tensor],
    batch_size: int,
    height: int,
    width: int,
    device: torch.device | str,
) -> None:
    """Raises ValueError unless score(images [B,3,H,W]) -> [B] is finite with a finite, non-zero gradient everywhere."""
    images = probe_images(batch_size, height, width).to(device).requires_grad_()
    scores = score(images)
    if not scores.isfinite().all():
        raise ValueError(f"{name}: expected finite scores, got {scores.tolist()}: look for log, sqrt or division at 0.")
    if not scores.requires_grad:
        raise ValueError(
            f"{name}: the score has no gradient with respect to the images. Use tensor operations from image to score: "
            "no PIL, numpy or image processor, no .detach(), .item(), torch.no_grad() or uint8."
        )
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    for i, image_gradient in enumerate(gradient):
        if not image_gradient.isfinite().all():
            raise ValueError(
                f"{name}: the gradient of image {i} is not finite: look for a norm, root or power at 0 and add a small "
                "number there."
            )
        if not image_gradient.any():
            raise ValueError(
                f"{name}: the gradient of image {i} of {batch_size} is zero. Rounding, comparison, argmax, clamps or "
                "thresholds that nothing passes cut it; so does scoring only the first image of a batch."
            )


def probe_images(batch_size: int, height: int, width: int) -> Tensor:
    """Smooth shapes with some grain [B,3,H,W] within [0.1,0.9], always the same."""
    generator = torch.Generator().manual_seed(0)
    shapes = F.interpolate(torch.rand(batch_size, 3, 4, 4, generator=generator), (height, width), mode="bilinear")
    return 0.1 + 0.7 * shapes + 0.1 * torch.rand(batch_size, 3, height, width, generator=generator)
