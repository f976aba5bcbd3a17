"""Mapper, text with vectors in it, concepts in stock pipelines, and their files."""

import copy
import json
import math
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from peft import LoraConfig as PeftConfig
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import alignkit
from alignkit.adapters import adapted_layers
from alignkit.alignit import alignit
from alignkit.attention import text_layers
from alignkit.base import load_base
from alignkit.concepts import Concepts, Mapper, applied, create, encode_contexts, load, tokenize
from alignkit.concepts.text import find, substitute, towers
from tests.test_attention import hooks_and_processors, record, small_unet

WIDTH, NORM = 768, 0.4


def mapper(**settings):
    return Mapper(16, [WIDTH], [NORM], **settings)


def pairs(number=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1000, (number,), generator=generator), torch.randint(16, (number,), generator=generator)


# Mapper


def test_parameters_and_size_of_the_paper(tmp_path):
    assert sum(p.numel() for p in mapper().parameters()) == 563_616
    assert sum(p.numel() for p in mapper(bypass=False).parameters()) == 464_544
    assert sum(t.nbytes for t in mapper().state_dict().values()) <= 2.3e6


def test_the_mapper_depends_on_its_seed_and_nothing_else():
    state = torch.get_rng_state()
    one, two, other = mapper(seed=1), mapper(seed=1), mapper(seed=2)
    assert torch.equal(state, torch.get_rng_state())
    t, layer = pairs()
    assert torch.equal(one(t, layer).token, two(t, layer).token)
    assert not torch.allclose(one(t, layer).token, other(t, layer).token)


def test_fourier_features_are_of_unit_length_with_a_gaussian_kernel():
    m = mapper()
    t, layer = pairs()
    assert torch.allclose(m.encode(t, layer).norm(dim=-1), torch.ones(64), atol=1e-6)
    shift = torch.tensor([[33.0, 0.0], [0.0, 1.0]])
    for dt, dl in shift:
        cosine = (m.encode(t, layer) * m.encode(t + dt, layer + dl)).sum(-1)
        expected = math.exp(-((0.03 * dt) ** 2 + (2.0 * dl) ** 2) / 2)  # of infinitely many features
        assert torch.allclose(cosine, torch.full((64,), expected), atol=4 * math.sqrt(0.5 / 1024))  # 4 deviations


def test_anchors_start_as_the_features_of_their_own_time_and_layer():
    m = mapper()
    times, layers = torch.meshgrid(torch.arange(10) * 100, torch.arange(16), indexing="ij")
    similarity = m.encode(times.flatten(), layers.flatten()) @ m.anchors.weight.T
    assert torch.equal(similarity.argmax(1), torch.arange(160))
    assert torch.allclose(similarity.diagonal(), torch.ones(160), atol=1e-5)


def test_what_is_normalised():
    t, layer = pairs()
    split, joint = mapper()(t, layer), mapper(norm_mode="joint")(t, layer)
    target = torch.full((64, 1), NORM)
    assert torch.allclose(split.token.norm(dim=-1), target, rtol=1e-6)
    assert torch.allclose(torch.cat([joint.token, joint.bypass], -1).norm(dim=-1), target, rtol=1e-6)
    two = Mapper(11, [768, 1280], [0.4, 0.7])(t, layer % 11).token.split([768, 1280], dim=-1)
    assert torch.allclose(two[0].norm(dim=-1), target, rtol=1e-6)
    assert torch.allclose(two[1].norm(dim=-1), target * 0.7 / 0.4, rtol=1e-6)
    with pytest.raises(ValueError, match="split or joint"):
        mapper(norm_mode="both")


def test_truncation():
    m, (t, layer) = mapper(), pairs()
    assert torch.equal(m(t, layer, 128).token, m(t, layer).token)
    nothing = m(t, layer, 0).token
    assert torch.equal(nothing, nothing[:1].expand_as(nothing))
    per_row = m(t, layer, torch.tensor([5] * 32 + [128] * 32)).token
    assert torch.allclose(per_row[:32], m(t, layer, 5).token[:32], atol=1e-6)
    m(t, layer, 20).token.sum().backward()
    grad = m.output.weight.grad[:WIDTH]
    assert not grad[:, 20:].any() and grad[:, :20].any()


