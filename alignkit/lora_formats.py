"""LoRA files in the names of diffusers and of kohya's scripts, which ComfyUI and A1111 read; one into the other.

| | diffusers | kohya |
|---|---|---|
| U-Net | `unet.<module>.lora.down.weight` | `lora_unet_<module>.lora_down.weight`, dots as underscores |
| SDXL's | `unet.down_blocks.1.attentions.0...` | `lora_unet_input_blocks_4_1_...`, the original code's numbers |
| text encoders | `text_encoder.text_model....lora_linear_layer` | `lora_te_text_model_...` |
| SDXL's | `text_encoder...`, `text_encoder_2...` | `lora_te1_...`, `lora_te2_...` |
| strength | folded into `up`, so that alpha = rank | `<module>.alpha` |

A converted file is the same update of the same weights, alpha included: where readers of diffusers' files may miss an
alpha (it stands in the header alone), it is folded into the weights.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from alignkit import emoji
from alignkit.artifacts import LORA_WEIGHTS, load_tensors, save_tensors
from alignkit.base import family_of
from alignkit.families import FAMILIES
from alignkit.random_init import ARCHITECTURES

PARTS = ("unet", "text_encoder", "text_encoder_2")
_TEXT_LAYER = re.compile(r"text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")


class Layer(NamedTuple):
    """One layer's update, alpha / rank * up @ down."""

    down: Tensor  # [rank, in, ...]
    up: Tensor  # [out, rank, ...]
    alpha: float


class Unet(NamedTuple):
    """What names depend on of the U-Net that a LoRA is for."""

    layers: dict[str, list[int]]  # [out, in] by module
    is_xl: bool
    layers_per_block: int


Lora = dict[str, Layer]  # by "<part>.<module>", such as unet.mid_block.attentions.0.proj_in


def convert_lora(source: str | os.PathLike, target: str | os.PathLike, format: str, model: str = "emoji") -> Path:
    """Writes the LoRA of `source` in the names of `format`; returns the file.

    Args:
        source: A safetensors file in either's names, or a folder with pytorch_lora_weights.safetensors.
        target: For kohya, a new .safetensors file; for diffusers, a folder that has no LoRA yet.
        format: "kohya" or "diffusers".
        model: The base it was made for: "emoji", sd15, sd21, sdxl, a folder in diffusers format or a Hub name. Only
            its configs are read.

    Raises:
        ValueError: `source` is not a plain LoRA, or not of this base (the first layer that does not fit is named);
            `target` is there already or has the wrong name; the base is of a family that has no names of kohya's.
    """
    target = Path(target)
    if format not in ("kohya", "diffusers"):
        raise ValueError(f"format: expected kohya or diffusers, got {format!r}")
    if format == "kohya" and target.suffix != ".safetensors":
        raise ValueError(f"expected the name of a new .safetensors file to write, got {target}")
    path = target if format == "kohya" else target / LORA_WEIGHTS
    if path.exists():
        raise ValueError(f"{path} is there already: choose another name")
    unet = _unet_of(model)
    lora = read_lora(source, unet)
    if format == "kohya":
        save_tensors(to_kohya(lora, unet), path, _kohya_header(lora))
    else:
        save_tensors(to_diffusers(lora), path)
    return path


def to_diffusers(lora: Lora) -> dict[str, Tensor]:
    tensors = {}
    for name, (down, up, alpha) in lora.items():
        lora_name = "lora" if name.startswith("unet.") else "lora_linear_layer"
        tensors[f"{name}.{lora_name}.down.weight"] = down
        tensors[f"{name}.{lora_name}.up.weight"] = up * (alpha / len(down))
    return tensors


def to_kohya(lora: Lora, unet: Unet) -> dict[str, Tensor]:
    tensors = {}
    for name, (down, up, alpha) in lora.items():
        key = _kohya_name(name, unet)
        tensors[f"{key}.lora_down.weight"] = down
        tensors[f"{key}.lora_up.weight"] = up
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def read_lora(source: str | os.PathLike, unet: Unet) -> Lora:
    """Of a file or folder in either's names, checked against the base's layers. Raises as `convert_lora`."""
    path = Path(source)
    path = path / LORA_WEIGHTS if path.is_dir() else path
    tensors = load_tensors(path)
    is_kohya = any(key.startswith("lora_") for key in tensors)
    lora = _from_kohya(tensors, unet, path) if is_kohya else _from_diffusers(tensors, _header(path), path)
    for name, (down, up, _) in lora.items():
        part, _, module = name.partition(".")
        if part == "unet":
            expected, got = unet.layers.get(module, "no such layer"), [up.shape[0], down.shape[1]]
            if expected != got or down.shape[0] != up.shape[1]:
                raise ValueError(
                    f"{path} does not fit this base model: expected {module} of [out, in] = {expected}, got {got}. "
                    "Name the base it was made for (--model)"
                )
        elif not _TEXT_LAYER.fullmatch(module) or (part == "text_encoder_2" and not unet.is_xl):
            raise ValueError(f"{path} does not fit this base model: its text encoder has no layer {name}")
    return lora


