"""CLIP and its kin as differentiable image encoders and text encoders, for the rewards that stand on them."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPModel,
    Siglip2Model,
    SiglipModel,
    VisionTextDualEncoderModel,
)
from transformers.image_processing_base import ImageProcessingMixin

from alignkit import plan
from alignkit.artifacts import load_tensors, read_pretrained, refuse_pickles
from alignkit.rewards.reward import frozen

# In configs older than 2023 the end-of-text id is a wrong 2, which transformers reads as the highest id of the prompt.
LEGACY_EOS_TOKEN_ID = 2

CLIP_STATISTICS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIGLIP_STATISTICS = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
OPEN_CLIP = ("open_clip:", "local-dir:", "hf-hub:")  # the latter two are open_clip's own


class Encoder(nn.Module):
    """A frozen image and text encoder into one space: what `ClipEncoder` and `OpenClipEncoder` share.

    They load `clip`, say how images enter it (`resolution`, `resize`, `interpolation`, `mean`, `std`) and how many
    tokens and numbers there are (`max_length`, `embedding_dim`), and compute `image_features` [B,3,S,S] -> [B,D],
    `text_features` and `token_counts` of prompts.
    """

    def _set_statistics(self, mean: Tensor, std: Tensor) -> None:
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    @property
    def logit_scale(self) -> Tensor:
        """The factor of cosines in the logits that the model was trained with."""
        return self.clip.logit_scale.exp()

    def embed_images(self, images: Tensor) -> Tensor:
        """Images [B,3,H,W] in [0,1] -> L2-normalised embeddings [B,D], with gradient."""
        return F.normalize(self.image_features((self.fit(images) - self.mean) / self.std), dim=-1)

    def fit(self, images: Tensor) -> Tensor:
        """Images [B,3,H,W] at the size that the model sees."""
        return fit(images, self.resolution, self.resize, self.interpolation)

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> L2-normalised embeddings [B,D]; warns of prompts that are cut to the model's length."""
        for prompt, length in zip(prompts, self.token_counts(list(prompts)), strict=True):
            if length > self.max_length:
                warnings.warn(
                    f"the reward reads {self.max_length} of {length} tokens of the prompt {prompt!r}", stacklevel=2
                )
        return F.normalize(self.text_features(list(prompts)), dim=-1)