def test_nested_dropout_is_drawn_for_half_of_the_layers_and_reaches_every_unit():
    m = mapper()
    drawn = torch.cat([m.draw_truncation(torch.Generator().manual_seed(i)) for i in range(625)])  # 10 000
    dropped = drawn < 128
    assert abs(dropped.float().mean() - 0.5) < 3 * 0.5 / 100
    assert set(drawn[dropped].tolist()) == set(range(128))
    assert (m.draw_truncation(torch.Generator().manual_seed(0), probability=0.0) == 128).all()


def test_autocast_and_batch_do_not_change_it():
    m, (t, layer) = mapper(), pairs()
    with torch.autocast("cpu", torch.bfloat16):
        cast = m(t, layer).token
    assert torch.equal(cast, m(t, layer).token)
    single = torch.cat([m(t[i : i + 1], layer[i : i + 1]).token for i in range(64)])
    assert torch.allclose(single, cast, atol=1e-6)


def test_fourier_features_are_no_matrix_product():
    """That could be TF32 or bfloat16 (torch.set_float32_matmul_precision), half a radian off at t = 999."""
    m, (t, layer) = mapper(), pairs()
    with FlopCounterMode(display=False) as counter:  # counts those alone
        features = m.encode(t, layer)
    assert counter.get_total_flops() == 0
    exact = t.double()[:, None] * m.frequencies.double()[:, 0] + layer.double()[:, None] * m.frequencies.double()[:, 1]
    expected = torch.cat([exact.sin(), exact.cos()], dim=-1).float()
    torch.testing.assert_close(features * 32, expected, rtol=0, atol=1e-4)


# Text


@pytest.fixture(scope="module")
def base():
    return load_base("sd15", random_init=True, shrink=40)


@pytest.fixture(scope="module")
def concept(base):
    return create("neti", base, "<thing>", "a", hidden_size=16, num_frequencies=32)


def contexts(base, concept, prompt, t=500.0, **settings):
    """Keys and values [L, S, D]."""
    own = towers(base)
    tokens = [tokenize(tower, prompt, {concept.placeholder_token: concept}) for tower in own]
    given = {concept.placeholder_token: concept}
    keys, values = encode_contexts(own, [tokens], given, torch.tensor([t]), len(concept.layers or [0]), **settings)
    return keys[0], values[0]


def test_placeholders_are_found_as_words():
    assert find("a <cat>_1 and <cat>", ["<cat>", "<cat>_1"]) == ["a ", "<cat>_1", " and ", "<cat>", ""]
    assert find("a <cat>_1, <cat>s", ["<cat>"]) == ["a <cat>_1, ", "<cat>", "s"]
    assert find("things and a thing", ["thing"]) == ["things and a ", "thing", ""]
    assert substitute("a <x>, {braces} and <x>", {"<x>": "dog"}) == "a dog, {braces} and dog"
    assert substitute("a dog", {}) == "a dog"


def test_spans(base):
    (tower,) = towers(base)
    one = create("textual_inversion", base, "<x>", "a")
    three = create("textual_inversion", base, "<x>_1", "a", num_vectors=3)
    both = {"<x>": one, "<x>_1": three}
    tokens = tokenize(tower, "<x> b <x>_1 <x>", both)
    assert tokens.spans == (("<x>", 1), ("<x>_1", 3), ("<x>", 6))
    assert tokens.attention_mask.sum() == 8
    room = tower.max_length
    filler = "b " * (room - 3)
    assert tokenize(tower, filler + "<x>", both).spans == (("<x>", room - 2),)
    with pytest.raises(ValueError, match=f"reads {room} tokens, this one has {room + 2}"):
        tokenize(tower, filler + "<x>_1", both)


@torch.no_grad()
def test_written_vectors_are_an_exchange_of_ids(base):
    """Textual Inversion with the vector of "b" is the prompt with "b", as the stock pipeline encodes it."""
    concept = create("textual_inversion", base, "<x>", "b")
    keys, values = contexts(base, concept, "a <x> c")
    assert torch.equal(keys[0], base.encode_prompt(["a b c"])[0]) and torch.equal(keys, values)
    other = create("textual_inversion", base, "<x>", "d")
    changed = (contexts(base, other, "a <x> c")[0][0] != keys[0]).any(-1)
    assert not changed[:2].any() and changed[2:].all()  # causal: what stands before the concept is untouched
    assert torch.equal(base.encode_prompt(["a b c"])[0], keys[0])  # and the hook is gone


