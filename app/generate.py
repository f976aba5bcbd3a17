"""Pictures: the one base model in memory with its parts, drawing from it, and the settings in each PNG."""

import base64
import binascii
import contextvars
import functools
import io
import json
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from alignkit.artifacts import LORA_WEIGHTS, atomic, load_json, read_pretrained
from app import jobs, safety

SETTINGS, CONTROL = "alignkit-page", "alignkit-control"  # text chunks of a PNG
OUTPUTS, LORAS = "outputs", "loras"  # of the page's folder: what was drawn; LoRAs' files that others made
LIMITS = {"num_inference_steps": (1, 200), "guidance_scale": (0, 30), "strength": (0, 1), "control_scale": (0, 2)}
MAX_PROMPT = 2000
MAX_SIDE = 2048


class Cancelled(Exception):
    """Somebody pressed the button."""


# The one thread in which models work

_work: queue.SimpleQueue = queue.SimpleQueue()


def _take_turns() -> None:
    while True:
        _do(*_work.get())  # without names, as what they hold would live until the next turn


def _do(future: Future, function: Callable) -> None:
    if not future.set_running_or_notify_cancel():  # nobody waits for it any more
        return
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
    finally:
        del future, function  # else an error, its frames and the future hold each other


_worker = threading.Thread(target=_take_turns, name="models", daemon=True)  # a daemon: Ctrl-C waits for no picture
_worker.start()


