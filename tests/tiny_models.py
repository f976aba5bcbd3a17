"""Tiny random models of the real classes that the rewards load, as folders and files."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertTokenizer,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    Owlv2Config,
    Owlv2ForObjectDetection,
    OwlViTConfig,
    OwlViTForObjectDetection,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
)
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def letters(**options) -> CLIPTokenizer:
    """Letters as tokens, no length limit of its own (model_max_length is 1e30)."""
    tokens = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[], **options)


def bert_tokenizer() -> BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def siglip(folder: Path) -> str:
    tokenizer = letters()
    text = LAYERS | {"vocab_size": len(tokenizer), "max_position_embeddings": 12}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=LAYERS | {"image_size": 32, "patch_size": 8}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def siglip2(folder: Path) -> str:
    """NaFlex: at most 12 patches, of 8 x 8 pixels."""
    tokenizer = letters()
    text = LAYERS | {"vocab_size": len(tokenizer), "max_position_embeddings": 12}
    Siglip2Model(
        Siglip2Config(text_config=text, vision_config=LAYERS | {"patch_size": 8, "num_patches": 16})
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"patch_size": 8, "max_num_patches": 12}))
    return str(folder)


def open_clip(folder: Path) -> tuple[str, str]:
    """ "local-dir:..." of a folder, and the weights in it; the architecture is called tiny-test, too."""
    import open_clip as library

    folder.mkdir()
    (folder / "tiny-test.json").write_text(json.dumps(OPEN_CLIP))
    library.add_model_config(folder / "tiny-test.json")
    model = library.create_model("tiny-test", load_weights=False)
    preprocessing = {"size": 32, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "resize_mode": "squash"}
    config = {"model_cfg": OPEN_CLIP, "preprocess_cfg": preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = folder / "open_clip_model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, weights)
    return f"local-dir:{folder}", str(weights)


def image_reward(folder: Path) -> tuple[str, str]:
    """A checkpoint with the names of the published one, and a tokenizer."""
    folder.mkdir()
    tokenizer = bert_tokenizer()
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 1}
    vision = BlipVisionModel(BlipVisionConfig(**sizes, image_size=32, patch_size=8, initializer_range=0.02))
    text = BlipTextModel(
        BlipTextConfig(**sizes, vocab_size=len(tokenizer), encoder_hidden_size=64, max_position_embeddings=40),
        add_pooling_layer=False,
    )
    names = {
        "embeddings.class_embedding": "cls_token", "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj", "post_layernorm": "norm", "encoder.layers": "blocks",
        "self_attn.projection": "attn.proj", "self_attn": "attn", "layer_norm1": "norm1", "layer_norm2": "norm2",
    }  # fmt: skip
    tensors = {}
    for key, tensor in vision.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        tensors[f"blip.visual_encoder.{key}"] = tensor
    tensors |= {f"blip.text_encoder.{key}": tensor for key, tensor in text.state_dict().items()}
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    tensors["blip.text_proj.weight"] = torch.zeros(4, 64)  # not used by the score
    for number, (width, out) in enumerate([(64, 8), (8, 1)]):
        tensors[f"mlp.layers.{2 * number}.weight"] = torch.randn(out, width) / 8
        tensors[f"mlp.layers.{2 * number}.bias"] = torch.randn(out) / 8
    assert not any(re.search(r"layer_norm1|self_attn", key) for key in tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "ImageReward.safetensors")
    return str(folder / "ImageReward.safetensors"), str(folder)


def owlvit(folder: Path, config_class=OwlViTConfig, model_class=OwlViTForObjectDetection) -> str:
    tokenizer = letters()
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = LAYERS | special | {"vocab_size": len(tokenizer), "max_position_embeddings": 32}
    config = config_class(
        text_config=text, vision_config=LAYERS | {"image_size": 32, "patch_size": 8}, projection_dim=32
    )
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def grounding_dino(folder: Path) -> str:
    tokenizer = bert_tokenizer()
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig(**LAYERS, vocab_size=len(tokenizer), max_position_embeddings=64),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=12, max_text_len=32,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 96, "longest_edge": 128}
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": size, "resample": 2}))
    return str(folder)


def all_models(folder: Path) -> dict[str, dict]:
    """Writes all of them; the arguments of each reward."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        local, weights = open_clip(folder / "open_clip")
        checkpoint, bert = image_reward(folder / "image_reward")
        owl, dino = owlvit(folder / "owlvit"), grounding_dino(folder / "grounding_dino")
        owlv2 = owlvit(folder / "owlv2", Owlv2Config, Owlv2ForObjectDetection)
        return {
            "siglip": {"model": siglip(folder / "siglip")},
            "siglip2": {"model": siglip2(folder / "siglip2")},
            "owlv2": {"model": owlv2, "object": "cat"},
            "open_clip": {"model": local},
            "hpsv2": {"weights": weights, "architecture": "tiny-test"},
            "image_reward": {"weights": checkpoint, "tokenizer": bert},
            "object_presence": {"model": owl, "object": "cat"},
            "object_count": {"model": owl, "object": "cat", "count": 2},
            "object_absence": {"model": dino, "object": "red cat"},
        }
