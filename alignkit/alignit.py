"""AlignIT: the concept's keys and values, and nobody else's changed. Agarwal, Karanam & Srinivasan, arXiv 2406.18893.

A customised model draws its concept well and the rest of the prompt badly, because the keys and values of *all* tokens
changed: by the text encoder, whose later tokens have read the concept's, or by W_k and W_v themselves. With 0 the base
model, * the customised one, P_0 the prompt with the class noun in the concept's place, C its positions, and D a dummy
prompt, "a photo of <thing>", with the concept at pi(i), every cross-attention layer n reads

    K_i = W_k*^n E*(D)_pi(i)    for i in C
    K_i = W_k0^n E0(P_0)_i      for every other i, start, end and padding too

and V_i likewise.

No training, no parameter. The paper's abstract and summaries of it were at hand, not its text: docs/alignit.md says
what is inferred. Used on stock pipelines of SD 1.x, SD 2.x and SDXL; for SD3 and FLUX there is `mode="input"` below:

    pipe.load_textual_inversion("learned_embeds.safetensors")
    with alignit(pipe, [Concept("<thing>", "cat")]):
        pipe("a <thing> and a dog on the beach")

How it is done depends on what the customiser changed. Where that is the text alone, rows of the prompt's embedding are
exchanged and the network is not touched. Where W_k and W_v differ, or what is infused depends on the layer or the
timestep, the network reads from a context bank (attention.py): each prompt's embedding is marked with the prompt's
number (marker.py) and, at every call, exchanged for the contexts of all layers.
"""

import copy
import inspect
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models import attention_processor
from torch import Tensor, nn

from alignkit.attention import (
    ATTENTION_CACHES,
    BLOCK_CACHES,
    find_cache,
    only_adapters,
    paired_projections,
    projection_pairs,
    text_layers,
    text_parts,
)
from alignkit.concepts.text import encode_contexts, keep_recent, prefix, tokenize, towers
from alignkit.data import word_pattern
from alignkit.marker import is_marked, marked, numbered_bank, take_numbers, unmarked

PROCESSORS = (  # of diffusers, that read text as the first of them does
    "AttnProcessor", "AttnProcessor2_0", "AttnAddedKVProcessor", "AttnAddedKVProcessor2_0", "SlicedAttnProcessor",
    "XFormersAttnProcessor", "AttnProcessorNPU", "XLAFlashAttnProcessor2_0", "CustomDiffusionAttnProcessor",
    "CustomDiffusionAttnProcessor2_0", "CustomDiffusionXFormersAttnProcessor", "IPAdapterAttnProcessor",
    "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor",
)  # fmt: skip

_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_MERGED = (
    "The LoRA {} was merged into the weights, so the base's are gone. Call pipe.unfuse_lora() first, or load it "
    "without merging."
)


@dataclass(frozen=True)
class Concept:
    """What prompts call a concept, and what the base model is to read there.

    phrase: all words that carry it: "<thing>" of Textual Inversion, "sks dog" of DreamBooth, "<new1> cat" of Custom
        Diffusion.
    noun: the class noun that takes the phrase's place in P_0. Empty where the prompt has it beside the phrase: with
        "<new1>" and "" the base reads "a cat" of "a <new1> cat", and the token's rows are put in between.
    dummy: D, with {} for the phrase.
    learned: of `alignkit.concepts`, when the vectors are not in the pipeline's tokenizer.
    values_from: words whose values are taken while the keys stay the phrase's, with as many tokens: the paper's
        semantic manipulation, as far as its abstract tells.
    """

    phrase: str
    noun: str
    dummy: str = "a photo of {}"
    learned: Any = None
    values_from: str | None = None

    def __post_init__(self):
        for name in ("phrase", "noun"):
            value = getattr(self, name)
            if (name == "phrase" and not value) or value != value.strip():
                raise ValueError(f"{name}: expected words without space around them, got {value!r}.")
        if self.dummy.count("{}") != 1:
            raise ValueError(f"dummy: expected a prompt with one {{}} for the concept, got {self.dummy!r}.")


