"""Scores of concepts, and the import of the authors' own files."""

import json
import os
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from alignkit import evaluate as evaluation
from alignkit.base import load_base
from alignkit.concepts import create, load
from alignkit.concepts.convert import convert_neti
from alignkit.metrics import image_similarity, paired_bootstrap, scored_text, table, text_similarity
from alignkit.personalization import draw_concept, evaluate
from tests.tiny import save_tiny_model

# Metrics


def unit(*rows):
    return F.normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)


def test_similarities_by_hand():
    real = unit([1, 0], [0, 1])
    assert image_similarity(real[:1], real[:1]).item() == 1.0
    assert torch.allclose(image_similarity(unit([1, 0], [1, 1]), real), torch.tensor([0.5, 0.5**0.5]))
    images, texts = unit([1, 0], [1, 0]), unit([3, 4], [-1, 0])
    assert torch.allclose(text_similarity(images, texts, "textual_inversion"), torch.tensor([0.6, -1.0]))
    assert torch.allclose(text_similarity(images, texts, "custom_concept101"), torch.tensor([2.5 * 0.6, 0.0]))


def test_the_protocols_differ_in_the_text_too():
    prompt = "a photo of a <x> on a table"
    assert scored_text(prompt, "<x>", "cat", "textual_inversion") == "a photo of a on a table"
    assert scored_text(prompt, "<x>", "cat", "custom_concept101") == "a photo of a cat on a table"
    with pytest.raises(ValueError, match="expected one of"):
        scored_text(prompt, "<x>", "cat", "mine")


def test_a_table_has_one_protocol():
    row = {"concept": "one", "protocol": "textual_inversion", "evaluator": "emoji", "guidance_scale": 5.0}
    rows = [row | {"text_similarity": 0.25}, row | {"text_similarity": 0.75}]
    assert table(rows).splitlines()[-1] == "| mean | 0.500 |"
    with pytest.raises(ValueError, match="one protocol"):
        table([rows[0], rows[1] | {"protocol": "custom_concept101"}])


def test_paired_bootstrap():
    """Pairs that all differ by the same have no spread; the interval of noise has the width of the normal one."""
    mean, low, high = paired_bootstrap([1.5, 2.5, 7.5], [1.0, 2.0, 7.0])
    assert (mean, low, high) == (0.5, 0.5, 0.5)
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0))
    mean, low, high = paired_bootstrap(noise.tolist(), [0.0] * 400)
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * float(noise.std()) / 20, rel=0.05)
    with pytest.raises(ValueError, match="same two or more"):
        paired_bootstrap([1.0], [1.0])


def test_misuse_of_the_command_fails_before_any_work():
    with pytest.raises(ValueError, match="for each concept"):
        evaluate(concept=["a"], images=[])
    with pytest.raises(ValueError, match="a CLIP to score with"):
        evaluate(concept=["a"], images=["b"], model="sd15")


def test_command(tmp_path, monkeypatch):
    """Two concepts, from files to figures, pictures and lines: each as drawn and scored alone."""
    tiny = save_tiny_model(tmp_path / "tiny")
    monkeypatch.setattr("alignkit.base.load_base", lambda name, **own: load_base(tiny, random_init=True, **own))

    def embed_images(images):
        return F.normalize(images.mean((2, 3)), dim=-1)

    judge = embed_images, lambda texts: F.normalize(torch.tensor([[len(t), 1.0, 1.0] for t in texts]), dim=-1)
    monkeypatch.setattr(evaluation, "text_image_judge", lambda path, device: judge)
    ViTModel(
        ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16,
                  patch_size=8), add_pooling_layer=False,
    ).save_pretrained(tmp_path / "dino")  # fmt: skip
    base, folders, images = load_base(tiny, random_init=True), [], []
    for seed, word in enumerate(("<one>", "<two>")):
        concept = create("neti", base, word, "x", hidden_size=8, num_frequencies=16, seed=seed)
        folders.append(str(concept.save(tmp_path / word.strip("<>"))))
        (tmp_path / f"images {seed}").mkdir()
        for i in range(3):
            pixels = np.random.default_rng(10 * seed + i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"images {seed}" / f"{i}.png")
        images.append(str(tmp_path / f"images {seed}"))
    texts = [f"a {{}} {letter}" for letter in "abcdefghi"]  # more than are drawn in one call
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    settings = {"prompts": str(tmp_path / "prompts.txt"), "evaluator": "mine", "model": "tiny", "seeds": 2}
    settings |= {"num_inference_steps": 1, "dino": str(tmp_path / "dino"), "truncation": 4}
    lines = tmp_path / "lines.jsonl"
    rows = evaluate(folders, images, output_dir=str(tmp_path / "grids"), results=str(lines), **settings)
    assert [json.loads(line) for line in lines.read_text().splitlines()] == rows
    for row, folder, shown in zip(rows, folders, images, strict=True):
        drawn = draw_concept(base, load(folder), texts, 2, truncation=4, num_inference_steps=1)
        few = draw_concept(base, load(folder), texts, 2, truncation=4, num_inference_steps=1, batch_size=3)
        torch.testing.assert_close(drawn, few, rtol=0, atol=1e-4)
        real = torch.stack([torch.from_numpy(np.array(Image.open(f"{shown}/{i}.png"))) for i in range(3)])
        real = real.permute(0, 3, 1, 2) / 255
        expected = image_similarity(embed_images(drawn), embed_images(real)).mean()
        assert (row["concept"], row["num_images"], row["truncation"], row["evaluator"]) == (folder, 18, 4, "mine")
        assert row["image_similarity"] == pytest.approx(float(expected), abs=1e-4) and "identity" not in row
        told = judge[1]([text.replace("{} ", "") for text in texts for _ in range(2)])
        expected = text_similarity(embed_images(drawn), told, "textual_inversion").mean()
        assert row["text_similarity"] == pytest.approx(float(expected), abs=1e-4) and -1 <= row["dino"] <= 1
        grid = np.array(Image.open(tmp_path / "grids" / f"{folder.rsplit('/')[-1]}.png"))
        assert grid.shape[0] >= 9 * 16 and grid.shape[1] >= 2 * 16 and grid.std() > 0
    (again,) = evaluate(folders[1:], images[1:], **settings | {"truncation": None})
    assert again["truncation"] is None and again["concept"] == folders[1]
    monkeypatch.setattr("alignkit.personalization.draw_concept", None)  # nothing is drawn before all is looked at
    with pytest.raises(FileNotFoundError, match="typo"):
        evaluate(folders, [images[0], str(tmp_path / "typo")], **settings)
    (tmp_path / "prompts.txt").write_text("a dog\n")
    with pytest.raises(ValueError, match=r"expected \{\} in the placeholder's place"):
        evaluate(folders, images, **settings)


