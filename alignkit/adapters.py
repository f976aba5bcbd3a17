"""What lies in and around a network: LoRAs of peft, at work or not, some of them alone; and torch.compile."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
MERGED = (
    "The LoRA {} was merged into the weights, so the base's are gone. Call pipe.unfuse_lora() first, or load it "
    "without merging."
)


def text_encoders(pipe: Any) -> list[nn.Module]:
    return [encoder for name in TEXT_ENCODERS if (encoder := getattr(pipe, name, None)) is not None]


def adapted_layers(*modules: nn.Module) -> list[nn.Module]:
    """Layers with a LoRA of peft."""
    layers = (layer for module in modules for layer in module.modules())
    return [layer for layer in layers if hasattr(layer, "base_layer") and hasattr(layer, "enable_adapters")]


def adapter_state(*modules: nn.Module) -> list[tuple]:
    """What differs when other LoRAs are switched on, or the same with other weights."""
    return [
        (layer.disable_adapters, list(layer.active_adapters), dict(layer.scaling)) for layer in adapted_layers(*modules)
    ]


def active_adapters(module: nn.Module, base_adapters: Sequence[str]) -> list[str]:
    """Names of a customiser's LoRAs that are at work in a module."""
    layers = [layer for layer in adapted_layers(module) if not layer.disable_adapters]
    return sorted({name for layer in layers for name in layer.active_adapters} - set(base_adapters))


@contextmanager
def only_adapters(layer: nn.Module, adapters: Sequence[str]) -> Iterator[None]:
    """Inside, these of the adapters of a layer of peft are active, frozen; afterwards those that were, as they were."""
    active, trained = list(layer.active_adapters), [p for p in layer.parameters() if p.requires_grad]
    layer.set_adapter(adapters, inference_mode=True)
    try:
        yield
    finally:
        layer.set_adapter(active, inference_mode=True)
        for parameter in trained:
            parameter.requires_grad_()


@contextmanager
def scaled_adapters(scale: float, *modules: nn.Module) -> Iterator[None]:
    """Inside, all LoRAs of these modules are `scale` times as strong, as stock `encode_prompt` has its `lora_scale`."""
    layers = adapted_layers(*modules) if scale != 1 else []
    kept = [dict(layer.scaling) for layer in layers]
    try:
        for layer, scaling in zip(layers, kept, strict=True):
            layer.scaling.update({name: scale * value for name, value in scaling.items()})
        yield
    finally:
        for layer, scaling in zip(layers, kept, strict=True):
            layer.scaling.update(scaling)


@contextmanager
def only_base_adapters(pipe: Any, names: Sequence[str]) -> Iterator[None]:
    """Inside, the text encoders are the base's: of their active adapters, `names` alone."""
    with ExitStack() as stack:
        for layer in adapted_layers(*text_encoders(pipe)):
            if not layer.disable_adapters:
                stack.enter_context(only_adapters(layer, [name for name in layer.active_adapters if name in names]))
        yield


def refuse_merged(pipe: Any, kind: type[Exception] = ValueError) -> None:
    """Raises `kind` where a LoRA of the pipeline is merged into weights."""
    merged = set(getattr(pipe, "_merged_adapters", None) or ())
    for layer in adapted_layers(*text_encoders(pipe)):
        merged |= set(layer.merged_adapters)
    if merged:
        raise kind(MERGED.format(sorted(merged)))


def unwrapped(denoiser: nn.Module) -> nn.Module:
    """The module inside `torch.compile(module)`."""
    return getattr(denoiser, "_orig_mod", denoiser)
