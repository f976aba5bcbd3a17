"""What differs between families of text-to-image models: how a prompt becomes the network's input, and its call.

A family is a row of `FAMILIES`, found by the name of the stock pipeline that a model's `model_index.json` states. That
pipeline encodes the text. All that a network is told besides latents and timestep is one dict of tensors [B, ...], the
*condition*, so that guidance can lay two of them side by side without knowing what they hold.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

Condition = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """One family of models.

    `condition(pipe, prompts, height, width, negative)` gives the condition of B prompts for images of that many pixels,
    equal to the stock pipeline's; `negative` says that they are negative prompts, where "" may mean none.
    `forward(network, x_t [B, C, h, w], timestep, condition, **residuals)` gives the output, [B, C, h, w]; the residuals
    are what a ControlNet adds, by the names of the network's arguments.
    """

    label: str
    pipeline: type[DiffusionPipeline]
    components: dict[str, type]  # models and tokenizers, by their names in the pipeline
    single_file: dict[str, str]  # the models, and a pattern of how their keys begin in one file with the original names
    condition: Callable[[DiffusionPipeline, list[str], int, int, bool], Condition]
    forward: Callable[..., Tensor]
    scheduler: type = DDIMScheduler  # what pictures are drawn with, as it is what training differentiates
    classifier_free: bool = True  # guidance by a second pass; else by a scale that the network reads
    latent_multiple: int = 1  # latents' sides are multiples of it
    max_sequence_length: int | None = None  # of the T5 that reads the prompt in full; None: the last tokenizer's own
    sigmas_end_at_one_nth: bool = False  # the pipeline, not the scheduler, sets flow's sigmas, from 1 to 1/N
    options: dict[str, Any] = field(default_factory=dict)  # of the pipeline's constructor

    @property
    def network(self) -> str:
        return "transformer" if "transformer" in self.components else "unet"


def _sd_condition(pipe, prompts: list[str], height: int, width: int, negative: bool) -> Condition:
    return {"encoder_hidden_states": pipe.encode_prompt(prompts, pipe.text_encoder.device, 1, False)[0]}


def _sdxl_condition(pipe, prompts: list[str], height: int, width: int, negative: bool) -> Condition:
    device = pipe.text_encoder.device
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
    if negative and pipe.config.force_zeros_for_empty_prompt:
        written = torch.tensor([bool(prompt) for prompt in prompts], device=device)
        embeds, pooled = embeds * written[:, None, None], pooled * written[:, None]
    # the original size, the corner it was cropped at, and the wanted size: an image that was never scaled nor cropped
    time_ids = torch.tensor([[height, width, 0, 0, height, width]] * len(prompts), dtype=embeds.dtype, device=device)
    return {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": time_ids}


def _sd3_condition(pipe, prompts: list[str], height: int, width: int, negative: bool) -> Condition:
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompts, None, None, device=pipe.text_encoder.device, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def _flux_condition(pipe, prompts: list[str], height: int, width: int, negative: bool) -> Condition:
    embeds, pooled, _ = pipe.encode_prompt(prompts, device=pipe.text_encoder.device)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def _unet_forward(unet: nn.Module, x_t: Tensor, timestep: Tensor, condition: Condition, **residuals) -> Tensor:
    prompt_embeds, added = split_added(condition)
    return unet(x_t, timestep, prompt_embeds, added_cond_kwargs=added, **residuals).sample


def split_added(condition: Condition) -> tuple[Tensor, Condition | None]:
    """Prompt embeddings, and what SDXL's U-Net is told beside them."""
    added = {name: tensor for name, tensor in condition.items() if name != "encoder_hidden_states"}
    return condition["encoder_hidden_states"], added or None


def _sd3_forward(transformer: nn.Module, x_t: Tensor, timestep: Tensor, condition: Condition, **residuals) -> Tensor:
    return transformer(x_t, timestep=timestep.expand(len(x_t)), **condition, **residuals).sample


