"""LoRA files in the names of diffusers and of kohya's scripts, which ComfyUI and A1111 read; one into the other.

| | diffusers | kohya |
|---|---|---|
| U-Net | `unet.<module>.lora.down.weight` | `lora_unet_<module>.lora_down.weight`, dots as underscores |
| SDXL's | `unet.down_blocks.1.attentions.0...` | `lora_unet_input_blocks_4_1_...`, the original code's numbers |
| FLUX | `transformer.<module>.lora_A.weight` | `lora_unet_double_blocks_0_img_attn_qkv...`, also the original code's |
| text encoders | `text_encoder.text_model....lora_linear_layer` | `lora_te_text_model_...` |
| SDXL's, FLUX's | `text_encoder...`, `text_encoder_2...` | `lora_te1_...`, `lora_te2_...` |
| strength | folded into `up`, so that alpha = rank | `<module>.alpha` |

A converted file is the same update of the same weights, alpha included: where readers of diffusers' files may miss an
alpha (it stands in the header alone), it is folded into the weights. Queries, keys and values that are three layers in
diffusers and one in FLUX's original code become one update, block by block, as kohya's scripts write it.

SD3 has names of kohya's too, but stock diffusers does not read them, so nothing here could check what was written.
"""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from alignkit import emoji
from alignkit.artifacts import LORA_WEIGHTS, by_pattern, load_tensors, read_metadata, save_tensors
from alignkit.base import family_of
from alignkit.families import FAMILIES
from alignkit.random_init import ARCHITECTURES

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
_TEXT_LAYER = re.compile(r"text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")


class Layer(NamedTuple):
    """One layer's update, alpha / rank * up @ down."""

    down: Tensor  # [rank, in, ...]
    up: Tensor  # [out, rank, ...]
    alpha: float


# Of FLUX's blocks: kohya's name, and the modules of diffusers that lie in that layer side by side.
_FLUX = {
    "transformer_blocks": {
        "double_blocks_{}_img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "double_blocks_{}_img_attn_proj": ("attn.to_out.0",),
        "double_blocks_{}_img_mlp_0": ("ff.net.0.proj",),
        "double_blocks_{}_img_mlp_2": ("ff.net.2",),
        "double_blocks_{}_img_mod_lin": ("norm1.linear",),
        "double_blocks_{}_txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "double_blocks_{}_txt_attn_proj": ("attn.to_add_out",),
        "double_blocks_{}_txt_mlp_0": ("ff_context.net.0.proj",),
        "double_blocks_{}_txt_mlp_2": ("ff_context.net.2",),
        "double_blocks_{}_txt_mod_lin": ("norm1_context.linear",),
    },
    "single_transformer_blocks": {
        "single_blocks_{}_linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "single_blocks_{}_linear2": ("proj_out",),
        "single_blocks_{}_modulation_lin": ("norm.linear",),
    },
}


