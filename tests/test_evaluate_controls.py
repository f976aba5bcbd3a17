"""`alignkit evaluate controllability` on random weights: its rows and its figures; the lines of `evaluate reward`."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from alignkit import config, evaluate
from alignkit.base import load_base
from alignkit.conditions import ConditionConfig, build_condition
from alignkit.controlnet import new_controlnet, save_controlnet
from alignkit.controls import open_controls
from alignkit.emoji import resolve
from alignkit.emoji.prompts import scene_of
from alignkit.emoji.scenes import render
from training.controlnetpp import Config


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


@pytest.mark.parametrize("prompt", [None, ""])
def test_images_are_drawn_by_their_own_prompts_or_by_one(prompt, tmp_path, monkeypatch, capsys):
    """The text-image score is of their own prompts in both cases: that of the real images does not change."""
    base = load_base("emoji", random_init=True, shrink=8)
    monkeypatch.setattr("alignkit.base.load_base", lambda name, **options: base)
    save_controlnet(tmp_path / "controlnet", new_controlnet(base.unet, base.vae_scale_factor))
    told, scored = [], []

    def draw(base, controlnet, control, prompts, seeds, **settings):
        told.append(list(prompts))
        return torch.rand(len(prompts), 3, *control.shape[-2:], generator=torch.Generator().manual_seed(0))

    def score(encoder, images, prompts, features):
        scored.append(list(prompts))
        return {"alignment": 0.0}

    monkeypatch.setattr("alignkit.controlnet.draw_controlled", draw)
    monkeypatch.setattr(evaluate, "image_scores", score)
    row = evaluate.controllability([str(tmp_path / "controlnet")], "lineart", number=2, prompt=prompt, device="cpu")[1]
    assert row["prompt"] == prompt and len(set(scored[0])) == 2 and scored[0] == scored[1]
    assert told == [scored[0] if prompt is None else [prompt] * 2]


def trained_on(folder, **condition) -> str:
    """A folder as a training leaves it, as far as the evaluation reads what it was trained on."""
    folder.mkdir()
    config.save(Config(output_dir=str(folder), condition=ConditionConfig(**condition)), folder / "config.yaml")
    return str(folder)


def test_a_controlnet_is_shown_what_it_was_trained_on(tmp_path, monkeypatch, capsys):
    """The palette of its config.yaml, in the evaluator's hands: the pixels that its training showed it."""
    palette = tmp_path / "palette.json"
    classes = build_condition("segmentation").num_classes
    palette.write_text(json.dumps([[i % 256, 255 - i % 256, 7] for i in range(classes)]))
    args = {"model": "emoji/training/segmenter", "palette": str(palette), "resolution": 32}
    folder = trained_on(tmp_path / "controlnet", name="segmentation", args=args)
    base, shown = load_base("emoji", random_init=True, shrink=8), []
    monkeypatch.setattr("alignkit.base.load_base", lambda name, **options: base)
    save_controlnet(folder, new_controlnet(base.unet, base.vae_scale_factor))

    def draw(base, controlnet, control, prompts, seeds, **settings):
        shown.append(control)
        return torch.rand(len(prompts), 3, *control.shape[-2:], generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr("alignkit.controlnet.draw_controlled", draw)
    settings = {"number": 2, "device": "cpu"}
    row = evaluate.controllability([folder], "segmentation", **settings)[1]
    assert row["condition_args"] == {"palette": str(palette)} and row["evaluator"] == "emoji/evaluator/segmenter"

    def control(size, **args):
        condition = build_condition("segmentation", **args)
        seeds = [torch.Generator().manual_seed(evaluate.EVALUATION_SEED + i) for i in range(2)]
        data = open_controls("emoji", condition)
        return condition.control(torch.stack([data.example(i, size, seed).target for i, seed in enumerate(seeds)]))

    assert torch.equal(shown[0], control((64, 64), palette=str(palette)))
    row = evaluate.controllability([folder], "segmentation", condition_args={}, resolution=32, **settings)[1]
    assert row["condition_args"] == {} and row["height"] == 32
    assert torch.equal(shown[1], control((32, 32)))


def test_what_controllability_refuses(tmp_path):
    """A judge that a training has seen, another condition, settings that differ, no judge at all: before any work."""
    fine = trained_on(tmp_path / "fine", name="lineart", args={"sigma": 0.5})
    wide = trained_on(tmp_path / "wide", name="lineart", args={"sigma": 1.5})
    depth = trained_on(tmp_path / "depth", name="depth", args={"model": "owner/judge"})
    for message, controlnets, condition, options in [
        ("wide with {'sigma': 1.5}: evaluate them one by one", [fine, wide], "lineart", {}),
        ("was trained on depth: it cannot be evaluated on lineart", [depth], "lineart", {}),
        ("owner/judge is what .* was trained with", [depth], "depth", {"evaluator": "owner/judge"}),
        ("is a judge of the training", [], "depth", {"evaluator": "emoji/training/depth"}),
        ("is a judge of the training", [], "depth", {"evaluator": resolve("emoji/training/depth")}),
        ("evaluator: expected a model for depth", [], "depth", {"base": "owner/base", "clip": "owner/clip"}),
        ("clip: expected a folder or Hub name", [], "lineart", {"base": "owner/base"}),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate.controllability(controlnets, condition, **options)


def test_reward_writes_a_line_for_each_lora(tmp_path, monkeypatch, capsys):
    scores = {"aesthetic": torch.tensor([1.0, 3.0]), "present": torch.ones(2)}
    monkeypatch.setattr(evaluate, "_score_base", lambda **settings: scores)
    monkeypatch.setattr(evaluate, "_draw_and_score", lambda lora, **settings: scores)
    rows = evaluate.reward(lora=["one", "two"], results=str(tmp_path / "results.jsonl"))
    assert [row["model"] for row in rows] == ["base", "one", "two"]
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["base"]["model"], line["lora"]["model"]) for line in lines] == [("base", "one"), ("base", "two")]
    monkeypatch.setattr(evaluate, "_score_real", lambda *settings: {**scores, "present": torch.tensor([1.0, 0.0])})
    rows = evaluate.reward(lora=["one"], real=True, results=str(tmp_path / "real.jsonl"))
    assert [row["model"] for row in rows] == ["base", "real", "one"] and rows[1]["present"] == 0.5
    (line,) = (json.loads(line) for line in (tmp_path / "real.jsonl").read_text().splitlines())
    assert line["real"] == rows[1]


@pytest.mark.parametrize("kind", ["singles", "pairs", "three"])
def test_a_real_scene_is_what_its_prompt_says(kind):
    rng = np.random.default_rng(0)
    for prompt in evaluate.prompt_set(kind, unseen=True)[:20]:
        scene = scene_of(prompt, rng)
        assert scene.background == prompt.background
        assert Counter(o.sprite.name for o in scene.objects) == {name: prompt.count for name in prompt.objects}
        seen = len(np.unique(render(scene).instance_map)) - 1  # without the background
        assert seen == len(scene.objects) == prompt.count * len(prompt.objects)
