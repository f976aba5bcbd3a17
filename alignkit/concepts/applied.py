"""Concepts in a stock diffusers pipeline, for the time of a `with` block.

The pipeline's `encode_prompt` is given the super-category in each placeholder's place, so that all that follows is what
it always is. Each prompt's embedding is marked with the prompt's number (marker.py), from which the context bank reads,
at every call, what each row of the batch is to be replaced by.
"""

import copy
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alignkit.adapters import adapter_state
from alignkit.attention import text_layers
from alignkit.concepts.text import Tokens, encode_contexts, find, keep_recent, substitute, tokenize, towers
from alignkit.marker import is_marked, marked, numbered_bank, take_numbers, unmarked


@dataclass(frozen=True)
class _Prompt:
    tokens: list[Tokens]  # of each text encoder
    settings: tuple[int, float]  # clip_skip and lora_scale


@dataclass(frozen=True)
class _Contexts:
    """Keys [L, S, D] and, as only they differ in the values, the rows at the concepts' positions [L, n, D]."""

    keys: Tensor
    value_rows: Tensor
    positions: list[int]

    def joined(self) -> Tensor:
        """[L, S, 2 D]."""
        values = self.keys.clone()
        values[:, self.positions] = self.value_rows
        return torch.cat([self.keys, values], dim=-1)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.value_rows.nbytes


class _Source:
    """The context source of one `with` block: its prompts by number (0 is plain text), and what they have become."""

    def __init__(self, pipe: Any, concepts: Sequence[Any], truncation: int | None):
        self.concepts = {c.placeholder_token: replace(c, module=copy.deepcopy(c.module).eval()) for c in concepts}
        self.nouns = {c.placeholder_token: c.super_category_token for c in concepts}
        self.towers, self.num_layers, self.truncation = towers(pipe), len(text_layers(pipe.unet)), truncation
        self.convert = getattr(pipe, "maybe_convert_prompt", None)
        self.window = min(tower.max_length for tower in self.towers)
        self.varies_in_time = any(c.module.varies_in_time for c in concepts)
        self.prompts: list[_Prompt | None] = [None]
        self.numbers: dict[tuple, int] = {}
        self.cache: OrderedDict[tuple, _Contexts] = OrderedDict()
        self.adapters: list = []

    def forget_others(self) -> None:
        """Contexts of the text encoders' adapters as they were: others active, or with other weights."""
        adapters = adapter_state(*(tower.model for tower in self.towers))
        if adapters != self.adapters:
            self.cache.clear()
        self.adapters = adapters

    def number(self, texts: Sequence[str], settings: tuple[int, float]) -> int:
        """Of a prompt, given for each text encoder."""
        if not any(len(find(text, list(self.nouns))) > 1 for text in texts):
            return 0
        key = (*texts, *settings)
        if key not in self.numbers:
            tokens = [
                tokenize(tower, text, self.concepts, self.convert)
                for tower, text in zip(self.towers, texts, strict=True)
            ]
            if len({tuple(part.spans) for part in tokens}) > 1:
                raise ValueError(f"A concept has to stand in the same place for both text encoders, got {texts}.")
            self.prompts.append(_Prompt(tokens, settings))
            self.numbers[key] = len(self.prompts) - 1
        return self.numbers[key]

    def __call__(self, text: Tensor, timestep: Tensor) -> Tensor | None:
        if not is_marked(text, self.window):
            return None
        text, numbers = unmarked(text)
        plain = torch.cat([text, text], dim=-1)[:, None]
        if not any(numbers):
            return plain
        times = timestep.tolist() if self.varies_in_time else [None] * len(numbers)
        self._fill({(n, t) for n, t in zip(numbers, times, strict=True) if n}, timestep)
        joined = {
            key: self.cache[key].joined().to(text.dtype) for key in set(zip(numbers, times, strict=True)) if key[0]
        }
        rows = [joined[n, t] if n else row for n, t, row in zip(numbers, times, plain, strict=True)]
        layers = max(len(row) for row in rows)
        # laid out layer by layer, so that what a layer reads is one piece of memory
        return torch.stack([row.expand(layers, -1, -1) for row in rows], dim=1).transpose(0, 1)

    @torch.no_grad()
    def _fill(self, needed: set[tuple], timestep: Tensor) -> None:
        """Encodes what is not in the cache, all of it in one batch."""
        missing = sorted(key for key in needed if key not in self.cache)
        for concept in self.concepts.values():  # not before: an offloaded network has no device that means anything
            concept.module.to(timestep.device)
        for settings in {self.prompts[n].settings for n, _ in missing}:
            keys_of = [key for key in missing if self.prompts[key[0]].settings == settings]
            times = torch.tensor([t or 0 for _, t in keys_of], device=timestep.device, dtype=torch.float32)
            prompts = [self.prompts[n].tokens for n, _ in keys_of]
            keys, values = encode_contexts(
                self.towers, prompts, self.concepts, times, self.num_layers, self.truncation, *settings
            )
            for i, key in enumerate(keys_of):
                positions = [
                    start + k
                    for name, start in prompts[i][0].spans
                    for k in range(self.concepts[name].module.num_vectors)
                ]
                # clones: a view would keep the memory of the whole batch
                self.cache[key] = _Contexts(keys[i].clone(), values[i][:, positions].clone(), positions)
        keep_recent(self.cache, needed)


