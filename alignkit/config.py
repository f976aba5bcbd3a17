"""Configs: a dataclass <- a YAML file <- dotted overrides on the command line.

    cfg = parse(Config)        # python training/x.py --config configs/x.yaml --lora.rank 16

Field names follow the training scripts of diffusers. The string below a field is its help text.
A key that does not exist or a value of the wrong type is one line on stderr and exit code 2.
"""

import dataclasses
import difflib
import json
import os
import re
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

T = TypeVar("T")


def free(default: Any = dataclasses.MISSING) -> Any:
    """A field that does not change the trained weights, and so may change when a run is resumed."""
    return field(default=default, metadata={"free": True})


@dataclass
class LoraConfig:
    """The low-rank adapter that is trained (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = 4
    """Rank r of the update B A of every adapted layer."""
    alpha: float | None = None
    """The update is scaled by alpha / rank; null means alpha = rank, a scale of 1."""
    target_modules: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    """Adapted layers, by the end of their names."""
    dropout: float = 0.0
    """Dropout on the adapter's input."""

    def __post_init__(self):
        _require(self.rank >= 1, "lora.rank", "at least 1", self.rank)
        _require(self.alpha is None or self.alpha > 0, "lora.alpha", "above 0, or null", self.alpha)
        _require(len(self.target_modules) > 0, "lora.target_modules", "at least one name", self.target_modules)
        _require(0 <= self.dropout < 1, "lora.dropout", "in [0, 1)", self.dropout)

    @property
    def lora_alpha(self) -> float:
        """As PEFT has it: a number."""
        return self.rank if self.alpha is None else self.alpha


@dataclass
class RunConfig:
    """What every training shares. A method's own Config inherits from it and adds its own numbers."""

    output_dir: str = free()
    """Folder of the run: config, checkpoints, events, samples. The same command resumes it."""
    pretrained_model_name_or_path: str = "emoji"
    """Base model: "emoji" (bundled), a folder in diffusers format, a name on the Hub, or a .safetensors file."""
    base_config: str | None = None
    """With a .safetensors file: folder or Hub name of the configs and tokenizers that go with it; null guesses it."""
    random_init: bool = False
    """Build the base from its config with random weights, to try a run without downloading them."""
    shrink: int = 1
    """With random_init: divide the widths of the base by this."""
    seed: int = 0
    """All randomness comes from (seed, step, sample index)."""
    dry_run: bool = free(False)
    """Measure two steps, print time and memory, write nothing."""
    estimate: Literal["no", "cpu", "cuda"] = free("no")
    """Predict memory and FLOPs on that device, compute and write nothing; implies dry_run and random_init."""

    max_train_steps: int = 1000
    """Optimizer updates in all. May grow when a run is resumed, which stretches a linear or cosine schedule."""
    train_batch_size: int = free(4)
    """Images per device in one forward pass. Free on resume as long as the global batch stays the same."""
    gradient_accumulation_steps: int = free(1)
    """Forward passes per update; global batch = train_batch_size * this * number of processes."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the frozen parts; what is trained stays float32."""
    quantization: Literal["no", "nf4", "int8"] = "no"
    """Of the base's network, which stays frozen, as its weights are read: nf4 needs bitsandbytes, int8 torchao."""
    torch_compile: Literal["no", "inductor", "aot_eager", "eager"] = free("no")
    """Backend of torch.compile for the denoiser and a ControlNet: "inductor" is the fast one, after minutes of
    compiling; the others are for finding faults. NeTI compiles the denoiser's transformer blocks alone."""

    optimizer: Literal["adamw", "adamw_8bit", "prodigy", "adafactor", "diffgrad"] = "adamw"
    """adamw_8bit needs bitsandbytes; prodigy (with learning_rate 1), adafactor and diffgrad pytorch_optimizer."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """Shape of the learning rate over max_train_steps; "constant" ignores lr_warmup_steps."""
    lr_warmup_steps: int = 0
    """Updates over which the learning rate rises linearly from 0."""
    adam_beta1: float = 0.9
    """Of every optimizer but adafactor: decay of the first moment."""
    adam_beta2: float = 0.999
    """Of every optimizer: decay of the second moment."""
    adam_weight_decay: float = 1e-2
    """Of every optimizer: decoupled weight decay."""
    adam_epsilon: float = 1e-8
    """Of every optimizer but adafactor: epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this L2 norm over all trained parameters."""
    use_ema: bool = False
    """Keep an exponential moving average of the trained parameters."""
    ema_decay: float = 0.999
    """Decay of that average, reached by a warm-up of (1 + n) / (10 + n) after n updates."""

    checkpointing_steps: int = free(100)
    """Write a checkpoint every so many updates, and at the end."""
    checkpoints_total_limit: int | None = free(2)
    """Keep the newest so many checkpoints; null keeps all."""
    logging_steps: int = free(1)
    """Write scalars every so many updates, and with each validation."""
    validation_steps: int = free(100)
    """Validate every so many updates, and at the end; 0 means never."""
    report_to: str = free("tensorboard")
    """"tensorboard", "wandb", "comet_ml" or another tracker of accelerate, "all" that are installed, or "none".
    events.jsonl is always written."""
    push_to_hub: bool = free(False)
    """Upload the finished folder, without checkpoints and samples, with the token of `hf auth login` or HF_TOKEN."""
    hub_model_id: str | None = free(None)
    """Repository to push to: OWNER/NAME, or NAME among one's own; null takes the name of output_dir."""

    def __post_init__(self):
        if self.estimate != "no":
            self.dry_run = self.random_init = True
        for name in (
            "max_train_steps",
            "train_batch_size",
            "gradient_accumulation_steps",
            "shrink",
            "checkpointing_steps",
            "logging_steps",
        ):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("lr_warmup_steps", "validation_steps", "adam_weight_decay"):
            _require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("learning_rate", "max_grad_norm", "adam_epsilon"):
            _require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            _require(0 <= getattr(self, name) < 1, name, "in [0, 1)", getattr(self, name))
        limit = self.checkpoints_total_limit
        _require(limit is None or limit >= 1, "checkpoints_total_limit", "at least 1, or null", limit)


