"""ImageReward: what people prefer, by BLIP (Xu et al. 2023, arXiv 2304.05977)."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from alignkit.artifacts import load_tensors
from alignkit.rewards.aesthetic import collapse
from alignkit.rewards.clip import CLIP_STATISTICS, fit
from alignkit.rewards.reward import Reward, frozen

# The authors standardise the score by these, their data's mean and standard deviation.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_LENGTH = 35  # tokens of the prompt that are read
HEAD_DIM = 64  # of BLIP's attention in all its sizes

# The names in the checkpoint of the vision tower (timm's) and in transformers.
VISION = {
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^norm\.": "post_layernorm.",
    r"^blocks\.": "encoder.layers.",
    r"\.attn\.proj\.": ".self_attn.projection.",
    r"\.attn\.": ".self_attn.",
    r"\.norm([12])\.": r".layer_norm\1.",
}


class ImageReward(Reward):
    """Preference in standard deviations of the authors' data, about -2 to 2; ReFL trains by max(2 - r, 0).

    Differentiable all the way, where the official package detaches: it loads its weights into transformers' BLIP.

    Args:
        weights: `ImageReward.pt` as `.safetensors` (`alignkit convert checkpoint` makes it).
        tokenizer: a folder or Hub name of BERT's.
    """

    def __init__(self, weights: str, tokenizer: str = "google-bert/bert-base-uncased"):
        super().__init__()
        tensors = load_tensors(weights)
        parts = {
            prefix: {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            for prefix in ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
        }
        missing = [prefix for prefix, part in parts.items() if not part]
        if missing:
            raise ValueError(f"{weights} is no ImageReward checkpoint: it has no {missing[0]}*.")
        vision, text, mlp = parts.values()
        for pattern, name in VISION.items():
            vision = {re.sub(pattern, name, key): value for key, value in vision.items()}
        self.vision = _load(BlipVisionModel(_vision_config(vision)), vision, weights)
        self.text = _load(BlipTextModel(_text_config(text), add_pooling_layer=False), text, weights)
        self.head = frozen(collapse(mlp))
        self.resolution = self.vision.config.image_size
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        for name, values in zip(("mean", "std"), CLIP_STATISTICS, strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    def score(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        pixels = (fit(images, self.resolution) - self.mean) / self.std
        seen = self.vision(pixel_values=pixels.to(self.vision.dtype)).last_hidden_state
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        ).to(images.device)
        read = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
            is_decoder=False,
        ).last_hidden_state
        return (self.head(read[:, 0])[:, 0] - MEAN) / STD


def _vision_config(tensors: dict[str, Tensor]) -> BlipVisionConfig:
    """The sizes that the tensors have: BLIP-large's, for the published weights."""
    width, _, patch_size, _ = tensors["embeddings.patch_embedding.weight"].shape
    patches = tensors["embeddings.position_embedding"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=tensors["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_layers(tensors),
        num_attention_heads=max(1, width // HEAD_DIM),
        image_size=round(patches**0.5) * patch_size,
        patch_size=patch_size,
        layer_norm_eps=1e-6,  # BLIP's own; transformers' default is another
    )


def _text_config(tensors: dict[str, Tensor]) -> BlipTextConfig:
    vocab_size, width = tensors["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        encoder_hidden_size=tensors["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=tensors["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_layers(tensors),
        num_attention_heads=max(1, width // HEAD_DIM),
        max_position_embeddings=tensors["embeddings.position_embeddings.weight"].shape[0],
    )


def _layers(tensors: dict[str, Tensor]) -> int:
    return 1 + max(int(match[1]) for key in tensors if (match := re.search(r"\.layers?\.(\d+)\.", key)))


def _load(model: nn.Module, tensors: dict[str, Tensor], path: str) -> nn.Module:
    names = set(model.state_dict())
    tensors = {key: value for key, value in tensors.items() if not key.endswith("position_ids")}  # a constant
    if tensors.keys() != names:
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: missing {sorted(names - tensors.keys())[:3]}, unknown "
            f"{sorted(tensors.keys() - names)[:3]}."
        )
    for key, expected in model.state_dict().items():
        if tensors[key].shape != expected.shape:
            raise ValueError(
                f"{path} does not fit {type(model).__name__}: of {key} expected {list(expected.shape)}, got "
                f"{list(tensors[key].shape)}."
            )
    model.load_state_dict(tensors)
    return frozen(model)
