"""README's table of what works on what, as data."""

from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BASES = {
    "the emoji world": "emoji",
    "SD 1.x": "sd15",
    "SD 2.x": "sd21",
    "SDXL": "sdxl",
    "SD3": "sd3",
    "FLUX.1": "flux",
}


def table() -> dict[str, dict[str, str]]:
    """Method -> {base: its cell}, by the names of random_init for the bases."""
    lines = iter(README.read_text(encoding="utf-8").splitlines())
    first, *methods, _ = _cells(next(line for line in lines if line.startswith("| base |")))
    assert first == "base" and set(next(lines)) == set("|-")
    found = {method: {} for method in methods}
    for line in lines:
        if not line.startswith("|"):
            return found
        base, *cells, _ = _cells(line)
        for method, cell in zip(methods, cells, strict=True):
            found[method][BASES[base]] = cell
    raise AssertionError(f"{README} ends in its table")


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]
