"""ControlNets (Zhang et al. 2023, arXiv 2302.05543): made from a base, loaded strictly, saved, and run beside it.

What differs between the networks that they stand beside is a row of `KINDS`. A ControlNet of a U-Net is shown the
control's pixels; those of SD3 and FLUX are shown its latents, in the layout of diffusers' training scripts: the control
alone, with the VAE's shift and scale.
"""

import copy
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    FluxTransformer2DModel,
    ModelMixin,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.configuration_utils import FrozenDict
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING, convert_controlnet_checkpoint
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from alignkit.adapters import unwrapped
from alignkit.artifacts import atomic, load_tensors, refuse_pickles, save_tensors
from alignkit.base import Base, require_finite
from alignkit.config import differences
from alignkit.emoji import resolve
from alignkit.families import Condition, flux_inputs, pack, split_added
from alignkit.sampling import sample

WEIGHTS = "diffusion_pytorch_model.safetensors"
EMBEDDING_CHANNELS = (16, 32, 96, 256)  # of the paper's control encoder, halving its side between two of them


@dataclass(frozen=True)
class Kind:
    """ControlNets of one class of networks.

    `new(network, vae_scale_factor, **depths)` makes one whose residuals are zero. `residuals(controlnet, x_t, timestep,
    control, condition, conditioning_scale)` are what it adds, by the names of the network's arguments.
    `depths(config)`: of how many blocks it may be made, by name: (diffusers' default, at most). `layout`: what of its
    config has to be so; other published layouts have it otherwise.
    """

    model: type[ModelMixin]
    new: Callable[..., nn.Module]
    residuals: Callable[[nn.Module, Tensor, Tensor, Tensor, Condition, float], dict[str, Any]]
    shared: tuple[str, ...]  # of the config: what has to be the network's, for residuals to fit and to mean the same
    shows_latents: bool = False
    layout: Mapping[str, Any] = field(default_factory=dict)
    depths: Callable[[Mapping[str, Any]], dict[str, tuple[int, int]]] = lambda config: {}


def kind_of(network: nn.Module) -> Kind:
    """ValueError for a network that has none."""
    network = unwrapped(network)
    for cls, kind in KINDS.items():
        if isinstance(network, cls):
            return kind
    supported = ", ".join(cls.__name__ for cls in KINDS)
    raise ValueError(
        f"ControlNets stand beside {supported} here; this network is a {type(network).__name__}. To draw with one, "
        "load it by its own class of diffusers."
    )


# Made and loaded


def new_controlnet(
    network: nn.Module,
    vae_scale_factor: int,
    seed: int = 0,
    num_layers: int | None = None,
    num_single_layers: int | None = None,
) -> nn.Module:
    """A ControlNet in float32 with the network's weights, whose residuals are zero.

    Of a U-Net, it has all of the encoder, and one of its own for the control, which goes down from pixels to latents in
    as many halvings as the VAE; its weights depend on `seed` alone. Of SD3 and FLUX, the first `num_layers` blocks and,
    of FLUX, `num_single_layers` of the later ones; by default as many as diffusers takes, 12 of SD3, 4 and 10 of FLUX,
    or all that can be.

    Raises ValueError for numbers of blocks that this network cannot give.
    """
    kind = kind_of(network)
    possible = kind.depths(network.config)
    depths = {name: min(default, most) for name, (default, most) in possible.items()}
    for name, asked in {"num_layers": num_layers, "num_single_layers": num_single_layers}.items():
        if asked is None:
            continue
        if name not in possible:
            raise ValueError(f"{name}: a ControlNet of a {type(network).__name__} has no such choice: leave it null")
        if not 0 <= asked <= possible[name][1]:
            raise ValueError(f"{name}: expected 0 to {possible[name][1]} blocks of this base, got {asked}")
        depths[name] = asked
    if depths and not any(depths.values()):
        raise ValueError(f"expected a ControlNet of at least one block, got {depths}")
    where = "meta" if network.device.type == "meta" else "cpu"
    with torch.random.fork_rng(devices=[]), torch.device(where):
        torch.default_generator.manual_seed(seed)
        controlnet = kind.new(network, vae_scale_factor, **depths)
    return controlnet.float().to(network.device)


