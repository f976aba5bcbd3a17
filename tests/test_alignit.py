"""AlignIT on a Stable Diffusion of a few thousand parameters: which rows of which layer are whose, to the last bit."""

import contextlib
import copy
import functools
import inspect
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models import attention_processor
from peft import LoraConfig
from torch import Tensor, nn

from alignkit import alignit as alignit_module
from alignkit import concepts
from alignkit.alignit import Concept, alignit, checks
from alignkit.artifacts import save_lora
from alignkit.attention import projection_pairs, text_layers
from alignkit.base import load_base
from alignkit.customized import cross_attention, load_custom_diffusion, save_custom_diffusion
from tests.test_families import thin
from tests.tiny import save_tiny_model, tiny_sdxl

KINDS = (
    "textual_inversion", "two_vectors", "p_plus", "neti", "lora", "text_lora", "custom_diffusion", "dreambooth",
    "graft",
)  # fmt: skip
PROMPT, PLAIN = "a <t> dog and a hat", "a dog and a hat"  # a byte a token
STEPS = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@functools.cache
def loaded(tiny_model: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    return load_base(tiny_model, random_init=True, dtype=dtype).pipeline()


def new_pipe(tiny_model: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    parts = {name: copy.deepcopy(part) for name, part in loaded(tiny_model, dtype).components.items()}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shake(parameters, scale: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in parameters:
        parameter.data += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@dataclass
class Case:
    """`pipe` with AlignIT's `settings`; `base` and `custom` are plain pipelines of the two models."""

    pipe: StableDiffusionPipeline
    base: StableDiffusionPipeline
    custom: StableDiffusionPipeline
    concept: Concept
    two_weights: bool
    settings: dict[str, Any] = field(default_factory=dict)

    def aligned(self, **settings):
        return alignit(self.pipe, [self.concept], **{**self.settings, **settings})


def customise(kind: str, pipe: StableDiffusionPipeline, tmp_path) -> None:
    if kind in ("textual_inversion", "two_vectors", "custom_diffusion"):
        rows = torch.randn(2 if kind == "two_vectors" else 1, 16, generator=torch.Generator().manual_seed(1))
        pipe.load_textual_inversion({"<t>": rows if len(rows) > 1 else rows[0]})
    if kind == "lora":
        torch.manual_seed(0)
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"]))
        shake(p for n, p in pipe.unet.named_parameters() if "lora_" in n)
    if kind == "text_lora":
        torch.manual_seed(0)
        pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        shake(p for n, p in pipe.text_encoder.named_parameters() if "lora_" in n)
    if kind == "custom_diffusion":
        shaken = copy.deepcopy(pipe.unet)
        shake(getattr(a, part).weight for a in cross_attention(shaken).values() for part in ("to_k", "to_v"))
        load_custom_diffusion(pipe, save_custom_diffusion(tmp_path, shaken))
    if kind in ("dreambooth", "graft"):
        shake(pipe.unet.parameters(), 0.1)
        shake(pipe.text_encoder.parameters(), 0.1)
    for module in (pipe.unet, pipe.text_encoder):
        module.requires_grad_(False)


def make(kind: str, tiny_model: str, tmp_path, dtype: torch.dtype = torch.float32) -> Case:
    base, custom = new_pipe(tiny_model, dtype), new_pipe(tiny_model, dtype)
    customise(kind, custom, tmp_path)
    phrase = "<t>" if kind in ("textual_inversion", "two_vectors") else "<t> dog"
    two_weights = kind in ("lora", "custom_diffusion", "dreambooth", "graft")
    concept = Concept(phrase, "dog", dummy="one {} here")
    if kind in ("p_plus", "neti"):
        learned = concepts.create(kind, base, "<t>", "dog", **({"num_vectors": 2} if kind == "p_plus" else {}))
        shake(learned.module.parameters())
        concept = Concept("<t>", "dog", dummy="one {} here", learned=learned)
    if kind == "graft":
        return Case(base, new_pipe(tiny_model, dtype), custom, concept, two_weights, {"custom": custom})
    pipe = new_pipe(tiny_model, dtype)
    customise(kind, pipe, tmp_path)
    return Case(pipe, base, custom, concept, two_weights, {"base": base} if kind == "dreambooth" else {})


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(params=KINDS)
def case(request, tiny_model, tmp_path, dtype) -> Case:
    return make(request.param, tiny_model, tmp_path, dtype)


@pytest.fixture
def lora(tiny_model, tmp_path) -> Case:
    return make("lora", tiny_model, tmp_path)


@pytest.fixture
def inversion(tiny_model, tmp_path) -> Case:
    return make("textual_inversion", tiny_model, tmp_path)


def prompt_of(case: Case) -> str:
    return PROMPT.replace("<t> dog", case.concept.phrase)


def draw(pipe, prompt, **settings) -> Tensor:
    number = 1 if isinstance(prompt, str) else len(prompt)
    generators = [torch.Generator().manual_seed(i) for i in range(number)]
    return pipe(prompt, generator=generators, **{**STEPS, **settings}).images


@contextlib.contextmanager
def recorded(unet: nn.Module, call: int = 0):
    """Keys and values of every layer's call of that number, [B, S, C] by "<layer>.to_k", of the projection used."""
    record: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def keep(name: str):
        def hook(module, args, output):
            if calls[name] == call:
                record[name] = output.clone()
            calls[name] += 1

        return hook

    handles = [pair.module.register_forward_hook(keep(pair.name)) for pair in projection_pairs(unet)]
    yield record
    for handle in handles:
        handle.remove()


def customised(case: Case):
    """Inside, `case.custom` draws the concept as its customiser meant it."""
    learned = case.concept.learned
    return contextlib.nullcontext() if learned is None else concepts.Concepts([learned]).applied(case.custom)


def concept_rows(case: Case, text: str) -> slice:
    rows = rows_of(case.custom, text, case.concept.phrase)
    if case.concept.learned is None:
        return rows
    return slice(rows.start, rows.start + case.concept.learned.module.num_vectors)


def rows_of(pipe, text: str, part: str) -> slice:
    """Rows of the embedding, by the tokens before and within."""

    def convert(text: str) -> str:
        return pipe.maybe_convert_prompt(text, pipe.tokenizer) if text.strip() else text

    before = text[: text.index(part)].rstrip()
    start = 1 + len(pipe.tokenizer(convert(before), add_special_tokens=False).input_ids)
    return slice(start, start + len(pipe.tokenizer(convert(part), add_special_tokens=False).input_ids))


def assert_rows(case: Case, ours: Tensor, expected: Tensor) -> None:
    """A learnt concept's dummy prompt is encoded up to the concept, which is the same to rounding only."""
    tolerance = 0.0
    if case.concept.learned is not None:
        tolerance = 1e-5 if ours.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


# Whose row is whose: the promise


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_row_by_row(kind, tiny_model, tmp_path, dtype):
    """F 17, 18: of every layer; base rows are the base's for P_0, concept rows the customised model's for D."""
    case = make(kind, tiny_model, tmp_path, dtype)
    with recorded(case.base.unet) as base:
        draw(case.base, PLAIN)
    dummy = case.concept.dummy.format(case.concept.phrase)
    with customised(case), recorded(case.custom.unet) as custom:
        draw(case.custom, dummy)
    with case.aligned(), recorded(case.pipe.unet) as ours:
        draw(case.pipe, prompt_of(case))
    noun, concept = rows_of(case.base, PLAIN, "dog"), concept_rows(case, dummy)
    n, m, length = concept.stop - concept.start, noun.stop - noun.start, 40
    assert base.keys() == custom.keys() == ours.keys() and len(ours) == 2 * len(cross_attention(case.base.unet))
    for name, got in ours.items():
        assert got.shape[1] == length
        assert torch.equal(got[0], base[name][0]), "negative prompt"
        assert torch.equal(got[1, : noun.start], base[name][1, : noun.start])
        assert_rows(case, got[1, noun.start : noun.start + n], custom[name][1, concept])
        behind = length - noun.start - max(n, m)
        assert torch.equal(got[1, noun.start + n :][:behind], base[name][1, noun.stop :][:behind])


def test_rows_of_a_mapper_are_those_of_every_step(tiny_model, tmp_path, dtype):
    """F 11, 18: AlignIT with NeTI asks for the timestep of each call."""
    case, ours, custom = make("neti", tiny_model, tmp_path, dtype), [], []
    dummy = case.concept.dummy.format(case.concept.phrase)
    for call in range(2):
        with customised(case), recorded(case.custom.unet, call) as record:
            draw(case.custom, dummy)
        custom.append(record)
        with case.aligned(), recorded(case.pipe.unet, call) as record:
            draw(case.pipe, prompt_of(case))
        ours.append(record)
    row, own = rows_of(case.base, PLAIN, "dog").start, concept_rows(case, dummy).start
    for name in ours[0]:
        for call in range(2):
            assert_rows(case, ours[call][name][1, row], custom[call][name][1, own])
        assert not torch.equal(ours[0][name][1, row], ours[1][name][1, row])


@pytest.fixture
def texts(monkeypatch) -> list:
    """Of every AlignIT block, its `Text`, which has the cache."""
    made = []

    class Kept(alignit_module.Text):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(alignit_module, "Text", Kept)
    return made


def test_calls_and_memory_of_learnt_concepts(tiny_model, texts, monkeypatch):
    """F 26: one batch of all concepts and layers a step, cut behind the concepts; of it, only their rows are kept."""
    pipe, calls = new_pipe(tiny_model, torch.float32), []
    mapper = concepts.create("neti", pipe, "<t>", "dog")
    vectors = concepts.create("p_plus", pipe, "<u>", "cat", num_vectors=2)
    learned = [Concept(c.placeholder_token, "x", dummy="one {} here", learned=c) for c in (mapper, vectors)]
    n_layers = len(text_layers(pipe.unet))
    pipe.text_encoder.register_forward_pre_hook(lambda _, args: calls.append(tuple(args[0].shape)))
    with alignit(pipe, learned):
        first = draw(pipe, "a <t> and a <u>")
        assert calls == [(1, 40), (1, 40), (2 * n_layers, 6), (n_layers, 5)]  # "o", "n", "e" and the start before them
        again = draw(pipe, "a <t> and a <u>")
        assert calls[4:] == [(1, 40), (1, 40)] and torch.equal(first, again)
    (text,) = texts
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in text.cache.values()}
    mapped, plain = 2 * n_layers * 1 * 16 * 4, 2 * n_layers * 2 * 16 * 4  # keys and values, rows, width, bytes
    assert sum(own.values()) == 2 * mapped + plain
    monkeypatch.setattr("alignkit.concepts.text.CACHE_BYTES", mapped + plain)
    with alignit(pipe, learned):
        assert torch.equal(draw(pipe, "a <t> and a <u>"), first)
    assert len(texts[1].cache) == 2


def test_image_differs_from_both_and_is_finite(case):
    with case.aligned():
        image = draw(case.pipe, prompt_of(case))
    assert image.isfinite().all()
    with customised(case):
        assert not torch.equal(image, draw(case.custom, prompt_of(case)))
    assert not torch.equal(image, draw(case.base, PLAIN))


def test_no_trace(case):
    """F 27: hooks, processors, tokenizer, what is trained; the same pixels before and after, and after an exception."""
    prompt = prompt_of(case)
    for net in (case.pipe.unet, case.pipe.text_encoder):
        for name, parameter in net.named_parameters():
            parameter.requires_grad_("lora_" in name)
    before, state = draw(case.pipe, prompt), trace(case.pipe)
    with case.aligned():
        draw(case.pipe, prompt)
    with pytest.raises(KeyError), case.aligned(infuse="keys"):
        draw(case.pipe, prompt)
        raise KeyError
    assert trace(case.pipe) == state and torch.equal(draw(case.pipe, prompt), before)


def trace(pipe) -> tuple:
    # the first such call leaves hooks of transformers in its own model, whoever makes it
    pipe.text_encoder(torch.tensor([[0]]), output_hidden_states=True)
    modules = [m for net in (pipe.unet, pipe.text_encoder, pipe.vae) for m in net.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in modules]
    flags = [m.disable_adapters for m in modules if hasattr(m, "base_layer")]
    flags += [p.requires_grad for m in modules for p in m.parameters(recurse=False)]
    return hooks, flags, [id(p) for p in pipe.unet.attn_processors.values()], len(pipe.tokenizer), set(vars(pipe))


def test_weights_stay(case):
    before = [p.clone() for net in (case.pipe.unet, case.pipe.text_encoder) for p in net.parameters()]
    with case.aligned():
        draw(case.pipe, prompt_of(case))
    after = [p for net in (case.pipe.unet, case.pipe.text_encoder) for p in net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# Identities


@pytest.mark.parametrize("settings", [{"strength": 0.0}, {"timesteps": (0, 0)}], ids=str)
def test_where_nothing_is_infused_it_is_the_base(case, settings):
    """F 22: with other numbers of tokens, too."""
    with case.aligned(**settings), recorded(case.pipe.unet) as ours:
        draw(case.pipe, prompt_of(case))
    with recorded(case.base.unet) as base:
        draw(case.base, PLAIN)
    assert all(torch.equal(got, base[name]) for name, got in ours.items())


def with_the_nouns_rows(case: Case) -> dict[str, Tensor]:
    """Keys and values of the base for P_0; in the concept's places the noun's, the last again where it has more."""
    with recorded(case.base.unet) as base:
        draw(case.base, PLAIN)
    noun, concept = rows_of(case.base, PLAIN, "dog"), concept_rows(case, case.concept.dummy.format(case.concept.phrase))
    own = [min(noun.start + i, noun.stop - 1) for i in range(concept.stop - concept.start)]
    order = [*range(noun.start), *own, *range(noun.stop, 40)] + [39] * 40
    return {name: torch.stack([rows[0], rows[1, order[:40]]]) for name, rows in base.items()}


def test_concept_of_the_base_is_the_base(tiny_model, dtype):
    """A LoRA that has learnt nothing, source prompt, phrase = noun's length: the base's own picture, bit for bit."""
    base, pipe = new_pipe(tiny_model, dtype), new_pipe(tiny_model, dtype)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"]))  # B = 0
    with alignit(pipe, [Concept("dog", "dog")], source="prompt"):
        assert torch.equal(draw(pipe, PLAIN), draw(base, PLAIN))


def test_without_a_concept_it_is_the_base(case):
    """F 17: with a warning, and base rows everywhere."""
    with case.aligned(), recorded(case.pipe.unet) as ours, pytest.warns(UserWarning, match="No concept in 'a hat'"):
        draw(case.pipe, "a hat")
    with recorded(case.base.unet) as base:
        draw(case.base, "a hat")
    assert all(torch.equal(ours[name], base[name]) for name in base)


def test_every_token_is_the_customised_model(lora):
    """F 17: a concept that is the whole prompt, from the same prompt: only start, end and padding stay the base's."""
    concept = Concept("a dog and a hat", "a dog and a hat")
    with recorded(lora.custom.unet) as custom:
        draw(lora.custom, PLAIN)
    with alignit(lora.pipe, [concept], source="prompt"), recorded(lora.pipe.unet) as ours:
        draw(lora.pipe, PLAIN)
    rows = rows_of(lora.base, PLAIN, PLAIN)
    assert all(torch.equal(ours[name][1, rows], custom[name][1, rows]) for name in custom)


def test_composing_rows_equals_infusing_keys_and_values(tiny_model, tmp_path, dtype):
    """F 19: of Textual Inversion, by rows of prompt_embeds and through the context bank."""
    for kind in ("textual_inversion", "two_vectors"):
        case = make(kind, tiny_model, tmp_path, dtype)
        with case.aligned(), recorded(case.pipe.unet) as composed:
            one = draw(case.pipe, prompt_of(case))
        with case.aligned(layers=text_layers(case.pipe.unet)), recorded(case.pipe.unet) as infused:
            two = draw(case.pipe, prompt_of(case))
        assert all(torch.equal(composed[name], infused[name]) for name in composed) and torch.equal(one, two)


def test_concept_rows_do_not_depend_on_the_prompt(case):
    """F 20: a word before and one behind are changed; with source prompt, the one before tells."""
    rows = concept_rows(case, prompt_of(case))
    for source in ("dummy", "prompt"):
        found = []
        for prompt in (prompt_of(case), prompt_of(case).replace("a hat", "a cap").replace("a ", "e ", 1)):
            with case.aligned(source=source), recorded(case.pipe.unet) as ours:
                draw(case.pipe, prompt)
            found.append(ours)
        same = [torch.equal(found[0][name][1, rows], found[1][name][1, rows]) for name in found[0]]
        assert all(same) if source == "dummy" else not any(same)
        assert not any(torch.equal(found[0][name][1], found[1][name][1]) for name in found[0])


def test_source_prompt_reads_the_words_before(inversion):
    """The concept's rows are those of the whole prompt in the customised model."""
    with recorded(inversion.custom.unet) as custom:
        draw(inversion.custom, prompt_of(inversion))
    with inversion.aligned(source="prompt"), recorded(inversion.pipe.unet) as ours:
        draw(inversion.pipe, prompt_of(inversion))
    rows = rows_of(inversion.custom, prompt_of(inversion), "<t>")
    assert all(torch.equal(ours[name][1, rows], custom[name][1, rows]) for name in custom)


# Options


@pytest.mark.parametrize("infuse", ["keys", "values"])
def test_keys_or_values_alone(case, infuse):
    """F 22: the other side is the base's, which numbers its rows as this one, and this one that of both."""
    records = {"none": with_the_nouns_rows(case)}
    for name, settings in {"both": {}, "one": {"infuse": infuse}}.items():
        with case.aligned(**settings), recorded(case.pipe.unet) as records[name]:
            draw(case.pipe, prompt_of(case))
    for name, got in records["one"].items():
        same = "both" if name.endswith("to_k") == (infuse == "keys") else "none"
        assert torch.equal(got, records[same][name])
    assert any(not torch.equal(records["both"][name], records["none"][name]) for name in records["both"])


def test_some_layers(case):
    names = text_layers(case.pipe.unet)
    records = {}
    for key, settings in {"both": {}, "none": {"strength": 0.0}, "one": {"layers": names[1:2]}}.items():
        with case.aligned(**settings), recorded(case.pipe.unet) as records[key]:
            draw(case.pipe, prompt_of(case))
    for name, got in records["one"].items():
        assert torch.equal(got, records["both" if name.startswith(names[1]) else "none"][name])


def test_window_of_timesteps(lora):
    """The first of two steps has timestep 501: windows that hold it or not."""
    records = {}
    settings = {
        "both": {},
        "none": {"strength": 0.0},
        "inside": {"timesteps": (400, 600)},
        "out": {"timesteps": (0, 400)},
    }
    for key, window in settings.items():
        with lora.aligned(**window), recorded(lora.pipe.unet) as records[key]:
            draw(lora.pipe, prompt_of(lora))
    for name in records["both"]:
        assert torch.equal(records["inside"][name], records["both"][name])
        assert torch.equal(records["out"][name], records["none"][name])


def test_strength_is_linear(case):
    records = [with_the_nouns_rows(case)]
    for strength in (0.5, 1.0):
        with case.aligned(strength=strength), recorded(case.pipe.unet) as record:
            draw(case.pipe, prompt_of(case))
        records.append(record)
    tolerance = 1e-5 if case.pipe.unet.dtype == torch.float32 else 3e-2
    for name in records[0]:
        mean = (records[0][name].float() + records[2][name].float()) / 2
        torch.testing.assert_close(records[1][name].float(), mean, rtol=tolerance, atol=tolerance)


# Prompts, batches, guidance


def test_batch_of_different_prompts(case):
    """The concept twice, elsewhere, and not at all: each row as it is alone; F 16."""
    phrase = case.concept.phrase
    prompts = [f"a {phrase}, one {phrase}", f"my red {phrase}", "a hat"]
    with case.aligned(), recorded(case.pipe.unet) as together:
        draw(case.pipe, prompts)
    tolerance = 1e-5 if case.pipe.unet.dtype == torch.float32 else 3e-2
    for i, prompt in enumerate(prompts):
        with case.aligned(), recorded(case.pipe.unet) as alone, contextlib.suppress(UserWarning):
            draw(case.pipe, prompt)
        for name in alone:
            torch.testing.assert_close(together[name][3 + i], alone[name][1], rtol=tolerance, atol=tolerance)


def test_guidance_batched_or_not_and_several_images(lora):
    """F 14: the negative half is the base's; without guidance the conditional rows are the same."""
    with lora.aligned():
        with recorded(lora.pipe.unet) as both:
            draw(lora.pipe, prompt_of(lora), negative_prompt="a cap")
        with recorded(lora.pipe.unet) as one:
            draw(lora.pipe, prompt_of(lora), guidance_scale=1.0)
        with recorded(lora.pipe.unet) as four:
            lora.pipe([prompt_of(lora), "a hat"], num_images_per_prompt=2, **STEPS)
    with recorded(lora.base.unet) as base:
        draw(lora.base, PLAIN, negative_prompt="a cap")
    for name in both:
        assert torch.equal(both[name][0], base[name][0])
        torch.testing.assert_close(both[name][1], one[name][0])
        torch.testing.assert_close(four[name][4], four[name][5], rtol=0, atol=0)
        torch.testing.assert_close(four[name][4], one[name][0])


def test_a_negative_prompt_that_names_the_concept(lora):
    """Its rows are the concept's there too, and the base's for the noun around them."""
    with lora.aligned():
        with recorded(lora.pipe.unet) as ours:
            draw(lora.pipe, prompt_of(lora))
        with recorded(lora.pipe.unet) as negative:
            draw(lora.pipe, "a <t> dog", negative_prompt=prompt_of(lora))
    assert all(torch.equal(negative[name][0], ours[name][1]) for name in ours)


def test_several_loras_and_concepts(lora):
    """Which LoRA is whose is not said, so that each concept gets their sum."""
    lora.pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), adapter_name="other")
    lora.pipe.unet.set_adapter(["default", "other"])
    both = [lora.concept, Concept("<u> cat", "cat")]
    with pytest.warns(UserWarning, match="The LoRAs default, other work together: each of the 2"):
        alignit(lora.pipe, both).__enter__()


def test_embeddings_brought_along(lora):
    """Those that encode_prompt made inside are AlignIT's; others are text of the base."""
    with lora.aligned():
        made = draw(lora.pipe, prompt_of(lora))
        embeds, negative = lora.pipe.encode_prompt(prompt_of(lora), "cpu", 1, True)
        assert torch.equal(draw_embeds(lora.pipe, embeds, negative), made)
        generator = torch.Generator().manual_seed(0)
        alone = lora.pipe(prompt_embeds=embeds, generator=generator, **STEPS).images
        assert torch.equal(alone, made)
        plain, empty = lora.base.encode_prompt(PLAIN, "cpu", 1, True)
        with recorded(lora.pipe.unet) as ours:
            draw_embeds(lora.pipe, plain, empty)
    with recorded(lora.base.unet) as base:
        draw(lora.base, PLAIN)
    assert all(torch.equal(ours[name], base[name]) for name in base)


def test_embeddings_of_another_length(lora):
    """Of two windows, as long prompts are brought: no row is put behind them, and they are text of the base."""
    longer = [torch.cat([side, side], dim=1) for side in lora.base.encode_prompt(PLAIN, "cpu", 1, True)]
    with lora.aligned(), recorded(lora.pipe.unet) as ours:
        draw_embeds(lora.pipe, *longer)
    with recorded(lora.base.unet) as base:
        draw_embeds(lora.base, *longer)
    assert all(torch.equal(ours[name], base[name]) for name in base)


def draw_embeds(pipe, embeds: Tensor, negative: Tensor) -> Tensor:
    generator = [torch.Generator().manual_seed(0)]
    return pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, generator=generator, **STEPS).images


