"""PNG files that carry the settings that drew them."""

import hashlib
import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from alignkit import __version__
from alignkit.artifacts import atomic

CHUNK = "alignkit"


def write_png(
    image: Image.Image, settings: Mapping[str, Any], folder: str | Path, notes: Mapping[str, Any] | None = None
) -> Path:
    """Writes `folder/<prompt>_seed<seed>_<hash>.png`; returns the file.

    settings: what draws it again, with `prompt` and `seed`. notes: what else is known of it (hashes of the files that
    it was drawn with, the refined prompt, rewards). Both are JSON in one text chunk.
    """
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    record = {"settings": dict(settings), **(notes or {}), "versions": {"alignkit": __version__} | versions}
    chunk = PngInfo()
    chunk.add_text(CHUNK, json.dumps(record))
    # The hash keeps images of other settings apart; the same settings overwrite their own image.
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
    words = re.sub(r"\W+", "-", settings["prompt"].lower()).strip("-")[:60]
    path = Path(folder) / f"{words}_seed{settings['seed']}_{digest}.png"
    with atomic(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunk)
    return path


def read_record(png: str | Path) -> dict[str, Any]:
    """All that `write_png` wrote: "settings", "versions" and the notes. ValueError for a picture of another origin."""
    with Image.open(png) as image:
        text = image.info.get(CHUNK)
    try:
        record = json.loads(text)
        if not isinstance(record["settings"], dict):
            raise TypeError
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"{png} carries no settings of alignkit: it was not written by `alignkit generate`, or was written anew "
            "by another program."
        ) from error
    return record


def read_settings(png: str | Path) -> dict[str, Any]:
    """The settings alone: `alignkit.cli.generate(**read_settings(png))` draws the picture again."""
    return read_record(png)["settings"]