@contextmanager
def alignit(
    pipe: Any,
    concepts: Sequence[Any],
    *,
    mode: Literal["attention", "input"] = "attention",
    base: Any = None,
    custom: Any = None,
    source: Literal["dummy", "prompt"] = "dummy",
    infuse: Literal["both", "keys", "values"] = "both",
    strength: float = 1.0,
    layers: Sequence[str] | None = None,
    timesteps: tuple[float, float] | None = None,
    truncation: int | None = None,
    base_adapters: Sequence[str] = (),
) -> Iterator[Any]:
    """Inside, prompts that hold a concept are drawn with AlignIT; afterwards the pipeline is as it was, come what may.

    pipe: a stock pipeline, customised: with Textual Inversion's tokens, a LoRA that is not merged, Custom Diffusion's
        processors, or another U-Net and text encoder.
    concepts: `Concept`s, or what `alignkit.concepts.load` returns.
    mode: attention keeps the promise above in every layer. With joint attention (SD3, FLUX) none can be kept behind the
        first block, where every row has read all others; input, for these alone, keeps it of the rows that enter the
        transformer (SD3: of CLIP and of T5; FLUX: of T5) and of nothing behind, and says so in a warning. Pooled
        embeddings, which are of a whole prompt, stay the base's. It takes what changed those text encoders: tokens of
        Textual Inversion, a LoRA in them, or others in `custom`; no LoRA of the transformer, and no other transformer.
    base: the base pipeline, where `pipe` does not hold its weights any more (DreamBooth's whole U-Net).
    custom: the customised pipeline, where `pipe` is the base: its queries and all else stay the base's then.
    source: of the concept's rows: the dummy prompt, or the same prompt in the customised model, which lets the words
        before the concept speak to it.
    truncation: units of a NeTI concept's mapper that are kept.
    base_adapters: names of LoRAs that belong to the base, such as a style's: every token keeps what they do, and only
        the others are the customiser's.

    The paper infuses keys and values of all layers at all timesteps. These are ours: `infuse` keys or values alone;
    `strength` w, of (1 - w) base + w concept; `layers`, a choice of `attention.text_layers(pipe.unet)`; `timesteps`,
    the lowest and the highest of the training schedule between which anything is infused. Elsewhere, and with strength
    0, all is the base's for P_0. Where keys or values alone are infused, the other side has to number its rows as
    they do, as has the base's share: there the noun's rows stand in the concept's places, its last one again where the
    concept has more, which takes a noun.

    Raises ValueError for what cannot keep the promise: a LoRA that was merged, fused projections, attention processors
    of others, a cache of earlier steps, joint attention, another base, a second pipeline on another device or in
    another precision; RuntimeError when one of these comes up inside.
    """
    concepts = _as_concepts(concepts)
    _check_settings(mode, source, infuse, strength, timesteps)
    if infuse != "both" or 0 < strength < 1:
        _check_nouns(concepts)
    if "encode_prompt" in vars(pipe):
        raise RuntimeError("This pipeline's encode_prompt is replaced already: leave that `with` block first.")
    if mode == "input":
        if infuse != "both" or layers is not None or timesteps is not None or truncation is not None:
            raise ValueError(
                "mode input exchanges whole rows before the first layer: no infuse, layers, timesteps or truncation."
            )
        with _input_rows(pipe, concepts, base, custom, source, strength, base_adapters):
            yield pipe
        return
    _check_family(pipe)
    for other in (base, custom):
        if other is not None:
            _check_family(other)
    _check_concepts(pipe, concepts, source, truncation)
    pairs = projection_pairs(pipe.unet, getattr(base, "unet", None), getattr(custom, "unet", None), base_adapters)
    two_weights = any(pair.base is not pair.custom for pair in pairs)
    if base is not None or custom is not None:
        for pair in pairs:
            theirs = pair.custom if base is None else pair.base
            _check_place(pipe, "unet", pair.module, getattr(theirs, "layer", theirs))  # of SomeAdapters
    if base is not None:
        _check_encoders(pipe, base)
    check = _watch_network(pipe.unet)
    _warn_of_sums(custom or pipe, concepts, base_adapters)
    names = text_layers(pipe.unet)
    unknown = sorted(set(layers or ()) - set(names))
    if unknown or (layers is not None and not layers):
        raise ValueError(f"layers: expected some of {names}, got {unknown or 'none'}.")

    tokenizers = tuple(name for name in ("tokenizer", "tokenizer_2") if getattr(pipe, name, None) is not None)
    window = min(getattr(base or pipe, name).model_max_length for name in tokenizers)
    segment = _Segment(tokenizers, 0, window)
    text = _Text(custom or pipe, base or pipe, concepts, source, len(names), segment, truncation, base_adapters)
    disabled = all(getattr(pair.custom, "disable_adapters", False) for pair in pairs if pair.base is not pair.custom)
    if disabled and base is None and custom is None:
        _check_customised(concepts, _text_encoders(pipe), segment.of(pipe), base_adapters)
    varies = any(c.learned is not None and (c.learned.layers or c.learned.kind == "neti") for c in concepts)
    everywhere = infuse == "both" and layers is None and timesteps is None
    everywhere = everywhere and all(concept.values_from is None for concept in concepts)
    with ExitStack() as stack:
        numbers = None
        if two_weights or varies or not everywhere:
            where = torch.tensor([float(layers is None or name in layers) for name in names])
            numbers = _Bank(text, two_weights, infuse, strength, where, timesteps)
            stack.enter_context(numbered_bank(pipe, numbers, text.window))
            if two_weights:
                stack.enter_context(paired_projections(pairs))
        handle = pipe.unet.register_forward_pre_hook(lambda *_: check())
        stack.callback(handle.remove)
        original = pipe.encode_prompt
        stack.callback(pipe.__dict__.pop, "encode_prompt")
        pipe.encode_prompt = _encode_prompt(original, text, numbers, strength, custom)
        yield pipe


# Text


@dataclass(frozen=True)
class _Segment:
    """Rows [start, start + window) of a prompt's embedding, in which these tokenizers, who agree, number the tokens."""

    tokenizers: tuple[str, ...]
    start: int
    window: int

    def of(self, pipe: Any) -> list[Any]:
        return [getattr(pipe, name) for name in self.tokenizers]

    def encoders(self, pipe: Any) -> list[nn.Module]:
        return [getattr(pipe, name.replace("tokenizer", "text_encoder")) for name in self.tokenizers]


@dataclass(frozen=True)
class _Span:
    """Rows [start, stop) of a prompt's embedding; the concept's come from its occurrence number `index` in `text`."""

    start: int
    stop: int
    concept: Concept
    text: str
    index: int


@dataclass(frozen=True)
class _Prompt:
    """A prompt in the base's words, P_0.

    `order` [S]: the row of the base's embedding that stands at each place, the noun's at the concepts' places, with its
    last one again where the concept has more. `extra`: settings of the pipeline's `encode_prompt`, as pairs.
    """

    plain: str
    order: list[int]
    spans: tuple[_Span, ...]
    extra: tuple[tuple[str, Any], ...]


