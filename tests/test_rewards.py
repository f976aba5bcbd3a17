"""Rewards: gradients against finite differences, identities of batching and preprocessing, and what they refuse."""

import io
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, SegformerConfig, SegformerForSemanticSegmentation
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from alignkit.emoji.judges import AestheticHead, DensityCounter
from alignkit.rewards import REWARDS, RewardConfig, build_reward, combine, probe, probe_images, shape_loss
from alignkit.rewards.aesthetic import collapse
from alignkit.rewards.detection import Detection
from alignkit.rewards.jpeg import CHROMINANCE, LUMINANCE, cosine_transform, quantisation_steps, to_planes
from alignkit.rewards.reward import Reward
from alignkit.rewards.ssim import BETAS, fitting_betas
from tests.tiny_models import all_models, letters

PROMPTS = ["a cat", "two red dogs", "a bird"]
REAL: dict[str, dict] = {}  # the arguments of the rewards of tests/tiny_models.py, once they are written
DOCS = Path(__file__).parent.parent / "docs" / "rewards.md"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Tiny random models of every kind that a reward loads, as folders; the CLIP in fp16, as the bundled ones are."""
    folder = tmp_path_factory.mktemp("models")
    layers = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    tokenizer = letters()
    special = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    text_config = dict(**layers, **special, vocab_size=len(tokenizer), max_position_embeddings=12, projection_dim=16)
    vision_config = dict(**layers, image_size=32, patch_size=8, projection_dim=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = CLIPModel(CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=16))
        segmenter = SegformerForSemanticSegmentation(
            SegformerConfig(
                hidden_sizes=[16, 32], depths=[1, 1], num_encoder_blocks=2, sr_ratios=[2, 1], patch_sizes=[3, 3],
                strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16,
                id2label={0: "background", 1: "cat", 2: "dog", 3: "bird"},
            )
        )  # fmt: skip
        counter, head = DensityCounter(), AestheticHead(16)
    clip.half().save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    segmenter.save_pretrained(folder / "segmenter")
    counter.save_pretrained(folder / "counter")
    head.save_pretrained(folder / "aesthetic")
    reference = (probe_images(1, 40, 40)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    Image.fromarray(reference).save(folder / "reference.png")
    REAL.update(all_models(folder))
    return folder


def arguments(name: str, models: Path) -> dict:
    return {
        "absence": {"model": str(models / "segmenter"), "object": "cat"},
        "aesthetic": {"clip": str(models / "clip"), "head": str(models / "aesthetic")},
        "alignment": {"model": str(models / "clip")},
        "count": {"model": str(models / "counter"), "count": 5},
        "pickscore": {"model": str(models / "clip")},
        "presence": {"model": str(models / "segmenter"), "object": "cat"},
        "ssim": {"reference": str(models / "reference.png")},
    }.get(name) or REAL.get(name, {})


@pytest.fixture(params=[*REWARDS, "siglip", "open_clip"])
def reward(request, models) -> Reward:
    """Every reward of ours, and alignment by the encoders of other libraries."""
    name = request.param if request.param in REWARDS else "alignment"
    return build_reward(name, **arguments(request.param, models))


def images_like_generated(batch_size: int = 3, height: int = 48, width: int = 64, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shapes = F.interpolate(torch.rand(batch_size, 3, 5, 5, generator=generator), (height, width), mode="bilinear")
    return (shapes + 0.1 * torch.randn(shapes.shape, generator=generator)).clamp(0, 1)


# ---------------------------------------------------------------------------------------- every reward


def test_gradient_equals_finite_differences(reward):
    """Central difference along a random direction in float64, h small enough to stay clear of kinks."""
    if isinstance(reward, Detection):
        pytest.skip("detectors return float32; tests/test_real_rewards.py has their gradients")
    reward.double()
    images = images_like_generated().double().clamp(0.01, 0.99).requires_grad_()
    scores = reward(images, PROMPTS)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).abs().amax(1) > 0).all()
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        ahead, behind = (reward(images + h * direction, PROMPTS).sum() for h in (1e-6, -1e-6))
    expected = (ahead - behind) / 2e-6
    assert torch.allclose((gradient * direction).sum(), expected, rtol=1e-5, atol=1e-9)


def test_batch_equals_one_by_one_and_order_does_not_matter(reward):
    images = images_like_generated()
    scores = reward(images, PROMPTS)
    assert scores.shape == (3,) and scores.dtype == torch.float32
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-5)
    order = [2, 0, 1]
    torch.testing.assert_close(reward(images[order], [PROMPTS[i] for i in order]), scores[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (40, 72), (70, 33)])
def test_any_image_size_is_scored_within_the_declared_range(reward, size):
    scores = reward(images_like_generated(3, *size), PROMPTS)
    low, high = reward.range
    assert scores.isfinite().all() and (scores >= low).all() and (scores <= high).all()


def test_frozen_is_frozen(reward):
    before = {name: value.clone() for name, value in reward.state_dict().items()}
    images = images_like_generated().requires_grad_()
    reward.train()
    assert not any(module.training for module in reward.modules())
    reward(images, PROMPTS).sum().backward()
    assert images.grad is not None
    assert all(parameter.grad is None for parameter in reward.parameters())
    assert all(torch.equal(value, before[name]) for name, value in reward.state_dict().items())


def test_half_precision_images_and_autocast_are_scored_in_float32(reward):
    images = images_like_generated().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        scores = reward(images, PROMPTS)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, reward(images.float(), PROMPTS))


def test_probe_accepts_every_reward_of_ours(reward):
    probe(reward)
    probe(reward, PROMPTS, height=40, width=56)


# ---------------------------------------------------------------------------------------- the contract


class Brightness(Reward):
    """What `score` receives, averaged."""

    def __init__(self, bias: float = 0.0):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(bias))

    def score(self, images, prompts, **columns):
        return images.mean((1, 2, 3)) + self.bias


@pytest.mark.parametrize("low, high", [(-1, 1), (0, 255), (-0.01, 0.9)])
def test_a_wrong_range_is_refused_and_named(low, high):
    images = torch.linspace(low, high, 3 * 8 * 8).view(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"expected images in \[0, 1\].*double denormalisation"):
        Brightness()(images, ["x"])


def test_mid_grey_reaches_the_reward_as_one_half():
    assert Brightness()(torch.full((1, 3, 8, 8), 0.5), ["x"]).item() == 0.5


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "floating point"),
        (torch.zeros(3, 8, 8), r"\[B,3,H,W\]"),
        (torch.zeros(1, 4, 8, 8), r"\[B,3,H,W\]"),
        (torch.full((1, 3, 8, 8), math.nan), "finite"),
    ],
)
def test_images_that_are_none(images, message):
    with pytest.raises(ValueError, match=message):
        Brightness()(images, ["x"])


def test_lengths_are_checked():
    images = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match="list of 2 prompts, one an image, got 1"):
        Brightness()(images, ["x"])
    with pytest.raises(ValueError, match="list of 2 prompts, one an image, got 'xy'"):
        Brightness()(images, "xy")
    with pytest.raises(ValueError, match="list of 2 count, one an image, got 3"):
        Brightness()(images, ["x", "y"], count=[1, 2, 3])


def test_a_score_matrix_is_refused():
    class Matrix(Brightness):
        def score(self, images, prompts, **columns):
            return images.mean((2, 3)) @ images.mean((2, 3)).T

    with pytest.raises(ValueError, match="take the diagonal"):
        Matrix()(torch.zeros(2, 3, 8, 8), ["x", "y"])


# ---------------------------------------------------------------------------------------- CLIP


@pytest.mark.parametrize("size", [(32, 32), (96, 96), (90, 61), (50, 130), (20, 27)])
def test_preprocessing_equals_the_official_one(models, size):
    """The same 8-bit image through tensors and through PIL: pixel values, and scores within 1e-2 relative."""
    image = (images_like_generated(1, *size) * 255).round()
    reward = build_reward("alignment", model=str(models / "clip"))
    encoder = reward.encoder
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixel_values = processor(
        Image.fromarray(image[0].permute(1, 2, 0).byte().numpy()), return_tensors="pt"
    ).pixel_values
    with torch.no_grad():
        official = F.normalize(encoder.clip.get_image_features(pixel_values=pixel_values).pooler_output, dim=-1)
    expected = (official * encoder.embed_prompts(["a cat"])).sum()
    assert abs(reward(image / 255, ["a cat"]) / expected - 1) < 1e-2
    assert torch.cosine_similarity(encoder.embed_images(image / 255), official) > 1 - 1e-4


def test_statistics_of_the_folder_are_used(models, tmp_path):
    encoder = build_reward("alignment", model=str(models / "clip")).encoder
    assert encoder.mean.flatten().tolist() == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    encoder.clip.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    CLIPImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(tmp_path)
    encoder = build_reward("alignment", model=str(tmp_path)).encoder
    assert encoder.mean.flatten().tolist() == [0.5] * 3 and encoder.std.flatten().tolist() == [0.25] * 3


def test_fp16_weights_are_used_in_float32(models):
    encoder = build_reward("alignment", model=str(models / "clip")).encoder
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def test_a_tokenizer_without_limit_takes_the_models(models):
    encoder = build_reward("alignment", model=str(models / "clip")).encoder
    assert encoder.tokenizer.model_max_length > 1e20 and encoder.max_length == 12
    with pytest.warns(UserWarning, match="reads 12 of 22 tokens"):
        cut = encoder.embed_prompts(["a" * 20])
    with pytest.warns(UserWarning):
        torch.testing.assert_close(cut, encoder.embed_prompts(["a" * 30]))


def test_prompts_are_told_apart(models):
    """Pooling at a wrong end-of-text id would take the first token, the same for every prompt."""
    embeddings = build_reward("alignment", model=str(models / "clip")).encoder.embed_prompts(PROMPTS)
    similarity = embeddings @ embeddings.T
    assert (similarity[~torch.eye(3, dtype=bool)] < 1 - 1e-4).all()


def test_a_wrong_end_of_text_id_is_refused(models, tmp_path):
    clip = CLIPModel.from_pretrained(models / "clip")
    clip.config.text_config.eos_token_id = 7
    clip.save_pretrained(tmp_path)
    letters().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="end-of-text id in model and tokenizer, got 7"):
        build_reward("alignment", model=str(tmp_path))


# ---------------------------------------------------------------------------------------- aesthetic


def test_laions_head_equals_its_layers_one_by_one(models, tmp_path):
    widths = [16, 12, 8, 4, 1]
    layers = nn.Sequential()
    for width, next_width in zip(widths, widths[1:], strict=False):
        layers.extend([nn.Linear(width, next_width), nn.Dropout(0.1)])
    state_dict = {f"layers.{name}": value for name, value in layers.eval().state_dict().items()}
    embeddings = F.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    torch.testing.assert_close(collapse(state_dict)(embeddings), layers(embeddings), rtol=1e-5, atol=1e-6)

    from safetensors.torch import save_file

    save_file(state_dict, tmp_path / "head.safetensors")
    reward = build_reward("aesthetic", clip=str(models / "clip"), head=str(tmp_path / "head.safetensors"))
    images = images_like_generated()
    torch.testing.assert_close(reward(images, PROMPTS), layers(reward.encoder.embed_images(images))[:, 0])

    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="layers.0.weight"):
        build_reward("aesthetic", clip=str(models / "clip"), head=str(tmp_path / "other.safetensors"))


def test_aesthetic_refuses_pickles_and_another_clips_head(models, tmp_path):
    with pytest.raises(ValueError, match="pickle head.pth"):
        build_reward("aesthetic", clip=str(models / "clip"), head="head.pth")
    (tmp_path / "damaged.safetensors").write_bytes(b"no head")
    with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
        build_reward("aesthetic", clip=str(models / "clip"), head=str(tmp_path / "damaged.safetensors"))
    AestheticHead(24).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="embeddings of 16 numbers.*got one for 24"):
        build_reward("aesthetic", clip=str(models / "clip"), head=str(tmp_path))


# ---------------------------------------------------------------------------------------- JPEG


def jpeg_bytes(image: torch.Tensor, quality: int) -> int:
    buffer = io.BytesIO()
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.tell()


@pytest.mark.parametrize("quality", [10, 50, 75, 95, 100])
def test_quantisation_steps_are_pillows(quality):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG", quality=quality)
    tables = Image.open(buffer).quantization
    assert quantisation_steps(LUMINANCE, quality).flatten().tolist() == list(tables[0])
    assert quantisation_steps(CHROMINANCE, quality).flatten().tolist() == list(tables[1])


def test_cosine_transform_is_orthonormal_with_a_constant_first_row():
    cosines = cosine_transform()
    torch.testing.assert_close(cosines @ cosines.T, torch.eye(8), atol=1e-6, rtol=0)
    torch.testing.assert_close(cosines[0], torch.full((8,), 8**-0.5))


def test_planes_of_primary_colours():
    """JFIF: white is (255, 128, 128) in YCbCr, blue (29, 255.5, 107), here without the offsets of 128."""
    white, blue = torch.ones(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)
    blue[:, 2] = 1
    assert [plane.mean().item() for plane in to_planes(white)] == pytest.approx([127, 0, 0], abs=1e-4)
    assert [plane.mean().item() for plane in to_planes(blue)] == pytest.approx([29.07 - 128, 127.5, -20.73], abs=0.01)
    assert [plane.shape[1:] for plane in to_planes(torch.zeros(1, 3, 17, 40))] == [(32, 48), (16, 24), (16, 24)]


def test_a_flat_image_costs_header_and_blocks_alone():
    """24 blocks (16 of luminance, 4 of each chrominance) of 6 bits, one luminance offset."""
    grey = torch.full((1, 3, 32, 32), 128 / 255)
    size = build_reward("incompressibility")(grey, ["x"]).item()
    assert size == pytest.approx((623 + 24 * 6 / 8) / 1000, abs=1e-6)


@pytest.mark.parametrize("quality", [50, 95])
@pytest.mark.parametrize("side", [64, 160])
def test_estimate_follows_pillows_file_size(quality, side):
    """Over images of varying blur and noise: rank correlation, and the kB themselves."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for cells in (2, 4, 8, 16, 32):
        for noise in (0, 0.01, 0.03, 0.1):
            colours = torch.rand(1, 3, cells, cells, generator=generator)
            for mode in ("nearest", "bicubic"):
                shapes = F.interpolate(colours, (side, side), mode=mode)
                images.append((shapes + noise * torch.randn(shapes.shape, generator=generator)).clamp(0, 1))
    images = torch.cat(images)
    sizes = torch.tensor([jpeg_bytes(image, quality) / 1000 for image in images])
    estimates = build_reward("incompressibility", quality=quality)(images, ["x"] * len(images))
    spearman = torch.corrcoef(torch.stack([sizes.argsort().argsort(), estimates.argsort().argsort()]).float())[0, 1]
    assert spearman > 0.95
    assert (estimates / sizes - 1).abs().mean() < 0.12


