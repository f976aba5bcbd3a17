"""Prompt files and image folders."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Prompts:
    """Prompts and, beside them, one value each in every column (a count, an object, a reference image)."""

    prompts: list[str]
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, indices: Sequence[int]) -> "Prompts":
        """The rows of these indices, in their order, repetitions included."""
        columns = {name: [values[i] for i in indices] for name, values in self.columns.items()}
        return Prompts([self.prompts[i] for i in indices], columns)


def read_prompts(path: str | Path) -> Prompts:
    """Reads a .txt (a prompt a line) or .jsonl (an object with `prompt`, and the same other keys in every line).

    Empty lines are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, no prompt in it, or a line that is not as it should be; it names the line.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"Expected a prompt file that ends in .txt or .jsonl, got {path}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no prompt file {path} (seen from {Path.cwd()}).")
    text = path.read_text(encoding="utf-8-sig")
    lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"The prompt file {path} is empty: expected a prompt a line.")
    if path.suffix == ".txt":
        return Prompts([line.strip() for _, line in lines], {})

    rows = [_parse_row(line, f"{path}, line {number}") for number, line in lines]
    for (number, _), row in zip(lines, rows, strict=True):
        if row.keys() != rows[0].keys():
            raise ValueError(
                f"{path}, line {number}: expected the keys of the first line, {sorted(rows[0])}, got {sorted(row)}. "
                "Write null where a line has no value."
            )
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return Prompts(columns.pop("prompt"), columns)


def _parse_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}).") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ValueError(f'{where}: expected an object such as {{"prompt": "a cat"}}, got {line.strip()}')
    return row


def read_images(folder: str | Path, height: int, width: int, at_least: int = 1) -> "Tensor":
    """The images of a folder, [N, 3, height, width] in [0, 1], in the order of their names.

    The shorter side is scaled to fit and the rest cut off, so that the aspect is kept. Orientation tags are applied;
    what is transparent becomes white.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: fewer images than `at_least`, one that cannot be read, is smaller than half of the size, or is there
            twice; it names the file.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no image folder {folder} (seen from {Path.cwd()}).")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(files) < at_least or not files:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"{folder}: expected at least {max(1, at_least)} images ({kinds}), found {len(files)}.")
    images, seen = [], {}
    for file in files:
        try:
            with Image.open(file) as image:
                image = ImageOps.exif_transpose(image).convert("RGBA")
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{file} cannot be read as an image: {error}") from error
        if image.width < width / 2 or image.height < height / 2:
            raise ValueError(f"{file} is {image.width} x {image.height} pixels: too small for {width} x {height}.")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        twin = seen.setdefault(image.tobytes(), file)
        if twin != file:
            raise ValueError(f"{file} is the same image as {twin}: remove one of them.")
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
        images.append(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255)
    return torch.stack(images)
