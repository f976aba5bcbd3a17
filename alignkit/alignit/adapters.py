"""LoRAs of the text encoders, and which of all LoRAs are a customiser's."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from alignkit.attention import only_adapters

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


def active_adapters(module: nn.Module, base_adapters: Sequence[str]) -> list[str]:
    """Names of a customiser's LoRAs that are at work in a module."""
    layers = [layer for layer in adapted_layers(module) if not layer.disable_adapters]
    return sorted({name for layer in layers for name in layer.active_adapters} - set(base_adapters))


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
