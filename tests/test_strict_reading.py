"""What published checkpoints have too much or too little, on small models of the same classes, their files edited.

Nothing of the Hub is at hand here. What its files look like is from transformers' converters and issues: position_ids
of CLIP and its kin (before 4.31), CLIP as a whole where a pipeline reads one half, T5 with either name of its table or
with its decoder, DPT without the residual that its first fusion layer does not use (transformers issue 28292), DINO
without a pooler (25377), Grounding DINO with copies of its shared heads.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForDepthEstimation,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    ConvNextConfig,
    DPTConfig,
    DPTForDepthEstimation,
    GroundingDinoForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    OwlViTForObjectDetection,
    SiglipModel,
    SwinConfig,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTModel,
)

from alignkit.artifacts import read_pretrained
from alignkit.conditions import build_condition
from tests.tiny_models import LAYERS, grounding_dino, owlvit, siglip
from tests.toy_conditions import save_segmenter

Tensors = dict[str, Tensor]


def edit(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, {"format": "pt"})
    return folder


def saved(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def without(pattern: str) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        kept = {key: tensor for key, tensor in tensors.items() if not re.search(pattern, key)}
        assert len(kept) < len(tensors)
        return kept

    return change


def with_position_ids(*prefixes: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {f"{p}embeddings.position_ids": torch.arange(12)[None] for p in prefixes}


def renamed(pattern: str, name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {re.sub(pattern, name, key): tensor for key, tensor in tensors.items()}


def clip_config() -> CLIPConfig:
    text = LAYERS | {"vocab_size": 60, "max_position_embeddings": 12, "projection_dim": 16}
    vision = LAYERS | {"image_size": 32, "patch_size": 8, "projection_dim": 16}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)


def assert_same(read: nn.Module, made: nn.Module) -> None:
    assert type(read) is type(made)
    own = made.state_dict()
    assert all(torch.equal(tensor, own[key]) for key, tensor in read.state_dict().items())


# More than the model's own


def test_clip_and_its_halves(tmp_path):
    clip = CLIPModel(clip_config())
    whole = edit(saved(clip, tmp_path / "whole"), with_position_ids("text_model.", "vision_model."))
    assert_same(read_pretrained(CLIPModel, whole), clip)
    for kind in (CLIPTextModel, CLIPTextModelWithProjection):
        half = read_pretrained(kind, whole)
        own = getattr(half, "text_model", half).state_dict()
        assert all(torch.equal(tensor, own[key]) for key, tensor in clip.text_model.state_dict().items())
    assert torch.equal(half.text_projection.weight, clip.text_projection.weight)


@pytest.mark.parametrize("prefix", ["", "text_model."])  # transformers has had both
def test_names_of_a_text_encoder(prefix, tmp_path):
    text = CLIPTextModel(clip_config().text_config)
    folder = edit(saved(text, tmp_path), renamed(r"^(text_model\.)?", prefix))
    assert_same(read_pretrained(CLIPTextModel, edit(folder, with_position_ids(prefix))), text)


@pytest.mark.parametrize("names", [["shared"], ["encoder.embed_tokens"], ["shared", "encoder.embed_tokens"]])
def test_names_of_t5s_table(names, tmp_path):
    t5 = T5EncoderModel(T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))

    def change(tensors: Tensors) -> Tensors:
        table = tensors.pop("shared.weight")
        return tensors | {f"{name}.weight": table for name in names}

    assert_same(read_pretrained(T5EncoderModel, edit(saved(t5, tmp_path), change)), t5)


def test_an_encoder_out_of_a_whole_t5(tmp_path):
    config = T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, tie_word_embeddings=False)
    t5 = T5ForConditionalGeneration(config)
    encoder = read_pretrained(T5EncoderModel, saved(t5, tmp_path)).encoder
    own = t5.encoder.state_dict()
    assert all(torch.equal(tensor, own[key]) for key, tensor in encoder.state_dict().items())


def test_position_ids_of_detectors_and_siglip(tmp_path):
    for write, kind, prefixes in [
        (siglip, SiglipModel, ("text_model.", "vision_model.")),
        (owlvit, OwlViTForObjectDetection, ("owlvit.text_model.", "owlvit.vision_model.")),
        (grounding_dino, GroundingDinoForObjectDetection, ("model.text_backbone.",)),
    ]:
        folder = tmp_path / kind.__name__
        made = read_pretrained(kind, write(folder))
        assert_same(read_pretrained(kind, edit(folder, with_position_ids(*prefixes))), made)


def test_copies_of_grounding_dinos_heads(tmp_path):
    made = read_pretrained(GroundingDinoForObjectDetection, grounding_dino(tmp_path))
    copies = {key: tensor for key, tensor in made.state_dict().items() if "bbox_embed" in key}
    assert len(copies) > len([key for key in load_file(tmp_path / "model.safetensors") if "bbox_embed" in key])
    for change in (
        lambda tensors: tensors | copies,
        lambda tensors: without(r"^bbox_embed")(tensors | copies),
        lambda tensors: without(r"decoder.bbox_embed")(tensors | copies),
    ):
        assert_same(read_pretrained(GroundingDinoForObjectDetection, edit(tmp_path, change)), made)
    with pytest.raises(ValueError, match="it lacks .*bbox_embed"):
        read_pretrained(GroundingDinoForObjectDetection, edit(tmp_path, without(r"(^|decoder\.)bbox_embed")))


@pytest.mark.parametrize("prefix", ["vision_model.", "vision_model.vision_model."])  # today's, and the published one's
def test_safety_checker(prefix, tmp_path):
    checker = StableDiffusionSafetyChecker(clip_config())
    folder = edit(saved(checker, tmp_path), renamed(r"^vision_model\.(vision_model\.)?", prefix))
    assert_same(read_pretrained(StableDiffusionSafetyChecker, edit(folder, with_position_ids(prefix))), checker)
    with pytest.raises(ValueError, match="it lacks .*fc1"):
        read_pretrained(StableDiffusionSafetyChecker, edit(folder, without(r"fc1.weight")))


# Less


def upernet() -> nn.Module:
    backbone = ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, out_features=[f"stage{i}" for i in (1, 2, 3, 4)])
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=16, pool_scales=[1, 2], num_labels=5, auxiliary_in_channels=8,
        auxiliary_channels=8,
    )  # fmt: skip
    return UperNetForSemanticSegmentation(config)


def dpt() -> nn.Module:
    sizes = {"image_size": 32, "patch_size": 16, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
    return DPTForDepthEstimation(
        DPTConfig(**LAYERS | {"num_hidden_layers": 4}, **sizes, backbone_out_indices=[0, 1, 2, 3])
    )


def mask2former() -> nn.Module:
    swin = SwinConfig(
        image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=2,
        out_features=[f"stage{i}" for i in (1, 2, 3, 4)],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=4,
    )  # fmt: skip
    return Mask2FormerForUniversalSegmentation(config)


@pytest.mark.parametrize(
    ("make", "kind", "output", "lacking", "needed"),
    [
        (upernet, AutoModelForSemanticSegmentation, "logits", r"^auxiliary_head\.|num_batches_tracked", "running_mean"),
        (
            dpt,
            AutoModelForDepthEstimation,
            "predicted_depth",
            r"layers\.0\.residual_layer1",
            r"layers\.1\.residual_lay",
        ),
        (mask2former, AutoModelForUniversalSegmentation, "masks_queries_logits", "empty_weight", "mask_embedder"),
    ],
)
@torch.no_grad()
def test_what_no_output_depends_on_may_be_missing(make, kind, output, lacking, needed, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    images = torch.rand(1, 3, *[64 if make is mask2former else 32] * 2)
    folder = edit(saved(model, tmp_path), without(lacking))
    torch.manual_seed(1)  # of the random numbers in their place
    read = read_pretrained(kind, folder).eval()
    assert torch.equal(read(pixel_values=images)[output], model(pixel_values=images)[output])
    with pytest.raises(ValueError, match=f"is incomplete, it lacks .*{needed}"):
        read_pretrained(kind, edit(folder, without(needed)))


def test_a_pooler_may_be_missing_where_it_is_not_used(tmp_path):
    """As DINO's is, which `evaluate personalization` reads the class token of."""
    vit = ViTModel(ViTConfig(**LAYERS, image_size=32, patch_size=16))
    folder = edit(saved(vit, tmp_path), without("pooler"))
    with pytest.raises(ValueError, match="it lacks pooler"):
        read_pretrained(AutoModel, folder)
    read = read_pretrained(AutoModel, folder, unused=[r"^pooler\."])
    own = vit.state_dict()
    assert all(torch.equal(t, own[key]) for key, t in read.state_dict().items() if not key.startswith("pooler"))
    with pytest.raises(ValueError, match="it lacks .*layernorm"):
        read_pretrained(AutoModel, edit(folder, without("^layernorm")), unused=[r"^pooler\."])


def test_conditions_refuse_a_model_without_a_head(tmp_path):
    """As a backbone that was trained on ImageNet alone has none: its random one would be a silent judge."""
    folder = Path(save_segmenter(tmp_path))
    build_condition("segmentation", model=str(edit(folder, without("num_batches_tracked"))))
    with pytest.raises(ValueError, match="it lacks decode_head"):
        build_condition("segmentation", model=str(edit(folder, without("^decode_head"))))


def test_a_clip_lacks_nothing_it_scores_with(tmp_path):
    folder = edit(saved(CLIPModel(clip_config()), tmp_path), without("logit_scale"))
    with pytest.raises(ValueError, match="it lacks logit_scale"):
        read_pretrained(CLIPModel, folder)