def in_turn(function: Callable) -> Callable:
    """The function, always run in one and the same thread, in turn with all others of these.

    The page has forty threads. Of the memory that a model's work needs, some stays with the thread that did it, 8 MB
    at least, and OpenMP keeps a team of threads for each: memory would grow until all of them have drawn.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is _worker:
            return function(*args, **kwargs)
        future = _hand_over(functools.partial(function, *args, **kwargs))
        try:
            return future.result()
        finally:
            del future  # else an error, its frames and this one hold each other

    return wrapped


def _hand_over(function: Callable) -> Future:
    future: Future = Future()
    _work.put((future, functools.partial(contextvars.copy_context().run, function)))
    return future


def watched(function: Callable, what: str, progress: Callable, stop: threading.Event) -> Any:
    """What the function returns `in_turn`, for work that cannot say how far it is: told are its name and its seconds.

    Raises Cancelled as soon as `stop` is set. The work goes on to its end then, unless its turn had not come.
    """
    started = time.monotonic()
    return _follow(
        _hand_over(function), lambda: progress(0, desc=f"{what}: {time.monotonic() - started:.0f} s so far"), stop
    )


def _follow(future: Future, tell: Callable[[], None], stop: threading.Event) -> Any:
    try:
        tell()
        while not wait([future], timeout=0.2).done:
            if stop.is_set():
                future.cancel()
                raise Cancelled
            tell()
        return future.result()
    finally:
        del future


@dataclass
class Settings:
    """What draws a picture again, by names of the page."""

    prompt: str
    base: str = "emoji"
    seed: int = 0
    negative_prompt: str = ""
    num_inference_steps: int = 25
    guidance_scale: float = 5.0
    loras: dict[str, float] = field(default_factory=dict)
    concepts: list[str] = field(default_factory=list)
    truncation: int | None = None
    alignit: bool = False
    strength: float = 1.0
    controlnet: str | None = None
    control_scale: float = 1.0
    height: int | None = None  # in pixels; None is the base's own
    width: int | None = None

    def check(self) -> None:
        if not self.prompt.strip():
            raise ValueError("Say what to draw: the prompt is empty.")
        if max(len(self.prompt), len(self.negative_prompt)) > MAX_PROMPT:
            raise ValueError(f"A prompt has at most {MAX_PROMPT} letters.")
        for name, (low, high) in LIMITS.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name.replace('_', ' ')}: expected {low} to {high}, got {getattr(self, name)}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"The seed is a whole number from 0 to {2**32 - 1}, got {self.seed}.")
        self.check_size()
        for name, weight in self.loras.items():
            if not -2 <= weight <= 2:
                raise ValueError(f"The weight of {name}: expected -2 to 2, got {weight}.")

    def check_size(self) -> None:
        for name in ("height", "width"):
            pixels = getattr(self, name)
            if pixels is not None and not 64 <= pixels <= MAX_SIDE:
                raise ValueError(
                    f"{name}: expected 64 to {MAX_SIDE} pixels, or nothing for the base's own, got {pixels}."
                )

    @property
    def parts(self) -> list[str]:
        """The runs that are put together with the base."""
        return [*self.loras, *self.concepts, *([self.controlnet] if self.controlnet else [])]

    @property
    def is_tuned(self) -> bool:
        return bool(self.parts)


class Models:
    """One base at a time, and what was composed on it last. Used `in_turn`."""

    def __init__(
        self,
        folder: Path,
        bases: Mapping[str, str],
        safety_checker: str | None = None,
        base_config: str | None = None,
    ):
        self.folder, self.bases, self.safety_checker, self.base_config = folder, bases, safety_checker, base_config
        self._base: tuple[str, Any] | None = None
        self._composed: tuple[tuple, Any] | None = None
        self._checker: Any = None
        self._condition: tuple[dict, Any] | None = None

    def place(self, name: str) -> str:
        """Where a base is. ValueError for one that this page does not offer."""
        if name not in self.bases:
            raise ValueError(f"This page offers {', '.join(self.bases)}, got {name!r}.")
        return self.bases[name]

    def holds(self, name: str) -> bool:
        return self._base is not None and self._base[0] == name

    def base(self, name: str) -> Any:
        """An `alignkit.Base`."""
        import torch

        from alignkit import load_base

        place = self.place(name)
        if not self.holds(name):
            self.refuse_beside_a_training()
            self._base = self._composed = None  # the old one goes before the new one comes
            device, dtype = "cpu", torch.float32
            if torch.cuda.is_available():  # float16 ends at 65,504, which SD 2.1's attention passes
                has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
                device, dtype = "cuda", torch.bfloat16 if has_bfloat16 else torch.float16
            config = jobs.config_of_base(place, self.base_config)
            self._base = (name, load_base(place, device=device, dtype=dtype, config=config))
        return self._base[1]

    def composed(self, settings: Settings) -> Any:
        """The base with the parts that these settings name, as `alignkit.compose` puts them together."""
        from alignkit import compose

        base = self.base(settings.base)
        parts = (settings.base, tuple(settings.loras), tuple(settings.concepts), settings.controlnet)
        places = {name: find(self.folder, name) for name in settings.parts}
        versions = tuple(_version(place) for place in places.values())
        if self._composed is None or self._composed[0] != (parts, versions):
            if self._composed is not None:
                self._composed[1].unload()
                self._composed = None
            composed = compose(
                base.pipeline(),
                loras={adapter(name): places[name] for name in settings.loras},
                concepts=[places[name] for name in settings.concepts],
                controlnet=str(places[settings.controlnet]) if settings.controlnet else None,
            )
            composed.pipe.set_progress_bar_config(disable=True)
            self._composed = ((parts, versions), composed)
        return self._composed[1]

    def condition(self, controlnet: str | None) -> Any:
        """The `Condition` that a run trained its ControlNet for, with the model that it may have."""
        from alignkit.conditions import CONDITIONS, build_condition

        if not controlnet:
            raise ValueError("Choose a ControlNet: it decides what is read off the picture.")
        said = _said_of_condition(self.folder, controlnet)
        if said.get("name") not in CONDITIONS:
            raise ValueError(f"{controlnet} does not say what its control is: give the map itself.")
        if self._condition is None or self._condition[0] != said:
            self._condition = (said, build_condition(said["name"], **said.get("args", {})))
        return self._condition[1]

    def refuse_beside_a_training(self) -> None:
        """ValueError on a GPU that a training may need all of: what is loaded beside it could end it."""
        import torch

        if torch.cuda.is_available() and (reason := jobs.busy(self.folder)):
            raise ValueError(f"{reason} and may need all of the GPU: wait for it, or stop it.")

    def release(self) -> None:
        """Leaves nothing of a model on the GPU."""
        import torch

        if self._composed is not None:
            self._composed[1].unload()
        self._base = self._composed = self._checker = self._condition = None
        torch.cuda.empty_cache()

    def plain(self, name: str) -> Any:
        """The stock pipeline of the base alone, which is what a composed one draws with outside of its own calls."""
        base = self.base(name)
        pipe = base.pipeline() if self._composed is None else self._composed[1].base
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def check_safety(self, image: Image.Image) -> Image.Image:
        """The picture, or a black one where the safety checker that was named objects."""
        if self.safety_checker is None:
            return image
        import numpy as np
        import torch
        from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        if self._checker is None:
            where = self.safety_checker
            self._checker = (
                CLIPImageProcessor.from_pretrained(where),
                read_pretrained(StableDiffusionSafetyChecker, where).eval(),  # not one of random weights
            )
        processor, checker = self._checker
        pixels = processor(image, return_tensors="pt").pixel_values
        with torch.no_grad():
            checked, _ = checker(images=np.asarray(image, dtype=np.float32)[None] / 255, clip_input=pixels)
        return Image.fromarray((checked[0] * 255).round().astype(np.uint8))


def adapter(name: str) -> str:
    """A run's name as a LoRA's: letters, digits and _ alone, and different runs stay different."""
    return name.replace("_", "__").replace("/", "_s_").replace("-", "_d_")


def _version(path: Path) -> float:
    """When a run's weights were written; DreamBooth's are in folders of their own."""
    if path.is_file():
        return path.stat().st_mtime
    files = [file for part in ("", "unet", "text_encoder") for file in (path / part).glob("*.safetensors")]
    return max((file.stat().st_mtime for file in files), default=0.0)


# What there is to draw with: runs, and what other tools made and somebody put into the folder


def find(folder: Path, name: str) -> Path:
    """Where a LoRA, concept or ControlNet is: a folder, or a LoRA's file. ValueError where there is none."""
    path = safety.inside(folder, name or "")
    file = path.with_name(f"{path.name}.safetensors")
    if not path.is_dir() and not (file.is_file() and path.parent == folder / LORAS):
        raise ValueError(f"There is no {name}.")
    return path if path.is_dir() else file


