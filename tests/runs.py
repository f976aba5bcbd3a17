"""Runs of trainers: the configs that several tests make, and what a run left behind."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from alignkit.artifacts import read_events


def tuning_configs(cls: type, model: str, folder: Path, **own) -> Callable:
    """Makes configs of a trainer that tunes a LoRA by a reward: 4 updates of 4 images, 2 at once, on five prompts."""
    prompt_file = folder / "prompts.txt"
    prompt_file.write_text("a cat\na dog\na red fox\na bus\na star\n")
    shared = {
        "pretrained_model_name_or_path": model,
        "random_init": True,
        "prompt_file": str(prompt_file),
        "guidance_scale": 3.0,
        "max_train_steps": 4,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "validation_steps": 0,
        "checkpointing_steps": 100,
        "report_to": "none",
    }

    def make(name: str = "run", **fields):
        return cls(output_dir=str(folder / name), **{**shared, **own, **fields})

    return make


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All that the artifact holds, by "<file>/<key>"; checkpoints are left out."""
    files = [path for path in folder.rglob("*.safetensors") if "checkpoint-" not in str(path.relative_to(folder))]
    return {f"{file.relative_to(folder)}/{key}": value for file in files for key, value in load_file(file).items()}


def assert_close(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor], tolerance: float = 0.0) -> None:
    """The same names, and the same numbers up to the tolerance; and not all of them are 0."""
    assert one.keys() == two.keys() and any(tensor.any() for tensor in one.values())
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def assert_same(one: Path, two: Path, tolerance: float = 0.0) -> None:
    """`assert_close` of what two runs left."""
    assert_close(tensors_of(one), tensors_of(two), tolerance)


def scalars(folder: Path) -> list[dict]:
    """What was logged, step by step."""
    return [event for event in read_events(folder / "events.jsonl") if event["type"] == "scalars"]


def reproducible(folder: Path) -> list[dict]:
    """`scalars` without what differs between two runs that are the same."""
    changing = ("time", "images_per_second", "memory_gib")
    return [{key: value for key, value in event.items() if key not in changing} for event in scalars(folder)]
