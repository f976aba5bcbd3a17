"""Prompt files and image folders."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps

# What Pillow raises of a picture that it cannot read; SyntaxError is of a broken PNG.
UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)


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
    lines = numbered_lines(path)
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


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not empty, with their numbers.

    Not by `splitlines`, which also cuts at U+2028 and its kin, that JSON may hold within a string. Raises ValueError
    for a file that is not UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as such.") from error
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _parse_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}).") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ValueError(f'{where}: expected an object such as {{"prompt": "a cat"}}, got {line.strip()}')
    return row


# Image folders

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class ConceptImage:
    """A training image; its caption from `<name>.txt` beside it, and its mask from `masks/<name>.png`, if there are."""

    path: Path
    caption: str | None = None
    mask: Path | None = None


def read_concept_images(
    folder: str | Path, resolution: int, placeholder_token: str | None = None
) -> tuple[list[ConceptImage], list[str]]:
    """The images of a concept in the order of their names, checked; and what is odd but harmless, in sentences.

    In a plan, a sprite stands in for a folder that is not there.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no image in it; images that cannot be read, or are under a quarter of `resolution` (all are named);
            a mask of another size; a caption without the placeholder.
    """
    from alignkit import emoji, plan

    folder = Path(folder)
    if plan.predicting() and not folder.exists():
        odd = [f"There is no {folder}: a sprite stands in for its images."]
        return [ConceptImage(emoji.SPRITE_DIR / "cat.png")], odd
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder of images {folder} (seen from {Path.cwd()}).")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not paths:
        raise ValueError(
            f"No image in {folder}: expected 3 to 8 files that end in {', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    images, wrong, odd, seen = [], [], [], {}
    for path in paths:
        found, image, problems = check_concept_image(path, resolution, placeholder_token)
        images.append(found)
        wrong += problems
        if image is None:
            continue
        if not problems and min(image.size) < resolution:
            odd.append(f"{path.name} is enlarged from {image.width} x {image.height} to {resolution} pixels.")
        same = seen.setdefault(image.resize((16, 16)).tobytes(), path.name)
        if same != path.name:
            odd.append(f"{path.name} shows what {same} shows: a duplicate only counts twice.")
    if wrong:
        raise ValueError(f"{folder} has {len(wrong)} files that cannot be used: {'; '.join(wrong)}.")
    if len(images) < 3:
        odd.append(f"{folder} holds {len(images)} images: with fewer than 3, the background is learnt as well.")
    return images, odd


def check_concept_image(
    path: Path, resolution: int, placeholder_token: str | None = None
) -> tuple[ConceptImage, Image.Image | None, list[str]]:
    """The image with its caption and mask; its pixels, None where they cannot be read; what is wrong, in sentences."""
    mask, text = path.parent / "masks" / f"{path.stem}.png", path.with_suffix(".txt")
    wrong = []
    try:
        caption = " ".join(text.read_text(encoding="utf-8").split()) if text.is_file() else None
    except UnicodeDecodeError as error:
        caption = None
        wrong.append(f"{text.name} is not UTF-8 ({error.reason} at byte {error.start}): save it as such")
    found = ConceptImage(path, caption, mask if mask.is_file() else None)
    try:
        image = open_image(path)
    except (ValueError, *UNREADABLE) as error:
        return found, None, [f"{path.name} cannot be read ({error})"]
    if 4 * min(image.size) < resolution:
        wrong.append(f"{path.name} has {image.width} x {image.height} pixels: expected at least {resolution // 4}")
    if found.mask:
        try:
            size = open_image(mask).size
            if size != image.size:
                wrong.append(f"masks/{mask.name} has another size than {path.name}")
        except (ValueError, *UNREADABLE) as error:
            wrong.append(f"masks/{mask.name} cannot be read ({error})")
    if caption is not None and placeholder_token and not re.search(word_pattern(placeholder_token), caption):
        wrong.append(f"{text.name} does not hold the placeholder {placeholder_token}: {caption!r}")
    return found, image, wrong


def word_pattern(name: str) -> str:
    """A pattern for a concept's name in a text: "thing" is not in "things"; "<thing>" is in "<thing>s", as tokenizers
    read it, but not in "<thing>_1", which is another's."""
    starts, ends = (letter.isalnum() or letter == "_" for letter in (name[0], name[-1]))
    return (r"(?<!\w)" if starts else "") + re.escape(name) + (r"(?!\w)" if ends else r"(?!_\d)")