class _Text:
    """Prompts in the base's words, and the rows of the concepts in the customised model's."""

    def __init__(
        self,
        custom: Any,
        base: Any,
        concepts: Sequence[Concept],
        source: str,
        num_layers: int,
        segment: _Segment,
        truncation: int | None = None,
        base_adapters: Sequence[str] = (),
    ):
        self.custom, self.base, self.source, self.segment = custom, base, source, segment
        self.truncation, self.base_adapters = truncation, base_adapters
        self.concepts = [_on_device(concept, custom) for concept in concepts]
        self.num_layers, self.window = num_layers, segment.window
        self.cache: OrderedDict[tuple, Tensor] = OrderedDict()
        self.adapters: list = []
        self.encode_custom, self.encode_base = custom.encode_prompt, base.encode_prompt

    def find(self, prompt: str) -> list[tuple[int, int, Concept]]:
        """(start, stop, concept) in characters, for every occurrence, in their order."""
        return _find(prompt, self.concepts)

    def prompt(self, prompt: str, extra: dict[str, Any]) -> _Prompt:
        """Raises ValueError when it is too long with the concepts' own rows."""
        occurrences = self.find(prompt)
        plain, places, end = "", [], 0
        for start, stop, concept in occurrences:
            plain += prompt[end:start]
            places.append((len(plain), len(plain) + len(concept.noun)))
            plain, end = plain + concept.noun, stop
        plain += prompt[end:]
        window = self.window
        rows, length = _rows(self.base, self.segment, plain, places)

        order: list[int] = []
        spans, end = [], 0
        for number, ((start, stop), occurrence) in enumerate(zip(rows, occurrences, strict=True)):
            concept = occurrence[2]
            text, index = (prompt, number) if self.source == "prompt" else (concept.dummy.format(concept.phrase), 0)
            count = self.count(text, index, concept)
            order += range(end, start)
            spans.append(_Span(len(order), len(order) + count, concept, text, index))
            order += [min(start + i, stop - 1) for i in range(count)]
            end = stop
        order += range(end, window)
        longer = len(order) - window
        if spans and length + longer > window:
            raise ValueError(
                f"Prompt too long: {window} tokens are read, this one has {length + longer}, counting the concepts' "
                f"own. Shorten it: {prompt!r}"
            )
        # padding at the end gives or takes the difference, so that all prompts keep the length of the window
        order = order[:window] + [window - 1] * -longer
        return _Prompt(plain, order, tuple(spans), tuple(extra.items()))

    def count(self, text: str, index: int, concept: Concept) -> int:
        """Rows of the concept."""
        if concept.learned is not None:
            return concept.learned.module.num_vectors
        start, stop = self.custom_rows(text)[index]
        return stop - start

    def custom_rows(self, text: str) -> list[tuple[int, int]]:
        """Rows of every concept in a prompt of the customised model."""
        return _rows(self.custom, self.segment, text, [(start, stop) for start, stop, _ in self.find(text)])[0]

    def forget_others(self) -> None:
        """Rows of the text encoders' adapters as they were: others active, or with other weights."""
        layers = (layer for encoder in _text_encoders(self.custom) for layer in _adapters(encoder))
        adapters = [(layer.disable_adapters, list(layer.active_adapters), dict(layer.scaling)) for layer in layers]
        if adapters != self.adapters:
            self.cache.clear()
        self.adapters = adapters

    @torch.no_grad()
    def concept_rows(self, needed: Sequence[tuple[_Prompt, float]]) -> list[list[Tensor]]:
        """Of prompts at timesteps: their concepts' keys and values in the customised model, [2, L or 1, n, D] each."""
        keys = [[self.key(prompt, span, timestep) for span in prompt.spans] for prompt, timestep in needed]
        spans = {
            key: span
            for (prompt, _), own in zip(needed, keys, strict=True)
            for span, key in zip(prompt.spans, own, strict=True)
        }
        missing = {key: span for key, span in spans.items() if key not in self.cache}
        self.cache |= {k: self.stock_rows(span, k[2]) for k, span in missing.items() if span.concept.learned is None}
        learned = {key: span for key, span in missing.items() if span.concept.learned is not None}
        for extra in {extra for _, _, extra, _ in learned}:
            self.cache |= self.learned_rows({key: span for key, span in learned.items() if key[2] == extra})
        keep_recent(self.cache, spans)
        return [[self.cache[key] for key in own] for own in keys]

    def key(self, prompt: _Prompt, span: _Span, timestep: float) -> tuple[str, int, tuple, float | None]:
        """(text, number of the concept in it, extra, timestep): what a concept's rows depend on."""
        found = [concept.learned for _, _, concept in self.find(span.text) if concept.learned is not None]
        varies = any(learned.module.varies_in_time for learned in found)
        return span.text, span.index, prompt.extra, float(timestep) if varies else None

    def stock_rows(self, span: _Span, extra: tuple) -> Tensor:
        """[2, 1, n, D], by the pipeline's own text encoders."""
        concept = span.concept
        keys = values = self.rows_of_words(span, concept.phrase, extra)
        if concept.values_from is not None:
            values = self.rows_of_words(span, concept.values_from, extra)
            if values.shape != keys.shape:
                raise ValueError(
                    f"values_from: {concept.values_from!r} has {values.shape[1]} tokens, expected the "
                    f"{keys.shape[1]} of {concept.phrase!r}."
                )
        return torch.stack([keys, values])

    def rows_of_words(self, span: _Span, words: str, extra: tuple) -> Tensor:
        """[1, n, D]: of the words in the concept's place."""
        places = self.find(span.text)
        start, stop, _ = places[span.index]
        text = span.text[:start] + words + span.text[stop:]
        if words == span.concept.phrase:
            rows = self.custom_rows(text)[span.index]
        else:
            rows = _rows(self.custom, self.segment, text, [(start, start + len(words))])[0][0]
        return _encode(self.encode_custom, text, dict(extra))[0][:, self.segment.start :][:, slice(*rows)]

    def learned_rows(self, spans: dict[tuple, _Span]) -> dict[tuple, Tensor]:
        """[2, L or 1, n, D] of each key, all in one batch; the keys' extra is one."""
        learned = {c.phrase: c.learned for text, *_ in spans for _, _, c in self.find(text)}
        own, calls = towers(self.custom), sorted({(text, time or 0.0) for text, _, _, time in spans})
        convert = getattr(self.custom, "maybe_convert_prompt", None)
        tokens = {text: [tokenize(tower, text, learned, convert) for tower in own] for text, _ in calls}
        prompts = prefix([tokens[text] for text, _ in calls], learned)
        times = torch.tensor([time for _, time in calls], device=self.custom._execution_device)
        clip_skip = dict(next(iter(spans))[2]).get("clip_skip") or 0
        sides = encode_contexts(own, prompts, learned, times, self.num_layers, self.truncation, clip_skip)
        found = {}
        for key, span in spans.items():
            text, index, _, time = key
            row, first = calls.index((text, time or 0.0)), tokens[text][0].spans[index][1]
            places = slice(first, first + span.concept.learned.module.num_vectors)
            # stacked: a view would keep the memory of the whole batch
            found[key] = torch.stack([side[row, :, places] for side in sides]).to(self.custom.unet.dtype)
        return found


