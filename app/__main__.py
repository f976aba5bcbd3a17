"""The page in a browser: `python -m app`, then http://127.0.0.1:7860."""

import argparse
import os
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m app", description=__doc__)
    parser.add_argument("--folder", default="runs", help="Runs, LoRAs, concepts and uploads: the only one it touches.")
    parser.add_argument(
        "--base", action="append", help="Base model to offer: emoji, a diffusers folder, a Hub name. May be repeated."
    )
    parser.add_argument("--host", default="127.0.0.1", help="Any other than this machine's own needs a password.")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument(
        "--password",
        default=os.environ.get("ALIGNKIT_PASSWORD"),
        help="For the user alignkit; better given as ALIGNKIT_PASSWORD, which no list of processes shows.",
    )
    parser.add_argument(
        "--safety_checker", help="Folder or Hub name of a Stable Diffusion safety checker that sees every picture."
    )
    options = parser.parse_args(argv)
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError:
        sys.exit("The page needs Gradio: pip install -e '.[app]'")
    from app import page

    try:
        bases = named(options.base or ["emoji"])
        demo = page.build(options.folder, bases, options.safety_checker)
        page.launch(demo, options.folder, options.host, options.port, options.password)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def named(bases: list[str]) -> dict[str, str]:
    """Bases by the names that the page has for them: a folder's own, a Hub name."""
    found: dict[str, str] = {}
    for base in bases:
        path = Path(base).resolve()
        name, place = (path.name, str(path)) if path.exists() else (base, base)
        if found.get(name, place) != place:
            raise ValueError(f"--base: two are called {name!r}, {found[name]} and {place}: rename one of the folders.")
        found[name] = place
    return found


if __name__ == "__main__":
    main()
