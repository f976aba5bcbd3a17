"""Parts put together by `compose` equal their own ways of use to the last bit, and leave the pipeline as it was."""

import copy
import warnings

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import CpuOffload
from diffusers import (
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
)
from peft import LoraConfig as PeftConfig
from peft import get_peft_model_state_dict
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

import alignkit
from alignkit import concepts, customized
from alignkit.alignit import alignit
from alignkit.artifacts import load_lora, save_lora
from alignkit.base import add_lora, load_base
from alignkit.controlnet import save_controlnet
from alignkit.customized import fingerprint, save_concept, save_custom_diffusion, save_embeddings
from alignkit.refine import build_refiner
from tests.test_alignit import recorded, rows_of
from tests.test_attention import hooks_and_processors
from tests.tiny import save_tiny_model, tiny_sdxl
from tests.tiny_models import letters
from tests.toy_rewards import Red

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
    row = torch.randn(1, 16, generator=torch.Generator().manual_seed(1))
    save_embeddings(folder / "custom_diffusion", {"<t>": row})
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


def test_truncation(new_pipe, model):
    prompt, learned = "a <n> and a hat", concepts.load(model / "neti")
    pipe = new_pipe()
    with learned.applied(pipe, truncation=3):
        expected = draw(pipe, prompt)
    composed = alignkit.compose(new_pipe(), concepts=[model / "neti"])
    assert torch.equal(composed(prompt, seed=0, truncation=3, **STEPS).images, expected)
    full, cut = (composed(prompt, seed=0, truncation=n, alignit=True, **STEPS).images for n in (None, 3))
    whole = composed(prompt, seed=0, truncation=128, alignit=True, **STEPS).images
    assert torch.equal(full, whole) and not torch.equal(full, cut)