@torch.no_grad()
def test_the_bypass_acts_on_values_at_the_concept_only(base, concept):
    plain = replace(concept, alpha=0.0)
    keys, values = contexts(base, plain, "a <thing> b")
    assert torch.equal(keys, values)
    same_keys, values = contexts(base, concept, "a <thing> b")
    assert torch.equal(same_keys, keys)
    assert (values != keys).any(-1).nonzero()[:, 1].unique().tolist() == [2]
    seen = []
    norm = base.text_encoder.final_layer_norm
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    contexts(base, concept, "a <thing> b")
    handle.remove()
    h, shifted = seen[-2:]
    ratio = (shifted - h).norm(dim=-1) / h.norm(dim=-1)
    assert torch.allclose(ratio[:, 2], torch.full((16,), 0.2), rtol=1e-5)


@torch.no_grad()
def test_only_the_direction_of_the_bypass_counts(base):
    concept = create("neti", base, "<thing>", "a", hidden_size=16, num_frequencies=32)
    before = contexts(base, concept, "a <thing>")[1]
    half = slice(base.unet.config.cross_attention_dim, None)
    concept.module.output.weight[half] *= 10
    concept.module.output.bias[half] *= 10
    assert torch.allclose(contexts(base, concept, "a <thing>")[1], before, atol=1e-6)


def test_gradient_reaches_the_mapper_and_nothing_else(base):
    concept = create("neti", base, "<thing>", "a", hidden_size=16, num_frequencies=32)
    keys, values = contexts(base, concept, "a <thing>")
    (keys.square().sum() + values[:, 2].sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in concept.module.parameters())
    assert all(p.grad is None for p in base.text_encoder.parameters())


# In pipelines


def pipeline(base, cls=None, scheduler=None, **more):
    pipe = base.pipeline()
    if cls:
        pipe = cls(**{**pipe.components, **more}, requires_safety_checker=False)
    if scheduler:
        pipe.scheduler = scheduler.from_config(DDIMScheduler().config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


SETTINGS = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}


def noise(number, seed=0):
    return torch.randn(number, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("scheduler", "calls"),
    [
        (DDIMScheduler, 3),
        (HeunDiscreteScheduler, 5),  # two a step, one in the last
        (partial(EulerDiscreteScheduler, timestep_spacing="linspace"), 3),  # 999, 499.5 and 0
        ("img2img", 3),  # of ten steps
    ],
    ids=["ddim", "heun", "euler", "img2img"],
)
def test_every_layer_reads_what_the_mapper_says_for_its_name_and_timestep(base, concept, scheduler, calls):
    """F 11, 15: of every call of the network, at the timestep that it is called with."""
    if scheduler == "img2img":
        pipe, steps = pipeline(base, StableDiffusionImg2ImgPipeline), 10
        given = {"image": torch.rand(1, 3, 64, 64), "strength": 0.3}
    else:
        pipe, steps, given = pipeline(base), 3, {"height": 64, "width": 64}
        pipe.scheduler = scheduler()
    seen, times = [], []
    unet = load_base("sd15", random_init=True, shrink=40).unet  # hooks of its own
    pipe.unet = unet
    inputs = record(unet)

    def note(module, args, output):
        times.append(float(args[1]))
        seen.append(dict(inputs))
        inputs.clear()

    unet.register_forward_hook(note)
    with Concepts([concept]).applied(pipe):
        pipe("a <thing> b", num_inference_steps=steps, output_type="latent", **given)
    assert len(times) == calls and (scheduler in ("img2img", DDIMScheduler) or 0 in times)
    for t, inputs in zip(times, seen, strict=True):
        with torch.no_grad():
            keys, values = contexts(base, concept, "a <thing> b", t)
        for layer, name in enumerate(concept.layers):
            attention = f"{name}.transformer_blocks.0.attn2"
            assert torch.allclose(inputs[f"{attention}.to_k"][0][1], keys[layer], atol=1e-6)
            assert torch.allclose(inputs[f"{attention}.to_v"][0][1], values[layer], atol=1e-6)
            assert torch.equal(inputs[f"{attention}.to_k"][0][0], base.encode_prompt([""])[0])