def test_a_token_beside_its_noun(inversion):
    """No noun of its own: the base reads the prompt without the token, whose row is put in between."""
    alone = Concept("<t>", "", dummy="one {} dog")
    base = inversion.base.encode_prompt("a dog and a hat", "cpu", 1, False)[0][0]
    dummy = inversion.custom.encode_prompt("one <t> dog", "cpu", 1, False)[0][0]
    row, own = rows_of(inversion.base, PLAIN, "dog").start, concept_rows(inversion, "one <t> dog").start
    with alignit(inversion.pipe, [alone]):
        embeds = inversion.pipe.encode_prompt("a <t> dog and a hat", "cpu", 1, False)[0][0]
        last = inversion.pipe.encode_prompt("a dog <t>", "cpu", 1, False)[0][0]
    assert torch.equal(embeds, torch.cat([base[:row], dummy[own : own + 1], base[row:-1]]))
    base = inversion.base.encode_prompt("a dog", "cpu", 1, False)[0][0]
    behind = rows_of(inversion.base, "a dog", "dog").stop
    assert torch.equal(last, torch.cat([base[:behind], dummy[own : own + 1], base[behind:-1]]))
    for settings in ({"strength": 0.5}, {"infuse": "keys"}):
        with pytest.raises(ValueError, match="'<t>' has no noun"), alignit(inversion.pipe, [alone], **settings):
            pass