def test_sdxl(new_pipe, tmp_path):
    sdxl = tiny_sdxl(new_pipe())
    settings = STEPS | {"height": 16, "width": 16}
    learned = concepts.create("textual_inversion", sdxl, "<x>", "dog")
    shake(learned.module.parameters())
    learned.save(tmp_path / "concept")
    net = ControlNetModel.from_unet(sdxl.unet, conditioning_embedding_out_channels=(4, 8))
    shake(net.parameters(), 0.1)
    styled = copy.deepcopy(sdxl.unet)
    add_lora(styled, 2, 2, ["to_q"])
    shake(p for n, p in styled.named_parameters() if ".lora_B." in n)
    save_lora(tmp_path / "style", styled)

    pipe = StableDiffusionXLControlNetPipeline(**sdxl.components, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    load_lora(sdxl, tmp_path / "style")
    generator = [torch.Generator().manual_seed(0)]
    with alignit(pipe, learned_of(tmp_path / "concept")):
        expected = pipe("a <x> and a hat", generator=generator, image=control(), **settings).images
    sdxl.unload_lora_weights()
    composed = alignkit.compose(
        sdxl, loras={"style": tmp_path / "style"}, controlnet=net, concepts=[tmp_path / "concept"], alignit=True
    )
    assert torch.equal(composed("a <x> and a hat", control_image=control(), seed=0, **settings).images, expected)


def learned_of(path):
    return concepts.load(path).concepts


# Together


def test_all_of_them(new_pipe, model):
    """The parts' own ways of use, one within the other."""
    pipe = new_pipe()
    pipe.load_lora_weights(model / "style", adapter_name="style")
    pipe.load_lora_weights(model / "other", adapter_name="other")
    pipe.set_adapters(["style", "other"], [0.7, 1.0])
    pipe = with_controlnet(pipe, model)
    names = ["style", "other"]
    with alignit(pipe, learned_of(model / "neti") + learned_of(model / "p_plus"), base_adapters=names):
        expected = draw(pipe, "a <n> and a <p>", image=control(), negative_prompt="a hat")
    composed = alignkit.compose(
        new_pipe(),
        loras={name: model / name for name in names},
        controlnet=model / "controlnet",
        concepts=[model / "neti", model / "p_plus"],
    )
    for _ in range(2):
        got = composed(
            "a <n> and a <p>", control_image=control(), alignit=True, lora_scale={"style": 0.7}, seed=0,
            negative_prompt="a hat", **STEPS,
        ).images  # fmt: skip
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", ["neti", "lora", "custom_diffusion", "dreambooth"])
def test_a_style_is_part_of_what_alignit_keeps(kind, new_pipe, model):
    """Keys and values: everybody else's are those of the base with the style, the concept's the customised model's."""
    phrase, prompt, plain = PHRASES[kind], f"a {PHRASES[kind]} and a hat", "a dog and a hat"
    composed = alignkit.compose(new_pipe(), loras={"style": model / "style"}, concepts=[model / kind])
    unet = composed.pipe.unet
    with composed.applied(alignit=True) as pipe, recorded(unet) as ours:
        draw(pipe, prompt)
    with composed.applied() as pipe, recorded(unet) as custom:
        draw(pipe, f"a photo of {phrase}")
    styled = alignkit.compose(new_pipe(), loras={"style": model / "style"})
    with styled.applied() as pipe, recorded(pipe.unet) as base:
        draw(pipe, plain)
    noun = rows_of(styled.pipe, plain, "dog")
    if kind == "neti":
        rows = slice(1 + len("aphotoof"), 2 + len("aphotoof"))  # a byte a token
    else:
        with composed.applied() as pipe:
            rows = rows_of(pipe, f"a photo of {phrase}", phrase)
    n = rows.stop - rows.start
    for name, got in ours.items():
        assert torch.equal(got[0], base[name][0]), "negative prompt"
        assert torch.equal(got[1, : noun.start], base[name][1, : noun.start])
        tolerance = 1e-5 if kind == "neti" else 0.0  # whose text is encoded up to the concept only
        own = got[1, noun.start : noun.start + n]
        torch.testing.assert_close(own, custom[name][1, rows], rtol=tolerance, atol=tolerance)
        behind = 40 - noun.start - max(n, noun.stop - noun.start)
        assert torch.equal(got[1, noun.start + n :][:behind], base[name][1, noun.stop :][:behind])


@pytest.mark.parametrize("kind", ["textual_inversion", "dreambooth"])
def test_a_style_that_changes_the_text_encoder(kind, new_pipe, model, tmp_path):
    """Its words are the base's with AlignIT too, and DreamBooth's, whose pipeline shares the text encoder."""
    pipe = new_pipe()
    pipe.text_encoder.add_adapter(PeftConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]))
    shake(p for n, p in pipe.text_encoder.named_parameters() if "lora_" in n)
    pipe.save_lora_weights(tmp_path, text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder))
    composed = alignkit.compose(new_pipe(), loras={"style": tmp_path}, concepts=[model / kind])
    if kind == "dreambooth":
        pipe.unet = composed.pipe.unet
        assert torch.equal(composed("a dog", seed=0, **STEPS).images, draw(pipe))
        return
    assert torch.equal(composed("a dog", seed=0, alignit={"strength": 0.0}, **STEPS).images, draw(pipe))
    assert not torch.equal(draw(pipe), draw(new_pipe())) and torch.equal(draw(composed.base), draw(new_pipe()))


def test_a_customiser_on_a_quantised_base(model):
    """Whose weights are not those of its fingerprint."""
    pytest.importorskip("torchao")
    composed = alignkit.compose(load_base(str(model / "model"), quantization="int8"), concepts=[model / "lora"])
    for aligned in (False, True):
        assert composed("a qx dog and a hat", seed=0, alignit=aligned, **STEPS).images.isfinite().all()


def test_a_customiser_beside_learned_concepts(new_pipe, model):
    pipe = new_pipe()
    load_lora(pipe, model / "lora")
    with concepts.load(model / "neti").applied(pipe):
        expected = draw(pipe, "a qx dog and a <n>")
    composed = alignkit.compose(new_pipe(), concepts=[model / "lora", model / "neti"])
    assert torch.equal(composed("a qx dog and a <n>", seed=0, **STEPS).images, expected)
    with pytest.raises(ValueError, match="goes with no other concept"):
        composed("a qx dog and a <n>", alignit=True, **STEPS)


