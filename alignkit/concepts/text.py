"""Prompts with concepts in them: where their vectors stand, and the contexts that the text encoders make of them.

The text encoders stay what they are: a placeholder is no token of theirs, its vectors are written into the output of
the token embedding by a hook that lives for one call.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.adapters import scaled_adapters
from alignkit.concepts.mapper import Vectors
from alignkit.data import word_pattern

ROWS_AT_A_TIME = 64  # of text, where no gradient is kept
CACHE_BYTES = 256 * 2**20  # of contexts that are kept for another call


@dataclass(frozen=True)
class Tower:
    """A text encoder as its pipeline uses it: which hidden state, and whether the final norm comes behind it."""

    model: nn.Module
    tokenizer: Any
    layer: int
    final_norm: bool

    @property
    def width(self) -> int:
        return self.model.get_input_embeddings().weight.shape[-1]

    @property
    def max_length(self) -> int:
        return min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)


def towers(pipe: Any) -> list[Tower]:
    """The text encoders of a pipeline or a `Base`: one in SD 1.x and 2.x, two in SDXL.

    Raises ValueError for any other family.
    """
    pipe = getattr(pipe, "pipe", pipe)
    if getattr(pipe, "unet", None) is None or getattr(pipe, "text_encoder", None) is None:
        raise ValueError(
            f"A {type(pipe).__name__} has no U-Net that reads text by cross-attention. Concepts work with SD 1.x, "
            "SD 2.x and SDXL; SD3 and FLUX mix their text with the image in every block, so there is no text for a "
            "layer to read."
        )
    if getattr(pipe, "text_encoder_2", None) is None:
        return [Tower(pipe.text_encoder, pipe.tokenizer, -1, True)]
    pairs = ((pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2))
    return [Tower(model, tokenizer, -2, False) for model, tokenizer in pairs]


# Words


def find(prompt: str, placeholders: Sequence[str]) -> list[str]:
    """The prompt in pieces, every second one a placeholder: ["a ", "<thing>", " on a table"]. Longer names first."""
    if not placeholders:
        return [prompt]
    longest_first = sorted(placeholders, key=len, reverse=True)
    return re.split(f"({'|'.join(map(word_pattern, longest_first))})", prompt)


def substitute(prompt: str, words: Mapping[str, str]) -> str:
    """The prompt with another word for each placeholder."""
    return "".join(words.get(piece, piece) for piece in find(prompt, list(words)))


@dataclass(frozen=True)
class Tokens:
    """One prompt for one text encoder. `spans`: (placeholder, position of its first vector), for each occurrence."""

    input_ids: Tensor  # [S]
    attention_mask: Tensor  # [S]
    spans: tuple[tuple[str, int], ...]


def tokenize(
    tower: Tower, prompt: str, concepts: Mapping[str, Any], convert: Callable[[str, Any], str] | None = None
) -> Tokens:
    """Tokens of a prompt in which each concept takes as many positions as it has vectors, filled with its noun's id.

    `convert`: of the text around them, with the tokenizer: a pipeline's `maybe_convert_prompt`, which writes out a
    token that it has loaded with several vectors.

    Raises ValueError when that is longer than the text encoder reads.
    """
    tokenizer, ids, spans = tower.tokenizer, [], []
    for piece in find(prompt, list(concepts)):
        if piece in concepts:
            concept = concepts[piece]
            spans.append((piece, len(ids) + 1))
            ids += noun_ids(tower, concept.super_category_token)[:1] * concept.module.num_vectors
        else:
            piece = convert(piece, tokenizer) if convert and piece.strip() else piece
            ids += tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
    length, room = len(ids) + 2, tower.max_length
    if length > room:
        raise ValueError(
            f"Prompt too long: the text encoder reads {room} tokens, this one has {length}, counting a concept's "
            f"vectors. Shorten it: {prompt!r}"
        )
    ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    mask = [1] * length + [0] * (room - length)
    ids += [tokenizer.pad_token_id] * (room - length)
    return Tokens(torch.tensor(ids), torch.tensor(mask), tuple(spans))


def prefix(prompts: Sequence[Sequence[Tokens]], concepts: Mapping[str, Any]) -> list[list[Tokens]]:
    """The same prompts cut behind the last concept of them all.

    Text encoders are causal, so these rows are what they are in the whole prompt, to rounding.
    """
    spans = [span for prompt in prompts for tokens in prompt for span in tokens.spans]
    stop = max(start + concepts[name].module.num_vectors for name, start in spans)
    return [
        [replace(t, input_ids=t.input_ids[:stop], attention_mask=t.attention_mask[:stop]) for t in prompt]
        for prompt in prompts
    ]


def noun_ids(tower: Tower, noun: str) -> list[int]:
    """Token ids of a super-category; ValueError when there are none."""
    ids = tower.tokenizer(noun, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError(f"super_category_token: expected a word, got {noun!r}.")
    return ids


@torch.no_grad()
def noun_embedding(tower: Tower, noun: str) -> Tensor:
    """[n, W] float32, a row for each piece of the super-category."""
    embedding = tower.model.get_input_embeddings()
    ids = torch.tensor(noun_ids(tower, noun))
    if embedding.weight.device.type != "meta":  # offloaded: its own hook brings the ids to the weights
        ids = ids.to(embedding.weight.device)
    return embedding(ids).float()


# Contexts


def encode_contexts(
    towers: Sequence[Tower],
    prompts: Sequence[Sequence[Tokens]],
    concepts: Mapping[str, Any],
    timestep: Tensor,
    num_layers: int,
    truncation: Tensor | int | None = None,
    clip_skip: int = 0,
    lora_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Keys and values [N, L, S, D] of N prompts, each at its own timestep [N], with gradient to the concepts.

    `prompts[n][e]`: the tokens of prompt n for text encoder e. L is `num_layers`, or 1 if no vector depends on the
    layer. `truncation`: units that a mapper keeps, [N, L] or a number. `clip_skip`, `lora_scale`: as of a stock
    pipeline's `encode_prompt`.

    NeTI section 4.1 with its textual bypass: keys are the text encoder's output with the token vectors in it; in the
    values, at the concept's positions only, alpha |h| times the direction of the bypass vector is added to the output
    h before the final norm. (SDXL's encoders have no norm there: it is added to the hidden state that SDXL reads.)
    """
    n_layers = num_layers if any(c.module.varies_in_layer for c in concepts.values()) else 1
    n = len(prompts)
    t = timestep.repeat_interleave(n_layers)
    layer = torch.arange(n_layers, device=t.device).repeat(n)
    if isinstance(truncation, Tensor):
        truncation = truncation[:, :n_layers].reshape(-1)
    vectors = {name: concept.module(t, layer, truncation) for name, concept in concepts.items()}
    keys, values, offset = [], [], 0
    for e, tower in enumerate(towers):
        part = slice(offset, offset + tower.width)
        offset = part.stop
        own = [prompt[e] for prompt in prompts]
        token, token_mask = _scatter(own, {name: v.token[..., part] for name, v in vectors.items()}, n_layers)
        bypasses = {name: _bypass(v, part, concepts[name].alpha) for name, v in vectors.items() if v.bypass is not None}
        bypass = _scatter(own, bypasses, n_layers)[0] if bypasses else None
        ids, mask = (
            torch.stack([getattr(tokens, name) for tokens in own]).repeat_interleave(n_layers, 0).to(t.device)
            for name in ("input_ids", "attention_mask")
        )
        size = len(ids) if torch.is_grad_enabled() else ROWS_AT_A_TIME
        with scaled_adapters(lora_scale, tower.model):
            chunks = [
                _encode(tower, ids[i : i + size], mask[i : i + size], token[i : i + size], token_mask[i : i + size],
                        None if bypass is None else bypass[i : i + size], clip_skip)
                for i in range(0, len(ids), size)
            ]  # fmt: skip
        for side, parts in zip((keys, values), zip(*chunks, strict=True), strict=True):
            side.append(torch.cat(parts).unflatten(0, (n, n_layers)))
    return torch.cat(keys, -1), torch.cat(values, -1)