def test_following_the_gradient_changes_the_true_file():
    image = images_like_generated(1, 64, 64)
    start = jpeg_bytes(image[0], 95)
    for name, sign in (("compressibility", -1), ("incompressibility", 1)):
        reward, moved = build_reward(name), image.clone()
        for _ in range(20):
            moved.requires_grad_()
            (gradient,) = torch.autograd.grad(reward(moved, ["x"]).sum(), moved)
            moved = (moved + 0.005 * gradient.sign()).clamp(0, 1).detach()
        assert sign * (jpeg_bytes(moved[0], 95) - start) > 0.1 * start


def test_compressibility_is_minus_the_size():
    images = images_like_generated()
    more, less = (build_reward(name, quality=80)(images, PROMPTS) for name in ("incompressibility", "compressibility"))
    assert torch.equal(more, -less) and (more > 0.6).all()
    with pytest.raises(ValueError, match="1 to 100, got 0"):
        build_reward("compressibility", quality=0)


# ---------------------------------------------------------------------------------------- count, absence, ssim


class Dots(nn.Module):
    """A counter that can be read off: the sum of the first channel."""

    def forward(self, images):
        return images[:, :1]


def test_count_by_hand(models):
    """d = |counted - wanted|: d^2 below one half (0.25^2 = 0.0625), d - 0.25 above (2 -> 1.75)."""
    reward = build_reward("count", model=str(models / "counter"), count=3)
    reward.counter = Dots()
    images = torch.zeros(4, 3, 4, 4)
    for image, number in zip(images, (3, 3.25, 5, 1), strict=True):
        image[0] = number / 16
    images.requires_grad_()
    scores = reward(images, ["x"] * 4)
    assert scores.tolist() == pytest.approx([0, -0.0625, -1.75, -1.75])
    scores.sum().backward()
    assert images.grad[:, 0, 0, 0].tolist() == pytest.approx([0, -0.5, -1, 1])
    assert reward(images, ["x"] * 4, count=[3, 3, 5, None]).tolist() == pytest.approx([0, -0.0625, 0, -1.75])