def _from_diffusers(tensors: dict[str, Tensor], header: dict, path: Path) -> Lora:
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    lora: Lora = {}
    foreign = [key for key in tensors if key.partition(".")[0] not in PARTS]
    if foreign or not tensors:
        raise ValueError(
            f"{path}: expected LoRA keys of {', '.join(PARTS)}, got {foreign[0] if foreign else 'none'}. kohya's names "
            "are known for SD 1.x, SD 2.x and SDXL"
        )
    for part in PARTS:
        own = {key.removeprefix(f"{part}."): t for key, t in tensors.items() if key.startswith(f"{part}.")}
        if not own:
            continue
        if not any(".lora_A." in key for key in own):
            own = convert_unet_state_dict_to_peft(own) if part == "unet" else convert_state_dict_to_peft(own)
        for name in sorted({key.removesuffix(".weight").rpartition(".lora_")[0] for key in own}):
            pair = [own.pop(f"{name}.lora_{side}.weight", None) for side in "AB"]
            if not name or None in pair:
                raise ValueError(f"{path} is not a plain LoRA: expected lora_A and lora_B of {part}.{name}")
            rank = len(pair[0])
            alpha = header.get(f"{part}.alpha_pattern", {}).get(name, header.get(f"{part}.lora_alpha", rank))
            if part != "unet" and not name.startswith("text_model."):  # transformers 5.6 and later leave it out
                name = f"text_model.{name}"
            lora[f"{part}.{name}"] = Layer(*pair, float(alpha))
        if own:
            raise ValueError(f"{path} holds keys that are not plain LoRA: {sorted(own)[0]}")
    return lora


def _from_kohya(tensors: dict[str, Tensor], unet: Unet, path: Path) -> Lora:
    lora: Lora = {}
    names = {_kohya_name(f"unet.{module}", unet): f"unet.{module}" for module in unet.layers}
    for key in sorted({key.partition(".")[0] for key in tensors}):
        name = names.get(key) or _text_layer(key)
        down, up, alpha = (tensors.pop(f"{key}.{end}", None) for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        if name is None:
            raise ValueError(
                f"{path} does not fit this base model: it has no layer {key}. Name the base it was made for (--model)"
            )
        if down is None or up is None:
            raise ValueError(f"{path} is not a plain LoRA: expected lora_down and lora_up of {key}")
        lora[name] = Layer(down, up, float(len(down) if alpha is None else alpha))
    if tensors:
        raise ValueError(f"{path} holds keys that are not plain LoRA: {sorted(tensors)[0]}")
    return lora


def _kohya_name(name: str, unet: Unet) -> str:
    """Of "<part>.<module>". SDXL's blocks are numbered as in the original code, in one row with what lies between."""
    part, _, module = name.partition(".")
    if part != "unet":
        encoder = "lora_te2" if part == "text_encoder_2" else "lora_te1" if unet.is_xl else "lora_te"
        return f"{encoder}_{module.replace('.', '_')}"
    if unet.is_xl:
        length = unet.layers_per_block + 1  # down, the layers and what halves the size; up blocks have a layer more
        block = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?attentions\.(\d+)\.(.+)", module)
        if block:
            side, number, rest = block[1], length * int(block[2] or 0) + int(block[3]), block[4]
            row = {"down": f"input_blocks.{number + 1}", "mid": "middle_block", "up": f"output_blocks.{number}"}[side]
            module = f"{row}.1.{rest}"
    return f"lora_unet_{module.replace('.', '_')}"


def _text_layer(key: str) -> str | None:
    """ "<part>.<module>" of a text encoder's layer in kohya's names."""
    match = re.fullmatch(r"lora_te([12]?)_text_model_encoder_layers_(\d+)_(self_attn|mlp)_(\w+)", key)
    if not match:
        return None
    encoder, number, block, layer = match.groups()
    part = "text_encoder_2" if encoder == "2" else "text_encoder"
    return f"{part}.text_model.encoder.layers.{number}.{block}.{layer}"


def _header(path: Path) -> dict:
    """alpha as PEFT's config in diffusers' header has it: <part>.lora_alpha, <part>.alpha_pattern."""
    import json

    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))


def _kohya_header(lora: Lora) -> dict[str, str]:
    """What user interfaces show; the tensors say the same, layer by layer."""
    ranks, alphas = ({value(layer) for layer in lora.values()} for value in (lambda x: len(x.down), lambda x: x.alpha))
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
    }


def _unet_of(model: str) -> Unet:
    from diffusers import UNet2DConditionModel

    path = ARCHITECTURES.get(model) or emoji.resolve(model)
    family = family_of(path)
    if family not in (FAMILIES["StableDiffusionPipeline"], FAMILIES["StableDiffusionXLPipeline"]):
        raise ValueError(
            f"{model} is of the family {family.label}; kohya's names are known here for SD 1.x, SD 2.x and SDXL"
        )
    with torch.device("meta"):  # no weights are read or made
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(path, subfolder="unet"))
    weights = {name: getattr(module, "weight", None) for name, module in unet.named_modules()}
    layers = {
        name: list(weight.shape[:2]) for name, weight in weights.items() if weight is not None and weight.ndim > 1
    }
    return Unet(layers, family is FAMILIES["StableDiffusionXLPipeline"], unet.config.layers_per_block)