@torch.no_grad()
def base_contexts(towers: Sequence[Tower], prompts: Sequence[Sequence[Tokens]]) -> Tensor:
    """What the base reads, [N, S, D]: the super-category's first token stands in every place of a concept."""
    states = []
    for e, tower in enumerate(towers):
        device = tower.model.get_input_embeddings().weight.device
        ids, mask = (
            torch.stack([getattr(p[e], n) for p in prompts]).to(device) for n in ("input_ids", "attention_mask")
        )
        nowhere = torch.zeros_like(ids, dtype=torch.bool)
        states.append(_encode(tower, ids, mask, torch.zeros((), device=device), nowhere, None, clip_skip=0)[0])
    return torch.cat(states, -1)


def keep_recent(cache: OrderedDict, needed: Collection) -> None:
    """Drops what was used least recently until CACHE_BYTES hold the values (by their `nbytes`); `needed` stays."""
    for key in needed:
        cache.move_to_end(key)
    size = sum(value.nbytes for value in cache.values())
    while len(cache) > len(needed) and size > CACHE_BYTES:
        size -= cache.popitem(last=False)[1].nbytes


def _bypass(vectors: Vectors, part: slice, alpha: float) -> Tensor:
    """alpha times the direction of the bypass vector."""
    return alpha * nn.functional.normalize(vectors.bypass[..., part], dim=-1)