@contextmanager
def attached(pipe: Any, concepts: Sequence[Any], truncation: int | None) -> Iterator[None]:
    """See `Concepts.applied`, which checks what it is given."""
    if "encode_prompt" in vars(pipe):
        raise RuntimeError("This pipeline's encode_prompt is replaced already: leave that `with` block first.")
    source = _Source(pipe, concepts, truncation)
    with ExitStack() as stack:
        stack.enter_context(numbered_bank(pipe, source, source.window))
        original = pipe.encode_prompt
        stack.callback(pipe.__dict__.pop, "encode_prompt")
        pipe.encode_prompt = _encode_prompt(original, source)
        yield


def _encode_prompt(original: Callable, source: _Source) -> Callable:
    signature = inspect.signature(original)

    def encode_prompt(*args: Any, **kwargs: Any) -> tuple:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        scale = given.get("lora_scale")
        settings = given.get("clip_skip") or 0, 1.0 if scale is None else scale
        source.forget_others()

        def numbers(*names: str) -> list[int]:
            """Of the prompts, one tuple over the text encoders each."""
            texts = [given.get(name) for name in names[: len(source.towers)]]
            texts = [text or texts[0] or "" for text in texts]
            lists = [[text] if isinstance(text, str) else list(text) for text in texts]
            return [source.number(prompt, settings) for prompt in zip(*lists, strict=True)]

        positive = numbers("prompt", "prompt_2") if given.get("prompt_embeds") is None else None
        negative = (
            numbers("negative_prompt", "negative_prompt_2") if given.get("negative_prompt_embeds") is None else None
        )
        if positive and not any(positive):
            warnings.warn(
                f"No placeholder in {given['prompt']!r}: expected {' or '.join(source.nouns)}. Drawn as plain text.",
                stacklevel=3,
            )
        for name in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2"):
            text = given.get(name)
            if isinstance(text, str):
                given[name] = substitute(text, source.nouns)
            elif text is not None:
                given[name] = [substitute(t, source.nouns) for t in text]
        if positive is None:
            positive = take_numbers(given, "prompt_embeds", source.window) or [0]
        if negative is None:
            negative = take_numbers(given, "negative_prompt_embeds", source.window) or [0]
        prompt_embeds, negative_prompt_embeds, *rest = original(*bound.args, **bound.kwargs)
        window = source.window
        return _numbered(prompt_embeds, positive, window), _numbered(negative_prompt_embeds, negative, window), *rest

    return encode_prompt


def _numbered(embeds: Tensor | None, numbers: list[int], window: int) -> Tensor | None:
    """Marks [B, S, D] with the prompts' numbers; embeddings that a user brought are plain unless marked.

    Those of another length than the window's, as other tools make of long prompts, stay as they are: they could not be
    told to be marked, and the mark would be read as text.
    """
    if embeds is None or (embeds.shape[1] != window and not any(numbers)):
        return embeds
    return marked(embeds, numbers)
