"""The emoji world: a small, honestly trained text-to-image model with exact labels, shipped with the library."""

from os import PathLike, fspath
from pathlib import Path

ROOT = Path(__file__).parent
SPRITE_DIR = ROOT / "sprites"
WEIGHTS_DIR = ROOT / "weights"
EXAMPLES_DIR = ROOT / "examples"  # what the trainers made of the base; no part of the world's hash


def resolve(name_or_path: str | PathLike) -> str:
    """Path of a bundled model: "emoji" is the base, "emoji/training/clip" a judge, "emoji/examples/neti" an artifact.

    Any other name is returned as it is. Raises FileNotFoundError, with the names there are, when the world holds no
    such model.
    """
    name = fspath(name_or_path)
    if name != "emoji" and not name.startswith("emoji/"):
        return name
    part = "base" if name == "emoji" else name.removeprefix("emoji/")
    folder = (ROOT if part.startswith("examples/") else WEIGHTS_DIR) / part
    if not folder.is_dir():
        folders = [*WEIGHTS_DIR.glob("*/*"), *EXAMPLES_DIR.glob("*")]
        known = ["emoji"] + sorted(
            f"emoji/{f.parent.name}/{f.name}" for f in folders if f.is_dir() and f.parent.name != "base"
        )
        raise FileNotFoundError(f"The emoji world has no model {name!r}. It has: {', '.join(known)}.")
    return str(folder)


def role(name_or_path: str | PathLike) -> str | None:
    """Whose a bundled model is, by its name or its path: training, monitor, evaluator, ...; None for any other."""
    name = fspath(name_or_path)
    if name.startswith("emoji/"):
        return name.split("/")[1]
    path, world = Path(name).resolve(), WEIGHTS_DIR.resolve()
    return path.relative_to(world).parts[0] if world in path.parents else None
