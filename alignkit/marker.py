"""Which prompt a row of the batch belongs to: one more row behind `prompt_embeds`, which holds the prompt's number.

A stock pipeline repeats, joins and cuts its embeddings before the network sees them, each in its own way. What stands
in a row of theirs goes through all of it, so nothing depends on the order of a batch or on how long it is. The context
bank (attention.py) takes the row off again, before any layer reads it.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.attention import ContextSource, context_bank

BASE = 256  # digits of a number that bfloat16 holds exactly


def marked(prompt_embeds: Tensor, numbers: Sequence[int]) -> Tensor:
    """[B, S, D] and a number for every B / n of the rows (0 is plain text) -> [B, S + 1, D]."""
    images = len(prompt_embeds) // len(numbers)
    number = torch.tensor(numbers, device=prompt_embeds.device).repeat_interleave(images)
    row = torch.zeros_like(prompt_embeds[:, :1])
    row[:, 0, 0], row[:, 0, 1] = (number % BASE).to(row.dtype), (number // BASE).to(row.dtype)
    return torch.cat([prompt_embeds, row], dim=1)


def is_marked(prompt_embeds: Tensor, window: int) -> bool:
    """One row longer than the text encoder's window, and zero behind the number."""
    return prompt_embeds.shape[1] == window + 1 and not prompt_embeds[:, -1, 2:].any()


def unmarked(prompt_embeds: Tensor) -> tuple[Tensor, list[int]]:
    """[B, S + 1, D] -> [B, S, D] and the numbers."""
    low, high = prompt_embeds[:, -1, :2].float().unbind(-1)
    return prompt_embeds[:, :-1], (low + BASE * high).round().long().tolist()


def take_numbers(given: dict[str, Any], name: str, window: int) -> list[int] | None:
    """Takes them off embeddings among the arguments of `encode_prompt`; None when there are no such.

    A pipeline gives the other side as many rows as it finds there: one more than its text encoder has positions.
    """
    embeds = given.get(name)
    if embeds is None or not is_marked(embeds, window):
        return None
    given[name], numbers = unmarked(embeds)
    return numbers


def controlnets_of(pipe: Any) -> list[nn.Module]:
    """One, several (`MultiControlNetModel`) or none."""
    net = getattr(pipe, "controlnet", None)
    return list(getattr(net, "nets", [net] if net is not None else []))


@contextmanager
def numbered_bank(pipe: Any, source: ContextSource, window: int) -> Iterator[None]:
    """Inside, the U-Net reads the contexts of `source`, and the pipeline's ControlNets what stands before the mark."""

    def plain(text: Tensor, timestep: Tensor) -> Tensor | None:
        if not is_marked(text, window):
            return None
        return torch.cat([text[:, :-1]] * 2, dim=-1)[:, None]

    with ExitStack() as stack:
        stack.enter_context(context_bank(pipe.unet, source))
        for net in controlnets_of(pipe):
            stack.enter_context(context_bank(net, plain))
        yield
