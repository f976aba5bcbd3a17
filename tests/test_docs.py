"""README, docs and configs say what the code does: their commands have these options, their tables these defaults."""

import json
import re
import shlex
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest
from jsonargparse import ArgumentParser

from alignkit import cli
from app.__main__ import build_parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").rglob("*.yaml"))]
TABLES = {"alignprop": ["alignprop", "ddpo"], "controlnetpp": ["controlnetpp"], "customize": ["customize"],
          "neti": ["neti"]}  # fmt: skip


CONFIGS = [page for page in PAGES if page.suffix == ".yaml" and not page.name.startswith("emoji")]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_configs_name_the_source_of_their_numbers(config):
    header = config.read_text(encoding="utf-8").partition("output_dir:")[0]
    assert re.search(r"arXiv \d{4}\.\d{5}", header)


def commands(start: str) -> list[tuple[str, list[str]]]:
    """All that begin with `start` in a code block, in `code`, or in a config's comment: the page, and the words."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if page.suffix == ".yaml":
            code = re.sub(r"^# *", "", text, flags=re.M)
        else:
            blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
            prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
            code = "\n".join([*blocks, *(span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose))])
        for line in code.replace("\\\n", " ").splitlines():
            if match := re.search(rf"(?:^|.* |`){start} .*", line):
                found.append((page.name, shlex.split(match[0].rpartition(" && ")[2].split("`")[0], comments=True)))
    return found


def keys(cls: type, prefix: str = "") -> dict[str, object]:
    """Dotted key -> default."""
    kinds, found = get_type_hints(cls), {}
    for field in fields(cls):
        found[prefix + field.name] = field.default
        if is_dataclass(kinds[field.name]):
            found |= keys(kinds[field.name], f"{prefix}{field.name}.")
        elif callable(field.default_factory):
            found[prefix + field.name] = field.default_factory()
    return found


def config_keys(method: str) -> dict[str, object]:
    return keys(import_module(f"training.{method}").Config)


def test_the_commands_of_the_docs_parse():
    parser = ArgumentParser(exit_on_error=False)
    cli._add_commands(parser, cli.COMMANDS)
    found = commands("alignkit")
    assert len(found) > 20
    for page, words in found:
        if words[:1] == ["alignkit"] and len(words) > 3:  # not a mere mention, such as `alignkit evaluate manipulation`
            words = cli._overrides_of_plan(words[1:]) if words[1] == "plan" else words[1:]
            try:
                parser.parse_args(words)
            except BaseException as error:
                pytest.fail(f"{page}: alignkit {' '.join(words)}: {error}")


def test_the_pages_of_the_docs_open():
    found = commands("python -m app")
    assert len(found) > 2
    for page, words in found:
        try:
            build_parser().parse_args(words[words.index("app") + 1 :])
        except SystemExit:
            pytest.fail(f"{page}: {' '.join(words)}")


def test_the_trainings_of_the_docs_have_these_options():
    found = commands(r"training/\w+\.py")
    assert len(found) > 40
    for page, words in found:
        words = words[next(i for i, word in enumerate(words) if word.startswith("training/")) :]
        known = config_keys(Path(words[0]).stem).keys() | {"config"}
        given = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
        unknown = {name for name in given if name not in known and name.replace("-", "_") not in known}
        # free blocks, such as plan.settings, have keys of their own
        assert not {name for name in unknown if name.rpartition(".")[0] not in known}, f"{page}: {' '.join(words)}"
        config = words[words.index("--config") + 1]
        assert (ROOT / config).is_file(), f"{page}: {config}"


@pytest.mark.parametrize("page", TABLES)
def test_the_tables_of_keys_have_the_defaults(page):
    known: dict[str, object] = {}
    for method in TABLES[page]:
        known |= config_keys(method)
    compared = 0
    tables = re.split(r"\n\n", (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"))
    for table in (t for t in tables if t.startswith("| key | default |")):
        for row in table.splitlines()[2:]:
            names, default = (cell.strip() for cell in row.split("|")[1:3])
            names = re.findall(r"`([\w.]+)`", names)
            assert names and all(name in known for name in names), row
            try:
                stated = json.loads(f"[{default}]")
            except ValueError:
                continue  # said in words
            if len(stated) == len(names):
                for name, value in zip(names, stated, strict=True):
                    assert known[name] in (value, [value]), f"{name}: {known[name]}, not {value}"
                    compared += 1
    assert compared > 3
