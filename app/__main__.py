"""The page in a browser: `python -m app`, then http://127.0.0.1:7860."""

import argparse
import os
import sys
from pathlib import Path


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app", description=__doc__)
    parser.add_argument("--folder", default="runs", help="Runs, LoRAs, concepts and uploads: the only one it touches.")
    parser.add_argument(
        "--base",
        action="append",
        help="Base model to offer: emoji, a diffusers folder, a Hub name, a .safetensors file. May be repeated.",
    )
    parser.add_argument(
        "--base_config", help="Of each --base that is a file: the folder or Hub name of its configs and tokenizers."
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
    return parser


def main(argv: list[str] | None = None) -> None:
    options = build_parser().parse_args(argv)
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError:
        sys.exit("The page needs Gradio: pip install -e '.[app]'")
    from app import page

    try:
        bases = named(options.base or ["emoji"])
        base_config = config_of_files(options.base_config, bases)
        checker = _place(options.safety_checker) if options.safety_checker else None
        demo = page.build(options.folder, bases, checker, base_config)
        page.launch(demo, options.folder, options.host, options.port, options.password)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def named(bases: list[str]) -> dict[str, str]:
    """Bases by the names that the page has for them: a folder's or file's own, a Hub name."""
    found: dict[str, str] = {}
    for base in bases:
        place = _place(base)
        name = Path(place).name if Path(place).exists() else base
        if found.get(name, place) != place:
            raise ValueError(f"--base: two are called {name!r}, {found[name]} and {place}: rename one of them.")
        found[name] = place
    return found


def config_of_files(base_config: str | None, bases: dict[str, str]) -> str | None:
    """Where --base_config leads. ValueError where no base is a file, which alone has none of its own."""
    if base_config is None:
        return None
    if not any(Path(place).is_file() for place in bases.values()):
        raise ValueError(f"--base_config: expected a --base that is a .safetensors file, got {', '.join(bases)}.")
    return _place(base_config)


def _place(name: str) -> str:
    """In full where it is on this machine, as the page moves into its folder; else a name on the Hub, or emoji."""
    return str(Path(name).resolve()) if Path(name).exists() else name


if __name__ == "__main__":
    main()
