"""Uploads to train on: `<folder>/data/<name>`, written anew, so that nothing else gets in."""

import json
from pathlib import Path

from alignkit.artifacts import atomic
from alignkit.controls import METADATA, check_folder
from alignkit.data import check_concept, read_prompts
from app import safety

PROMPTS = "prompts.txt"
Finding = tuple[str, str, str]  # file, used or refused, why


def save_pictures(folder: Path, name: str, uploads: list[str], captions: str = "") -> tuple[Path | None, list[Finding]]:
    """Writes the pictures that are in order as a new set, 001.png and so on; says of each upload whether and why.

    `captions`: a line for each upload, in their order, or none at all. The set is None when no picture is in order.
    """
    safety.inside(folder, name)
    if not uploads or len(uploads) > safety.MAX_FILES:
        raise ValueError(f"Upload 1 to {safety.MAX_FILES} pictures, got {len(uploads or [])}.")
    lines = [" ".join(line.split()) for line in captions.splitlines() if line.strip()]
    if lines and len(lines) != len(uploads):
        raise ValueError(f"Expected a caption for each of the {len(uploads)} pictures, a line each, got {len(lines)}.")
    path = safety.inside(folder, name)
    if path.exists():
        raise ValueError(f"There is a set called {name} already: choose another name.")
    findings, kept = [], []
    for i, upload in enumerate(uploads):
        shown = Path(upload).name[:80]
        try:
            kept.append((safety.open_picture(upload), lines[i] if lines else None))
            findings.append((shown, "used", f"{len(kept):03d}.png"))
        except ValueError as error:
            findings.append((shown, "refused", str(error)))
    if not kept:
        return None, findings
    with atomic(path) as temporary:
        temporary.mkdir()
        for number, (picture, caption) in enumerate(kept, start=1):
            picture.save(temporary / f"{number:03d}.png")  # pixels alone: no metadata, nothing behind the picture
            if caption is not None:
                row = {"image": f"{number:03d}.png", "text": caption}
                with open(temporary / METADATA, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    return path, findings


def save_prompts(folder: Path, name: str, text: str) -> Path:
    """Writes prompts, one a line, as a new set."""
    path = safety.inside(folder, name)
    if path.exists():
        raise ValueError(f"There is a set called {name} already: choose another name.")
    if not 0 < len(text.strip()) <= safety.MAX_YAML_BYTES:
        raise ValueError(f"Write prompts, one a line, at most {safety.MAX_YAML_BYTES // 1000} kB in all.")
    with atomic(path) as temporary:
        temporary.mkdir()
        (temporary / PROMPTS).write_text(text, encoding="utf-8")
        read_prompts(temporary / PROMPTS)
    return path / PROMPTS


def check(path: Path, resolution: int) -> list[str]:
    """What the trainers' own checks say of a set of pictures."""
    if (path / METADATA).is_file():
        rows, findings = check_folder(path)
        wrong = [f"{Path(finding.path).name}: {finding.why}" for finding in findings if finding.state == "error"]
        return [f"{len(rows)} pictures with a caption.", *wrong]
    return check_concept(path, resolution)


def sets(folder: Path, method: str) -> list[str]:
    """Names of the sets that a trainer can use."""
    wanted = {"alignprop": PROMPTS, "controlnetpp": METADATA}.get(method, "001.png")
    return sorted(path.parent.name for path in folder.glob(f"*/{wanted}") if safety.NAME.fullmatch(path.parent.name))
