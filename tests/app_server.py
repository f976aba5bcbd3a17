"""The page on a free port, over a tiny base and toy trainings, for the tests that call it and look at it."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from alignkit import concepts, load_base
from alignkit.artifacts import save_lora
from alignkit.base import add_lora
from alignkit.controlnet import new_controlnet, save_controlnet
from app import jobs, page
from tests.tiny import save_tiny_model

ROOT = Path(__file__).parent.parent


def make_world(folder: Path) -> dict[str, str]:
    """Bases by name; beside them the page's folder `runs`, with a concept, a ControlNet for edges and a LoRA."""
    save_tiny_model(folder / "configs")
    base = load_base(str(folder / "configs"), random_init=True)
    base.pipeline().save_pretrained(folder / "tiny")
    runs, generator = folder / "runs", torch.Generator().manual_seed(0)
    concept = concepts.create("neti", base, "<thing>", "hat", hidden_size=8, num_frequencies=8)
    controlnet = new_controlnet(base.unet, base.vae_scale_factor)
    for parameter in [*concept.module.parameters(), *controlnet.parameters()]:
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    concept.save(runs / "neti" / "thing")
    save_controlnet(runs / "controlnetpp" / "edges", controlnet)
    (runs / "neti" / "thing" / jobs.CONFIG).write_text("")
    (runs / "controlnetpp" / "edges" / jobs.CONFIG).write_text("condition:\n  name: canny\n")
    for name, parameter in add_lora(base.unet, 2, 2, ["to_q", "to_k", "to_v"]).items():
        if ".lora_B." in name:
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    run = runs / "alignprop" / "style"
    save_lora(run, base.unet)
    (run / jobs.CONFIG).write_text("max_train_steps: 1\n")
    return {"tiny": str(folder / "tiny")}


def toy_command(path: Path, method: str) -> list[str]:
    script = ROOT / "tests" / "toy_trainer.py"
    return [sys.executable, str(script), "--config", str(path / jobs.CONFIG), "--output_dir", str(path)]


@contextlib.contextmanager
def serving(folder: Path, bases: dict[str, str], queue_size: int = page.QUEUE_SIZE, **options) -> Iterator[str]:
    """The address of the page over `folder`, with toy trainings; all that it changes in this process is put back."""
    from PIL import Image

    before = os.getcwd(), Image.MAX_IMAGE_PIXELS, jobs._command, os.environ.get("GRADIO_TEMP_DIR")
    jobs._command = toy_command
    demo = page.build(folder, bases).queue(max_size=queue_size)
    try:
        _, url, _ = page.launch(demo, folder, prevent_thread_lock=True, quiet=True, **options)
        yield url.rstrip("/")
    finally:
        demo.close()
        for run in jobs.runs(folder):
            if process := jobs.running(folder / run):
                process.kill()
        os.chdir(before[0])
        Image.MAX_IMAGE_PIXELS, jobs._command = before[1:3]
        os.environ.pop("GRADIO_TEMP_DIR")
        if before[3]:
            os.environ["GRADIO_TEMP_DIR"] = before[3]
