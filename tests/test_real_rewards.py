"""Rewards on models that people train with: each on a tiny model of its real class, against the official processing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from alignkit.artifacts import convert
from alignkit.rewards import build_reward
from alignkit.rewards.clip import fit
from alignkit.rewards.detection import FAR, overlap
from alignkit.rewards.image_reward import MEAN, STD
from tests.test_rewards import PROMPTS, images_like_generated
from tests.tiny_models import all_models, bert_tokenizer


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> dict[str, dict]:
    return all_models(tmp_path_factory.mktemp("real"))


def photo(height: int = 90, width: int = 120) -> torch.Tensor:
    """[1,3,H,W] of 8-bit values, away from 0 and 255, where PIL's interpolation cuts off what it overshoots."""
    return ((0.1 + 0.8 * images_like_generated(1, height, width)) * 255).round() / 255


def pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy())


def similar(ours: torch.Tensor, official: torch.Tensor) -> bool:
    """PIL rounds to 8 bits after each pass, which standard deviations of 1/4 enlarge fourfold."""
    return ours.shape == official.shape and (ours - official).abs().mean() < 1e-2


# Encoders


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(90, 120), (100, 37)])
def test_fit_equals_open_clips_transform(mode, size):
    import open_clip

    transform = open_clip.image_transform(32, is_train=False, mean=[0, 0, 0], std=[1, 1, 1], resize_mode=mode)
    image = photo(*size)
    assert similar(fit(image, 32, mode), transform(pil(image))[None])


def test_siglip_is_processed_as_the_official_one_does(arguments):
    encoder = build_reward("alignment", **arguments["siglip"]).encoder
    image = photo()
    official = SiglipImageProcessorPil(size={"height": 32, "width": 32})(pil(image), return_tensors="pt").pixel_values
    assert similar((fit(image, 32, encoder.resize) - encoder.mean) / encoder.std, official)
    tokens = encoder.tokenizer(PROMPTS, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    images = image.expand(3, -1, -1, -1)
    with torch.no_grad():
        expected = encoder.clip(input_ids=tokens.input_ids, pixel_values=official.expand(3, -1, -1, -1))
        assert (torch.cosine_similarity(encoder.embed_images(images), expected.image_embeds) > 1 - 1e-4).all()
    torch.testing.assert_close(encoder.embed_prompts(PROMPTS), expected.text_embeds)
    scores = (encoder.embed_images(images) * expected.text_embeds).sum(-1)
    torch.testing.assert_close(build_reward("alignment", **arguments["siglip"])(images, PROMPTS), scores)


@pytest.mark.parametrize("size", [(90, 120), (64, 64), (200, 20)])
def test_siglip2_keeps_the_aspect_and_is_processed_as_the_official_one_does(arguments, size):
    reward = build_reward("alignment", **arguments["siglip2"])
    image = photo(*size).requires_grad_()
    official = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=12)(pil(image), return_tensors="pt")
    text = reward.encoder.tokenizer(PROMPTS[:1], padding="max_length", max_length=12, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = reward.encoder.clip(input_ids=text, **official)
    seen = reward.encoder.embed_images(image)
    assert torch.cosine_similarity(seen, expected.image_embeds) > 1 - 1e-4
    scores = reward(image, [PROMPTS[0].upper()])  # read in lower case
    torch.testing.assert_close(scores, (seen * expected.text_embeds).sum(-1))
    (gradient,) = torch.autograd.grad(scores.sum(), image)
    assert gradient.isfinite().all() and gradient.any()
    with torch.no_grad():  # of a batch, each image by itself
        flipped = image.flip(-1)
        both = reward(torch.cat([image, flipped]), ["a cat", "a dog"])
        torch.testing.assert_close(both, torch.cat([scores, reward(flipped, ["a dog"])]), rtol=1e-4, atol=1e-5)


def test_open_clip_scores_as_open_clip_does(arguments):
    import open_clip

    name = arguments["open_clip"]["model"]
    model, transform = open_clip.create_model_from_pretrained(name)
    image = photo()
    with torch.no_grad():
        seen = F.normalize(model.encode_image(transform(pil(image))[None]), dim=-1)
        read = F.normalize(model.encode_text(open_clip.get_tokenizer(name)(PROMPTS)), dim=-1)
    reward = build_reward("alignment", model=name)
    torch.testing.assert_close(reward(image.expand(3, -1, -1, -1), PROMPTS), (seen @ read.T)[0], rtol=1e-2, atol=1e-3)
    with pytest.warns(UserWarning, match="reads 16 of 22 tokens"):
        reward.encoder.embed_prompts([" ".join(["cat"] * 20)])


def test_hpsv2_pads_and_reads_its_weights_strictly(arguments, tmp_path):
    reward = build_reward("hpsv2", **arguments["hpsv2"])
    assert reward.encoder.resize == "longest" and reward.resolution == 32
    image = photo()
    pixels = (fit(image, 32, "longest") - reward.encoder.mean) / reward.encoder.std
    expected = F.normalize(reward.encoder.clip.encode_image(pixels), dim=-1) @ reward.encoder.embed_prompts(["a cat"]).T
    torch.testing.assert_close(reward(image, ["a cat"]), expected[0])

    tensors = load_file(arguments["hpsv2"]["weights"])
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "HPS.pt")
    convert(tmp_path / "HPS.pt", tmp_path / "HPS.safetensors")
    again = build_reward("hpsv2", weights=str(tmp_path / "HPS.safetensors"), architecture="tiny-test")
    assert torch.equal(again(image, ["a cat"]), reward(image, ["a cat"]))
    with pytest.raises(ValueError, match="is a pickle by its name"):
        build_reward("hpsv2", weights=str(tmp_path / "HPS.pt"), architecture="tiny-test")
    with pytest.raises(ValueError, match=r"does not fit open_clip:tiny-test: of .* expected none, got "):
        build_reward("hpsv2", weights=arguments["image_reward"]["weights"], architecture="tiny-test")
    with pytest.raises(ValueError, match="expected weights"):
        build_reward("alignment", model="open_clip:tiny-test")


