"""The emoji world: a small, honestly trained text-to-image model with exact labels, shipped with the library."""

from pathlib import Path

ROOT = Path(__file__).parent
SPRITE_DIR = ROOT / "sprites"
WEIGHTS_DIR = ROOT / "weights"


def resolve(name_or_path: str) -> str:
    """Path of a bundled model: "emoji" is the base, "emoji/training/clip" a judge. Any other name is returned as it is.

    Raises FileNotFoundError, with the names there are, when the world holds no such model.
    """
    if name_or_path != "emoji" and not name_or_path.startswith("emoji/"):
        return name_or_path
    part = "base" if name_or_path == "emoji" else name_or_path.removeprefix("emoji/")
    folder = WEIGHTS_DIR / part
    if not folder.is_dir():
        known = ["emoji"] + sorted(
            f"emoji/{f.relative_to(WEIGHTS_DIR)}"
            for f in WEIGHTS_DIR.glob("*/*")
            if f.is_dir() and f.parent.name != "base"
        )
        raise FileNotFoundError(f"The emoji world has no model {name_or_path!r}. It has: {', '.join(known)}.")
    return str(folder)
