"""What a user without a checkout gets: build the wheel, look inside, install it elsewhere, draw with an artifact."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from alignkit import __version__, artifacts
from alignkit.base import add_lora, load_base

ROOT = Path(__file__).parent.parent


def run(*command, cwd):
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves a build folder behind, whose stale files would end up in the next wheel."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "alignkit", source / "alignkit", ignore=shutil.ignore_patterns("__pycache__"))
    # A folder beside it that must stay out.
    shutil.copytree(ROOT / "training", source / "training", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", out, cwd=source)
    (path,) = out.iterdir()
    return path


def test_wheel_holds_alignkit_alone_and_whole(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"alignkit", f"alignkit-{__version__}.dist-info"}
    files = (path for path in (ROOT / "alignkit").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    assert {name for name in names if name.startswith("alignkit/")} == expected
    assert f"alignkit-{__version__}.dist-info/licenses/LICENSE" in names


def test_installed_wheel_draws_with_an_artifact(wheel, tmp_path):
    base = load_base("sd15", random_init=True, shrink=40)
    base.pipeline().save_pretrained(tmp_path / "model")
    for name, p in add_lora(base.unet, rank=4, lora_alpha=4, target_modules=["to_q"]).items():
        if ".lora_B." in name:
            torch.nn.init.ones_(p)
    artifacts.save_lora(tmp_path / "lora", base.unet)

    venv.create(tmp_path / "venv", with_pip=False)
    binaries = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    run(sys.executable, "-m", "pip", "--python", binaries / "python", "install", "--no-deps", wheel, cwd=tmp_path)
    # Dependencies come from this environment; path files in there (so also an editable alignkit) are not followed.
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(binaries / "python", "-c", code, cwd=tmp_path).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    where = run(binaries / "python", "-c", "import alignkit; print(alignkit.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path)
    draw = [binaries / "alignkit", "generate", "--model", "model", "--prompt", "a cat"]
    draw += ["--num_inference_steps", 2, "--height", 64, "--width", 64, "--device", "cpu"]
    plain, tuned = (Image.open(tmp_path / run(*draw, *lora, cwd=tmp_path).strip()) for lora in ([], ["--lora", "lora"]))
    assert plain.tobytes() != tuned.tobytes()
