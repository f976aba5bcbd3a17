"""What a customised model is on disk: the files that people have, what they change, and on which base.

| what people have              | file                                         | changes                      |
|-------------------------------|----------------------------------------------|------------------------------|
| Textual Inversion             | learned_embeds.safetensors                   | rows of the token embeddings |
| Custom Diffusion              | pytorch_custom_diffusion_weights.safetensors | W_k, W_v of cross-attention  |
| LoRA (diffusers, kohya)       | pytorch_lora_weights.safetensors             | any layer                    |
| LoRA (peft)                   | adapter_model.safetensors and its config     | any layer of the U-Net       |
| DreamBooth                    | unet/, text_encoder(_2)/ of diffusers        | all of them                  |
| NeTI, P+                      | a folder of training/neti.py                 | text, by layer and timestep  |
"""

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from alignkit import concepts
from alignkit.adapters import unwrapped
from alignkit.alignit import Concept, alignit
from alignkit.artifacts import (
    LORA_WEIGHTS,
    PEFT_WEIGHTS,
    load_json,
    load_lora,
    load_tensors,
    read_pretrained,
    save_json,
    save_tensors,
)
from alignkit.emoji import resolve

CUSTOM_DIFFUSION_WEIGHTS = "pytorch_custom_diffusion_weights.safetensors"
EMBEDDINGS = "learned_embeds.safetensors"
CONCEPT = "concept.json"
DUMMY = "a photo of {}"


def cross_attention(unet: nn.Module) -> dict[str, Attention]:
    """The layers that read text, by name ("down_blocks.0.attentions.0.transformer_blocks.0.attn2")."""
    return {n: m for n, m in unwrapped(unet).named_modules() if isinstance(m, Attention) and m.is_cross_attention}


def base_layer(projection: nn.Module) -> nn.Module:
    """The layer below any LoRA of peft."""
    return projection.get_base_layer() if hasattr(projection, "get_base_layer") else projection


