"""Files that do not fit: said in one sentence that names the file or layer, before any work."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import alignkit
from alignkit import alignment
from alignkit.artifacts import remove
from alignkit.base import load_base
from alignkit.cli import main
from alignkit.controlnet import draw_controlled, new_controlnet
from alignkit.emoji import measure
from alignkit.emoji.judges import AestheticHead, DensityCounter
from alignkit.personalization import draw_concept
from alignkit.rewards import build_reward
from alignkit.rewards.aesthetic import load_head
from alignkit.run import Run
from tests.test_families import thin
from tests.tiny import save_tiny_model
from tests.tiny_models import open_clip, owlvit, siglip
from tests.toy import toy_config, toy_params
from tests.toy_rewards import Red


@pytest.fixture
def saved(tmp_path) -> Path:
    """A whole model, weights and all."""
    (tmp_path / "configs").mkdir()
    pipe = load_base(save_tiny_model(tmp_path / "configs"), random_init=True).pipeline()
    pipe.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_base_with_missing_parts_is_refused_by_the_parts_name(saved, tmp_path):
    load_base(str(saved))
    for part, missing in [("unet", ""), ("vae", "diffusion_pytorch_model.safetensors"), ("text_encoder", "")]:
        folder = shutil.copytree(saved, tmp_path / part)
        remove(folder / part / missing)
        with pytest.raises((OSError, ValueError), match=part):
            load_base(str(folder))


@pytest.mark.parametrize(
    ("part", "key"),
    [("unet", "conv_in.bias"), ("vae", "decoder.conv_in.bias"), ("text_encoder", "encoder.layers.0.mlp.fc1.bias")],
)
def test_a_base_with_missing_weights_is_refused_by_their_names(saved, part, key):
    """Neither random numbers, as transformers fills in, nor diffusers' empty ones."""
    (path,) = (saved / part).glob("*.safetensors")
    tensors = load_file(path)
    (name,) = (name for name in tensors if name.endswith(key))
    save_file({k: t for k, t in tensors.items() if k != name}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"is incomplete.* .*{key}"):
        load_base(str(saved))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "open_clip_pytorch_model.bin"])
def test_a_reward_whose_weights_are_a_pickle_says_how_to_rewrite_them(name, tmp_path):
    if name == "pytorch_model.bin":
        args = {"model": siglip(tmp_path / "folder")}
    else:
        args = {"model": open_clip(tmp_path / "folder")[0]}
    build_reward("alignment", **args)
    (safe,) = (tmp_path / "folder").glob("*.safetensors")
    torch.save(load_file(safe), tmp_path / "folder" / name)
    torch.save({}, tmp_path / "folder" / "optimizer.pt")
    safe.unlink()
    with pytest.raises(ValueError, match=f"its weights in {name} alone.* can run anything. Rewrite it: ") as error:
        build_reward("alignment", **args)
    main(str(error.value).partition("Rewrite it: alignkit ")[2].split())
    build_reward("alignment", **args)


def test_open_clips_model_of_the_hub_whose_weights_are_a_pickle(tmp_path, monkeypatch):
    def download(filename: str, **where) -> str:
        if filename.endswith(".safetensors"):
            raise FileNotFoundError
        return str(tmp_path / filename)

    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", download)
    with pytest.raises(ValueError, match="hf-hub:owner/name has its weights in .*bin alone.* local-dir:FOLDER"):
        build_reward("alignment", model="hf-hub:owner/name")


@pytest.mark.parametrize(("write", "reward"), [(siglip, "alignment"), (owlvit, "object_presence")])
def test_a_reward_with_missing_or_other_weights_is_refused_by_their_names(write, reward, tmp_path):
    args = {"model": write(tmp_path)} | ({"object": "cat"} if reward == "object_presence" else {})
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if name.endswith("fc1.weight"))
    for changed, message in [
        ({k: t for k, t in tensors.items() if k != name}, "is incomplete, it lacks .*fc1.weight"),
        (
            tensors | {name: torch.zeros(3, 32)},
            r"does not fit its config.json: expected .*fc1.weight of .* got \[3, 32\]",
        ),
    ]:
        save_file(changed, path, {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            build_reward(reward, **args)


def test_a_model_that_sees_a_picture_beside_the_noise_is_refused(tmp_path):
    """As SD 1.5's for inpainting, which some save as a StableDiffusionPipeline."""
    with pytest.raises(ValueError, match="reads 9 channels and gives 4: it is a model for inpainting"):
        load_base(thin("sd15", tmp_path, in_channels=9), random_init=True, shrink=40)


def test_weights_of_another_shape_are_refused_by_name(saved):
    path = saved / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"conv_in.weight": torch.zeros(3, 4, 3, 3)}, path)
    with pytest.raises(ValueError, match="conv_in.weight"):
        load_base(str(saved))