def test_the_converter_executes_nothing(tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": {"weight": torch.ones(1)}, "payload": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="asks to run code, which is refused"):
        convert(tmp_path / "evil.pt", tmp_path / "out.safetensors")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out.safetensors").exists()
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        convert(tmp_path / "list.pt", tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="does not exist"):
        convert(tmp_path / "none.pt", tmp_path / "out.safetensors")


# ImageReward


def test_image_reward_by_its_parts(arguments):
    reward = build_reward("image_reward", **arguments["image_reward"])
    tensors = load_file(arguments["image_reward"]["weights"])
    qkv = reward.vision.encoder.layers[1].self_attn.qkv.weight
    assert torch.equal(qkv, tensors["blip.visual_encoder.blocks.1.attn.qkv.weight"])
    assert torch.equal(reward.vision.post_layernorm.bias, tensors["blip.visual_encoder.norm.bias"])
    images = images_like_generated(1)
    tokens = bert_tokenizer()("a cat", padding="max_length", max_length=35, return_tensors="pt")
    seen = reward.vision(pixel_values=(fit(images, 32) - reward.mean) / reward.std).last_hidden_state
    read = reward.text(
        tokens.input_ids, tokens.attention_mask, encoder_hidden_states=seen, is_decoder=False
    ).last_hidden_state[:, 0]
    for number in (0, 2):
        read = read @ tensors[f"mlp.layers.{number}.weight"].T + tensors[f"mlp.layers.{number}.bias"]
    torch.testing.assert_close(reward(images, ["a cat"]), (read[:, 0] - MEAN) / STD, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="is no ImageReward checkpoint"):
        build_reward("image_reward", weights=arguments["hpsv2"]["weights"])


# Detectors


@pytest.mark.parametrize("size", [(90, 120), (120, 51), (60, 60)])
def test_detectors_process_as_the_official_ones_do(arguments, size):
    image = photo(*size)
    owl = build_reward("object_presence", **arguments["object_presence"])
    official = OwlViTImageProcessorPil(size={"height": 32, "width": 32})(pil(image), return_tensors="pt").pixel_values
    assert similar((fit(image, 32, "squash", owl.interpolation) - owl.mean) / owl.std, official)
    dino = build_reward("object_absence", **arguments["object_absence"])
    processor = GroundingDinoImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 128})
    official = processor(pil(image), return_tensors="pt").pixel_values
    assert similar((dino.fit_within(image) - dino.mean) / dino.std, official)


@pytest.mark.parametrize("size", [(90, 120), (120, 51), (24, 30)])
def test_owlv2_pads_and_scores_as_the_official_one_does(arguments, size):
    """Smaller and larger than its 32 pixels; the logit of the likeliest box is what the model says itself."""
    reward = build_reward("object_presence", **arguments["owlv2"])
    image = photo(*size).requires_grad_()
    official = Owlv2ImageProcessorPil(size={"height": 32, "width": 32})(pil(image), return_tensors="pt").pixel_values
    assert similar((reward.pad_and_resize(image) - reward.mean) / reward.std, official.float())
    scores = reward(image, ["x"])
    tokens = reward.tokenize(["a photo of a cat"], "max_length")
    with torch.no_grad():
        logits = reward.detector(pixel_values=official.float(), **tokens).logits
    torch.testing.assert_close(scores, logits.amax((1, 2)) - reward.threshold_logit, rtol=1e-2, atol=2e-2)
    (gradient,) = torch.autograd.grad(scores.sum(), image)
    assert gradient.isfinite().all() and gradient.any()