# Import


class Encoder(nn.Module):
    """Their positional encoding as it is pickled: frequencies as a plain tensor, which a GPU gave, or a parameter."""

    def __init__(self, w, as_parameter):
        super().__init__()
        self.sigma_t, self.sigma_l, self.num_w = 0.03, 2.0, len(w)
        self.w = nn.Parameter(w) if as_parameter else w


def their_file(path, bypass=True, as_parameter=False, hidden=128, width=24):
    """Their state dict: net.0 is input_layer once more."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(32, 2, generator=generator) * torch.tensor([0.03, 2.0])
    input_layer = nn.Linear(64, 160)
    net = nn.Sequential(
        input_layer, nn.Linear(160, hidden), nn.LayerNorm(hidden), nn.LeakyReLU(),
        nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.LeakyReLU(),
    )  # fmt: skip
    output = nn.Sequential(nn.Linear(hidden, width * (1 + bypass)))
    modules = nn.ModuleDict({"input_layer": input_layer, "net": net, "output_layer": output})
    cfg = {
        "data": {"placeholder_token": "<toy>", "super_category_token": "a"},
        "model": {"use_positional_encoding": True, "output_bypass": bypass, "target_norm": 0.3},
    }
    module = ModuleType("models.positional_encoding")
    encoder = Encoder(w, as_parameter)
    module.NeTIPositionalEncoding = Encoder
    names = Encoder.__module__, Encoder.__qualname__
    sys.modules["models"], sys.modules["models.positional_encoding"] = ModuleType("models"), module
    Encoder.__module__, Encoder.__qualname__ = "models.positional_encoding", "NeTIPositionalEncoding"
    try:
        torch.save({"state_dict": modules.state_dict(), "cfg": cfg, "encoder": encoder}, path)
    finally:
        Encoder.__module__, Encoder.__qualname__ = names
        del sys.modules["models"], sys.modules["models.positional_encoding"]

    def reference(t, layer):
        x = torch.stack([t, layer], dim=1).T
        v = torch.cat([torch.sin(w @ x), torch.cos(w @ x)])
        return F.normalize(output(net((v / v.norm(dim=0)).T)), dim=-1) * 0.3

    return reference


@pytest.mark.parametrize(("bypass", "as_parameter"), [(True, False), (False, True)])
def test_their_mapper_gives_their_vectors(tmp_path, bypass, as_parameter):
    reference = their_file(tmp_path / "mapper-steps-500.pt", bypass, as_parameter)
    folder = convert_neti(str(tmp_path / "mapper-steps-500.pt"), str(tmp_path / "toy"))
    (concept,) = load(folder).concepts
    assert (concept.placeholder_token, concept.super_category_token, concept.norms) == ("<toy>", "a", [0.3])
    t, layer = torch.tensor([0.0, 333.0, 999.0]), torch.tensor([0.0, 7.0, 15.0])
    got = concept.module(t, layer)
    halves = torch.cat([got.token, got.bypass] if bypass else [got.token], dim=-1)[:, 0]
    assert torch.allclose(halves, reference(t, layer), atol=1e-6)
    with pytest.raises(ValueError, match="already"):
        convert_neti(str(tmp_path / "mapper-steps-500.pt"), str(folder))


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_a_pickle_runs_nothing(tmp_path):
    torch.save({"state_dict": {}, "cfg": {}, "encoder": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    (tmp_path / "empty.pt").touch()
    for name, message in (("bomb", "refused"), ("other", "no mapper"), ("empty", "refused"), ("gone", "no file")):
        with pytest.raises(ValueError, match=message):
            convert_neti(str(tmp_path / f"{name}.pt"), str(tmp_path / "out"))
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
