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

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from alignkit.adapters import active_adapters, only_base_adapters, refuse_merged, text_encoders
from alignkit.alignit.checks import (
    check_concepts,
    check_customised,
    check_family,
    check_layers,
    check_nouns,
    check_places,
    check_settings,
    warn_of_sums,
    watch_network,
)
from alignkit.alignit.joint import input_rows
from alignkit.alignit.text import (
    Concept,
    Prompt,
    Text,
    as_concepts,
    as_list,
    infused_rows,
    of_rows,
    whole_segment,
    with_concepts,
)
from alignkit.attention import paired_projections, projection_pairs, text_layers
from alignkit.marker import is_marked, marked, numbered_bank, take_numbers, unmarked

__all__ = ["Concept", "alignit"]


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
    concepts = as_concepts(concepts)
    check_settings(mode, source, infuse, strength, timesteps)
    if infuse != "both" or 0 < strength < 1:
        check_nouns(concepts)
    if "encode_prompt" in vars(pipe):
        raise RuntimeError("This pipeline's encode_prompt is replaced already: leave that `with` block first.")
    if mode == "input":
        if infuse != "both" or layers is not None or timesteps is not None or truncation is not None:
            raise ValueError(
                "mode input exchanges whole rows before the first layer: no infuse, layers, timesteps or truncation."
            )
        with input_rows(pipe, concepts, base, custom, source, strength, base_adapters):
            yield pipe
        return
    check_family(pipe)
    for other in (base, custom):
        if other is not None:
            check_family(other)
    check_concepts(pipe, concepts, source, truncation)
    pairs = projection_pairs(pipe.unet, getattr(base, "unet", None), getattr(custom, "unet", None), base_adapters)
    two_weights = any(pair.base is not pair.custom for pair in pairs)
    check_places(pipe, pairs, base, custom)
    names = text_layers(pipe.unet)
    check_layers(layers, names)
    check_unchanged = watch_network(pipe.unet)
    warn_of_sums(custom or pipe, concepts, base_adapters)

    segment = whole_segment(base or pipe)
    text = Text(custom or pipe, base or pipe, concepts, source, len(names), segment, truncation, base_adapters)
    disabled = all(getattr(pair.custom, "disable_adapters", False) for pair in pairs if pair.base is not pair.custom)
    if disabled and base is None and custom is None:
        check_customised(concepts, text_encoders(pipe), segment.of(pipe), base_adapters)
    varies = any(c.learned is not None and (c.learned.layers or c.learned.kind == "neti") for c in concepts)
    everywhere = infuse == "both" and layers is None and timesteps is None
    everywhere = everywhere and all(concept.values_from is None for concept in concepts)
    with ExitStack() as stack:
        bank = None
        if two_weights or varies or not everywhere:
            where = torch.tensor([float(layers is None or name in layers) for name in names])
            bank = _Bank(text, two_weights, infuse, strength, where, timesteps)
            stack.enter_context(numbered_bank(pipe, bank, text.window))
            if two_weights:
                stack.enter_context(paired_projections(pairs))
        handle = pipe.unet.register_forward_pre_hook(lambda *_: check_unchanged())
        stack.callback(handle.remove)
        original = pipe.encode_prompt
        stack.callback(pipe.__dict__.pop, "encode_prompt")
        pipe.encode_prompt = _encode_prompt(original, text, bank, strength, custom)
        yield pipe


def _encode_prompt(
    original: Callable, text: Text, bank: "_Bank | None", strength: float, custom: Any
) -> Callable:  # fmt: skip
    signature = inspect.signature(original)

    def encode_prompt(*args: Any, **kwargs: Any) -> tuple:
        for one in (text.custom, text.base):
            refuse_merged(one, RuntimeError)
        text.forget_others()
        given = signature.bind(*args, **kwargs)
        values = given.arguments
        grafted = [] if custom is None else active_adapters(custom.unet, ())
        if grafted and values.get("lora_scale") not in (None, 1):
            raise ValueError(
                f"The scale {values['lora_scale']} of cross_attention_kwargs does not reach the LoRA {grafted[0]!r}, "
                "which is in the U-Net of `custom`: set its weight there, custom.set_adapters(name, weight)."
            )
        extra = {name: values[name] for name in ("clip_skip", "lora_scale") if values.get(name) is not None}
        prompts = {}
        for side in ("prompt", "negative_prompt"):
            listed = [] if values.get(f"{side}_embeds") is not None else as_list(values.get(side))
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
        with only_base_adapters(text.base, text.base_adapters):
            encoded = text.encode_base(*given.args, **given.kwargs)
        images = values.get("num_images_per_prompt", 1)
        both = [
            embeds if embeds is None else marked(embeds, mark) if mark else place(embeds, own, images)
            for embeds, own, mark in zip(encoded[:2], prompts.values(), marks, strict=True)
        ]
        return *both, *encoded[2:]

    def place(embeds: Tensor, prompts: list[Prompt], num_images_per_prompt: int) -> Tensor:
        own = of_rows(prompts, embeds, num_images_per_prompt)
        return with_concepts(embeds, own, text, strength) if bank is None else _numbered(embeds, own, bank)

    return encode_prompt


def _numbered(embeds: Tensor, prompts: list[Prompt], bank: "_Bank") -> Tensor:
    """The embeddings [B, S, D] as they are, told apart for the bank."""
    if not prompts and embeds.shape[1] != bank.text.window:
        return embeds  # a user's, of a length that could not be told to be marked
    return marked(embeds, [bank.number(prompt) if prompt.spans else 0 for prompt in prompts] or [0] * len(embeds))


class _Bank:
    """The context source: which prompt each row of the batch is (0: none of ours), and what its layers read."""

    def __init__(
        self,
        text: Text,
        two_weights: bool,
        infuse: str,
        strength: float,
        layers: Tensor,
        timesteps: tuple[float, float] | None,
    ):
        self.text, self.two_weights, self.timesteps = text, two_weights, timesteps
        self.layers = layers * strength
        self.sides = [float(infuse in ("both", side)) for side in ("keys", "values")]
        self.prompts: list[Prompt | None] = [None]

    def number(self, prompt: Prompt) -> int:
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
            keys, values, mask = infused_rows(prompt, found, ordered[row])
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