def load_controlnet(path: str, network: nn.Module, vae_scale_factor: int) -> nn.Module:
    """A ControlNet folder or Hub name in diffusers format, or one .safetensors file of a U-Net's, in float32.

    A file may have the names of the original code (`control_model.input_blocks...`) or diffusers', which UIs read too:
    the weights that `save_controlnet` writes are such a file.

    Raises:
        FileNotFoundError: there is no such ControlNet.
        ValueError: it was made for another base, is shown other things, or its weights are incomplete.
    """
    path, kind = resolve(path), kind_of(network)
    if Path(path).suffix == ".safetensors":
        return _from_single_file(path, network, vae_scale_factor)
    if not Path(path).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise FileNotFoundError(f"No ControlNet {path!r}: expected a folder in diffusers format or a Hub OWNER/NAME.")
    try:
        config = kind.model.load_config(path)
    except OSError as error:
        raise FileNotFoundError(f"No ControlNet {path!r}: {str(error).strip().splitlines()[0]}") from error
    made_by = config.get("_class_name")
    if made_by != kind.model.__name__:
        raise ValueError(f"{path}: expected a {kind.model.__name__}, got {made_by}")
    check_fit(config, network, vae_scale_factor, path)
    try:
        controlnet, info = kind.model.from_pretrained(
            path, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True
        )
    except OSError as error:
        refuse_pickles(path)
        raise ValueError(f"{path}: expected {WEIGHTS}: {str(error).strip().splitlines()[0]}") from error
    wrong = {what: list(keys) for what, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"{path} is not a complete ControlNet of this base: {wrong}")
    return controlnet.to(network.device)


def _from_single_file(path: str, network: nn.Module, vae_scale_factor: int) -> ControlNetModel:
    if not Path(path).is_file():
        raise FileNotFoundError(f"No ControlNet {path!r}: there is no such file.")
    if kind_of(network).model is not ControlNetModel:
        raise ValueError(
            f"{path}: of a {type(network).__name__}, expected a folder in diffusers format, whose config.json says how "
            "many blocks the ControlNet has"
        )
    controlnet = new_controlnet(network, vae_scale_factor)
    tensors = load_tensors(path)
    weights = convert_controlnet_checkpoint(dict(tensors), controlnet.config)
    for name, original in DIFFUSERS_TO_LDM_MAPPING["controlnet"]["addition_embed_type"].items():
        for key in (original, f"control_model.{original}"):
            if key in tensors:  # SDXL's, which diffusers leaves out
                weights[name] = tensors[key]
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


def check_fit(config: Mapping[str, Any], network: nn.Module, vae_scale_factor: int, name: str) -> None:
    """Raises ValueError for the config of a ControlNet that was made for another base, or is shown other things."""
    kind = kind_of(network)
    halvings = len(config.get("conditioning_embedding_out_channels", EMBEDDING_CHANNELS)) - 1
    if not kind.shows_latents and 2**halvings != vae_scale_factor:
        raise ValueError(
            f"{name} does not fit this base: its control encoder is for a VAE factor of {2**halvings}, the base's is "
            f"{vae_scale_factor}"
        )
    for key in kind.shared:
        theirs, ours = config.get(key), network.config.get(key)
        theirs, ours = ([list(v) if isinstance(v, Sequence) and not isinstance(v, str) else v] for v in (theirs, ours))
        if theirs != ours:
            raise ValueError(
                f"{name} is a ControlNet of another base: its {key} is {theirs[0]}, this base's is {ours[0]}"
            )
    for key, expected in kind.layout.items():
        if (got := config.get(key, expected)) != expected:
            raise ValueError(
                f"{name}: expected a ControlNet that is shown the latents of one control and nothing else; its {key} "
                f"is {got}. Stock diffusers draws with it, loaded as a {kind.model.__name__}"
            )


