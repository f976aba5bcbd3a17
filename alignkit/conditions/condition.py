"""What a condition is: a control signal that can be read off an image differentiably."""

import os

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from alignkit.rewards.reward import check_images


class Condition(nn.Module):
    """A control signal: what a ControlNet is shown, and how far an image is from it.

    As it stands, for maps in [0, 1]: a subclass loads its model in `__init__` and computes `predict`. One with another
    kind of target (labels, depths of any scale) overrides what else differs, as `alignkit/conditions/*.py` do.

    `targets` [B,H,W] are what images are compared with; `control(targets)` is how a ControlNet is shown them.

    Attributes:
        column: key of the metadata.jsonl under which a folder of images holds targets, None when they are always
            extracted from the images.
        differentiable: False refuses the condition as a reward.
    """

    column: str | None = None
    differentiable: bool = True

    def predict(self, images: Tensor) -> Tensor:
        """Checked images [B,3,H,W] in [0,1] -> maps [B,H,W] in [0,1], with gradient; map i depends on image i alone."""
        raise NotImplementedError(f"{type(self).__name__} does not define predict(images).")

    def compare(self, predicted: Tensor, targets: Tensor) -> Tensor:
        """What `predict` returned and targets [B,H,W] -> distances [B], 0 where they agree, with gradient."""
        return (predicted - targets).square().mean((1, 2))

    def as_targets(self, predicted: Tensor) -> Tensor:
        """What `predict` returned -> targets [B,H,W], the form in which a dataset holds them."""
        return predicted

    def control(self, targets: Tensor) -> Tensor:
        """Targets [B,H,W] -> pictures [B,3,H,W] in [0,1]."""
        return targets[:, None].expand(-1, 3, -1, -1)

    def read(self, picture: Image.Image) -> Tensor:
        """An opened picture file -> target [H,W]: integers are then resized by nearest neighbour, floats by area.

        Raises:
            ValueError: it is not what this condition's files are; the file's name is added by the caller.
        """
        values = gray(picture)
        if values.max() > 255:
            raise ValueError(
                f"expected gray values of 0 to 255, got up to {float(values.max()):g}: save the map with 8 bits"
            )
        return values / 255

    def save(self, folder: str | os.PathLike) -> None:
        """Writes beside a ControlNet what its users need, besides a picture, to make controls like these: nothing."""

    def metrics(self) -> dict[str, Metric]:
        """What is reported of a set of images: by name, each with update(extracted [B,H,W], targets [B,H,W])."""
        return {"RMSE": PerImage(lambda extracted, targets: (extracted - targets).square().mean((1, 2)).sqrt())}

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """The consistency loss l(D(images), targets) [B], float32: ControlNet++, eq. 5 and 8.

        Raises:
            ValueError: wrong shape or range of the images, targets of another size, or losses that are not [B].
        """
        name = type(self).__name__
        check_images(images, name)
        if targets.shape != (len(images), *images.shape[-2:]):
            raise ValueError(
                f"{name}: expected targets {[len(images), *images.shape[-2:]]}, the size of the images, got "
                f"{list(targets.shape)}."
            )
        # A trainer's autocast would round pixels to 8 bits of mantissa, and half precision overflows in a softmax.
        with torch.autocast(images.device.type, enabled=False):
            losses = self.compare(self.predict(at_least_float32(images)), targets)
        if losses.shape != (len(images),):
            raise ValueError(f"{name}: expected losses of shape ({len(images)},), got {tuple(losses.shape)}.")
        return losses

    @torch.no_grad()
    def extract(self, images: Tensor) -> Tensor:
        """Targets [B,H,W] of images [B,3,H,W] in [0,1]."""
        check_images(images, type(self).__name__)
        with torch.autocast(images.device.type, enabled=False):
            return self.as_targets(self.predict(at_least_float32(images)))

    def train(self, mode: bool = True) -> "Condition":
        """Conditions stay in eval mode, also inside a module that trains."""
        return super().train(False)


class PerImage(Metric):
    """Mean over all images of a function (extracted, targets) -> [B]."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("number", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, extracted: Tensor, targets: Tensor) -> None:
        values = self.function(extracted, targets)
        self.total += values.double().sum()
        self.number += len(values)

    def compute(self) -> Tensor:
        return self.total / self.number


def at_least_float32(images: Tensor) -> Tensor:
    return images if images.dtype == torch.float64 else images.float()


def gray(picture: Image.Image) -> Tensor:
    """A picture with one value a pixel, float32 [H,W] in the file's own units; colour that is no gray is refused."""
    if picture.mode in ("RGB", "RGBA"):
        channels = np.asarray(picture.convert("RGB"))
        if (channels != channels[..., :1]).any():
            raise ValueError("expected a map with one value a pixel, got a colour picture")
        return torch.from_numpy(channels[..., 0].astype(np.float32))
    if picture.mode == "P":
        raise ValueError("expected a map with one value a pixel, got a palette picture: save it in mode L or I;16")
    if picture.mode in ("1", "LA"):  # 1: what is saved with one bit a pixel is black and white, not 0 and 1
        picture = picture.convert("L")
    if len(picture.getbands()) > 1:
        raise ValueError(f"expected a map with one value a pixel, got a picture of mode {picture.mode}")
    return torch.from_numpy(np.asarray(picture).astype(np.float32))


def model_input(
    images: Tensor,
    resolution: int | tuple[int, int] | None,
    multiple: int,
    mode: str,
    mean: Tensor,
    std: Tensor,
) -> Tensor:
    """Images [B,3,H,W] in [0,1] as a model wants them, with gradient.

    The shortest side becomes `resolution` (None: as it is), sides are rounded to a `multiple`, the aspect is kept; a
    pair is (height, width) of a model that takes no other size: the picture is squashed.
    """
    height, width = images.shape[-2:]
    if isinstance(resolution, tuple):
        size = resolution
    else:
        scale = 1.0 if resolution is None else resolution / min(height, width)
        size = tuple(max(multiple, round(side * scale / multiple) * multiple) for side in (height, width))
    if size != (height, width):
        images = F.interpolate(images, size=size, mode=mode, antialias=True).clamp(0, 1)
    return (images - mean) / std
