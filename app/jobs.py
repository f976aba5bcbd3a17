"""Trainings: processes of their own, which outlive the page, and everything that is known of them from their folders.

A run is `<folder>/<method>/<name>`. The page writes job.yaml (its config) and job.json (which process trains) there;
the trainer writes all else. Nothing is kept in memory, so a page that is started again sees what the one before saw.
"""

import functools
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from alignkit.artifacts import load_json, read_events, remove, save_json
from app import safety

try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("alignprop", "controlnetpp", "neti", "customize")
CONFIG, RECORD, LOG = "job.yaml", "job.json", "log.txt"
CACHE = ".cache"  # of the page's folder: what browsers are given
ARTIFACTS = (".safetensors", ".json", ".jsonl", ".yaml", ".png", ".md", ".txt")
START = threading.Lock()
STEPS_OF_BAR = re.compile(r"\| (\d+)/(\d+) \[[\d:]+<([\d:]+|\?)")  # in tqdm's bar: done, of, time left
_measured: set[Path] = set()  # folders in which a dry run is at work
_took: dict[tuple[str, str], float] = {}  # seconds of the newest dry run of a method and a base


@dataclass(frozen=True)
class Status:
    """state: running, finished, stopped (can be resumed), or failed. message: why, in a sentence."""

    state: str
    step: int = 0
    max_steps: int = 0
    seconds_left: float | None = None
    message: str = ""

    def __str__(self) -> str:
        text = f"**{self.state}**, {self.step} of {self.max_steps} steps" if self.max_steps else f"**{self.state}**"
        if self.state == "running" and not self.step:
            text = "**running**, getting ready"
        if self.seconds_left is not None:
            text += f", {duration(self.seconds_left)} left"
        return f"{text}. {self.message}".strip()


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


# Starting and stopping


def start(
    folder: Path, method: str, name: str, config: str, bases: Mapping[str, str], base_config: str | None = None
) -> str:
    """Starts a training with this YAML; returns the run's name, such as "alignprop/mine".

    base_config: where the configs of those bases are that are files.
    """
    if method not in METHODS:
        raise ValueError(f"There is no trainer {method!r}: {', '.join(METHODS)}.")
    safety.inside(folder, name)  # for a sentence about the name alone
    run = f"{method}/{name}"
    path = safety.inside(folder, run)
    config = _checked(folder, config, bases, base_config)
    with START:
        _refuse_second(folder)
        if path.exists():
            raise ValueError(f"There is a run called {name} already: resume it, delete it, or choose another name.")
        path.mkdir(parents=True)
        (path / CONFIG).write_text(config, encoding="utf-8")
        _spawn(path, method)
    return run


def resume(folder: Path, run: str, bases: Mapping[str, str], base_config: str | None = None) -> None:
    """The same command again, which goes on from the newest checkpoint."""
    path = find(folder, run)
    if not (path / CONFIG).is_file() or run.partition("/")[0] not in METHODS:
        raise ValueError(f"{run} was not started here: resume it by the command that started it.")
    _checked(folder, (path / CONFIG).read_text(encoding="utf-8"), bases, base_config)
    with START:
        _refuse_second(folder)
        _spawn(path, run.partition("/")[0])


def stop(folder: Path, run: str) -> None:
    """Asks the training to save and end after its current step."""
    process = running(find(folder, run))
    if process is None:
        raise ValueError(f"{run} is not being trained.")
    process.send_signal(signal.SIGTERM)  # trainers take it as Ctrl-C; but no shell makes a process deaf to it


def dry_run(
    folder: Path, method: str, config: str, bases: Mapping[str, str], base_config: str | None = None
) -> Iterator[str]:
    """Two steps without a trace.

    Yields how far it is, in words that end in "…", and at last time and memory. Closing it ends the process.
    """
    if method not in METHODS:
        raise ValueError(f"There is no trainer {method!r}: {', '.join(METHODS)}.")
    config = _checked(folder, config, bases, base_config)
    scratch = folder / ".dry-run" / str(threading.get_ident())
    key = (method, safety.read_config(config).get("pretrained_model_name_or_path", "emoji"))
    with START:
        _refuse_second(folder)
        _measured.add(folder)
    process, started = None, time.monotonic()
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        (scratch / CONFIG).write_text(config, encoding="utf-8")
        with open(scratch / LOG, "wb") as log:
            process = _popen([*_command(scratch, method), "--dry_run", "true"], log)
        while process.poll() is None:
            yield _measuring(_log_lines(scratch), time.monotonic() - started, _took.get(key))
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                continue
        lines = _log_lines(scratch)
        found = [line for line in lines if line.startswith("dry run:")]
        if process.returncode or not found:
            raise ValueError(_last_words(lines))
        _took[key] = time.monotonic() - started
        yield "\n\n".join(found)
    finally:
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()
        _measured.discard(folder)
        remove(scratch)


