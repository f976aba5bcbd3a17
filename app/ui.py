"""What every tab needs: errors as sentences, cancelling, and the context of the page."""

import functools
import html
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from gradio.components.image_editor import EditorData
from gradio.data_classes import ImageData
from gradio.processing_utils import save_bytes_to_cache

from app import jobs
from app.generate import Cancelled, Models

BUTTONS = ["download", "fullscreen"]  # of pictures; Gradio's third one would share them with the world
MODEL = {"concurrency_id": "model", "concurrency_limit": 1}  # events that share the one model, one after another
ACTION = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}  # waits for nobody
# What only looks is not even in the queue. It may not fail: out of the queue, Gradio shows no message.
QUICK = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def curves(folder: Path, runs: list[str]) -> pd.DataFrame:
    """What `jobs.curves` has, for a plot. Numbers also when it is empty, or Gradio takes the later ones for names."""
    table = pd.DataFrame(jobs.curves(folder, runs), columns=["run", "step", "curve", "value"])
    return table.astype({"step": int, "value": float})


@dataclass
class Page:
    """`folder`: the only one that names lead into. `bases`: what the page offers, name -> where it is.

    `base_config`: where the configs of those bases are that are files.
    """

    folder: Path
    bases: dict[str, str]
    models: Models
    base_config: str | None = None
    stops: dict[threading.Event, str] = field(default_factory=dict)  # of what is being done, with the session's name
    on_load: list[tuple[Callable, list]] = field(default_factory=list)
    """(function, outputs) of the tabs, for when somebody opens the page."""

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def configs_of(self, base: str) -> str:
        """The folder or Hub name that has the configs of a base; a file that is given none is named itself."""
        place = self.bases.get(base, base)
        return jobs.config_of_base(place, self.base_config) or place


def picture_upload(**options: Any) -> gr.Image:
    """An upload that is handed on as it lies there: what looks at it checks it first, and says what is wrong with it.

    Gradio's own reading opens it, and all that the page shows of its refusal is the word "Error".
    """
    upload = gr.Image(label="Picture", sources=["upload"], format="png", **options)
    upload.preprocess = _where
    return upload


def sketch_upload(**options: Any) -> gr.Sketchpad:
    """A drawing, handed on as the path of its file, as `picture_upload` does; None where nothing was drawn."""
    pad = gr.Sketchpad(layers=False, transforms=(), **options)

    def preprocess(payload: EditorData | None) -> str | None:
        if payload is None or payload.id is None:  # of a program
            return payload and _where(payload.composite)
        drawn = pad.blob_storage.pop(payload.id, None)  # of the browser
        return drawn and drawn.composite and save_bytes_to_cache(drawn.composite, "drawing.png", pad.GRADIO_CACHE)

    pad.preprocess = preprocess
    return pad


def _where(file: gr.FileData | ImageData | None) -> str | None:
    # The path was checked to be an upload's; a picture inside of the request has none.
    return file and (file.path or "picture in the request")


def said(function: Callable) -> Callable:
    """The function of an event, whose errors appear as a sentence; what nobody expected goes to the server's log."""

    def explain(error: Exception) -> gr.Error:
        if isinstance(error, gr.Error):
            return error
        if isinstance(error, Cancelled):
            return gr.Error("Cancelled.", title="Stopped", duration=4, print_exception=False)
        if isinstance(error, (ValueError, TypeError, FloatingPointError, FileNotFoundError, BlockingIOError)):
            return gr.Error(html.escape(str(error), quote=False), print_exception=False)  # Gradio shows it as HTML
        if isinstance(error, OSError) and error.strerror:  # without the file's name, which is of the machine
            return gr.Error(f"The machine says: {error.strerror}.", print_exception=False)
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for its name
            said = "The memory of the GPU is full. Draw smaller or fewer pictures, or wait for what else runs there."
            return gr.Error(said, print_exception=False)
        logging.getLogger("app").exception("in %s", function.__name__)
        return gr.Error("Something went wrong here. The log of the page says more.", print_exception=False)

    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any):
            try:
                yield from function(*args, **kwargs)
            except Exception as error:
                raise explain(error) from None
    else:

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any):
            try:
                return function(*args, **kwargs)
            except Exception as error:
                raise explain(error) from None

    return wrapped


@contextmanager
def stoppable(page: Page, request: gr.Request | None) -> Iterator[threading.Event]:
    """An event that the session's cancel button, or its end, sets."""
    stop = threading.Event()
    page.stops[stop] = _session(request)
    try:
        yield stop
    finally:
        del page.stops[stop]


def cancel(page: Page, request: gr.Request | None) -> None:
    for stop, session in list(page.stops.items()):
        if session == _session(request):
            stop.set()


def _session(request: gr.Request | None) -> str:
    return (request and request.session_hash) or ""


def numbers(text: str, what: str) -> list[float]:
    """ "1, 0.7" as numbers."""
    try:
        return [float(part) for part in text.replace(";", ",").split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(f"{what}: expected numbers with commas between them, got {text!r}.") from error


def weights(names: list[str], text: str) -> dict[str, float]:
    """LoRA -> weight: one each, or one for all."""
    given = numbers(text, "The weights of the LoRAs") or [1.0]
    given = given * len(names) if len(given) == 1 else given
    if len(given) != len(names):
        raise ValueError(f"Expected one weight, or {len(names)}, one for each LoRA, got {len(given)}.")
    return dict(zip(names, given, strict=True))