def test_prompts_in_a_batch_are_what_they_are_alone(base, concept):
    """The concept twice, elsewhere, and not at all: that one is the plain pipeline's."""
    pipe, prompts = pipeline(base), ["<thing> b <thing>", "c d <thing>", "no placeholder"]
    plain = pipe(["x", "x", prompts[2]], latents=noise(3), **SETTINGS).images
    with Concepts([concept]).applied(pipe):
        together = pipe(prompts, latents=noise(3), **SETTINGS).images
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            alone = [pipe(p, latents=noise(3)[i : i + 1], **SETTINGS).images[0] for i, p in enumerate(prompts)]
    assert torch.allclose(together, torch.stack(alone), atol=1e-5)
    assert torch.equal(together[2], plain[2]) and not torch.allclose(together[:2], plain[:2], atol=1e-3)


def test_guidance_negative_prompts_and_repetitions(base, concept):
    pipe = pipeline(base)
    with Concepts([concept]).applied(pipe):
        call = {"latents": noise(2), **SETTINGS}
        one = pipe("a <thing>", guidance_scale=1.0, num_images_per_prompt=2, **call).images
        two = pipe(["a <thing>"] * 2, guidance_scale=1.0, **call).images
        assert torch.equal(one, two)
        # guidance by the same prompt is no guidance, to rounding
        same = pipe("a <thing>", negative_prompt="a <thing>", num_images_per_prompt=2, **call).images
        assert torch.allclose(same, one, atol=1e-4)
        embeds = pipe.encode_prompt("a <thing>", "cpu", 2, True, negative_prompt="bad <thing>")
        given = pipe(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], **call).images
        direct = pipe("a <thing>", negative_prompt="bad <thing>", num_images_per_prompt=2, **call).images
        assert torch.equal(given, direct)
        embeds = pipe.encode_prompt("a <thing>", "cpu", 1, True)
        given = pipe(prompt_embeds=embeds[0], num_images_per_prompt=2, **call).images
        assert torch.equal(given, pipe("a <thing>", num_images_per_prompt=2, **call).images)
        plain = base.encode_prompt(["b"])
        long = torch.cat([plain, plain], dim=1)  # as other tools make of long prompts
        given = pipe(prompt_embeds=long, negative_prompt_embeds=long.flip(1), **{**call, "latents": noise(1)}).images
        mixed = pipe("a <thing>", negative_prompt_embeds=plain, **{**call, "latents": noise(1)}).images
        assert torch.equal(mixed, pipe("a <thing>", negative_prompt="b", **{**call, "latents": noise(1)}).images)
    stock = pipe(prompt_embeds=long, negative_prompt_embeds=long.flip(1), **{**call, "latents": noise(1)}).images
    assert torch.equal(given, stock)


def test_other_stock_pipelines(base, concept):
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    control = ControlNetModel.from_unet(base.unet)
    # as from_unet leaves its outputs at zero, the control has no effect: what it reads is what is looked at
    seen = record(control)
    size = {"height": 64, "width": 64}
    cases = [
        (pipeline(base, StableDiffusionImg2ImgPipeline), {"image": image, "strength": 0.5}),
        (pipeline(base, StableDiffusionInpaintPipeline), {"image": image, "mask_image": image[:, :1].round()} | size),
        (pipeline(base, StableDiffusionControlNetPipeline, controlnet=control), {"image": image} | size),
    ]

    def run(pipe, prompt, inputs):
        generator = torch.Generator().manual_seed(1)
        return pipe(prompt, generator=generator, num_inference_steps=4, output_type="latent", **inputs).images

    for pipe, inputs in cases:
        noun = run(pipe, "a a", inputs)
        loaded = Concepts([concept])
        for use in (loaded.applied(pipe), alignit(pipe, loaded)):
            with use:
                assert not torch.allclose(run(pipe, "a <thing>", inputs), noun, atol=1e-4)
        assert torch.equal(run(pipe, "a a", inputs), noun)
    (given, _), *_ = seen.values()
    assert torch.equal(given[1], base.encode_prompt(["a a"])[0])  # the noun, for a reader of one text


def test_contexts_of_a_known_prompt_are_not_computed_again(base, concept):
    pipe, calls = pipeline(base), []
    handle = base.text_encoder.register_forward_pre_hook(lambda m, args: calls.append(len(args[0])))
    try:
        with Concepts([concept]).applied(pipe):
            pipe("a <thing>", num_images_per_prompt=3, **SETTINGS)
            assert calls == [1, 1, 16, 16]  # prompt, negative prompt, and all layers of each step in one batch
            pipe("a <thing>", **SETTINGS)
            assert calls[4:] == [1, 1]
    finally:
        handle.remove()