def test_alignit_takes_settings_and_only_warns_of_an_absent_concept(new_pipe, model):
    composed = alignkit.compose(new_pipe(), concepts=[model / "neti", model / "p_plus"], alignit={"strength": 0.0})
    with pytest.warns(UserWarning, match="No concept in"):
        assert torch.equal(composed("a dog", seed=0, **STEPS).images, draw(new_pipe()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nothing = composed("a <n> and a hat", seed=0, **STEPS).images
        infused = composed("a <n> and a hat", seed=0, alignit={"strength": 1.0}, **STEPS).images
    assert not torch.equal(nothing, infused)


# The pipeline is left as it was


def state(pipe):
    adapters = [
        (name, module.disable_adapters) for name, module in pipe.unet.named_modules() if hasattr(module, "lora_A")
    ]
    replaced = {"encode_prompt", "prepare_latents", "step"} & {*vars(pipe), *vars(pipe.scheduler)}
    return hooks_and_processors(pipe.unet), adapters, pipe.tokenizer, replaced


@pytest.mark.parametrize("kind", PHRASES)
def test_it_leaves_no_trace(kind, new_pipe, model):
    pipe, prompt = new_pipe(), f"a {PHRASES[kind]} and a hat"
    plain = [draw(pipe, prompt), draw(pipe)]
    weights = {name: p.clone() for name, p in pipe.unet.state_dict().items()}
    composed = alignkit.compose(
        pipe, loras={"style": model / "style"}, controlnet=model / "controlnet", concepts=[model / kind]
    )
    before = [state(p) for p in (pipe, composed.pipe)]

    def stop(pipe, i, t, tensors):
        raise KeyboardInterrupt

    for settings in (
        {},
        {"alignit": True},
        {"callback_on_step_end": stop},
        {"alignit": True, "callback_on_step_end": stop},
    ):
        try:
            composed(prompt, control_image=control(), **STEPS | settings)
        except KeyboardInterrupt:
            assert "callback_on_step_end" in settings
        assert [state(p) for p in (pipe, composed.pipe)] == before
        assert torch.equal(draw(pipe, prompt), plain[0])
    assert composed.unload() is pipe
    assert torch.equal(draw(pipe, prompt), plain[0]) and torch.equal(draw(pipe), plain[1])
    now = pipe.unet.state_dict()
    assert now.keys() == weights.keys() and all(torch.equal(now[name], p) for name, p in weights.items())
    assert pipe.text_encoder.get_input_embeddings().num_embeddings == len(pipe.tokenizer)
    alignkit.compose(pipe, concepts=[model / kind])


# Offloading, as far as it shows without a GPU: the hooks are there and move weights, from the CPU to the CPU


@pytest.mark.parametrize("kind", PHRASES)
@pytest.mark.parametrize("alignit", [False, True])
def test_moved_after_it_was_composed(kind, alignit, new_pipe, model):
    """To another dtype, in the place of another device: what was left behind would be refused, or draw other pixels."""
    prompt = f"a {PHRASES[kind]} and a hat"
    first = alignkit.compose(new_pipe().to(torch.float64), concepts=[model / kind], alignit=alignit)
    composed = alignkit.compose(new_pipe(), concepts=[model / kind], alignit=alignit)
    assert composed.to(torch.float64) is composed
    images = composed(prompt, seed=0, **STEPS).images
    assert torch.equal(images, first(prompt, seed=0, **STEPS).images)
    networks = {id(pipe.unet): pipe.unet for pipe in (composed.base, composed.pipe)}.values()
    assert {parameter.dtype for unet in networks for parameter in unet.parameters()} == {torch.float64}


@pytest.fixture
def whereabouts(monkeypatch):
    """`watch(pipe)`: from then on, a layer that works while its part is away, with model offloading, is an error."""
    present, original = set(), {name: getattr(CpuOffload, name) for name in ("pre_forward", "init_hook")}

    def arrive(hook, module, *args, **kwargs):
        answer = original["pre_forward"](hook, module, *args, **kwargs)
        present.add(module)
        return answer

    def leave(hook, module):
        present.discard(module)
        return original["init_hook"](hook, module)

    monkeypatch.setattr(CpuOffload, "pre_forward", arrive)
    monkeypatch.setattr(CpuOffload, "init_hook", leave)

    def watch(pipe) -> set:
        def check(part: nn.Module, name: str):
            def hook(layer, args) -> None:
                assert part in present, f"{type(layer).__name__} of {name} works while it is away"

            return hook

        for name, part in pipe.components.items():
            for layer in part.modules() if isinstance(part, nn.Module) else ():
                own = layer is not part and next(layer.parameters(recurse=False), None) is not None
                if own and not isinstance(layer, nn.Embedding):  # that is asked for a row where it is
                    layer.register_forward_pre_hook(check(part, name))
        return present

    return watch


@pytest.mark.parametrize(
    ("kind", "alignit"), [("neti", False), *((kind, True) for kind in PHRASES if kind != "dreambooth")]
)
def test_model_offload(kind, alignit, new_pipe, model, whereabouts):
    parts = {"concepts": [model / kind], "loras": {"style": model / "style"}, "controlnet": model / "controlnet"}
    call = {"prompt": f"a {PHRASES[kind]} and a hat", "control_image": control(), "alignit": alignit, "seed": 0} | STEPS
    expected = alignkit.compose(new_pipe(), **parts)(**call).images
    composed = alignkit.compose(new_pipe(), **parts)
    composed.offload("model", "cpu")
    present = whereabouts(composed.pipe)
    for _ in range(2):
        assert torch.equal(composed(**call).images, expected)
        assert not present  # all went back
    with pytest.raises(ValueError, match="stopped"):
        composed(**call, callback_on_step_end=_stop)
    assert not present


def _stop(pipe, step, timestep, tensors):
    raise ValueError("stopped")


@pytest.mark.parametrize(("kind", "alignit"), [("neti", False), ("neti", True), ("lora", True)])
def test_sequential_offload(kind, alignit, new_pipe, model, monkeypatch):
    # diffusers says "cpu:0", by which accelerate takes the weights that came for those that stayed
    monkeypatch.setattr("accelerate.cpu_offload", lambda part, _, **options: cpu_offload(part, "cpu", **options))
    parts = {"concepts": [model / kind], "loras": {"style": model / "style"}, "controlnet": model / "controlnet"}
    call = {"prompt": f"a {PHRASES[kind]} and a hat", "control_image": control(), "alignit": alignit, "seed": 0} | STEPS
    expected = alignkit.compose(new_pipe(), **parts)(**call).images
    composed = alignkit.compose(new_pipe(), **parts)
    composed.offload("sequential", "cpu")
    assert all(p.is_meta for p in composed.pipe.unet.parameters())
    assert torch.equal(composed(**call).images, expected)


def test_offload_and_rewards(new_pipe):
    call = {"prompt": "a dog", "seed": 0, "reward": Red(), "best_of": 2} | STEPS | {"output_type": "pt"}
    expected = alignkit.compose(new_pipe())(**call).images
    composed = alignkit.compose(new_pipe())
    composed.offload("model", "cpu")
    assert torch.equal(composed(**call).images, expected)
    for way in ({"ascent": 1}, {"reward_scale": 0.1}):
        with pytest.raises(ValueError, match="draw without offloading"):
            composed(**call | {"best_of": 1} | way)


def test_parts_that_cannot_be_offloaded(new_pipe, model):
    with pytest.raises(ValueError, match="a second network beside the base's"):
        alignkit.compose(new_pipe(), concepts=[model / "dreambooth"]).offload("model", "cpu")
    with pytest.raises(ValueError, match="Take model"):
        alignkit.compose(new_pipe(), concepts=[model / "custom_diffusion"]).offload("sequential", "cpu")


def test_a_failed_compose_leaves_no_trace(new_pipe, model):
    pipe = new_pipe()
    before, plain = state(pipe), draw(pipe)
    for parts in (
        {"loras": {"style": model / "style", "nothing": model / "nothing"}},
        {"concepts": [model / "lora", model / "custom_diffusion"]},
        {"concepts": [model / "custom_diffusion"], "controlnet": str(model / "nothing")},
    ):
        with pytest.raises((ValueError, FileNotFoundError)):
            alignkit.compose(pipe, **parts)
        assert state(pipe) == before and torch.equal(draw(pipe), plain)
        assert pipe.text_encoder.get_input_embeddings().num_embeddings == len(pipe.tokenizer)


def test_another_scheduler_and_callbacks(new_pipe, model):
    pipe, seen = new_pipe(), []
    composed = alignkit.compose(new_pipe(), concepts=[model / "neti"])
    for one in (pipe, composed.pipe):
        one.scheduler = EulerDiscreteScheduler.from_config(one.scheduler.config)
    with concepts.load(model / "neti").applied(pipe):
        expected = draw(pipe, "a <n>", num_images_per_prompt=1)
    got = composed("a <n>", seed=0, callback_on_step_end=lambda p, i, t, k: seen.append(i) or k, **STEPS).images
    assert torch.equal(got, expected) and seen == [0, 1]


# What does not go together


def test_refusals(new_pipe, model, tmp_path):
    def refuse(match, *, call=None, **parts):
        with pytest.raises(ValueError, match=match):
            composed = alignkit.compose(new_pipe(), **parts)
            composed("a <n>", **STEPS | (call or {}))

    refuse("both|changes weights", concepts=[model / "lora", model / "dreambooth"])
    refuse("changes weights, as 'qx dog' does", concepts=[model / "lora", model / "custom_diffusion"])
    refuse("Two concepts are called '<n>'", concepts=[model / "neti", model / "neti"])
    refuse("control_image needs a ControlNet", call={"control_image": control()})
    refuse("pass control_image", controlnet=model / "controlnet")
    refuse("compose with concepts", alignit=True)
    refuse("compose with concepts", call={"alignit": True})
    refuse("no concept to truncate", call={"truncation": 3})
    refuse("no mapper to truncate", concepts=[model / "p_plus"], call={"truncation": 3, "alignit": True})
    refuse("names of the LoRAs that are loaded \\(style\\), got 'stile'",
           loras={"style": model / "style"}, call={"lora_scale": {"stile": 1.0}})  # fmt: skip
    refuse("letters, digits and _", loras={"my.style": model / "style"})
    refuse("letters, digits and _", loras={"default": model / "style"}, concepts=[model / "lora"])
    refuse("a seed or a generator", call={"seed": 1, "generator": torch.Generator()})
    refuse("does not say what its concept is called", concepts=[model / "style"])

    with pytest.raises(TypeError, match="expected a list"):
        alignkit.compose(new_pipe(), concepts=str(model / "neti"))
    pipe = new_pipe()
    load_lora(pipe, model / "style")
    with pytest.raises(ValueError, match="has the adapter 'default' already"):
        alignkit.compose(pipe)
    img2img = StableDiffusionImg2ImgPipeline(**new_pipe().components, requires_safety_checker=False)
    with pytest.raises(ValueError, match="stock text-to-image pipeline"):
        alignkit.compose(img2img, controlnet=model / "controlnet")


def test_parts_of_another_family(new_pipe, model):
    sdxl = tiny_sdxl(new_pipe())
    for kind in ("neti", "textual_inversion"):
        with pytest.raises(ValueError, match="another base model"):
            alignkit.compose(sdxl, concepts=[model / kind])
    with pytest.raises(ValueError, match="another base model"):
        alignkit.compose(sdxl, concepts=[model / "lora"])
    with pytest.raises(ValueError, match="does not fit this base model"):
        alignkit.compose(sdxl, loras={"style": model / "style"})
    for net in (model / "controlnet", ControlNetModel.from_pretrained(model / "controlnet")):
        with pytest.raises(ValueError, match="ControlNet of another base"):
            alignkit.compose(sdxl, controlnet=net)


def test_joint_attention(model):
    class Joint:
        transformer = nn.Linear(1, 1)
        components = {"transformer": transformer}

    for parts in ({"concepts": [model / "neti"]}, {"alignit": True}):
        with pytest.raises(ValueError, match="mixes text and image in joint attention"):
            alignkit.compose(Joint(), **parts)
    with pytest.raises(ValueError, match="load it by its own class"):
        alignkit.compose(Joint(), controlnet="somebody/controlnet")


# Chosen and refined


def test_the_best_of_several(new_pipe):
    composed, settings = alignkit.compose(new_pipe()), STEPS | {"output_type": "pt"}
    drawn = composed(["a dog", "a hat"], seed=3, reward=Red(), best_of=3, num_images_per_prompt=2, **settings)
    alone = [
        composed(p, seed=s, reward=Red(), **settings)
        for p, s in zip(["a dog"] * 6 + ["a hat"] * 6, range(3, 15), strict=True)
    ]
    for i in range(4):
        three = alone[3 * i : 3 * i + 3]
        best = max(three, key=lambda one: one.rewards[0])
        assert drawn.seeds[i] == best.seeds[0]
        assert torch.allclose(drawn.images[i], best.images[0], atol=1e-5)  # in a batch of four, and alone
    assert drawn.prompts == ["a dog", "a dog", "a hat", "a hat"]
    again = composed("a dog", seed=drawn.seeds[0], **settings | {"output_type": "pil"}).images[0]
    chosen = composed("a dog", seed=3, reward=Red(), best_of=3, **settings | {"output_type": "pil"}).images[0]
    assert again.tobytes() == chosen.tobytes()


def test_a_reward_hears_what_was_asked_in_words_it_knows(new_pipe, model):
    heard = []

    class Listener(Red):
        def score(self, images, prompts, **columns):
            heard.append((list(prompts), columns))
            return super().score(images, prompts)

    composed = alignkit.compose(new_pipe(), concepts=[model / "neti"])
    settings = STEPS | {"output_type": "pt"}
    composed("a <n> hat", refine=lambda p: f"red {p}", reward=Listener(), columns={"count": [3]}, seed=0, **settings)
    assert heard == [(["a dog hat"], {"count": [3]})]
    embeds = {"prompt_embeds": composed.base.encode_prompt("a hat", "cpu", 1, False)[0], "guidance_scale": 1.0}
    composed(**settings | embeds, reward=Listener(), reward_prompt="a <n>", seed=0)
    assert heard[1:] == [(["a dog"], {})]
    for texts in (None, ["a hat", "a dog"]):
        with pytest.raises(ValueError, match="reward_prompt: expected 1"):
            composed(**settings | embeds, reward=Listener(), reward_prompt=texts)
    drawn = composed(["a <n> hat"], refine=lambda prompt: f"red {prompt}", seed=0, **settings)
    assert drawn.prompts == ["red a <n> hat"] and drawn.base_prompts == ["a <n> hat"]
    assert torch.equal(drawn.images, composed("red a <n> hat", seed=0, **settings).images)
    with pytest.raises(ValueError, match="has lost the concept '<n>'"):
        composed("a <n> hat", refine=lambda prompt: "a hat", **settings)


def test_what_is_computed_again_reads_what_it_read(new_pipe, model, monkeypatch):
    """An ascent keeps no block's activations: with a mapper's contexts and a ControlNet, it is as with all of them."""
    told = {"prompt": "a <n>", "control_image": control(), "seed": 0, "reward": Red(), "ascent": 2, **STEPS}
    drawn = {}
    for checkpointed in (True, False):
        composed = alignkit.compose(
            new_pipe(), concepts=[model / "neti"], controlnet=str(model / "controlnet"), alignit=True
        )
        parts, blocks = (composed.pipe.unet, composed.pipe.controlnet), []
        for part in parts:
            part.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_, blocks=blocks: blocks.append(1))
            if not checkpointed:
                monkeypatch.setattr(part, "enable_gradient_checkpointing", lambda: None)
        drawn[checkpointed] = composed(**told | {"output_type": "pt"}).images, len(blocks)
    (kept, calls), (again, more) = drawn[False], drawn[True]
    assert more > calls
    assert torch.equal(again, kept)
    plain = composed(**{k: v for k, v in told.items() if k not in ("reward", "ascent")} | {"output_type": "pt"}).images
    assert not torch.equal(kept, plain)


class Flat(Red):
    differentiable = False


def gpt2(tokenizer):
    sizes = {"n_positions": 512, "n_embd": 8, "n_layer": 1, "n_head": 1}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **ids))


