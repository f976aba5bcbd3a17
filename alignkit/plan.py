"""What a training will need, before it is run: its own `train` function on PyTorch's meta device.

A tensor there has a shape and no numbers, so nothing is computed and next to nothing is allocated, while each operation
takes place in its turn: gradients, checkpoints and the optimizer's state come and go as they will on the real device.

    alignkit plan --config configs/alignprop/sd15.yaml
    python training/alignprop.py --config configs/alignprop/sd15.yaml --estimate cuda

Two classes: `Ledger` counts the bytes of live tensors and the FLOPs, on any device, and so checks the prediction, too;
`NoNumbers` answers where the training asks for a number. What is not counted: the device's context, the allocator's
fragmentation, and the workspaces inside of an operation.
"""

import contextlib
import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import checkpoint as checkpointing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

if TYPE_CHECKING:
    from alignkit.run import Run

aten = torch.ops.aten
# PyTorch counts the FLOPs of the other devices' fused attention; the CPU's has their arguments.
FLOPS = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
attention = F.scaled_dot_product_attention  # PyTorch's own, while NoNumbers has another in its place
checkpoint = checkpointing.checkpoint  # this, too
GIB, TERA = 2**30, 1e12


@dataclass
class Phase:
    """Part of a training: the highest sum of the bytes of its live tensors, and the FLOPs of each of its passes."""

    peak: int = 0
    flops: list[int] = field(default_factory=list)


class Ledger(TorchDispatchMode):
    """Counts, inside its context, the bytes of the live storages of one type of device, and FLOPs.

    A multiplication with its addition is two FLOPs; matrix products, convolutions and attention count, nothing else.
    Tensors from before it was entered are left out. A run divides its time into phases:
    "setup", "train" (from the start of a step to the end of its update) and "validate" (all else).
    """

    active: ClassVar["Ledger | None"] = None

    def __init__(self, device_type: str):
        super().__init__()
        self.device_type = device_type
        self.live = 0
        self.phases: dict[str, Phase] = {}
        self.begin("setup")
        self._storages: dict[int, tuple[weakref.ref, int]] = {}

    def __enter__(self):
        self._find_untouched()
        for key in list(self._storages):
            if key in self._storages:  # the garbage collector may forget one at any time
                self._storages[key] = (self._storages[key][0], 0)
        self.live = self.phase.peak = 0
        Ledger.active = self
        return super().__enter__()

    def __exit__(self, *error):
        Ledger.active = None
        return super().__exit__(*error)

    def begin(self, name: str) -> None:
        """What comes now is a pass of this phase."""
        self.phase = self.phases.setdefault(name, Phase())
        self.phase.flops.append(0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        for value in (*args, *kwargs.values(), output):
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, Tensor):
                    self._see(tensor)
        count = FLOPS.get(func._overloadpacket)
        if count:
            self.phase.flops[-1] += count(*args, **kwargs, out_val=output)
        return output

    def _see(self, tensor: Tensor) -> None:
        if tensor.device.type != self.device_type or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = id(storage)  # PyTorch keeps one Python object for a storage as long as this lives
        if key not in self._storages:
            self._storages[key] = (weakref.ref(storage, lambda _: self._forget(key)), storage.nbytes())
            self.live += storage.nbytes()
        self.phase.peak = max(self.phase.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._storages.pop(key)[1]

    def _find_untouched(self) -> None:
        """Counts tensors that no operation has seen yet, such as weights that were read from a file."""
        for tensor in gc.get_objects():
            if type(tensor) in (Tensor, torch.nn.Parameter):
                self._see(tensor)


def begin(phase: str) -> None:
    """Tells the ledger that counts, if one does, that this phase of a training begins."""
    if Ledger.active:
        Ledger.active._find_untouched()
        Ledger.active.begin(phase)


def predicting() -> bool:
    """Whether this runs on the meta device, where weights have shapes and no numbers."""
    return Ledger.active is not None and Ledger.active.device_type == "meta"


class NoNumbers(TorchDispatchMode):
    """Inside, what asks a tensor on the meta device for its numbers gets ones, and no index of what is not zero; what
    compares two finds them equal.

    So that a training passes its own checks: all is finite and in range, no gradient vanishes, nothing stops early.
    """

    CHECKS = (aten.all.default, aten.any.default, aten.min.default, aten.max.default, aten.aminmax.default)

    def __init__(self, device_type: str = "cpu"):
        """`device_type`: whose autocast is taken."""
        super().__init__()
        self.device_type = device_type

    def __enter__(self):
        # by name, since a TorchFunctionMode is off inside of backward(), where checkpoints compute again
        self._patches = contextlib.ExitStack()
        self._patches.enter_context(mock.patch.object(F, "scaled_dot_product_attention", fused_attention))
        self._patches.enter_context(mock.patch.object(torch, "autocast", Autocast))
        self._patches.enter_context(mock.patch.object(Autocast, "like", self.device_type))
        self._patches.enter_context(mock.patch.object(checkpointing, "checkpoint", checkpoint_in_autocast))
        return super().__enter__()

    def __exit__(self, *error):
        self._patches.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        source = args[1] if func is aten.copy_.default else args[0] if args else None
        if isinstance(source, Tensor) and source.is_meta:
            if func is aten._local_scalar_dense.default:
                return torch.ones((), dtype=source.dtype).item()
            if func in self.CHECKS:
                return tree_map(lambda tensor: torch.ones((), dtype=tensor.dtype), func(*args, **kwargs))
            if func is aten.equal.default:
                return True
            if func is aten.nonzero.default:
                return source.new_empty((0, source.ndim), dtype=torch.long)
            device = kwargs.get("device")
            if func is aten._to_copy.default and device is not None and torch.device(device).type != "meta":
                return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype, device=device)
            if func is aten.copy_.default and not args[0].is_meta:
                return args[0].fill_(1)
        return func(*args, **kwargs)


