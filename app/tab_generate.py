"""Generate: the base and what was made of it, side by side from the same noise."""

import html
import random
import threading
from collections.abc import Callable
from dataclasses import asdict

import gradio as gr
from PIL import Image

from app import generate, safety, ui
from app.generate import Settings

PICTURE, MAP = "a picture: read the map off it", "the map itself"


def build(page: ui.Page) -> None:
    first_base = next(iter(page.bases))
    size = [
        gr.Number(0, label=label, info="0: the base's own", precision=0, min_width=100, render=False)
        for label in ("Height", "Width")
    ]
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox("a cat on a blue background", label="Prompt", lines=2, elem_id="prompt")
            with gr.Row():
                go = gr.Button("Generate", variant="primary", elem_id="generate", min_width=120)
                stop = gr.Button("Cancel", min_width=80, elem_id="cancel")
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=100, elem_id="seed")
                dice = gr.Button("Another seed", min_width=100)
            base = gr.Dropdown(list(page.bases), value=first_base, label="Base model", visible=len(page.bases) > 1)
            status = gr.Markdown("", elem_id="generate_status", min_height=60)
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                options = {
                    "interactive": False,
                    "format": "png",
                    "elem_classes": "pixels",
                    "min_width": 140,
                    "height": 270,
                }
                options |= {"buttons": ui.BUTTONS}
                before = gr.Image(label="Base", elem_id="base_image", **options)
                after = gr.Image(label="Tuned", elem_id="tuned_image", **options)
            with gr.Accordion("Settings of these pictures", open=False):
                used = gr.JSON(label="Settings")
                gr.Markdown("Each PNG carries them: download one, and give it back here later.")
                png = gr.UploadButton("Load settings from a PNG", file_types=[".png"], elem_id="load_png")
    with gr.Row():
        with gr.Column(min_width=300), gr.Accordion("LoRAs and concepts", open=True):
            loras = gr.Dropdown([], label="LoRAs", multiselect=True, allow_custom_value=True, elem_id="loras")
            weights = gr.Textbox("1", label="Weights", info="One for all, or one each: 1, 0.7")
            concepts = gr.Dropdown(
                [], label="Concepts", multiselect=True, allow_custom_value=True, elem_id="concepts"
            )  # fmt: skip
            words = gr.Markdown("Words that were learnt under *Personalize* appear here.")
            truncation = gr.Slider(
                0, 128, 0, step=1, label="Truncation", info="Units of NeTI's mapper that are kept; 0 keeps all"
            )
            alignit = gr.Checkbox(False, label="AlignIT", info="Keep the concept from the rest of the prompt")
            strength = gr.Slider(0, 1, 1, step=0.05, label="AlignIT's strength")
        with gr.Column(min_width=300), gr.Accordion("Control", open=False):
            controlling, looking = _control(page, base, size)
        with gr.Column(min_width=300), gr.Accordion("More", open=False):
            negative = gr.Textbox("", label="Negative prompt")
            steps = gr.Slider(1, 100, 25, step=1, label="Denoising steps")
            guidance = gr.Slider(0, 20, 5, step=0.5, label="Guidance")
            with gr.Row():
                for side in size:
                    side.render()

    chosen = [
        prompt, seed, base, loras, weights, concepts, truncation, alignit, strength,
        *controlling, steps, guidance, negative, *size,
    ]  # fmt: skip

    @ui.said
    def draw(
        prompt: str, seed: float = 0, base: str = first_base, loras: list[str] = (), weights: str = "1",
        concepts: list[str] = (), truncation: float = 0, alignit: bool = False, strength: float = 1,
        controlnet: str = "", control_scale: float = 1, kind: str = PICTURE, upload: str | None = None,
        sketch: str | None = None, steps: float = 25, guidance: float = 5, negative: str = "",
        height: float | None = None, width: float | None = None,
        request: gr.Request = None, progress=gr.Progress(),  # noqa: B008
    ):  # fmt: skip
        with ui.stoppable(page, request) as stopped:
            settings = Settings(
                prompt=prompt or "", base=base, seed=int(seed or 0), negative_prompt=negative or "",
                num_inference_steps=int(steps), guidance_scale=guidance, loras=ui.weights(loras or [], weights),
                concepts=list(concepts or []), truncation=int(truncation) or None, alignit=bool(alignit and concepts),
                strength=strength, controlnet=controlnet or None, control_scale=control_scale,
                height=int(height or 0) or None, width=int(width or 0) or None,
            )  # fmt: skip
            settings.check()
            given = _given(controlnet, upload, sketch)
            generate.prepare(page.models, settings, progress, stopped)
            control = given and _control_of(page, settings, kind, given, progress, stopped)
            tell = generate.Timer(progress, "Drawing", (1 + settings.is_tuned) * settings.num_inference_steps)
            before = generate.draw(page.models, settings, tuned=False, tell=tell, stop=stopped)
            generate.keep(page.folder, before, "base")
            yield "The base is done." if settings.is_tuned else "", before, None, asdict(settings)
            if settings.is_tuned:
                after = generate.draw(page.models, settings, control, tell=tell, stop=stopped)
                generate.keep(page.folder, after, "tuned")
                yield "", before, after, asdict(settings)

    @ui.said
    def load(path: str):
        settings, control = generate.read_settings(path)
        values = asdict(settings)
        if settings.base not in page.bases:
            gr.Warning(f"It was drawn by {html.escape(settings.base)}, which this page does not offer.")
        return [
            settings.prompt, settings.seed, settings.base if settings.base in page.bases else first_base,
            list(settings.loras), ", ".join(f"{w:g}" for w in settings.loras.values()) or "1", settings.concepts,
            settings.truncation or 0, settings.alignit, settings.strength, settings.controlnet or "",
            settings.control_scale, MAP if control else PICTURE, control, None, settings.num_inference_steps,
            settings.guidance_scale, settings.negative_prompt, settings.height or 0, settings.width or 0, values,
        ]  # fmt: skip

    def cancel(request: gr.Request) -> str:
        ui.cancel(page, request)
        return "Cancelled."

    outputs = [status, before, after, used]
    drawing = gr.on(
        [go.click, prompt.submit], draw, chosen, outputs, api_name="generate", show_progress="full",
        show_progress_on=status, **ui.MODEL,
    )  # fmt: skip
    stop.click(cancel, None, status, cancels=[drawing, looking], api_name="cancel", queue=False)
    dice.click(lambda: random.randrange(2**32), None, seed, **ui.QUICK)
    png.upload(load, png, [*chosen, used], api_name="read_settings", concurrency_limit=None, show_progress="hidden")

    def refresh():
        found = generate.concepts(page.folder)
        told = ", ".join(f"`{word}` ({run})" for run, word in found.items())
        return (
            gr.Dropdown(generate.loras(page.folder)),
            gr.Dropdown(list(found)),
            f"Write {told} in the prompt." if told else "Words that you teach under *Personalize* appear here.",
        )

    page.on_load.append((refresh, [loras, concepts, words]))