def test_beside_a_token_of_several_vectors(inversion):
    """Which encode_prompt writes out: all rows behind it stand elsewhere."""
    case, vectors = inversion, torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    for pipe in (case.pipe, case.base, case.custom):
        pipe.load_textual_inversion({"<s>": vectors})
    base = case.base.encode_prompt("a <s> and a dog and a hat", "cpu", 1, False)[0][0]
    dummy = case.custom.encode_prompt("one <t> here", "cpu", 1, False)[0][0]
    own = concept_rows(case, "one <t> here").start
    row = rows_of(case.base, "a <s> and a dog and a hat", "dog").start
    expected = torch.cat([base[:row], dummy[own : own + 1], base[row + 3 :], base[-1:].expand(2, -1)])
    with case.aligned():
        embeds = case.pipe.encode_prompt("a <s> and a <t> and a hat", "cpu", 1, True, "a <s> and a <t> and a hat")
        assert torch.equal(embeds[0][0], expected) and torch.equal(embeds[1][0], expected)
        with pytest.raises(ValueError, match="Prompt too long"):
            case.pipe.encode_prompt("very " * 7 + "<s> and red <t>", "cpu", 1, False)


def test_a_name_with_something_behind_it(inversion):
    """As tokenizers read it: in "<t>s" it is the concept, in "<t>_1" another's."""
    with inversion.aligned():
        embeds = inversion.pipe.encode_prompt("<t>s", "cpu", 1, False)[0][0]
        with pytest.warns(UserWarning, match="No concept"):
            inversion.pipe.encode_prompt("<t>_1", "cpu", 1, False)
    base = inversion.base.encode_prompt("dogs", "cpu", 1, False)[0][0]
    dummy = inversion.custom.encode_prompt("one <t> here", "cpu", 1, False)[0][0]
    own = concept_rows(inversion, "one <t> here").start
    assert torch.equal(embeds[1], dummy[own]) and torch.equal(embeds[2:-2], base[4:])