def _on_device(concept: Concept, pipe: Any) -> Concept:
    """With a copy of what was learnt, since the caller's stays where it is."""
    if concept.learned is None:
        return concept
    # not the U-Net's device, which means nothing while it is offloaded
    module = copy.deepcopy(concept.learned.module).to(pipe._execution_device).eval()
    return replace(concept, learned=replace(concept.learned, module=module))


def _find(prompt: str, concepts: Sequence[Concept]) -> list[tuple[int, int, Concept]]:
    found = [
        (m.start(), m.end(), concept) for concept in concepts for m in re.finditer(word_pattern(concept.phrase), prompt)
    ]
    found.sort(key=lambda span: (span[0], -span[1]))
    kept: list[tuple[int, int, Concept]] = []
    for start, stop, concept in found:
        if kept and start < kept[-1][1]:
            if stop > kept[-1][1]:
                raise ValueError(
                    f"The concepts {kept[-1][2].phrase!r} and {concept.phrase!r} overlap in {prompt!r}: name each once."
                )
            continue  # within a longer one
        kept.append((start, stop, concept))
    return kept


def _rows(
    pipe: Any, segment: _Segment, text: str, places: Sequence[tuple[int, int]]
) -> tuple[list[tuple[int, int]], int]:
    """Rows (start, stop) of the prompt's embedding that come from these characters; and how many are not padding.

    Of no characters, no rows: both are the row of the next token.
    """
    answers, window = [], segment.window
    for tokenizer in segment.of(pipe):
        written, written_places = _written_out(pipe, tokenizer, text, places)
        offsets = tokenizer(written, return_offsets_mapping=True, verbose=False).offset_mapping
        rows = []
        for start, stop in written_places:
            if start == stop:
                behind = (i for i, (a, b) in enumerate(offsets) if start <= a < b)
                rows.append((next(behind, len(offsets) - 1),) * 2)
                continue
            inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start]
            if not inside:
                raise ValueError(f"{written[start:stop]!r} has no token of its own in {text!r}.")
            rows.append((inside[0], inside[-1] + 1))
        answers.append((rows, len(offsets)))
        if any(stop >= window for _, stop in rows):
            raise ValueError(
                f"Prompt too long: {window} tokens are read, and a concept lies behind them. Shorten it: {text!r}"
            )
    if any(answer != answers[0] for answer in answers):
        raise ValueError(f"The two text encoders cut {text!r} into different tokens, so rows cannot be exchanged.")
    rows, length = answers[0]
    return rows, min(length, window)


def _written_out(
    pipe: Any, tokenizer: Any, text: str, places: Sequence[tuple[int, int]]
) -> tuple[str, list[tuple[int, int]]]:
    """The text and the places in it as the pipeline's `encode_prompt` reads them: tokens of several vectors in full."""
    convert = getattr(pipe, "maybe_convert_prompt", lambda part, _: part)
    written, moved, end = "", [], 0
    for start, stop in places:
        before, within = convert(text[end:start], tokenizer), convert(text[start:stop], tokenizer)
        written += before
        moved.append((len(written), len(written) + len(within)))
        written, end = written + within, stop
    return written + convert(text[end:], tokenizer), moved


def token_rows(pipe: Any, text: str, start: int, stop: int) -> tuple[int, int]:
    """First row and the row behind the last that these characters of a prompt have in its embedding."""
    names = tuple(name for name in ("tokenizer", "tokenizer_2") if getattr(pipe, name, None) is not None)
    window = min(getattr(pipe, name).model_max_length for name in names)
    return _rows(pipe, _Segment(names, 0, window), text, [(start, stop)])[0][0]


def _encode(encode_prompt: Callable, text: str, extra: dict[str, Any]) -> tuple:
    """(prompt_embeds [1, S, D], negative, ...) of one prompt without guidance, by the pipeline's own function."""
    known = inspect.signature(encode_prompt).parameters
    device = getattr(encode_prompt, "__self__", None)
    given = {"prompt": text, "prompt_2": None, "prompt_3": None, "num_images_per_prompt": 1}
    given |= {"do_classifier_free_guidance": False} | {k: value for k, value in extra.items() if value is not None}
    given = {name: value for name, value in given.items() if name in known}
    return encode_prompt(**given, device=getattr(device, "_execution_device", None))


# The pipeline's encode_prompt