def save_controlnet(folder: str | os.PathLike, controlnet: nn.Module) -> Path:
    """Writes a folder that `from_pretrained` of its class reads: config.json and safetensors. Returns the weights.

    ValueError when a weight is not finite; nothing is written then.
    """
    folder = Path(folder)
    save_tensors(controlnet.state_dict(), folder / WEIGHTS)
    with atomic(folder / "config.json") as temporary:
        temporary.write_text(controlnet.to_json_string(), encoding="utf-8")
    return folder / WEIGHTS


# Shown a control, beside its base


@torch.no_grad()
def control_input(base: Base, controlnet: nn.Module, control: Tensor) -> Tensor:
    """What a ControlNet is shown of a control [B,3,H,W] in [0,1]: that, or latents [B,C,h,w].

    Latents are the mode of the VAE's posterior; the stock pipelines draw from it. The ControlNets of SD3 that InstantX
    published get them without the shift, as their config has it for the stock pipeline.
    """
    if not kind_of(base.network).shows_latents:
        return control
    latents = base.encode(control).float()
    if controlnet.config.get("force_zeros_for_pooled_projection"):
        latents = latents + (base.vae.config.shift_factor or 0) * base.vae.config.scaling_factor
    return latents


def predict(
    base: Base,
    controlnet: nn.Module,
    x_t: Tensor,
    timestep: Tensor,
    control: Tensor,
    condition: Condition,
    conditioning_scale: float = 1.0,
) -> Tensor:
    """The base's output [B,C,h,w] with a ControlNet beside it, float32, with a gradient for the ControlNet.

    x_t [B,C,h,w], timestep scalar or [B], `control` from `control_input`, `condition` from `base.condition`.
    """
    network = base.network
    with half_precision(network):
        residuals = kind_of(network).residuals(controlnet, x_t, timestep, control, condition, conditioning_scale)
    return base.forward(x_t, timestep, condition, **tree_map(lambda added: added.to(network.dtype), residuals))


def half_precision(base: nn.Module) -> AbstractContextManager:
    """The trained copy computes in the frozen base's precision, while its weights stay float32."""
    if base.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(base.device.type, dtype=base.dtype)


