"""The `alignkit` command. Each sub-command is a function: its signature makes the options, its docstring the help.

To add one, write the function and enter it in COMMANDS; a dict in place of a function makes a group of sub-commands.
Functions import what is heavy inside, so that `alignkit --help` stays instant.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_origin

from alignkit import __version__, evaluate, personalization

# Pairs that pip accepts and that fail when used: (installed, beside, what happens).
KNOWN_BAD = [
    ("image-reward", "transformers>=5", "ImageReward does not import: its BLIP code uses what transformers 5 removed"),
    ("hpsv2", "protobuf>=4", "hpsv2 was built against protobuf 3"),
]


def doctor() -> None:
    """Say what is installed, on what machine, and what is wrong with it; exits with 1 if something is."""
    problems = [*_check_packages(), *_check_machine(), *_check_world()]
    print("\n" + ("\n".join(f"problem: {p}" for p in problems) if problems else "No problems found."))
    if problems:
        raise SystemExit(1)


def generate(
    prompt: str,
    model: str = "emoji",
    base_config: str | None = None,
    lora: Sequence[str] = (),
    controlnet: str | None = None,
    control_image: str | None = None,
    concept: Sequence[str] = (),
    alignit: bool = False,
    truncation: int | None = None,
    negative_prompt: str = "",
    seed: int = 0,
    num_inference_steps: int = 25,
    guidance_scale: float = 7.5,
    num_images_per_prompt: int = 1,
    height: int | None = None,
    width: int | None = None,
    reward: str | None = None,
    best_of: int = 1,
    ascent_steps: int = 0,
    reward_scale: float = 0.0,
    refine: str | None = None,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    quantization: Literal["no", "nf4", "int8"] = "no",
    offload: Literal["none", "model", "sequential"] = "none",
    vae_tiling: bool = False,
    output_dir: str = "outputs",
) -> list[Path]:
    """Draw images; each PNG carries the settings that draw it again (`alignkit.pictures.read_settings`).

    Image i is drawn alone, from seed + i, so it does not depend on how many were asked for. What goes together with
    what: docs/pipelines.md.

    Args:
        prompt: What to draw.
        model: Base model: "emoji", a folder in diffusers format, a name on the Hub, or a .safetensors file.
        base_config: Of a base model that is a .safetensors file: the diffusers folder or Hub name whose configs and
            tokenizers go with it, and whose weights fill what it lacks; the Hub's original unless given.
        lora: Folder or safetensors file of a LoRA, or LORA=WEIGHT, or NAME=LORA=WEIGHT.
        controlnet: Folder or Hub name of a ControlNet.
        control_image: Picture for the ControlNet, as it was trained to see it.
        concept: Folder of training/neti.py or training/customize.py, whose phrase the prompt may hold.
        alignit: Keep the concepts from the rest of the prompt.
        truncation: Units of NeTI's mappers that are kept.
        negative_prompt: What to steer away from.
        seed: Seed of the first image.
        num_inference_steps: DDIM steps.
        guidance_scale: Strength of classifier-free guidance; 1 turns it off.
        num_images_per_prompt: How many images, with consecutive seeds.
        height: Pixels; the model's own size unless given.
        width: Pixels; the model's own size unless given.
        reward: What pictures are chosen or improved by: alignment, aesthetic, ... or package.module:Class.
        best_of: Draw each image this often, with consecutive seeds, and keep the one of the highest reward.
        ascent_steps: Steps of gradient ascent of the reward on the initial noise (ReNO); each costs some three images.
        reward_scale: Strength of the reward's gradient at every step; 0.1 is much.
        refine: Text-generation model, a folder or Hub name, that rewrites the prompt first.
        device: "cpu", "cuda", ...; auto takes a GPU where there is one.
        dtype: Precision of the model.
        quantization: Of the model's network: nf4 needs bitsandbytes, int8 torchao.
        offload: Keep the model in the CPU's memory and bring to the GPU one part at a time (model), or layer by layer
            (sequential: least memory, much slower).
        vae_tiling: Decode a large picture tile by tile, which takes less memory; it may differ at the seams.
        output_dir: Where the PNG files go.
    """
    import torch

    from alignkit.artifacts import sha256
    from alignkit.base import load_base
    from alignkit.composed import compose
    from alignkit.customized import lora_file
    from alignkit.data import open_image
    from alignkit.emoji import resolve
    from alignkit.pictures import write_png
    from alignkit.refine import build_refiner, refined
    from alignkit.rewards import build_reward

    if num_inference_steps < 1 or num_images_per_prompt < 1:
        raise ValueError(
            f"num_inference_steps and num_images_per_prompt are at least 1, got {num_inference_steps} and "
            f"{num_images_per_prompt}."
        )
    settings = {name: value for name, value in locals().items() if name in inspect.signature(generate).parameters}
    del settings["output_dir"], settings["num_images_per_prompt"], settings["refine"]
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if offload != "none" and (torch.device(device).type == "cpu" or not torch.accelerator.is_available()):
        raise ValueError(
            f"offload needs a GPU, to which it brings the model's parts from the CPU's memory; here it is drawn on "
            f"{device}{'' if torch.accelerator.is_available() else ', and there is no GPU'}. Leave offload at none."
        )
    place = device if offload == "none" else "cpu"
    base = load_base(model, device=place, dtype=getattr(torch, dtype), config=base_config, quantization=quantization)
    height, width = base.image_size(height, width)
    loras = _named_loras(lora)
    picture = None if control_image is None else open_image(control_image)
    pipe = base.pipeline()
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    composed = compose(pipe, loras=loras, controlnet=controlnet, concepts=list(concept), alignit=alignit)
    if vae_tiling:
        pipe.vae.enable_tiling()
    if offload != "none":
        composed.offload(offload, device)
    judge = build_reward(reward) if reward else None
    folders = [Path(resolve(p), part) for p in (controlnet, *concept) if p for part in ("", "unet", "text_encoder")]
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    notes: dict = {
        "lora_sha256": {spec: sha256(lora_file(path)) for spec, (path, _) in zip(lora, loras.values(), strict=True)},
        "sha256": {str(file): sha256(file) for file in [*files, *([control_image] if control_image else [])]},
    }
    if refine:
        notes |= {"base_prompt": prompt, "refined_by": refine}
        prompt = refined(build_refiner(refine), prompt, list(composed.concepts))
    base.check_prompts([prompt, negative_prompt])
    base.check_negative(negative_prompt)
    settings |= {"prompt": prompt, "height": height, "width": width, "device": device, "lora": list(lora)}
    settings |= {"concept": list(concept)}
    paths = []
    for i in range(num_images_per_prompt):
        drawn = composed(
            prompt,
            control_image=picture,
            truncation=truncation,
            negative_prompt=negative_prompt or None,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            seed=seed + best_of * i,
            reward=judge,
            best_of=best_of,
            ascent=ascent_steps,
            reward_scale=reward_scale,
        )
        if judge is not None:
            notes["chosen"] = {"seed": drawn.seeds[0], "reward": float(drawn.rewards[0])}
        paths.append(write_png(drawn.images[0], settings | {"seed": seed + best_of * i}, output_dir, notes))
        print(paths[-1])
    return paths


def check_data(
    folder: str,
    condition: str | None = None,
    condition_column: str | None = None,
    model: str | None = None,
    config: str | None = None,
) -> None:
    """Say of every file in a folder of images whether and why it is used; exits with 1 if one cannot be.

    Args:
        folder: Images with a metadata.jsonl: {"image": "0001.jpg", "text": "a cat"} and, for a control that is there
            already, {"label": "0001.png"} or {"depth": ...}, ...
        condition: Check the controls, too: segmentation, depth, softedge, lineart, canny, or package.module:Class.
        condition_column: Key of the controls' files; the condition's own unless given.
        model: Of the condition, where it is not the emoji world's.
        config: In their place, the config of a ControlNet's training, such as configs/controlnetpp/sd15_depth.yaml.
    """
    from collections import Counter

    import yaml

    from alignkit.conditions import build_condition
    from alignkit.controls import check_folder

    args = {} if model is None else {"model": model}
    if config:
        if condition or condition_column or model:
            raise ValueError("config: expected alone, since it says condition, condition_column and model")
        told = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
        if not isinstance(told, dict) or "condition" not in told:
            raise ValueError(f"{config}: expected the config of a ControlNet's training, with a condition")
        condition, args = told["condition"]["name"], told["condition"].get("args") or {}
        condition_column = told.get("condition_column")
    built = build_condition(condition, **args) if condition else None
    rows, findings = check_folder(folder, built, condition_column)
    for path, state, why in findings:
        print(f"{state:7} {path}  {why}")
    states = Counter(finding.state for finding in findings)
    print(f"{len(rows)} images can be used, {states['error']} cannot, {states['unused']} files are not named.")
    if states["error"]:
        raise SystemExit(f"alignkit check: {states['error']} of {states['error'] + len(rows)} images cannot be used.")


def plan(
    config: str,
    device: Literal["cuda", "cpu"] = "cuda",
    trainer: str | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Predict the memory and the FLOPs of a training, without weights and without running it.

    Args:
        config: Of the training, such as configs/alignprop/sd15.yaml.
        device: Where it is to run; nothing is computed there.
        trainer: Its script; training/<folder of the config>.py unless given.
        overrides: For the trainer, as is any option that is not one of these.
    """
    import subprocess

    script = Path(trainer or f"training/{Path(config).absolute().parent.name}.py")
    if not script.is_file():
        raise FileNotFoundError(
            f"no trainer {script}: run this in a checkout of alignkit on a config in configs/<method>/, or say "
            "--trainer training/<method>.py."
        )
    line = [sys.executable, str(script), "--config", config, "--estimate", device, *overrides]
    raise SystemExit(subprocess.run(line).returncode)


