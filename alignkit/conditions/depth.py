"""Depth, up to its scale."""

from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from transformers import AutoModelForDepthEstimation

from alignkit.conditions.condition import Condition, PerImage, gray, model_input
from alignkit.conditions.models import find_model, load_model, preprocessing


class Depth(Condition):
    """Depth by an estimator; mean squared error of normalised maps, as ControlNet++ (section 3.3).

    The sense of the map has to be the same in the files and in the model: near is large for MiDaS, its DPTs, Depth
    Anything and the emoji world, far is large for what estimates metres (weights of NYU and KITTI, "Metric" in a name).

    Args:
        model: a folder or Hub name of a depth estimator (DPT, Depth Anything, GLPN, ...).
        normalise: "max" divides both maps by their own maximum, so that the scale does not count, as ControlNet++ does;
            "range" maps both to [0, 1], so that neither scale nor offset counts: for files that were stored that way.
        resolution: shortest side at which the model sees images; null is its preprocessor's.
    """

    column = "depth"

    def __init__(
        self,
        model: str = "emoji/training/depth",
        normalise: Literal["max", "range"] = "max",
        resolution: int | None = None,
    ):
        super().__init__()
        if normalise not in ("max", "range"):
            raise ValueError(f"normalise: expected max or range, got {normalise!r}")
        path = find_model(model)
        self.estimator = load_model(AutoModelForDepthEstimation, path)
        self.input = preprocessing(path, self.estimator.config, resolution)
        self.normalise = normalise

    def normalised(self, depths: Tensor) -> Tensor:
        """[B,H,W] -> [B,H,W] in [0,1] for depths that are not negative; a constant map stays finite."""
        if self.normalise == "range":
            depths = depths - depths.amin((1, 2), keepdim=True)
        return depths / depths.amax((1, 2), keepdim=True).clamp(min=1e-6)

    def predict(self, images: Tensor) -> Tensor:
        """Depths [B,H,W] in the model's own unit."""
        depths = self.estimator(pixel_values=model_input(images, **self.input(images))).predicted_depth
        return F.interpolate(depths[:, None], size=images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]

    def compare(self, predicted: Tensor, targets: Tensor) -> Tensor:
        return (self.normalised(predicted) - self.normalised(targets)).square().mean((1, 2))

    def control(self, targets: Tensor) -> Tensor:
        return super().control(self.normalised(targets).clamp(0, 1))

    def read(self, picture: Image.Image) -> Tensor:
        depth = gray(picture)
        if not depth.isfinite().all() or depth.min() < 0:
            raise ValueError("expected depths that are finite and not negative")
        if depth.min() == depth.max():
            raise ValueError(f"expected a depth map, got the constant {float(depth.min()):g}")
        return depth

    def metrics(self) -> dict[str, Metric]:
        """RMSE of an image's maps on a scale of 0 to 255, both normalised alike; the mean over images."""
        return {"RMSE": PerImage(self.rmse)}

    def rmse(self, extracted: Tensor, targets: Tensor) -> Tensor:
        error = self.normalised(extracted) - self.normalised(targets)
        return 255 * torch.sqrt(error.square().mean((1, 2)))
