"""Prompts in the base's words, and the rows of the concepts in the customised model's."""

import copy
import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.adapters import adapter_state, text_encoders
from alignkit.concepts.text import encode_contexts, keep_recent, prefix, tokenize, towers
from alignkit.data import word_pattern


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

    @property
    def dummy_prompt(self) -> str:
        return self.dummy.replace("{}", self.phrase)


def as_concepts(concepts: Sequence[Any]) -> list[Concept]:
    """Of `Concept`s and of what `alignkit.concepts` loads."""
    found = []
    for concept in getattr(concepts, "concepts", None) or concepts:
        for one in getattr(concept, "concepts", [concept]):
            own = isinstance(one, Concept)
            found.append(one if own else Concept(one.placeholder_token, one.super_category_token, learned=one))
    if not found:
        raise ValueError("Expected at least one concept, got none.")
    return found


@dataclass(frozen=True)
class Segment:
    """Rows [start, start + window) of a prompt's embedding, in which these tokenizers, who agree, number the tokens."""

    tokenizers: tuple[str, ...]
    start: int
    window: int

    def of(self, pipe: Any) -> list[Any]:
        return [getattr(pipe, name) for name in self.tokenizers]

    def encoders(self, pipe: Any) -> list[nn.Module]:
        return [getattr(pipe, name.replace("tokenizer", "text_encoder")) for name in self.tokenizers]


def whole_segment(pipe: Any) -> Segment:
    """All of the embedding of SD 1.x, SD 2.x or SDXL, whose text encoders read a prompt side by side."""
    names = tuple(name for name in ("tokenizer", "tokenizer_2") if getattr(pipe, name, None) is not None)
    return Segment(names, 0, min(getattr(pipe, name).model_max_length for name in names))


@dataclass(frozen=True)
class _Span:
    """Rows [start, stop) of a prompt's embedding; the concept's come from its occurrence number `index` in `text`."""

    start: int
    stop: int
    concept: Concept
    text: str
    index: int


@dataclass(frozen=True)
class Prompt:
    """A prompt in the base's words, P_0.

    `order` [S]: the row of the base's embedding that stands at each place, the noun's at the concepts' places, with its
    last one again where the concept has more. `extra`: settings of the pipeline's `encode_prompt`, as pairs.
    """

    plain: str
    order: list[int]
    spans: tuple[_Span, ...]
    extra: tuple[tuple[str, Any], ...]


class Text:
    """Prompts in the base's words, and the rows of the concepts in the customised model's."""

    def __init__(
        self,
        custom: Any,
        base: Any,
        concepts: Sequence[Concept],
        source: str,
        num_layers: int,
        segment: Segment,
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
        return find_concepts(prompt, self.concepts)

    def prompt(self, prompt: str, extra: dict[str, Any]) -> Prompt:
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
            text, index = (prompt, number) if self.source == "prompt" else (concept.dummy_prompt, 0)
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
        return Prompt(plain, order, tuple(spans), tuple(extra.items()))

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
        adapters = adapter_state(*text_encoders(self.custom))
        if adapters != self.adapters:
            self.cache.clear()
        self.adapters = adapters

    @torch.no_grad()
    def concept_rows(self, needed: Sequence[tuple[Prompt, float]]) -> list[list[Tensor]]:
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

    def key(self, prompt: Prompt, span: _Span, timestep: float) -> tuple[str, int, tuple, float | None]:
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
        extra = dict(next(iter(spans))[2])
        clip_skip, lora_scale = extra.get("clip_skip") or 0, extra.get("lora_scale", 1.0)
        sides = encode_contexts(own, prompts, learned, times, self.num_layers, self.truncation, clip_skip, lora_scale)
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


def find_concepts(prompt: str, concepts: Sequence[Concept]) -> list[tuple[int, int, Concept]]:
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
    pipe: Any, segment: Segment, text: str, places: Sequence[tuple[int, int]]
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
    return _rows(pipe, whole_segment(pipe), text, [(start, stop)])[0][0]


def _encode(encode_prompt: Callable, text: str, extra: dict[str, Any]) -> tuple:
    """(prompt_embeds [1, S, D], negative, ...) of one prompt without guidance, by the pipeline's own function."""
    known = inspect.signature(encode_prompt).parameters
    device = getattr(encode_prompt, "__self__", None)
    given = {"prompt": text, "prompt_2": None, "prompt_3": None, "num_images_per_prompt": 1}
    given |= {"do_classifier_free_guidance": False} | {k: value for k, value in extra.items() if value is not None}
    given = {name: value for name, value in given.items() if name in known}
    return encode_prompt(**given, device=getattr(device, "_execution_device", None))


def as_list(prompt: str | Sequence[str] | None) -> list[str]:
    if prompt is None:
        return []
    return [prompt] if isinstance(prompt, str) else list(prompt)


def of_rows(prompts: list[Prompt], embeds: Tensor, num_images_per_prompt: int) -> list[Prompt]:
    """The prompt of each row of embeddings [B, S, D]; of a user's own embeddings none."""
    images = num_images_per_prompt if len(prompts) > 1 else len(embeds)
    return [prompt for prompt in prompts for _ in range(images)]


def with_concepts(embeds: Tensor, prompts: list[Prompt], text: Text, strength: float) -> Tensor:
    """The base's embeddings [B, S, D] of these prompts, in the concepts' places (1 - strength) base + strength own."""
    rows = list(embeds)
    for i, prompt in enumerate(prompts):
        if prompt.spans and strength:
            ordered = rows[i][prompt.order]
            keys, _, mask = infused_rows(prompt, text.concept_rows([(prompt, 0.0)])[0], ordered)
            rows[i] = torch.where(mask, torch.lerp(ordered, keys[0], strength), ordered)
    return torch.stack(rows)


def infused_rows(prompt: Prompt, found: Sequence[Tensor], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The concepts' keys and values in their places, [L or 1, S, D], zero elsewhere; and where that is, [S, 1]."""
    both = like.new_zeros(2, max(rows.shape[1] for rows in found), *like.shape)
    mask = torch.zeros_like(like[:, :1], dtype=torch.bool)
    for span, rows in zip(prompt.spans, found, strict=True):
        both[:, :, span.start : span.stop] = rows.to(like)
        mask[span.start : span.stop] = True
    return *both, mask
