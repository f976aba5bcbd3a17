"""Uploads to train on: `<folder>/data/<name>`, written anew, so that nothing else gets in.

Pictures come one by one, with their captions in lines and maps or masks of the same names; or as a zip of a folder:

    cat.jpg  cat.txt  maps/cat.png  masks/cat.png       the caption beside a picture; its control map; its mask
    metadata.jsonl                                      or this, as `alignkit/controls.py` reads it

No name of an upload becomes a path: they only tell what belongs together.
"""

import json
import shutil
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from alignkit.artifacts import atomic
from alignkit.conditions import Condition, build_condition
from alignkit.controls import METADATA, Row, check_folder, check_row, read_metadata
from alignkit.data import check_concept, check_concept_image, read_prompts
from app import safety
from app.generate import Cancelled

PROMPTS = "prompts.txt"
MAPS, MASKS = "maps", "masks"  # folders of a set, and of a zip
MAX_UNPACKED_BYTES = 500 * 2**20
MAX_CAPTION = 2000
Finding = tuple[str, str, str]  # file, used or refused, why


@dataclass(frozen=True)
class Given:
    """An uploaded picture under the name it came with, its captions, and its control map or mask."""

    name: str
    picture: Path
    texts: tuple[str, ...] = ()
    beside: Path | None = None


Keep = Callable[[Path, str, Given], str | None]
"""Puts what belongs to `<stem>.png` into a set's folder, where the picture is, and says why it cannot be used."""


# What was uploaded


@contextmanager
def given(
    uploads: list[str], captions: str, beside: list[str], folder: str, column: str | None
) -> Iterator[list[Given]]:
    """What belongs together. folder: of a zip in which maps or masks are. column: the key of maps in its metadata."""
    zips = [upload for upload in uploads if Path(upload).suffix.lower() == ".zip"]
    if not zips:
        yield matched(uploads, captions, beside)
        return
    if len(uploads) > 1 or beside or captions.strip():
        raise ValueError("Upload one zip with all that belongs to its pictures, or pictures, not both.")
    with tempfile.TemporaryDirectory() as scratch:
        yield unpacked(Path(zips[0]), Path(scratch), folder, column)


def matched(uploads: list[str], captions: str, beside: list[str]) -> list[Given]:
    """Pictures with captions by their order, a line each or none at all, and with maps or masks by their names."""
    lines = [" ".join(line.split()) for line in captions.splitlines() if line.strip()]
    if lines and len(lines) != len(uploads):
        raise ValueError(f"Expected a caption for each of the {len(uploads)} pictures, a line each, got {len(lines)}.")
    by_name = {Path(file).stem: Path(file) for file in beside}
    if len(by_name) < len(beside):
        raise ValueError("Two of the maps or masks have the same name.")
    strangers = by_name.keys() - {Path(upload).stem for upload in uploads}
    if strangers:
        raise ValueError(
            f"There is no picture called {sorted(strangers)[0][:80]!r}: a map or mask has the name of its picture."
        )
    texts = [(line,) for line in lines] or [()] * len(uploads)
    return [
        Given(Path(upload).name, Path(upload), text, by_name.get(Path(upload).stem))
        for upload, text in zip(uploads, texts, strict=True)
    ]


def unpacked(archive: Path, scratch: Path, folder: str, column: str | None) -> list[Given]:
    """What is in a zip, with its files under numbers in `scratch`."""
    try:
        with zipfile.ZipFile(archive) as file:
            entries = _entries(file)
            contents = {name: _extract(file, entry, scratch, i) for i, (name, entry) in enumerate(entries.items())}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:  # RuntimeError: a password
        raise ValueError(f"{archive.name[:80]} is not a zip that can be read: {error}.") from error
    pictures = {name: path for name, path in contents.items() if _is_picture(name)}
    aside = {PurePosixPath(name).with_suffix("").as_posix(): path for name, path in pictures.items()}

    def beside(name: str) -> Path | None:
        return aside.get((PurePosixPath(folder) / name).with_suffix("").as_posix())

    if METADATA in contents:
        return list(_of_metadata(contents, beside, column))
    found = []
    for name, path in pictures.items():
        if PurePosixPath(name).parts[0] not in (MAPS, MASKS):
            text = contents.get(PurePosixPath(name).with_suffix(".txt").as_posix())
            caption = () if text is None else (" ".join(_read_text(text, name).split()),)
            found.append(Given(name, path, caption, beside(name)))
    return found