@dataclass
class DiffusionConfig(RunConfig):
    """What trainers share whose loss is the network's error on noised images."""

    snr_gamma: float | None = None
    """Weigh timesteps by min(SNR, this) as a loss in x_0 would (Hang et al. 2023, arXiv 2303.09556): 5 there; null
    weighs all alike."""
    noise_offset: float = 0.0
    """Add this much noise that is the same over a whole channel, to learn very dark and bright images; 0.1 is usual."""

    def __post_init__(self):
        super().__post_init__()
        _require(self.snr_gamma is None or self.snr_gamma > 0, "snr_gamma", "above 0, or null", self.snr_gamma)
        _require(self.noise_offset >= 0, "noise_offset", "at least 0", self.noise_offset)


def _require(ok: bool, name: str, expected: str, value: Any) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {value}")


def parse(cls: type[T], argv: list[str] | None = None) -> T:
    """Builds the dataclass `cls` from `--config FILE` and overrides such as `--lora.rank 16`; later ones win.

    `argv` defaults to the command line. Whatever is wrong is said in one line on stderr, then SystemExit(2).
    """
    # Here, not above: the library functions of alignkit need no command line.
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)

    class Parser(ArgumentParser):
        def error(self, message, ex=None):
            _fail(_explain(cls, message))

    parser = Parser(allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file; what follows on the command line overrides it.")
    parser.add_class_arguments(cls)
    namespace = parser.parse_args(_with_values(cls, sys.argv[1:] if argv is None else argv))
    _check_shape(cls, namespace)
    try:
        values = dict(vars(parser.instantiate(namespace)))
        del values["config"]
        return cls(**values)
    except ValueError as error:  # from a __post_init__
        _fail(" ".join(str(error).split()))


def command(cls: type[T], train: Callable[[T], Any], argv: list[str] | None = None) -> None:
    """A trainer from the command line: what its user can mend ends it in one line, with exit code 2 or 1.

    So does a Ctrl-C outside the steps, which `Run.steps` handles itself: 130, as shells have it.
    """
    cfg = parse(cls, argv)
    try:
        if cfg.estimate == "no":
            train(cfg)
        else:
            from alignkit.plan import estimate

            estimate(train, cfg)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the newest checkpoint, if there is one", file=sys.stderr)
        raise SystemExit(130) from None


def _with_values(cls: type, argv: list[str]) -> list[str]:
    """`--dry-run` and `--dry_run` as `--dry_run true`: a switch needs no value, and dashes do for underscores.

    A list is emptied before it is set: jsonargparse would fill in what an item leaves out from the file's item there.
    """
    kinds = typing.get_type_hints(cls)
    switches = {name for name, kind in kinds.items() if kind is bool}
    lists = {name for name, kind in kinds.items() if typing.get_origin(kind) is list}
    complete = []
    for argument, following in zip(argv, [*argv, "--"][1:], strict=True):
        if not argument.startswith("--"):
            complete.append(argument)
            continue
        name, equals, value = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if name in lists:
            complete += [f"--{name}", "[]"]
        complete.append(f"--{name}{equals}{value}")
        if name in switches and not equals and following.startswith("--"):
            complete.append("true")
    return complete


def _check_shape(cls: type, namespace: Any, prefix: str = "") -> None:
    """Refuses what jsonargparse lets through: null where a value is needed, and a scalar in place of a block."""
    for name, kind in typing.get_type_hints(cls).items():
        value = namespace[name]
        if dataclasses.is_dataclass(kind):
            if not hasattr(value, "items"):
                _fail(f"{prefix}{name}: expected a block of keys ({', '.join(_keys(kind))}), got {value}")
            _check_shape(kind, value, f"{prefix}{name}.")
        elif value is None and type(None) not in typing.get_args(kind):
            _fail(f"{prefix}{name}: expected {getattr(kind, '__name__', kind)}, got null")


def _fail(line: str) -> typing.NoReturn:
    if os.environ.get("RANK", "0") == "0":  # once, not once per process of torchrun
        print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def _keys(cls: type) -> list[str]:
    """All dotted keys of a config class, those of nested blocks and of lists of blocks included."""
    keys = []
    for name, kind in typing.get_type_hints(cls).items():
        keys.append(name)
        for block in (kind, *typing.get_args(kind)):
            if dataclasses.is_dataclass(block):
                keys += [f"{name}.{key}" for key in _keys(block)]
    return keys


def _explain(cls: type, message: str) -> str:
    """One line out of jsonargparse's message, with the nearest key where a key is unknown."""
    text = " ".join(message.split())
    where = re.findall(r'Parser key "([\w.]+)":', text)
    group = re.findall(r"Group '([\w.]+)' does not", text)
    unknown = re.findall(r"unrecognized arguments: --([\w.]+)|[Oo]ption '([\w.]+)'", text)
    if unknown:
        key = ".".join([*where, *group, "".join(unknown[0])])

        def likeness(candidate):
            names = (candidate, candidate.rpartition(".")[2])  # `--rank` means lora.rank
            return max((name.startswith(key), difflib.SequenceMatcher(None, key, name).ratio()) for name in names)

        return f"unknown key {key!r}; the nearest key is {max(_keys(cls), key=likeness)!r} (--help lists all)"
    wrong = re.search(r"(Expected an? .+?)\.? (?:Got value|Given value type: .* Given value): (.*)", text)
    if where and wrong:
        kinds = re.findall(r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|typing\.(\S+\[.*?\])|(\w+))", wrong[1])
        expected = " or ".join("".join(kind) for kind in kinds).replace("NoneType", "null")
        hint = " (YAML reads a bare no as false: quote it)" if wrong[2] == "False" and "'no'" in expected else ""
        return f"{'.'.join(where)}: expected {expected}, got {wrong[2]}{hint}"
    return text


def to_dict(cfg: Any) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars, as they come back from YAML."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def save(cfg: Any, path: str | os.PathLike) -> None:
    """Writes the config as a YAML file that `--config` reads back."""
    Path(path).write_text(to_yaml(cfg), encoding="utf-8")


def to_yaml(cfg: Any) -> str:
    return yaml.safe_dump(to_dict(cfg), sort_keys=False, allow_unicode=True)


def differences(saved: dict, current: dict, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (saved, current), for every key whose value differs; a missing key counts as "absent"."""
    found = {}
    for key in sorted(saved.keys() | current.keys()):
        old, new = saved.get(key, "absent"), current.get(key, "absent")
        if isinstance(old, dict) and isinstance(new, dict):
            found |= differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found[prefix + key] = (old, new)
    return found


def free_fields(cfg: Any) -> set[str]:
    """Names of the fields made with `free`."""
    return {f.name for f in dataclasses.fields(cfg) if f.metadata.get("free")}