@pytest.mark.parametrize("layer", ["input_blocks_4_1_transformer_blocks_0_attn1_to_q", "double_blocks_0_img_attn_proj"])
def test_a_lora_of_another_family_with_text_encoders(layer, saved, tmp_path):
    """Of SDXL and of FLUX: what the network alone has is refused by artifacts.load_lora, see tests/test_families.py."""
    names = (f"lora_unet_{layer}", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj")
    save_file(
        {f"{name}.lora_{side}.weight": torch.ones(16, 16) for name in names for side in ("down", "up")},
        tmp_path / "other.safetensors",
    )
    pipe = load_base(str(saved)).pipeline()
    with pytest.raises(
        ValueError, match="other.safetensors does not fit this base model: .* Load the base it was made for"
    ):
        alignkit.compose(pipe, loras={"style": tmp_path / "other.safetensors"})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"layers.0.weight": torch.zeros(4, 8)}, r"layers.0 of \[n, 8\] with a bias .* got no bias"),
        (
            {"layers.0.weight": torch.zeros(4, 8), "layers.0.bias": torch.zeros(4), "layers.2.bias": torch.zeros(1)}
            | {"layers.2.weight": torch.zeros(1, 5)},
            r"layers.2 of \[n, 4\] .* got \[1, 5\] and \[1\]",
        ),
        ({"layers.0.weight": torch.zeros(4, 8), "layers.0.bias": torch.zeros(4)}, "ends in one score, got 4"),
    ],
)
def test_an_aesthetic_head_of_the_wrong_shape(tensors, message, tmp_path):
    save_file(tensors, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=message):
        load_head(str(tmp_path / "head.safetensors"))


def test_a_judges_folder_whose_weights_do_not_fit_its_config(tmp_path):
    DensityCounter((8, 8, 8)).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"density.weight": torch.zeros(1, 16, 1, 1)}, path)
    with pytest.raises(ValueError, match=r"(?s)count: the weights named by .* do not fit its model.*density.weight"):
        build_reward("count", model=str(tmp_path))
    save_file({key: tensor for key, tensor in load_file(path).items() if key != "density.weight"}, path)
    with pytest.raises(ValueError, match="(?s)do not fit its model.*Missing key.*density.weight"):
        build_reward("count", model=str(tmp_path))
    AestheticHead(5).save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match="expected a head for embeddings of .* numbers .*, got one for 5"):
        build_reward("aesthetic", head=str(tmp_path / "head"))


def test_an_overflow_in_float16_says_what_to_do(tmp_path):
    run = Run(toy_config(tmp_path, mixed_precision="fp16", dry_run=True))
    run.prepare(params := toy_params())
    with pytest.raises(FloatingPointError, match="float16 ends at 65,504: try mixed_precision bf16"):
        for step in run.steps():
            for indices in run.micro_batches(step):
                run.backward((params["layer.bias"].sum() * 0 + 1e5).half().expand(len(indices)))
    images = torch.tensor([0.5, 1e5]).half().view(2, 1, 1, 1)
    with pytest.raises(FloatingPointError, match=r"(?s)images \[1\] of 2 are not finite after 0 steps.*try .* bf16"):
        run.require_finite(images, "the validation's images")


WORD = SimpleNamespace(
    concepts=[SimpleNamespace(placeholder_token="cat", alignit=False)], applied=lambda pipe, truncation: nullcontext()
)
DRAWS = {
    "compose": lambda base: alignkit.compose(base)("a cat", seed=0, num_inference_steps=1),
    "latents": lambda base: alignkit.compose(base)("a cat", seed=0, num_inference_steps=1, output_type="latent"),
    "best of two": lambda base: alignkit.compose(base)("a cat", reward=Red(), best_of=2, num_inference_steps=1),
    "evaluate reward": lambda base: measure.draw(base, ["a cat"], num_inference_steps=1),
    "evaluate personalization": lambda base: draw_concept(base, WORD, ["a {}"], 1, num_inference_steps=1),
    "evaluate alignment": lambda base: alignment._sample(base.pipeline(), "a cat", alignment.Settings(1), 0),
    "evaluate controllability": lambda base: draw_controlled(
        base, new_controlnet(base.unet, base.vae_scale_factor), torch.zeros(1, 3, 16, 16), ["a cat"], [0],
        num_inference_steps=1, guidance_scale=2.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", DRAWS)
def test_a_picture_that_overflows_in_float16_is_said_and_not_black(how, saved):
    base = load_base(str(saved), dtype=torch.float16)
    DRAWS[how](base)
    base.unet.conv_in.weight.data.fill_(6e4)
    with pytest.raises(FloatingPointError, match=r"\[0.*\] of \d are not finite.*float16 ends at 65,504"):
        DRAWS[how](base)
    base = load_base(str(saved))
    base.unet.conv_in.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="In float32 it is not the precision"):
        DRAWS[how](base)


def test_the_command_says_that_a_picture_overflows(saved, tmp_path):
    path = saved / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"conv_in.weight": tensors["conv_in.weight"].fill_(6e4)}, path)
    line = ["generate", "--prompt", "a cat", "--model", str(saved), "--num_inference_steps", "1", "--output_dir"]
    with pytest.raises(SystemExit, match="alignkit generate: Pictures .* draw in bfloat16 or float32"):
        main([*line, str(tmp_path / "out"), "--dtype", "float16"])
    assert not (tmp_path / "out").exists()
    main([*line, str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