def test_two_concepts_in_one_prompt(base, concept):
    vector = create("textual_inversion", base, "<x>", "b", num_vectors=2)
    pipe = pipeline(base)
    with Concepts([concept, vector]).applied(pipe):
        both = pipe("a <thing> and <x>", latents=noise(1), **SETTINGS).images
    with Concepts([concept]).applied(pipe):
        spelled = pipe("a <thing> and b b", latents=noise(1), **SETTINGS).images
    assert torch.allclose(both, spelled, atol=1e-5)
    twin = replace(concept, placeholder_token="<twin>")
    other = replace(twin, module=Mapper(16, concept.widths, concept.norms, hidden_size=16, num_frequencies=32, seed=1))
    images = []
    for names, loaded in (
        ("<thing> <thing>", [concept]), ("<thing> <twin>", [concept, twin]), ("<thing> <twin>", [concept, other]),
    ):  # fmt: skip
        with Concepts(loaded).applied(pipe):
            images.append(pipe(f"a {names}", latents=noise(1), **SETTINGS).images)
    assert torch.allclose(images[0], images[1], atol=1e-5) and not torch.allclose(images[1], images[2], atol=1e-4)
    with pytest.raises(ValueError, match="Two concepts"), Concepts([concept, concept]).applied(pipe):
        pass


def test_beside_a_token_of_several_vectors(base):
    """What diffusers writes out ("<dog>" as "<dog> <dog>_1") is written out beside a concept too."""
    pipe = pipeline(load_base("sd15", random_init=True, shrink=40))
    width = pipe.unet.config.cross_attention_dim
    pipe.load_textual_inversion({"<dog>": torch.randn(2, width, generator=torch.Generator().manual_seed(0))})
    expected = pipe("a b <dog> c", latents=noise(1), **SETTINGS).images
    vector = create("textual_inversion", pipe, "<x>", "b")
    with Concepts([vector]).applied(pipe):
        ours = pipe("a <x> <dog> c", latents=noise(1), **SETTINGS).images
    assert torch.allclose(ours, expected, atol=1e-5)


def test_the_least_recently_used_contexts_go(base, concept, monkeypatch):
    pipe, sources = pipeline(base), []

    class Kept(applied._Source):
        def __init__(self, *args):
            super().__init__(*args)
            sources.append(self)

    monkeypatch.setattr(applied, "_Source", Kept)
    monkeypatch.setattr("alignkit.concepts.text.CACHE_BYTES", 0)
    with Concepts([concept]).applied(pipe):
        few = pipe("a <thing>", latents=noise(1), **SETTINGS).images
    assert [timestep for _, timestep in sources[0].cache] == [1]  # of the last step alone
    monkeypatch.undo()
    with Concepts([concept]).applied(pipe):
        assert torch.equal(pipe("a <thing>", latents=noise(1), **SETTINGS).images, few)


def test_no_trace(base, concept):
    pipe = pipeline(base)
    vocabulary = len(pipe.tokenizer)
    before, plain = hooks_and_processors(pipe.unet), pipe("a b", latents=noise(1), **SETTINGS).images
    with pytest.raises(ValueError, match="too long"), Concepts([concept]).applied(pipe):
        pipe("<thing>" + " b" * 100, **SETTINGS)
    assert "encode_prompt" not in vars(pipe) and hooks_and_processors(pipe.unet) == before
    assert len(pipe.tokenizer) == vocabulary and not pipe.text_encoder.get_input_embeddings()._forward_hooks
    assert torch.equal(pipe("a b", latents=noise(1), **SETTINGS).images, plain)