def test_a_missing_column_is_named(models):
    reward = build_reward("count", model=str(models / "counter"))
    with pytest.raises(ValueError, match=r"'count' for the prompt 'two red dogs', got none.*column.*args"):
        reward(images_like_generated(), PROMPTS, count=[1, None, 1])


class FixedLogits(nn.Module):
    """A segmenter of 4 labels whose logits are `offset` for label 1 and 0 else, plus a trace of the image."""

    dtype = torch.float32

    def __init__(self, config, offset):
        super().__init__()
        self.config, self.offset = config, offset

    def forward(self, pixel_values):
        logits = torch.zeros(len(pixel_values), 4, *pixel_values.shape[-2:]) + 0 * pixel_values[:, :1]
        logits[:, 1] = self.offset + 0.01 * pixel_values[:, 0]
        return type("Output", (), {"logits": logits})


def test_absence_by_hand_and_far_from_any_detection(models):
    """Even logits over 4 labels: odds 1 to 3 against, so log 3. At -300 (p = 0 in float32) the gradient is the same."""
    reward = build_reward("absence", model=str(models / "segmenter"), object="Cat")
    grey = reward.mean.view(1, 3, 1, 1).expand(1, 3, 8, 8)  # is 0 after normalisation
    reward.segmenter = FixedLogits(reward.segmenter.config, 0.0)
    assert reward(grey, ["x"]).item() == pytest.approx(math.log(3), abs=1e-6)
    gradients = []
    for offset in (0.0, -300.0, 300.0):
        reward.segmenter.offset = offset
        images = grey.clone().requires_grad_()
        score = reward(images, ["x"])
        assert score.item() == pytest.approx(math.log(3) - offset, rel=1e-5)
        score.backward()
        gradients.append(images.grad)
    assert (gradients[0][:, 0] < 0).all()
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


