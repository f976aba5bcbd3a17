"""When a run exploits its reward: judged by its validations, on prompts and seeds that are always the same.

A validation is summarised as {"step", "reward", "diversity", "monitors"}: the trained reward, how different the images
are, and of each monitor the gain over the start, in standard deviations of the start's scores. The first of a history
is the start's.
"""

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class EarlyStopConfig:
    """When to end a run that exploits its reward. Judged at each validation, on its fixed prompts and seeds.

    A run that is stopped leaves the weights of its best validation: the highest mean of the monitors.
    """

    enabled: bool = False
    """Off: only log."""
    min_diversity: float = 0.5
    """Stop when the diversity falls below this share of the start's."""
    monitor_drop: float = 0.5
    """Stop when a monitor has been this far below its best, in standard deviations of the start's scores, ..."""
    patience: int = 2
    """... for this many validations in a row, while the trained reward was above what it was at that best."""

    def __post_init__(self):
        if self.patience < 1:
            raise ValueError(f"early_stop.patience: expected at least 1, got {self.patience}")


def diversity(features: Tensor) -> float:
    """Mean distance between two images of a batch, by their features [B, D]."""
    return float(F.pdist(features).mean()) if len(features) > 1 else 0.0


def coarse_features(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, D], whose distances are the RMS of what 16 x 16 pixels show."""
    coarse = F.adaptive_avg_pool2d(images, 16).flatten(1)
    return coarse / math.sqrt(coarse.shape[1])


def monitor_scores(measured: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Mean and standard deviation of every monitor/* [N], to measure gains by.

    Images of which a monitor has no finite score, such as those without a face, do not count; FloatingPointError where
    it has none of any.
    """
    monitors = {name: scored(name, values) for name, values in measured.items() if name.startswith("monitor/")}
    return {name: [float(v.mean()), float(v.std(correction=0).clamp(min=1e-6))] for name, v in monitors.items()}


def gains(measured: Mapping[str, Tensor], start: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Of every monitor over the start's `monitor_scores`, in its standard deviations."""
    return {
        name: (float(scored(name, measured[name]).mean()) - mean) / deviation
        for name, (mean, deviation) in start.items()
    }


def scored(name: str, values: Tensor) -> Tensor:
    """The finite ones."""
    finite = values[values.isfinite()]
    if not len(finite):
        raise FloatingPointError(f"{name} has no finite score of any validation image: give a number there, such as 0")
    return finite


def reason_to_stop(history: Sequence[Mapping[str, Any]], cfg: EarlyStopConfig) -> str | None:
    """Of the summaries of a run's validations, the start's first: why it should end here, if it should."""
    if not cfg.enabled:
        return None
    start, now = history[0], history[-1]
    if now["diversity"] < cfg.min_diversity * start["diversity"]:
        return f"the diversity of the validation images fell from {start['diversity']:.3g} to {now['diversity']:.3g}"
    for name in start["monitors"]:
        best = max(history, key=lambda summary: summary["monitors"][name])
        threshold = best["monitors"][name] - cfg.monitor_drop
        exploited = [s["monitors"][name] < threshold and s["reward"] > best["reward"] for s in history[-cfg.patience :]]
        if len(exploited) == cfg.patience and all(exploited):
            drop = best["monitors"][name] - now["monitors"][name]
            return f"{name} fell by {drop:.2f} of the start's standard deviations while the trained reward rose"
    return None


def best_of(history: Sequence[Mapping[str, Any]], cfg: EarlyStopConfig) -> Mapping[str, Any] | None:
    """Of the summaries of a run's validations, the start's first: the one with the highest mean of the monitors.

    None without an early stop, and where the diversity was too low in all of them. The trained reward counts where
    there are no monitors.
    """
    start, *validations = history
    diverse = [s for s in validations if cfg.enabled and s["diversity"] >= cfg.min_diversity * start["diversity"]]
    return max(diverse, key=lambda s: fmean(s["monitors"].values() or [s["reward"]]), default=None)


def keep_best(
    history: Sequence[Mapping[str, Any]],
    cfg: EarlyStopConfig,
    params: Mapping[str, nn.Parameter],
    best: MutableMapping[str, Tensor],
) -> None:
    """Copies the parameters into `best`, on the CPU, if the last validation is the best so far."""
    if best_of(history, cfg) is history[-1]:
        best.update({name: parameter.detach().cpu().clone() for name, parameter in params.items()})


@torch.no_grad()
def restore_best(
    history: Sequence[Mapping[str, Any]],
    cfg: EarlyStopConfig,
    params: Mapping[str, nn.Parameter],
    best: Mapping[str, Tensor],
) -> int | None:
    """Gives the parameters their values of the best validation; the steps it came after, None if there is none."""
    kept = best_of(history, cfg)
    if kept is None:
        return None
    for name, parameter in params.items():
        parameter.copy_(best[name])
    return kept["step"]