def _encode_prompt(
    original: Callable, text: _Text, bank: "_Bank | None", strength: float, custom: Any
) -> Callable:  # fmt: skip
    signature = inspect.signature(original)

    def encode_prompt(*args: Any, **kwargs: Any) -> tuple:
        for one in (text.custom, text.base):
            _refuse_merged(one, RuntimeError)
        text.forget_others()
        given = signature.bind(*args, **kwargs)
        values = given.arguments
        grafted = [] if custom is None else _active_adapters(custom.unet, ())
        if grafted and values.get("lora_scale") not in (None, 1):
            raise ValueError(
                f"The scale {values['lora_scale']} of cross_attention_kwargs does not reach the LoRA {grafted[0]!r}, "
                "which is in the U-Net of `custom`: set its weight there, custom.set_adapters(name, weight)."
            )
        extra = {name: values[name] for name in ("clip_skip", "lora_scale") if values.get(name) is not None}
        prompts = {}
        for side in ("prompt", "negative_prompt"):
            listed = [] if values.get(f"{side}_embeds") is not None else _listed(values.get(side))
            prompts[side] = [text.prompt(prompt, extra) for prompt in listed]
            if values.get(f"{side}_2") not in (None, values.get(side)):
                raise ValueError(f"{side}_2 differs from {side}: with AlignIT both text encoders read the same.")
            if listed:
                plain = [prompt.plain for prompt in prompts[side]]
                values[side] = plain[0] if isinstance(values[side], str) else plain
                values.pop(f"{side}_2", None)
        if prompts["prompt"] and not any(prompt.spans for prompt in prompts["prompt"]):
            phrases = " or ".join(repr(concept.phrase) for concept in text.concepts)
            warnings.warn(f"No concept in {values['prompt']!r}: expected {phrases}. The base draws it.", stacklevel=3)
        marks = [take_numbers(values, f"{side}_embeds", text.window) for side in prompts]
        with _base_adapters(text.base, text.base_adapters):
            encoded = text.encode_base(*given.args, **given.kwargs)
        images = values.get("num_images_per_prompt", 1)
        both = [
            marked(embeds, mark) if mark and embeds is not None else _placed(embeds, own, images, text, bank, strength)
            for embeds, own, mark in zip(encoded[:2], prompts.values(), marks, strict=True)
        ]
        return *both, *encoded[2:]

    return encode_prompt


def _listed(prompt: str | Sequence[str] | None) -> list[str]:
    if prompt is None:
        return []
    return [prompt] if isinstance(prompt, str) else list(prompt)


def _placed(
    embeds: Tensor | None,
    prompts: list[_Prompt],
    num_images_per_prompt: int,
    text: _Text,
    bank: "_Bank | None",
    strength: float,
) -> Tensor | None:
    """The base's embeddings [B, S, D] with the concepts' rows; for the bank, as they are, with the prompts' numbers."""
    if embeds is None:
        return None
    images = num_images_per_prompt if len(prompts) > 1 else len(embeds)
    prompts = [prompt for prompt in prompts for _ in range(images)]
    rows, numbers = list(embeds), [0] * len(embeds)
    for i, prompt in enumerate(prompts):
        if prompt.spans and bank is not None:
            numbers[i] = bank.number(prompt)
        elif prompt.spans and strength:
            ordered = rows[i][prompt.order]
            keys, _, mask = _infused(prompt, text.concept_rows([(prompt, 0.0)])[0], ordered)
            rows[i] = torch.where(mask, torch.lerp(ordered, keys[0], strength), ordered)
    embeds = torch.stack(rows)
    plain = not prompts and embeds.shape[1] != text.window  # a user's, of a length that could not be told to be marked
    return embeds if bank is None or plain else marked(embeds, numbers)