def _control(
    page: ui.Page, base: gr.Dropdown, size: list[gr.Number]
) -> tuple[list[gr.components.Component], gr.events.Dependency]:
    """A ControlNet, its strength and what it is given; and the event that shows what it will see."""
    controlnet = gr.Dropdown([""], value="", label="ControlNet", allow_custom_value=True, elem_id="controlnet")
    scale = gr.Slider(0, 2, 1, step=0.05, label="Its strength")
    kind = gr.Radio([PICTURE, MAP], value=PICTURE, label="What you give is")
    with gr.Tabs():
        with gr.Tab("Upload"):
            upload = ui.picture_upload(height=200)
        with gr.Tab("Draw"):
            sketch = ui.sketch_upload(label="Drawing", canvas_size=(256, 256), height=320, elem_id="sketch")
    preview = gr.Button("Preview what the ControlNet will see")
    seen = gr.Image(
        label="What it sees", interactive=False, height=200, format="png", buttons=ui.BUTTONS, elem_id="seen"
    )  # fmt: skip

    @ui.said
    def look(
        base: str, controlnet: str, kind: str, upload: str | None, sketch: str | None, height: float | None = None,
        width: float | None = None, request: gr.Request = None, progress=gr.Progress(),  # noqa: B008
    ):  # fmt: skip
        given = _given(controlnet, upload, sketch)
        if given is None:
            raise ValueError("Choose a ControlNet first.")
        with ui.stoppable(page, request) as stopped:
            sides = {"height": int(height or 0) or None, "width": int(width or 0) or None}
            generate.prepare(page.models, Settings("", base=base), progress, stopped)
            settings = Settings("", base=base, controlnet=controlnet, **sides)
            return _control_of(page, settings, kind, given, progress, stopped)

    looking = preview.click(
        look, [base, controlnet, kind, upload, sketch, *size], seen, api_name="preview_control", **ui.MODEL
    )
    page.on_load.append((lambda: gr.Dropdown(["", *generate.controlnets(page.folder)]), [controlnet]))
    return [controlnet, scale, kind, upload, sketch], looking


def _given(controlnet: str | None, upload: str | None, sketch: str | None) -> Image.Image | None:
    """What the ControlNet is to follow, or None without a ControlNet."""
    if not controlnet:
        return None
    if not (upload or sketch):
        raise ValueError("Upload or draw something for the ControlNet to follow.")
    if upload and sketch:
        raise ValueError("There is a picture and a drawing for the ControlNet: take one of them away.")
    return safety.open_picture(upload or sketch, None if upload else "The drawing")


def _control_of(
    page: ui.Page, settings: Settings, kind: str, given: Image.Image, progress: Callable, stop: threading.Event
) -> Image.Image:
    """The map that the ControlNet sees."""
    return generate.watched(
        lambda: generate.extract_control(page.models, settings, given, kind == MAP),
        "Reading the map off the picture",
        progress,
        stop,
    )