def convert_neti(mapper: str, output_dir: str, base_model: str = "CompVis/stable-diffusion-v1-4") -> Path:
    """Turn a mapper-steps-N.pt of the authors' NeTI code into a concept folder; nothing in the pickle is run.

    Args:
        mapper: The .pt file.
        output_dir: Folder to write; it must not hold a concept yet.
        base_model: What it was trained on.
    """
    from alignkit.concepts.convert import convert_neti

    folder = convert_neti(mapper, output_dir, base_model)
    print(folder)
    return folder


def convert(source: str, target: str) -> None:
    """Rewrite a pickled checkpoint as safetensors, without running anything that is in it.

    Args:
        source: The .pt, .pth, .bin or .ckpt file.
        target: The .safetensors file to write.
    """
    from alignkit import artifacts

    artifacts.convert(source, target)
    print(target)


def convert_lora(folder: str, out: str, format: Literal["kohya", "diffusers"] = "kohya", model: str = "emoji") -> Path:
    """Write a LoRA in the names of kohya's scripts, as ComfyUI and A1111 read it, or in those of diffusers.

    Args:
        folder: Folder or safetensors file of the LoRA, in either's names.
        out: The .safetensors file to write (kohya), or the folder to put it in (diffusers).
        format: Whose names to write.
        model: The base it was made for: "emoji", sd15, sd21, sdxl, flux, a folder in diffusers format, a Hub name. Only
            its configs are read, so of a base that is one file it is the base_config.
    """
    from alignkit.lora_formats import convert_lora

    path = convert_lora(folder, out, format, model)
    print(path)
    return path


