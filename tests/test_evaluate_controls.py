"""`alignkit evaluate controllability` on random weights: its rows and its figures; the lines of `evaluate reward`."""

import json

import pytest
import torch

from alignkit import evaluate
from alignkit.base import load_base
from alignkit.controlnet import new_controlnet, save_controlnet


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
    monkeypatch.setattr("alignkit.base.load_base", lambda name, **options: base)
    save_controlnet(tmp_path / "controlnet", new_controlnet(base.unet, base.vae_scale_factor))
    results = tmp_path / "results.jsonl"
    rows = evaluate.controllability(
        [str(tmp_path / "controlnet")],
        "lineart",
        number=3,
        num_inference_steps=2,
        seed=5,
        device="cpu",
        results=str(results),
    )
    assert rows == [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["model"] for row in rows] == ["real", str(tmp_path / "controlnet")]
    assert rows[1].keys() >= {
        "condition", "evaluator", "number", "seed", "scheduler", "num_inference_steps", "guidance_scale", "dtype",
        "world_hash", "SSIM", "MS-SSIM", "alignment", "KID", "diversity",
    }  # fmt: skip


def test_reward_writes_a_line_for_each_lora(tmp_path, monkeypatch, capsys):
    scores = {"aesthetic": torch.tensor([1.0, 3.0]), "present": torch.ones(2)}
    monkeypatch.setattr(evaluate, "_score_base", lambda **settings: scores)
    monkeypatch.setattr(evaluate, "_draw_and_score", lambda lora, **settings: scores)
    rows = evaluate.reward(lora=["one", "two"], results=str(tmp_path / "results.jsonl"))
    assert [row["model"] for row in rows] == ["base", "one", "two"]
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["base"]["model"], line["lora"]["model"]) for line in lines] == [("base", "one"), ("base", "two")]
