"""CLIP as a differentiable image encoder and a text encoder, for the rewards that stand on it."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel
from transformers.image_processing_base import ImageProcessingMixin

from alignkit.rewards.reward import frozen

# Weights kept in half precision would round the gradient of every pixel; a pickle may run code.
LOADING = {"dtype": torch.float32, "use_safetensors": True}

# In configs older than 2023 the end-of-text id is a wrong 2, which transformers reads as the highest id of the prompt.
LEGACY_EOS_TOKEN_ID = 2


class ClipEncoder(nn.Module):
    """A frozen `transformers.CLIPModel` with its tokenizer (Radford et al. 2021, arXiv 2103.00020).

    Image mean and standard deviation come from the folder's `preprocessor_config.json`, or are CLIP's own.

    Args:
        path: a folder or Hub name of a CLIPModel with its tokenizer (PickScore is one, too).
    """

    def __init__(self, path: str):
        super().__init__()
        self.clip = frozen(CLIPModel.from_pretrained(path, **LOADING))
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        text_config, vision_config = self.clip.config.text_config, self.clip.config.vision_config
        self.resolution = vision_config.image_size
        self.embedding_dim = self.clip.config.projection_dim
        # A tokenizer without a limit of its own says 1e30.
        self.max_length = min(self.tokenizer.model_max_length, text_config.max_position_embeddings)
        # transformers pools at the first end-of-text id and, finding none, silently at the first token of every prompt.
        if text_config.eos_token_id not in (LEGACY_EOS_TOKEN_ID, self.tokenizer.eos_token_id):
            raise ValueError(
                f"{path}: expected the same end-of-text id in model and tokenizer, got {text_config.eos_token_id} in "
                f"text_config.eos_token_id and {self.tokenizer.eos_token_id} in the tokenizer. Correct config.json."
            )
        mean, std = image_statistics(path, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def embed_images(self, images: Tensor) -> Tensor:
        """Images [B,3,H,W] in [0,1] -> L2-normalised embeddings [B,D], with gradient."""
        pixels = resize_and_crop(images, self.resolution)
        pixels = ((pixels - self.mean) / self.std).to(self.clip.dtype)
        return F.normalize(self.clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> L2-normalised embeddings [B,D]; warns of prompts that are cut to the model's length."""
        for prompt, ids in zip(prompts, self.tokenizer(list(prompts), verbose=False).input_ids, strict=True):
            if len(ids) > self.max_length:
                warnings.warn(
                    f"the reward reads {self.max_length} of {len(ids)} tokens of the prompt {prompt!r}", stacklevel=2
                )
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.mean.device)
        features = self.clip.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return F.normalize(features.pooler_output, dim=-1)


def resize_and_crop(images: Tensor, size: int) -> Tensor:
    """Images [B,3,H,W] -> [B,3,size,size]: shortest side to `size` by antialiased bicubic, centre crop.

    What CLIPImageProcessor does through PIL, but with a gradient.
    """
    height, width = images.shape[-2:]
    shortest = min(height, width)
    height, width = size * height // shortest, size * width // shortest
    if (height, width) != images.shape[-2:]:
        images = F.interpolate(images, size=(height, width), mode="bicubic", antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    return images[..., top : top + size, left : left + size]


def image_statistics(path: str, default_mean: Sequence[float], default_std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [3,1,1] that a model's `preprocessor_config.json` states, or the defaults."""
    try:
        config, _ = ImageProcessingMixin.get_image_processor_dict(path)
    except OSError:
        config = {}
    mean, std = config.get("image_mean", default_mean), config.get("image_std", default_std)
    return torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