def fingerprint(unet: nn.Module) -> str:
    """12 hexadecimal digits of the signs in the base's W_k and W_v, which no precision and no adapter changes."""
    digest = hashlib.sha256()
    for name, attention in sorted(cross_attention(unet).items()):
        for part in ("to_k", "to_v"):
            weight = base_layer(getattr(attention, part)).weight.detach()
            digest.update(f"{name}.{part}".encode())
            digest.update(weight.signbit().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def save_custom_diffusion(folder: str | Path, unet: nn.Module, metadata: Mapping[str, str] | None = None) -> Path:
    """Writes W_k and W_v of every cross-attention layer under diffusers' keys of Custom Diffusion; returns the file.

    Stock diffusers reads it: `pipe.unet.load_attn_procs(folder, weight_name=..., _pipeline=pipe)`. It wants an
    entry for every attention layer, hence the empty tensors of those that are not changed.
    """
    weights: dict[str, Tensor] = {}
    changed = cross_attention(unet)
    for key in unet.attn_processors:  # "<layer>.processor"
        layer = changed.get(key.removesuffix(".processor"))
        if layer is None:
            weights[key] = torch.zeros(0)
            continue
        for part in ("to_k", "to_v"):
            weights[f"{key}.{part}_custom_diffusion.weight"] = getattr(layer, part).weight
    path = Path(folder) / CUSTOM_DIFFUSION_WEIGHTS
    save_tensors(weights, path, metadata)
    return path


def load_custom_diffusion(pipe_or_unet: Any, path: str | Path) -> None:
    """Puts Custom Diffusion's W_k and W_v beside the U-Net's own, as diffusers does, in its dtype and on its device.

    `path` is the safetensors file or its folder; files without the empty entries are read too. ValueError when it is
    damaged, a pickle, or does not fit this U-Net, or when the U-Net has such weights already: it is untouched then.
    """
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0

    unet = unwrapped(getattr(pipe_or_unet, "unet", pipe_or_unet))
    path = Path(path)
    path = path / CUSTOM_DIFFUSION_WEIGHTS if path.is_dir() else path
    weights = {key: tensor for key, tensor in load_tensors(path).items() if tensor.numel()}
    layers, processors = cross_attention(unet), dict(unet.attn_processors)
    if any(hasattr(layer.processor, "to_k_custom_diffusion") for layer in layers.values()):
        raise ValueError(
            f"This U-Net has Custom Diffusion's weights already, which those of {path} would replace: call "
            "unet.set_attn_processor(AttnProcessor2_0()) first, of diffusers, or load them into another pipeline."
        )
    for name, layer in layers.items():
        found = {
            part: weights.pop(f"{name}.processor.{part}_custom_diffusion.weight", None) for part in ("to_k", "to_v")
        }
        for part, weight in found.items():
            projection = base_layer(getattr(layer, part))
            expected = [projection.out_features, projection.in_features]
            if weight is None or list(weight.shape) != expected:
                got = "none" if weight is None else list(weight.shape)
                raise ValueError(
                    f"{path} does not fit this base model: expected {part} of {name} of shape {expected}, got {got}. "
                    "Load the base it was made for."
                )
        out, width = found["to_k"].shape
        processor = CustomDiffusionAttnProcessor2_0(
            train_kv=True, train_q_out=False, hidden_size=out, cross_attention_dim=width
        )
        processor.load_state_dict({f"{part}_custom_diffusion.weight": weight for part, weight in found.items()})
        processors[f"{name}.processor"] = processor.to(unet.device, unet.dtype).requires_grad_(False)
    if weights:
        raise ValueError(f"{path} holds what Custom Diffusion's W_k and W_v do not: {', '.join(sorted(weights)[:3])}.")
    unet.set_attn_processor(processors)


def save_embeddings(folder: str | Path, rows: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Writes token embeddings, token -> [n, D], for `pipe.load_textual_inversion(folder)`. Returns the file."""
    path = Path(folder) / EMBEDDINGS
    save_tensors({token: row.squeeze(0) if len(row) == 1 else row for token, row in rows.items()}, path, metadata)
    return path


def save_concept(folder: str | Path, **fields: Any) -> None:
    """Writes concept.json: method, phrase, class_noun, dummy, base_model, base_fingerprint (before training)."""
    save_json(fields, Path(folder) / CONCEPT)


def read_concept(folder: str | Path) -> dict[str, Any]:
    """concept.json. ValueError when it is missing or damaged, or does not say all that `load` asks."""
    said = load_json(Path(folder) / CONCEPT)
    missing = [name for name in ("phrase", "class_noun", "base_model", "base_fingerprint") if name not in said]
    if missing:
        raise ValueError(f"{Path(folder) / CONCEPT} lacks {', '.join(missing)}: write it by `save_concept`.")
    return said


# What people have


@dataclass
class Customized:
    """A customised model to draw with: `pipe`, the concept in it and, where `pipe` lost the base's weights, `base`."""

    pipe: Any
    concept: Concept
    base: Any = None

    def aligned(self, **settings: Any) -> AbstractContextManager:
        """Inside, `pipe` draws the concept with AlignIT; `settings` as of `alignit`."""
        return alignit(self.pipe, [self.concept], base=self.base, **settings)

    def plain(self) -> AbstractContextManager:
        """Inside, `pipe` draws the concept as its customiser meant it."""
        learned = self.concept.learned
        return nullcontext() if learned is None else concepts.Concepts([learned]).applied(self.pipe)


def load(
    pipe: Any,
    path: str | Path,
    phrase: str | None = None,
    class_noun: str | None = None,
    dummy: str | None = None,
    adapter_name: str = "default",
) -> Customized:
    """What was trained, loaded into a stock pipeline of its base.

    `path`: a folder of `training/customize.py` or `training/neti.py` (which say what the concept is called); a file of
    Textual Inversion; a LoRA of diffusers, peft or kohya, or Custom Diffusion's weights, with
    learned_embeds.safetensors beside them or not; a folder with the unet/ (and text encoders) of DreamBooth. Of
    others' files, `phrase` and `class_noun` say what prompts call it. `dummy`: AlignIT's, a text the concept was
    trained in; what the folder says, else "a photo of {}". `adapter_name`: of a LoRA. The pipeline is changed;
    DreamBooth gets one of its own.

    Raises ValueError for a pickle, a damaged file, one that fits another base, a missing name, or a customiser of the
    same kind that the pipeline has already.
    """
    path = Path(resolve(path))
    if not path.exists():
        raise ValueError(f"{path} does not exist: expected a folder or a safetensors file.")
    if (path / CONCEPT).is_file():
        said = read_concept(path)
        # a quantised base has other weights, of which none can tell what they were
        if not getattr(pipe.unet, "is_quantized", False) and said["base_fingerprint"] != fingerprint(pipe.unet):
            raise ValueError(
                f"{path} was trained on another base model ({said['base_model']}): W_k and W_v differ. Load that base."
            )
        phrase, class_noun = phrase or said["phrase"], class_noun or said["class_noun"]
        dummy = dummy or said.get("dummy")
    elif (path / "config.json").is_file():
        learned = concepts.load(path).concepts[0]
        learned.check(pipe)
        noun = class_noun or learned.super_category_token
        return Customized(pipe, Concept(learned.placeholder_token, noun, dummy or DUMMY, learned))
    if not (phrase and class_noun):
        raise ValueError(f"{path} does not say what its concept is called: pass phrase and class_noun.")
    concept = Concept(phrase, class_noun, dummy or DUMMY)
    if (path / "unet").is_dir():
        return Customized(_dreambooth(pipe, path), concept, base=pipe)

    names = (LORA_WEIGHTS, PEFT_WEIGHTS, CUSTOM_DIFFUSION_WEIGHTS, EMBEDDINGS)
    file = next((path / name for name in names if (path / name).is_file()), path)
    if file.is_dir():
        raise ValueError(f"{path} holds nothing that is known here: expected one of {', '.join(names)}, or unet/.")
    keys = load_tensors(file).keys()
    if any("_custom_diffusion" in key for key in keys):
        load_custom_diffusion(pipe, file)
    elif any("lora" in key for key in keys):
        if any(adapter_name in getattr(part, "peft_config", {}) for part in pipe.components.values()):
            raise ValueError(
                f"adapter {adapter_name!r} is already loaded: call pipe.unload_lora_weights() first, or choose another "
                "adapter_name."
            )
        load_lora_file(pipe, file, adapter_name)
    else:
        learned = concepts.load(file, super_category_token=class_noun, placeholder_token=phrase).concepts[0]
        learned.check(pipe)
        return Customized(pipe, replace(concept, learned=learned))
    if (file.parent / EMBEDDINGS).is_file():  # a token that was learnt with the weights
        pipe.load_textual_inversion(str(file.parent), weight_name=EMBEDDINGS)
    return Customized(pipe, concept)


def changes_weights(path: str | Path) -> bool:
    """Whether a customiser's folder or file, as of `load`, holds more than rows of text."""
    path = Path(resolve(path))
    if (path / CONCEPT).is_file() or (path / "unet").is_dir():
        return True
    names = (LORA_WEIGHTS, PEFT_WEIGHTS, CUSTOM_DIFFUSION_WEIGHTS)
    file = next((path / name for name in names if (path / name).is_file()), path)
    return file.is_file() and any("lora" in key or "_custom_diffusion" in key for key in load_tensors(file))


def lora_file(path: str | Path) -> Path:
    """The weights in a LoRA's folder, as diffusers or PEFT calls them, or the file itself."""
    path = Path(resolve(path))
    if not path.is_dir():
        return path
    return path / (PEFT_WEIGHTS if (path / PEFT_WEIGHTS).is_file() else LORA_WEIGHTS)


def load_lora_file(pipe: Any, path: str | Path, adapter_name: str = "default") -> None:
    """A LoRA of the network, of the text encoders, or of both, into a stock pipeline. ValueError as `load_lora`.

    A text encoder that has it already, as another pipeline's that is shared, is left as it is.
    """
    file = lora_file(path)
    if any(key.startswith(("text_encoder", "lora_te")) for key in load_tensors(file)):
        try:
            with _text_encoders_once(pipe, adapter_name):
                pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=adapter_name)
        except (ValueError, RuntimeError) as error:  # peft's and torch's, of layers and of shapes
            said = str(error).strip().splitlines()[0]
            raise ValueError(f"{file} does not fit this base model: {said} Load the base it was made for") from error
    else:
        load_lora(pipe, file, adapter_name)


@contextmanager
def _text_encoders_once(pipe: Any, adapter_name: str) -> Iterator[None]:
    """Inside, `pipe.load_lora_weights` passes over text encoders that have this adapter."""
    load = pipe.load_lora_into_text_encoder

    def load_once(*args: Any, text_encoder: Any, **kwargs: Any) -> None:
        if adapter_name not in getattr(text_encoder, "peft_config", {}):
            load(*args, text_encoder=text_encoder, **kwargs)

    pipe.load_lora_into_text_encoder = load_once
    try:
        yield
    finally:
        del pipe.load_lora_into_text_encoder


def _dreambooth(pipe: Any, path: Path) -> Any:
    """A pipeline with the U-Net (and text encoders) of a folder, and the rest of `pipe`."""
    parts = dict(pipe.components)
    for name in ("unet", "text_encoder", "text_encoder_2"):
        if name in parts and (path / name).is_dir():
            dtype, device = parts[name].dtype, parts[name].device
            own = read_pretrained(type(parts[name]), path, subfolder=name, dtype=dtype)
            parts[name] = own.to(device).eval().requires_grad_(False)
    known = inspect.signature(type(pipe).__init__).parameters
    settings = {name: value for name, value in pipe.config.items() if name in known and name not in parts}
    if "add_watermarker" in known:  # which no config tells
        settings["add_watermarker"] = pipe.watermark is not None
    return type(pipe)(**parts, **settings)