def test_weights_of_adapters_that_change_inside(tiny_model, tmp_path):
    """The rows of a LoRA of the text encoder are those of its weight now."""
    case, images = make("text_lora", tiny_model, tmp_path), []
    for weights in ((1.0, 0.1), (0.1,)):
        with case.aligned():
            for weight in weights:
                case.pipe.set_adapters("default", weight)
                images.append(draw(case.pipe, prompt_of(case)))
    assert torch.equal(images[1], images[2]) and not torch.equal(images[0], images[1])


def test_two_concepts_in_one_prompt(tiny_model):
    """One name is the beginning of the other; each keeps its own rows."""
    pipe, base = new_pipe(tiny_model, torch.float32), new_pipe(tiny_model, torch.float32)
    for i, token in enumerate(("<t>", "<t>_2")):
        pipe.load_textual_inversion({token: torch.randn(16, generator=torch.Generator().manual_seed(i))})
    both = [Concept("<t>", "x", dummy="{}"), Concept("<t>_2", "y", dummy="{}")]
    single = [pipe.encode_prompt(name, "cpu", 1, False)[0][0, 1] for name in ("<t>", "<t>_2")]
    with alignit(pipe, both):
        embeds = pipe.encode_prompt("<t>_2 and <t> and <t>_2", "cpu", 1, False)[0][0]
    expected = base.encode_prompt("y and x and y", "cpu", 1, False)[0][0]
    for row, concept in zip(rows_at(base, "y and x and y", "yxy"), (1, 0, 1), strict=True):
        expected[row] = single[concept]
    assert torch.equal(embeds, expected)


