"""pipelines/*.py through diffusers' own doors: custom_pipeline, save_pretrained and from_pretrained, schedulers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

import alignkit
from alignkit import concepts, customized
from alignkit.artifacts import save_lora
from alignkit.base import add_lora, load_base
from tests.test_alignit import shake
from tests.tiny import save_tiny_model, tiny_sdxl

ROOT = Path(__file__).parents[1]
PROMPT = "a <n> and a hat"
SETTINGS = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt", "height": 16, "width": 16}
STOCK = {"stable_diffusion": StableDiffusionPipeline, "stable_diffusion_xl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module", params=STOCK)
def world(request, tmp_path_factory):
    """(file, folder): a base with a LoRA, a ControlNet and a concept beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    base = load_base(save_tiny_model(folder / "configs"), random_init=True)
    pipe = base.pipeline() if request.param == "stable_diffusion" else tiny_sdxl(base.pipeline())
    pipe.save_pretrained(folder / "model")
    learned = concepts.create("p_plus", pipe, "<n>", "dog")
    shake(learned.module.parameters())
    learned.save(folder / "concept")
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8))
    shake(net.parameters(), 0.1)
    net.save_pretrained(folder / "controlnet")
    add_lora(pipe.unet, 2, 2, ["to_q", "to_k"])
    shake(p for name, p in pipe.unet.named_parameters() if ".lora_B." in name)
    save_lora(folder / "style", pipe.unet)
    return f"{ROOT}/pipelines/{request.param}.py", folder


def load(file, folder, **parts):
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=file, trust_remote_code=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def all_parts(folder):
    return {
        "loras": {"style": (str(folder / "style"), 0.7)},
        "concepts": [str(folder / "concept")],
        "controlnet": ControlNetModel.from_pretrained(folder / "controlnet"),
    }