def fused_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> Tensor:
    """Attention that holds no matrix of scores, as real devices do it; on the meta device, PyTorch writes it out."""
    if not query.is_meta or enable_gqa:
        options = {"scale": scale, "enable_gqa": enable_gqa}
        return attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    flash = aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


class Autocast(torch.autocast):
    """The meta device has no autocast, so this does its work there: by name, as functions are called, and as on `like`.

    Weights are cast once a context, as autocast does. Nothing is while it is switched off.
    """

    LOWER = ((F, "linear"), (F, "conv2d"), (F, "scaled_dot_product_attention"), (torch, "bmm"), (torch, "baddbmm"))
    FLOAT32: ClassVar = {"cpu": (), "cuda": ((F, "group_norm"), (F, "layer_norm"))}
    like: ClassVar[str] = "cpu"
    active: ClassVar["Autocast | None"] = None

    def __init__(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **options):
        self.on_meta = on_meta = device_type == "meta"
        self.meta_dtype = dtype if on_meta and enabled else None
        super().__init__(
            "cpu" if on_meta else device_type, None if on_meta else dtype, enabled and not on_meta, **options
        )

    def __enter__(self):
        self._outer, self._patches, weights = Autocast.active, contextlib.ExitStack(), {}
        if self.on_meta:
            Autocast.active = self if self.meta_dtype else None
        if self.meta_dtype:
            for functions, dtype in ((self.LOWER, self.meta_dtype), (self.FLOAT32[self.like], torch.float32)):
                for owner, name in functions:
                    casting = _casting(getattr(owner, name), dtype, weights)
                    self._patches.enter_context(mock.patch.object(owner, name, casting))
        return super().__enter__()

    def __exit__(self, *error):
        Autocast.active = self._outer
        self._patches.close()
        return super().__exit__(*error)


def _casting(function: Callable, dtype: torch.dtype, weights: dict[int, Tensor]) -> Callable:
    """The function, with floating-point tensors on the meta device cast to `dtype`; `weights` are the cast ones."""

    def cast(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_meta and value.is_floating_point()):
            return value
        if Autocast.active is None or value.dtype == dtype:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in weights:
            weights[id(value)] = value.to(dtype)
        return weights[id(value)]

    return lambda *args, **kwargs: function(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})


def checkpoint_in_autocast(function: Callable, *args, **options) -> Any:
    """PyTorch's own, which computes again in the backward pass under the autocast of the forward pass."""
    autocast = Autocast.active

    def again(*args):
        if autocast is None or Autocast.active is autocast:
            return function(*args)
        with Autocast("meta", autocast.meta_dtype):
            return function(*args)

    return checkpoint(again, *args, **options)


def estimate(train: Callable[[Any], Any], cfg: Any) -> Ledger:
    """Runs `train(cfg)`, whose `cfg.estimate` names a device, on the meta device. The run prints its `report`."""
    with Ledger("meta") as ledger, NoNumbers(cfg.estimate):
        try:
            train(cfg)
        except SystemExit as end:  # of a dry run
            if end.code:
                raise
    return ledger


def peak_of_several(peak: int, live: int, trained: int) -> int:
    """Bytes at most in each of several processes, which lay their gradients side by side and sum a copy of that.

    Of one process: its peak in a step, what is live between steps, and what of it is trained.
    """
    return max(peak, live + 2 * trained)


def report(run: "Run", ledger: Ledger) -> str:
    """What a training needs, in lines to print."""
    trained = sum(p.nbytes for p in run.params.values())
    entries = [value for state in run.optimizer.state.values() for value in state.values()]
    optimizer = sum(t.nbytes for t in entries if isinstance(t, Tensor) and t.is_meta)
    ema = sum(t.nbytes for t in run.ema.values())
    live = ledger.live - run.bytes_elsewhere
    standing = live - 2 * trained - optimizer - ema
    peaks = {name: phase.peak - run.bytes_elsewhere for name, phase in ledger.phases.items()}
    summing = peak_of_several(peaks["train"], live, trained) - peaks["train"]
    count = run.cfg.gradient_accumulation_steps
    steps = [count * flops for flops in ledger.phases["train"].flops]
    checked = {"cpu": "checked, see docs/plan.md", "cuda": "UNVERIFIED: we have no GPU"}[run.cfg.estimate]
    lines = [
        f"plan of {run.name} on {run.cfg.estimate} ({checked}); GiB of tensors in each process:",
        *(
            f"  {what:38} {value / GIB:9.3f}"
            for what, value in {
                "frozen weights, and what is kept": standing,
                "trained weights": trained,
                "their gradients": trained,
                "optimizer": optimizer,
                "EMA": ema,
                "activations, at most": peaks["train"] - live,
                "peak of training": peaks["train"],
                "peak of validation": peaks.get("validate", 0),
                "peak of loading and of the first checks": peaks["setup"],
            }.items()
        ),
        f"several processes: {summing / GIB:.3f} GiB more in each, and in all as many times the FLOPs",
        f"FLOPs of a step in each process: {' and '.join(f'{f / TERA:.4g}' for f in steps)} TFLOP "
        f"(two steps, of {count} micro-batches of {run.cfg.train_batch_size})",
        f"FLOPs of a validation: {max(ledger.phases['validate'].flops) / TERA:.4g} TFLOP",
        "not counted: the device's context, fragmentation, workspaces inside of operations. Nothing was written.",
    ]
    return "\n".join(lines)
