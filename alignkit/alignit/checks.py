"""What AlignIT is asked for, and pipelines in which it could not keep its promise: each refused by name."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models import attention_processor
from torch import nn

from alignkit.adapters import MERGED, TEXT_ENCODERS, active_adapters, refuse_merged, text_encoders
from alignkit.alignit.text import Concept, find_concepts
from alignkit.attention import ATTENTION_CACHES, BLOCK_CACHES, ProjectionPair, find_cache, text_parts

PROCESSORS = (  # of diffusers, that read text as the first of them does
    "AttnProcessor", "AttnProcessor2_0", "AttnAddedKVProcessor", "AttnAddedKVProcessor2_0", "SlicedAttnProcessor",
    "XFormersAttnProcessor", "AttnProcessorNPU", "XLAFlashAttnProcessor2_0", "CustomDiffusionAttnProcessor",
    "CustomDiffusionAttnProcessor2_0", "CustomDiffusionXFormersAttnProcessor", "IPAdapterAttnProcessor",
    "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor",
)  # fmt: skip


def check_settings(
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


def check_nouns(concepts: Sequence[Concept]) -> None:
    alone = next((concept.phrase for concept in concepts if not concept.noun), None)
    if alone is not None:
        raise ValueError(
            f"{alone!r} has no noun, so the base has no rows for its place: take infuse both and strength 0 or 1, or "
            "make the noun a part of the concept, as in Concept('<t> cat', 'cat')."
        )


def check_concepts(pipe: Any, concepts: Sequence[Concept], source: str, truncation: int | None) -> None:
    check_phrases(concepts)
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


def check_phrases(concepts: Sequence[Concept]) -> None:
    phrases = [concept.phrase for concept in concepts]
    twice = {phrase for phrase in phrases if phrases.count(phrase) > 1}
    if twice:
        raise ValueError(f"Two concepts are called {twice.pop()!r}: each needs a phrase of its own.")
    for concept in concepts:
        if [c for _, _, c in find_concepts(concept.dummy_prompt, concepts)] != [concept]:
            raise ValueError(
                f"The dummy prompt {concept.dummy_prompt!r} has to hold {concept.phrase!r} once and no other concept."
            )


def check_family(pipe: Any) -> None:
    if getattr(pipe, "transformer", None) is not None:
        raise ValueError(
            f"{type(pipe).__name__} mixes text and image in joint attention, so that after its first block every row "
            "depends on the concept and no exchange of rows can keep the others as the base has them. Supported are "
            'pipelines of SD 1.x, SD 2.x and SDXL; mode="input" exchanges the rows that enter the transformer.'
        )
    if not all(hasattr(pipe, name) for name in ("unet", "text_encoder", "tokenizer", "encode_prompt")):
        raise ValueError(f"Expected a pipeline of SD 1.x, SD 2.x or SDXL, got {type(pipe).__name__}.")
    refuse_merged(pipe)


def check_customised(
    concepts: Sequence[Concept],
    encoders: Sequence[nn.Module],
    tokenizers: Sequence[Any],
    base_adapters: Sequence[str],
    where: str = "this pipeline",
    customisers: str = "a LoRA, Custom Diffusion's weights",
) -> None:
    """ValueError for a phrase that is nothing but plain words to text encoders that nobody customised."""
    adapted = any(active_adapters(encoder, base_adapters) for encoder in encoders)
    for concept in concepts:
        known = [token for t in tokenizers for token in t.get_added_vocab() if token in concept.phrase]
        if not (adapted or known or concept.learned is not None or concept.values_from):
            raise ValueError(
                f"Nothing in {where} is customised for {concept.phrase!r}: expected a token of Textual Inversion, "
                f"{customisers}, or another model as `base` or `custom`."
            )


def warn_of_sums(pipe: Any, concepts: Sequence[Concept], base_adapters: Sequence[str]) -> None:
    at_work = sorted(
        {name for net in (pipe.unet, *text_encoders(pipe)) for name in active_adapters(net, base_adapters)}
    )
    if len(concepts) > 1 and len(at_work) > 1:
        warnings.warn(
            f"The LoRAs {', '.join(at_work)} work together: each of the {len(concepts)} concepts is drawn with the sum "
            "of them. Load one, or train one LoRA on all concepts.",
            stacklevel=4,  # through a context manager
        )


def check_places(pipe: Any, pairs: Sequence[ProjectionPair], base: Any, custom: Any) -> None:
    """ValueError for weights of a second pipeline that the one that runs could not read as they come."""
    if base is not None or custom is not None:
        for pair in pairs:
            theirs = pair.custom if base is None else pair.base
            _check_place(pipe, "unet", pair.module, getattr(theirs, "layer", theirs))  # of SomeAdapters
    if base is not None:
        check_encoders(pipe, base)


def check_layers(layers: Sequence[str] | None, names: Sequence[str]) -> None:
    unknown = sorted(set(layers or ()) - set(names))
    if unknown or (layers is not None and not layers):
        raise ValueError(f"layers: expected some of {names}, got {unknown or 'none'}.")


def check_encoders(pipe: Any, base: Any) -> None:
    """ValueError for text encoders whose rows the network could not read as they come; a concept's rows are cast."""
    for name in TEXT_ENCODERS:
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


def watch_network(unet: nn.Module) -> Callable[[], None]:
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
            raise RuntimeError(MERGED.format(sorted(set(merged))))

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
