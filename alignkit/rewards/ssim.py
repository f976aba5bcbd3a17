"""Similarity to a reference image by structure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from alignkit.data import open_image, to_tensor
from alignkit.rewards.reward import Reward, column

KERNEL_SIZE = 11  # pixels, of its Gaussian window
BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # exponents of the five scales in the paper


class Ssim(Reward):
    """Multi-scale structural similarity to a reference image (Wang, Simoncelli & Bovik 2003, eq. 7); 1 is equality.

    Of the paper's five scales as many are used as fit the image (three at 64 pixels), their exponents scaled to the
    same sum. Each scale's similarity s enters as (1 + s) / 2: images unlike the reference have s < 0, where a power of
    s has no gradient.

    Args:
        reference: path of the image where the prompt file has no column `reference`; resized to the scored images.
    """

    range = (0.0, 1.0)

    def __init__(self, reference: str | None = None):
        super().__init__()
        self.reference = reference
        if reference is not None:
            open_image(reference)

    def check(self, prompts: Sequence[str], **columns: Sequence[Any]) -> None:
        for path in column(columns, "reference", self.reference, prompts):
            if not Path(path).is_file():
                raise ValueError(f"expected the image {path}, which is not there.")

    def score(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        paths = column(columns, "reference", self.reference, prompts)
        size = images.shape[-2:]
        references = torch.cat([resized(to_tensor(open_image(path))[None].to(images), size) for path in paths])
        betas = fitting_betas(min(size))
        return multiscale_structural_similarity_index_measure(
            images, references, betas=betas, data_range=1.0, normalize="simple", reduction="none"
        )


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    # Bicubic interpolation overshoots at edges.
    return F.interpolate(image, size=size, mode="bicubic", antialias=True).clamp(0, 1)


def fitting_betas(side: int) -> tuple[float, ...]:
    """The exponents of the scales that fit an image whose shortest side is `side`."""
    # The window fits the coarsest scale, at 2^(1 - n) of the image; for n = 4 torchmetrics asks for a little more.
    fitting = [n for n in range(1, 6) if side // max(2 ** (n - 1), (n - 1) ** 2) >= KERNEL_SIZE]
    if not fitting:
        raise ValueError(f"expected images of at least {KERNEL_SIZE} pixels a side for SSIM, got {side}.")
    betas = BETAS[: fitting[-1]]
    return tuple(beta * sum(BETAS) / sum(betas) for beta in betas)
