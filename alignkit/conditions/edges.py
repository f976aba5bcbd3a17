"""Edges in closed form: soft edges, line art, Canny. Nothing here is learned, so there is nothing to download."""

import torch
from kornia.color import rgb_to_grayscale
from kornia.filters import canny, gaussian_blur2d, spatial_gradient
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import BinaryF1Score
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from alignkit.conditions.condition import Condition, PerImage
from alignkit.rewards.ssim import fitting_betas


class SoftEdge(Condition):
    """Where the picture changes: the length of the Sobel gradient over all colours, saturating softly towards 1.

    m / (m + scale), with m the gradient's length for a blurred image. Unlike ControlNet++'s HED network, whose released
    wrapper returns 8-bit numbers, it has a gradient everywhere.

    Args:
        sigma: of the Gaussian blur before it, in pixels.
        scale: gradient at which the map is 0.5; a step of height h has a gradient of about 0.25 h at sigma 1.
    """

    column = "softedge"

    def __init__(self, sigma: float = 1.0, scale: float = 0.1):
        super().__init__()
        if sigma <= 0 or scale <= 0:
            raise ValueError(f"expected a sigma and a scale above 0, got {sigma} and {scale}")
        self.sigma, self.scale = sigma, scale

    def predict(self, images: Tensor) -> Tensor:
        gradients = spatial_gradient(blurred(images, self.sigma))  # [B,3,2,H,W]
        length = (gradients.square().sum((1, 2)) + 1e-8).sqrt()  # a root at 0 has no gradient
        return length / (length + self.scale)

    def metrics(self) -> dict[str, Metric]:
        return {"SSIM": PerImage(ssim), "MS-SSIM": PerImage(ms_ssim)}


class LineArt(Condition):
    """Dark lines as an artist would draw them: a difference of Gaussians of the luminance, white on black.

    tanh(max(0, wide - narrow) / scale) (the one-sided edges of Winnemoeller et al. 2012, "XDoG", eq. 4), where the
    maximum is a softplus of width scale / 10, so that a plain surface has a gradient, too.

    Args:
        sigma: of the narrow Gaussian, in pixels; the wide one is 1.6 times as wide.
        scale: difference at which a line is three quarters white.
    """

    column = "lineart"

    def __init__(self, sigma: float = 0.8, scale: float = 0.05):
        super().__init__()
        if sigma <= 0 or scale <= 0:
            raise ValueError(f"expected a sigma and a scale above 0, got {sigma} and {scale}")
        self.sigma, self.scale = sigma, scale

    def predict(self, images: Tensor) -> Tensor:
        luminance = rgb_to_grayscale(images)
        difference = blurred(luminance, 1.6 * self.sigma) - blurred(luminance, self.sigma)
        return torch.tanh(F.softplus(difference / self.scale, beta=10))[:, 0]

    def metrics(self) -> dict[str, Metric]:
        return {"SSIM": PerImage(ssim), "MS-SSIM": PerImage(ms_ssim)}


class Canny(Condition):
    """Canny's edges (1986): binary ones are shown to the ControlNet, their gradient's magnitude is what is compared.

    Targets are kornia's magnitudes after non-maximum suppression, zero off the ridges; the mask of what is suppressed
    is constant, so gradient flows at the ridges that are kept. They can only come from an image, so no file is read.

    Args:
        low_threshold, high_threshold: of the hysteresis, in kornia's unit: a step of height 1 has about 2.6.
    """

    column = None

    def __init__(self, low_threshold: float = 0.1, high_threshold: float = 0.2):
        super().__init__()
        if not 0 < low_threshold <= high_threshold:
            raise ValueError(f"expected 0 < low_threshold <= high_threshold, got {low_threshold} and {high_threshold}")
        self.low_threshold, self.high_threshold = low_threshold, high_threshold

    def predict(self, images: Tensor) -> Tensor:
        """Magnitudes [B,H,W] >= 0.

        One image after the other: beside a step, two pixels are equally steep, which of them is suppressed hangs on the
        last bit, and convolutions round by the number of images.
        """
        thresholds = self.low_threshold, self.high_threshold
        return torch.cat([canny(image, *thresholds, hysteresis=False)[0][:, 0] for image in images.split(1)])

    def edges(self, magnitudes: Tensor) -> Tensor:
        """Bool [B,H,W]: what is above the high threshold, and what is above the low one and connected to that."""
        low, edges = magnitudes > self.low_threshold, magnitudes > self.high_threshold
        while True:
            grown = (F.max_pool2d(edges[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0) & low
            if torch.equal(grown, edges):
                return edges
            edges = grown

    def control(self, targets: Tensor) -> Tensor:
        return super().control(self.edges(targets).to(targets.dtype))

    def read(self, picture: Image.Image) -> Tensor:
        raise ValueError("Canny's edges are taken from the image, not from a file")

    def metrics(self) -> dict[str, Metric]:
        """F1 of the binary edges, hits and misses summed over all images."""
        return {"F1": EdgeF1(self.edges)}


class EdgeF1(BinaryF1Score):
    def __init__(self, edges):
        super().__init__(validate_args=False)  # which looks for other numbers than 0 and 1, that edges never are
        self.edges = edges

    def update(self, extracted: Tensor, targets: Tensor) -> None:
        super().update(self.edges(extracted).long(), self.edges(targets).long())


def blurred(images: Tensor, sigma: float) -> Tensor:
    size = 2 * round(3 * sigma) + 1
    return gaussian_blur2d(images, (size, size), (sigma, sigma))


def ssim(extracted: Tensor, targets: Tensor) -> Tensor:
    return structural_similarity_index_measure(
        extracted[:, None], targets[:, None], data_range=1.0, reduction="none"
    ).reshape(-1)


def ms_ssim(extracted: Tensor, targets: Tensor) -> Tensor:
    """With as many of the five scales as fit the maps."""
    return multiscale_structural_similarity_index_measure(
        extracted[:, None],
        targets[:, None],
        data_range=1.0,
        betas=fitting_betas(min(targets.shape[-2:])),
        normalize="relu",
        reduction="none",
    ).reshape(-1)
