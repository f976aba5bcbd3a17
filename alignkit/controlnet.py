"""ControlNets (Zhang et al. 2023, arXiv 2302.05543): made from a base, loaded strictly, saved, and run beside it.

`*_predict` is one denoiser call with a control for a family: SD 1.x, 2.x and SDXL, SD3, FLUX. All return the model
output in float32 with a gradient for the ControlNet; the base stays as frozen as it came.
"""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from alignkit.artifacts import atomic, load_tensors, save_tensors
from alignkit.base import Base
from alignkit.config import differences
from alignkit.emoji import resolve
from alignkit.families import Condition
from alignkit.sampling import guided, sample

WEIGHTS = "diffusion_pytorch_model.safetensors"
EMBEDDING_CHANNELS = (16, 32, 96, 256)  # of the paper's control encoder, halving its side between two of them
# What a ControlNet has to share with its U-Net for its residuals to fit and to mean the same.
SHARED = ("in_channels", "block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim")


def new_controlnet(unet: nn.Module, vae_scale_factor: int, seed: int = 0) -> ControlNetModel:
    """A ControlNet in float32 with the U-Net's encoder, whose residuals are zero.

    Its control encoder goes down from pixels to latents in as many halvings as the VAE; its weights depend on `seed`
    alone.
    """
    halvings = vae_scale_factor.bit_length() - 1
    if vae_scale_factor != 2**halvings:
        raise ValueError(f"expected a VAE factor that is a power of 2, got {vae_scale_factor}")
    channels = [EMBEDDING_CHANNELS[min(i, len(EMBEDDING_CHANNELS) - 1)] for i in range(halvings + 1)]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=tuple(channels))
    return controlnet.float().to(unet.device)


def load_controlnet(path: str, unet: nn.Module, vae_scale_factor: int) -> ControlNetModel:
    """A ControlNet folder or Hub name in diffusers format, or one .safetensors file, in float32.

    A file may have the names of the original code (`control_model.input_blocks...`) or diffusers', which UIs read too:
    the weights that `save_controlnet` writes are such a file.

    Raises:
        FileNotFoundError: there is no such ControlNet.
        ValueError: it was made for another base, or its weights are incomplete.
    """
    path = resolve(path)
    if Path(path).suffix == ".safetensors":
        return _from_single_file(path, unet, vae_scale_factor)
    if not Path(path).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise FileNotFoundError(f"No ControlNet {path!r}: expected a folder in diffusers format or a Hub OWNER/NAME.")
    try:
        config = ControlNetModel.load_config(path)
    except OSError as error:
        raise FileNotFoundError(f"No ControlNet {path!r}: {str(error).strip().splitlines()[0]}") from error
    made_by = config.get("_class_name")
    if made_by != "ControlNetModel":
        raise ValueError(f"{path}: expected a ControlNetModel, got {made_by}")
    check_fit(config, unet, vae_scale_factor, path)
    try:
        controlnet, info = ControlNetModel.from_pretrained(
            path, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True
        )
    except OSError as error:
        raise ValueError(f"{path}: expected {WEIGHTS}: {str(error).strip().splitlines()[0]}") from error
    wrong = {kind: list(keys) for kind, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"{path} is not a complete ControlNet of this base: {wrong}")
    return controlnet.to(unet.device)


def _from_single_file(path: str, unet: nn.Module, vae_scale_factor: int) -> ControlNetModel:
    if not Path(path).is_file():
        raise FileNotFoundError(f"No ControlNet {path!r}: there is no such file.")
    controlnet = new_controlnet(unet, vae_scale_factor)
    weights = convert_controlnet_checkpoint(load_tensors(path), controlnet.config)
    weights = {key: tensor.float() for key, tensor in weights.items() if tensor is not None}
    expected = {key: list(tensor.shape) for key, tensor in controlnet.state_dict().items()}
    wrong = differences(expected, {key: list(tensor.shape) for key, tensor in weights.items()})
    if wrong:
        key, (wanted, got) = next(iter(wrong.items()))
        raise ValueError(
            f"{path} is not a ControlNet of this base: of {key} expected {wanted}, got {got} ({len(wrong)} differ)"
        )
    controlnet.load_state_dict(weights)
    return controlnet