def _entries(file: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """By their names in the zip, without a folder that is around all of them, and without what systems put there."""
    entries = {}
    for entry in file.infolist():
        path = PurePosixPath(entry.filename.replace("\\", "/"))
        if entry.is_dir() or not path.name or any(part.startswith((".", "__MACOSX")) for part in path.parts):
            continue
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others may claim gigabytes
            raise ValueError(
                f"{entry.filename[:80]} is compressed in a rare way: make the zip with deflate, the usual."
            )
        entries[path.as_posix()] = entry
    if len(entries) > 3 * safety.MAX_FILES:
        raise ValueError(f"The zip holds {len(entries)} files: at most {3 * safety.MAX_FILES} are taken.")
    if sum(entry.file_size for entry in entries.values()) > MAX_UNPACKED_BYTES:
        raise ValueError(f"The zip holds more than {MAX_UNPACKED_BYTES // 2**20} MB when it is unpacked.")
    around = {PurePosixPath(name).parts[0] for name in entries}
    inner = all(len(PurePosixPath(name).parts) > 1 for name in entries)
    if len(around) == 1 and inner:
        entries = {PurePosixPath(*PurePosixPath(name).parts[1:]).as_posix(): entry for name, entry in entries.items()}
    return entries


def _extract(file: zipfile.ZipFile, entry: zipfile.ZipInfo, scratch: Path, number: int) -> Path:
    """As a file of ours, no longer than its head says and than any upload may be."""
    suffix = PurePosixPath(entry.filename).suffix.lower()
    path = scratch / f"{number:04d}{suffix if suffix in safety.IMAGE_SUFFIXES else ''}"
    with file.open(entry) as source:
        content = source.read(safety.MAX_FILE_BYTES + 1)
    if len(content) > safety.MAX_FILE_BYTES:
        raise ValueError(f"{entry.filename[:80]} has more than {safety.MAX_FILE_BYTES // 2**20} MB.")
    path.write_bytes(content)
    return path


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in safety.IMAGE_SUFFIXES


def _of_metadata(
    contents: dict[str, Path], beside: Callable[[str], Path | None], column: str | None
) -> Iterator[Given]:
    """The rows of a zip's metadata.jsonl, which may name files of the zip alone."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / METADATA).write_text(_read_text(contents[METADATA], METADATA), encoding="utf-8")
        try:
            rows = list(read_metadata(Path(folder), column))
        except ValueError as error:
            raise ValueError(str(error).replace(f"{folder}/", "")) from error
    for row, where in rows:
        names = [str(path).removeprefix(f"{folder}/") for path in (row.image, row.target) if path is not None]
        for name in names:
            if name not in contents:
                raise ValueError(f"{where.removeprefix(f'{folder}/')}: {name[:80]} is not in the zip.")
        image, *target = (contents[name] for name in names)
        yield Given(names[0], image, tuple(row.texts), target[0] if target else beside(names[0]))


def _read_text(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"The text of {name[:80]} is not UTF-8.") from error


# What is kept


def save_pictures(
    folder: Path,
    name: str,
    items: list[Given],
    keep: Keep,
    tell: Callable[[], None] = lambda: None,
    stop: threading.Event | None = None,
) -> tuple[Path | None, list[Finding]]:
    """Writes the pictures that are in order as a new set, 001.png and so on; says of each whether and why.

    `tell()` is called after each. The set is None when no picture is in order. Raises Cancelled soon after `stop` is
    set, and nothing is kept then.
    """
    path = new_set(folder, name)
    if not 1 <= len(items) <= safety.MAX_FILES:
        raise ValueError(f"Upload 1 to {safety.MAX_FILES} pictures, got {len(items)}.")
    findings, used = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        temporary = Path(scratch)
        for item in items:
            if stop is not None and stop.is_set():
                raise Cancelled
            stem = f"{used + 1:03d}"
            try:
                picture = safety.open_picture(item.picture, item.name)
                picture.save(temporary / f"{stem}.png")  # pixels alone: no metadata, nothing behind the picture
                long = any(len(text) > MAX_CAPTION for text in item.texts)
                problem = f"its caption has more than {MAX_CAPTION} letters" if long else keep(temporary, stem, item)
            except ValueError as error:
                problem = str(error)
            if problem:
                for file in (f"{stem}.png", f"{stem}.txt", f"{MAPS}/{stem}.png", f"{MASKS}/{stem}.png"):
                    (temporary / file).unlink(missing_ok=True)
            else:
                used += 1
            findings.append((item.name[:80], "refused" if problem else "used", problem or f"{stem}.png"))
            tell()
        if not used:
            return None, findings
        with atomic(path) as target:
            shutil.copytree(temporary, target)
    return path, findings


def condition_of(config: dict[str, Any]) -> Condition:
    """What a checked config of `training/controlnetpp.py` says that the ControlNet is shown."""
    said = config.get("condition", {})
    if not isinstance(said, dict) or not isinstance(said.get("args", {}), dict):
        raise ValueError(f"condition: expected a block with a name, such as `name: depth`, got {said!r}.")
    return build_condition(said.get("name", "segmentation"), **said.get("args", {}))


def for_controlnets(condition: Condition, column: str | None = None) -> Keep:
    """Rows of metadata.jsonl, as `training/controlnetpp.py` takes them for this condition."""
    column = column or condition.column

    def keep(folder: Path, stem: str, item: Given) -> str | None:
        if not item.texts:
            return "has no caption, and a ControlNet learns from pictures with captions"
        row, target = {"image": f"{stem}.png", "text": item.texts[0] if len(item.texts) == 1 else item.texts}, None
        if item.beside is not None:
            if column is None:
                return f"the {type(condition).__name__.lower()} map is read off the picture: it takes no map of its own"
            row[column] = f"{MAPS}/{stem}.png"
            target = _save_map(item, folder / row[column])
        _, problem = check_row(Row(folder / row["image"], list(item.texts), target), condition)
        if problem:
            return problem if target is None else f"its map: {problem}"
        with open(folder / METADATA, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return None

    return keep


def for_concepts(resolution: int, placeholder_token: str | None = None) -> Keep:
    """Pictures of one thing, with captions and masks beside them, as `training/neti.py` takes them."""

    def keep(folder: Path, stem: str, item: Given) -> str | None:
        if item.texts:
            (folder / f"{stem}.txt").write_text(item.texts[0], encoding="utf-8")
        if item.beside is not None:
            _save_map(item, folder / MASKS / f"{stem}.png")
        _, _, problems = check_concept_image(folder / f"{stem}.png", resolution, placeholder_token)
        said = "; ".join(problems).replace(f"{MASKS}/{stem}.png", "its mask").replace(f"{stem}.txt", "its caption")
        return said.replace(f"{stem}.png", item.name[:80]) or None

    return keep


def _save_map(item: Given, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    safety.open_map(item.beside, f"the map or mask of {item.name}").save(path)
    return path


def save_prompts(folder: Path, name: str, text: str) -> Path:
    """Writes prompts, one a line, as a new set."""
    path = new_set(folder, name)
    if not 0 < len(text.strip()) <= safety.MAX_YAML_BYTES:
        raise ValueError(f"Write prompts, one a line, at most {safety.MAX_YAML_BYTES // 1000} kB in all.")
    with atomic(path) as temporary:
        temporary.mkdir()
        (temporary / PROMPTS).write_text(text, encoding="utf-8")
        read_prompts(temporary / PROMPTS)
    return path / PROMPTS


def new_set(folder: Path, name: str) -> Path:
    """Where a set of this name will be. Raises ValueError for what is no name, or one that is there."""
    path = safety.inside(folder, name)
    if path.exists():
        raise ValueError(f"There is a set called {name} already: choose another name.")
    return path


def check(path: Path, resolution: int) -> list[str]:
    """What the trainers' own checks say of a set of pictures."""
    if (path / METADATA).is_file():
        rows, findings = check_folder(path)
        wrong = [f"{Path(finding.path).name}: {finding.why}" for finding in findings if finding.state == "error"]
        maps = len(list(path.glob(f"{MAPS}/*.png")))
        return [f"{len(rows)} pictures with a caption, {maps} with a map.", *wrong]
    return [line.replace(str(path), "The set") for line in check_concept(path, resolution)]


def sets(folder: Path, method: str) -> list[str]:
    """Names of the sets that a trainer can use."""
    wanted = {"alignprop": PROMPTS, "controlnetpp": METADATA}.get(method, "001.png")
    return sorted(path.parent.name for path in folder.glob(f"*/{wanted}") if safety.NAME.fullmatch(path.parent.name))
