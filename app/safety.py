"""What is let in from the page: names, pictures, configs. Whatever is refused is a ValueError with a sentence."""

import re
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Set
from contextvars import ContextVar
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from PIL import Image
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
IMAGE_SUFFIXES = [".png", ".jpg", ".jpeg", ".webp", ".bmp"]
MAX_FILE_BYTES = 20 * 2**20
MAX_ZIP_BYTES = 200 * 2**20  # of all that is uploaded, zips alone may be larger than a file
MAX_PIXELS = 4096 * 4096
MAX_FILES = 200
MAX_YAML_BYTES = 100_000
MAP_MODES = ("1", "L", "I", "I;16", "LA", "P", "RGB", "RGBA")  # as which a PNG can be written
FAILED_LOGINS, LOGIN_WINDOW = 10, 60.0  # in so many seconds

# What a config says in words; every other string has to be a plain value or a name of ours.
TEXTS = {
    "prompt", "negative_prompt", "templates", "validation_prompts", "placeholder_token", "super_category_token",
    "class_noun", "object", "target_modules",
}  # fmt: skip
PATHS = {
    "pretrained_model_name_or_path", "base_config", "controlnet_model_name_or_path", "prompt_file",
    "validation_prompt_file", "train_data_dir", "validation_data_dir", "instance_data_dir", "class_data_dir",
}  # fmt: skip
PLAIN = re.compile(r"[\w+-][\w .+-]*")
TRACKERS = ("none", "tensorboard")  # which write into the run's folder; the others send what they get away
_asking: ContextVar[str] = ContextVar("asking", default="")  # the address of whom the page is answering


# Names


def inside(folder: Path, name: str) -> Path:
    """The path of "mine" or "alignprop/mine" in a folder, and never of anything outside it."""
    parts = name.split("/") if isinstance(name, str) else []
    if not 1 <= len(parts) <= 2 or not all(NAME.fullmatch(part) for part in parts):
        raise ValueError(
            f"A name has 1 to 60 letters, digits, - and _, and begins with a letter or digit; got {name!r}."
        )
    path = folder.joinpath(*parts)
    if not path.resolve().is_relative_to(folder.resolve()):  # a link that points away
        raise ValueError(f"{name} leads out of the folder of the page.")
    return path


# Pictures