def test_misuse(base, concept):
    pipe = pipeline(base)
    pipe.encode_prompt = lambda *args: None  # somebody's own
    with pytest.raises(RuntimeError, match="replaced already"), Concepts([concept]).applied(pipe):
        pass
    assert "encode_prompt" in vars(pipe)
    del pipe.encode_prompt
    with Concepts([concept]).applied(pipe), pytest.warns(UserWarning, match="No placeholder"):
        pipe("a thing", **SETTINGS)
    for truncation in (-1, 17):
        with pytest.raises(ValueError, match="between 0 and 16"), Concepts([concept]).applied(pipe, truncation):
            pass
    other = load_base("sd15", random_init=True, shrink=20)
    with pytest.raises(ValueError, match="another base"), Concepts([concept]).applied(pipeline(other)):
        pass
    layers = replace(concept, layers=concept.layers[1:])
    norms = replace(concept, norms=[1.02 * concept.norms[0]])
    for one, expected in ((layers, "15 layers of text, got 16"), (norms, "'a' to have the norm")):
        with pytest.raises(ValueError, match=f"another base model: expected {expected}"):
            one.check(base)
    replace(concept, norms=[1.001 * concept.norms[0]]).check(base)  # as a half-precision table has it
    for word, problem in (("a", "already"), ("two words", "one word"), ("", "one word")):
        with pytest.raises(ValueError, match=problem):
            create("neti", base, word, "a")
    with pytest.warns(UserWarning, match="is 3 tokens"):
        two = create("textual_inversion", base, "<x>", "abc")
    table = base.text_encoder.get_input_embeddings().weight
    assert torch.allclose(two.module.vectors[0, 0], table[base.tokenizer("abc").input_ids[1:-1]].mean(0))
    with pytest.raises(ValueError, match="SD3 and FLUX"):
        towers(object())


# SDXL


@pytest.fixture(scope="module")
def sdxl(base):
    """Both text encoders, pooled text and time ids, at the size of a toy."""

    def text_config(width, projection):
        return CLIPTextConfig(
            vocab_size=len(base.tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=77, projection_dim=projection, eos_token_id=2,
        )  # fmt: skip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = small_unet(
            transformer_layers=(1, 2), cross_attention_dim=20, addition_embed_type="text_time",
            addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 10,
        )  # fmt: skip
        pipe = StableDiffusionXLPipeline(
            vae=base.vae, unet=unet, scheduler=DDIMScheduler(), tokenizer=base.tokenizer, tokenizer_2=base.tokenizer,
            text_encoder=CLIPTextModel(text_config(8, 8)).eval(),
            text_encoder_2=CLIPTextModelWithProjection(text_config(12, 10)).eval(),
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


XL = SETTINGS | {"original_size": (64, 64), "target_size": (64, 64)}


def test_sdxl_reads_both_encoders_and_its_pooled_text_is_the_nouns(sdxl):
    """With the noun's own vectors it is the plain pipeline; with a mapper, each layer has its own, and pooled stays."""
    plain = sdxl("a b c", latents=noise(1), **XL).images
    noun = create("textual_inversion", sdxl, "<x>", "b")
    assert noun.widths == [8, 12]
    with Concepts([noun]).applied(sdxl):
        assert torch.allclose(sdxl("a <x> c", latents=noise(1), **XL).images, plain, atol=1e-5)
    concept = create("neti", sdxl, "<thing>", "b", hidden_size=8, num_frequencies=16)
    assert len(concept.layers) == len(text_layers(sdxl.unet)) == 7
    seen = []
    handle = sdxl.unet.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["text_embeds"]), with_kwargs=True
    )
    sdxl("a b c", latents=noise(1), **XL)
    with Concepts([concept]).applied(sdxl):
        drawn = sdxl("a <thing> c", latents=noise(1), **XL).images
    handle.remove()
    assert torch.equal(seen[0], seen[-1]) and not torch.allclose(drawn, plain, atol=1e-3)


@torch.no_grad()
def test_sdxls_bypass_acts_on_the_hidden_state_that_it_reads(sdxl):
    concept = create("neti", sdxl, "<thing>", "b", hidden_size=8, num_frequencies=16)
    keys, values = contexts(sdxl, concept, "a <thing> c")
    assert keys.shape == (7, 77, 20)
    for part in (slice(0, 8), slice(8, 20)):
        ratio = (values - keys)[..., part].norm(dim=-1) / keys[..., part].norm(dim=-1)
        assert torch.allclose(ratio[:, 2], torch.full((7,), 0.2), rtol=1e-5)
        assert not ratio[:, [*range(2), *range(3, 77)]].any()


def test_sdxl_files(sdxl, tmp_path):
    concept = create("textual_inversion", sdxl, "<x>", "b", num_vectors=2)
    file = concept.save(tmp_path / "x") / "learned_embeds.safetensors"
    with pytest.raises(ValueError, match="pass placeholder_token"):
        load(file)
    for loaded in (load(file, placeholder_token="<x>"), load(tmp_path / "x")):
        (read,) = loaded.concepts
        assert torch.equal(read.module.vectors, concept.module.vectors) and read.widths == [8, 12]