def loras(folder: Path) -> list[str]:
    files = sorted((folder / LORAS).glob("*.safetensors"))
    found = [name for name in jobs.folders(folder) if (folder / name / LORA_WEIGHTS).is_file()]
    found = [name for name in found if not _concept(folder / name)]
    return found + [f"{LORAS}/{file.stem}" for file in files if safety.NAME.fullmatch(file.stem)]


def concepts(folder: Path) -> dict[str, str]:
    """Names of the folders with a learnt word, with the word."""
    found = {name: _concept(folder / name) for name in jobs.folders(folder)}
    return {name: word for name, word in found.items() if word}


def _concept(path: Path) -> str | None:
    for file, key in (("concept.json", "phrase"), ("config.json", "placeholder_token")):
        if (path / file).is_file():
            return _said(path / file, key) or None
    return None


def _said(file: Path, key: str) -> str:
    try:
        return str(load_json(file).get(key, ""))
    except (OSError, ValueError, AttributeError):  # none, or damaged: one run's file does not hide the others
        return ""


def controlnets(folder: Path) -> list[str]:
    from alignkit.controlnet import WEIGHTS

    found = [name for name in jobs.folders(folder) if (folder / name / WEIGHTS).is_file()]
    return [name for name in found if "ControlNet" in _said(folder / name / "config.json", "_class_name")]


# Getting ready


def prepare(models: Models, settings: Settings, progress: Callable, stop: threading.Event) -> None:
    """Downloads and loads what these settings draw with, and says how far that is.

    ValueError beside a training on a GPU, which could end it. Raises Cancelled as soon as `stop` is set; see `watched`
    for what goes on then. A download ends with the bytes that are on their way, or with the file where the Hub sends it
    by Xet.
    """
    place = models.place(settings.base)
    models.refuse_beside_a_training()
    if not models.holds(settings.base):
        if place != "emoji" and not Path(place).exists():
            _download(place, progress, stop)
        watched(lambda: models.base(settings.base), f"Loading {settings.base}", progress, stop)
    if settings.is_tuned:
        watched(lambda: models.composed(settings), f"Loading {', '.join(settings.parts)}", progress, stop)