def test_absence_takes_the_object_of_each_prompt(models):
    reward = build_reward("absence", model=str(models / "segmenter"))
    images = images_like_generated(1).expand(2, -1, -1, -1)
    cat, dog = reward(images, ["x", "y"], object=["cat", "dog"]).tolist()
    assert cat != dog
    presence = build_reward("presence", model=str(models / "segmenter"), object="dog")
    assert presence(images, ["x", "y"], object=["cat", None]).tolist() == [-cat, -dog]
    assert reward(images[:1], ["y"], object=["dog"]).item() == pytest.approx(dog, rel=1e-5)
    both = [["cat", "dog"], "dog"]
    assert reward(images, ["x", "y"], object=both).tolist() == pytest.approx([min(cat, dog), dog], rel=1e-5)
    assert presence(images, ["x", "y"], object=both).tolist() == pytest.approx([-max(cat, dog), -dog], rel=1e-5)
    with pytest.raises(ValueError, match="got an empty list"):
        reward(images, ["x", "y"], object=["cat", []])
    with pytest.raises(ValueError, match=r"got 'dgo': nearest are \['dog'"):
        reward(images, ["x", "y"], object=["cat", "dgo"])
    with pytest.raises(ValueError, match="'brid'"):
        build_reward("absence", model=str(models / "segmenter"), object="brid")


