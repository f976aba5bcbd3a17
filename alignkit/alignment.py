"""What a customiser did to the rest of a prompt, and what AlignIT gives back: pictures, scores, leak, attention maps.

For a concept and prompts with {} in its place, three arms with the same noise: the base draws the class noun ("base"),
the customised model draws the concept ("customised"), and the same with AlignIT ("alignit").
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignkit.alignit import Concept, alignit
from alignkit.alignit.text import token_rows
from alignkit.artifacts import atomic
from alignkit.attention import AttentionRecord, record_attention
from alignkit.base import require_finite
from alignkit.customized import Customized

ARMS = ("base", "customised", "alignit")


@dataclass(frozen=True)
class Settings:
    """Of sampling: stock pipelines, image i of a prompt from seed + i."""

    num_inference_steps: int = 25
    guidance_scale: float = 5.0
    seed: int = 0
    images_per_prompt: int = 1


def draw(
    arm: str, base: Any, customized: Customized, prompts: Sequence[str], settings: Settings, **options: Any
) -> Tensor:
    """[len(prompts) * images_per_prompt, 3, H, W] in [0, 1], prompt by prompt. `options`: of `alignit`."""
    pipe, context, phrase = _arm(arm, base, customized, options)
    with context:
        images = [
            _sample(pipe, prompt.replace("{}", phrase), settings, settings.seed + i)
            for prompt in prompts
            for i in range(settings.images_per_prompt)
        ]
    return torch.cat(images)


def record(
    arm: str, base: Any, customized: Customized, prompt: str, settings: Settings, **options: Any
) -> AttentionRecord:
    """Of one picture of one prompt: what the conditional row's layers read and look at in a real sampling run."""
    pipe, context, phrase = _arm(arm, base, customized, options)
    with context, record_attention(pipe.unet) as found:
        _sample(pipe, prompt.replace("{}", phrase), settings, settings.seed)
    return found


def _arm(arm: str, base: Any, customized: Customized, options: dict[str, Any]) -> tuple[Any, Any, str]:
    concept = customized.concept
    return {
        "base": lambda: (base, nullcontext(), concept.noun),
        "customised": lambda: (customized.pipe, customized.plain(), concept.phrase),
        "alignit": lambda: (customized.pipe, customized.aligned(**options), concept.phrase),
    }[arm]()


def _sample(pipe: Any, prompt: str, settings: Settings, seed: int) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        prompt,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images
    return require_finite(images, pipe.unet.dtype).float().cpu().clamp(0, 1)


# The leak


def leak(reference: AttentionRecord, other: AttentionRecord, rows: Sequence[tuple[int, int]]) -> dict[str, dict]:
    """Mean over tokens of |K' - K| / |K|, and of V, by "keys" and "values" and the layer.

    `rows`: pairs (row in `reference`, row in `other`) of the same token, as `other_rows` gives them.
    """
    here, there = (torch.tensor(side) for side in zip(*rows, strict=True))
    found: dict[str, dict] = {}
    for side in ("keys", "values"):
        found[side] = {}
        for name, before in getattr(reference, side).items():
            before, after = before[here], getattr(other, side)[name][there]
            change = (after - before).norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-12)
            found[side][name] = float(change.mean())
    return found


def other_rows(base: Any, customized: Customized, prompt: str) -> list[tuple[int, int]]:
    """Pairs of rows, in the base's run and in the other's, of every token but the concept's."""
    concept = customized.concept
    start = prompt.index("{}")
    first, stop = token_rows(base, prompt.replace("{}", concept.noun), start, start + len(concept.noun))
    window = base.tokenizer.model_max_length
    if concept.learned is not None:
        count = concept.learned.module.num_vectors
    else:
        one = token_rows(customized.pipe, prompt.replace("{}", concept.phrase), start, start + len(concept.phrase))
        count = one[1] - one[0]
    shift = count - (stop - first)
    behind = [(row, row + shift) for row in range(stop, window) if row + shift < window]
    return [(row, row) for row in range(first)] + behind


# Pictures


