"""Weights in the names of the models' original code, as one file holds them: the inverse of what diffusers reads."""

import re

import torch
from torch import Tensor

from alignkit.base import Base

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def unet_key(key: str, layers: int, first_up_has_attention: bool = False) -> str:
    """The key of Stability's code for diffusers' key of a U-Net, `layers` a block. SDXL's first up block attends."""
    name, _, kind = key.rpartition(".")
    if name in UNET:
        return f"{UNET[name]}.{kind}"
    part, *rest = key.split(".")
    if part == "mid_block":
        kind, i, *rest = rest
        place = f"middle_block.{2 * int(i) if kind == 'resnets' else 1}"
    else:
        block, kind, i, *rest = rest
        block, i = int(block), int(i)
        down = part == "down_blocks"
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest[-1]}"
        if kind == "upsamplers":  # behind the resnet, and behind the attention where there is one
            place = 2 if block or first_up_has_attention else 1
            return f"output_blocks.{block * (layers + 1) + layers}.{place}.conv.{rest[-1]}"
        number = block * (layers + 1) + i + (1 if down else 0)
        place = f"{'input' if down else 'output'}_blocks.{number}.{0 if kind == 'resnets' else 1}"
    if kind == "resnets":
        rest[0] = RESNET[rest[0]]
    return ".".join([place, *rest])


def vae_key(key: str, blocks: int) -> str:
    parts = key.split(".")
    if parts[1] in ("down_blocks", "up_blocks"):
        down = parts[1] == "down_blocks"
        level = int(parts[2]) if down else blocks - 1 - int(parts[2])  # counted from the finest
        if parts[3] == "resnets":
            place = f"{parts[0]}.{'down' if down else 'up'}.{level}.block.{parts[4]}"
        else:
            place = f"{parts[0]}.{'down' if down else 'up'}.{level}.{'downsample' if down else 'upsample'}"
        rest = parts[5:]
    elif parts[1:3] == ["mid_block", "resnets"]:
        place, rest = f"{parts[0]}.mid.block_{int(parts[3]) + 1}", parts[4:]
    elif parts[1:3] == ["mid_block", "attentions"]:
        names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
        return f"{parts[0]}.mid.attn_1.{names[parts[4]]}.{parts[-1]}"
    else:
        return key.replace("conv_norm_out", "norm_out")
    return ".".join([place, *rest]).replace("conv_shortcut", "nin_shortcut")


