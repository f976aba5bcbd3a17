"""Text conditioning that depends on the layer and the timestep. The only file that touches attention modules.

A plain U-Net gives every cross-attention layer the same text, [B, S, D], for keys and for values. A `context_bank`
replaces it, call by call, by a text for each layer, keys and values apart:

    def source(encoder_hidden_states, timestep):      # [B, S, D], [B]
        return contexts                               # [B, L, S', 2 * D]: of each layer its keys, then its values

    with context_bank(pipe.unet, source):
        pipe("a cat")

or, where the caller makes the contexts, as a training does:

    with context_bank(unet):
        unet(x_t, timestep, contexts)

L counts `text_layers(pipe.unet)`. The bank travels through the network as its `encoder_hidden_states` argument, and
each layer takes its own slice, by its name. Nothing counts calls and no hook remembers a step: so recomputation under
gradient checkpointing, another order of blocks, a second network call within one solver step or a compiled block all
see what the first forward pass saw. (A counter gives the right image there and, silently, wrong gradients.) Keys and
values lie side by side along features, not tokens: S keeps its meaning for masks, and a graph that was compiled for
the plain width is never taken for the other.

For a second customiser, whose `to_k` and `to_v` have other weights: what a source returns reaches a forward hook on
`to_k` or `to_v` as its input, already sliced, and S' may be any length. Rows of zeros project to zeros (these layers
have no bias), so [rows for the base weights; rows for the custom ones], zero where they are not meant, need no mask.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from weakref import WeakSet

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from alignkit.adapters import only_adapters, unwrapped

ContextSource = Callable[[Tensor, Tensor], Tensor | None]
"""(encoder_hidden_states [B, S, D], timestep [B]) -> contexts, broadcastable to [B, L, S', 2 D]; None: the plain text.

`timestep` is what the network was called with, repeated for the batch: it may be floating point.
"""

_EXECUTION_ORDER = ("down_blocks", "mid_block", "up_blocks")  # modules are registered down, up, mid
_ATTACHED: WeakSet[nn.Module] = WeakSet()
# Hooks of diffusers, by what their names begin with: what keeps an attention's output, or its keys and values, for
# later steps, whose text is another by then; and what keeps whole blocks' outputs.
ATTENTION_CACHES = ("pyramid_attention_broadcast", "faster_cache", "text_kv_cache")
BLOCK_CACHES = ("fbc_", "mag_cache", "sea_cache", "taylorseer")


def use_plain_attention(network: nn.Module, device_type: str) -> None:
    """For training on a CPU, where the fused attention's backward takes twice the time; elsewhere, it does nothing."""
    if device_type == "cpu" and isinstance(network, UNet2DConditionModel | ControlNetModel):
        network.set_attn_processor(AttnProcessor())


def text_layers(denoiser: nn.Module) -> list[str]:
    """Names of the layers that read the text, in the order of execution; the index in this list is the layer's number.

    A layer is a `Transformer2DModel` ("down_blocks.0.attentions.0"): SD 1.x and 2.x have 16, as P+ (Voynov et al. 2023)
    and NeTI count them; SDXL has 11, whose one to ten transformer blocks read the same text.
    Raises ValueError where text reaches attention in another way.
    """
    denoiser = unwrapped(denoiser)
    layers = [name for name, module in denoiser.named_modules() if isinstance(module, Transformer2DModel)]
    reading = [name for name, module in denoiser.named_modules() if _reads_text(module)]
    outside = [name for name in reading if not any(name.startswith(f"{layer}.") for layer in layers)]
    if not reading or outside:
        found = f"{outside[0]} reads text outside of one" if outside else "there is none"
        raise ValueError(
            "Expected a U-Net whose cross-attention is in Transformer2DModel layers (SD 1.x, SD 2.x, SDXL), but in "
            f"this {type(denoiser).__name__} {found}. Models with joint attention (SD3, FLUX) have no text per layer."
        )
    return sorted(
        [layer for layer in layers if any(name.startswith(f"{layer}.") for name in reading)],
        key=lambda name: _EXECUTION_ORDER.index(name.partition(".")[0]),
    )


@contextmanager
def context_bank(
    denoiser: nn.Module, source: ContextSource | None = None, layers: Sequence[str] | None = None
) -> Iterator[None]:
    """Inside, every call of `denoiser` reads the contexts of `source`; afterwards it is as it was, whatever happened.

    Without a source it is called with contexts [B, L, S', 2 D] in place of `encoder_hidden_states`. A gradient has to
    be taken inside too: checkpointed blocks run again then.

    `layers`: the layers that `source` numbers; those of `denoiser` unless told. A ControlNet is given the U-Net's, of
    which it has the first ones by the same names.

    Raises ValueError for a network that cannot take a bank; RuntimeError when one is attached already, and at the next
    call when the attention modules were exchanged meanwhile (an adapter loaded or unloaded, projections fused).
    """
    inner = unwrapped(denoiser)
    own = text_layers(inner)
    layers = own if layers is None else list(layers)
    missing = [name for name in own if name not in layers]
    if missing:
        raise ValueError(f"Expected the layers of this network among {list(layers)}, but {missing[0]} is not.")
    _refuse_caches(inner)
    if inner._compiled_call_impl is not None:
        raise ValueError(
            "This network was compiled in place, and its graph may not see what is attached to it. Compile it as "
            "pipe.unet = torch.compile(pipe.unet), or its blocks by unet.compile_repeated_blocks()."
        )
    if inner in _ATTACHED:
        raise RuntimeError("This network reads from a context bank already: leave that first, or join the two sources.")
    projections = _projections(inner)
    width = projections[0][0].in_features
    reading = [module for module in inner.modules() if _reads_text(module)]
    attached = text_parts(reading)

    def fill(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Replaces encoder_hidden_states [B, S, D] by the bank [B, L, S', 2 D]."""
        if not torch.compiler.is_compiling() and text_parts(reading) != attached:
            raise RuntimeError(
                "The attention modules were exchanged while a context bank was attached. Load and unload adapters "
                "before attaching it."
            )
        given = dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)) | kwargs
        text = contexts = given["encoder_hidden_states"]
        if source:
            contexts = source(text, _per_row(given["timestep"], len(given["sample"]), text.device))
            if contexts is None:
                contexts = torch.cat([text, text], dim=-1)[:, None]
        if contexts.ndim != 4 or contexts.shape[-1] != 2 * width:
            raise ValueError(f"Expected contexts [B, L, S, {2 * width}], got {list(contexts.shape)}.")
        batch, _, length, _ = contexts.shape
        bank = contexts.expand(batch, len(layers), length, 2 * width)
        if len(args) > 2:
            return (*args[:2], bank, *args[3:]), kwargs
        return args, kwargs | {"encoder_hidden_states": bank}

    def take_layer(index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            text = kwargs["encoder_hidden_states"]
            # with an IP-Adapter, (text, image)
            text = (text[0][:, index], *text[1:]) if isinstance(text, tuple) else text[:, index]
            return args, kwargs | {"encoder_hidden_states": text}

        return hook

    with ExitStack() as stack:

        def attach(module: nn.Module, hook: Callable, **settings: bool) -> None:
            stack.callback(module.register_forward_pre_hook(hook, **settings).remove)

        _ATTACHED.add(inner)
        stack.callback(_ATTACHED.discard, inner)
        attach(denoiser, fill, with_kwargs=True)
        for name in own:
            attach(inner.get_submodule(name), take_layer(layers.index(name)), with_kwargs=True)
        for module, hook in projections:
            attach(module, hook)
        yield


def _take_keys(module: nn.Module, args: tuple[Tensor]) -> Tensor:
    return args[0][..., : args[0].shape[-1] // 2]


def _take_values(module: nn.Module, args: tuple[Tensor]) -> Tensor:
    return args[0][..., args[0].shape[-1] // 2 :]


def _projections(denoiser: nn.Module) -> list[tuple[nn.Module, Callable]]:
    """The modules that turn text into keys and values, each with the hook that gives it its half."""
    found = []
    for name, attention in denoiser.named_modules():
        if not _reads_text(attention):
            continue
        if getattr(attention, "fused_projections", False):
            raise ValueError(f"{name} has fused projections: call unet.unfuse_qkv_projections() first.")
        if attention.norm_cross:
            raise ValueError(f"{name} normalises the text before it is projected, which a context bank does not pass.")
        # Custom Diffusion's processors project with weights of their own
        for owner, suffix in ((attention, ""), (attention.processor, "_custom_diffusion")):
            for projection, hook in (("to_k", _take_keys), ("to_v", _take_values)):
                module = getattr(owner, projection + suffix, None)
                if module is not None:
                    found.append((module, hook))
    return found


def text_parts(attentions: Sequence[Attention]) -> list:
    """What an adapter, fusing, or Custom Diffusion's processors would exchange; a module is equal to itself alone."""
    own = [getattr(a.processor, f"{name}_custom_diffusion", None) for a in attentions for name in ("to_k", "to_v")]
    return own + [part for a in attentions for part in (a.to_k, a.to_v, a.fused_projections)]


def _refuse_caches(denoiser: nn.Module) -> None:
    found = find_cache(denoiser, ATTENTION_CACHES)
    if found:
        raise ValueError(f"{found[0]} has the cache {found[1]!r}, which would miss that the text changes.")


def find_cache(denoiser: nn.Module, prefixes: tuple[str, ...]) -> tuple[str, str] | None:
    """The first module that has one of these caches of diffusers, and the cache."""
    for name, module in denoiser.named_modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        cache = next((hook for hook in hooks if hook.startswith(prefixes)), None)
        if cache:
            return name or "the network", cache
    return None


def _reads_text(module: nn.Module) -> bool:
    return isinstance(module, Attention) and module.is_cross_attention


def _per_row(timestep: Tensor | float | int, batch: int, device: torch.device) -> Tensor:
    return torch.as_tensor(timestep, device=device).reshape(-1).expand(batch)


# Two sets of weights


@dataclass(frozen=True)
class ProjectionPair:
    """W_k or W_v of one layer, of the base model and of the customised one; `module` is the one that is called."""

    name: str
    module: nn.Module
    base: nn.Module
    custom: nn.Module


def projection_pairs(
    denoiser: nn.Module,
    base: nn.Module | None = None,
    custom: nn.Module | None = None,
    base_adapters: Sequence[str] = (),
) -> list[ProjectionPair]:
    """Where text becomes keys and values: the base's projections and the customised model's, in the order of the names.

    Both are in `denoiser` for a LoRA that is not merged (the base lies below it) and for Custom Diffusion (the
    customised ones lie in the processor). Else the other network is given: `base` when `denoiser` is customised,
    `custom` when it is the base. A pair whose two modules are one was not customised. `base_adapters`: names of LoRAs
    that are part of the base.

    Raises ValueError for a LoRA that was merged, for fused projections, for ones with a bias, and when the two networks
    do not fit each other.
    """
    if base is not None and custom is not None:
        raise ValueError("Pass the base network or the customised one beside the one that runs, not both.")
    pairs = []
    for name, attention in unwrapped(denoiser).named_modules():
        if not _reads_text(attention):
            continue
        if getattr(attention, "fused_projections", False):
            raise ValueError(f"{name} has fused projections: call unet.unfuse_qkv_projections() first.")
        for part in ("to_k", "to_v"):
            called = _customised(attention, part)
            if base is not None:
                other = _plain(_same_layer(base, name, attention), part, base_adapters)
                pair = ProjectionPair(f"{name}.{part}", called, other, called)
            elif custom is not None:
                other = _customised(_same_layer(custom, name, attention), part)
                pair = ProjectionPair(f"{name}.{part}", called, called, other)
            else:
                pair = ProjectionPair(f"{name}.{part}", called, _plain(attention, part, base_adapters), called)
            for module in (pair.base, pair.custom):
                if getattr(module, "merged", False):
                    raise ValueError(
                        f"{pair.name}: the LoRA was merged into the weights, so the base's are gone. Call "
                        "pipe.unfuse_lora() first, or load it without merging."
                    )
                if getattr(module, "bias", None) is not None:
                    raise ValueError(f"{pair.name} has a bias, which two sums of one projection cannot share.")
            pairs.append(pair)
    return pairs


@contextmanager
def paired_projections(pairs: Sequence[ProjectionPair]) -> Iterator[None]:
    """Inside, each projection reads [rows for the base; rows for the customised], [B, 2 S, D], and returns [B, S, C].

    The sum of both. A row of zeros projects to zeros, so that a row which is given to one side alone is exactly that
    side's: what belongs to whom travels with the text, and the hooks hold no state.
    """

    def join(pair: ProjectionPair) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            for_base, for_custom = args[0].chunk(2, dim=1)
            # `forward`, since a module's own hooks slice the bank, and this text is sliced already
            if pair.custom is module:
                own = output[:, for_base.shape[1] :]
                return own + pair.base.forward(for_base)
            return output[:, : for_base.shape[1]] + pair.custom.forward(for_custom)

        return hook

    handles = [pair.module.register_forward_hook(join(pair)) for pair in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _customised(attention: Attention, part: str) -> nn.Module:
    """The projection that attention calls: Custom Diffusion's processors have their own."""
    own = getattr(attention.processor, f"{part}_custom_diffusion", None)
    return getattr(attention, part) if own is None else own


def _plain(attention: Attention, part: str, adapters: Sequence[str] = ()) -> nn.Module:
    """The projection below any LoRA but `adapters`."""
    module = getattr(attention, part)
    if getattr(module, "merged", False) or not hasattr(module, "get_base_layer"):
        return module  # a merged one is for the caller to refuse
    active = [] if module.disable_adapters else [name for name in module.active_adapters if name in module.lora_A]
    kept = [name for name in active if name in adapters]
    if kept == active:
        return module if active else module.get_base_layer()
    return SomeAdapters(module, kept) if kept else module.get_base_layer()


class SomeAdapters(nn.Module):
    """A layer of peft with some of its active adapters only."""

    def __init__(self, layer: nn.Module, adapters: Sequence[str]):
        super().__init__()
        self.adapters = list(adapters)
        self.__dict__["layer"] = layer  # not a submodule: it has its place in the network

    def forward(self, x: Tensor) -> Tensor:
        with only_adapters(self.layer, self.adapters):
            return self.layer.forward(x)


def _same_layer(other: nn.Module, name: str, attention: Attention) -> Attention:
    """The layer of that name in another network."""
    found = dict(unwrapped(other).named_modules()).get(name)
    # not by the weights, which are packed where they have 4 bits
    shapes = [None if a is None else [[m.out_features, m.in_features] for m in (_plain(a, "to_k"), _plain(a, "to_v"))]
              for a in (attention, found)]  # fmt: skip
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"The two networks are of different bases: {name} has W_k and W_v of {shapes[0]} in the one that runs and "
            f"{shapes[1] or 'does not exist'} in the other."
        )
    return found


# What a layer reads and looks at


@dataclass
class AttentionRecord:
    """Of one row of the batch, means over the calls of a network, by the name of the layer.

    keys and values: [S, C]. maps: how much each pixel looks at each token, [S, h, w], averaged over the heads.
    """

    keys: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)
    calls: int = 0


@contextmanager
def record_attention(denoiser: nn.Module, row: int = -1) -> Iterator[AttentionRecord]:
    """Inside, the text attention of one row of the batch is watched, by hooks on the projections alone.

    `row`: -1 is the conditional half's last. Enter it after a context bank, whose work it is then to see. The record is
    complete when the block is left; maps assume unmasked softmax attention, which is what stock U-Nets have.
    """
    denoiser, record = unwrapped(denoiser), AttentionRecord()
    sums: dict[tuple[str, str], Tensor] = {}
    now: dict[str, Tensor] = {}
    sizes: list[tuple[int, int]] = []

    def add(side: str, name: str, value: Tensor) -> None:
        value = value.detach().float()
        sums[side, name] = sums[side, name] + value if (side, name) in sums else value

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
        sample = args[0] if args else kwargs["sample"]
        sizes[:] = [tuple(sample.shape[-2:])]
        record.calls += 1

    def watch(name: str, part: str, attention: Attention) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            now[part] = output[row]
            if part != "values":
                return
            add("keys", name, now["keys"])
            add("values", name, now["values"])
            query, key = (now[p].detach().float().unflatten(-1, (attention.heads, -1)) for p in ("queries", "keys"))
            scores = torch.einsum("qhd,khd->hqk", query, key) * attention.scale
            height, width = sizes[0]
            factor = round((height * width / len(query)) ** 0.5)
            shape = (-(-height // factor), -(-width // factor))
            if shape[0] * shape[1] == len(query):
                add("maps", name, scores.softmax(-1).mean(0).T.unflatten(-1, shape))

        return hook

    handles = [denoiser.register_forward_pre_hook(begin, with_kwargs=True)]
    for name, attention in denoiser.named_modules():
        if _reads_text(attention):
            watched = ((attention.to_q, "queries"), (_customised(attention, "to_k"), "keys"))
            for module, part in (*watched, (_customised(attention, "to_v"), "values")):
                handles.append(module.register_forward_hook(watch(name, part, attention)))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
        for (side, name), value in sums.items():
            getattr(record, side)[name] = value / record.calls