def _measuring(log: list[str], seconds: float, took: float | None) -> str:
    """How far a dry run is. `took`: seconds of the one before, by which the time left is told; else by the steps."""
    bar = STEPS_OF_BAR.search(log[-1]) if log else None
    stage, left = "getting ready", None
    if bar:
        done, total = int(bar[1]), int(bar[2])
        stage = f"step {done + 1} of {total}" if done < total else "drawing a validation"
        if 0 < done < total:
            units = zip(reversed(bar[3].split(":")), (1, 60, 3600), strict=False)
            left = sum(int(number) * unit for number, unit in units)
    if took:
        left = took - seconds if took > seconds else None
    told = f", {duration(left)} left" if left is not None else ""
    return f"Dry run: {stage}, {seconds:.0f} s so far{told}…"


def delete(folder: Path, run: str) -> None:
    path = find(folder, run)
    if running(path):
        raise ValueError(f"{run} is being trained: stop it first.")
    remove(path)
    remove(_packed(folder, run))


def _checked(folder: Path, config: str, bases: Mapping[str, str], base_config: str | None = None) -> str:
    """The YAML, with the base's place where it has the page's name for it, and with where the configs of a file are."""
    data = safety.read_config(config)
    # the page's own place is not the visitor's: it stands there once the training was started
    check(folder, {key: value for key, value in data.items() if (key, value) != ("base_config", base_config)}, bases)
    base = data.get("pretrained_model_name_or_path", "emoji")
    place = bases.get(base, base)
    changed = {} if place == base else {"pretrained_model_name_or_path": place}
    if not data.get("base_config") and (configs := config_of_base(place, base_config)):
        changed["base_config"] = configs
    return set_values(config, changed) if changed else config


def config_of_base(place: str, base_config: str | None) -> str | None:
    """What goes with a base as its config: nothing, unless it is one file."""
    return base_config if Path(place).is_file() else None


def check(folder: Path, config: dict[str, Any], bases: Mapping[str, str]) -> None:
    """Refuses a config that reaches out of the page."""
    safety.check_config(config, ROOT, [ROOT / "configs", folder], {*bases, *bases.values()}, _models_of_presets())


@functools.cache
def _models_of_presets() -> frozenset[str]:
    """What the project's own configs name beside bases and data: judges and ControlNets of the Hub, a palette."""
    data = safety.PATHS - {"controlnet_model_name_or_path"} | {"output_dir"}
    configs = [safety.read_config(text) for method in METHODS for text in presets(method).values()]
    return frozenset(value for config in configs for key, _, value in safety.leaves(config) if key not in data)


def busy(folder: Path) -> str | None:
    """What the machine is needed for, as the beginning of a sentence."""
    run = next((run for run in runs(folder) if running(folder / run)), None)
    if run:
        return f"{run} is being trained"
    return "A dry run is measuring what a training takes" if folder in _measured else None


def _refuse_second(folder: Path) -> None:
    if reason := busy(folder):
        raise ValueError(f"{reason}: one training at a time, so wait for it or stop it.")


def _command(path: Path, method: str) -> list[str]:
    script = ROOT / "training" / f"{method}.py"
    return [sys.executable, str(script), "--config", str(path / CONFIG), "--output_dir", str(path)]


