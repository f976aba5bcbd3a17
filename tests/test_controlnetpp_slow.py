"""ControlNet++ does what it is for, on the emoji world and by a judge it was not trained with: a quarter of an hour.

What it gains from converged first stages and over three seeds is measured by tests/benchmarks/controlnetpp_emoji.py;
here a short first stage and one seed have to show the sign. That `reward_weight: 0` and a detached reward are bit for
bit ordinary training is in tests/test_controlnetpp.py.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignkit.base import load_base
from alignkit.conditions import build_condition, score
from alignkit.config import parse
from alignkit.controlnet import draw_controlled, load_controlnet
from alignkit.controls import open_controls
from alignkit.emoji import WEIGHTS_DIR
from alignkit.evaluate import EVALUATION_SEED, EVALUATORS
from training import controlnetpp

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
FIRST_STAGE, STEPS, NUMBER = 400, 150, 64
GUIDANCE_SCALE, NUM_INFERENCE_STEPS = 5.0, 20


def train(folder: Path, steps: int, **fields) -> Path:
    overrides = fields | {"output_dir": folder, "max_train_steps": steps, "reward_start": 0, "validation_steps": 0}
    overrides |= {"num_validation_images": 2, "report_to": "none", "checkpointing_steps": steps}
    argv = ["--config", str(ROOT / "configs" / "controlnetpp" / "emoji_segmentation.yaml")]
    for name, value in overrides.items():
        argv += [f"--{name}", str(value)]
    return controlnetpp.train(parse(controlnetpp.Config, argv))


@pytest.fixture(scope="module")
def arms(tmp_path_factory) -> dict[str, Path]:
    """From the same weights, on the same data and noise, for the same number of steps."""
    if not (WEIGHTS_DIR / "figures.json").exists():
        pytest.skip("the emoji world is not trained yet")
    folder = tmp_path_factory.mktemp("arms")
    first = train(folder / "first", FIRST_STAGE, reward_weight=0)
    shared = {"controlnet_model_name_or_path": first, "seed": 1000, "lr_warmup_steps": 0}
    others = {"condition.name": "tests.benchmarks.controls:PermutedSegmentation"}
    return {
        "no reward": train(folder / "no_reward", STEPS, **shared, reward_weight=0),
        "reward": train(folder / "reward", STEPS, **shared),
        "other labels": train(folder / "other_labels", STEPS, **shared, **others),
    }


@pytest.fixture(scope="module")
def drawn(arms) -> tuple[dict[str, Tensor], Tensor]:
    """What each arm draws of held-out labels, and these [N, H, W]."""
    base = load_base("emoji")
    judge = build_condition("segmentation")
    data, size = open_controls("emoji", judge), base.image_size()
    examples = [data.example(i, size, torch.Generator().manual_seed(EVALUATION_SEED + i)) for i in range(NUMBER)]
    targets = torch.stack([example.target for example in examples])
    images = {
        name: draw_controlled(
            base,
            load_controlnet(str(folder), base.unet, base.vae_scale_factor),
            judge.control(targets).float(),
            [example.prompt for example in examples],
            range(NUMBER),
            num_inference_steps=NUM_INFERENCE_STEPS,
            guidance_scale=GUIDANCE_SCALE,
        )
        for name, folder in arms.items()
    }
    return images, targets


@torch.no_grad()
def gain(images: dict[str, Tensor], targets: Tensor, arm: str) -> tuple[float, float]:
    """By how much the evaluator's loss is lower than without a reward, image by image, and its standard error."""
    evaluator = build_condition("segmentation", evaluator=True, model=EVALUATORS["segmentation"])
    difference = evaluator(images["no reward"], targets) - evaluator(images[arm], targets)
    return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)


@torch.no_grad()
def test_the_reward_makes_images_follow_their_control(drawn):
    """By the reward's own judge and by the evaluator, whose weights, width and kind are others."""
    images, targets = drawn
    trained_with = build_condition("segmentation")
    assert trained_with(images["reward"], targets).mean() < trained_with(images["no reward"], targets).mean()
    mean, error = gain(images, targets, "reward")
    assert mean > 2 * error
    evaluator = build_condition("segmentation", evaluator=True, model=EVALUATORS["segmentation"])
    scores = {name: score(evaluator, images[name], targets)["mIoU"] for name in ("no reward", "reward")}
    assert scores["reward"] > scores["no reward"]


def test_colours_and_contrast_stay(drawn):
    images, _ = drawn
    for statistic in (lambda x: x.mean((0, 2, 3)), lambda x: x.std((0, 2, 3))):
        torch.testing.assert_close(statistic(images["reward"]), statistic(images["no reward"]), rtol=0.1, atol=0)


def test_a_reward_of_other_labels_gains_nothing(drawn):
    mean, error = gain(*drawn, "other labels")
    assert mean < 2 * error