def _scatter(prompts: Sequence[Tokens], vectors: Mapping[str, Tensor], n_layers: int) -> tuple[Tensor, Tensor]:
    """Vectors [N L, n, W] at the positions where they stand, zero elsewhere [N L, S, W]; and where that is [N L, S]."""
    first = next(iter(vectors.values()))
    n, length = len(prompts), len(prompts[0].input_ids)
    rows = first.new_zeros(n, n_layers, length, first.shape[-1])
    where = torch.zeros(n, length, dtype=torch.bool)
    for name, value in vectors.items():
        value = value.unflatten(0, (n, n_layers))
        for row, tokens in enumerate(prompts):
            for start in (start for other, start in tokens.spans if other == name):
                stop = start + value.shape[2]
                rows[row, :, start:stop] = value[row]
                where[row, start:stop] = True
    return rows.flatten(0, 1), where.repeat_interleave(n_layers, 0).to(rows.device)


def _encode(
    tower: Tower, ids: Tensor, mask: Tensor, token: Tensor, where: Tensor, bypass: Tensor | None, clip_skip: int
) -> tuple[Tensor, Tensor]:
    model = tower.model
    mask = mask if getattr(model.config, "use_attention_mask", False) else None
    with _written(model.get_input_embeddings(), token, where[..., None]):
        states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    h = states[tower.layer - clip_skip]
    norm = getattr(model, "text_model", model).final_layer_norm if tower.final_norm else nn.Identity()
    keys = norm(h)
    if bypass is None:
        return keys, keys
    # in float32: the norm of a large half-precision state overflows
    shifted = (h.float() + h.float().norm(dim=-1, keepdim=True) * bypass).to(h.dtype)
    return keys, torch.where(where[..., None], norm(shifted), keys)


@contextmanager
def _written(embedding: nn.Module, token: Tensor, where: Tensor):
    """Inside, the token embedding's output [N, S, W] is `token` at the positions `where`."""
    handle = embedding.register_forward_hook(lambda _, args, out: torch.where(where, token.to(out.dtype), out))
    try:
        yield
    finally:
        handle.remove()