def _flux_forward(transformer: nn.Module, x_t: Tensor, timestep: Tensor, condition: Condition, **residuals) -> Tensor:
    output = transformer(**flux_inputs(x_t, timestep, condition), **residuals).sample
    return unpack(output, *x_t.shape[-2:])


def flux_inputs(x_t: Tensor, timestep: Tensor, condition: Condition) -> Condition:
    """FLUX sees 2 x 2 latents as one token, reads their places from `img_ids`, and the timestep between 0 and 1."""
    image_ids = patch_ids(x_t.shape[-2] // 2, x_t.shape[-1] // 2).to(x_t)
    return condition | {
        "hidden_states": pack(x_t),
        "timestep": timestep.expand(len(x_t)) / 1000,
        "img_ids": image_ids,
        "txt_ids": image_ids.new_zeros(condition["encoder_hidden_states"].shape[1], 3),
    }


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, (h/2)(w/2), 4C]: FLUX's tokens, patches of 2 x 2."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def patch_ids(rows: int, columns: int) -> Tensor:
    """[rows * columns, 3]: (0, row, column) of each of FLUX's tokens."""
    return torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())


_VAE = r"(first_stage_model|vae)\."
_UNET = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel, "tokenizer": CLIPTokenizer}

FAMILIES = {
    "StableDiffusionPipeline": Family(
        "SD 1.x, SD 2.x and the emoji world",
        StableDiffusionPipeline,
        _UNET,
        {"unet": r"model\.diffusion_model\.input_blocks\.", "vae": _VAE, "text_encoder": r"cond_stage_model\."},
        _sd_condition,
        _unet_forward,
        options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    ),
    "StableDiffusionXLPipeline": Family(
        "SDXL",
        StableDiffusionXLPipeline,
        _UNET | {"text_encoder_2": CLIPTextModelWithProjection, "tokenizer_2": CLIPTokenizer},
        {
            "unet": r"model\.diffusion_model\.label_emb\.",
            "vae": _VAE,
            "text_encoder": r"conditioner\.embedders\.0\.",
            "text_encoder_2": r"conditioner\.embedders\.1\.",
        },
        _sdxl_condition,
        _unet_forward,
        options={"add_watermarker": False},
    ),
    "StableDiffusion3Pipeline": Family(
        "SD3",
        StableDiffusion3Pipeline,
        {
            "transformer": SD3Transformer2DModel,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModelWithProjection,
            "tokenizer": CLIPTokenizer,
            "text_encoder_2": CLIPTextModelWithProjection,
            "tokenizer_2": CLIPTokenizer,
            "text_encoder_3": T5EncoderModel,
            "tokenizer_3": T5TokenizerFast,
        },
        {
            "transformer": r"(model\.diffusion_model\.)?joint_blocks\.",
            "vae": _VAE,
            "text_encoder": r"text_encoders\.clip_l\.",
            "text_encoder_2": r"text_encoders\.clip_g\.",
            "text_encoder_3": r"text_encoders\.t5xxl\.",
        },
        _sd3_condition,
        _sd3_forward,
        FlowMatchEulerDiscreteScheduler,
        latent_multiple=2,
        max_sequence_length=256,
    ),
    "FluxPipeline": Family(
        "FLUX.1",
        FluxPipeline,
        {
            "transformer": FluxTransformer2DModel,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModel,
            "tokenizer": CLIPTokenizer,
            "text_encoder_2": T5EncoderModel,
            "tokenizer_2": T5TokenizerFast,
        },
        {
            "transformer": r"(model\.diffusion_model\.)?double_blocks\.0\.img_mod\.lin\.",  # not Chroma's nor FLUX.2's
            "vae": _VAE,
            "text_encoder": r"text_encoders\.clip_l\.",
            "text_encoder_2": r"text_encoders\.t5xxl\.",
        },
        _flux_condition,
        _flux_forward,
        FlowMatchEulerDiscreteScheduler,
        classifier_free=False,
        latent_multiple=2,
        max_sequence_length=512,
        sigmas_end_at_one_nth=True,
    ),
}