class ClipEncoder(Encoder):
    """A frozen CLIPModel, SiglipModel, Siglip2Model or VisionTextDualEncoderModel of `transformers` with its tokenizer.

    Radford et al. 2021, arXiv 2103.00020. SigLIP 2 (Tschannen et al. 2025, arXiv 2502.14786) is a SiglipModel where it
    has one resolution; a Siglip2Model (NaFlex) keeps the image's aspect and sees at most so many patches.

    How images are resized and normalised comes from the folder's `preprocessor_config.json`, or is the model's usual.

    Args:
        path: a folder or Hub name of the model with its tokenizer (PickScore is a CLIPModel, too).
    """

    def __init__(self, path: str):
        super().__init__()
        known = {}
        if plan.predicting():  # which needs the shapes alone
            from alignkit.random_init import JUDGES as known
            from alignkit.random_init import toy_clip
        config = AutoConfig.from_pretrained(known.get(path, path))
        kinds = {
            "clip": CLIPModel,
            "siglip": SiglipModel,
            "siglip2": Siglip2Model,
            "vision-text-dual-encoder": VisionTextDualEncoderModel,  # any vision model beside a text tower
        }
        if config.model_type not in kinds:
            raise ValueError(f"{path}: expected one of {', '.join(kinds)} by model_type, got {config.model_type!r}.")
        self.is_naflex = config.model_type == "siglip2"
        self.is_siglip = self.is_naflex or config.model_type == "siglip"
        if path in known:
            with torch.device("meta"):
                self.clip = frozen(CLIPModel(config))
            path, self.tokenizer = known[path], toy_clip(config.text_config.max_position_embeddings)
        else:
            self.clip = frozen(read_pretrained(kinds[config.model_type], path, dtype=torch.float32))
            self.tokenizer = AutoTokenizer.from_pretrained(path)
        text_config, vision_config = self.clip.config.text_config, self.clip.config.vision_config
        self.resolution = None if self.is_naflex else vision_config.image_size
        self.embedding_dim = vision_config.hidden_size if self.is_siglip else self.clip.config.projection_dim
        # A tokenizer without a limit of its own says 1e30.
        self.max_length = min(self.tokenizer.model_max_length, text_config.max_position_embeddings)
        # transformers pools at the first end-of-text id and, finding none, silently at the first token of every prompt.
        expected_eos = (LEGACY_EOS_TOKEN_ID, self.tokenizer.eos_token_id)
        if not self.is_siglip and text_config.eos_token_id not in expected_eos:
            raise ValueError(
                f"{path}: expected the same end-of-text id in model and tokenizer, got {text_config.eos_token_id} in "
                f"text_config.eos_token_id and {self.tokenizer.eos_token_id} in the tokenizer. Correct config.json."
            )
        processor = processor_config(path)
        self.max_num_patches = processor.get("max_num_patches", 256)
        size = processor.get("size", {"height": self.resolution} if self.is_siglip else {})
        self.resize = "squash" if isinstance(size, dict) and "height" in size else "shortest"
        self.interpolation = interpolation_of({"resample": 2} | processor if self.is_naflex else processor)
        self._set_statistics(*image_statistics(path, *(SIGLIP_STATISTICS if self.is_siglip else CLIP_STATISTICS)))

    def fit(self, images: Tensor) -> Tensor:
        if not self.is_naflex:
            return super().fit(images)
        from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

        size = get_image_size_for_max_num_patches(*images.shape[-2:], self.patch_size, self.max_num_patches)
        return F.interpolate(images, size=size, mode=self.interpolation, antialias=True)

    def image_features(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.clip.dtype)
        if not self.is_naflex:
            return self.clip.get_image_features(pixel_values=pixels).pooler_output
        side = self.patch_size
        patches = pixels.unfold(2, side, side).unfold(3, side, side)  # [B,3,rows,columns,side,side]
        rows_and_columns = torch.tensor([patches.shape[2:4]] * len(pixels), device=pixels.device)
        patches = patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)  # each patch: rows, columns, colours
        seen = torch.ones(patches.shape[:2], dtype=torch.int32, device=pixels.device)
        return self.clip.get_image_features(patches, seen, rows_and_columns).pooler_output

    @property
    def patch_size(self) -> int:
        return self.clip.config.vision_config.patch_size

    def token_counts(self, prompts: list[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(prompts, verbose=False).input_ids]

    def text_features(self, prompts: list[str]) -> Tensor:
        if self.is_siglip:  # which has learnt from texts in lower case; not every tokenizer of SigLIP 2 sees to it
            prompts = [prompt.lower() for prompt in prompts]
        # SigLIP has learnt from padded texts, and reads the padding
        padding = "max_length" if self.is_siglip else True
        tokens = self.tokenizer(
            prompts, padding=padding, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.mean.device)
        mask = None if self.is_siglip else tokens.attention_mask
        return self.clip.get_text_features(input_ids=tokens.input_ids, attention_mask=mask).pooler_output


class OpenClipEncoder(Encoder):
    """Any model of `open_clip` with its tokenizer.

    Args:
        model: "open_clip:ARCHITECTURE", "local-dir:FOLDER" or "hf-hub:OWNER/NAME".
        weights: with an architecture, a `.safetensors` file of its weights.
    """

    def __init__(self, model: str, weights: str | None = None):
        super().__init__()
        try:
            import open_clip
            from open_clip.pretrained import download_pretrained_from_hf
        except ImportError as error:
            raise ValueError(f"{model} needs the package open_clip_torch: pip install alignkit[rewards].") from error

        name = model.removeprefix("open_clip:")
        if (name == model) == (weights is not None):
            raise ValueError(
                f"expected weights (a .safetensors file) with open_clip:ARCHITECTURE and with nothing else, got the "
                f"model {model!r} and the weights {weights!r}."
            )
        where, _, place = name.partition(":")
        if where == "local-dir":
            refuse_pickles(place)
        elif where == "hf-hub" and not str(file := download_pretrained_from_hf(place)).endswith(".safetensors"):
            raise ValueError(
                f"{model} has its weights in {Path(file).name} alone, and reading a pickle can run anything. Rewrite "
                f"it (alignkit convert checkpoint --source {file} --target open_clip_model.safetensors), put "
                "open_clip_config.json beside it, and name the folder as local-dir:FOLDER."
            )
        state_dict = load_tensors(weights) if weights else None
        # None of the parts' own pretrained weights: they would be downloaded, to be overwritten.
        self.clip = open_clip.create_model(
            name, load_weights=weights is None, pretrained_text=False, require_pretrained=weights is None
        )
        if state_dict is not None:
            _load_strictly(self.clip, state_dict, weights, model)
        self.clip = frozen(self.clip.float())
        self.tokenizer = open_clip.get_tokenizer(name)
        self.max_length = self.clip.context_length
        preprocessing = open_clip.get_model_preprocess_cfg(self.clip)
        size = preprocessing["size"]
        self.resolution = size if isinstance(size, int) else size[-1]
        if size not in (self.resolution, (self.resolution,) * 2, [self.resolution] * 2):
            raise ValueError(f"{model}: expected a model of square images, got one of {size}.")
        self.resize = preprocessing.get("resize_mode", "shortest")
        self.interpolation = preprocessing.get("interpolation", "bicubic")
        mean, std = preprocessing.get("mean", CLIP_STATISTICS[0]), preprocessing.get("std", CLIP_STATISTICS[1])
        self._set_statistics(torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1))
        with torch.no_grad():
            self.embedding_dim = self.image_features(torch.zeros(1, 3, self.resolution, self.resolution)).shape[-1]

    def image_features(self, pixels: Tensor) -> Tensor:
        return self.clip.encode_image(pixels.to(self.clip.logit_scale.dtype))

    def token_counts(self, prompts: list[str]) -> list[int]:
        if not hasattr(self.tokenizer, "encode"):  # one of transformers'
            return [len(ids) for ids in self.tokenizer.tokenizer(prompts).input_ids]
        return [len(self.tokenizer.encode(prompt)) + 2 for prompt in prompts]  # begin and end

    def text_features(self, prompts: list[str]) -> Tensor:
        return self.clip.encode_text(self.tokenizer(prompts).to(self.mean.device))