def test_sdxl_in_a_file_for_each_encoder(sdxl, tmp_path):
    """As diffusers' textual_inversion_sdxl.py leaves them, with the step in their names or not."""
    first, second = torch.randn(1, 8), torch.randn(1, 12)
    for steps in ("", "-steps-500"):
        save_file({"<x>": first}, tmp_path / f"learned_embeds{steps}.safetensors")
        save_file({"<x>": second}, tmp_path / f"learned_embeds_2{steps}.safetensors")
        (read,) = load(tmp_path / f"learned_embeds{steps}.safetensors", super_category_token="b").concepts
        read.check(sdxl)
        assert read.placeholder_token == "<x>" and torch.equal(read.module.vectors[0], torch.cat([first, second], 1))
    save_file({"<y>": second}, tmp_path / "learned_embeds_2.safetensors")
    with pytest.raises(ValueError, match="expected <x> for SDXL's second text encoder, got .'<y>'"):
        load(tmp_path / "learned_embeds.safetensors")


def test_different_prompts_for_the_two_encoders(sdxl):
    concept = create("neti", sdxl, "<thing>", "b", hidden_size=8, num_frequencies=16)
    with Concepts([concept]).applied(sdxl):
        sdxl("a <thing>", prompt_2="c <thing>", **XL)
        with pytest.raises(ValueError, match="same place"):
            sdxl("a <thing>", prompt_2="a c <thing>", **XL)


@pytest.mark.parametrize("aligned", [False, True])
def test_clip_skip(sdxl, aligned):
    """With the noun's own vector it is the picture of the noun, from an earlier state of the text encoders.

    (Of SD 1.x and 2.x diffusers' own encode_prompt fails with it: transformers 5 has no `text_model` any more.)
    """
    plain, skipped = (sdxl("a b c", clip_skip=skip, latents=noise(1), **XL).images for skip in (None, 1))
    assert not torch.allclose(plain, skipped, atol=1e-4)
    loaded = Concepts([create("textual_inversion", sdxl, "<x>", "b")])
    with alignit(sdxl, loaded, source="prompt") if aligned else loaded.applied(sdxl):
        assert torch.allclose(sdxl("a <x> c", clip_skip=1, latents=noise(1), **XL).images, skipped, atol=1e-5)
        assert torch.allclose(sdxl("a <x> c", latents=noise(1), **XL).images, plain, atol=1e-5)