def _popen(command: list[str], log: Any) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    return subprocess.Popen(
        command,
        cwd=ROOT,  # configs name their files from there
        env=environment | {"PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # neither Ctrl-C nor the end of the page's terminal reaches it
    )


def _spawn(path: Path, method: str) -> None:
    with open(path / LOG, "wb") as log:  # of this process alone, as its last words say how it ended
        process = _popen(_command(path, method), log)
    born = psutil.Process(process.pid).create_time()  # a pid alone may be another process by tomorrow
    save_json({"pid": process.pid, "born": born}, path / RECORD)
    threading.Thread(target=process.wait, daemon=True).start()  # else it stays a zombie as long as the page lives


# Looking


def running(path: Path) -> psutil.Process | None:
    """The process that trains there, also one that was started by a command."""
    try:
        record = load_json(path / RECORD)
        process = psutil.Process(record["pid"])
        if process.create_time() == record["born"] and process.status() != psutil.STATUS_ZOMBIE:
            return process
    except (psutil.Error, ValueError, TypeError, KeyError):  # none, or a damaged record
        pass
    holder = _holder(path / ".lock")
    return psutil.Process(holder) if holder and psutil.pid_exists(holder) else None


def _holder(lock: Path) -> int | None:
    """The process that holds the lock which a trainer takes on its folder. Asks without taking it."""
    if sys.platform != "linux" or not lock.is_file():
        return None
    kind = "hhqqi"  # struct flock: type, whence, start, length, process
    with open(lock, "rb+") as file:
        found = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(kind, fcntl.F_WRLCK, 0, 0, 0, 0))
    state, *_, process = struct.unpack(kind, found)
    return None if state == fcntl.F_UNLCK else process


def runs(folder: Path) -> list[str]:
    """Names of all runs, the newest first."""
    return [name for name in folders(folder) if _is_run(folder / name)]


def folders(folder: Path) -> list[str]:
    """Names of all folders that may be runs, or hold what other tools made; the one that changed last first."""
    found = [p for pattern in ("*", "*/*") for p in folder.glob(pattern) if p.is_dir()]
    found = [p for p in found if all(safety.NAME.fullmatch(part) for part in p.relative_to(folder).parts)]
    return [p.relative_to(folder).as_posix() for p in sorted(found, key=_changed, reverse=True)]


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (CONFIG, "events.jsonl"))


def _changed(path: Path) -> float:
    files = [path / name for name in (CONFIG, "events.jsonl")]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)  # none, if it is being deleted


def find(folder: Path, run: str) -> Path:
    path = safety.inside(folder, run or "")
    if not _is_run(path):
        raise ValueError(f"There is no run {run}.")
    return path


def status(folder: Path, run: str) -> Status:
    path = find(folder, run)
    events = read_events(path / "events.jsonl")
    begun = [event for event in events if event["type"] == "start"]
    max_steps = begun[-1]["max_train_steps"] if begun else 0
    ends = ("scalars", "checkpoint", "stop", "finish")  # scalars are logged every so many steps
    position = max((event["step"] + 1 for event in events if event["type"] in ends), default=0)
    if running(path):
        return Status("running", position, max_steps, _seconds_left(events, max_steps))
    last = next((event for event in reversed(events) if event["type"] in ("finish", "stop", "error", "start")), None)
    if last and last["type"] == "finish":
        return Status("finished", position, max_steps, message=last.get("reason") or "")
    if last and last["type"] == "error":
        return Status("failed", position, max_steps, message=last["message"])
    if last and last["type"] == "stop":
        saved = f"It was saved after step {last['step'] + 1}; resume goes on from there."
        return Status("stopped", position, max_steps, message=saved)
    lines = _log_lines(path)
    if any(line.startswith(("error:", "Traceback")) for line in lines):
        return Status("failed", position, max_steps, message=_last_words(lines))
    return Status("stopped", position, max_steps, message="Its process is gone; resume goes on from its checkpoint.")


def _seconds_left(events: list[dict], max_steps: int) -> float | None:
    """By the pace of the last hundred logged steps since the newest start; of the first one, since that start."""
    first = max((i for i, event in enumerate(events) if event["type"] == "start"), default=None)
    if first is None:
        return None
    done = [(event["step"] + 1, event["time"]) for event in events[first:] if event["type"] == "scalars"][-100:]
    if len(done) == 1:
        done.insert(0, (events[first]["step"], events[first]["time"]))
    if not done or done[-1][0] == done[0][0]:
        return None
    pace = (done[-1][1] - done[0][1]) / (done[-1][0] - done[0][0])
    return pace * (max_steps - done[-1][0])


