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
from weakref import WeakSet

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

ContextSource = Callable[[Tensor, Tensor], Tensor | None]
"""(encoder_hidden_states [B, S, D], timestep [B]) -> contexts, broadcastable to [B, L, S', 2 D]; None: the plain text.

`timestep` is what the network was called with, repeated for the batch: it may be floating point.
"""

_EXECUTION_ORDER = ("down_blocks", "mid_block", "up_blocks")  # modules are registered down, up, mid
_ATTACHED: WeakSet[nn.Module] = WeakSet()


def text_layers(denoiser: nn.Module) -> list[str]:
    """Names of the layers that read the text, in the order of execution; the index in this list is the layer's number.

    A layer is a `Transformer2DModel` ("down_blocks.0.attentions.0"): SD 1.x and 2.x have 16, as P+ (Voynov et al. 2023)
    and NeTI count them; SDXL has 11, whose one to ten transformer blocks read the same text.
    Raises ValueError where text reaches attention in another way.
    """
    denoiser = _unwrap(denoiser)
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
    inner = _unwrap(denoiser)
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

    def fill(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Replaces encoder_hidden_states [B, S, D] by the bank [B, L, S', 2 D]."""
        if not torch.compiler.is_compiling():
            now = _projections(inner)
            if len(now) != len(projections) or any(a[0] is not b[0] for a, b in zip(now, projections, strict=True)):
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


def _refuse_caches(denoiser: nn.Module) -> None:
    """Those of diffusers that keep an attention's output for later steps, whose text is another by then."""
    for name, module in denoiser.named_modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        cache = next(
            (hook for hook in hooks if hook.startswith(("pyramid_attention", "faster_cache", "text_kv"))), None
        )
        if cache:
            raise ValueError(
                f"{name or 'the network'} has the cache {cache!r}, which would miss that the text changes."
            )


def _reads_text(module: nn.Module) -> bool:
    return isinstance(module, Attention) and module.is_cross_attention


def _unwrap(denoiser: nn.Module) -> nn.Module:
    """The module inside `torch.compile(module)`."""
    return getattr(denoiser, "_orig_mod", denoiser)


def _per_row(timestep: Tensor | float | int, batch: int, device: torch.device) -> Tensor:
    return torch.as_tensor(timestep, device=device).reshape(-1).expand(batch)
