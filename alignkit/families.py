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
    `forward(network, x_t [B, C, h, w], timestep, condition)` gives the output, [B, C, h, w].
    """

    label: str
    pipeline: type[DiffusionPipeline]
    components: dict[str, type]  # models and tokenizers, by their names in the pipeline
    condition: Callable[[DiffusionPipeline, list[str], int, int, bool], Condition]
    forward: Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]
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


def _unet_forward(unet: nn.Module, x_t: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
    added = {name: tensor for name, tensor in condition.items() if name != "encoder_hidden_states"}
    return unet(x_t, timestep, condition["encoder_hidden_states"], added_cond_kwargs=added or None).sample


def _sd3_forward(transformer: nn.Module, x_t: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
    return transformer(x_t, timestep=timestep.expand(len(x_t)), **condition).sample


def _flux_forward(transformer: nn.Module, x_t: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
    """The network sees 2 x 2 latents as one token, and reads their place from `img_ids` (0, row, column)."""
    rows, columns = x_t.shape[-2] // 2, x_t.shape[-1] // 2
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    image_ids = torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).to(x_t)
    output = transformer(
        F.pixel_unshuffle(x_t, 2).flatten(2).transpose(1, 2),
        timestep=timestep.expand(len(x_t)) / 1000,
        img_ids=image_ids,
        txt_ids=image_ids.new_zeros(condition["encoder_hidden_states"].shape[1], 3),
        **condition,
    ).sample
    return F.pixel_shuffle(output.transpose(1, 2).unflatten(2, (rows, columns)), 2)


_UNET = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel, "tokenizer": CLIPTokenizer}

FAMILIES = {
    "StableDiffusionPipeline": Family(
        "SD 1.x, SD 2.x and the emoji world",
        StableDiffusionPipeline,
        _UNET,
        _sd_condition,
        _unet_forward,
        options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    ),
    "StableDiffusionXLPipeline": Family(
        "SDXL",
        StableDiffusionXLPipeline,
        _UNET | {"text_encoder_2": CLIPTextModelWithProjection, "tokenizer_2": CLIPTokenizer},
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
        _flux_condition,
        _flux_forward,
        FlowMatchEulerDiscreteScheduler,
        classifier_free=False,
        latent_multiple=2,
        max_sequence_length=512,
        sigmas_end_at_one_nth=True,
    ),
}
