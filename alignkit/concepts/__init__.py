"""Concepts: a new word for a text-to-image model, learnt from a few images, used in stock diffusers pipelines.

    import alignkit

    with alignkit.concepts.load("runs/thing").applied(pipe, truncation=64):
        pipe("a <thing> on a red background")

A concept is a folder with config.json and its weights: mapper.safetensors (NeTI) or learned_embeds.safetensors (Textual
Inversion, P+). Several are loaded together, `load("runs/thing", "runs/dog")`, for one prompt with all of them.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from alignkit.artifacts import load_json, load_tensors, save_json, save_tensors
from alignkit.attention import text_layers
from alignkit.concepts.mapper import Embeddings, Mapper, Vectors
from alignkit.concepts.text import Tower, encode_contexts, noun_embedding, noun_ids, tokenize, towers
from alignkit.emoji import resolve

__all__ = ["Concept", "Concepts", "Embeddings", "Mapper", "Vectors", "create", "encode_contexts", "load", "tokenize"]

Kind = Literal["neti", "textual_inversion", "p_plus"]
MAPPER_FILE, EMBEDS_FILE = "mapper.safetensors", "learned_embeds.safetensors"
TWO_ENCODERS = ("clip_l", "clip_g")  # keys of SDXL's files, in the order of its text encoders
FORMAT = "alignkit-concept"


@dataclass
class Concept:
    """One learnt word.

    `layers`: the U-Net layers that the module numbers, by name; None when it has one vector for all of them. `norms`:
    of the super-category's embedding in each text encoder, which also tell one base model from another. `alpha`: the
    strength of the bypass. `settings`: of the mapper. `alignit`: it was learnt under AlignIT, and is drawn with it.
    """

    placeholder_token: str
    super_category_token: str
    kind: Kind
    module: Mapper | Embeddings
    widths: list[int]
    layers: list[str] | None = None
    norms: list[float] | None = None
    alpha: float = 0.2
    settings: dict[str, Any] = field(default_factory=dict)
    base_model: str = ""
    alignit: bool = False

    def save(self, folder: str | Path) -> Path:
        """Writes the weights, then config.json. Returns the folder."""
        folder, state = Path(folder), self.module.state_dict()
        if self.kind == "neti":
            save_tensors(state, folder / MAPPER_FILE)
        else:
            save_tensors(self._embeds(state["vectors"]), folder / EMBEDS_FILE)
        names = ("kind", "placeholder_token", "super_category_token", "base_model", "alpha", "alignit")
        config = {"format": FORMAT} | {name: getattr(self, name) for name in names}
        config |= {"layers": self.layers, "widths": self.widths, "norms": self.norms, "settings": self.settings}
        save_json(config, folder / "config.json")
        return folder

    def _embeds(self, vectors: Tensor) -> dict[str, Tensor]:
        """Under the keys that diffusers and others read, as far as they have any: P+ adds the layer's name."""
        if self.kind == "p_plus":
            return {f"{self.placeholder_token}/{name}": v for name, v in zip(self.layers, vectors, strict=True)}
        if len(self.widths) == 1:
            return {self.placeholder_token: vectors[0]}
        parts = vectors[0].split(self.widths, dim=-1)
        return dict(zip(TWO_ENCODERS, parts, strict=True))

    def check(self, pipe: Any) -> None:
        """Raises ValueError where this pipeline (or `Base`) is not what the concept was learnt on."""
        own = towers(pipe)
        _check_placeholder(own, self.placeholder_token)
        widths = [tower.width for tower in own]
        if widths != self.widths:
            raise ValueError(self._other_base(f"text embeddings of {self.widths} numbers", widths))
        layers = text_layers(pipe.unet)
        if self.layers is not None and layers != self.layers:
            raise ValueError(self._other_base(f"{len(self.layers)} layers of text", f"{len(layers)} of other names"))
        norms = noun_norms(own, self.super_category_token)
        if self.norms and any(abs(a / b - 1) > 0.01 for a, b in zip(norms, self.norms, strict=True)):
            raise ValueError(
                self._other_base(f"{self.super_category_token!r} to have the norm {self.norms}", f"{norms}")
            )

    def _other_base(self, expected: str, got: Any) -> str:
        origin = f" ({self.base_model})" if self.base_model else ""
        return (
            f"The concept {self.placeholder_token} was learnt on another base model{origin}: expected {expected}, got "
            f"{got}. Load that base, or train the concept on this one."
        )


