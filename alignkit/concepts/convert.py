"""Concepts of the authors' repository (NeuralTextualInversion/NeTI): its pickle becomes a folder of ours."""

import pickle
from pathlib import Path
from typing import Any

import torch

from alignkit.concepts import Concept, Mapper

# ours <- theirs
_NAMES = {"anchors": "input_layer", "hidden.0": "net.1", "hidden.1": "net.2", "hidden.3": "net.4", "hidden.4": "net.5",
          "output": "output_layer.0"}  # fmt: skip


class _Encoder:
    """Stands in for the class of their pickled encoder: takes its attributes, and has no code of its own."""


def convert_neti(mapper: str, output_dir: str, base_model: str = "CompVis/stable-diffusion-v1-4") -> Path:
    """Writes the concept of a `mapper-steps-N.pt` of theirs; returns its folder.

    The pickle is read by torch's restricted unpickler (`weights_only=True`): it makes tensors and plain containers, and
    for their encoder object an empty stand-in; anything else in it is refused and nothing in it is run.
    Raises ValueError for a file that is something else, and for a folder that holds a concept already.
    """
    folder = Path(output_dir)
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a concept already: choose another output_dir.")
    checkpoint = _read(Path(mapper))
    state, settings = checkpoint["state_dict"], checkpoint["cfg"]["model"]
    if not settings.get("use_positional_encoding", True):
        raise ValueError(f"{mapper} was trained without Fourier features (use_positional_encoding), which is not read.")
    encoder = vars(checkpoint["encoder"])
    frequencies = encoder.get("w", encoder.get("_parameters", {}).get("w"))
    if frequencies is None:
        raise ValueError(f"{mapper} holds no frequencies in its encoder: without them a mapper is worthless.")
    bypass = bool(settings["output_bypass"])
    width = state["output_layer.0.weight"].shape[0] // (1 + bypass)
    layers = _sd_layers()
    if state["input_layer.weight"].shape[0] % len(layers):
        anchors = state["input_layer.weight"].shape[0]
        raise ValueError(f"{mapper}: expected anchors for {len(layers)} U-Net layers, got {anchors}.")
    norm = settings.get("target_norm")
    own: dict[str, Any] = {
        "hidden_size": state["net.1.weight"].shape[0],
        "num_frequencies": len(frequencies),
        "bypass": bypass,
        "norm_mode": "joint",
        "num_train_timesteps": 1000,
    }
    norms = None if norm is None else [float(norm)]
    module = Mapper(len(layers), [width], norms, **own)
    weights = {f"{a}.{kind}": state[f"{b}.{kind}"].float() for a, b in _NAMES.items() for kind in ("weight", "bias")}
    module.load_state_dict(weights | {"frequencies": frequencies.detach().float()})
    data = checkpoint["cfg"]["data"]
    return Concept(
        placeholder_token=data["placeholder_token"],
        super_category_token=data["super_category_token"],
        kind="neti",
        module=module,
        widths=[width],
        layers=layers,
        norms=norms,
        settings=own | {"rescale": norm is not None},
        base_model=base_model,
    ).save(folder)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"There is no file {path}: expected the mapper-steps-N.pt of a NeTI run.")
    names = ("models.positional_encoding.NeTIPositionalEncoding", "models.positional_encoding.BasicEncoder")
    try:
        with torch.serialization.safe_globals([(_Encoder, name) for name in names]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())[:200] or "it is empty"
        raise ValueError(f"{path} is refused: {reason}") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "cfg", "encoder"} <= checkpoint.keys():
        raise ValueError(f"{path} is no mapper of NeTI: expected state_dict, cfg and encoder in it.")
    return checkpoint


def _sd_layers() -> list[str]:
    """Of SD 1.x and 2.x, from the configuration alone."""
    from diffusers import UNet2DConditionModel

    from alignkit.attention import text_layers
    from alignkit.random_init import ARCHITECTURES

    with torch.device("meta"):
        config = UNet2DConditionModel.load_config(ARCHITECTURES["sd15"], subfolder="unet")
        return text_layers(UNet2DConditionModel.from_config(config))