def _download(name: str, progress: Callable, stop: threading.Event) -> None:
    """What `load_base` reads of a name on the Hub, into its cache; by a thread of its own, as it may take hours."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    from alignkit.base import files_on_hub

    timer = Timer(progress, f"Downloading {name}", 0)
    far = (0, 0)  # bytes, of those of the files that have begun

    class Bar(tqdm):  # what the Hub's client counts with, several threads at a time
        def __init__(self, *args: Any, unit: str = "it", **options: Any):
            super().__init__(*args, **options | {"disable": True})  # shows nothing
            self.is_bytes = unit == "B"

        def update(self, n: float | None = 1) -> None:
            nonlocal far
            if stop.is_set():
                raise Cancelled
            self.n += n or 0
            if self.is_bytes:
                far = max(far, (self.n, self.total or 0))

    def tell() -> None:
        done, timer.total = far
        timer.at(done)

    def fetch() -> None:
        snapshot_download(name, allow_patterns=files_on_hub(name), tqdm_class=Bar)

    future: Future = Future()
    threading.Thread(target=_do, args=(future, fetch), name="download", daemon=True).start()
    _follow(future, tell, stop)


@in_turn
def with_room(models: Models, begin: Callable[[], Any]) -> Any:
    """What `begin` returns, which starts a training: on a GPU that a page alone could fill, nothing is left of models.

    Waits for what is being drawn; what comes behind it finds the training at work.
    """
    import torch

    if torch.cuda.is_available():
        models.release()
    return begin()


# Controls


@in_turn
def extract_control(models: Models, settings: Settings, picture: Image.Image, is_map: bool) -> Image.Image:
    """What the ControlNet is shown, as large as what is drawn: a map that was given, or one read off a picture."""
    settings.check_size()
    controlnet = settings.controlnet
    height, width = models.base(settings.base).image_size(settings.height, settings.width)
    if is_map:
        return ImageOps.fit(picture, (width, height), _map_resampling(models.folder, controlnet))
    picture = ImageOps.fit(picture, (width, height))
    from diffusers.utils import numpy_to_pil

    from alignkit.data import to_tensor

    condition = models.condition(controlnet)
    control = condition.control(condition.extract(to_tensor(picture)[None]))
    return numpy_to_pil(control.permute(0, 2, 3, 1).cpu().numpy())[0]


def _map_resampling(folder: Path, controlnet: str | None) -> Image.Resampling:
    """Colours of classes are not mixed; what is no run of ours does not say what its maps are."""
    said = _said_of_condition(folder, controlnet) if controlnet else {}
    return Image.Resampling.NEAREST if said.get("name") == "segmentation" else Image.Resampling.BICUBIC


def _said_of_condition(folder: Path, controlnet: str) -> dict[str, Any]:
    return safety.read_config(jobs.config_of(folder, controlnet)).get("condition", {})


# Drawing


@in_turn
def draw(
    models: Models,
    settings: Settings,
    control: Image.Image | None = None,
    *,
    tuned: bool = True,
    tell: Callable[[int, int], None] = lambda step, steps: None,
    stop: threading.Event | None = None,
) -> Image.Image:
    """One picture, with its settings in it; `tuned` or by the base alone, from the same noise.

    `tell(step, steps)` is called after each denoising step. Raises Cancelled soon after `stop` is set.
    """
    settings.check()

    def after_step(pipe: Any, step: int, timestep: Any, tensors: Mapping) -> Mapping:
        if stop is not None and stop.is_set():
            raise Cancelled
        tell(step + 1, settings.num_inference_steps)
        return tensors

    options = {
        "negative_prompt": settings.negative_prompt or None,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "callback_on_step_end": after_step,
    }
    base = models.base(settings.base)
    base.check_prompts([settings.prompt, settings.negative_prompt])
    base.check_negative(settings.negative_prompt)
    if settings.height or settings.width:
        options |= dict(zip(("height", "width"), base.image_size(settings.height, settings.width), strict=True))
    if tuned and settings.is_tuned:
        composed = models.composed(settings)
        if settings.controlnet:
            if control is None:
                raise ValueError("This ControlNet wants a control: upload or draw one.")
            # diffusers takes no whole number, which is what JSON makes of 1.0
            options |= {"controlnet_conditioning_scale": float(settings.control_scale)}
        image = composed(
            settings.prompt,
            control_image=control if settings.controlnet else None,
            alignit={"strength": settings.strength} if settings.alignit else False,
            lora_scale={adapter(name): weight for name, weight in settings.loras.items()},
            truncation=settings.truncation if settings.concepts else None,
            seed=settings.seed,
            **options,
        ).images[0]
    else:
        import torch

        from alignkit.artifacts import network_of
        from alignkit.base import require_finite

        pipe = models.plain(settings.base)
        options |= {"generator": torch.Generator().manual_seed(settings.seed), "output_type": "pt"}
        images = pipe(_without_concepts(models.folder, settings), **options).images
        require_finite(images, network_of(pipe).dtype)
        image = pipe.image_processor.postprocess(images, output_type="pil", do_denormalize=[False])[0]
    image = models.check_safety(image)
    return with_settings(image, settings, control if tuned else None)


def _without_concepts(folder: Path, settings: Settings) -> str:
    """The prompt that the base alone is given: its own word in the place of a learnt one."""
    from alignkit.concepts.text import substitute

    nouns = {}
    for run in settings.concepts:
        path = find(folder, run)
        if (path / "concept.json").is_file():
            said = load_json(path / "concept.json")
            nouns[said["phrase"]] = said["class_noun"]
        else:
            said = load_json(path / "config.json")
            nouns[said["placeholder_token"]] = said["super_category_token"]
    return substitute(settings.prompt, nouns)


def with_settings(image: Image.Image, settings: Settings, control: Image.Image | None) -> Image.Image:
    """Gradio writes what is in `info` into the PNG it serves."""
    image.info = {SETTINGS: json.dumps(asdict(settings))}
    if control is not None:
        buffer = io.BytesIO()
        control.convert("RGB").save(buffer, "PNG")
        image.info[CONTROL] = base64.b64encode(buffer.getvalue()).decode()
    return image


def keep(folder: Path, image: Image.Image, what: str) -> Path:
    """Writes a picture with what is in its `info`, by day and time: what browsers are given is deleted after a day."""
    now = datetime.now()
    day = folder / OUTPUTS / now.strftime("%Y-%m-%d")
    day.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    for key, value in image.info.items():
        info.add_text(key, value)
    path = day / f"{now.strftime('%H%M%S-%f')[:-3]}_{what}.png"
    with atomic(path) as temporary:
        image.save(temporary, "PNG", pnginfo=info)
    return path


def read_settings(png: str | Path) -> tuple[Settings, Image.Image | None]:
    """What `with_settings` wrote, checked as anything that is uploaded."""
    safety.check_picture(png)
    with Image.open(png, formats=("PNG",) if str(png).lower().endswith(".png") else safety.IMAGE_FORMATS) as image:
        info = {key: value for key, value in getattr(image, "text", image.info).items() if isinstance(value, str)}
    if SETTINGS not in info:
        raise ValueError("This picture carries no settings: it was not drawn by this page, or was saved anew since.")
    try:
        said = json.loads(info[SETTINGS])
        settings = Settings(**{f.name: _of_kind(f, said[f.name]) for f in fields(Settings) if f.name in said})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError("The settings in this picture are damaged.") from error
    settings.check()
    control = None
    if CONTROL in info:
        try:
            with Image.open(io.BytesIO(base64.b64decode(info[CONTROL], validate=True)), formats=("PNG",)) as image:
                control = image.convert("RGB")
        except (OSError, ValueError, SyntaxError, binascii.Error, Image.DecompressionBombError) as error:
            raise ValueError("The control in this picture is damaged.") from error
    return settings, control


def _of_kind(f: Any, value: Any) -> Any:
    kinds = {
        "loras": lambda v: {str(name): float(weight) for name, weight in v.items()},
        "concepts": lambda v: [str(name) for name in v],
        "controlnet": lambda v: None if v is None else str(v),
    } | dict.fromkeys(("truncation", "height", "width"), lambda v: None if v is None else int(v))
    return kinds.get(f.name, f.type)(value)


class Timer:
    """Says how far a piece of work is, and how long it will take from here."""

    def __init__(self, progress: Callable, what: str, total: int):
        self.progress, self.what, self.total, self.done = progress, what, total, 0
        self.started = time.perf_counter()

    def __call__(self, *_: Any) -> None:
        self.at(self.done + 1)

    def at(self, done: int) -> None:
        self.done = done
        if not done:
            self.progress(0, desc=self.what)
            return
        pace = (time.perf_counter() - self.started) / done
        left = jobs.duration(pace * max(0, self.total - done))
        self.progress(min(1.0, done / self.total) if self.total else 0, desc=f"{self.what}: {left} left")