@dataclass
class Concepts:
    """Those of one or several files, to be used together."""

    concepts: list[Concept]

    @contextmanager
    def applied(self, pipe: Any, truncation: int | None = None) -> Iterator[Any]:
        """Inside, prompts of the pipeline may contain the placeholders; afterwards it is as it was.

        `truncation`: how many units of a mapper's last hidden layer are kept: few give a concept that is easily edited,
        all of them the most faithful one. Works with the text-to-image, img2img, inpainting and ControlNet pipelines of
        SD 1.x, SD 2.x and SDXL. Whatever reads one text for all layers (a ControlNet, SDXL's pooled text) is given the
        super-category in the placeholder's place.

        Raises ValueError for a concept of another base, a truncation that fits no mapper, and, at the call, for a
        prompt that is longer than the text encoder reads; RuntimeError inside another such block, or one of AlignIT.
        """
        from alignkit.concepts.applied import attached

        names = [concept.placeholder_token for concept in self.concepts]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"Two concepts are called {twice.pop()}: train one of them under another placeholder.")
        check_truncation(self.concepts, truncation)
        for concept in self.concepts:
            concept.check(pipe)
            if concept.alignit:
                warnings.warn(
                    f"{concept.placeholder_token} was learnt under AlignIT and says less without it: draw it inside "
                    "`alignkit.alignit.alignit(pipe, concepts)`, or by `alignkit generate --alignit`.",
                    stacklevel=3,
                )
        with attached(pipe, self.concepts, truncation):
            yield pipe


def create(
    kind: Kind,
    pipe: Any,
    placeholder_token: str,
    super_category_token: str,
    *,
    num_vectors: int = 1,
    rescale: bool = True,
    alpha: float = 0.2,
    seed: int = 0,
    base_model: str = "",
    **mapper: Any,
) -> Concept:
    """A concept before it learns anything: a mapper, or vectors that start as the super-category's embedding.

    `mapper`: settings of `Mapper`. Raises ValueError for a placeholder that is a word already.
    """
    own = towers(pipe)
    _check_placeholder(own, placeholder_token)
    widths, norms = [tower.width for tower in own], noun_norms(own, super_category_token)
    layers = None if kind == "textual_inversion" else text_layers(pipe.unet)
    pieces = max(len(noun_ids(tower, super_category_token)) for tower in own)
    if pieces > 1:
        warnings.warn(
            f"super_category_token: {super_category_token!r} is {pieces} tokens, so their mean is taken; a word of one "
            "token is a better start.",
            stacklevel=2,
        )
    settings = {}
    if kind == "neti":
        if num_vectors != 1:
            raise ValueError(f"num_vectors: a mapper makes one vector, got {num_vectors}.")
        timesteps = pipe.scheduler.config.num_train_timesteps
        module = Mapper(
            len(layers), widths, norms if rescale else None, seed=seed, num_train_timesteps=timesteps, **mapper
        )
        settings = mapper | {"rescale": rescale, "num_train_timesteps": timesteps}
    else:
        means = [noun_embedding(tower, super_category_token).mean(0) for tower in own]
        module = Embeddings(torch.cat(means).repeat(len(layers or [0]), num_vectors, 1))
    return Concept(
        placeholder_token, super_category_token, kind, module, widths, layers, norms, alpha, settings, base_model
    )


def check_truncation(concepts: Sequence[Concept], truncation: int | None) -> None:
    """Raises ValueError for a number of units that a mapper does not have, or where there is no mapper."""
    if truncation is None:
        return
    sizes = [concept.module.hidden_size for concept in concepts if concept.kind == "neti"]
    if not sizes or not 0 <= truncation <= min(sizes):
        expected = f"between 0 and {min(sizes)}" if sizes else "None, as there is no mapper to truncate"
        raise ValueError(f"truncation: expected {expected}, got {truncation}.")


def noun_norms(own: Sequence[Tower], noun: str) -> list[float]:
    """Norm of the super-category's embedding in each text encoder; the mean over its pieces if it has several."""
    return [float(noun_embedding(tower, noun).norm(dim=-1).mean()) for tower in own]