def test_owlvit_scores_as_the_official_path_does(arguments):
    """Of an image of its own size: a random model's scores tell PIL's rounding by more than real ones."""
    reward, image = build_reward("object_presence", **arguments["object_presence"]), photo(32, 32)
    pixels = OwlViTImageProcessorPil(size={"height": 32, "width": 32})(pil(image), return_tensors="pt").pixel_values
    tokens = reward.tokenizer(["a photo of a cat"], padding="max_length", max_length=32, return_tensors="pt")
    with torch.no_grad():
        logits = reward.detector(pixel_values=pixels, **tokens).logits
        scores = reward(image, ["x"], object=["cat"])
    torch.testing.assert_close(scores, logits.amax((1, 2)) - reward.threshold_logit, rtol=1e-2, atol=2e-2)


def test_grounding_dino_scores_as_the_official_path_does(arguments):
    """Of the words between the mark that begins the phrase and its full stop."""
    reward, image = build_reward("object_presence", **arguments["object_absence"]), photo()
    processor = GroundingDinoImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 128})
    official = processor(pil(image), return_tensors="pt")
    tokens = reward.tokenizer(["cat."], return_tensors="pt")
    assert tokens["input_ids"].shape[1] > 3
    with torch.no_grad():
        logits = reward.detector(**official, **tokens).logits[..., 1 : tokens["input_ids"].shape[1] - 2]
        scores = reward(image, ["x"], object=["cat"])
    torch.testing.assert_close(scores, logits.amax((1, 2)) - reward.threshold_logit, rtol=1e-2, atol=2e-2)


def test_a_detector_that_finds_nothing_has_a_gradient(arguments):
    reward = build_reward("object_presence", **arguments["object_presence"])
    reward.threshold_logit = 1e3  # which no box of a random model is above
    images = images_like_generated(2).requires_grad_()
    scores = reward(images, ["x", "y"], object=["dog", "bird"])
    assert (scores < 0).all()
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.isfinite().all() and (gradient.abs().amax((1, 2, 3)) > 0).all()


def test_of_several_objects_the_one_that_is_furthest_from_it(arguments):
    images = images_like_generated(2)
    for name in ("object_presence", "object_absence"):
        reward = build_reward(name, **arguments["object_presence"])
        each = [reward(images, ["x", "y"], object=[noun] * 2) for noun in ("dog", "bird")]
        both = reward(images, ["x", "y"], object=[["dog", "bird"], "bird"])
        torch.testing.assert_close(both, torch.stack([torch.minimum(*each)[0], each[1][1]]))
    count = build_reward("object_count", **arguments["object_count"])
    with pytest.raises(ValueError, match="one object to count"):
        count(images[:1], ["x"], object=[["dog", "bird"]], count=[1])


def test_rewards_agree_with_thresholded_detections_by_hand(arguments, monkeypatch):
    """Three boxes above the threshold, of which two are the same object."""
    reward = build_reward("object_count", **arguments["object_count"], threshold=0.5)
    logits = torch.tensor([[2.0, 1.5, 1.0, -3.0]])
    boxes = torch.tensor([[[0.2, 0.2, 0.2, 0.2], [0.21, 0.2, 0.2, 0.2], [0.8, 0.8, 0.2, 0.2], [0.5, 0.5, 1.0, 1.0]]])
    monkeypatch.setattr(type(reward), "detect", lambda self, images, names: (logits, boxes))
    assert reward.log_odds(None, [""]).tolist() == [[2.0, 1.0, -3.0, 1.5 - FAR]]
    image = images_like_generated(1)
    scores = {n: reward(image, [""], count=[n]).item() for n in range(4)}
    assert scores == {0: -2.0, 1: -1.0, 2: 1.0, 3: -3.0}  # positive for the right number alone
    with pytest.raises(ValueError, match="counts of 0 to 3"):
        reward(image, [""], count=[4])


@pytest.mark.parametrize("name", ["object_presence", "object_count", "object_absence"])
def test_a_step_along_the_gradient_changes_the_score_by_its_norm(arguments, name):
    """Detectors return float32 logits, too coarse for differences along any other direction."""
    reward = build_reward(name, **arguments[name])
    images = (0.1 + 0.8 * images_like_generated()).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    step = 0.02 * gradient / gradient.square().sum()
    with torch.no_grad():
        ahead, behind = (reward(images + sign * step, PROMPTS).sum() for sign in (1, -1))
    assert (ahead - behind).item() / 2 == pytest.approx(0.02, rel=0.05)


def test_overlap_by_hand():
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.6, 0.5, 0.2, 0.4], [0.9, 0.9, 0.1, 0.1]])
    expected = np.array([[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1]])
    np.testing.assert_allclose(overlap(boxes), expected, atol=1e-6)


def test_what_is_no_detector_is_refused(arguments):
    with pytest.raises(ValueError, match="expected an OWL-ViT, an OWLv2 or a Grounding DINO, got 'siglip'"):
        build_reward("object_presence", model=arguments["siglip"]["model"], object="cat")
    with pytest.raises(ValueError, match="between 0 and 1"):
        build_reward("object_presence", **arguments["object_presence"], threshold=1.0)
    reward = build_reward("object_presence", model=arguments["object_presence"]["model"])
    with pytest.raises(ValueError, match="add a column 'object'"):
        reward(images_like_generated(1), ["a cat"])