def check_fit(config: Mapping[str, Any], unet: nn.Module, vae_scale_factor: int, name: str) -> None:
    """Raises ValueError for the config of a ControlNet that was made for another base."""
    halvings = len(config.get("conditioning_embedding_out_channels", EMBEDDING_CHANNELS)) - 1
    if 2**halvings != vae_scale_factor:
        raise ValueError(
            f"{name} does not fit this base: its control encoder is for a VAE factor of {2**halvings}, the base's is "
            f"{vae_scale_factor}"
        )
    for key in SHARED:
        theirs, ours = config.get(key), unet.config.get(key)
        theirs, ours = ([list(v) if isinstance(v, Sequence) and not isinstance(v, str) else v] for v in (theirs, ours))
        if theirs != ours:
            raise ValueError(
                f"{name} is a ControlNet of another base: its {key} is {theirs[0]}, this base's is {ours[0]}"
            )


def save_controlnet(folder: str | os.PathLike, controlnet: nn.Module) -> Path:
    """Writes a folder that `ControlNetModel.from_pretrained` reads: config.json and safetensors. Returns the weights.

    ValueError when a weight is not finite; nothing is written then.
    """
    folder = Path(folder)
    save_tensors(controlnet.state_dict(), folder / WEIGHTS)
    with atomic(folder / "config.json") as temporary:
        temporary.write_text(controlnet.to_json_string(), encoding="utf-8")
    return folder / WEIGHTS


def unet_predict(
    unet: nn.Module,
    controlnet: nn.Module,
    x_t: Tensor,
    timestep: Tensor,
    control: Tensor,
    prompt_embeds: Tensor,
    added_cond_kwargs: Mapping[str, Tensor] | None = None,
    conditioning_scale: float = 1.0,
) -> Tensor:
    """SD 1.x, SD 2.x and SDXL. x_t [B,C,h,w], timestep scalar or [B], control [B,3,H,W] in [0,1] -> [B,C,h,w].

    prompt_embeds [B,S,D]; SDXL's `added_cond_kwargs` are text_embeds [B,P] and time_ids [B,6].
    """
    added = {} if added_cond_kwargs is None else {"added_cond_kwargs": dict(added_cond_kwargs)}
    with half_precision(unet):
        down, mid = controlnet(
            x_t, timestep, prompt_embeds, control, conditioning_scale, return_dict=False, **added
        )  # fmt: skip
    return unet(
        x_t.to(unet.dtype),
        timestep,
        encoder_hidden_states=prompt_embeds.to(unet.dtype),
        down_block_additional_residuals=tuple(residual.to(unet.dtype) for residual in down),
        mid_block_additional_residual=mid.to(unet.dtype),
        **added,
    ).sample.float()


def predict(
    base: Base,
    controlnet: nn.Module,
    x_t: Tensor,
    timestep: Tensor,
    control: Tensor,
    condition: Condition,
    conditioning_scale: float = 1.0,
) -> Tensor:
    """`unet_predict` with what `base.condition` says of the prompts."""
    added = {name: tensor for name, tensor in condition.items() if name != "encoder_hidden_states"}
    prompt_embeds = condition["encoder_hidden_states"]
    return unet_predict(base.unet, controlnet, x_t, timestep, control, prompt_embeds, added or None, conditioning_scale)


def sd3_predict(
    transformer: nn.Module,
    controlnet: nn.Module,
    x_t: Tensor,
    timestep: Tensor,
    control_latents: Tensor,
    prompt_embeds: Tensor,
    pooled_prompt_embeds: Tensor,
    conditioning_scale: float = 1.0,
) -> Tensor:
    """SD3. x_t and control_latents [B,C,h,w], timestep [B] of 0 to 1000, embeddings [B,S,D] and [B,P] -> [B,C,h,w]."""
    prompt = {"encoder_hidden_states": prompt_embeds, "pooled_projections": pooled_prompt_embeds, "timestep": timestep}
    with half_precision(transformer):
        (residuals,) = controlnet(
            x_t, control_latents, conditioning_scale=conditioning_scale, return_dict=False, **prompt
        )
    residuals = [residual.to(transformer.dtype) for residual in residuals]
    return transformer(x_t.to(transformer.dtype), block_controlnet_hidden_states=residuals, **prompt).sample.float()


