"""Train the emoji world's other judges on exact labels: counters, segmenter, the evaluator's reader, identity, depth.

    python training/emoji/judges.py --judge training/counter
    python training/emoji/judges.py --judge all

Pictures are spoilt as a generator would spoil them (alignkit/emoji/degrade.py). Judges of other roles have other
seeds and widths.
"""

from argparse import ArgumentParser
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import nn
from transformers import (
    ConvNextConfig,
    DPTConfig,
    DPTForDepthEstimation,
    GLPNConfig,
    GLPNForDepthEstimation,
    PreTrainedModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from alignkit.emoji import WEIGHTS_DIR, degrade, fit, scenes, sprites
from alignkit.emoji.judges import DensityCounter
from alignkit.emoji.reader import Reader

BATCH_SIZE = 32
NAMES = [s.name for s in sprites.catalogue()]
BACKGROUNDS, TINTS = list(scenes.BACKGROUNDS), list(scenes.TINTS)
EVERYTHING = scenes.World(tiers=("named", "known"), overlap=0.3, with_held_out=True)
# tier B too, one sprite a scene: what the identity judge has to tell apart
SINGLES = scenes.World(tiers=("named", "known", "tier_b"), named_share=0.3, kinds={"single": 1.0}, with_held_out=True)


def density_map(rendered: scenes.Rendered, stride: int) -> np.ndarray:
    """Unit mass for every visible object, spread around the middle of what shows of it, [64 / stride, 64 / stride]."""
    size = scenes.SIZE // stride
    total = np.zeros((size, size), dtype=np.float32)
    for number in np.unique(rendered.instance_map[rendered.instance_map > 0]):
        rows, columns = np.nonzero(rendered.instance_map == number)
        if len(rows) < 12:  # covered by another
            continue
        spot = np.zeros((size, size), dtype=np.float32)
        spot[int(rows.mean()) // stride, int(columns.mean()) // stride] = 1
        spot = gaussian_filter(spot, 4 / stride, mode="constant")
        total += spot / spot.sum()
    return total


def batches(world: scenes.World, degraded: degrade.Degrader, stride: int = 0) -> Callable:
    """A function that makes a batch of pictures with the labels of every judge."""

    def make_batch(rng: np.random.Generator) -> dict:
        drawn = [world.draw(rng) for _ in range(BATCH_SIZE)]
        rendered = [scenes.render(scene) for scene in drawn]
        batch = {
            "images": degraded(fit.to_float(np.stack([r.image for r in rendered])), rng),
            "class_map": torch.from_numpy(np.stack([r.class_map for r in rendered])),
            "instance_map": torch.from_numpy(np.stack([r.instance_map for r in rendered])),
            "depth": torch.from_numpy(np.stack([r.depth for r in rendered])),
            "background": torch.tensor([BACKGROUNDS.index(s.background) for s in drawn]),
            "tint": torch.full((BATCH_SIZE, 5), len(TINTS)),  # of object number i at i + 1
        }
        for row, scene in zip(batch["tint"], drawn, strict=True):
            for number, placed in enumerate(scene.objects):
                row[number + 1] = TINTS.index(placed.tint) if placed.tint else len(TINTS)
        if stride:
            batch["density"] = torch.from_numpy(np.stack([density_map(r, stride) for r in rendered]))[:, None]
        return batch

    return make_batch


def density_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Of the map, in units of its mean square, and of its sum: the count itself."""
    counts, wanted = predicted.sum((1, 2, 3)), target.sum((1, 2, 3))
    return (predicted - target).square().mean() / target.square().mean() + F.smooth_l1_loss(counts, wanted)


def exact(predicted: torch.Tensor, target: torch.Tensor) -> float:
    return (predicted.sum((1, 2, 3)).round() == target.sum((1, 2, 3)).round()).float().mean().item()


def counter(name: str, widths: tuple, seed: int, steps: int, degraded: degrade.Degrader) -> None:
    torch.manual_seed(seed)
    model = DensityCounter(widths)

    def loss_fn(batch: dict, _: torch.Generator) -> tuple[torch.Tensor, dict]:
        density = model(batch["images"]).float()
        return density_loss(density, batch["density"]), {"exact": exact(density, batch["density"])}

    train(name, model, loss_fn, batches(EVERYTHING, degraded, stride=2), seed, steps)


def reader(name: str, widths: tuple, seed: int, steps: int, degraded: degrade.Degrader) -> None:
    torch.manual_seed(seed)
    model = Reader(len(NAMES), len(TINTS), len(BACKGROUNDS), widths)

    def loss_fn(batch: dict, _: torch.Generator) -> tuple[torch.Tensor, dict]:
        reading = model(batch["images"])
        labels = batch["class_map"][:, 2::4, 2::4] - 1  # [B, 16, 16], -1 off the sprites
        instances = batch["instance_map"][:, 2::4, 2::4]
        tints = batch["tint"].gather(1, instances.flatten(1)).view_as(instances)
        on_sprite = labels >= 0
        class_loss = F.cross_entropy(reading.class_logits, labels, ignore_index=-1, label_smoothing=0.02)
        tint_loss = F.cross_entropy(reading.tint_logits, tints.masked_fill(~on_sprite, -1), ignore_index=-1)
        background_loss = F.cross_entropy(reading.background_logits, batch["background"])
        loss = density_loss(reading.density, batch["density"]) + class_loss + 0.5 * tint_loss + 0.3 * background_loss
        right = reading.class_logits.argmax(1) == labels
        return loss, {
            "exact": exact(reading.density, batch["density"]),
            "class": right[on_sprite].float().mean().item(),
            "tint": (reading.tint_logits.argmax(1) == tints)[on_sprite].float().mean().item(),
            "background": (reading.background_logits.argmax(1) == batch["background"]).float().mean().item(),
        }

    train(name, model, loss_fn, batches(EVERYTHING, degraded, stride=4), seed, steps)


def identity(name: str, widths: tuple, seed: int, steps: int, degraded: degrade.Degrader) -> None:
    """A Reader whose embedding of the whole picture has to name sprite and tint: cosine softmax (Wang et al. 2018)."""
    torch.manual_seed(seed)
    model = Reader(len(NAMES), len(TINTS), len(BACKGROUNDS), widths)

    def loss_fn(batch: dict, _: torch.Generator) -> tuple[torch.Tensor, dict]:
        reading = model(batch["images"])
        label = batch["class_map"].flatten(1).amax(1) - 1
        tint = batch["tint"][:, 1]
        names = 20 * reading.embedding @ F.normalize(model.sprite.weight[..., 0, 0].float(), dim=-1).T
        tints = 10 * reading.embedding @ F.normalize(model.tint.weight[..., 0, 0].float(), dim=-1).T
        loss = (
            F.cross_entropy(names, label.clamp(min=0))
            + 0.5 * F.cross_entropy(tints, tint)
            + density_loss(reading.density, batch["density"])
        )
        return loss, {
            "class": (names.argmax(1) == label).float().mean().item(),
            "tint": (tints.argmax(1) == tint).float().mean().item(),
        }

    train(name, model, loss_fn, batches(SINGLES, degraded, stride=4), seed, steps)


def at_points(
    logits: torch.Tensor, class_map: torch.Tensor, generator: torch.Generator, number: int = 512
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, C, h, w] read bilinearly at random pixels of class_map [B, H, W]: [B, C, number], [B, number].

    Half of the pixels lie on sprites. As many logits as pixels would cost more than the model (Kirillov et al. 2020).
    """
    size = class_map.shape[-1]
    weight = (class_map > 0).flatten(1).float()
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1) + 1 / size**2
    chosen = torch.multinomial(weight, number, generator=generator)
    xy = torch.stack([chosen % size, chosen // size], dim=-1)
    grid = (xy + 0.5) * 2 / size - 1
    points = F.grid_sample(logits.float(), grid[:, None], padding_mode="border", align_corners=False)[:, :, 0]
    return points, class_map.flatten(1).gather(1, chosen)


def segmenter(name: str, widths: tuple, seed: int, steps: int, degraded: degrade.Degrader) -> None:
    torch.manual_seed(seed)
    labels = ["background", *NAMES]
    model = SegformerForSemanticSegmentation(
        SegformerConfig(
            num_encoder_blocks=4, depths=[1, 1, 2, 1], sr_ratios=[8, 4, 2, 1], hidden_sizes=list(widths),
            patch_sizes=[5, 3, 3, 3], strides=[2, 2, 2, 2], num_attention_heads=[1, 2, 4, 4], mlp_ratios=[3, 3, 3, 3],
            decoder_hidden_size=64, id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)},
            hidden_dropout_prob=0.0, classifier_dropout_prob=0.0, drop_path_rate=0.0,
        )
    )  # fmt: skip

    def loss_fn(batch: dict, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
        logits = model((batch["images"] - 0.5) / 0.25).logits
        logits, target = at_points(logits, batch["class_map"], generator)
        right = logits.argmax(1) == target
        return F.cross_entropy(logits, target), {
            "points": right.float().mean().item(),
            "on_sprite": right[target > 0].float().mean().item(),
        }

    train(name, model, loss_fn, batches(EVERYTHING, degraded), seed, steps, learning_rate=1.5e-3)


def other_segmenter(name: str, widths: tuple, seed: int, steps: int, degraded: degrade.Degrader) -> None:
    """The evaluator's: UperNet on a ConvNeXt, all convolutions, where the training's is a transformer."""
    torch.manual_seed(seed)
    labels = ["background", *NAMES]
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = ConvNextConfig(
        patch_size=2, hidden_sizes=list(widths), depths=[1, 1, 1, 1], drop_path_rate=0.0, out_features=stages
    )
    model = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone, hidden_size=28, pool_scales=[1, 2, 4], use_auxiliary_head=False,
            id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)},
        )
    )  # fmt: skip

    def loss_fn(batch: dict, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
        # not the class's forward, which enlarges a logit of every class to every pixel
        features = model.backbone((batch["images"] - 0.5) / 0.25).feature_maps
        logits, target = at_points(model.decode_head(features), batch["class_map"], generator)
        right = logits.argmax(1) == target
        return F.cross_entropy(logits, target), {
            "points": right.float().mean().item(),
            "on_sprite": right[target > 0].float().mean().item(),
        }

    train(name, model, loss_fn, batches(EVERYTHING, degraded), seed, steps, learning_rate=1.5e-3)


def depth_loss(predicted: torch.Tensor, batch: dict) -> tuple[torch.Tensor, dict]:
    """Mean absolute error [0, 1], half of it on the sprites, which are planes on a floor that rises."""
    predicted = F.interpolate(predicted.float()[:, None], size=scenes.SIZE, mode="bilinear", align_corners=False)[:, 0]
    error, on_sprite = (predicted - batch["depth"]).abs(), (batch["class_map"] > 0).float()
    sprites_error = (error * on_sprite).sum() / on_sprite.sum().clamp(min=1)
    return error.mean() + sprites_error, {"error": error.mean().item(), "on_sprite": sprites_error.item()}


def depth(name: str, widths: tuple, seed: int, steps: int, degraded: degrade.Degrader) -> None:
    torch.manual_seed(seed)
    model = GLPNForDepthEstimation(
        GLPNConfig(
            num_encoder_blocks=4, depths=[1, 1, 1, 1], sr_ratios=[4, 2, 1, 1], hidden_sizes=list(widths),
            patch_sizes=[7, 3, 3, 3], strides=[4, 2, 2, 2], num_attention_heads=[1, 2, 4, 4], mlp_ratios=[2, 2, 2, 2],
            decoder_hidden_size=16, max_depth=1, drop_path_rate=0.0,
        )
    )  # fmt: skip

    def loss_fn(batch: dict, _: torch.Generator) -> tuple[torch.Tensor, dict]:
        return depth_loss(model((batch["images"] - 0.5) / 0.25).predicted_depth, batch)

    train(name, model, loss_fn, batches(EVERYTHING, degraded), seed, steps)


def other_depth(name: str, widths: tuple, seed: int, steps: int, degraded: degrade.Degrader) -> None:
    """The evaluator's: DPT, a plain vision transformer with a convolutional decoder."""
    torch.manual_seed(seed)
    hidden_size, *neck = widths
    model = DPTForDepthEstimation(
        DPTConfig(
            image_size=scenes.SIZE, patch_size=8, hidden_size=hidden_size, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=2 * hidden_size, backbone_out_indices=[0, 1, 2, 3], reassemble_factors=[2, 1, 0.5, 0.25],
            neck_hidden_sizes=neck, fusion_hidden_size=12, readout_type="add", use_auxiliary_head=False,
        )
    )  # fmt: skip

    def loss_fn(batch: dict, _: torch.Generator) -> tuple[torch.Tensor, dict]:
        return depth_loss(model((batch["images"] - 0.5) / 0.25).predicted_depth, batch)

    train(name, model, loss_fn, batches(EVERYTHING, degraded), seed, steps)


def train(
    name: str,
    model: nn.Module,
    loss_fn: Callable,
    make_batch: Callable,
    seed: int,
    steps: int,
    learning_rate: float = 2e-3,
) -> None:
    def save() -> None:
        fit.halves(model).save_pretrained(WEIGHTS_DIR / name)
        if isinstance(model, PreTrainedModel):  # a transformers model: say how its images are prepared
            size = {"height": scenes.SIZE, "width": scenes.SIZE}
            SegformerImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(
                WEIGHTS_DIR / name
            )

    fit.fit(
        name.replace("/", "_"), model, loss_fn, make_batch, save, steps=steps, learning_rate=learning_rate, seed=seed
    )


JUDGES = {  # function, widths, seed, steps
    "training/counter": (counter, (24, 48, 72), 41, 1000),
    "training/segmenter": (segmenter, (24, 40, 64, 96), 42, 4000),
    "evaluator/reader": (reader, (32, 80, 144), 43, 4000),
    "identity/reader": (identity, (24, 64, 112), 44, 1500),
    "training/depth": (depth, (12, 20, 32, 40), 46, 1500),
    "evaluator/segmenter": (other_segmenter, (24, 32, 40, 48), 47, 5000),
    "evaluator/depth": (other_depth, (32, 8, 12, 16, 24), 48, 1500),
    "monitor/counter": (counter, (16, 40, 64), 45, 700),
}


def main(judge: str, steps: int | None) -> None:
    degraded = degrade.Degrader(WEIGHTS_DIR / "base" / "vae")
    for name in JUDGES if judge == "all" else [judge]:
        function, widths, seed, default_steps = JUDGES[name]
        function(name, widths, seed, steps or default_steps, degraded)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--judge", choices=["all", *JUDGES], required=True)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    main(args.judge, args.steps)
