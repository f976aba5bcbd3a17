"""Run: everything about a training that a paper would not mention. The only file that knows accelerate.

    run = Run(cfg, "alignprop")
    base = run.load_base()
    run.prepare(params)                             # optimizer, EMA; resumes the newest checkpoint of cfg.output_dir
    for step in run.steps():
        for indices in run.micro_batches(step):     # global sample indices: this process's share of the global batch
            run.backward(loss(indices))             # one loss per sample [b]
        grad_norm = run.update()
        run.log(step, grad_norm=grad_norm)
    run.finish()

The loop stays in the method's file; these are its verbs. Randomness comes from (seed, step, sample index) alone, never
from a process's rank or an accumulation index: so a resumed run equals an uninterrupted one (bit for bit on the CPU),
and several processes equal one on the same global batch.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, LoggerType, broadcast, set_seed
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from alignkit import config, plan
from alignkit.artifacts import (
    atomic,
    check_hub_login,
    contents_digest,
    load_json,
    load_tensors,
    push_to_hub,
    read_events,
    remove,
    save_json,
    save_tensors,
    sha256,
)
from alignkit.attention import use_plain_attention
from alignkit.base import Base, load_base
from alignkit.config import RunConfig
from alignkit.optimizers import check_optimizer, make_optimizer

# Unless told otherwise, MKL rounds by where a tensor lies in memory, on some CPUs: no two runs would be the same to the
# bit. It asks at its first product.
os.environ.setdefault("MKL_CBWR", "AUTO")

try:
    import fcntl
except ImportError:  # Windows: two processes in one output_dir go unnoticed there
    fcntl = None

DRY_RUN_STEPS = 2  # the first warms up, the second is measured
MIN_LOSS_SCALE = 2.0**-10  # fp16: a scale that falls below this is not going to recover
# What is learnt from, as the trainers' configs name it.
DATA = ("prompt_file", "train_data_dir", "instance_data_dir", "class_data_dir")
# What the main process does alone, such as drawing images of a class, may outlast the ten minutes that NCCL waits.
PATIENCE = timedelta(hours=12)


def lr_factor(step: int, lr_scheduler: str, lr_warmup_steps: int, max_train_steps: int) -> float:
    """What the peak learning rate is multiplied by at update `step` (0-based), as in `diffusers.optimization`.

    "constant" has no warm-up; the others rise linearly from 0 over `lr_warmup_steps`, then stay
    ("constant_with_warmup"), fall linearly to 0 ("linear"), or by half a cosine ("cosine").
    """
    if lr_scheduler == "constant":
        return 1.0
    if step < lr_warmup_steps:
        return step / lr_warmup_steps
    progress = min(1.0, (step - lr_warmup_steps) / max(1, max_train_steps - lr_warmup_steps))
    return {
        "constant_with_warmup": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[lr_scheduler]


def _has_accelerator() -> bool:
    """But for Apple's, which has no float64, as noise schedules and metrics are: the CPU takes its place."""
    return torch.accelerator.is_available() and torch.accelerator.current_accelerator().type != "mps"


def _refuse_sharding() -> None:
    """ValueError where `accelerate launch` was told to cut models into pieces."""
    for name, variable in (("FSDP", "FSDP"), ("DeepSpeed", "DEEPSPEED"), ("Megatron-LM", "MEGATRON_LM")):
        if os.environ.get(f"ACCELERATE_USE_{variable}", "false").lower() in ("true", "1", "yes"):
            raise ValueError(
                f"{name} is not supported: every process holds the whole model, and Run adds up the gradients itself. "
                "Launch with `torchrun --nproc_per_node N`, or `accelerate launch --multi_gpu`; to save memory, take "
                "mixed_precision bf16, a smaller train_batch_size with more gradient_accumulation_steps, or a LoRA"
            )