def flux_predict(
    transformer: nn.Module,
    controlnet: nn.Module,
    x_t: Tensor,
    timestep: Tensor,
    control_latents: Tensor,
    prompt_embeds: Tensor,
    pooled_prompt_embeds: Tensor,
    guidance: Tensor | None = None,
    conditioning_scale: float = 1.0,
) -> Tensor:
    """FLUX. As `sd3_predict`; h and w even; `guidance` [B] is the distilled models' input, 1 in training."""
    height, width = x_t.shape[-2:]
    prompt = {
        "encoder_hidden_states": prompt_embeds,
        "pooled_projections": pooled_prompt_embeds,
        "timestep": timestep / 1000,
        "guidance": guidance,
        "txt_ids": x_t.new_zeros(prompt_embeds.shape[1], 3),
        "img_ids": patch_ids(height // 2, width // 2).to(x_t),
    }
    with half_precision(transformer):
        residuals, single_residuals = controlnet(
            pack(x_t), pack(control_latents), conditioning_scale=conditioning_scale, return_dict=False, **prompt
        )
    residuals, single_residuals = (
        None if some is None else [residual.to(transformer.dtype) for residual in some]
        for some in (residuals, single_residuals)
    )
    output = transformer(
        pack(x_t).to(transformer.dtype),
        controlnet_block_samples=residuals,
        controlnet_single_block_samples=single_residuals,
        **prompt,
    ).sample
    return unpack(output.float(), height, width)


def encode_control(vae: nn.Module, control: Tensor) -> Tensor:
    """Control [B,3,H,W] in [0,1] -> latents [B,C,h,w] with the VAE's shift and scale, as SD3 and FLUX are shown it."""
    latents = vae.encode(2 * control.to(vae.dtype) - 1).latent_dist.mode()
    return (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


def pack(latents: Tensor) -> Tensor:
    """[B,C,h,w] -> [B,(h/2)(w/2),4C]: patches of 2 x 2 as FLUX's tokens."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def patch_ids(rows: int, columns: int) -> Tensor:
    """[rows * columns, 3]: (0, row, column) of each of FLUX's tokens."""
    return torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())


def half_precision(base: nn.Module) -> AbstractContextManager:
    """The trained copy computes in the frozen base's precision, while its weights stay float32."""
    if base.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(base.device.type, dtype=base.dtype)


@torch.no_grad()
def draw_controlled(
    base: Base,
    controlnet: ControlNetModel,
    controls: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    negative_prompt: str = "",
    conditioning_scale: float = 1.0,
    batch_size: int = 8,
) -> Tensor:
    """Images [N,3,H,W] in [0,1] for controls [N,3,H,W] in [0,1], image i from the noise of seeds[i]; DDIM.

    The pixels of the stock `StableDiffusionControlNetPipeline`, or `StableDiffusionXLControlNetPipeline`.
    """
    images, device = [], base.unet.device
    timesteps = base.schedule.timesteps(num_inference_steps).to(device)
    size = controls.shape[-2:]
    shape = base.latent_shape(*size)
    for rows in torch.arange(len(controls)).split(batch_size):
        control = controls[rows].to(device)
        generators = [torch.Generator().manual_seed(seeds[i]) for i in rows]
        x_T = randn_tensor((len(rows), *shape), generators, device)
        condition = base.condition([prompts[i] for i in rows], *size)
        negative = base.condition([negative_prompt] * len(rows), *size, negative=True)

        def forward(x_t: Tensor, timestep: Tensor, condition: Condition, control=control) -> Tensor:
            both = control.repeat(len(x_t) // len(control), 1, 1, 1)  # guidance asks twice
            return predict(base, controlnet, x_t, timestep, both, condition, conditioning_scale)

        denoiser = guided(forward, condition, negative, guidance_scale)
        images.append(base.decode(sample(denoiser, x_T, base.schedule, timesteps, plan=None)))
    return torch.cat(images)