def rows_at(pipe, text: str, letters: str) -> list[int]:
    tokens = pipe.tokenizer.convert_ids_to_tokens(pipe.tokenizer(text).input_ids)
    return [i for i, token in enumerate(tokens) if token.removesuffix("</w>") in set(letters)]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_with_and_without_checkpointing(kind, tiny_model, tmp_path):
    """F 13: the contexts' gradient, through blocks that are computed a second time."""
    case, gradients = make(kind, tiny_model, tmp_path), []
    unet = case.pipe.unet
    with case.aligned(infuse="values"):
        embeds = case.pipe.encode_prompt(prompt_of(case), "cpu", 1, False)[0]
        x_t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for checkpointing in (False, True):
            unet.train()
            (unet.enable_gradient_checkpointing if checkpointing else unet.disable_gradient_checkpointing)()
            given = embeds.clone().requires_grad_()
            output = unet(x_t, 10, given).sample
            unet(output, 500, given).sample.square().sum().backward()
            gradients.append(given.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


def test_bank_beside_img2img_and_second_order(lora):
    """F 15: the timestep is the network's own, in a solver that calls it twice a step and with floats."""
    from diffusers import HeunDiscreteScheduler, StableDiffusionImg2ImgPipeline

    pipe = StableDiffusionImg2ImgPipeline(**lora.pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with alignit(pipe, [lora.concept], timesteps=(0, 300)), recorded(pipe.unet) as ours:
        pipe(prompt_of(lora), torch.rand(1, 3, 16, 16), strength=0.3, num_inference_steps=10, output_type="latent")
    with lora.aligned(), recorded(lora.pipe.unet) as full:
        draw(lora.pipe, prompt_of(lora))
    assert all(torch.equal(ours[name], full[name]) for name in full)


def test_controlnet_reads_the_base(lora):
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(lora.base.unet, conditioning_embedding_out_channels=(4, 8)).eval()
    parts = lora.pipe.components | {"controlnet": controlnet}
    pipe = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    control = torch.rand(1, 3, 16, 16)
    plain = StableDiffusionControlNetPipeline(
        **(lora.base.components | {"controlnet": controlnet}), requires_safety_checker=False
    )
    plain.set_progress_bar_config(disable=True)
    with recorded(controlnet) as base:
        plain(PLAIN, control, **STEPS)
    with alignit(pipe, [lora.concept]), recorded(controlnet) as ours:
        pipe(prompt_of(lora), control, **STEPS)
    assert all(torch.equal(ours[name], base[name]) for name in base)


def test_values_of_other_words(tiny_model):
    """Keys of one word, values of another, each as its own model call has them; every other row the base's."""
    pipe = new_pipe(tiny_model, torch.float32)
    records = {}
    for text in (PLAIN, "a cat", "a dog"):
        with recorded(pipe.unet) as records[text]:
            draw(pipe, text)
    concept = Concept("dog", "dog", dummy="a {}", values_from="cat")
    with alignit(pipe, [concept]), recorded(pipe.unet) as ours:
        draw(pipe, PLAIN)
    noun = rows_of(pipe, PLAIN, "dog")
    for name, got in ours.items():
        own = records["a dog" if name.endswith("to_k") else "a cat"][name]
        assert torch.equal(got[1, noun], own[1, noun])
        rest = torch.ones(40, dtype=torch.bool)
        rest[noun] = False
        assert torch.equal(got[1, rest], records[PLAIN][name][1, rest])
    longer = Concept("dog", "dog", values_from="horse")
    with alignit(pipe, [longer]), pytest.raises(ValueError, match="'horse' has 5 tokens, expected the 3"):
        draw(pipe, PLAIN)


@pytest.fixture
def sdxl(tiny_model) -> StableDiffusionXLPipeline:
    return tiny_sdxl(new_pipe(tiny_model, torch.float32))


def test_sdxl(sdxl):
    """Rows of both encoders; the pooled text is the noun prompt's; zeros for an empty negative prompt go through."""
    unet = sdxl.unet
    settings = {"height": 16, "width": 16}
    with recorded(unet) as base:
        draw(sdxl, PLAIN, **settings)
    pooled = sdxl.encode_prompt(PLAIN, device="cpu")[2]
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"]))
    shake(p for n, p in unet.named_parameters() if "lora_" in n)
    concept = Concept("<t> dog", "dog", dummy="one {} here")
    with recorded(unet) as custom:
        draw(sdxl, "one <t> dog here", **settings)
    with alignit(sdxl, [concept]), recorded(unet) as ours:
        draw(sdxl, PROMPT, **settings)
        assert torch.equal(sdxl.encode_prompt(PROMPT, device="cpu")[2], pooled)
        with pytest.raises(ValueError, match="both text encoders read the same"):
            sdxl.encode_prompt(PROMPT, prompt_2="a hat", device="cpu")
    noun, rows = rows_of(sdxl, PLAIN, "dog"), rows_of(sdxl, "one <t> dog here", "<t> dog")
    n = rows.stop - rows.start
    for name, got in ours.items():
        assert torch.equal(got[0], base[name][0]) and torch.equal(got[1, : noun.start], base[name][1, : noun.start])
        assert torch.equal(got[1, noun.start : noun.start + n], custom[name][1, rows])
        behind = 40 - noun.start - n
        assert torch.equal(got[1, noun.start + n :], base[name][1, noun.stop :][:behind])
    learned = concepts.create("textual_inversion", sdxl, "<x>", "dog")
    shake(learned.module.parameters())
    unet.disable_adapters()
    with alignit(sdxl, [Concept("<x>", "dog", learned=learned)]):
        assert draw(sdxl, "a <x>", **settings).isfinite().all()


def test_compiled(lora):
    """The same picture through compiled blocks, and no new graph for another prompt, timestep or strength."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    settings = [{}, {"strength": 0.5}]
    prompts = [prompt_of(lora), "a hat on a <t> dog"]
    expected = []
    for setting, prompt in zip(settings, prompts, strict=True):
        with lora.aligned(**setting):
            expected.append(draw(lora.pipe, prompt))
    torch._dynamo.reset()
    lora.pipe.unet.compile_repeated_blocks(backend=backend)
    counts = []
    for setting, prompt, images in zip(settings, prompts, expected, strict=True):
        with lora.aligned(**setting):
            torch.testing.assert_close(draw(lora.pipe, prompt), images, rtol=0, atol=1e-4)
        counts.append(len(graphs))
    assert counts[0] > 0 and counts[1] == counts[0]


# Refused by name


def test_merged_lora(lora, tiny_model, tmp_path):
    lora.pipe.unet.fuse_lora()
    with pytest.raises(ValueError, match="was merged into the weights"), lora.aligned():
        pass
    case = make("text_lora", tiny_model, tmp_path)
    for layer in (m for m in case.pipe.text_encoder.modules() if hasattr(m, "base_layer")):
        layer.merge()
    rebuilt = StableDiffusionPipeline(**case.pipe.components, requires_safety_checker=False)  # which knows of nothing
    with pytest.raises(ValueError, match=r"The LoRA \['default'\] was merged"), alignit(rebuilt, [case.concept]):
        pass


def test_lora_that_the_pipeline_merged(tiny_model, tmp_path):
    pipe = new_pipe(tiny_model, torch.float32)
    customise("lora", pipe, tmp_path)
    save_lora(tmp_path, pipe.unet)
    pipe = new_pipe(tiny_model, torch.float32)
    pipe.load_lora_weights(tmp_path, adapter_name="thing")
    pipe.fuse_lora()
    with pytest.raises(ValueError, match=r"\['thing'\] was merged"), alignit(pipe, [Concept("<t> dog", "dog")]):
        pass
    pipe.unfuse_lora()
    with alignit(pipe, [Concept("<t> dog", "dog")]):
        pass


def test_a_trained_lora_of_the_base_stays_trained(lora):
    """Named in base_adapters: it is switched for every call, and its gradient's flag comes back."""
    unet = lora.pipe.unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), adapter_name="style")
    unet.set_adapter(["default", "style"])
    unet.requires_grad_(False)
    trained = [p for n, p in unet.named_parameters() if "lora_" in n]
    for parameter in trained:
        parameter.requires_grad_()
    with lora.aligned(base_adapters=["style"]):
        draw(lora.pipe, prompt_of(lora))
    assert trained and all(parameter.requires_grad for parameter in trained)