# The original code's names of SDXL's modules, in a residual block and outside of all blocks.
_SDXL_RESNET = {
    "conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
_SDXL_ENDS = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


class Network(NamedTuple):
    """What names depend on of the network that a LoRA is for."""

    part: str  # unet or transformer
    layers: dict[str, list[int]]  # [out, in] by module
    is_xl: bool = False
    layers_per_block: int = 0

    @property
    def encoders(self) -> tuple[str, ...]:
        """kohya's prefixes of text_encoder and text_encoder_2."""
        return ("lora_te1", "lora_te2") if self.is_xl else ("lora_te" if self.part == "unet" else "lora_te1",)


Lora = dict[str, Layer]  # by "<part>.<module>", such as unet.mid_block.attentions.0.proj_in


def convert_lora(source: str | os.PathLike, target: str | os.PathLike, format: str, model: str = "emoji") -> Path:
    """Writes the LoRA of `source` in the names of `format`; returns the file.

    Args:
        source: A safetensors file in either's names, or a folder with pytorch_lora_weights.safetensors.
        target: For kohya, a new .safetensors file; for diffusers, a folder that has no LoRA yet.
        format: "kohya" or "diffusers".
        model: The base it was made for: "emoji", sd15, sd21, sdxl, flux, a folder in diffusers format or a Hub name.
            Only its configs are read.

    Raises:
        ValueError: `source` is not a plain LoRA, or not of this base (the first layer that does not fit is named);
            `target` is there already or has the wrong name; the base, or a layer of FLUX, has no names of kohya's.
    """
    target = Path(target)
    if format not in ("kohya", "diffusers"):
        raise ValueError(f"format: expected kohya or diffusers, got {format!r}")
    if format == "kohya" and target.suffix != ".safetensors":
        raise ValueError(f"expected the name of a new .safetensors file to write, got {target}")
    path = target if format == "kohya" else target / LORA_WEIGHTS
    if path.exists():
        raise ValueError(f"{path} is there already: choose another name")
    network = _network_of(model)
    lora = read_lora(source, network)
    if format == "kohya":
        save_tensors(to_kohya(lora, network), path, _kohya_header(lora, network))
    else:
        save_tensors(to_diffusers(lora), path)
    return path


def to_diffusers(lora: Lora) -> dict[str, Tensor]:
    tensors = {}
    for name, (down, up, alpha) in lora.items():
        ends = {
            "unet": ("lora.down", "lora.up"),
            "transformer": ("lora_A", "lora_B"),
        }.get(name.partition(".")[0], ("lora_linear_layer.down", "lora_linear_layer.up"))
        tensors[f"{name}.{ends[0]}.weight"] = down
        tensors[f"{name}.{ends[1]}.weight"] = up * (alpha / len(down))
    return tensors


def to_kohya(lora: Lora, network: Network) -> dict[str, Tensor]:
    layers = {_text_name(name, network): layer for name, layer in lora.items() if name.startswith("text_encoder")}
    named = set()
    for key, names in _kohya_layers(network).items():
        named |= set(names)
        if any(name in lora for name in names):
            layers[key] = _side_by_side([lora.get(name) for name in names], _sizes(names, network))
    outside = sorted(name for name in lora if name not in named and not name.startswith("text_encoder"))
    if outside:
        raise ValueError(f"kohya's names are known of FLUX's blocks alone; {outside[0]} lies outside of them")
    tensors = {}
    for key, (down, up, alpha) in layers.items():
        tensors[f"{key}.lora_down.weight"] = down
        tensors[f"{key}.lora_up.weight"] = up
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def read_lora(source: str | os.PathLike, network: Network) -> Lora:
    """Of a file or folder in either's names, checked against the base's layers. Raises as `convert_lora`."""
    path = Path(source)
    path = path / LORA_WEIGHTS if path.is_dir() else path
    tensors = load_tensors(path)
    is_kohya = any(key.startswith("lora_") for key in tensors)
    lora = _from_kohya(tensors, network, path) if is_kohya else _from_diffusers(tensors, _header(path), path)
    for name, (down, up, _) in lora.items():
        part, _, module = name.partition(".")
        if part in ("unet", "transformer"):
            layers = network.layers if part == network.part else {}
            expected, got = layers.get(module, "no such layer"), [up.shape[0], down.shape[1]]
            if expected != got or down.shape[0] != up.shape[1]:
                raise ValueError(
                    f"{path} does not fit this base model: expected {module} of [out, in] = {expected}, got {got}. "
                    "Name the base it was made for (--model)"
                )
        elif not _TEXT_LAYER.fullmatch(module) or (part == "text_encoder_2" and not network.is_xl):
            raise ValueError(f"{path} does not fit this base model: its text encoder has no layer {name}")
    return lora


def _from_diffusers(tensors: dict[str, Tensor], header: dict, path: Path) -> Lora:
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    lora: Lora = {}
    foreign = [key for key in tensors if key.partition(".")[0] not in PARTS]
    if foreign or not tensors:
        raise ValueError(
            f"{path}: expected LoRA keys of {', '.join(PARTS)}, got {foreign[0] if foreign else 'none'}. kohya's names "
            "are known for SD 1.x, SD 2.x, SDXL and FLUX"
        )
    for part in PARTS:
        own = {key.removeprefix(f"{part}."): t for key, t in tensors.items() if key.startswith(f"{part}.")}
        if not own:
            continue
        is_network = part in ("unet", "transformer")
        if not any(".lora_A." in key for key in own):
            own = convert_unet_state_dict_to_peft(own) if is_network else convert_state_dict_to_peft(own)
        for name in sorted({key.removesuffix(".weight").rpartition(".lora_")[0] for key in own}):
            pair = [own.pop(f"{name}.lora_{side}.weight", None) for side in "AB"]
            if not name or None in pair:
                raise ValueError(f"{path} is not a plain LoRA: expected lora_A and lora_B of {part}.{name}")
            rank = len(pair[0])
            alpha = by_pattern(header.get(f"{part}.alpha_pattern", {}), name, header.get(f"{part}.lora_alpha", rank))
            if header.get(f"{part}.use_rslora"):  # whose scale is alpha / sqrt(rank)
                alpha *= rank**0.5
            if not is_network and not name.startswith("text_model."):  # transformers 5.6 and later leave it out
                name = f"text_model.{name}"
            lora[f"{part}.{name}"] = Layer(*pair, float(alpha))
        if own:
            raise ValueError(f"{path} holds keys that are not plain LoRA: {sorted(own)[0]}")
    return lora


def _from_kohya(tensors: dict[str, Tensor], network: Network, path: Path) -> Lora:
    lora: Lora = {}
    known = _kohya_layers(network)
    if network.is_xl:  # other trainers write its modules as diffusers calls them
        known |= {_underscored(module): [f"unet.{module}"] for module in network.layers}
    for key in sorted({key.partition(".")[0] for key in tensors}):
        names = known.get(key) or _text_layer(key)
        down, up, alpha = (tensors.pop(f"{key}.{end}", None) for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        if names is None:
            raise ValueError(
                f"{path} does not fit this base model: it has no layer {key}. Name the base it was made for (--model)"
            )
        if down is None or up is None:
            raise ValueError(f"{path} is not a plain LoRA: expected lora_down and lora_up of {key}")
        twice = next((name for name in names if name in lora), None)
        if twice:
            raise ValueError(f"{path} holds two updates of {twice}, by diffusers' and by the original code's name")
        layer = Layer(down, up, float(len(down) if alpha is None else alpha))
        lora |= {name: part for name, part in zip(names, _apart(layer, names, network, path), strict=True) if part}
    if tensors:
        raise ValueError(f"{path} holds keys that are not plain LoRA: {sorted(tensors)[0]}")
    return lora


# kohya's names, and layers of the original code that are several in diffusers


def _kohya_layers(network: Network) -> dict[str, list[str]]:
    """All of a network's layers by kohya's name: the "<part>.<module>" that lie in each, side by side."""
    if network.part == "unet":
        return {_unet_name(module, network): [f"unet.{module}"] for module in network.layers}
    found = {}
    for blocks, layers in _FLUX.items():
        numbers = {name.split(".")[1] for name in network.layers if name.startswith(f"{blocks}.")}
        for number in sorted(numbers, key=int):
            for name, modules in layers.items():
                found[f"lora_unet_{name.format(number)}"] = [f"transformer.{blocks}.{number}.{m}" for m in modules]
    return found


def _unet_name(module: str, network: Network) -> str:
    return _underscored(_sdxl_name(module, network.layers_per_block) if network.is_xl else module)


def _underscored(module: str) -> str:
    return f"lora_unet_{module.replace('.', '_')}"


def _sdxl_name(module: str, layers_per_block: int) -> str:
    """As in the original code, which numbers blocks in one row with what lies between."""
    block = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", module)
    if not block:
        return _SDXL_ENDS.get(module, module)
    side, number, kind, layer, rest = block[1], int(block[2] or 0), block[3], int(block[4]), block[5]
    length = layers_per_block + 1  # down, the layers and what halves the size; up blocks have a layer more
    if kind == "downsamplers":
        return f"input_blocks.{length * (number + 1)}.0.op"
    if kind == "upsamplers":  # behind the last layer's residual block and attention
        return f"output_blocks.{length * (number + 1) - 1}.2.{rest}"
    if side == "mid":
        row = f"middle_block.{1 if kind == 'attentions' else 2 * layer}"
    else:
        number = length * number + layer
        row = f"input_blocks.{number + 1}" if side == "down" else f"output_blocks.{number}"
        row += ".1" if kind == "attentions" else ".0"
    return f"{row}.{_SDXL_RESNET.get(rest, rest) if kind == 'resnets' else rest}"


def _text_name(name: str, network: Network) -> str:
    part, _, module = name.partition(".")
    return f"{network.encoders[part == 'text_encoder_2']}_{module.replace('.', '_')}"


def _text_layer(key: str) -> list[str] | None:
    """ "<part>.<module>" of a text encoder's layer in kohya's names."""
    match = re.fullmatch(r"lora_te([12]?)_text_model_encoder_layers_(\d+)_(self_attn|mlp)_(\w+)", key)
    if not match:
        return None
    encoder, number, block, layer = match.groups()
    part = "text_encoder_2" if encoder == "2" else "text_encoder"
    return [f"{part}.text_model.encoder.layers.{number}.{block}.{layer}"]


def _sizes(names: list[str], network: Network) -> list[list[int]]:
    """[out, in] of each."""
    return [network.layers[name.partition(".")[2]] for name in names]


def _side_by_side(parts: list[Layer | None], sizes: list[list[int]]) -> Layer:
    """One update of all parts, block-diagonal in `up`, with the parts' common alpha / rank, else with 1.

    A part without an update gets a block of zeros, as readers divide the rank by the number of parts.
    """
    if len(parts) == 1:
        return parts[0]
    given = [part for part in parts if part]
    scales = {part.alpha / len(part.down) for part in given}
    rank = max(len(part.down) for part in given)
    downs, ups = [], []
    for part, (height, width) in zip(parts, sizes, strict=True):
        down, up = given[0].down.new_zeros(rank, width), given[0].up.new_zeros(height, rank)
        if part:
            scale = 1.0 if len(scales) == 1 else part.alpha / len(part.down)
            down, up = part.down, scale * part.up
        downs.append(down)
        ups.append(up)
    down = torch.cat(downs)
    return Layer(down, torch.block_diag(*ups), len(down) * (scales.pop() if len(scales) == 1 else 1.0))


def _apart(layer: Layer, names: list[str], network: Network, path: Path) -> list[Layer | None]:
    """The reverse: of each part what of the rank reaches it, None where nothing does."""
    if len(names) == 1:
        return [layer]
    heights = [height for height, _ in _sizes(names, network)]
    if len(layer.up) != sum(heights):
        raise ValueError(
            f"{path} does not fit this base model: expected {' and '.join(names)} of {sum(heights)} outputs in all, "
            f"got {len(layer.up)}. Name the base it was made for (--model)"
        )
    parts = []
    for up in layer.up.split(heights):
        used = up.any(0)
        rank = int(used.sum())
        alpha = layer.alpha * rank / len(layer.down)
        parts.append(Layer(layer.down[used], up[:, used].contiguous(), alpha) if rank else None)
    return parts


def _header(path: Path) -> dict:
    """alpha as PEFT's config in diffusers' header has it: <part>.lora_alpha, <part>.alpha_pattern."""
    return json.loads(read_metadata(path).get("lora_adapter_metadata", "{}"))


def _kohya_header(lora: Lora, network: Network) -> dict[str, str]:
    """What user interfaces show; the tensors say the same, layer by layer."""
    ranks, alphas = ({value(layer) for layer in lora.values()} for value in (lambda x: len(x.down), lambda x: x.alpha))
    return {
        "ss_network_module": "networks.lora" if network.part == "unet" else "networks.lora_flux",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
    }


def _network_of(model: str) -> Network:
    path = ARCHITECTURES.get(model) or emoji.resolve(model)
    family = family_of(path)
    if family is FAMILIES["StableDiffusion3Pipeline"]:
        raise ValueError(
            f"{model} is of the family {family.label}, whose names of kohya's stock diffusers does not read, so "
            f"what was written could not be checked: keep diffusers' own file, {LORA_WEIGHTS}"
        )
    cls = family.components[family.network]
    with torch.device("meta"):  # no weights are read or made
        network = cls.from_config(cls.load_config(path, subfolder=family.network))
    weights = {name: getattr(module, "weight", None) for name, module in network.named_modules()}
    layers = {
        name: list(weight.shape[:2]) for name, weight in weights.items() if weight is not None and weight.ndim > 1
    }
    is_xl = family is FAMILIES["StableDiffusionXLPipeline"]
    return Network(family.network, layers, is_xl, network.config.get("layers_per_block", 0))
