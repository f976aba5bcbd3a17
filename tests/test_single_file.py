"""Base models from one .safetensors file, with the configs of a local folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignkit.artifacts import save_tensors
from alignkit.base import load_base

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip


def original_unet_key(key: str, layers: int) -> str:
    """The key of Stability's code for diffusers' key of a U-Net with `layers` a block."""
    outside = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    }  # fmt: skip
    name, _, kind = key.rpartition(".")
    if name in outside:
        return f"{outside[name]}.{kind}"
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
        if kind == "upsamplers":  # behind the resnet, and behind the attention where there is one: not in block 0
            return f"output_blocks.{block * (layers + 1) + layers}.{1 if block == 0 else 2}.conv.{rest[-1]}"
        number = block * (layers + 1) + i + (1 if down else 0)
        place = f"{'input' if down else 'output'}_blocks.{number}.{0 if kind == 'resnets' else 1}"
    if kind == "resnets":
        rest[0] = RESNET[rest[0]]
    return ".".join([place, *rest])


def original_vae_key(key: str, blocks: int) -> str:
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


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """SD 1.5 at a fortieth of its widths, as one file in the original layout; its configs and tokenizer as a folder."""
    folder = tmp_path_factory.mktemp("single")
    base = load_base("sd15", random_init=True, shrink=40)
    layers, blocks = base.unet.config.layers_per_block, len(base.vae.config.block_out_channels)
    tensors = {
        f"model.diffusion_model.{original_unet_key(key, layers)}": tensor
        for key, tensor in base.unet.state_dict().items()
    }
    for key, tensor in base.vae.state_dict().items():
        key = original_vae_key(key, blocks)
        tensors[f"first_stage_model.{key}"] = tensor[..., None, None] if "attn" in key and tensor.ndim == 2 else tensor
    for key, tensor in base.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
    save_tensors(tensors, folder / "model.safetensors")
    base.pipeline().save_pretrained(folder / "config")
    for weights in (folder / "config").rglob("*.safetensors"):
        weights.unlink()
    return base, folder


def test_a_single_file_gives_the_same_model(model):
    base, folder = model
    loaded = load_base(str(folder / "model.safetensors"), config=str(folder / "config"))
    for name in ("unet", "vae", "text_encoder"):
        expected, got = getattr(base, name).state_dict(), getattr(loaded, name).state_dict()
        assert expected.keys() == got.keys()
        assert all(torch.equal(got[key], tensor) for key, tensor in expected.items()), name
    assert loaded.schedule.prediction_type == "epsilon"
    assert torch.equal(loaded.encode_prompt(["a cat"]), base.encode_prompt(["a cat"]))


def test_what_is_wrong_with_a_file_is_said(model, tmp_path):
    _, folder = model
    config = str(folder / "config")
    with pytest.raises(ValueError, match="does not exist"):
        load_base(str(tmp_path / "nowhere.safetensors"), config=config)
    torch.save({}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="is a pickle by its name"):
        load_base(str(tmp_path / "model.ckpt"), config=config)
    with pytest.raises(ValueError, match="config goes with a .safetensors file"):
        load_base("emoji", config=config)

    tensors = load_file(folder / "model.safetensors")
    no_text = {key: tensor for key, tensor in tensors.items() if not key.startswith("cond_stage_model")}
    save_file(no_text, tmp_path / "no_text.safetensors")
    with pytest.raises(ValueError, match="does not hold all of a model .* Name a complete diffusers folder"):
        load_base(str(tmp_path / "no_text.safetensors"), config=config)
    del tensors["model.diffusion_model.out.2.weight"]
    save_file(tensors, tmp_path / "torn.safetensors")
    with pytest.raises(ValueError, match="is incomplete"):
        load_base(str(tmp_path / "torn.safetensors"), config=config)

    other = shutil.copytree(folder / "config", tmp_path / "other")
    index = json.loads(Path(other, "model_index.json").read_text())
    Path(other, "model_index.json").write_text(json.dumps(index | {"_class_name": "KandinskyPipeline"}))
    with pytest.raises(ValueError, match="is a KandinskyPipeline"):
        load_base(str(folder / "model.safetensors"), config=str(other))