def curves(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """Rows {run, step, curve, value} of all scalars of these runs."""
    rows = []
    for run in names:
        for event in read_events(find(folder, run) / "events.jsonl"):
            if event["type"] == "scalars":
                for name, value in event.items():
                    if name not in ("type", "step", "time") and value is not None:
                        rows.append({"run": run, "step": event["step"] + 1, "curve": name, "value": value})
    return rows


def samples(folder: Path, run: str) -> list[tuple[str, str]]:
    """(path, caption) of its pictures, the newest first."""
    path = find(folder, run)
    shown = [event for event in read_events(path / "events.jsonl") if event["type"] == "images"]
    found = [(path / event["path"], f"{event['name']} at step {event['step'] + 1}") for event in reversed(shown)]
    found = [(picture, caption) for picture, caption in found if picture.parent == path / "samples"]
    return [(str(picture), caption) for picture, caption in found if picture.is_file()]


def artifacts(folder: Path, run: str) -> list[str]:
    """The files of a run that are worth having, without checkpoints; folders of weights, such as unet/, as zips."""
    path = find(folder, run)
    there = [file for file in sorted(path.iterdir()) if not file.name.startswith(".") and not file.is_symlink()]
    files = [str(file) for file in there if file.is_file() and file.suffix in ARTIFACTS]
    packed = _packed(folder, run)
    for part in there:
        if any(part.glob("*.safetensors")) and not part.name.startswith("checkpoint-"):
            packed.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(packed / f"{part.name}.zip", "w") as archive:  # stored: weights do not get smaller
                for file in sorted(part.rglob("*")):
                    if file.is_file() and not file.is_symlink():
                        archive.write(file, file.relative_to(path))
            files.append(str(packed / f"{part.name}.zip"))
    return files


def _packed(folder: Path, run: str) -> Path:
    return folder / CACHE / "packed" / run


def log_tail(folder: Path, run: str, lines: int = 30) -> str:
    return "\n".join(_log_lines(find(folder, run))[-lines:])


def _log_lines(path: Path) -> list[str]:
    """Of the end of the log; of a progress bar, which overwrites itself, the last state."""
    file = path / LOG
    if not file.is_file():
        return []
    with open(file, "rb") as log:
        log.seek(max(0, file.stat().st_size - 50_000))
        text = log.read().decode("utf-8", "replace")
    return [line.rsplit("\r", 1)[-1] for line in text.replace("\r\n", "\n").split("\n") if line.strip()]


def _last_words(lines: list[str]) -> str:
    """The sentence a trainer ended with."""
    said = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    if said:
        return " ".join(lines[said[-1] :]).removeprefix("error: ")
    return lines[-1] if lines else "It ended without a word."


def config_of(folder: Path, run: str) -> str:
    path = find(folder, run)
    file = next((path / name for name in ("config.yaml", CONFIG) if (path / name).is_file()), None)
    return file.read_text(encoding="utf-8") if file else ""


def presets(method: str) -> dict[str, str]:
    """Name -> YAML of the configs that come with the project."""
    files = sorted((ROOT / "configs" / method).glob("*.yaml"), key=lambda p: (not p.stem.startswith("emoji"), p.stem))
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


def set_values(config: str, values: dict[str, Any]) -> str:
    """The YAML with these dotted keys set, and with its comments, unless a key is written in an unusual way."""
    data, text = safety.read_config(config), config
    for key, value in values.items():
        *blocks, name = key.split(".")
        block = data
        for part in blocks:
            block = block.setdefault(part, {})
        block[name] = value
        text = _with_line(text, blocks, name, value)
    try:
        kept = safety.read_config(text) == data
    except ValueError:
        kept = False
    return text if kept else yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _with_line(text: str, blocks: list[str], name: str, value: Any) -> str:
    """With the value in the line `name: ...` below those of its blocks, or in a new last line."""
    said = yaml.safe_dump(value, allow_unicode=True).removesuffix("...\n").strip()
    above = "".join(rf"{re.escape(block)}:.*\n(?:[ #].*\n|\n)*?[ ]+" for block in blocks)
    line = rf"(?m)^({above}{re.escape(name)}:)[^#\n]*?([ ]*(?:#.*)?)$"
    text, found = re.subn(line, lambda match: f"{match[1]} {said}{match[2]}", text, count=1)
    return text if found else f"{text.rstrip()}\n{name}: {said}\n"
