"""Two processes, for the tests that two ranks equal one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from alignkit import config
from alignkit.artifacts import read_events
from alignkit.config import RunConfig

ROOT = Path(__file__).parent.parent


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    """Runs a script, or `-m module`, with its arguments on two processes of one thread."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def train_on_two_ranks(script: str, cfg: RunConfig) -> Path:
    """Trains by the script itself: calls past what synchronises gradients would end elsewhere. Returns the folder."""
    file = Path(cfg.output_dir).with_suffix(".yaml")
    config.save(cfg, file)
    done = torchrun(script, "--config", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    folder = Path(cfg.output_dir)
    (start,) = (event for event in read_events(folder / "events.jsonl") if event["type"] == "start")
    assert start["num_processes"] == 2
    return folder
