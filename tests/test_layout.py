"""Who may import whom, read from the syntax trees."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import alignkit

ROOT = Path(__file__).parent.parent
FOLDERS = ("alignkit", "pipelines", "training", "app", "tests")
# Import direction: third parties <- alignkit <- pipelines, training <- app.
MAY_IMPORT = {
    "alignkit": {"alignkit"},
    "pipelines": {"alignkit"},
    "training": {"alignkit"},
    "app": {"alignkit", "pipelines", "app"},
}


def imports(file: Path) -> set[str]:
    """Dotted names of everything that a file imports, at its top or inside functions; relative ones made absolute."""
    found = set()
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def importers(package: str) -> set[str]:
    return {
        file.relative_to(ROOT).as_posix()
        for file in files("alignkit")
        if any(name.split(".")[0] == package for name in imports(file))
    }


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_downwards(folder):
    for file in files(folder):
        ours = {name.split(".")[0] for name in imports(file)} & set(FOLDERS)
        assert ours <= MAY_IMPORT[folder], f"{file.relative_to(ROOT)} may not import {ours - MAY_IMPORT[folder]}"


def test_training_scripts_import_no_sibling():
    """As a script a file sees its own folder first in sys.path, so a sibling would import under its bare name too."""
    scripts = files("training")
    names = {file.stem for file in scripts} - {"__init__"}
    for file in scripts:
        bare = {name for name in imports(file) if "." not in name}
        assert not bare & names, f"{file.relative_to(ROOT)} imports its sibling {bare & names}"


DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "open_clip": "open_clip_torch"}  # by what is imported of them


def test_third_parties_are_declared():
    """Else they are there by the grace of another package, or of the developers' environment."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    optional = [*extras["optimizers"], *extras["quantization"], *extras["rewards"]]
    own, app, optional = (
        {re.match(r"[\w-]+", line)[0] for line in lines} for lines in (project["dependencies"], extras["app"], optional)
    )
    for folder, declared in {"alignkit": own | optional, "pipelines": own, "app": own | app}.items():
        for file in files(folder):
            names = {name.split(".")[0] for name in imports(file)} - set(FOLDERS) - sys.stdlib_module_names
            missing = {DISTRIBUTIONS.get(name, name) for name in names} - declared
            if file.name == "example_client.py":  # runs where the page is asked, not where it is
                missing -= {"gradio_client"}
            assert not missing, f"{file.relative_to(ROOT)} imports {missing}, which pyproject.toml does not name"


def test_launcher_and_adapters_stay_where_they_are_known():
    assert importers("accelerate") <= {"alignkit/run.py"}
    assert importers("peft") <= {"alignkit/base.py", "alignkit/artifacts.py"}


def test_generic_names_are_guarded_by_an_empty_init():
    """Without it an installed package that has a `training` of its own would win over ours."""
    for folder in FOLDERS[1:]:
        if (ROOT / folder).is_dir():
            assert (ROOT / folder / "__init__.py").read_bytes() == b""


def test_import_takes_no_torch():
    heavy = {"torch", "diffusers", "transformers", "accelerate", "peft", "numpy"}
    code = f"import alignkit, alignkit.cli, sys; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == "[]"


def test_lazy_names_resolve():
    for name in alignkit.__all__:
        assert getattr(alignkit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'load_bse'"):
        _ = alignkit.load_bse
