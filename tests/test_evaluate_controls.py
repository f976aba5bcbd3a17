"""`alignkit evaluate controllability` on random weights: its rows, and what a perfect image scores."""

import json

import pytest
import torch

from alignkit import evaluate
from alignkit.base import load_base
from alignkit.conditions import CONDITIONS, build_condition
from alignkit.controlnet import new_controlnet, save_controlnet
from tests.toy_conditions import save_estimator, save_segmenter


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_perfect_image_has_perfect_scores(name, tmp_path):
    """The released scorers of depth and line art fail this."""
    args = {}
    if name in ("segmentation", "depth"):
        args["model"] = {"segmentation": save_segmenter, "depth": save_estimator}[name](tmp_path)
    judge = build_condition(name, **args)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for metric, value in evaluate.control_scores(judge, images, judge.extract(images)).items():
        assert value == pytest.approx(0 if metric == "RMSE" else 1, abs=1e-6), metric


class Encoder:
    def __init__(self, texts):
        self.texts = texts

    def embed_images(self, images):
        return images.flatten(1)

    def embed_prompts(self, prompts):
        return self.texts


def test_image_scores_by_hand():
    """KID's unbiased estimate of a set against itself in another order is at most 0; far sets are far apart."""
    features = torch.nn.functional.normalize(torch.randn(8, 12, generator=torch.Generator().manual_seed(0)), dim=1)
    images = features.view(8, 3, 2, 2)
    same = evaluate.image_scores(Encoder(features), images, [""] * 8, features.flip(0))
    assert same["alignment"] == pytest.approx(1) and same["KID"] <= 0
    expected = torch.cdist(features, features).sum() / (8 * 7)
    assert same["diversity"] == pytest.approx(float(expected), rel=1e-5)
    other = evaluate.image_scores(Encoder(features), images, [""] * 8, -features)
    assert other["KID"] > same["KID"] + 0.1


def test_rows_carry_their_settings(tmp_path, monkeypatch, capsys):
    base = load_base("emoji", random_init=True, shrink=8)
    monkeypatch.setattr("alignkit.base.load_base", lambda name: base)
    save_controlnet(tmp_path / "controlnet", new_controlnet(base.unet, base.vae_scale_factor))
    results = tmp_path / "results.jsonl"
    rows = evaluate.controllability(
        [str(tmp_path / "controlnet")], "lineart", number=3, num_inference_steps=2, seed=5, results=str(results)
    )
    assert rows == [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["model"] for row in rows] == ["real", str(tmp_path / "controlnet")]
    assert rows[1].keys() >= {
        "condition", "evaluator", "number", "seed", "scheduler", "num_inference_steps", "guidance_scale",
        "world_hash", "SSIM", "MS-SSIM", "alignment", "KID", "diversity",
    }  # fmt: skip
