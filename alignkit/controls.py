"""Images with prompts and controls to train a ControlNet on: a folder of images, or scenes of the emoji world.

A folder holds `metadata.jsonl`, an object a line, with paths that are relative to it:

    {"image": "images/0001.jpg", "text": "a cat on a sofa", "label": "labels/0001.png"}

`image` may be called `file_name`, as in Hugging Face's image folders; `text` may be a list, of which one is drawn each
time. The control's key is the condition's `column` (label, depth, softedge, lineart) or another that the config names;
where it is absent, the control is extracted from the image.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from alignkit import plan
from alignkit.conditions import Condition
from alignkit.data import UNREADABLE, image_shape, numbered_lines, open_image, to_tensor
from alignkit.emoji import SPRITE_DIR

METADATA = "metadata.jsonl"
SHOWN_ERRORS = 5


class Example(NamedTuple):
    image: Tensor  # [3, H, W] in [0, 1]
    target: Tensor | None  # [H, W]; None: to be extracted from the image
    prompt: str


class Controls(Protocol):
    """What a trainer draws from."""

    size: int | None
    """Number of rows; None where every row is new."""

    def shapes(self) -> list[tuple[int, int]]:
        """(height, width) of every row's image; none where every row is new."""

    def prompts(self) -> list[str]:
        """All there are, as far as they are known."""

    def prompt(self, row: int, generator: torch.Generator) -> str:
        """What `example` of a fresh generator of the same state would say."""

    def example(self, row: int, size: tuple[int, int], generator: torch.Generator) -> Example:
        """A row at (height, width); chance comes from the generator."""


def open_controls(
    data_dir: str, condition: Condition, column: str | None = None, crop: Literal["center", "random"] = "center"
) -> Controls:
    """`data_dir`: "emoji" or a folder. Everything in a folder is checked first.

    In a plan, a sprite stands in for a folder that is not there.

    Raises:
        ValueError: with the first few files that cannot be used, and why.
    """
    if data_dir == "emoji":
        return SceneControls(column or condition.column)
    if plan.predicting() and not Path(data_dir).exists():
        print(f"There is no {data_dir}: a sprite stands in for its images.", flush=True)
        return FolderControls([Row(SPRITE_DIR / "cat.png", ["a cat"], None)], condition, crop)
    rows, findings = check_folder(data_dir, condition, column)
    errors = [f"{finding.path}: {finding.why}" for finding in findings if finding.state == "error"]
    if errors:
        more = f"\n  and {len(errors) - SHOWN_ERRORS} more" if len(errors) > SHOWN_ERRORS else ""
        lines = "".join(f"\n  {error}" for error in errors[:SHOWN_ERRORS])
        raise ValueError(
            f"{len(errors)} of the files that {data_dir}/{METADATA} names cannot be used:{lines}{more}\n"
            "`alignkit data check` says it of every file."
        )
    return FolderControls(rows, condition, crop)


class Row(NamedTuple):
    image: Path
    texts: list[str]
    target: Path | None
    others: Mapping[str, Path] = MappingProxyType({})  # that its line names by keys that are not read


class Finding(NamedTuple):
    path: str
    state: Literal["used", "unused", "error"]
    why: str


@dataclass
class FolderControls:
    """The rows of a folder that was checked."""

    rows: list[Row]
    condition: Condition
    crop: Literal["center", "random"] = "center"

    @property
    def size(self) -> int:
        return len(self.rows)

    def summary(self, column: str | None) -> str:
        extracted = sum(row.target is None for row in self.rows)
        return f"{self.size - extracted} controls from files under {column!r}, {extracted} extracted from their images"

    def shapes(self) -> list[tuple[int, int]]:
        with ThreadPoolExecutor() as pool:
            return list(pool.map(image_shape, [row.image for row in self.rows]))

    def prompts(self) -> list[str]:
        return sorted({text for row in self.rows for text in row.texts})

    def prompt(self, row: int, generator: torch.Generator) -> str:
        texts = self.rows[row].texts
        return texts[int(torch.randint(len(texts), (), generator=generator))]

    def example(self, row: int, size: tuple[int, int], generator: torch.Generator) -> Example:
        prompt = self.prompt(row, generator)
        at = torch.rand(2, generator=generator).tolist() if self.crop == "random" else (0.5, 0.5)
        image = fit_to(read_image(self.rows[row].image), size, at).clamp(0, 1)
        path = self.rows[row].target
        target = None if path is None else fit_to(read_target(path, self.condition)[None], size, at)[0]
        return Example(image, target, prompt)


@dataclass
class SceneControls:
    """Scenes that the emoji world's base is trained on, drawn anew for every row, with exact labels and depths."""

    column: str | None
    size = None

    def shapes(self) -> list[tuple[int, int]]:
        return []

    def prompts(self) -> list[str]:
        return []

    def prompt(self, row: int, generator: torch.Generator) -> str:
        return self.draw(generator)[2]

    def draw(self, generator: torch.Generator):
        from alignkit.emoji import captions, scenes

        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        scene = scenes.World().draw(rng)
        return scene, rng, captions.caption(scene, rng)

    def example(self, row: int, size: tuple[int, int], generator: torch.Generator) -> Example:
        from alignkit.emoji import fit, scenes

        scene, rng, prompt = self.draw(generator)
        rendered = scenes.render(scene, rng)
        maps = {"label": rendered.class_map, "depth": rendered.depth}
        image = fit.to_float(rendered.image[None])[0]
        target = torch.from_numpy(maps[self.column]) if self.column in maps else None
        center = (0.5, 0.5)
        target = None if target is None else fit_to(target[None], size, center)[0]
        return Example(fit_to(image, size, center).clamp(0, 1), target, prompt)


