"""The loop that trains every part of the emoji world: resumable, seeded by step, with an average of the weights."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WORK_DIR = Path("runs/world")  # optimizer state and logs; the finished weights go to alignkit/emoji/weights


class Batches(torch.utils.data.Dataset):
    """Batch number i is made from a generator seeded by (seed, i) alone, so a resumed run sees the same scenes.

    With `distinct`, so many batches are made and kept, and then come round again: for batches that cost more than a
    step does, where what is drawn for them later (noise, timesteps) differs every time.
    """

    def __init__(self, make_batch: Callable, seed: int, first: int, steps: int, distinct: int | None):
        self.make_batch, self.seed, self.first, self.steps, self.distinct = make_batch, seed, first, steps, distinct
        self.kept = {}

    def __len__(self) -> int:
        return self.steps - self.first

    def __getitem__(self, index: int) -> dict:
        number = self.first + index
        if self.distinct is None:
            return self.make_batch(np.random.default_rng((self.seed, number)))
        number %= self.distinct
        if number not in self.kept:
            self.kept[number] = self.make_batch(np.random.default_rng((self.seed, number)))
        return self.kept[number]


def one_thread(_: int) -> None:
    torch.set_num_threads(1)


def trapezoid(step: int, steps: int, warmup: int = 100, cooldown: float = 0.25) -> float:
    """Learning-rate factor: up over `warmup` steps, flat, then down to zero over the last `cooldown` share."""
    return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / max(1, cooldown * steps)))


def muon_views(model: nn.Module) -> dict[str, nn.Parameter]:
    """The hidden weights as matrices [out, in * kernel] that share their memory, by name.

    Those of linear and convolution layers with both sides of at least 32; not embeddings, vectors, or a narrow output.
    """
    views = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.requires_grad:
            matrix = module.weight.data.view(len(module.weight), -1)
            if min(matrix.shape) >= 32:
                views[f"{name}.weight"] = nn.Parameter(matrix)
    return views


def fit(
    name: str,
    model: nn.Module,
    loss_fn: Callable[[dict, torch.Generator], tuple[Tensor, dict[str, float]]],
    make_batch: Callable[[np.random.Generator], dict],
    save: Callable[[], None],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    muon_learning_rate: float = 2e-3,
    cooldown: float = 0.25,
    weight_decay: float = 1e-2,
    ema_decay: float = 0.999,
    save_every: int = 250,
    distinct_batches: int | None = None,
    workers: int = 1,
) -> None:
    """Train `model` to `steps` and, on the way and at the end, `save()` with its averaged weights in place.

    Run again, it continues from its last checkpoint in runs/world/<name>; with a larger `steps` it trains on.
    `loss_fn(batch, generator)` returns the loss and what to log; it runs under bf16 autocast. Over the last `cooldown`
    share of the steps the learning rates fall to zero.

    Hidden weights learn by Muon (Jordan et al. 2024), scaled to AdamW's step sizes (Liu et al. 2025, eq. 4), the others
    by AdamW with `learning_rate`: the U-Net's loss after 400 steps of AdamW was reached in some 250.
    """
    folder = WORK_DIR / name
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
    matrices = muon_views(model)
    rest = {k: p for k, p in parameters.items() if k not in matrices}
    muon = torch.optim.Muon(
        matrices.values(), lr=muon_learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(rest.values(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    optimized = {k: (muon, p) for k, p in matrices.items()} | {k: (adamw, p) for k, p in rest.items()}
    average = {k: p.detach().clone() for k, p in parameters.items()}
    first = load_checkpoint(folder, parameters, average, optimized)
    if first >= steps:  # done; export again, since it may have been stopped between checkpoint and export
        with averaged(parameters, average):
            save()
        return
    print(
        f"{name}: {sum(p.numel() for p in parameters.values()) / 1e6:.2f} M parameters, step {first} of {steps}",
        flush=True,
    )
    loader = torch.utils.data.DataLoader(
        Batches(make_batch, seed, first, steps, distinct_batches),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=8 if workers else None,
        worker_init_fn=one_thread,
    )
    started = time.monotonic()
    model.train()
    for step, batch in enumerate(loader, start=first):
        for optimizer, peak in ((muon, muon_learning_rate), (adamw, learning_rate)):
            optimizer.param_groups[0]["lr"] = peak * trapezoid(step, steps, cooldown=cooldown)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, logs = loss_fn(batch, torch.Generator().manual_seed(seed * 1_000_003 + step))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{name}: the loss is {loss.item()} at step {step} ({logs}); nothing was saved.")
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for key, matrix in matrices.items():
            matrix.grad = parameters[key].grad.view(matrix.shape)
        muon.step()
        adamw.step()
        decay = min(ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], 1 - decay)
        done = step + 1
        if done % 50 == 0 or done == steps:
            logs = {
                "step": done,
                "loss": loss.item(),
                **logs,
                "seconds": round((time.monotonic() - started) / (done - first), 3),
            }
            with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(logs) + "\n")
            print(name, logs, flush=True)
        if done % save_every == 0 or done == steps:
            save_checkpoint(folder, done, parameters, average, optimized)
            with averaged(parameters, average):
                model.eval()
                save()
                model.train()


class averaged:
    """In this block the parameters hold their average."""

    def __init__(self, parameters: dict[str, Tensor], average: dict[str, Tensor]):
        self.parameters, self.average = parameters, average

    def swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.average[name] = self.average[name], parameter.data

    def __enter__(self) -> None:
        self.swap()

    def __exit__(self, *_: object) -> None:
        self.swap()


def save_checkpoint(folder: Path, step: int, parameters: dict, average: dict, optimized: dict) -> None:
    """Write one file and rename it into place. `optimized`: by name, an optimizer and the tensor that it steps."""
    state = {f"parameter.{k}": p.detach() for k, p in parameters.items()} | {
        f"average.{k}": a for k, a in average.items()
    }
    for key, (optimizer, parameter) in optimized.items():
        state |= {f"optimizer.{key}.{slot}": value for slot, value in optimizer.state[parameter].items()}
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "checkpoint.tmp", metadata={"step": str(step)})
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.safetensors")


def load_checkpoint(folder: Path, parameters: dict, average: dict, optimized: dict) -> int:
    """Restore in place; the number of steps done, 0 where there is no checkpoint."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0
    from safetensors import safe_open

    state = load_file(path)
    for key, parameter in parameters.items():
        parameter.data.copy_(state[f"parameter.{key}"])
        average[key].copy_(state[f"average.{key}"])
    for key, (optimizer, parameter) in optimized.items():
        prefix = f"optimizer.{key}."
        optimizer.state[parameter] = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def to_float(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255


def halves(model: nn.Module) -> nn.Module:
    """A copy in fp16, as the weights are shipped."""
    import copy

    return copy.deepcopy(model).half()