def test_fused_projections(lora):
    plain = new_pipe_like(lora)
    plain.fuse_qkv_projections()
    with pytest.raises(ValueError, match="fused projections"), alignit(plain, [lora.concept], custom=lora.custom):
        pass


def new_pipe_like(case: Case) -> StableDiffusionPipeline:
    return copy.copy(case.base)


class Foreign:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        return hidden_states


def test_foreign_processor_and_exchange_inside(lora, inversion):
    for case in (lora, inversion):
        with case.aligned():
            case.pipe.unet.set_attn_processor(Foreign())
            with pytest.raises(RuntimeError, match="attention processor Foreign"):
                draw(case.pipe, prompt_of(case))
        with pytest.raises(ValueError, match="attention processor Foreign"), case.aligned():
            pass


def test_fusion_and_step_cache_inside(lora, inversion):
    """F 24: what comes up while the block is open."""
    with inversion.aligned():
        inversion.pipe.unet.fuse_qkv_projections()
        with pytest.raises(RuntimeError, match="attention processor Fused"):
            draw(inversion.pipe, prompt_of(inversion))
    with lora.aligned():
        broadcast(lora.pipe.unet)
        with pytest.raises(RuntimeError, match="reuses what earlier steps computed"):
            draw(lora.pipe, prompt_of(lora))


def test_a_lora_that_is_merged_or_loaded_inside(lora, inversion, tiny_model, tmp_path):
    """Through the network or the pipeline, whether or not the network is attached to."""
    text_lora = make("text_lora", tiny_model, tmp_path)
    with lora.aligned():
        draw(lora.pipe, prompt_of(lora))
        lora.pipe.unet.fuse_lora()
        with pytest.raises(RuntimeError, match=r"The LoRA \['default'\] was merged"):
            draw(lora.pipe, prompt_of(lora))
    with text_lora.aligned():
        text_lora.pipe.fuse_lora(["text_encoder"])
        with pytest.raises(RuntimeError, match=r"The LoRA \['default'\] was merged"):
            draw(text_lora.pipe, prompt_of(text_lora))
    with inversion.aligned():
        inversion.pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]))
        with pytest.raises(RuntimeError, match="attention modules were exchanged"):
            draw(inversion.pipe, prompt_of(inversion))


def test_a_step_does_not_walk_the_network(lora, monkeypatch):
    """But after a change in it, once."""
    with lora.aligned():
        draw(lora.pipe, prompt_of(lora))
        walks = []
        monkeypatch.setattr(checks, "_check_network", lambda *args: walks.append(args))
        draw(lora.pipe, prompt_of(lora))
        assert not walks
        lora.pipe.unet.set_attn_processor(attention_processor.AttnProcessor())
        draw(lora.pipe, prompt_of(lora))
        assert len(walks) == 1


def broadcast(unet: nn.Module) -> None:
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    config = PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2,
        current_timestep_callback=lambda: 1,
        cross_attention_block_identifiers=["mid"],
    )
    apply_pyramid_attention_broadcast(unet, config)


def test_processors_are_told_by_their_class_and_place(inversion):
    """One that only bears the name of diffusers' is foreign; what reads no text may be anybody's, as PAG's are."""

    class AttnProcessor(attention_processor.AttnProcessor):
        pass

    unet, prompt = inversion.pipe.unet, prompt_of(inversion)
    with inversion.aligned():
        expected = draw(inversion.pipe, prompt)
    own = unet.attn_processors
    unet.set_attn_processor({n: AttnProcessor() if "attn1" in n else p for n, p in own.items()})
    with inversion.aligned():
        torch.testing.assert_close(draw(inversion.pipe, prompt), expected, rtol=0, atol=1e-4)
    unet.set_attn_processor({n: AttnProcessor() if "attn2" in n else p for n, p in own.items()})
    with pytest.raises(ValueError, match="attention processor AttnProcessor"), inversion.aligned():
        pass


def test_step_cache(inversion):
    broadcast(inversion.pipe.unet)
    with pytest.raises(ValueError, match="reuses what earlier steps computed"), inversion.aligned():
        pass


def test_a_step_cache_of_others(inversion):
    """DeepCache's way: the forward of a block is exchanged. What offloading leaves behind is the class's own."""
    block = inversion.pipe.unet.down_blocks[0]
    add_hook_to_module(block, ModelHook())
    with inversion.aligned():
        draw(inversion.pipe, prompt_of(inversion))
    remove_hook_from_module(block)
    with inversion.aligned():
        draw(inversion.pipe, prompt_of(inversion))
        own, block.forward = block.forward, lambda *args, **kwargs: own(*args, **kwargs)
        with pytest.raises(RuntimeError, match=r"down_blocks.0 has another forward than its class"):
            draw(inversion.pipe, prompt_of(inversion))
    with pytest.raises(ValueError, match="DeepCache"), inversion.aligned():
        pass