def load_encoder(model: str, weights: str | None = None) -> Encoder:
    """The encoder by its name: one of open_clip's where it begins with open_clip:, local-dir: or hf-hub:."""
    if model.startswith(OPEN_CLIP):
        return OpenClipEncoder(model, weights)
    if weights:
        raise ValueError(f"weights go with open_clip:ARCHITECTURE; {model} has its own.")
    return ClipEncoder(model)


def _load_strictly(model: nn.Module, state_dict: dict[str, Tensor], path: str, name: str) -> None:
    state_dict = {key.removeprefix("module."): tensor for key, tensor in state_dict.items()}
    expected = model.state_dict()
    wrong = sorted(state_dict.keys() ^ expected.keys())
    wrong += [key for key in expected if key in state_dict and state_dict[key].shape != expected[key].shape]
    if wrong:
        key = wrong[0]
        got, wanted = (list(d[key].shape) if key in d else "none" for d in (state_dict, expected))
        raise ValueError(f"{path} does not fit {name}: of {key} expected {wanted}, got {got} ({len(wrong)} differ).")
    model.load_state_dict(state_dict)


def fit(images: Tensor, size: int, resize: str = "shortest", interpolation: str = "bicubic") -> Tensor:
    """Images [B,3,H,W] -> [B,3,size,size], antialiased, with a gradient; what the official processors do through PIL.

    shortest: the shortest side to `size`, centre crop (CLIP). longest: the longest side to `size`, zeros around it
    (HPSv2). squash: both sides to `size` (SigLIP, OWL-ViT).
    """
    height, width = images.shape[-2:]
    if resize == "squash":
        height, width = size, size
    elif resize == "longest":
        longest = max(height, width)
        height, width = round(size * height / longest), round(size * width / longest)
    else:
        shortest = min(height, width)
        height, width = size * height // shortest, size * width // shortest
    if (height, width) != images.shape[-2:]:
        images = F.interpolate(images, size=(height, width), mode=interpolation, antialias=True)
    if resize == "longest":
        left, top = (size - width) // 2, (size - height) // 2
        return F.pad(images, (left, size - width - left, top, size - height - top))
    top, left = (height - size) // 2, (width - size) // 2
    return images[..., top : top + size, left : left + size]


def processor_config(path: str) -> dict:
    """A model's `preprocessor_config.json`, empty where there is none."""
    try:
        return ImageProcessingMixin.get_image_processor_dict(path)[0]
    except OSError:
        return {}


def interpolation_of(processor: dict) -> str:
    """PIL's number of an interpolation, 2 or 3, as torch names it; bicubic where there is none."""
    return "bilinear" if processor.get("resample", 3) == 2 else "bicubic"


def image_statistics(path: str, default_mean: Sequence[float], default_std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [3,1,1], of images in [0,1], that a model's `preprocessor_config.json` states.

    Where it states none, the defaults. It states them for pixels of 0 to 255 times its `rescale_factor`, or for these
    pixels themselves with `do_rescale` false, as DPT's on DINOv2.
    """
    config = processor_config(path)
    white = 255 * config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 255.0
    mean, std = config.get("image_mean") or default_mean, config.get("image_std") or default_std
    if config.get("do_normalize") is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return torch.tensor(mean).view(3, 1, 1) / white, torch.tensor(std).view(3, 1, 1) / white