@torch.no_grad()
def draw_controlled(
    base: Base,
    controlnet: nn.Module,
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
    """Images [N,3,H,W] in [0,1] for controls [N,3,H,W] in [0,1], image i from the noise of seeds[i]; DDIM, or Euler.

    The pixels of the family's stock ControlNet pipeline, but that `control_input` does not draw.

    Raises ValueError as `base.denoiser`, FloatingPointError where an image is not finite.
    """
    images, device, size = [], base.device, controls.shape[-2:]
    timesteps = base.timesteps(num_inference_steps, *size)
    for rows in torch.arange(len(controls)).split(batch_size):
        control = control_input(base, controlnet, controls[rows].to(device))
        generators = [torch.Generator().manual_seed(seeds[i]) for i in rows]
        x_T = randn_tensor((len(rows), *base.latent_shape(*size)), generators, device)

        def forward(x_t: Tensor, timestep: Tensor, condition: Condition, control=control) -> Tensor:
            both = control.repeat(len(x_t) // len(control), 1, 1, 1)  # guidance asks twice
            return predict(base, controlnet, x_t, timestep, both, condition, conditioning_scale)

        told = [prompts[i] for i in rows]
        denoiser = base.denoiser(told, negative_prompt, guidance_scale, *size, forward=forward)
        drawn = base.decode(sample(denoiser, x_T, base.schedule, timesteps, plan=None))
        images.append(require_finite(drawn, base.network.dtype))
    return torch.cat(images)


# The kinds


def _new_for_unet(unet: nn.Module, vae_scale_factor: int) -> ControlNetModel:
    halvings = vae_scale_factor.bit_length() - 1
    if vae_scale_factor != 2**halvings:
        raise ValueError(f"expected a VAE factor that is a power of 2, got {vae_scale_factor}")
    channels = [EMBEDDING_CHANNELS[min(i, len(EMBEDDING_CHANNELS) - 1)] for i in range(halvings + 1)]
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=tuple(channels))


def _new_for_sd3(transformer: nn.Module, vae_scale_factor: int, num_layers: int) -> SD3ControlNetModel:
    twin = copy.copy(transformer)  # with a config of its own, as from_transformer writes into it
    # InstantX's hide the pooled prompt from the ControlNet, and the shift from the control's latents; ours do not
    twin._internal_dict = FrozenDict({**transformer.config, "force_zeros_for_pooled_projection": False})
    return SD3ControlNetModel.from_transformer(twin, num_layers, num_extra_conditioning_channels=0)


def _new_for_flux(transformer: nn.Module, vae_scale_factor: int, **depths: int) -> FluxControlNetModel:
    width = {name: transformer.config[name] for name in ("attention_head_dim", "num_attention_heads")}
    return FluxControlNetModel.from_transformer(transformer, **depths, **width)


def _unet_residuals(
    controlnet: nn.Module, x_t: Tensor, timestep: Tensor, control: Tensor, condition: Condition, scale: float
) -> dict[str, Any]:
    prompt_embeds, added = split_added(condition)
    down, mid = controlnet(x_t, timestep, prompt_embeds, control, scale, added_cond_kwargs=added, return_dict=False)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


def _sd3_residuals(
    controlnet: nn.Module, x_t: Tensor, timestep: Tensor, control: Tensor, condition: Condition, scale: float
) -> dict[str, Any]:
    if controlnet.config.force_zeros_for_pooled_projection:
        condition = condition | {"pooled_projections": torch.zeros_like(condition["pooled_projections"])}
    (blocks,) = controlnet(x_t, control, scale, timestep=timestep.expand(len(x_t)), **condition, return_dict=False)
    return {"block_controlnet_hidden_states": blocks}


def _flux_residuals(
    controlnet: nn.Module, x_t: Tensor, timestep: Tensor, control: Tensor, condition: Condition, scale: float
) -> dict[str, Any]:
    inputs = flux_inputs(x_t, timestep, condition)
    guidance = inputs.pop("guidance", x_t.new_ones(len(x_t)))  # ControlNet and base may differ in whether they read it
    if controlnet.config.guidance_embeds:
        inputs["guidance"] = guidance
    blocks, single_blocks = controlnet(
        **inputs, controlnet_cond=pack(control), conditioning_scale=scale, return_dict=False
    )
    residuals = {"controlnet_block_samples": blocks, "controlnet_single_block_samples": single_blocks}
    return {name: added for name, added in residuals.items() if added is not None}


KINDS = {
    UNet2DConditionModel: Kind(
        ControlNetModel,
        _new_for_unet,
        _unet_residuals,
        ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"),
    ),
    SD3Transformer2DModel: Kind(
        SD3ControlNetModel,
        _new_for_sd3,
        _sd3_residuals,
        ("in_channels", "patch_size", "attention_head_dim", "num_attention_heads", "joint_attention_dim",
         "pooled_projection_dim"),
        shows_latents=True,
        layout={"extra_conditioning_channels": 0, "use_pos_embed": True},
        # the last block has no weights for the text behind it, which a copy of it needs, and takes no residual
        depths=lambda config: {"num_layers": (12, config["num_layers"] - 1)},
    ),
    FluxTransformer2DModel: Kind(
        FluxControlNetModel,
        _new_for_flux,
        _flux_residuals,
        ("in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "pooled_projection_dim",
         "axes_dims_rope"),
        shows_latents=True,
        layout={"num_mode": None, "conditioning_embedding_channels": None},
        depths=lambda config: {
            "num_layers": (4, config["num_layers"]), "num_single_layers": (10, config["num_single_layers"])
        },
    ),
}  # fmt: skip