def plot_leak(leaks: dict[str, dict[str, dict[str, float]]], path: str | Path) -> None:
    """A panel for keys and one for values: a bar for each layer and arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for panel, side in zip(panels, ("keys", "values"), strict=True):
        for number, (arm, found) in enumerate(leaks.items()):
            names = list(found[side])
            places = [i + 0.4 * number - 0.2 for i in range(len(names))]
            panel.bar(places, [found[side][name] for name in names], width=0.38, label=arm)
        panel.set_ylabel(f"relative change of\nother tokens' {side}")
        panel.legend()
    labels = [name.replace("_blocks", "").replace(".attentions", "").split(".transformer")[0] for name in names]
    panels[1].set_xticks(range(len(names)), labels, rotation=60, fontsize=7)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def plot_maps(
    records: dict[str, AttentionRecord],
    images: dict[str, Tensor],
    tokens: dict[str, Sequence[tuple[str, int]]],
    path: str | Path,
) -> None:
    """A row an arm: its image [3, H, W], then where that looks at each token (label, row), averaged over the layers."""
    from matplotlib.figure import Figure

    columns = 1 + max(len(found) for found in tokens.values())
    figure = Figure(figsize=(1.6 * columns, 1.9 * len(records)), layout="constrained")
    panels = figure.subplots(len(records), columns, squeeze=False)
    for line, (arm, found) in zip(panels, records.items(), strict=True):
        for panel in line:
            panel.set_xticks([])
            panel.set_yticks([])
            panel.set_frame_on(False)
        line[0].imshow(images[arm].permute(1, 2, 0).numpy())
        line[0].set_ylabel(arm)
        mean = mean_map(found)
        for panel, (label, row) in zip(line[1:], tokens[arm], strict=False):
            panel.imshow(mean[row].numpy(), vmin=0, vmax=float(mean[1 : len(tokens[arm]) + 1].max()))
            panel.set_title(label, fontsize=8)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def mean_map(found: AttentionRecord) -> Tensor:
    """[S, h, w] of the finest layer's size, averaged over the layers; on the CPU."""
    size = max((m.shape[-2:] for m in found.maps.values()), key=lambda shape: shape[0] * shape[1])
    scaled = [
        torch.nn.functional.interpolate(m[None], size=size, mode="bilinear", align_corners=False)[0]
        for m in found.maps.values()
    ]
    return torch.stack(scaled).mean(0).cpu()


def prompt_tokens(pipe: Any, text: str, concept: Concept | None = None) -> list[tuple[str, int]]:
    """(label, row) of every token between start and end; a learned concept's rows carry its name."""
    if concept is None or concept.learned is None:
        text = pipe.maybe_convert_prompt(text, pipe.tokenizer)
        tokens = pipe.tokenizer.convert_ids_to_tokens(pipe.tokenizer(text, add_special_tokens=False).input_ids)
        return [(token.removesuffix("</w>"), i + 1) for i, token in enumerate(tokens)]
    before, behind = text.split(concept.phrase, 1)
    found = [name for name, _ in prompt_tokens(pipe, before)] if before.strip() else []
    found += [concept.phrase] * concept.learned.module.num_vectors
    found += [name for name, _ in prompt_tokens(pipe, behind)] if behind.strip() else []
    return [(name, i + 1) for i, name in enumerate(found)]


# Semantic manipulation


def manipulation(
    pipe: Any, prompt: str, sources: Sequence[str], settings: Settings, progress: Callable[[str], None] = print
) -> Tensor:
    """[len(sources)^2, 3, H, W]: of the word at {}, keys of one source (a row each) and values of another (a column).

    The abstract says that keys and values control different aspects of what is drawn; that this is how the paper shows
    it is our reading. ValueError when two sources have different numbers of tokens.
    """
    images = []
    for keys in sources:
        for values in sources:
            progress(f"keys of {keys!r}, values of {values!r}")
            concept = Concept(keys, keys, dummy=prompt, values_from=values)
            with alignit(pipe, [concept]):
                images.append(_sample(pipe, prompt.replace("{}", keys), settings, settings.seed))
    return torch.cat(images)