class Run:
    """One training run in one folder, on one process or several (`torchrun`, `accelerate launch`).

    Attributes: device; weight_dtype (for the frozen parts); is_main; num_processes; global_batch (images per update,
    over all processes); position (updates done so far).

    Raises ValueError when `cfg.output_dir` holds a run with another config (its checkpoint, or what it made), naming
    the fields, or a damaged checkpoint; BlockingIOError when another process is training there.
    """

    def __init__(self, cfg: RunConfig, name: str = "alignkit"):
        self.cfg, self.name = cfg, name
        self.output_dir = Path(cfg.output_dir)
        self._events = self.output_dir / "events.jsonl"
        trackers = [str(name) for name in LoggerType]
        if cfg.report_to not in (*trackers, "none"):
            raise ValueError(f"report_to: expected one of {', '.join(trackers)} or none, got {cfg.report_to!r}")
        _refuse_sharding()
        self.accelerator = Accelerator(
            cpu=not _has_accelerator(),  # else two CPU ranks of torchrun are strangers to accelerate
            mixed_precision="no",  # frozen parts are cast to weight_dtype, trained ones are float32: no autocast
            log_with=None if cfg.report_to == "none" or cfg.dry_run else cfg.report_to,
            project_dir=self.output_dir,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        self.device = torch.device("meta") if cfg.estimate != "no" else self.accelerator.device
        self.device_type = self.device.type if cfg.estimate == "no" else cfg.estimate
        check_optimizer(cfg.optimizer)
        self.is_main = self.accelerator.is_main_process
        self.num_processes = self.accelerator.num_processes
        self.weight_dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.mixed_precision]
        self.global_batch = cfg.train_batch_size * cfg.gradient_accumulation_steps * self.num_processes
        self.position = 0
        self.bytes_elsewhere = 0  # of weights that wait in the CPU's memory
        self._first_validation = 0.0
        self._writes = self.is_main and not cfg.dry_run
        if self._writes and cfg.push_to_hub:
            check_hub_login()
        self._signal = 0
        self._orders: dict[str, tuple[tuple[int, int], Tensor]] = {}
        self._seed("start")

        checkpoints = [] if cfg.dry_run else self._checkpoints()
        self._saved = self._read(checkpoints[-1]) if checkpoints else None  # here, to fail before any work
        if not checkpoints and not cfg.dry_run:
            self._refuse_other_artifact()
        self.accelerator.wait_for_everyone()  # every process has read before the first one writes
        if self.is_main:
            print(config.to_yaml(cfg), end="", flush=True)
        if self._writes:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self._lock_output_dir()
            for leftover in self.output_dir.glob(".tmp-*"):  # of a process that was killed while writing
                remove(leftover)
            with atomic(self.output_dir / "config.yaml") as temporary:
                config.save(cfg, temporary)
            if cfg.report_to != "none" and not self.accelerator.log_with:
                print(f"report_to: {cfg.report_to} is not installed; going on with events.jsonl alone", flush=True)

    # Setting up

    def load_base(self, hooked: bool = False, **options: Any) -> Base:
        """The config's base model, frozen, on this process's device and in `weight_dtype`.

        `hooked` as `speed_up`; `options` as `alignkit.base.load_base`'s.
        """
        cfg = self.cfg
        base = load_base(
            cfg.pretrained_model_name_or_path,
            dtype=self.weight_dtype,
            device=self.device,
            config=cfg.base_config,
            random_init=cfg.random_init,
            shrink=cfg.shrink,
            quantization=cfg.quantization,
            **options,
        )
        if base.offload_text_encoders and self.device_type != "cpu":
            encoders = [part for name, part in base.pipe.components.items() if name.startswith("text_encoder")]
            self.bytes_elsewhere = sum(p.nbytes for part in encoders if part is not None for p in part.parameters())
        self.speed_up(base.network, hooked)
        return base

    def speed_up(self, network: nn.Module, hooked: bool = False) -> None:
        """What makes a network faster here: the attention that suits the device, and torch.compile if the config asks.

        It is compiled in place, at its first call of each kind, so parameters keep their names, and a LoRA may still be
        added. `hooked`: hooks on its outer modules will come and go, as a context bank's do, which a graph of the whole
        network would not see; its transformer blocks are compiled then. A prediction (`estimate`) is of the plain one.
        """
        use_plain_attention(network, self.device_type)
        if self.cfg.torch_compile == "no" or self.cfg.estimate != "no":
            return
        compile_in_place = network.compile_repeated_blocks if hooked else network.compile
        compile_in_place(backend=self.cfg.torch_compile)

    def prepare(
        self,
        params: Mapping[str, nn.Parameter],
        extra_state: MutableMapping[str, Any] | None = None,
        extra_tensors: MutableMapping[str, Tensor] | None = None,
    ) -> None:
        """Makes the optimizer (and EMA) over the named float32 parameters, and restores the newest checkpoint, if any.

        `extra_state`, in JSON types, and `extra_tensors`, on the CPU, are the method's own: saved with each checkpoint,
        updated in place here.
        """
        cfg = self.cfg
        wrong = [n for n, p in params.items() if p.dtype != torch.float32 or not p.requires_grad]
        if wrong or not params:
            raise ValueError(f"expected parameters in float32 that require a gradient, got {wrong or 'none at all'}")
        self.params = dict(params)
        self.extra_state = {} if extra_state is None else extra_state
        self.extra_tensors = {} if extra_tensors is None else extra_tensors
        for parameter in self.params.values():
            parameter.grad = torch.zeros_like(parameter)  # never None: each process then reduces the same buffer
            if self.num_processes > 1:
                parameter.data.copy_(broadcast(parameter.data))
        self.optimizer = make_optimizer(cfg, list(self.params.values()))
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=cfg.mixed_precision == "fp16" and cfg.estimate == "no"
        )
        self.ema = {n: p.detach().clone() for n, p in self.params.items()} if cfg.use_ema else {}

        if self._saved:
            self._restore(*self._saved)
            self._saved = None
        if cfg.estimate == "no":
            self._refuse_other_positions()
        if self._writes:
            self._open_logs()
        self._event(
            "start",
            self.position,
            name=self.name,
            max_train_steps=cfg.max_train_steps,
            global_batch=self.global_batch,
            num_processes=self.num_processes,
            trained_parameters=sum(p.numel() for p in self.params.values()),
        )
        plan.begin("validate")

    def _checkpoints(self) -> list[Path]:
        """Oldest first. Each is complete, since it got its name only when it was."""
        found = [path for path in self.output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def _identity(self) -> dict[str, Any]:
        """What must be the same when a run is resumed."""
        return self._bound(config.to_dict(self.cfg)) | {"global_batch": self.global_batch} | self._data

    @functools.cached_property
    def _data(self) -> dict[str, str]:
        places = {name: getattr(self.cfg, name, None) for name in DATA}
        return {
            f"contents of {name}": contents_digest(place, without=self.output_dir)[:12]
            for name, place in places.items()
            if place and Path(place).exists()
        }

    def _bound(self, fields: dict[str, Any]) -> dict[str, Any]:
        free = config.free_fields(self.cfg)
        return {name: value for name, value in fields.items() if name not in free}

    def _refuse_other_artifact(self) -> None:
        """ValueError where another config's run has ended in this folder and its checkpoints are gone, or never came.

        What a run left that made nothing, not even a card, may be written over.
        """
        config_file, card = self.output_dir / "config.yaml", self.output_dir / "README.md"
        if config_file.is_file() and card.is_file():
            saved = self._bound(yaml.safe_load(config_file.read_text(encoding="utf-8")) or {})
            self._refuse_other_config("finished", saved, self._bound(config.to_dict(self.cfg)))

    def _refuse_other_config(self, which: str, saved: dict[str, Any], current: dict[str, Any]) -> None:
        changed = config.differences(saved, current)
        there, now = changed.get("max_train_steps", (0, 0))
        if there < now:  # a run may be prolonged
            del changed["max_train_steps"]
        if changed:
            lines = "".join(f"\n  {key}: {there} there, {now} now" for key, (there, now) in changed.items())
            raise ValueError(
                f"{self.output_dir} holds a run ({which}) with another config:{lines}\n"
                "Resume it with its own values, or choose another output_dir."
            )

    def _refuse_other_positions(self) -> None:
        """ValueError, in all processes, where they found different checkpoints: they would add up strange gradients."""
        found = self.gather(torch.tensor([self.position], device=self.device)).tolist()
        if len(set(found)) > 1:
            raise ValueError(
                f"{self.output_dir}: the processes found checkpoints of different steps, {found}. Give all machines "
                "the same folder, on a file system that they share."
            )

    def _lock_output_dir(self) -> None:
        self._lock = os.open(self.output_dir / ".lock", os.O_RDWR | os.O_CREAT)  # held until the process ends
        if fcntl:
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                message = f"another process is training in {self.output_dir}: wait for it or stop it"
                raise BlockingIOError(error.errno, message) from error

    def _open_logs(self) -> None:
        """Starts events.jsonl and the tracker; what a killed run logged after its last checkpoint is done again."""
        kept = [json.dumps(event) + "\n" for event in read_events(self._events) if event["step"] < self.position]
        with atomic(self._events) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
        self.accelerator.init_trackers(
            self.name,
            init_kwargs={
                "tensorboard": {"purge_step": self.position},
                "wandb": {"config": config.to_dict(self.cfg)},
            },
        )

    @contextlib.contextmanager
    def first_validation(self) -> Iterator[None]:
        """Around a validation before the first step: a dry run takes its time for the others', which it leaves out."""
        started = time.perf_counter()
        yield
        self._first_validation = time.perf_counter() - started

    # The loop

    def steps(self) -> Iterator[int]:
        """The steps that are left, 0-based. Checkpoints between them; SIGINT and SIGTERM save and exit (130, 143)."""
        end = self._end
        bar = tqdm(initial=self.position, total=end, desc=self.name, disable=not self.is_main, dynamic_ncols=True)
        self._bar, self._logged = bar, (self.position - 1, time.perf_counter())
        with bar, self._signals():
            for step in range(self.position, end):
                self._updated, self._indices = False, []
                self._seed(step)
                self._started = time.perf_counter()
                plan.begin("train")
                yield step
                if not self._updated:
                    raise RuntimeError(f"step {step} ended without run.update()")
                self.position = step + 1
                bar.update()
                stopped_by = int(self.gather(torch.tensor([self._signal], device=self.accelerator.device)).max())
                if not self.cfg.dry_run and (stopped_by or self.every(self.cfg.checkpointing_steps, step)):
                    self._save()
                if stopped_by:
                    self._stop(stopped_by)
        if self.cfg.dry_run:
            self._report_dry_run()

    @property
    def _end(self) -> int:
        return min(DRY_RUN_STEPS, self.cfg.max_train_steps) if self.cfg.dry_run else self.cfg.max_train_steps

    @property
    def _half(self) -> str:
        return "\nfloat16 ends at 65,504: try mixed_precision bf16" if self.cfg.mixed_precision == "fp16" else ""

    def require_finite(self, images: Tensor, what: str) -> None:
        """FloatingPointError where one of the images [N, ...] is not; `what` they are in words."""
        bad = [i for i, image in enumerate(images) if not image.isfinite().all()]
        if bad:
            self._fail(f"{what} {bad} of {len(images)} are not finite after {self.position} steps{self._half}")

    def micro_batches(self, step: int) -> Iterator[list[int]]:
        """Global sample indices of this process's micro-batches.

        Step `s` covers [s * global_batch, (s + 1) * global_batch), cut contiguously by process, then by accumulation.
        """
        for start in self._starts(step):
            self._indices = list(range(start, start + self.cfg.train_batch_size))
            self._seed(step, start)  # for what draws from the global generators, such as dropout
            yield self._indices

    def _starts(self, step: int) -> range:
        size, count = self.cfg.train_batch_size, self.cfg.gradient_accumulation_steps
        first = step * self.global_batch + self.accelerator.process_index * size * count
        return range(first, first + size * (count if self.cfg.estimate == "no" else 1), size)

    def following(self, step: int, indices: Sequence[int]) -> tuple[int, list[int]] | None:
        """Step and indices of the micro-batch behind this one, for who reads ahead; None behind the run's last."""
        start = indices[-1] + 1
        if start not in self._starts(step):
            step += 1
            start = self._starts(step).start
        return (step, list(range(start, start + self.cfg.train_batch_size))) if step < self._end else None

    def backward(self, loss: Tensor, **parts: Tensor) -> None:
        """Adds the gradient of sum(loss) / global_batch. `loss` [b]: one per sample of the current micro-batch.

        FloatingPointError when it is not finite, naming the step, the samples and the `parts` [b]; nothing is saved.
        """
        if loss.shape != (len(self._indices),):
            raise ValueError(f"expected one loss per sample, [{len(self._indices)}], got {list(loss.shape)}")
        bad = (~torch.isfinite(loss)).nonzero().flatten().tolist()
        if bad:
            values = {"loss": loss, **parts}
            table = "".join(f"\n  {name}: {tensor.detach().tolist()}" for name, tensor in values.items())
            self._fail(
                f"the loss is not finite at step {self.position}, samples {[self._indices[i] for i in bad]} "
                f"of {self._indices}:{table}" + self._half
            )
        self.scaler.scale(loss.float().sum() / self.global_batch).backward()

    def update(self) -> float:
        """Sums the gradients over processes, clips, steps the optimizer, updates the EMA, clears the gradients.

        Returns the gradient's norm before clipping. A norm that is not finite skips the update in fp16, where the loss
        scale was too high, and raises FloatingPointError otherwise.
        """
        if self._updated:
            raise RuntimeError(f"a second run.update() in step {self.position}: it belongs after the micro-batches")
        cfg, params = self.cfg, list(self.params.values())
        if self.num_processes > 1:
            flat = self.accelerator.reduce(torch.cat([p.grad.flatten() for p in params]), "sum")
            for parameter, grad in zip(params, flat.split([p.numel() for p in params]), strict=True):
                parameter.grad.copy_(grad.view_as(parameter))
            del flat, grad  # before the optimizer needs room
        self.scaler.unscale_(self.optimizer)
        grad_norm = float(nn.utils.clip_grad_norm_(params, cfg.max_grad_norm))
        finite = math.isfinite(grad_norm)
        if not finite and not self.scaler.is_enabled():
            self._fail(f"the gradient is not finite at step {self.position} (norm {grad_norm}), though the loss was")
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if not finite:
            self._event("skipped", self.position, loss_scale=self.scaler.get_scale())
            if self.scaler.get_scale() < MIN_LOSS_SCALE:
                self._fail(f"fp16 gradients still overflow at step {self.position}, at the lowest loss scale: try bf16")
        elif self.ema:
            decay = min(cfg.ema_decay, (1 + self.position) / (10 + self.position))
            for name, average in self.ema.items():
                average.lerp_(self.params[name].detach(), 1 - decay)
        self.optimizer.zero_grad(set_to_none=False)
        self._updated = True
        self._updated_at = time.perf_counter()
        plan.begin("validate")
        return grad_norm

    @property
    def learning_rate(self) -> float:
        """Of the current step."""
        cfg = self.cfg
        factor = lr_factor(self.position, cfg.lr_scheduler, cfg.lr_warmup_steps, cfg.max_train_steps)
        return cfg.learning_rate * factor

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the parameters hold their EMA (if there is one); afterwards they are back, bit for bit."""
        with self.holding(self.ema):
            yield

    @contextlib.contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the parameters hold these values, by their names; afterwards they are back, bit for bit."""
        trained = {name: self.params[name].detach().clone() for name in values}
        self._set_params(values)
        try:
            yield
        finally:
            self._set_params(trained)

    @torch.no_grad()
    def _set_params(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.params[name].copy_(value)

    def every(self, n: int, step: int) -> bool:
        """True at the end of every `n` steps and at the last step, that of a dry run too; never if n = 0."""
        return n > 0 and ((step + 1) % n == 0 or step + 1 == self._end)

    def generator(self, step: int, index: int | None = None, tag: str = "") -> torch.Generator:
        """A CPU generator seeded by (seed, step, index, tag), so that each use of randomness has its own stream."""
        return torch.Generator().manual_seed(self._hash(step, index, tag))

    def permutation(self, size: int, epoch: int, tag: str) -> Tensor:
        """[size]: the numbers below `size` in the order of an epoch, of (seed, epoch, tag) alone."""
        if self._orders.get(tag, (None,))[0] != (size, epoch):  # the latest is kept, since all samples ask for it
            order = torch.randperm(size, generator=self.generator(epoch, tag=tag))
            self._orders[tag] = ((size, epoch), order)
        return self._orders[tag][1]

    def shuffled(self, size: int, n: int, tag: str) -> int:
        """The n-th of an endless row that holds each number below `size` once an epoch, in a seeded order."""
        epoch, position = divmod(n, size)
        return int(self.permutation(size, epoch, tag)[position])

    def _hash(self, *key: Any) -> int:
        digest = hashlib.sha256(json.dumps([self.cfg.seed, *key]).encode()).digest()
        return int.from_bytes(digest[:4], "little")  # 32 bits: what numpy, and torch's generator on the CPU, can use

    def _seed(self, *key: Any) -> None:
        set_seed(self._hash("global", *key))

    def gather(self, tensor: Tensor) -> Tensor:
        """[n, ...] of each process -> [num_processes * n, ...], in the order of the processes, on all of them.

        A tensor on the CPU goes where the processes speak to each other, and in a plan keeps its numbers.
        """
        return self.accelerator.gather(tensor if tensor.is_meta else tensor.to(self.accelerator.device))

    # Showing

    def log(self, step: int, **scalars: float | Tensor) -> None:
        """Writes the mean of each value (over its elements, then over processes) to events.jsonl and the tracker.

        Every logging_steps, and where a validation is due; with the learning rate, images per second and memory.
        Call it on every process, several times in a step if need be.
        """
        if not (self.every(self.cfg.logging_steps, step) or self.every(self.cfg.validation_steps, step)):
            return
        means = [torch.as_tensor(x, dtype=torch.float64, device="cpu").detach().mean() for x in scalars.values()]
        if self.num_processes > 1:
            means = self.accelerator.reduce(torch.stack(means).to(self.device), "mean")
        values = dict(zip(scalars, map(float, means), strict=True))
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()})
        last, since = self._logged
        if step > last:
            now = time.perf_counter()
            self._logged = (step, now)
            values |= {
                "learning_rate": self.learning_rate,
                "images_per_second": (step - last) * self.global_batch / (now - since),
                "memory_gib": self._memory(),
            }
        self._event("scalars", step, **{k: v if math.isfinite(v) else None for k, v in values.items()})
        self.accelerator.log({name: value for name, value in values.items() if math.isfinite(value)}, step=step)

    def show(self, step: int, name: str, images: Tensor, captions: Sequence[str] | None = None) -> None:
        """Writes images [N, 3, H, W] in [0, 1] of the main process as a grid, samples/<step>_<name>.png."""
        if images.ndim != 4 or images.shape[1] != 3 or not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(
                f"expected images [N, 3, H, W] in [0, 1], got {list(images.shape)} "
                f"in [{images.min():.3g}, {images.max():.3g}]"
            )
        if not self._writes:
            return
        array = (images.detach().float().permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
        columns = math.ceil(math.sqrt(len(array)))
        rows = math.ceil(len(array) / columns)
        pictures = [Image.fromarray(picture) for picture in array]
        blank = Image.new("RGB", pictures[0].size, "white")
        path = self.output_dir / "samples" / f"{step:06d}_{name}.png"
        with atomic(path) as temporary:
            make_image_grid(pictures + [blank] * (rows * columns - len(pictures)), rows, columns).save(temporary, "PNG")
        self._event(
            "images",
            step,
            name=name,
            path=path.relative_to(self.output_dir).as_posix(),
            columns=columns,
            captions=list(captions or []),
        )
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: array}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: pictures}, step=step)

    def _memory(self) -> float:
        """GiB: the peak on a GPU, what the process holds now on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return psutil.Process().memory_info().rss / 2**30

    def _event(self, kind: str, step: int, **fields: Any) -> None:
        if self._writes:
            with open(self._events, "a", encoding="utf-8") as file:
                file.write(json.dumps({"type": kind, "step": step, "time": time.time(), **fields}) + "\n")

    # Saving and ending

    def _save(self) -> None:
        """Publishes checkpoint-<position>, then deletes the oldest ones. Written by the main process alone."""
        path = self.output_dir / f"checkpoint-{self.position}"
        if self.is_main:
            moments, scalars = self._optimizer_state()
            with atomic(path) as temporary:
                temporary.mkdir()
                files = {"trainable": self.params, "ema": self.ema, "optimizer": moments, "extra": self.extra_tensors}
                for file, tensors in files.items():
                    save_tensors(tensors, temporary / f"{file}.safetensors")
                state = {
                    "step": self.position,
                    "config": self._identity(),
                    "scaler": self.scaler.state_dict(),
                    "optimizer": scalars,
                    "extra_state": dict(self.extra_state),
                    "sha256": {file.name: sha256(file) for file in temporary.glob("*.safetensors")},
                }
                save_json(state, temporary / "state.json")
            self._event("checkpoint", self.position - 1, path=path.name)
            if self.cfg.checkpoints_total_limit:
                for old in self._checkpoints()[: -self.cfg.checkpoints_total_limit]:
                    remove(old)
        self.accelerator.wait_for_everyone()

    def _optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """By "<parameter>/<entry>" and "group/<entry>": tensors, and the numbers that some keep beside them."""
        holders = {name: self.optimizer.state[parameter] for name, parameter in self.params.items()}
        holders["group"] = self.optimizer.param_groups[0]
        entries = {f"{name}/{key}": value for name, held in holders.items() for key, value in held.items()}
        tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
        # a bound that is infinite is the optimizer's own setting, and JSON has no word for it
        numbers = {key: v for key, v in entries.items() if type(v) in (int, float) and math.isfinite(v)}
        return tensors, numbers

    def _read(self, checkpoint: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """Its state.json and its tensors by file. ValueError when damaged, or of a run with another config."""
        try:
            state, tensors = load_json(checkpoint / "state.json"), {}
            for file, digest in state["sha256"].items():
                tensors[file.removesuffix(".safetensors")] = load_tensors(checkpoint / file)
                if sha256(checkpoint / file) != digest:
                    raise ValueError(f"{checkpoint / file} is damaged: its checksum is not the one in state.json")
        except ValueError as error:
            raise ValueError(f"{error}\nRemove {checkpoint} to resume from the checkpoint before it.") from error
        self._refuse_other_config(checkpoint.name, state["config"], self._identity())
        return state, tensors

    def _restore(self, state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
        there = {name: list(tensor.shape) for name, tensor in tensors["trainable"].items()}
        differing = config.differences(there, {name: list(p.shape) for name, p in self.params.items()})
        if differing:
            name, (there, now) = next(iter(differing.items()))
            raise ValueError(
                f"{self.output_dir} holds a run that trains other parameters: {len(differing)} differ, "
                f"such as {name}: {there} there, {now} now"
            )
        self._set_params(tensors["trainable"])
        for name, average in self.ema.items():
            average.copy_(tensors["ema"][name])
        holders = {name: self.optimizer.state[parameter] for name, parameter in self.params.items()}
        holders["group"] = self.optimizer.param_groups[0]
        for key, value in (tensors["optimizer"] | state["optimizer"]).items():
            name, _, entry = key.rpartition("/")
            if isinstance(value, Tensor):
                # AdamW keeps its step count on the CPU; the clone owns its memory instead of mapping the file.
                device = "cpu" if entry == "step" else self.device
                value = value.clone().to(device)
            holders[name][entry] = value
        self.scaler.load_state_dict(state["scaler"])
        self.extra_state.update(state["extra_state"])
        self.extra_tensors.update({name: tensor.clone() for name, tensor in tensors["extra"].items()})
        self.position = state["step"]
        if self.is_main:
            print(f"resuming {self.output_dir} at step {self.position}", flush=True)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the current step; a second Ctrl-C interrupts at once."""
        first = None

        def note(number, frame):
            nonlocal first
            # torchrun may pass on a Ctrl-C that the terminal has sent already: a human's second one comes later.
            if first and number == signal.SIGINT and time.monotonic() - first > 1:
                raise KeyboardInterrupt
            if not first and self.is_main:
                print("\nstopping after this step (Ctrl-C again stops at once)", file=sys.stderr, flush=True)
            first = first or time.monotonic()
            self._signal = number

        try:
            before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: signals are not ours to handle
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int) -> None:
        self._event("stop", self.position - 1, signal=number)
        if self.is_main and not self.cfg.dry_run:
            print(
                f"stopped after {self.position} of {self.cfg.max_train_steps} steps and saved "
                f"{self.output_dir / f'checkpoint-{self.position}'}. Run the same command again to resume.",
                file=sys.stderr,
                flush=True,
            )
        self._close()
        raise SystemExit(128 + number)

    def _fail(self, message: str) -> NoReturn:
        newest = [path.name for path in self._checkpoints()[-1:]] or ["there is none yet"]
        message += f"\nNothing of this step was saved; newest checkpoint: {newest[0]}."
        self._event("error", self.position, message=message)
        raise FloatingPointError(message)

    def _report_dry_run(self) -> None:
        cfg = self.cfg
        update = self._updated_at - self._started
        validation = self._first_validation + time.perf_counter() - self._updated_at
        validations = int(self._first_validation > 0)
        if cfg.validation_steps:
            validations += math.ceil(cfg.max_train_steps / cfg.validation_steps)
        hours = (cfg.max_train_steps * update + validations * validation) / 3600
        if cfg.estimate != "no":
            print(plan.report(self, plan.Ledger.active), flush=True)
        elif self.is_main:
            print(
                f"dry run: {update:.2f} s a step, {validation:.2f} s a validation, {hours:.2f} h for "
                f"{cfg.max_train_steps} steps and {validations} validations; {self._memory():.2f} GiB of memory; "
                f"{sum(p.numel() for p in self.params.values()):,} trained numbers. Nothing was written.",
                flush=True,
            )
        self._close()
        raise SystemExit(0)

    def finish(self, reason: str | None = None) -> None:
        """Ends the run, early if there is a reason: closes the logs, leaves the process group, pushes to the Hub.

        Call it when the artifact is written. OSError when the push fails; what is in the folder is complete then.
        """
        self._event("finish", self.position - 1, reason=reason)
        self._close()
        if self._writes and self.cfg.push_to_hub:
            print(f"pushed to {push_to_hub(self.output_dir, self.cfg.hub_model_id, [f'{self.name}/**'])}", flush=True)

    def _close(self) -> None:
        if self._writes:
            os.close(self._lock)
        self.accelerator.end_training()
