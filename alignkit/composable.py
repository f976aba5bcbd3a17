"""What makes a stock pipeline class one with `compose`'s parts in its constructor and in its call: pipelines/*.py."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from alignkit.artifacts import LORA_WEIGHTS, PEFT_CONFIG, PEFT_WEIGHTS
from alignkit.composed import Composed, Lora, compose
from alignkit.concepts import EMBEDS_FILE, MAPPER_FILE
from alignkit.customized import CONCEPT, CUSTOM_DIFFUSION_WEIGHTS, lora_file

CONCEPT_PARTS = (CONCEPT, "config.json", MAPPER_FILE, EMBEDS_FILE, LORA_WEIGHTS, PEFT_WEIGHTS, PEFT_CONFIG,
                 CUSTOM_DIFFUSION_WEIGHTS, "unet", "text_encoder")  # fmt: skip


class Composable:
    """Stands before a stock pipeline class among a class's parents.

    The class's constructor calls `_compose` last. It registers what it is given in the pipeline's config, so that
    `save_pretrained` can lay the files beside the model and `from_pretrained` finds them there.
    """

    composed: Composed

    def _stock(self) -> DiffusionPipeline:
        """The stock pipeline over this one's modules."""
        raise NotImplementedError(f"{type(self).__name__} does not define _stock().")

    def _compose(
        self,
        controlnet: Any,
        loras: Mapping[str, Lora] | None,
        concepts: Sequence[Any] | Mapping[str, Any] | None,
    ) -> None:
        """loras and concepts as of `compose`, or as they stand in a saved pipeline's config."""
        loras = {name: lora if isinstance(lora, (tuple, list)) else (lora, 1.0) for name, lora in (loras or {}).items()}
        concepts = list(concepts.values() if isinstance(concepts, Mapping) else concepts or [])
        given = [dict(concept) if isinstance(concept, Mapping) else {"path": concept} for concept in concepts]
        home = self._home()
        loras = {name: (str(_found(path, home)), float(weight)) for name, (path, weight) in loras.items()}
        given = [concept | {"path": str(_found(concept["path"], home))} for concept in given]
        self._composed_controlnet = controlnet
        self.composed = compose(self._stock(), loras=loras, controlnet=controlnet, concepts=given)
        # dicts, since diffusers takes lists in this file for components; None, as it cannot read an empty one
        self.register_to_config(loras=loras or None, concepts={str(i): one for i, one in enumerate(given)} or None)

    def _home(self) -> Path | None:
        """The folder that this pipeline is loaded from, which only its modules know while it is made."""
        for part in (self.vae, self.unet):
            folder = Path(part.config.get("_name_or_path") or "").parent
            if (folder / "model_index.json").is_file():
                return folder
        return None

    def __call__(self, prompt: str | Sequence[str] | None = None, **options: Any) -> Any:
        """As of `Composed`."""
        own = {name: part for name, part in self.components.items() if name != "controlnet"}
        self.composed.follow(own, getattr(self, "_progress_bar_config", {}))
        net = self.components.get("controlnet")
        if net is not self._composed_controlnet:
            if net is None or self._composed_controlnet is None:
                raise ValueError(
                    "controlnet: expected one where the pipeline was made with one: make another pipeline."
                )
            self.composed.pipe.controlnet = self._composed_controlnet = net
        try:
            return self.composed(prompt, **options)
        finally:
            self.maybe_free_model_hooks()

    def to(self, *args: Any, **kwargs: Any) -> "Composable":
        """As the stock class's, with DreamBooth's networks, which are beside the base's."""
        super().to(*args, **kwargs)
        self.composed.to(*args, **kwargs)
        return self

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """As the stock class's. ValueError for parts that do not come along."""
        self.composed.check_offload("model")
        super().enable_model_cpu_offload(*args, **kwargs)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """As the stock class's. ValueError for parts that do not come along."""
        self.composed.check_offload("sequential")
        super().enable_sequential_cpu_offload(*args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Saves base, ControlNet, LoRAs and concepts; `from_pretrained` of the folder draws the same.

        Stock pipelines read the base from it, as they would from any folder. ValueError when a file that was loaded is
        not there any more.
        """
        folder, loras, concepts = Path(save_directory), self.config["loras"] or {}, self.config["concepts"] or {}
        files = [path for path, _ in loras.values()] + [concept["path"] for concept in concepts.values()]
        gone = [file for file in files if not Path(file).exists()]
        if gone:
            raise ValueError(f"{gone[0]} is not there any more, so it cannot be saved with the pipeline.")
        for name, (path, _) in loras.items():
            file, target = lora_file(path), folder / "loras" / name
            _copy(file, target / (PEFT_WEIGHTS if file.name == PEFT_WEIGHTS else LORA_WEIGHTS))
            if file.name == PEFT_WEIGHTS:
                _copy(file.with_name(PEFT_CONFIG), target / PEFT_CONFIG)
        for number, concept in concepts.items():
            path, target = Path(concept["path"]), folder / "concepts" / number
            if path.is_dir():
                for part in CONCEPT_PARTS:
                    _copy(path / part, target / part)
            else:  # with what is read beside it
                for part in (path.name, PEFT_CONFIG, EMBEDS_FILE):
                    _copy(path.with_name(part), target / part)
        saved = {
            "loras": {name: [f"loras/{name}", weight] for name, (_, weight) in loras.items()},
            "concepts": {
                number: concept
                | {"path": f"concepts/{number}" + ("" if (path := Path(concept["path"])).is_dir() else f"/{path.name}")}
                for number, concept in concepts.items()
            },
        }
        saved = {name: parts or None for name, parts in saved.items()}
        controlnet = self.controlnet
        self.composed.unload()  # a network with adapters in it cannot be saved
        try:
            self.register_to_config(**saved)
            super().save_pretrained(save_directory, **options)
        finally:
            self._compose(controlnet, loras, concepts)


def _found(path: str | Path, home: Path | None) -> Path:
    return home / path if home is not None and (home / path).exists() else Path(path)


def _copy(source: Path, target: Path) -> None:
    if not source.exists() or (target.exists() and source.samefile(target)):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)