def limit_pixels() -> None:
    """For everything that Pillow opens in this process, Gradio's own decoding included, before it is decoded."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above it, and refuses above twice as many


def check_picture(path: str | Path, name: str | None = None) -> None:
    """Refuses what is no picture, or too large a one, by its header; `name`: what it is called in the sentence."""
    path = Path(path)
    name = (name or path.name)[:80]
    if not path.is_file():
        raise ValueError("Upload the picture as a file.")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{name} has more than {MAX_FILE_BYTES // 2**20} MB.")
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has more than {MAX_PIXELS / 1e6:.0f} million pixels.") from error
    except Exception as error:  # Pillow's readers raise many kinds on files that were made to break them
        raise ValueError(f"{name} is not a picture that can be read: {', '.join(IMAGE_FORMATS)} are.") from error
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name} has {width} x {height} pixels: at most {MAX_PIXELS / 1e6:.0f} million are taken.")


def open_picture(path: str | Path, name: str | None = None) -> Image.Image:
    """An upload as RGB, turned as its EXIF says, checked first."""
    from alignkit.data import open_image

    check_picture(path, name)
    try:
        return open_image(path)
    except Exception as error:
        raise ValueError(f"{(name or Path(path).name)[:80]} is damaged: its pixels cannot be read.") from error


def open_map(path: str | Path, name: str) -> Image.Image:
    """An uploaded control map or mask with its numbers as they are, checked first, without metadata."""
    check_picture(path, name)
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            plain = image.copy()
    except Exception as error:
        raise ValueError(f"{name[:80]} is damaged: its pixels cannot be read.") from error
    if plain.mode not in MAP_MODES:
        raise ValueError(f"{name[:80]} is of mode {plain.mode}: save it as a PNG, gray or with a number a pixel.")
    plain.info = {}
    return plain


# Configs


def read_config(text: str) -> dict[str, Any]:
    """A config's YAML: plain data, without aliases, which can make a few lines endless."""
    if len(text.encode()) > MAX_YAML_BYTES:
        raise ValueError(f"A config has at most {MAX_YAML_BYTES // 1000} kB.")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("A config may hold no YAML aliases (*name).")
        config = yaml.load(text, Loader=ConfigLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"This is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError("A config is a list of `key: value` lines.")
    return config


class ConfigLoader(yaml.SafeLoader):
    """Reads 1e-4 as a number, as the trainers do; PyYAML alone takes it for a word."""


ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def check_config(
    config: dict[str, Any], root: Path, folders: list[Path], bases: set[str], models: Set[str] = frozenset()
) -> None:
    """Refuses a config that names files outside `folders`, code, a base that the page does not offer, or a tracker.

    `root`: where the trainers run, from which relative names lead. `models`: names that are taken besides.
    """
    if config.get("push_to_hub") or config.get("hub_model_id"):
        raise ValueError("push_to_hub: what is sent to others is sent from the command line.")
    if "config" in config:
        raise ValueError("config: a config names no other one here.")
    if config.get("report_to", "none") not in TRACKERS:
        raise ValueError(f"report_to: expected one of {', '.join(TRACKERS)} here, got {config['report_to']!r}.")
    for key, path, value in leaves(config):
        if key in TEXTS or path == "output_dir":  # which the page sets itself
            continue
        if key == "pretrained_model_name_or_path":
            if value not in bases:
                raise ValueError(f"{path}: this page does not offer {value!r}; --base on its command line does.")
        elif value.startswith("emoji/") and ".." not in value or value in ("emoji", "") or value in models:
            continue
        elif key in PATHS or ".args." in path or not PLAIN.fullmatch(value):  # args name models and files
            if ":" in value and "/" not in value:
                raise ValueError(f"{path}: code of one's own is for the command line; got {value!r}.")
            target = (root / value).resolve()
            if key not in PATHS or not any(target.is_relative_to(folder.resolve()) for folder in folders):
                raise ValueError(
                    f"{path}: only files of this page's own folders, and what the project's own configs name, can be "
                    f"named here; got {value!r}."
                )


def leaves(config: Any, key: str = "", path: str = "") -> Iterator[tuple[str, str, str]]:
    """(nearest key, dotted path, value) of every string in it, and of every key of a free block."""
    if isinstance(config, dict):
        for name, value in config.items():
            if not isinstance(name, str) or not PLAIN.fullmatch(name):
                raise ValueError(f"{path or 'the config'}: {name!r} is no key.")
            yield from leaves(value, name, f"{path}.{name}" if path else name)
    elif isinstance(config, list):
        for value in config:
            yield from leaves(value, key, path)
    elif isinstance(config, str):
        yield key, path, config
    elif not isinstance(config, int | float | None):  # dates, sets and bytes, which YAML has too
        raise ValueError(f"{path}: expected text, a number, true or false, got {type(config).__name__}.")


# Addresses and passwords


class OwnSite:
    """Answers the page's own requests alone, and not those that another site's page has a visitor's browser send.

    An `Origin` has to be the page's own. Without a password, so has the name under which it is asked: a site may give
    its own name the address of this machine, and then every `Origin` is right.
    """

    def __init__(self, app: ASGIApp, loopback_only: bool):
        self.app, self.loopback_only = app, loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.loopback_only and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            answer = "Without a password, this page answers on 127.0.0.1 and localhost alone."
        elif origin is not None and urlsplit(origin).netloc != host:
            answer = "This page answers no other site's requests."
        else:
            _asking.set((scope.get("client") or ("",))[0])
            await self.app(scope, receive, send)
            return
        await PlainTextResponse(answer, 403)(scope, receive, send)


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def login(user: str, password: str) -> Callable[[str, str], bool]:
    """For Gradio's `auth`; after ten wrong passwords in a minute from an address, none of its is right for the rest."""
    failures: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=FAILED_LOGINS))

    def check(given_user: str, given_password: str) -> bool:
        for address, wrong in list(failures.items()):
            if time.monotonic() - wrong[-1] > LOGIN_WINDOW:
                del failures[address]
        wrong = failures.get(_asking.get(), ())
        if len(wrong) == FAILED_LOGINS and time.monotonic() - wrong[0] < LOGIN_WINDOW:
            return False
        right = secrets.compare_digest(given_user.encode(), user.encode())
        right &= secrets.compare_digest(given_password.encode(), password.encode())
        if not right:
            failures[_asking.get()].append(time.monotonic())
        return right

    return check