@pytest.fixture(params=["sd3", "flux"])
def joint(request, tmp_path):
    """(base, custom) of two joint blocks: other text encoders around one transformer."""
    base = load_base(thin(request.param, tmp_path, num_layers=2), random_init=True, shrink=40).pipeline()
    base.set_progress_bar_config(disable=True)
    parts = {n: copy.deepcopy(part) if n.startswith("text_encoder") else part for n, part in base.components.items()}
    custom = type(base)(**{n: parts[n] for n in inspect.signature(type(base).__init__).parameters if n in parts})
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if name in parts:
            shake(parts[name].parameters(), 0.5)
    return base, custom


def encode(pipe, prompt: str) -> tuple[Tensor, Tensor]:
    """Rows and pooled embedding, with 24 rows of T5."""
    is_sd3 = hasattr(pipe, "text_encoder_3")
    more = {"prompt_3": None, "do_classifier_free_guidance": False} if is_sd3 else {}
    embeds = pipe.encode_prompt(prompt, prompt_2=None, device="cpu", max_sequence_length=24, **more)
    return embeds[0], embeds[2 if is_sd3 else 1]


def word_rows(pipe, prompt: str, number: int) -> list[int]:
    """Rows of a prompt's word, by the tokenizers' own account of words."""
    segments = [(pipe.tokenizer_2, 0)]
    if hasattr(pipe, "tokenizer_3"):
        segments = [(pipe.tokenizer, 0), (pipe.tokenizer_3, pipe.tokenizer_max_length)]
    return [
        start + row
        for tokenizer, start in segments
        for row, of in enumerate(tokenizer(prompt).word_ids())
        if of == number
    ]


JOINT_STEP = {"num_inference_steps": 1, "height": 32, "width": 32, "max_sequence_length": 24, "output_type": "latent"}


def drawn_jointly(pipe, prompt: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents, and the prompt's text as it enters the transformer, its first block and its second."""
    seen, network = {}, pipe.transformer
    watched = {"transformer": network, "first": network.transformer_blocks[0], "second": network.transformer_blocks[1]}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, given, name=name: seen.__setitem__(name, given["encoder_hidden_states"][-1].clone()),
            with_kwargs=True,
        )
        for name, module in watched.items()
    ]
    latents = pipe(prompt, generator=torch.Generator().manual_seed(0), **JOINT_STEP).images
    for handle in handles:
        handle.remove()
    return latents, seen


def test_joint_attention_exchanges_the_rows_that_enter(joint):
    """Of CLIP and of T5, the concept's rows are the customised encoders' for the dummy prompt, others the base's."""
    base, custom = joint
    expected, expected_pooled = encode(base, "a y on it")
    dummy, _ = encode(custom, "a photo of x")
    rows, own = word_rows(base, "a y on it", 1), word_rows(base, "a photo of x", 3)
    assert rows and len(rows) == len(own) and not torch.equal(expected[:, rows], dummy[:, own])
    expected[:, rows] = dummy[:, own]
    with alignit(base, [Concept("x", "y")], custom=custom, mode="input"):
        embeds, pooled = encode(base, "a x on it")
    assert torch.equal(embeds, expected) and torch.equal(pooled, expected_pooled)


def test_joint_attention_keeps_other_rows_up_to_the_first_block(joint):
    base, custom = joint
    plain, of_base = drawn_jointly(base, "a y on it")
    with pytest.warns(UserWarning, match="from the second block on"):
        block = alignit(base, [Concept("x", "y")], custom=custom, mode="input")
        block.__enter__()
    latents, seen = drawn_jointly(base, "a x on it")
    block.__exit__(None, None, None)
    rows = word_rows(base, "a y on it", 1)
    others = [row for row in range(len(seen["transformer"])) if row not in rows]
    for place in ("transformer", "first"):
        assert torch.equal(seen[place][others], of_base[place][others])
        assert not torch.equal(seen[place][rows], of_base[place][rows])
    assert (seen["second"][others] != of_base["second"][others]).any(dim=1).all()  # as the docs say: none is kept
    assert latents.isfinite().all() and not torch.equal(latents, plain)


def test_joint_attention_without_a_concept_and_behind_an_exception(joint):
    base, custom = joint
    expected, before = encode(base, "a y on it"), [drawn_jointly(pipe, "a y on it")[0] for pipe in joint]
    weights = {name: p.clone() for name, p in base.text_encoder_2.named_parameters()}
    with pytest.raises(KeyError), alignit(base, [Concept("x", "y")], custom=custom, mode="input"):
        with pytest.warns(UserWarning, match="No concept in 'a y on it': expected 'x'"):
            assert all(map(torch.equal, encode(base, "a y on it"), expected))
        with pytest.raises(ValueError, match="Prompt too long"):
            encode(base, "very " * 90 + "x")
        encode(base, "a x on it")
        raise KeyError
    assert "encode_prompt" not in vars(base) and "encode_prompt" not in vars(custom)
    assert all(torch.equal(p, weights[name]) for name, p in base.text_encoder_2.named_parameters())
    assert all(map(torch.equal, [drawn_jointly(pipe, "a y on it")[0] for pipe in joint], before))


def test_textual_inversion_of_t5(tmp_path):
    """Two vectors in FLUX's T5 stand where one noun stood; CLIP's, of the pooled embedding alone, cannot come in."""
    pipe = load_base(thin("flux", tmp_path), random_init=True, shrink=40).pipeline()
    expected, pooled = encode(pipe, "a y on it")
    pipe.load_textual_inversion({"<c>": torch.randn(pipe.text_encoder.config.hidden_size)})
    with pytest.raises(ValueError, match=r"whose rows enter the transformer \(text_encoder_2\)"):
        alignit(pipe, [Concept("<c>", "y")], mode="input").__enter__()
    vectors = torch.randn(2, pipe.text_encoder_2.config.d_model)
    pipe.load_textual_inversion({"<t>": vectors}, text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)
    dummy, _ = encode(pipe, "a photo of <t>")
    tokens = pipe.tokenizer_2.convert_ids_to_tokens(pipe.tokenizer_2("a photo of <t> <t>_1").input_ids)
    own = [tokens.index("<t>"), tokens.index("<t>_1")]
    with alignit(pipe, [Concept("<t>", "y")], mode="input"):
        embeds, own_pooled = encode(pipe, "a <t> on it")
    rows = word_rows(pipe, "a y on it", 1)
    start, stop = rows[0], rows[-1] + 1
    whole = torch.cat([expected[:, :start], dummy[:, own], expected[:, stop:], expected[:, -1:]], dim=1)
    assert torch.equal(embeds, whole[:, :24]) and torch.equal(own_pooled, pooled)