def test_ssim_is_one_at_the_reference_and_has_a_gradient_away_from_it(models):
    path = str(models / "reference.png")
    reference = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] / 255
    reward = build_reward("ssim")
    assert reward(reference, ["x"], reference=[path]).item() == pytest.approx(1, abs=1e-5)
    opposite = (1 - reference).requires_grad_()
    score = reward(opposite, ["x"], reference=[path])
    assert score < 0.5
    score.backward()
    assert opposite.grad.isfinite().all() and opposite.grad.any()


def test_ssim_uses_the_scales_that_fit(models):
    """n scales need 11 pixels at the coarsest one: 11, 22, 44, 99 (torchmetrics: (n - 1)^2 = 9 times 11) and 176."""
    reward = build_reward("ssim")
    sides = (11, 21, 22, 43, 44, 98, 99, 175, 176, 512)
    assert [len(fitting_betas(side)) for side in sides] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    for side in sides[:-1]:
        image = probe_images(1, side, side)
        assert reward(image, ["x"], reference=[str(models / "reference.png")]).isfinite().all()
    assert fitting_betas(512) == pytest.approx(BETAS)
    assert sum(fitting_betas(64)) == pytest.approx(sum(BETAS))
    with pytest.raises(ValueError, match="at least 11 pixels a side for SSIM, got 10"):
        fitting_betas(10)


