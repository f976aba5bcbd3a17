"""How well a concept is drawn and a prompt followed, in published protocols that are never mixed; and paired intervals.

Embeddings are [N, D] of unit length.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Protocol = Literal["textual_inversion", "custom_concept101"]
PROTOCOLS: tuple[str, ...] = ("textual_inversion", "custom_concept101")


def image_similarity(drawn: Tensor, real: Tensor) -> Tensor:
    """[N]: mean cosine of each drawn image with all real ones. Both protocols take the mean over the drawn ones."""
    return (drawn @ real.T).mean(1)


def scored_text(prompt: str, placeholder_token: str, super_category_token: str, protocol: Protocol) -> str:
    """What an image of this prompt is compared with.

    Textual Inversion (Gal et al. 2022) deletes the placeholder, article and all else staying as they are; the class is
    not told, so that only the rest of the prompt counts. CustomConcept101 (Kumari et al. 2023) prompts with
    "<new1> dog" and deletes "<new1>", so that the class stays: here it takes the placeholder's place.
    """
    _check(protocol)
    if protocol == "textual_inversion":
        return " ".join(prompt.replace(placeholder_token, "").split())
    return prompt.replace(placeholder_token, super_category_token)


def text_similarity(images: Tensor, texts: Tensor, protocol: Protocol) -> Tensor:
    """[N] of images and their own texts: the cosine, or for CustomConcept101 CLIPScore, 2.5 max(cos, 0)."""
    _check(protocol)
    cosine = (images * texts).sum(-1)
    return cosine if protocol == "textual_inversion" else 2.5 * cosine.clamp(min=0)


def _check(protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol!r}.")


def paired_bootstrap(
    one: Sequence[float], other: Sequence[float], *, level: float = 0.95, number: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of one - other over the replicates (concepts), and the ends of its percentile interval."""
    if len(one) != len(other) or len(one) < 2:
        raise ValueError(f"Expected the same two or more replicates twice, got {len(one)} and {len(other)}.")
    difference = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
    drawn = np.random.default_rng(seed).integers(len(difference), size=(number, len(difference)))
    low, high = np.quantile(difference[drawn].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(difference.mean()), float(low), float(high)


def table(rows: Sequence[dict]) -> str:
    """Markdown of evaluated concepts, with their mean. Raises ValueError for rows of two protocols or evaluators."""
    for name in ("protocol", "evaluator"):
        found = sorted({row[name] for row in rows})
        if len(found) != 1:
            raise ValueError(f"Expected the rows of one {name} in a table, got {found}: their scores do not compare.")
    figures = [name for name, value in rows[0].items() if isinstance(value, float) and name != "guidance_scale"]
    lines = ["| concept | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    lines += [f"| {row['concept']} | " + " | ".join(f"{row[f]:.3f}" for f in figures) + " |" for row in rows]
    means = [float(torch.tensor([row[f] for row in rows]).mean()) for f in figures]
    return "\n".join([*lines, "| mean | " + " | ".join(f"{mean:.3f}" for mean in means) + " |"])
