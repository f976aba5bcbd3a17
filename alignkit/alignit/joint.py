"""`mode="input"`, for joint attention (SD3, FLUX): the concepts' rows in what enters the transformer, and no more."""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

from alignkit.adapters import active_adapters, only_base_adapters, refuse_merged, unwrapped
from alignkit.alignit.checks import check_customised, check_encoders, check_phrases
from alignkit.alignit.text import Concept, Prompt, Segment, Text, as_list, of_rows, with_concepts


def _segments(pipe: Any, max_sequence_length: int) -> list[Segment]:
    """What an embedding of SD3 (CLIP's rows, then T5's) or FLUX (T5's) is made of. ValueError for other pipelines."""
    network = unwrapped(getattr(pipe, "transformer", None))
    if isinstance(network, SD3Transformer2DModel):
        clip = Segment(("tokenizer", "tokenizer_2"), 0, pipe.tokenizer_max_length)
        t5 = Segment(("tokenizer_3",), clip.window, max_sequence_length)
        return [clip] if pipe.text_encoder_3 is None else [clip, t5]
    if isinstance(network, FluxTransformer2DModel):
        return [Segment(("tokenizer_2",), 0, max_sequence_length)]
    raise ValueError(
        f'mode="input" is for pipelines of SD3 and FLUX, got {type(pipe).__name__}: with the U-Nets of SD 1.x, SD 2.x '
        "and SDXL, the default keeps every layer."
    )


@contextmanager
def input_rows(
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
    check_phrases(concepts)
    warnings.warn(
        "AlignIT's mode input decides about the rows that enter the transformer, and about nothing behind: from the "
        "second block on every row has read the concept, so what it keeps of the other words is for you to look at.",
        stacklevel=5,  # through two context managers
    )
    signature = inspect.signature(pipe.encode_prompt)
    sides = [name for name in ("prompt", "negative_prompt") if name in signature.parameters]
    encode_custom, encode_base = own.encode_prompt, other.encode_prompt
    default = signature.parameters["max_sequence_length"].default
    texts: dict[int, list[Text]] = {}  # by the length of T5's part
    met = False

    def of_length(length: int) -> list[Text]:
        if length not in texts:
            texts[length] = [Text(own, other, concepts, source, 1, segment) for segment in _segments(other, length)]
            for text in texts[length]:
                text.encode_custom = encode_custom  # not this block's
        return texts[length]

    def encode_prompt(*args: Any, **kwargs: Any) -> tuple:
        nonlocal met
        for one in (own, other):
            refuse_merged(one, RuntimeError)
        given = signature.bind(*args, **kwargs)
        values = given.arguments
        names = ("clip_skip", "lora_scale", "max_sequence_length")
        extra = {name: values[name] for name in names if values.get(name) is not None}
        parts = of_length(extra.get("max_sequence_length", default))
        for text in parts:
            text.forget_others()
        placed: dict[str, list[list[Prompt]]] = {}
        for name in sides:
            told = values.get(name)
            listed = [] if values.get(f"{name}_embeds") is not None else as_list(told)
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
        with only_base_adapters(other, base_adapters):
            encoded = list(encode_base(*given.args, **given.kwargs))
        images = values.get("num_images_per_prompt", 1)
        for i, name in enumerate(sides):
            if encoded[i] is None:
                continue
            pieces, end = [], 0
            for text, prompts in zip(parts, placed[name], strict=True):
                end = text.segment.start + text.window
                rows = encoded[i][:, text.segment.start : end]
                pieces.append(with_concepts(rows, of_rows(prompts, rows, images), text, strength))
            encoded[i] = torch.cat([*pieces, encoded[i][:, end:]], dim=1)
        return tuple(encoded)

    pipe.encode_prompt = encode_prompt
    try:
        yield
    finally:
        del pipe.encode_prompt


def _check_input(pipe: Any, own: Any, other: Any, concepts: Sequence[Concept], base_adapters: Sequence[str]) -> None:
    """ValueError for a customiser that the rows which enter the transformer cannot carry."""
    pipes = (pipe, own, other)
    for one in pipes:
        _segments(one, 1)
        refuse_merged(one)
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
    lora = active_adapters(pipe.transformer, base_adapters)
    if lora:
        raise ValueError(
            f"The LoRA {lora[0]!r} changes the transformer, which works on all rows in all blocks: rows that enter it "
            "cannot carry that. Name it in base_adapters if it belongs to the base, as a style does, or switch it off: "
            "pipe.transformer.disable_lora()."
        )
    check_encoders(pipe, other)
    segments = _segments(other, 1)
    encoders = [[encoder for segment in segments for encoder in segment.encoders(one)] for one in (own, other)]
    if all(a is b for a, b in zip(*encoders, strict=True)):
        tokenizers = [tokenizer for segment in segments for tokenizer in segment.of(own)]
        names = " and ".join(n.replace("tokenizer", "text_encoder") for segment in segments for n in segment.tokenizers)
        where = f"the text encoders whose rows enter the transformer ({names})"
        check_customised(concepts, encoders[0], tokenizers, base_adapters, where, "a LoRA of them")
