"""A ControlNet in one file, in the original code's names or in diffusers'."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignkit.base import load_base
from alignkit.controlnet import load_controlnet, new_controlnet, save_controlnet
from tests.original_names import unet_key
from tests.test_families import thin

OWN = [
    (r"controlnet_down_blocks\.(\d+)", r"zero_convs.\1.0"),
    (r"controlnet_mid_block", "middle_block_out.0"),
    (r"controlnet_cond_embedding\.conv_in", "input_hint_block.0"),
    (r"controlnet_cond_embedding\.conv_out", "input_hint_block.14"),
    (r"controlnet_cond_embedding\.blocks\.(\d)", lambda match: f"input_hint_block.{2 * int(match[1]) + 2}"),
]


def original_name(key: str) -> str:
    """The key of the authors' code: a U-Net's encoder, and what a ControlNet has beside it."""
    module, _, kind = key.rpartition(".")
    for pattern, name in OWN:
        if re.fullmatch(pattern, module):
            return f"{re.sub(pattern, name, module)}.{kind}"
    return unet_key(key, layers=1)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_single_file_in_either_names_is_the_same_controlnet(name, tmp_path):
    base = load_base(thin(name, tmp_path / name), random_init=True, shrink=40)
    made = new_controlnet(base.unet, base.vae_scale_factor)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data.normal_(generator=generator)
    file = save_controlnet(tmp_path / "folder", made)
    tensors = load_file(file)
    save_file({f"control_model.{original_name(k)}": t for k, t in tensors.items()}, tmp_path / "original.safetensors")
    for path in (file, tmp_path / "original.safetensors"):
        loaded = load_controlnet(str(path), base.unet, base.vae_scale_factor).state_dict()
        assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[key], tensors[key]) for key in tensors)

    save_file(tensors | {"conv_in.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"not a ControlNet of this base: of conv_in.weight expected \[.*got \[1\] \(1"
    ):
        load_controlnet(str(tmp_path / "other.safetensors"), base.unet, base.vae_scale_factor)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_controlnet(str(tmp_path / "none.safetensors"), base.unet, base.vae_scale_factor)