def open_image(path: str | Path) -> Image.Image:
    """The picture as people see it: turned as its EXIF says, RGB, transparency on white."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # which Pillow cuts at 255: nearly all of it would be white
            image = image.point(lambda value: value / 256).convert("L")
        if image.mode == "P" or "A" in image.getbands():
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def image_shape(path: str | Path) -> tuple[int, int]:
    """(height, width) of the picture as people see it, from the file's header."""
    with Image.open(path) as image:
        width, height = image.size
        lies = image.getexif().get(ExifTags.Base.Orientation, 1) > 4  # to be turned by a quarter
    return (width, height) if lies else (height, width)


def load_image(path: str | Path, resolution: int) -> Any:
    """[3, resolution, resolution] in [0, 1]: the shorter side is scaled to the resolution, the middle is kept."""
    return to_tensor(ImageOps.fit(open_image(path), (resolution, resolution), Image.Resampling.BICUBIC))


def to_tensor(picture: Image.Image) -> Any:
    """[3, H, W] in [0, 1] of an RGB picture."""
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)


def check_concept(folder: str | Path, resolution: int = 512, placeholder_token: str | None = None) -> list[str]:
    """What `alignkit data check` says of a folder of a concept's images; raises where it cannot be trained on."""
    images, odd = read_concept_images(folder, resolution, placeholder_token)
    captions, masks = sum(i.caption is not None for i in images), sum(i.mask is not None for i in images)
    return [f"{len(images)} images, {captions} with a caption, {masks} with a mask.", *odd]


# Images of several shapes

MAX_ASPECT = 2


def bucket_sizes(size: tuple[int, int], multiple: int) -> list[tuple[int, int]]:
    """Heights and widths that images of any aspect up to 2 : 1 are trained at: multiples of `multiple` pixels, of each
    height the widest with no more pixels than `size`, and the same lying down.

    Raises:
        ValueError: `size` itself is no multiple.
    """
    if any(side % multiple for side in size):
        raise ValueError(f"Images of several sizes have sides in multiples of {multiple} pixels, got {size}.")
    area, found = math.prod(size), {size}
    for height in range(multiple, area // multiple + 1, multiple):
        width = area // height // multiple * multiple
        if width and max(height, width) <= MAX_ASPECT * min(height, width):
            found |= {(height, width), (width, height)}
    return sorted(found)


@dataclass(frozen=True)
class Buckets:
    """Which image a sample is, so that a batch has images of one size: NovelAI's aspect buckets, without a state.

    `batch_size` samples in a row are of one bucket. N such groups make a cycle, N the number of images: each image
    leads one, in a shuffled order, and the group is of that image's bucket. So a bucket of n images has n groups, in
    which each of its images comes `batch_size` times: all images come equally often, and none is left out.
    """

    shapes: Sequence[tuple[int, int]]
    """(height, width) of every image."""
    choices: Sequence[tuple[int, int]]
    """Of `bucket_sizes`."""
    batch_size: int

    @cached_property
    def numbers(self) -> Any:
        """[N]: the bucket of each image, as its place in `choices`: the nearest aspect, by its logarithm."""
        import torch

        logs = torch.tensor([math.log(height / width) for height, width in self.choices], dtype=torch.float64)
        own = torch.tensor([math.log(height / width) for height, width in self.shapes], dtype=torch.float64)
        return (own[:, None] - logs).abs().argmin(1)

    @cached_property
    def members(self) -> list[Any]:
        """The images of each bucket."""
        return [(self.numbers == number).nonzero().flatten() for number in range(len(self.choices))]

    def size(self, row: int) -> tuple[int, int]:
        """(height, width) that an image is trained at."""
        return self.choices[int(self.numbers[row])]

    def row(self, index: int, permutation: Callable[[int, int, str], Any]) -> int:
        """The image of a sample, by its global index; `permutation` is `Run`'s."""
        group, offset = divmod(index, self.batch_size)
        cycle, position = divmod(group, len(self.numbers))
        buckets = self.numbers[permutation(len(self.numbers), cycle, "buckets")[: position + 1]]
        number = int(buckets[-1])
        members = self.members[number]
        before = cycle * len(members) + int((buckets[:-1] == number).sum())
        epoch, place = divmod(before * self.batch_size + offset, len(members))
        return int(members[permutation(len(members), epoch, f"bucket {number}")[place]])