def _check_placeholder(own: Sequence[Tower], placeholder: str) -> None:
    if not placeholder or placeholder != placeholder.strip() or len(placeholder.split()) > 1:
        raise ValueError(f"placeholder_token: expected one word such as <thing>, got {placeholder!r}.")
    for tower in own:
        if len(tower.tokenizer(placeholder, add_special_tokens=False).input_ids) < 2:
            raise ValueError(
                f"placeholder_token: {placeholder!r} is a word of the tokenizer already, which would lose its meaning: "
                f"choose another, such as <{placeholder.strip('<>')}>."
            )


def load(*paths: str | Path, super_category_token: str = "object", placeholder_token: str | None = None) -> Concepts:
    """Concepts of folders that `Concept.save` wrote, or of `learned_embeds.safetensors` files of other tools.

    Such a file does not say what is to stand in the placeholder's place where only one text fits: that is
    `super_category_token`. Files of two text encoders (clip_l, clip_g) do not hold their `placeholder_token` either;
    where there is a file for each (learned_embeds, learned_embeds_2), the first is named here and stands for both.
    Raises ValueError for what is missing, damaged, a pickle, or not a concept.
    """
    if not paths:
        raise ValueError("Expected at least one concept to load, got none.")
    return Concepts([_load(Path(resolve(path)), super_category_token, placeholder_token) for path in paths])


def _load(path: Path, super_category_token: str, placeholder_token: str | None) -> Concept:
    if not path.is_dir():
        return _load_embeds(path, super_category_token, placeholder_token)
    config = load_json(path / "config.json")
    if not isinstance(config, dict) or config.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is not a concept: expected a config.json with format {FORMAT!r}.")
    try:
        module = _load_module(path, config)
        return Concept(module=module.eval().requires_grad_(False), **config)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: the weights and config.json do not fit: {' '.join(str(error).split())}") from error


def _load_module(path: Path, config: dict[str, Any]) -> Mapper | Embeddings:
    if config["kind"] == "neti":
        settings = dict(config["settings"])
        norms = config["norms"] if settings.pop("rescale") else None
        module = Mapper(len(config["layers"]), config["widths"], norms, **settings)
        module.load_state_dict(load_tensors(path / MAPPER_FILE))
        return module
    tensors = load_tensors(path / EMBEDS_FILE)
    if config["kind"] == "p_plus":
        return Embeddings(torch.stack([tensors[f"{config['placeholder_token']}/{name}"] for name in config["layers"]]))
    return Embeddings(_joined(tensors)[None])


def _load_embeds(path: Path, super_category_token: str, placeholder_token: str | None) -> Concept:
    """One vector or several for all layers: {token: [n, D]}; of SDXL two such files, or {clip_l: ..., clip_g: ...}."""
    tensors = load_tensors(path)
    second = path.with_name(path.name.replace("learned_embeds", "learned_embeds_2", 1))  # of diffusers' script
    if len(tensors) == 1 and second != path and second.is_file():
        name, others = next(iter(tensors)), load_tensors(second)
        if set(others) != {name}:
            raise ValueError(f"{second}: expected {name} for SDXL's second text encoder, got {sorted(others)[:5]}.")
        placeholder_token = placeholder_token or name
        tensors = dict(zip(TWO_ENCODERS, (tensors[name], others[name]), strict=True))
    two = set(tensors) == set(TWO_ENCODERS)
    if not two and len(tensors) != 1:
        raise ValueError(
            f"{path}: expected one token's embedding, or clip_l and clip_g, got {sorted(tensors)[:5]}. Of P+, load the "
            "folder."
        )
    if two and placeholder_token is None:
        raise ValueError(f"{path} does not say what its word is: pass placeholder_token.")
    name = placeholder_token or next(iter(tensors))
    module = Embeddings(_joined(tensors)[None]).eval().requires_grad_(False)
    widths = [tensors[key].shape[-1] for key in (TWO_ENCODERS if two else tensors)]
    return Concept(name, super_category_token, "textual_inversion", module, widths)


def _joined(tensors: dict[str, Tensor]) -> Tensor:
    """[n, W], the first text encoder's part in front: a file holds them in alphabetical order."""
    names = TWO_ENCODERS if set(tensors) == set(TWO_ENCODERS) else list(tensors)
    return torch.cat([tensors[name].reshape(-1, tensors[name].shape[-1]) for name in names], dim=-1)