def _infused(prompt: _Prompt, found: Sequence[Tensor], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The concepts' keys and values in their places, [L or 1, S, D], zero elsewhere; and where that is, [S, 1]."""
    both = like.new_zeros(2, max(rows.shape[1] for rows in found), *like.shape)
    mask = torch.zeros_like(like[:, :1], dtype=torch.bool)
    for span, rows in zip(prompt.spans, found, strict=True):
        both[:, :, span.start : span.stop] = rows.to(like)
        mask[span.start : span.stop] = True
    return *both, mask


# Joint attention: the rows that enter the transformer


def _segments(pipe: Any, max_sequence_length: int) -> list[_Segment]:
    """What an embedding of SD3 (CLIP's rows, then T5's) or FLUX (T5's) is made of. ValueError for other pipelines."""
    network = getattr(pipe, "transformer", None)
    network = getattr(network, "_orig_mod", network)  # of a compiled one
    if isinstance(network, SD3Transformer2DModel):
        clip = _Segment(("tokenizer", "tokenizer_2"), 0, pipe.tokenizer_max_length)
        t5 = _Segment(("tokenizer_3",), clip.window, max_sequence_length)
        return [clip] if pipe.text_encoder_3 is None else [clip, t5]
    if isinstance(network, FluxTransformer2DModel):
        return [_Segment(("tokenizer_2",), 0, max_sequence_length)]
    raise ValueError(
        f'mode="input" is for pipelines of SD3 and FLUX, got {type(pipe).__name__}: with the U-Nets of SD 1.x, SD 2.x '
        "and SDXL, the default keeps every layer."
    )


@contextmanager
def _input_rows(
    pipe: Any,
    concepts: Sequence[Concept],
    base: Any,
    custom: Any,
    source: str,
    strength: float,
    base_adapters: Sequence[str],
) -> Iterator[None]:
    """AlignIT with `mode="input"`: `encode_prompt` gives the concepts' own rows, all others are the base's for P_0."""
    own, other = custom or pipe, base or pipe
    _check_input(pipe, own, other, concepts, base_adapters)
    _check_phrases(concepts)
    warnings.warn(
        "AlignIT's mode input decides about the rows that enter the transformer, and about nothing behind: from the "
        "second block on every row has read the concept, so what it keeps of the other words is for you to look at.",
        stacklevel=5,  # through two context managers
    )
    signature = inspect.signature(pipe.encode_prompt)
    sides = [name for name in ("prompt", "negative_prompt") if name in signature.parameters]
    encode_custom, encode_base = own.encode_prompt, other.encode_prompt
    default = signature.parameters["max_sequence_length"].default
    texts: dict[int, list[_Text]] = {}  # by the length of T5's part
    met = False

    def of_length(length: int) -> list[_Text]:
        if length not in texts:
            texts[length] = [_Text(own, other, concepts, source, 1, segment) for segment in _segments(other, length)]
            for text in texts[length]:
                text.encode_custom = encode_custom  # not this block's
        return texts[length]

    def encode_prompt(*args: Any, **kwargs: Any) -> tuple:
        nonlocal met
        for one in (own, other):
            _refuse_merged(one, RuntimeError)
        given = signature.bind(*args, **kwargs)
        values = given.arguments
        names = ("clip_skip", "lora_scale", "max_sequence_length")
        extra = {name: values[name] for name in names if values.get(name) is not None}
        parts = of_length(extra.get("max_sequence_length", default))
        for text in parts:
            text.forget_others()
        placed: dict[str, list[list[_Prompt]]] = {}
        for name in sides:
            told = values.get(name)
            listed = [] if values.get(f"{name}_embeds") is not None else _listed(told)
            placed[name] = [[text.prompt(prompt, extra) for prompt in listed] for text in parts]
            plain = [prompt.plain for prompt in placed[name][0]]
            for again in (f"{name}_2", f"{name}_3"):
                if values.get(again) not in (None, told):
                    raise ValueError(f"{again} differs from {name}: with AlignIT all text encoders read the same.")
                if again in values:
                    values[again] = None  # as the first, which is put in the base's words
            if listed:
                values[name] = plain[0] if isinstance(told, str) else plain
        holds = any(prompt.spans for prompt in placed["prompt"][0])
        # FLUX asks for its negative prompt as for any other, behind the prompt
        if placed["prompt"][0] and not holds and not (met and len(sides) == 1):
            phrases = " or ".join(repr(concept.phrase) for concept in concepts)
            warnings.warn(f"No concept in {values['prompt']!r}: expected {phrases}. The base draws it.", stacklevel=3)
        met = met or holds
        with _base_adapters(other, base_adapters):
            encoded = list(encode_base(*given.args, **given.kwargs))
        images = values.get("num_images_per_prompt", 1)
        for i, name in enumerate(sides):
            if encoded[i] is None:
                continue
            pieces, end = [], 0
            for text, prompts in zip(parts, placed[name], strict=True):
                end = text.segment.start + text.window
                rows = encoded[i][:, text.segment.start : end]
                pieces.append(_placed(rows, prompts, images, text, None, strength))
            encoded[i] = torch.cat([*pieces, encoded[i][:, end:]], dim=1)
        return tuple(encoded)

    pipe.encode_prompt = encode_prompt
    try:
        yield
    finally:
        del pipe.encode_prompt


# The bank


class _Bank:
    """The context source: which prompt each row of the batch is (0: none of ours), and what its layers read."""

    def __init__(
        self,
        text: _Text,
        two_weights: bool,
        infuse: str,
        strength: float,
        layers: Tensor,
        timesteps: tuple[float, float] | None,
    ):
        self.text, self.two_weights, self.timesteps = text, two_weights, timesteps
        self.layers = layers * strength
        self.sides = [float(infuse in ("both", side)) for side in ("keys", "values")]
        self.prompts: list[_Prompt | None] = [None]

    def number(self, prompt: _Prompt) -> int:
        if prompt not in self.prompts:
            self.prompts.append(prompt)
        return self.prompts.index(prompt)

    def __call__(self, text: Tensor, timestep: Tensor) -> Tensor:
        """[B, S + 1, D] -> [B, L, S, 2 D]; with two sets of weights [B, L, 2 S, 2 D], the base's rows first."""
        if not is_marked(text, self.text.window):  # given to the network past the pipeline
            return self._joined(text[:, None], None, None)
        text, numbers = unmarked(text)
        if not any(numbers):
            return self._joined(text[:, None], None, None)
        timesteps = timestep.tolist()
        weights = self.layers.to(text)[None, :, None, None].repeat(len(text), 1, 1, 1)  # [B, L, 1, 1]
        n_layers = len(self.layers)
        infused = [text.new_zeros(len(text), n_layers, *text.shape[1:]) for _ in range(2)]
        masks, ordered = text.new_zeros(len(text), 1, text.shape[1], 1), text.clone()
        of_concepts = [row for row, number in enumerate(numbers) if number]
        needed = [(self.prompts[numbers[row]], timesteps[row]) for row in of_concepts]
        for row, (prompt, timestep), found in zip(of_concepts, needed, self.text.concept_rows(needed), strict=True):
            if self.timesteps is not None and not self.timesteps[0] <= timestep <= self.timesteps[1]:
                weights[row] = 0
            ordered[row] = text[row][prompt.order]
            keys, values, mask = _infused(prompt, found, ordered[row])
            infused[0][row], infused[1][row] = keys, values
            masks[row, 0] = mask
        # where nothing is infused, the base reads P_0 as it stands
        text = torch.where(weights > 0, ordered[:, None], text[:, None])
        return self._joined(text, infused, weights * masks)

    def _joined(self, text: Tensor, infused: list[Tensor] | None, weights: Tensor | None) -> Tensor:
        sides = []
        for number, side in enumerate(self.sides):
            if infused is None:
                parts = [text, torch.zeros_like(text)]
            else:
                w = weights * side
                parts = [(1 - w) * text, w * infused[number]]
            sides.append(torch.cat(parts, dim=2) if self.two_weights else parts[0] + parts[1])
        return torch.cat(sides, dim=-1)


# What a pipeline is made of, and what cannot be used


def _as_concepts(concepts: Sequence[Any]) -> list[Concept]:
    found = []
    for concept in getattr(concepts, "concepts", None) or concepts:
        for one in getattr(concept, "concepts", [concept]):
            own = isinstance(one, Concept)
            found.append(one if own else Concept(one.placeholder_token, one.super_category_token, learned=one))
    if not found:
        raise ValueError("Expected at least one concept, got none.")
    return found


def _check_settings(
    mode: str, source: str, infuse: str, strength: float, timesteps: tuple[float, float] | None
) -> None:  # fmt: skip
    if mode not in ("attention", "input"):
        raise ValueError(f"mode: expected attention or input, got {mode!r}.")
    if source not in ("dummy", "prompt") or infuse not in ("both", "keys", "values"):
        raise ValueError(f"Expected source dummy or prompt, infuse both, keys or values; got {source!r}, {infuse!r}.")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: expected between 0 and 1, got {strength}.")
    if timesteps is not None and not timesteps[0] <= timesteps[1]:
        raise ValueError(f"timesteps: expected the lowest and the highest, got {timesteps}.")


def _check_nouns(concepts: Sequence[Concept]) -> None:
    alone = next((concept.phrase for concept in concepts if not concept.noun), None)
    if alone is not None:
        raise ValueError(
            f"{alone!r} has no noun, so the base has no rows for its place: take infuse both and strength 0 or 1, or "
            "make the noun a part of the concept, as in Concept('<t> cat', 'cat')."
        )


def _check_concepts(pipe: Any, concepts: Sequence[Concept], source: str, truncation: int | None) -> None:
    _check_phrases(concepts)
    learned = [concept.learned for concept in concepts if concept.learned is not None]
    if truncation is not None:
        from alignkit.concepts import check_truncation

        check_truncation(learned, truncation)
    for one in learned:
        one.check(pipe)
    if source == "prompt" and 0 < len(learned) < len(concepts):
        raise ValueError(
            "source prompt needs all concepts in the tokenizer, or all of them loaded by alignkit.concepts."
        )


def _check_phrases(concepts: Sequence[Concept]) -> None:
    phrases = [concept.phrase for concept in concepts]
    twice = {phrase for phrase in phrases if phrases.count(phrase) > 1}
    if twice:
        raise ValueError(f"Two concepts are called {twice.pop()!r}: each needs a phrase of its own.")
    for concept in concepts:
        if [c for _, _, c in _find(concept.dummy.format(concept.phrase), concepts)] != [concept]:
            raise ValueError(
                f"The dummy prompt {concept.dummy.format(concept.phrase)!r} has to hold {concept.phrase!r} once and no "
                "other concept."
            )


def _check_family(pipe: Any) -> None:
    if getattr(pipe, "transformer", None) is not None:
        raise ValueError(
            f"{type(pipe).__name__} mixes text and image in joint attention, so that after its first block every row "
            "depends on the concept and no exchange of rows can keep the others as the base has them. Supported are "
            'pipelines of SD 1.x, SD 2.x and SDXL; mode="input" exchanges the rows that enter the transformer.'
        )
    if not all(hasattr(pipe, name) for name in ("unet", "text_encoder", "tokenizer", "encode_prompt")):
        raise ValueError(f"Expected a pipeline of SD 1.x, SD 2.x or SDXL, got {type(pipe).__name__}.")
    _refuse_merged(pipe)


def _refuse_merged(pipe: Any, kind: type[Exception] = ValueError) -> None:
    merged = set(getattr(pipe, "_merged_adapters", None) or ())
    for layer in (layer for encoder in _text_encoders(pipe) for layer in _adapters(encoder)):
        merged |= set(layer.merged_adapters)
    if merged:
        raise kind(_MERGED.format(sorted(merged)))


def _check_customised(
    concepts: Sequence[Concept],
    encoders: Sequence[nn.Module],
    tokenizers: Sequence[Any],
    base_adapters: Sequence[str],
    where: str = "this pipeline",
    customisers: str = "a LoRA, Custom Diffusion's weights",
) -> None:
    """ValueError for a phrase that is nothing but plain words to text encoders that nobody customised."""
    adapted = any(_active_adapters(encoder, base_adapters) for encoder in encoders)
    for concept in concepts:
        known = [token for t in tokenizers for token in t.get_added_vocab() if token in concept.phrase]
        if not (adapted or known or concept.learned is not None or concept.values_from):
            raise ValueError(
                f"Nothing in {where} is customised for {concept.phrase!r}: expected a token of Textual Inversion, "
                f"{customisers}, or another model as `base` or `custom`."
            )


def _warn_of_sums(pipe: Any, concepts: Sequence[Concept], base_adapters: Sequence[str]) -> None:
    at_work = sorted(
        {name for net in (pipe.unet, *_text_encoders(pipe)) for name in _active_adapters(net, base_adapters)}
    )
    if len(concepts) > 1 and len(at_work) > 1:
        warnings.warn(
            f"The LoRAs {', '.join(at_work)} work together: each of the {len(concepts)} concepts is drawn with the sum "
            "of them. Load one, or train one LoRA on all concepts.",
            stacklevel=4,  # through a context manager
        )


def _check_input(pipe: Any, own: Any, other: Any, concepts: Sequence[Concept], base_adapters: Sequence[str]) -> None:
    """ValueError for a customiser that the rows which enter the transformer cannot carry."""
    pipes = (pipe, own, other)
    for one in pipes:
        _segments(one, 1)
        _refuse_merged(one)
    learned = next((concept for concept in concepts if concept.learned is not None), None)
    if learned is not None:
        raise ValueError(
            f"{learned.phrase!r} was learnt for layers of a U-Net, or loaded by alignkit.concepts, which knows no T5. "
            "mode input takes tokens that the pipeline's own text encoders read (pipe.load_textual_inversion)."
        )
    if any(concept.values_from is not None for concept in concepts):
        raise ValueError("values_from: mode input exchanges whole rows, of which keys and values are both made.")
    if any(one.transformer is not pipe.transformer for one in pipes):
        raise ValueError(
            "base or custom has another transformer, which works on all rows in all blocks: rows that enter it cannot "
            "carry what was learnt there. Where only text encoders were customised, load them around this one: "
            "from_pretrained(..., transformer=pipe.transformer)."
        )
    lora = _active_adapters(pipe.transformer, base_adapters)
    if lora:
        raise ValueError(
            f"The LoRA {lora[0]!r} changes the transformer, which works on all rows in all blocks: rows that enter it "
            "cannot carry that. Name it in base_adapters if it belongs to the base, as a style does, or switch it off: "
            "pipe.transformer.disable_lora()."
        )
    _check_encoders(pipe, other)
    segments = _segments(other, 1)
    encoders = [[encoder for segment in segments for encoder in segment.encoders(one)] for one in (own, other)]
    if all(a is b for a, b in zip(*encoders, strict=True)):
        tokenizers = [tokenizer for segment in segments for tokenizer in segment.of(own)]
        names = " and ".join(n.replace("tokenizer", "text_encoder") for segment in segments for n in segment.tokenizers)
        where = f"the text encoders whose rows enter the transformer ({names})"
        _check_customised(concepts, encoders[0], tokenizers, base_adapters, where, "a LoRA of them")


def _check_encoders(pipe: Any, base: Any) -> None:
    """ValueError for text encoders whose rows the network could not read as they come; a concept's rows are cast."""
    for name in _TEXT_ENCODERS:
        if getattr(pipe, name, None) is not None and getattr(base, name, None) is not None:
            _check_place(pipe, name, getattr(pipe, name), getattr(base, name))


def _check_place(pipe: Any, name: str, ours: nn.Module, theirs: nn.Module) -> None:
    """ValueError where a module of the second pipeline is on another device, or in another precision."""
    # a hook of its own brings a module to the device, or casts it; that of a whole U-Net is passed by
    hooked = any(hasattr(m, hook) for m in theirs.modules() for hook in ("_hf_hook", "_diffusers_hook"))
    if ours is theirs or hooked:
        return
    device = pipe._execution_device  # not where the module is, which may be offloaded
    own, found = (next((p.dtype for p in m.parameters() if p.is_floating_point()), None) for m in (ours, theirs))
    place = next(theirs.parameters()).device
    if (place.type, place.index or 0) != (device.type, device.index or 0) or (own and found and own != found):
        raise ValueError(
            f"The second pipeline's {name} is in {found} on {place}, expected {own} on {device}, where the one that "
            f"runs works. Bring it there by .to({str(device)!r}, {own}); a whole model that is offloaded "
            "(enable_model_cpu_offload) stays behind: leave the second pipeline on the device."
        )


def _watch_network(unet: nn.Module) -> Callable[[], None]:
    """Checks the network; what is returned raises RuntimeError for what came up since, and is cheap."""
    _check_network(unet)
    reading = [module for module in unet.modules() if _reads_text(module)]
    attributes = [vars(module) for module in unet.modules()]
    attached = text_parts(reading)

    def state() -> list:
        """What differs when a processor was exchanged, or a cache of anybody's put in or taken out."""
        return [module.processor for module in reading] + [own.get("forward") for own in attributes]

    seen = state()

    def check() -> None:
        nonlocal seen
        if torch.compiler.is_compiling():
            return
        now = state()
        if now != seen:  # else the whole network would be walked at every step
            _check_network(unet, RuntimeError)
            seen = now
        parts = text_parts(reading)
        if parts != attached:
            raise RuntimeError(
                "The attention modules were exchanged inside AlignIT's `with` block. Load and unload adapters before "
                "it."
            )
        merged = [name for part in parts for name in getattr(part, "merged_adapters", ())]
        if merged:
            raise RuntimeError(_MERGED.format(sorted(set(merged))))

    return check


def _check_network(unet: nn.Module, kind: type[Exception] = ValueError) -> None:
    for name, module in unet.named_modules():
        if not _reads_text(module):
            continue
        own = type(module.processor)
        if own.__module__ != attention_processor.__name__ or own.__name__ not in PROCESSORS:
            raise kind(
                f"{name} has the attention processor {own.__name__}, which may read text in its own way: "
                "call pipe.unet.set_attn_processor(AttnProcessor2_0()) first, of diffusers."
            )
    found = find_cache(unet, ATTENTION_CACHES + BLOCK_CACHES)
    if found:
        raise kind(f"{found[0]} has the cache {found[1]}, which reuses what earlier steps computed: disable it.")
    for name, module in unet.named_modules():
        if name and _has_foreign_forward(module):
            raise kind(
                f"{name} has another forward than its class, as step caches like DeepCache put there, which reuse what "
                "earlier steps computed: disable it."
            )


def _reads_text(module: nn.Module) -> bool:
    return isinstance(module, attention_processor.Attention) and module.is_cross_attention


def _has_foreign_forward(module: nn.Module) -> bool:
    """Offloading's and diffusers' own hooks call the class's; what they leave behind is the class's."""
    own = vars(module).get("forward")
    hooked = hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")
    return own is not None and not hooked and getattr(own, "__func__", None) is not type(module).forward


def _text_encoders(pipe: Any) -> list[nn.Module]:
    return [encoder for name in _TEXT_ENCODERS if (encoder := getattr(pipe, name, None)) is not None]


def _adapters(module: nn.Module) -> list[nn.Module]:
    """Layers with a LoRA of peft."""
    return [m for m in module.modules() if hasattr(m, "base_layer") and hasattr(m, "enable_adapters")]


def _active_adapters(module: nn.Module, base_adapters: Sequence[str]) -> list[str]:
    """Names of a customiser's LoRAs that are at work in a module."""
    layers = [layer for layer in _adapters(module) if not layer.disable_adapters]
    return sorted({name for layer in layers for name in layer.active_adapters} - set(base_adapters))


@contextmanager
def _base_adapters(pipe: Any, names: Sequence[str]) -> Iterator[None]:
    """Inside, the text encoders are the base's: of their active adapters, `names` alone."""
    with ExitStack() as stack:
        for layer in (layer for encoder in _text_encoders(pipe) for layer in _adapters(encoder)):
            if not layer.disable_adapters:
                stack.enter_context(only_adapters(layer, [name for name in layer.active_adapters if name in names]))
        yield
