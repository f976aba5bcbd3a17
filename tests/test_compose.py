"""What `compose` puts together equals each part's own way of use, to the last bit, and leaves the pipeline as it was."""

import contextlib
import copy

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline

import alignkit
from alignkit import concepts, customized
from alignkit.artifacts import load_lora, save_lora
from alignkit.base import add_lora, load_base
from alignkit.controlnet import save_controlnet
from alignkit.customized import fingerprint, save_concept, save_custom_diffusion, save_embeddings
from tests.tiny import save_tiny_model

PROMPT = "a <t> dog and a hat"  # a byte a token
STEPS = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}


def shake(parameters, scale: float = 0.3, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random base, and beside it two styles, a ControlNet and concepts of every kind."""
    folder = tmp_path_factory.mktemp("compose")
    save_tiny_model(folder / "configs")

    def base():
        return load_base(str(folder / "configs"), random_init=True)

    base().pipeline().save_pretrained(folder / "model")

    for seed, name in enumerate(("style", "other", "lora")):
        one = base()
        add_lora(one.unet, 2, 2, ["to_q", "to_k", "to_v"], seed=seed)
        shake((p for n, p in one.unet.named_parameters() if ".lora_B." in n), seed=seed)
        save_lora(folder / name, one.unet)
    pipe = base().pipeline()
    told = {"phrase": "qx dog", "class_noun": "dog", "base_model": "tiny", "base_fingerprint": fingerprint(pipe.unet)}
    save_concept(folder / "lora", method="lora", **told)

    unet = copy.deepcopy(pipe.unet)
    shake((p for n, p in unet.named_parameters() if "attn2.to_k" in n or "attn2.to_v" in n), seed=5)
    save_custom_diffusion(folder / "custom_diffusion", unet)
    save_embeddings(folder / "custom_diffusion", {"<t>": torch.randn(1, 16, generator=torch.Generator().manual_seed(1))})
    save_concept(folder / "custom_diffusion", method="custom_diffusion", **told | {"phrase": "<t> dog"})

    shake(unet.parameters(), 0.1, seed=6)
    unet.save_pretrained(folder / "dreambooth" / "unet")
    save_concept(folder / "dreambooth", method="dreambooth", **told)

    for kind, name in (("neti", "<n>"), ("p_plus", "<p>"), ("textual_inversion", "<t>")):
        learned = concepts.create(kind, pipe, name, "dog")
        shake(learned.module.parameters(), seed=len(kind))
        learned.save(folder / kind)

    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8))
    shake(net.parameters(), 0.1)
    save_controlnet(folder / "controlnet", net)
    return folder


PHRASES = {
    "neti": "<n>", "p_plus": "<p>", "textual_inversion": "<t>", "lora": "qx dog", "custom_diffusion": "<t> dog",
    "dreambooth": "qx dog",
}  # fmt: skip


@pytest.fixture
def new_pipe(model):
    loaded = load_base(str(model / "model")).pipeline()
    loaded.set_progress_bar_config(disable=True)

    def make() -> StableDiffusionPipeline:
        parts = {name: copy.deepcopy(part) for name, part in loaded.components.items()}
        pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def draw(pipe, prompt="a dog", seed=0, **settings):
    return pipe(prompt, generator=[torch.Generator().manual_seed(seed)], **{**STEPS, **settings}).images


def control():
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def with_controlnet(pipe, model) -> StableDiffusionControlNetPipeline:
    net = ControlNetModel.from_pretrained(model / "controlnet")
    pipe = StableDiffusionControlNetPipeline(**pipe.components, controlnet=net, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# Each part alone


def test_nothing_added(new_pipe):
    pipe = new_pipe()
    assert torch.equal(alignkit.compose(pipe)("a dog", seed=0, **STEPS).images, draw(new_pipe()))
    assert torch.equal(draw(alignkit.compose(pipe)), draw(new_pipe()))


def test_one_lora(new_pipe, model):
    pipe = new_pipe()
    pipe.load_lora_weights(model / "style", adapter_name="style")
    composed = alignkit.compose(new_pipe(), loras={"style": model / "style"})
    for weight in (1.0, 0.7):
        pipe.set_adapters(["style"], [weight])
        expected = draw(pipe)
        assert torch.equal(composed("a dog", seed=0, lora_scale={"style": weight}, **STEPS).images, expected)
        assert torch.equal(composed("a dog", seed=0, lora_scale=weight, **STEPS).images, expected)
        assert not torch.equal(draw(new_pipe()), expected)
    assert torch.equal(composed("a dog", seed=0, lora_scale=0, **STEPS).images, draw(new_pipe()))


def test_several_loras(new_pipe, model):
    pipe = new_pipe()
    pipe.load_lora_weights(model / "style", adapter_name="style")
    pipe.load_lora_weights(model / "other", adapter_name="other")
    pipe.set_adapters(["style", "other"], [0.5, -0.3])
    composed = alignkit.compose(new_pipe(), loras={"style": (model / "style", 0.5), "other": model / "other"})
    assert torch.equal(composed("a dog", seed=0, lora_scale={"other": -0.3}, **STEPS).images, draw(pipe))


def test_controlnet(new_pipe, model):
    expected = draw(with_controlnet(new_pipe(), model), image=control(), controlnet_conditioning_scale=0.6)
    for net in (model / "controlnet", ControlNetModel.from_pretrained(model / "controlnet"), [model / "controlnet"]):
        composed = alignkit.compose(new_pipe(), controlnet=net)
        image = [control()] if isinstance(net, list) else control()
        scale = [0.6] if isinstance(net, list) else 0.6
        got = composed("a dog", seed=0, control_image=image, controlnet_conditioning_scale=scale, **STEPS).images
        assert torch.equal(got, expected)
    assert not torch.equal(expected, draw(new_pipe()))


@pytest.mark.parametrize("kind", PHRASES)
@pytest.mark.parametrize("alignit", [False, True])
def test_one_concept(kind, alignit, new_pipe, model):
    prompt = f"a {PHRASES[kind]} and a hat"
    loaded = customized.load(new_pipe(), model / kind)
    with loaded.aligned() if alignit else loaded.plain():
        expected = draw(loaded.pipe, prompt)
    composed = alignkit.compose(new_pipe(), concepts=[model / kind], alignit=alignit)
    assert torch.equal(composed(prompt, seed=0, **STEPS).images, expected)
    composed = alignkit.compose(new_pipe(), concepts=[model / kind])
    assert torch.equal(composed(prompt, seed=0, alignit=alignit, **STEPS).images, expected)
