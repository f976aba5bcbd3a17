"""A training of a second on `Run`, and ways for it to die. Started by the tests, also in processes of its own."""

import multiprocessing
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from alignkit import artifacts
from alignkit.config import RunConfig, free
from alignkit.run import Run


@dataclass
class ToyConfig(RunConfig):
    """Fits a small network to a sine of noise."""

    die: str = free("")
    """Where to be killed: "<step>:<where>", see `train`."""


def toy_config(output_dir, **fields) -> ToyConfig:
    defaults = {
        "max_train_steps": 10,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "use_ema": True,
        "checkpointing_steps": 2,
        "report_to": "none",
    }
    return ToyConfig(output_dir=str(output_dir), **{**defaults, **fields})


def toy_params(width: int = 8) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"layer.weight": (width, 4), "layer.bias": (width,), "head.weight": (1, width)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def toy_loss(run: Run, params, step: int, indices: list[int]) -> torch.Tensor:
    """[b], from noise that depends on the sample alone; dropout draws from the global generator."""
    x = torch.stack([torch.randn(4, generator=run.generator(step, index)) for index in indices])
    hidden = torch.tanh(x @ params["layer.weight"].T + params["layer.bias"])
    return ((hidden @ params["head.weight"].T).squeeze(1) - x.sum(1).sin()).square()


def train(cfg: ToyConfig, params=None, extra_state=None, extra_tensors=None, body=None) -> Run:
    """`body(run, step)` is called after the update of each step."""
    params = params or toy_params()
    run = Run(cfg, "toy")
    run.prepare(params, extra_state, extra_tensors)
    dying_step, _, where = cfg.die.partition(":")
    told = None  # what comes next, in a list
    for step in run.steps():
        dying = where if dying_step == str(step) else ""
        for indices in run.micro_batches(step):
            assert told in (None, [(step, indices)])
            told = [run.following(step, indices)]
            loss = toy_loss(run, params, step, indices)
            run.backward(loss)
            if dying == "backward":
                os.kill(os.getpid(), signal.SIGKILL)
        grad_norm = run.update()
        run.log(step, loss=loss, grad_norm=grad_norm, dropout=torch.rand(()))
        if body:
            body(run, step)
        if dying == "update":
            os.kill(os.getpid(), signal.SIGKILL)
        if dying == "sigterm" and run.accelerator.process_index == run.num_processes - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if dying == "writing":  # every file is written, the folder has not got its name yet
            artifacts._fsync = lambda path: path.name.startswith(".tmp-checkpoint") and os.kill(os.getpid(), 9)
        if dying == "rotating":  # an old checkpoint is half deleted
            shutil.rmtree = lambda path: ((path / "state.json").unlink(), os.kill(os.getpid(), signal.SIGKILL))
    assert told in (None, [None])
    run.finish()
    return run


def _child(cfg: ToyConfig, log: Path) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    train(cfg)


def launch(cfg: ToyConfig) -> tuple[int, str]:
    """Trains in a fresh process that can really be killed. Returns its exit code and what it printed."""
    context = multiprocessing.get_context("forkserver")  # imports torch once for all of them
    context.set_forkserver_preload(["tests.toy"])
    log = Path(cfg.output_dir).with_suffix(".log")
    process = context.Process(target=_child, args=(cfg, log))
    process.start()
    process.join()
    return process.exitcode, log.read_text()