def mix(
    lora: Sequence[str],
    output_dir: str,
    model: str = "emoji",
    how: Literal["updates", "factors"] = "updates",
    base_config: str | None = None,
) -> None:
    """Mix LoRAs of one base into one file.

    Args:
        lora: LORA=WEIGHT, each a folder or safetensors file.
        output_dir: Folder of the mixture.
        model: The base model they were made for.
        how: "updates" sums the updates of the weights, exactly; "factors" mixes as AlignProp's first code does.
        base_config: Of a base model that is a .safetensors file, as in generate.
    """
    from alignkit.artifacts import mix_lora_factors, mix_loras
    from alignkit.base import load_base

    loras = dict(map(_split_weight, lora))
    if not loras or len(loras) < len(lora):
        raise ValueError(f"expected LoRAs, each once, got {list(lora)}.")
    network = load_base(model, config=base_config).network
    print((mix_loras if how == "updates" else mix_lora_factors)(output_dir, network, loras))


COMMANDS: dict[str, Callable | dict] = {
    "doctor": doctor,
    "data": {"check": check_data},
    "generate": generate,
    "evaluate": {
        "world": evaluate.world,
        "reward": evaluate.reward,
        "controllability": evaluate.controllability,
        "alignment": evaluate.alignment,
        "manipulation": evaluate.manipulation,
        "personalization": personalization.evaluate,
    },
    "plan": plan,
    "convert": {"checkpoint": convert, "lora": convert_lora, "neti": convert_neti},
    "mix": mix,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one sub-command. What is wrong with its input is one line on stderr, and exit code 1 (2 for the options)."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="alignkit", version=__version__)
    _add_commands(parser, COMMANDS)
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(_overrides_of_plan(argv) if argv[:1] == ["plan"] else argv)
    command = COMMANDS
    while isinstance(command, dict):
        name = options.subcommand
        command, options = command[name], options[name]
    try:
        command(**vars(options))
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"alignkit {name}: {error}") from error


def _add_commands(parser, commands: dict[str, Callable | dict]) -> None:
    from jsonargparse import ArgumentParser

    subcommands = parser.add_subcommands()
    for name, command in commands.items():
        summary = f"{', '.join(command)}." if isinstance(command, dict) else _documentation(command).short_description
        child = ArgumentParser(description=summary)
        subcommands.add_subcommand(name, child, help=summary)
        if isinstance(command, dict):
            _add_commands(child, command)
        else:
            _add_options(child, command)


def _overrides_of_plan(argv: list[str]) -> list[str]:
    """Each option that `plan` does not have itself, and its value, as --overrides=..."""
    own = {f"--{name}" for name in inspect.signature(plan).parameters} | {"--help", "-h"}
    passed, is_own = [argv[0]], True
    for argument in argv[1:]:
        if argument.startswith("-"):
            is_own = argument.partition("=")[0] in own
        passed.append(argument if is_own else f"--overrides={argument}")
    return passed