# ---------------------------------------------------------------------------------------- losses and sums


def test_loss_shapes_by_hand():
    def at(loss, target, *values):
        rewards = torch.tensor(values, requires_grad=True)
        losses = shape_loss(rewards, loss, target)
        losses.sum().backward()
        return losses.tolist(), rewards.grad.tolist()

    assert at("distance", 10.0, 4.0, 10.0, 12.0) == ([6, 0, 2], [-1, 0, 1])
    assert at("hinge", 2.0, 1.5, 2.5, 9.0) == ([0.5, 0, 0], [-1, 0, 0])
    assert at("negative", None, 4.0, -1.0) == ([-4, 1], [-1, -1])


def test_weighted_losses_and_their_gradients_add():
    configs = [
        RewardConfig("compressibility", weight=0.5),
        RewardConfig("incompressibility", weight=2.0, loss="distance", target=1.5),
        RewardConfig(f"{__name__}:Brightness", weight=3.0, loss="hinge", target=0.7, args={"bias": 0.1}),
    ]
    total = combine(configs)
    assert total.labels == ["compressibility", "incompressibility", "Brightness"]
    images = images_like_generated().requires_grad_()
    values, loss = total(images, PROMPTS)
    size, bright = values["incompressibility"], values["Brightness"]
    torch.testing.assert_close(loss, 0.5 * size + 2 * (size - 1.5).abs() + 3 * (0.7 - bright).relu())
    (gradient,) = torch.autograd.grad(loss.sum(), images)
    parts = [
        torch.autograd.grad(c.weight * shape_loss(r(images, PROMPTS), c.loss, c.target).sum(), images)[0]
        for c, r in zip(configs, total.rewards, strict=True)
    ]
    torch.testing.assert_close(gradient, sum(parts))
    probe(total)


def test_terms_of_the_same_name_are_numbered():
    total = combine([RewardConfig("compressibility", args={"quality": q}) for q in (50, 70, 90)])
    assert total.labels == ["compressibility", "compressibility_2", "compressibility_3"]
    assert list(total(images_like_generated(), PROMPTS).values) == total.labels


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(loss="mse"), "negative, distance or hinge, got 'mse'"),
        (dict(loss="hinge"), "'hinge' takes a target"),
        (dict(target=1.0), "'negative' takes no target"),
        (dict(weight=math.nan), "finite weight"),
    ],
)
def test_a_wrong_config_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig("count", **settings)