def fit_to(picture: Tensor, size: tuple[int, int], at: tuple[float, float]) -> Tensor:
    """[C,h,w] -> [C,H,W], aspect kept: resized to cover `size`, cut at the share `at` (y, x) of what is over.

    Integers by nearest neighbour, so that no class appears that was not there; floats by antialiased interpolation.
    """
    height, width = picture.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    resized = tuple(max(round(side * scale), wanted) for side, wanted in zip((height, width), size, strict=True))
    if resized != (height, width):
        if picture.is_floating_point():
            picture = F.interpolate(picture[None], size=resized, mode="bilinear", antialias=True)[0]
        else:
            picture = F.interpolate(picture[None].double(), size=resized, mode="nearest-exact")[0].to(picture.dtype)
    top, left = (round((there - wanted) * a) for there, wanted, a in zip(resized, size, at, strict=True))
    return picture[:, top : top + size[0], left : left + size[1]]


def read_image(path: Path) -> Tensor:
    """[3,H,W] in [0,1], as people see it."""
    return to_tensor(open_image(path))


def read_target(path: Path, condition: Condition) -> Tensor:
    """[H,W], as the condition reads it."""
    with Image.open(path) as picture:
        return condition.read(picture)


# The check


def check_folder(
    folder: str | os.PathLike, condition: Condition | None = None, column: str | None = None
) -> tuple[list[Row], list[Finding]]:
    """Reads every image, and every control where a condition is given.

    Returns the usable rows, and of every file whether and why it is used.

    Raises:
        ValueError, FileNotFoundError: there is no metadata.jsonl, or nothing in it, or a line is not as it should be,
            or none has the `column` that was asked for.
    """
    folder = Path(folder)
    named = list(read_metadata(folder, column or (condition and condition.column)))
    unread = {path.resolve(): key for row, _ in named for key, path in row.others.items()}
    if column and not any(row.target for row, _ in named):
        there = ", ".join(sorted(set(unread.values()))) or "none"
        raise ValueError(f"{folder / METADATA}: expected controls under {column!r}, got none; other keys: {there}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checks = pool.map(lambda row: check_row(row, condition), [row for row, _ in named])
        problems = list(tqdm(checks, "checking the data", len(named), disable=len(named) < 1000, leave=False))
    findings, usable = [], []
    for (row, where), (path, problem) in zip(named, problems, strict=True):
        if problem:
            findings.append(Finding(str(path), "error", f"{problem} ({where})"))
            continue
        usable.append(row)
        how = "as an image" if condition is None else f"control {row.target}" if row.target else "control extracted"
        findings.append(Finding(str(row.image), "used", how))
    mentioned = {path.resolve() for row, _ in named for path in (row.image, row.target) if path}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != METADATA and path.resolve() not in mentioned:
            key = unread.get(path.resolve())
            why = f"{METADATA} names it as {key!r}, which is not read" if key else f"not named in {METADATA}"
            findings.append(Finding(str(path), "unused", why))
    return usable, findings


def read_metadata(folder: Path, column: str | None) -> Iterator[tuple[Row, str]]:
    """Rows, and where they stand."""
    path = folder / METADATA
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {path} (seen from {Path.cwd()}): expected a line such as "
            '{"image": "0001.jpg", "text": "a cat"} for every image.'
        )
    numbered = numbered_lines(path)
    if not numbered:
        raise ValueError(f"{path} is empty: expected a line for every image.")
    for number, line in numbered:
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error}).") from error
        entry = entry if isinstance(entry, dict) else {}
        image, texts = entry.get("image", entry.get("file_name")), entry.get("text")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(image, str) or not isinstance(texts, list) or not texts or not all(
            isinstance(text, str) for text in texts
        ):  # fmt: skip
            raise ValueError(
                f'{where}: expected {{"image": "0001.jpg", "text": "a cat"}} (text may be a list of texts), got {line}'
            )
        target = entry.get(column) if column else None
        if target is not None and not isinstance(target, str):
            raise ValueError(f"{where}: expected a path under {column!r}, got {target!r}.")
        read = ("image", "file_name", "text", column)
        others = {key: folder / name for key, name in entry.items() if isinstance(name, str) and key not in read}
        yield Row(folder / image, texts, folder / target if target else None, others), where


def check_row(row: Row, condition: Condition | None) -> tuple[Path, str | None]:
    """The file that cannot be used, with the reason; or None for a reason."""
    image, problem = attempt(read_image, row.image)
    if problem or condition is None or row.target is None:
        return row.image, problem
    target, problem = attempt(partial(read_target, condition=condition), row.target)
    if not problem and target.shape != image.shape[-2:]:
        problem = f"expected a control of the image's size {size_of(image)}, got {size_of(target)}"
    return row.target, problem


def size_of(picture: Tensor) -> str:
    return f"{picture.shape[-1]} x {picture.shape[-2]}"


def attempt(read: Callable[[Path], Tensor], path: Path) -> tuple[Tensor | None, str | None]:
    if not path.is_file():
        return None, "there is no such file"
    try:
        return read(path), None
    except UNREADABLE as error:
        return None, f"not a readable image: {error}"
    except ValueError as error:
        return None, str(error)