def _add_options(parser, command: Callable) -> None:
    # jsonargparse takes a list as one value; on a command line one repeats the option.
    repeatable = {n for n, p in inspect.signature(command).parameters.items() if get_origin(p.annotation) is Sequence}
    positional = [name for name in ("folder", "out") if name in inspect.signature(command).parameters]
    parser.add_function_arguments(command, as_group=False, skip=repeatable | {*positional})
    texts = {p.arg_name: p.description for p in _documentation(command).params}
    for name in positional:
        parser.add_argument(name, help=texts[name])
    for name in sorted(repeatable):
        parser.add_argument(f"--{name}", action="append", default=[], help=f"{texts[name]} May be repeated.")


def _documentation(command: Callable):
    from docstring_parser import parse

    return parse(command.__doc__)


def _named_loras(specs: Sequence[str]) -> dict[str, tuple[Path, float]]:
    """Of LORA, LORA=WEIGHT, NAME=LORA=WEIGHT: (path, weight) by their names, lora_0, ... where they have none."""
    loras: dict[str, tuple[Path, float]] = {}
    for i, spec in enumerate(specs):
        path, weight = _split_weight(spec)
        name, equals, rest = str(path).partition("=")
        if equals and name.isidentifier() and not path.exists():
            path = Path(rest)
        else:
            name = f"lora_{i}"
        if name in loras:
            raise ValueError(f"Two LoRAs are called {name!r}.")
        loras[name] = (path, weight)
    return loras


def _split_weight(spec: str) -> tuple[Path, float]:
    path, equals, weight = spec.rpartition("=")
    if not equals or Path(spec).exists():
        return Path(spec), 1.0
    try:
        return Path(path), float(weight)
    except ValueError:
        return Path(spec), 1.0


def _installed(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _check_packages() -> list[str]:
    import platform
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement

    print(f"alignkit {__version__}, Python {platform.python_version()}, {platform.platform()}")
    try:
        requirements = [Requirement(line) for line in requires("alignkit") or []]
    except PackageNotFoundError:
        return ["alignkit itself is not installed, so its requirements are unknown: pip install -e ."]
    problems = []
    for need in requirements:
        if need.name == "alignkit":
            continue
        found, optional = _installed(need.name), need.marker is not None
        print(f"  {need.name:18} {found or 'not installed':16} {need.specifier}" + (" (optional)" if optional else ""))
        fix = f"pip install '{need.name}{need.specifier}'"
        if found is None and not optional:
            problems.append(f"{need.name} is missing: {fix}")
        elif found is not None and not need.specifier.contains(found, prereleases=True):
            problems.append(f"{need.name} {found} is outside the tested range: {fix}")
    torch, torchvision = _installed("torch"), _installed("torchvision")
    if torch and torchvision and int(torchvision.split(".")[1]) != int(torch.split(".")[1]) + 15:
        problems.append(f"torchvision {torchvision} was not built for torch {torch}: reinstall the two together")
    for one, other, consequence in KNOWN_BAD:
        beside = Requirement(other)
        found = _installed(beside.name)
        if _installed(one) and found and beside.specifier.contains(found):
            problems.append(f"{one} beside {beside.name} {found}: {consequence}")
    return problems + _pip_check()


def _pip_check() -> list[str]:
    """What the installed packages require of each other and do not get."""
    import subprocess

    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if line.strip()] if done.returncode else []


def _check_machine() -> list[str]:
    import os
    import shutil

    import psutil

    memory, disk, gib = psutil.virtual_memory(), shutil.disk_usage("."), 2**30
    print(
        f"  CPU {os.cpu_count()} cores, memory {memory.available / gib:.1f} of {memory.total / gib:.1f} GiB free, "
        f"disk here {disk.free / gib:.1f} GiB free"
    )
    try:
        import torch
    except Exception as error:  # a torch that does not match its CUDA or torchvision fails in many ways
        return [f"torch does not import: {error}"]
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        print(f"  cuda:{i} {torch.cuda.get_device_name(i)}, memory {free / gib:.1f} of {total / gib:.1f} GiB free")
    if not torch.cuda.is_available():
        unused = " that is used here (Apple's has no float64)" if torch.backends.mps.is_available() else ""
        print(f"  no GPU{unused}; torch uses {torch.get_num_threads()} CPU threads")
    return [f"only {disk.free / gib:.1f} GiB of disk free here"] if disk.free < gib else []


def _check_world() -> list[str]:
    from alignkit import emoji

    try:
        print(f"  emoji world {emoji.resolve('emoji')}")
    except FileNotFoundError as error:
        return [str(error)]
    return []


if __name__ == "__main__":
    main()
