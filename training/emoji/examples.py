"""Train the artifacts that ship with the emoji world, by the trainers' own command lines, and put them in the package.

    python training/emoji/examples.py                          # those that are missing: an hour and a half of two cores
    python training/emoji/examples.py --only depth --only neti

They are loaded by name, as `alignkit generate --lora emoji/examples/aesthetic`. Weights of networks are shipped in
fp16. A run that was stopped goes on where it was. The aesthetic LoRA and the ControlNets are trained in bfloat16, or
as --mixed_precision says.
"""

import shutil
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from alignkit.controlnet import WEIGHTS
from alignkit.emoji import EXAMPLES_DIR

ROOT = Path(__file__).parents[2]
PICTURES = ["--train_data_dir", "configs/customize/emoji_concept", "--placeholder_token", "<cat>"]
PICTURES += ["--super_category_token", "cat"]

FIRST = ["--validation_steps", "0", "--reward_weight", "0", "--max_train_steps", "1500"]
SECOND = ["--validation_steps", "0", "--reward_start", "0", "--max_train_steps", "500"]
SECOND += ["--lr_warmup_steps", "0", "--seed", "1000", "--controlnet_model_name_or_path"]


def controlnet(condition: str, *options: str) -> list[tuple[str, list[str]]]:
    """The two stages as runs of their own: seed 0 of tests/benchmarks/controlnetpp_emoji.py, weight for weight."""
    config = f"controlnetpp/emoji_{condition}"
    return [(config, FIRST), (config, [*options, *SECOND, f"runs/examples/{condition}_0"])]


# name: a (config, overrides) for each run, of which the last is shipped
EXAMPLES = {
    "aesthetic": [("alignprop/emoji", [])],
    "segmentation": controlnet("segmentation", "--reward_weight", "0"),  # which gains nothing there: docs/results.md
    "depth": controlnet("depth"),
    "neti": [("neti/emoji", PICTURES)],
    "textual_inversion": [("neti/emoji", [*PICTURES, "--method", "textual_inversion"])],
    "p_plus": [("neti/emoji", [*PICTURES, "--method", "p_plus"])],
    "lora": [("customize/emoji_lora", [])],
    "custom_diffusion": [("customize/emoji_custom_diffusion", [])],
}
MIXED = ("aesthetic", "segmentation", "depth")  # trained with mixed precision
SHIPPED = (
    "*.safetensors",
    "*.json",
    "events.jsonl",
    "*.png",
    "config.yaml",
    "README.md",
)  # of a run's folder, not of its subfolders


def make(name: str, mixed_precision: str) -> None:
    run, folder = Path(), EXAMPLES_DIR / name
    for i, (config, overrides) in enumerate(EXAMPLES[name]):
        run = Path("runs", "examples", f"{name}_{i}" if i < len(EXAMPLES[name]) - 1 else name)
        command = [sys.executable, f"training/{Path(config).parent}.py", "--config", f"configs/{config}.yaml"]
        if name in MIXED:
            command += ["--mixed_precision", mixed_precision]
        subprocess.run([*command, "--output_dir", str(run), *overrides], cwd=ROOT, check=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in sorted({file for pattern in SHIPPED for file in (ROOT / run).glob(pattern)}):
        if file.name == WEIGHTS:
            save_in_half(file, folder / WEIGHTS)
        else:
            shutil.copy(file, folder)


def save_in_half(file: Path, target: Path) -> None:
    with safe_open(file, "pt") as tensors:
        save_file({key: tensors.get_tensor(key).half() for key in tensors.keys()}, target, tensors.metadata())  # noqa: SIM118


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(EXAMPLES), action="append")
    parser.add_argument("--mixed_precision", choices=["bf16", "no"], default="bf16", help="no: on CPUs without bf16")
    args = parser.parse_args()
    for chosen in args.only or [name for name in EXAMPLES if not (EXAMPLES_DIR / name).is_dir()]:
        make(chosen, args.mixed_precision)