def open_clip(clip: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' CLIP in the names of OpenCLIP, with queries, keys and values in one."""
    names = {
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "final_layer_norm": "ln_final", "encoder.layers": "transformer.resblocks", "layer_norm": "ln_",
        "fc1": "c_fc", "fc2": "c_proj", "self_attn": "attn",
    }  # fmt: skip
    tensors = {}
    for key, tensor in clip.items():
        key = key.removeprefix("text_model.")
        if key == "text_projection.weight":
            tensors["text_projection"] = tensor.T.contiguous()
            continue
        for name, original in names.items():
            key = key.replace(name, original)
        tensors[key] = tensor
    return fused(tensors, ("q_proj.", "k_proj.", "v_proj."), "in_proj_")


def fused(tensors: dict[str, Tensor], parts: tuple[str, ...], name: str) -> dict[str, Tensor]:
    """`parts` side by side under `name`, wherever the first is."""
    heads = [(key, *key.rsplit(parts[0], 1)) for key in tensors if parts[0] in key]
    for key, start, end in heads:
        tensors = tensors | {f"{start}{name}{end}": torch.cat([tensors[f"{start}{part}{end}"] for part in parts])}
        del tensors[key]
    return {key: tensor for key, tensor in tensors.items() if not any(part in key for part in parts)}


SD3 = {
    r"^pos_embed\.proj": "x_embedder.proj",
    r"^pos_embed\.pos_embed": "pos_embed",
    r"^time_text_embed\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
    r"^time_text_embed\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
    r"^time_text_embed\.text_embedder\.linear_1": "y_embedder.mlp.0",
    r"^time_text_embed\.text_embedder\.linear_2": "y_embedder.mlp.2",
    r"^transformer_blocks\.": "joint_blocks.",
    r"attn\.to_out\.0": "x_block.attn.proj",
    r"attn\.to_add_out": "context_block.attn.proj",
    r"norm1\.linear": "x_block.adaLN_modulation.1",
    r"norm1_context\.linear": "context_block.adaLN_modulation.1",
    r"ff\.net\.0\.proj": "x_block.mlp.fc1",
    r"ff\.net\.2": "x_block.mlp.fc2",
    r"ff_context\.net\.0\.proj": "context_block.mlp.fc1",
    r"ff_context\.net\.2": "context_block.mlp.fc2",
}
FLUX = {
    r"^time_text_embed\.timestep_embedder\.linear_1": "time_in.in_layer",
    r"^time_text_embed\.timestep_embedder\.linear_2": "time_in.out_layer",
    r"^time_text_embed\.text_embedder\.linear_1": "vector_in.in_layer",
    r"^time_text_embed\.text_embedder\.linear_2": "vector_in.out_layer",
    r"^time_text_embed\.guidance_embedder\.linear_1": "guidance_in.in_layer",
    r"^time_text_embed\.guidance_embedder\.linear_2": "guidance_in.out_layer",
    r"^context_embedder": "txt_in",
    r"^x_embedder": "img_in",
    r"^single_transformer_blocks\.": "single_blocks.",
    r"^transformer_blocks\.": "double_blocks.",
    r"norm1\.linear": "img_mod.lin",
    r"norm1_context\.linear": "txt_mod.lin",
    r"norm\.linear": "modulation.lin",
    r"attn\.norm_q\.weight": "img_attn.norm.query_norm.scale",
    r"attn\.norm_k\.weight": "img_attn.norm.key_norm.scale",
    r"attn\.norm_added_q\.weight": "txt_attn.norm.query_norm.scale",
    r"attn\.norm_added_k\.weight": "txt_attn.norm.key_norm.scale",
    r"attn\.to_out\.0": "img_attn.proj",
    r"attn\.to_add_out": "txt_attn.proj",
    r"ff\.net\.0\.proj": "img_mlp.0",
    r"ff\.net\.2": "img_mlp.2",
    r"ff_context\.net\.0\.proj": "txt_mlp.0",
    r"ff_context\.net\.2": "txt_mlp.2",
    r"(?<=\d\.)proj_out": "linear2",
    r"(single_blocks\.\d+\.)img_attn\.": r"\1",
}
QUERIES, TEXT_QUERIES = (
    ("attn.to_q.", "attn.to_k.", "attn.to_v."),
    ("attn.add_q_proj.", "attn.add_k_proj.", "attn.add_v_proj."),
)


def transformer(network: torch.nn.Module) -> dict[str, Tensor]:
    """SD3's or FLUX's."""
    tensors = network.state_dict()
    is_flux = "x_embedder.weight" in tensors
    if is_flux:
        single = {k: t for k, t in tensors.items() if k.startswith("single_")}
        double = {k: t for k, t in tensors.items() if k not in single}
        single = fused(single, (*QUERIES, "proj_mlp."), "linear1.")
        tensors = single | fused(fused(double, QUERIES, "img_attn.qkv."), TEXT_QUERIES, "txt_attn.qkv.")
    else:
        tensors = fused(fused(tensors, QUERIES, "x_block.attn.qkv."), TEXT_QUERIES, "context_block.attn.qkv.")
    last = f"transformer_blocks.{network.config.num_layers - 1}.norm1_context."
    named = {}
    for key, tensor in tensors.items():
        if key.startswith("norm_out.") or (key.startswith(last) and not is_flux):  # the original has the shift first
            tensor = torch.cat(tensor.chunk(2)[::-1])
        if not re.match(r"(single_)?transformer_blocks\.", key):
            key = key.replace("norm_out.linear", "final_layer.adaLN_modulation.1").replace(
                "proj_out", "final_layer.linear"
            )
        for pattern, name in (FLUX if is_flux else SD3).items():
            key = re.sub(pattern, name, key)
        named[key] = tensor
    return named


def single_file(base: Base) -> dict[str, Tensor]:
    """The whole model: as published of SD and SDXL, of SD3 with its text encoders, of FLUX the transformer alone."""
    name = base.family.label
    if name == "FLUX.1":
        return transformer(base.network)
    parts = {"first_stage_model": {}}
    blocks = len(base.vae.config.block_out_channels)
    for key, tensor in base.vae.state_dict().items():
        as_convolution = "attn" in key or "attentions" in key
        tensor = tensor[..., None, None] if as_convolution and tensor.ndim == 2 else tensor
        parts["first_stage_model"][vae_key(key, blocks)] = tensor
    text = {n: getattr(base.pipe, n).state_dict() for n in base.family.single_file if n.startswith("text_encoder")}
    classic = {n: {f"text_model.{k.removeprefix('text_model.')}": t for k, t in text[n].items()} for n in text}
    if name == "SD3":
        parts["model.diffusion_model"] = transformer(base.network)
        for part, original in {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}.items():
            parts[f"text_encoders.{original}.transformer"] = text[part]
        parts["text_encoders.t5xxl.transformer"] = text["text_encoder_3"]
    else:
        is_xl = name == "SDXL"
        parts["model.diffusion_model"] = {
            unet_key(key, base.unet.config.layers_per_block, is_xl): tensor
            for key, tensor in base.unet.state_dict().items()
        }
        if is_xl:
            parts["conditioner.embedders.0.transformer"] = classic["text_encoder"]
            parts["conditioner.embedders.1.model"] = open_clip(text["text_encoder_2"])
        elif base.schedule.prediction_type == "v_prediction":  # SD 2.1, which leaves OpenCLIP's last layer out
            tower = open_clip(text["text_encoder"])
            last = {key.replace(".22.", ".23."): tensor + 1 for key, tensor in tower.items() if ".22." in key}
            width = base.text_encoder.config.hidden_size
            parts["cond_stage_model.model"] = tower | last | {"text_projection": torch.eye(width)}
        else:
            parts["cond_stage_model.transformer"] = classic["text_encoder"]
    prefixed = {f"{part}.{key}": tensor for part, tensors in parts.items() for key, tensor in tensors.items()}
    return {key: tensor.contiguous() for key, tensor in prefixed.items() if "embed_tokens" not in key}  # tied in T5