def test_no_reward_at_all_is_refused():
    with pytest.raises(ValueError, match="at least one reward"):
        combine([])


# ---------------------------------------------------------------------------------------- building, probing


def test_build_refuses_what_it_cannot_build():
    with pytest.raises(ValueError, match="got 'alignmet'; the nearest is 'alignment'"):
        build_reward("alignmet")
    with pytest.raises(ValueError, match="'no_such_module'"):
        build_reward("no_such_module:Mine")
    with pytest.raises(ValueError, match="subclass of alignkit.rewards.Reward"):
        build_reward("torch.nn:Linear")
    with pytest.raises(ValueError, match="alignkit.rewards.jpeg:Nothing.*got None"):
        build_reward("alignkit.rewards.jpeg:Nothing")
    with pytest.raises(ValueError, match="compressibility: could not be built.*qualty"):
        build_reward("compressibility", qualty=3)


def refused(score, message, **attributes):
    reward = type("Mine", (Reward,), {"score": score, **attributes})()
    with pytest.raises(ValueError, match=message):
        probe(reward)


def test_probe_refuses_and_says_what_to_do():
    def mean(self, images, prompts, **columns):
        return images.mean((1, 2, 3))

    refused(mean, "Mine declares differentiable = False.*monitor or evaluate", differentiable=False)
    refused(lambda *a, **k: mean(*a).detach(), r"no gradient.*no PIL, numpy.*detach")
    refused(lambda *a, **k: (255 * mean(*a)).round(), "image 0 of 2 is zero. Rounding")
    refused(lambda *a, **k: mean(*a)[:1].expand(2), "image 1 of 2 is zero.*only the first image of a batch")
    refused(lambda *a, **k: mean(*a) / 0, "finite scores")
    refused(lambda *a, **k: (mean(*a) * 0).sqrt(), "gradient of image 0 is not finite.*root")


def test_probe_looks_at_every_term_of_a_sum():
    class Blind(Brightness):
        def score(self, images, prompts, **columns):
            return images.mean((1, 2, 3)).round()

    total = combine([RewardConfig("compressibility"), RewardConfig("incompressibility")])
    probe(total)
    total.rewards[1] = Blind()
    with pytest.raises(ValueError, match="Blind: the gradient of image 0"):
        probe(total)


def test_the_page_of_the_docs_runs(tmp_path, monkeypatch):
    """The class and the YAML of docs/rewards.md, built from the folder that one works in."""
    text = DOCS.read_text()
    code, config = (re.search(rf"```{kind}\n(.*?)```", text, re.S)[1] for kind in ("python", "yaml"))
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    configs = [RewardConfig(**block) for block in yaml.safe_load(config)["rewards"]]
    assert len(code.splitlines()) <= 20
    mine = next(c for c in configs if ":" in c.name)
    reward = build_reward(mine.name, **mine.args)
    probe(reward, ["a cat", "a dog"], brightness=[0.3, None])


# ---------------------------------------------------------------------------------------- the emoji world's judges


def test_density_counter(tmp_path):
    counter = DensityCounter().eval()
    assert sum(parameter.numel() for parameter in counter.parameters()) < 260_000
    images = images_like_generated(2, 64, 48)
    density = counter(images)
    assert density.shape == (2, 1, 32, 24) and (density >= 0).all()
    assert (density < 0.01).all()
    counter.half().save_pretrained(tmp_path)
    loaded = DensityCounter.from_pretrained(tmp_path)
    assert all(torch.equal(value, counter.float().state_dict()[name]) for name, value in loaded.state_dict().items())
    torch.testing.assert_close(loaded(images), counter(images))


def test_aesthetic_head(tmp_path):
    head = AestheticHead(32)
    embeddings = F.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert head(embeddings).shape == (4,)
    head.save_pretrained(tmp_path)
    assert torch.equal(AestheticHead.from_pretrained(tmp_path)(embeddings), head(embeddings))