def test_lora_and_joint_attention(tmp_path):
    """One of SD3's CLIP comes in with its rows; one of the transformer cannot, unless it is the base's own."""
    pipe = load_base(thin("sd3", tmp_path), random_init=True, shrink=40).pipeline()
    expected, _ = encode(pipe, "a y on it")

    def add(module, name: str) -> None:
        torch.manual_seed(0)
        module.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "to_q"]), adapter_name=name)
        shake(p for n, p in module.named_parameters() if name in n)
        module.requires_grad_(False)

    add(pipe.text_encoder, "thing")
    dummy, _ = encode(pipe, "a photo of x")
    rows, own = word_rows(pipe, "a y on it", 1), word_rows(pipe, "a photo of x", 3)
    expected[:, rows] = dummy[:, own]
    with alignit(pipe, [Concept("x", "y")], mode="input"):
        assert torch.equal(encode(pipe, "a x on it")[0], expected)
    add(pipe.transformer, "style")
    with pytest.raises(ValueError, match="The LoRA 'style' changes the transformer"):
        alignit(pipe, [Concept("x", "y")], mode="input").__enter__()
    with alignit(pipe, [Concept("x", "y")], mode="input", base_adapters=["style"]):
        assert torch.equal(encode(pipe, "a x on it")[0], expected)
    with pytest.raises(ValueError, match="Nothing in the text encoders"):
        alignit(pipe, [Concept("x", "y")], mode="input", base_adapters=["style", "thing"]).__enter__()
    pipe.transformer.disable_adapters()
    with alignit(pipe, [Concept("x", "y")], mode="input"):
        assert torch.equal(encode(pipe, "a x on it")[0], expected)


def test_what_input_rows_cannot_carry(joint, tmp_path):
    base, custom = joint
    pipe = load_base("sd15", random_init=True, shrink=40).pipeline()
    learned = concepts.create("neti", pipe, "<t>", "dog")
    other = copy.copy(base)
    other.transformer = copy.deepcopy(base.transformer)
    for target, concept, settings, message in [
        (pipe, Concept("x", "y"), {}, "SD3 and FLUX"),
        (base, Concept("x", "y"), {"infuse": "keys"}, "no infuse"),
        (base, Concept("x", "y"), {}, "Nothing in the text encoders whose rows"),
        (base, Concept("x", "y"), {"custom": base}, "Nothing in the text encoders whose rows"),
        (base, Concept("<t>", "dog", learned=learned), {"custom": custom}, "knows no T5"),
        (base, Concept("x", "y", values_from="z"), {"custom": custom}, "keys and values are both made"),
        (base, Concept("x", "y"), {"custom": other}, "another transformer"),
    ]:
        with pytest.raises(ValueError, match=message), alignit(target, [concept], mode="input", **settings):
            pass


def test_negative_prompts_of_joint_attention(joint):
    """As any prompt: the concept's rows where it is named, and no word of warning where FLUX asks for it alone."""
    base, custom = joint
    guided = {"negative_prompt": "a z", **({} if hasattr(base, "text_encoder_3") else {"true_cfg_scale": 2.0})}
    with alignit(base, [Concept("x", "y")], custom=custom, mode="input"), warnings.catch_warnings():
        warnings.simplefilter("error")
        latents = base("a x on it", **guided, **JOINT_STEP).images
    assert latents.isfinite().all()


def test_a_second_pipeline_elsewhere(lora, tiny_model, tmp_path):
    """In another precision, or on another device: torch would say so from within the U-Net."""
    graft, half = make("graft", tiny_model, tmp_path), new_pipe(tiny_model, torch.bfloat16)
    for part in ("unet", "text_encoder"):
        other = new_pipe(tiny_model, torch.float32)
        setattr(other, part, getattr(half, part))
        for side in ("base", "custom") if part == "unet" else ("base",):
            with pytest.raises(ValueError, match=rf"{part} is in torch.bfloat16 on cpu, expected torch.float32 on cpu"):
                alignit(lora.pipe, [lora.concept], **{side: other}).__enter__()
    lora.base.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), adapter_name="style")
    lora.base.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), adapter_name="other")
    lora.base.unet.set_adapter(["style", "other"])
    with alignit(lora.pipe, [lora.concept], base=lora.base, base_adapters=["style"]):
        draw(lora.pipe, prompt_of(lora))
    graft.custom.unet.to("meta")
    with pytest.raises(ValueError, match="on meta, expected torch.float32 on cpu"), graft.aligned():
        pass


def test_scale_of_a_lora_that_is_grafted(lora):
    """It reaches the LoRAs of the pipeline that runs alone."""
    scaled = {"cross_attention_kwargs": {"scale": 0.5}}
    with alignit(lora.base, [lora.concept], custom=lora.custom):
        draw(lora.base, prompt_of(lora), cross_attention_kwargs={"scale": 1.0})
        with pytest.raises(ValueError, match="scale 0.5 of cross_attention_kwargs does not reach the LoRA 'default'"):
            draw(lora.base, prompt_of(lora), **scaled)
    with lora.aligned():
        draw(lora.pipe, prompt_of(lora), **scaled)


def test_joint_attention():
    class Joint:
        transformer = nn.Linear(1, 1)

    with pytest.raises(ValueError, match="joint attention"), alignit(Joint(), [Concept("<t>", "dog")]):
        pass


def test_another_base(lora):
    other = load_base("sd15", random_init=True, shrink=16).pipeline()
    for side in ("base", "custom"):
        with pytest.raises(ValueError, match="different bases"), alignit(lora.base, [lora.concept], **{side: other}):
            pass


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"infuse": "k"}, "infuse both, keys or values"),
        ({"source": "noun"}, "source dummy or prompt"),
        ({"strength": 2.0}, "strength: expected between 0 and 1"),
        ({"layers": ["down"]}, "layers: expected some of"),
        ({"layers": []}, "layers: expected some of"),
        ({"timesteps": (5, 1)}, "timesteps: expected the lowest"),
    ],
)
def test_wrong_settings(lora, settings, message):
    with pytest.raises(ValueError, match=message), lora.aligned(**settings):
        pass


def test_a_lora_that_is_switched_off(lora):
    """Nothing is customised then."""
    lora.pipe.unet.disable_adapters()
    with pytest.raises(ValueError, match="Nothing in this pipeline is customised for '<t> dog'"), lora.aligned():
        pass


def test_wrong_concepts(inversion):
    pipe = inversion.pipe
    for make_concepts, message in [
        (lambda: [], "at least one concept"),
        (lambda: [Concept("<t>", "dog", dummy="a photo")], "one {} for the concept"),
        (lambda: [Concept("<t> ", "dog")], "without space around"),
        (lambda: [Concept("<t>", "dog"), Concept("<t>", "cat")], "Two concepts are called"),
        (lambda: [Concept("<t>", "dog", dummy="<t> and {}")], "once and no other concept"),
        (lambda: [Concept("qx", "dog")], "Nothing in this pipeline is customised for 'qx'"),
    ]:
        with pytest.raises(ValueError, match=message), alignit(pipe, make_concepts()):
            pass


def test_wrong_prompts(inversion):
    pipe = inversion.pipe
    with inversion.aligned():
        with pytest.raises(ValueError, match="Prompt too long"):
            draw(pipe, "very " * 9 + "red <t>")
        with pytest.raises(RuntimeError, match="replaced already"), inversion.aligned():
            pass
    pipe.load_textual_inversion({"<u>": torch.randn(16)})
    overlapping = [Concept("my <t>", "dog", dummy="{}"), Concept("<t> <u>", "cat", dummy="{}")]
    with alignit(pipe, overlapping), pytest.raises(ValueError, match="overlap in"):
        draw(pipe, "my <t> <u>")