def control():
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def modules_cache(tmp_path, monkeypatch):
    """Where diffusers copies a custom pipeline's file to."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_with_nothing_added_it_is_the_stock_pipeline(world):
    file, folder = world
    ours, stock = load(file, folder / "model"), STOCK[Path(file).stem].from_pretrained(folder / "model")
    assert type(ours).__name__.endswith("ComposedPipeline") and isinstance(ours, type(stock))
    for pipe in (ours, stock):
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    seen = []
    got = ours("a hat", seed=1, callback_on_step_end=lambda pipe, i, t, kwargs: seen.append(i) or kwargs, **SETTINGS)
    expected = stock("a hat", generator=torch.Generator().manual_seed(1), **SETTINGS)
    assert torch.equal(got.images, expected.images) and seen == [0, 1]


def test_a_controlnet_may_be_exchanged(world):
    file, folder = world
    pipe = load(file, folder / "model", **all_parts(folder))
    other = ControlNetModel.from_pretrained(folder / "controlnet")
    shake(other.parameters(), 0.1)
    fresh = load(file, folder / "model", **all_parts(folder) | {"controlnet": other})
    one = pipe(PROMPT, control_image=control(), seed=1, **SETTINGS).images
    pipe.controlnet = other
    two = pipe(PROMPT, control_image=control(), seed=1, **SETTINGS).images
    assert not torch.equal(one, two)
    assert torch.equal(two, fresh(PROMPT, control_image=control(), seed=1, **SETTINGS).images)


def test_saved_and_loaded_it_draws_the_same(world, tmp_path):
    file, folder = world
    pipe = load(file, folder / "model", **all_parts(folder))
    call = {"control_image": control(), "alignit": True, "seed": 3, **SETTINGS}
    drawn = pipe(PROMPT, **call).images
    composed = alignkit.compose(STOCK[Path(file).stem].from_pretrained(folder / "model"), **all_parts(folder))
    assert torch.equal(composed(PROMPT, **call).images, drawn)
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(pipe(PROMPT, **call).images, drawn)

    moved = (tmp_path / "saved").rename(tmp_path / "moved")
    again = load(file, moved)
    assert torch.equal(again(PROMPT, **call).images, drawn)
    assert str(moved) in json.dumps(again.config["loras"]) and str(moved) in json.dumps(again.config["concepts"])
    again.save_pretrained(moved)
    assert torch.equal(load(file, moved)(PROMPT, **call).images, drawn)

    stock = STOCK[Path(file).stem].from_pretrained(moved)
    plain = STOCK[Path(file).stem].from_pretrained(folder / "model")
    one, two = (p("a hat", generator=torch.Generator().manual_seed(1), **SETTINGS).images for p in (stock, plain))
    assert torch.equal(one, two)


@pytest.mark.parametrize("part", [None, "loras", "concepts"])
def test_one_part_or_none_is_saved_and_loaded(world, tmp_path, part):
    file, folder = world
    pipe = load(file, folder / "model", **{part: all_parts(folder)[part]} if part else {})
    pipe.save_pretrained(tmp_path / "saved")
    again = load(file, tmp_path / "saved")
    prompt = PROMPT if part == "concepts" else "a hat"
    assert torch.equal(again(prompt, seed=3, **SETTINGS).images, pipe(prompt, seed=3, **SETTINGS).images)


FRESH = """
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline=sys.argv[2], trust_remote_code=True)
call = torch.load(sys.argv[3])
torch.save(pipe(**call).images, sys.argv[4])
"""


def test_in_a_fresh_process(world, tmp_path):
    file, folder = world
    pipe = load(file, folder / "model", **all_parts(folder))
    call = {"prompt": PROMPT, "control_image": control(), "alignit": True, "seed": 3, **SETTINGS}
    pipe.save_pretrained(tmp_path / "saved")
    torch.save(call, tmp_path / "call")
    command = [sys.executable, "-c", FRESH, tmp_path / "saved", file, tmp_path / "call", tmp_path / "images"]
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT)
    assert torch.equal(torch.load(tmp_path / "images"), pipe(**call).images)


def test_a_file_that_does_not_fit(world):
    file, folder = world
    with pytest.raises(ValueError, match="does not exist"):
        load(file, folder / "model", loras={"style": str(folder / "nothing")})
    with pytest.raises(ValueError, match="does not exist"):
        load(file, folder / "model", concepts=[str(folder / "nothing")])


def test_an_adapter_loaded_past_it(world):
    file, folder = world
    pipe = load(file, folder / "model")
    pipe.load_lora_weights(folder / "style", adapter_name="late")
    with pytest.raises(ValueError, match="'late' was loaded into this pipeline after it was composed"):
        pipe("a hat", **SETTINGS)


@pytest.mark.parametrize("kind", ["dreambooth", "custom_diffusion"])
def test_weights_beside_the_base_are_moved_with_it(world, tmp_path, kind):
    """To another dtype, in the place of another device. And those of DreamBooth do not go with offloading."""
    file, folder = world
    stock = STOCK[Path(file).stem].from_pretrained(folder / "model")
    shake(stock.unet.parameters(), 0.1)
    if kind == "dreambooth":
        stock.unet.save_pretrained(tmp_path / "unet")
        concept = {"path": str(tmp_path)}
    else:
        concept = {"path": str(customized.save_custom_diffusion(tmp_path, stock.unet))}
    concept |= {"phrase": "qx dog", "class_noun": "dog"}
    pipe = load(file, folder / "model", concepts=[concept])
    assert pipe.to(torch.float64) is pipe
    drawn = [pipe("a qx dog", seed=3, alignit=alignit, **SETTINGS).images for alignit in (False, True)]
    assert all(image.dtype == torch.float64 for image in drawn) and not torch.equal(*drawn)
    first = load(file, folder / "model", concepts=[concept], dtype=torch.float64)
    assert torch.equal(first("a qx dog", seed=3, **SETTINGS).images, drawn[0])
    with pytest.raises(ValueError, match="offload"):
        pipe.enable_sequential_cpu_offload(device="cpu")


def test_offloaded(world):
    """By groups, as no other way runs without a GPU."""
    file, folder = world
    pipe = load(file, folder / "model", **all_parts(folder))
    call = {"control_image": control(), "alignit": True, "seed": 3, **SETTINGS}
    drawn = pipe(PROMPT, **call).images
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(pipe(PROMPT, **call).images, drawn)