@pytest.fixture
def adapted(sdxl):
    """The same, with a LoRA in its first text encoder."""
    encoder = copy.deepcopy(sdxl.text_encoder)
    encoder.add_adapter(PeftConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for layer in adapted_layers(encoder):
        torch.nn.init.normal_(layer.lora_B["default"].weight, generator=torch.Generator().manual_seed(0))
    pipe = StableDiffusionXLPipeline(**sdxl.components | {"text_encoder": encoder}, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("aligned", [False, True])
def test_scale_of_a_lora_in_the_text_encoder(adapted, aligned):
    """With the noun's own vector it is the picture of the noun at every scale, also one after the other."""
    scales = (1.0, 0.3, 0.0, 1.0)
    drawn = [
        adapted("a b c", cross_attention_kwargs={"scale": scale}, latents=noise(1), **XL).images for scale in scales
    ]
    assert torch.equal(drawn[0], drawn[3]) and not torch.allclose(drawn[0], drawn[1], atol=1e-2)
    loaded = Concepts([create("textual_inversion", adapted, "<x>", "b")])
    block = alignit(adapted, loaded, source="prompt", base_adapters=["default"]) if aligned else loaded.applied(adapted)
    with block:
        for scale, expected in zip(scales, drawn, strict=True):
            ours = adapted("a <x> c", cross_attention_kwargs={"scale": scale}, latents=noise(1), **XL).images
            assert torch.allclose(ours, expected, atol=1e-4), scale


def test_another_weight_of_a_lora_inside(adapted):
    """What was encoded with the old one is not read again."""
    with Concepts([create("textual_inversion", adapted, "<x>", "b")]).applied(adapted):
        before = adapted("a <x> c", latents=noise(1), **XL).images
        for layer in adapted_layers(adapted.text_encoder):
            layer.set_scale("default", 0.3)
        inside = adapted("a <x> c", latents=noise(1), **XL).images
    assert not torch.allclose(before, inside, atol=1e-4)
    assert torch.allclose(inside, adapted("a b c", latents=noise(1), **XL).images, atol=1e-5)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("kind", ["text", "image", "inpainting", "controlnet"])
def test_pipelines_of_sdxl(sdxl, kind, aligned):
    """With the noun's own vectors each is what it is with the noun, alone or with AlignIT; with others it is not."""
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    size, parts = {"height": 64, "width": 64}, dict(sdxl.components)
    cls, given = {
        "text": (StableDiffusionXLPipeline, size),
        "image": (StableDiffusionXLImg2ImgPipeline, {"image": image, "strength": 0.5}),
        "inpainting": (StableDiffusionXLInpaintPipeline, {"image": image, "mask_image": image[:, :1].round()} | size),
        "controlnet": (StableDiffusionXLControlNetPipeline, {"image": image} | size),
    }[kind]
    if kind == "controlnet":
        parts["controlnet"] = ControlNetModel.from_unet(sdxl.unet)
    pipe = cls(**parts)
    pipe.set_progress_bar_config(disable=True)

    def run(prompt):
        generator = torch.Generator().manual_seed(1)
        return pipe(prompt, generator=generator, num_inference_steps=4, output_type="latent", **given).images

    noun = create("textual_inversion", sdxl, "<x>", "b")
    other = replace(create("neti", sdxl, "<x>", "b", hidden_size=8, num_frequencies=16), alpha=1.0)
    plain = run("a b c")
    for concept, same in ((noun, True), (other, False)):
        loaded = Concepts([concept])
        with alignit(pipe, loaded, source="prompt") if aligned else loaded.applied(pipe):
            assert torch.allclose(run("a <x> c"), plain, atol=1e-4) == same
    assert torch.equal(run("a b c"), plain)


# Files


@pytest.mark.parametrize("kind", ["neti", "textual_inversion", "p_plus"])
def test_a_concept_is_what_it_was(base, tmp_path, kind):
    # frequencies of a seed that is not the default's: they have to be in the file
    settings = {"hidden_size": 16, "num_frequencies": 32, "seed": 1} if kind == "neti" else {"num_vectors": 2}
    concept = create(kind, base, "<thing>", "a", **settings)
    with torch.no_grad():
        for parameter in concept.module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    loaded = load(concept.save(tmp_path / "thing"))
    other = replace(concept, placeholder_token="<other>").save(tmp_path / "other")
    assert [c.placeholder_token for c in load(tmp_path / "thing", other).concepts] == ["<thing>", "<other>"]
    state, other = concept.module.state_dict(), loaded.concepts[0].module.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)
    pipe = pipeline(base)
    images = []
    for concepts in (Concepts([concept]), loaded):
        with concepts.applied(pipe):
            images.append(pipe("a <thing>", latents=noise(1), **SETTINGS).images)
    assert torch.equal(*images)


def test_textual_inversion_files_are_diffusers_own(base, tmp_path):
    """Written for `load_textual_inversion`, and read from what others wrote."""
    concept = create("textual_inversion", base, "<thing>", "a", num_vectors=2)
    file = concept.save(tmp_path / "thing") / "learned_embeds.safetensors"
    with load(file, super_category_token="a").applied(pipeline(base)) as pipe:
        ours = pipe("b <thing> c", latents=noise(1), **SETTINGS).images
    pipe = pipeline(load_base("sd15", random_init=True, shrink=40))
    pipe.load_textual_inversion(file)
    assert torch.allclose(pipe("b <thing> c", latents=noise(1), **SETTINGS).images, ours, atol=1e-5)


def test_broken_files(base, concept, tmp_path):
    folder = concept.save(tmp_path / "thing")
    for name in ("concept.bin", "concept.pt"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match="pickle"):
            load(tmp_path / name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"widths": [8]}))
    with pytest.raises(ValueError, match="do not fit"):
        load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"unknown": 1}))
    with pytest.raises(ValueError, match="do not fit"):
        load(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not a concept"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="missing"):
        load(folder)
    with pytest.raises(ValueError, match="at least one"):
        alignkit.concepts.load()
