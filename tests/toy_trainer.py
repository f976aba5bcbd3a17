"""What the page takes for a trainer in tests: the files and the signals of `alignkit.run`, without its imports."""

import argparse
import json
import signal
import sys
import time
from pathlib import Path

import yaml
from PIL import Image

parser = argparse.ArgumentParser()
parser.add_argument("--config", type=Path)
parser.add_argument("--output_dir", type=Path)
parser.add_argument("--dry_run", default="false")
options = parser.parse_args()
config = yaml.safe_load(options.config.read_text())
if config.get("max_train_steps", 0) < 1:
    sys.exit("error: max_train_steps: expected at least 1, got 0")
if options.dry_run == "true":
    time.sleep(config.get("wait", 0))
    print("dry run: 0.10 s a step, 1.00 GiB of memory. Nothing was written.")
    sys.exit()

stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
folder, steps = options.output_dir, config["max_train_steps"]
position = max((int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*")), default=0)


def tell(kind: str, step: int, **fields) -> None:
    with open(folder / "events.jsonl", "a") as file:
        file.write(json.dumps({"type": kind, "step": step, "time": time.time(), **fields}) + "\n")


tell("start", position, max_train_steps=steps)
for step in range(position, steps):
    time.sleep(config.get("wait", 0.05))
    tell("scalars", step, loss=1 / (step + 1), grad_norm=1.0)
    (folder / "samples").mkdir(exist_ok=True)
    path = folder / "samples" / f"{step:06d}_validation.png"
    Image.new("RGB", (32, 32), (7 * step % 256, 80, 160)).save(path)
    tell("images", step, name="validation", path=path.relative_to(folder).as_posix())
    if stopped or step + 1 == steps:
        (folder / f"checkpoint-{step + 1}").mkdir()
    if stopped:
        tell("stop", step, signal=15)
        sys.exit(143)
weights = "pytorch_lora_weights.safetensors"
style = folder.parent / "style" / weights  # of tests/app_server.py, which can be drawn with
(folder / weights).write_bytes(style.read_bytes() if style.is_file() else b"0" * 100)
tell("finish", steps - 1, reason=None)