def t5(tokenizer):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    start = {"decoder_start_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes, **start))


@pytest.mark.parametrize(("build", "answers"), [(gpt2, False), (t5, True)])
def test_a_model_rewrites_prompts(tmp_path, build, answers):
    """A random one: in its own words, as itself says them, always alike; and it is read once."""
    tokenizer = letters()
    model = build(tokenizer).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    refine = build_refiner(str(tmp_path), "say {}", max_new_tokens=4)
    ids = tokenizer("say a dog", return_tensors="pt").input_ids
    said = model.generate(ids, max_new_tokens=4, do_sample=False)[0, 0 if answers else ids.shape[1] :]
    said = tokenizer.decode(said, skip_special_tokens=True).strip() or "a dog"
    assert refine("a dog") == said == refine("a dog")
    assert build_refiner(str(tmp_path), "say {}", max_new_tokens=4) is refine
    with pytest.raises(ValueError, match="expected a function or a text-generation model"):
        build_refiner(str(tmp_path / "nothing"))


def test_rewards_that_cannot_be_followed(new_pipe):
    composed = alignkit.compose(new_pipe())
    for settings, message in (
        ({"best_of": 2}, "need a reward"),
        ({"ascent": 2}, "need a reward"),
        ({"reward": Red(), "ascent": 2, "reward_scale": 0.1}, "two ways"),
        ({"reward": Red(), "best_of": 0}, "at least 1"),
        ({"reward": Red(), "generator": torch.Generator()}, "pass a seed"),
        ({"reward": Flat(), "reward_scale": 0.1}, "no gradient to follow"),
        ({"reward": Red(), "output_type": "latent"}, "sees images"),
    ):
        with pytest.raises(ValueError, match=message):
            composed("a dog", **{**STEPS, "output_type": "pt", **settings})
