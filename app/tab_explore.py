"""Explore: grids over two settings, where words look, and where a reward looks."""

import gradio as gr

from app import explore, generate, safety, ui
from app.generate import Settings

AXES = list(explore.AXES)


def build(page: ui.Page) -> None:
    with gr.Tabs():
        with gr.Tab("Grid"):
            chosen = _grid(page)
        with gr.Tab("Attention"):
            lora = _attention(page)
        with gr.Tab("Reward"):
            _reward(page)

    def refresh():
        names = generate.loras(page.folder)
        return gr.Dropdown(names), gr.Dropdown(list(generate.concepts(page.folder))), gr.Dropdown(names)

    page.on_load.append((refresh, [*chosen, lora]))


def _grid(page: ui.Page) -> tuple[gr.Dropdown, gr.Dropdown]:
    first_base = next(iter(page.bases))
    gr.Markdown("One picture for each pair of values: what does a setting do?")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox("a cat on a blue background", label="Prompt", elem_id="grid_prompt")
            base = gr.Dropdown(list(page.bases), value=first_base, label="Base model", visible=len(page.bases) > 1)
            loras = gr.Dropdown([], label="LoRAs", multiselect=True, allow_custom_value=True)
            concepts = gr.Dropdown([], label="Concepts", multiselect=True, allow_custom_value=True)
            alignit = gr.Checkbox(False, label="AlignIT")
            truncation = gr.Slider(
                0, 128, 0, step=1, label="Truncation", info="Units of NeTI's mapper that are kept; 0 keeps all"
            )
            with gr.Row():
                x = gr.Dropdown(AXES, value="guidance", label="Across", min_width=120)
                xs = gr.Textbox("1, 3, 5, 7", label="its values", min_width=120)
            with gr.Row():
                y = gr.Dropdown(AXES, value="seed", label="Down", min_width=120)
                ys = gr.Textbox("0, 1, 2", label="its values", min_width=120)
            steps = gr.Slider(1, 100, 15, step=1, label="Denoising steps")
            guidance = gr.Slider(0, 20, 5, step=0.5, label="Guidance")
            seed = gr.Number(0, label="Seed", precision=0)
            with gr.Row():
                go = gr.Button("Draw", variant="primary", min_width=120, elem_id="grid")
                stop = gr.Button("Cancel", min_width=80)
        with gr.Column(scale=3, min_width=300):
            picture = gr.Image(label="Grid", format="png", interactive=False, buttons=ui.BUTTONS, elem_id="grid_image")
            status = gr.Markdown("", min_height=60)

    @ui.said
    def draw(
        prompt: str, base: str = first_base, loras: list[str] = (), concepts: list[str] = (), alignit: bool = False,
        x: str = "guidance", xs: str = "1, 3, 5, 7", y: str = "seed", ys: str = "0, 1, 2", steps: float = 15,
        guidance: float = 5, seed: float = 0, truncation: float = 0,
        request: gr.Request = None, progress=gr.Progress(),  # noqa: B008
    ):  # fmt: skip
        with ui.stoppable(page, request) as stopped:
            across, down = ui.numbers(xs, x), ui.numbers(ys, y)
            settings = Settings(
                prompt=prompt or "", base=base, seed=int(seed or 0), num_inference_steps=int(steps),
                guidance_scale=guidance,
                loras=dict.fromkeys(loras or [], 1.0), concepts=list(concepts or []), alignit=bool(alignit),
                truncation=int(truncation) or None,
            )  # fmt: skip
            settings.check()
            generate.prepare(page.models, settings, progress, stopped)
            tell = generate.Timer(progress, "Drawing", len(across) * len(down) * int(steps))
            sheet = explore.grid(page.models, settings, (x, across), (y, down), tell, stopped)
            generate.keep(page.folder, sheet, "grid")
            return "", sheet

    event = go.click(
        draw, [prompt, base, loras, concepts, alignit, x, xs, y, ys, steps, guidance, seed, truncation],
        [status, picture],
        api_name="grid", show_progress_on=status, **ui.MODEL,
    )  # fmt: skip
    _cancel(page, stop, event, status)
    return loras, concepts


def _attention(page: ui.Page) -> gr.Dropdown:
    first_base = next(iter(page.bases))
    gr.Markdown("Where each word of a prompt looks while its picture is drawn.")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox("a cat left of a tree", label="Prompt")
            base = gr.Dropdown(list(page.bases), value=first_base, label="Base model", visible=len(page.bases) > 1)
            loras = gr.Dropdown([], label="LoRAs", multiselect=True, allow_custom_value=True)
            seed = gr.Number(0, label="Seed", precision=0)
            steps = gr.Slider(1, 100, 15, step=1, label="Denoising steps")
            with gr.Row():
                go = gr.Button("Look", variant="primary", min_width=120, elem_id="attention")
                stop = gr.Button("Cancel", min_width=80)
        with gr.Column(scale=3, min_width=300):
            status = gr.Markdown("", min_height=60)
            maps = gr.Gallery(
                label="Words",
                columns=3,
                format="png",
                height="auto",
                buttons=ui.BUTTONS,
                elem_classes="pixels",
                elem_id="attention_maps",
            )

    @ui.said
    def look(
        prompt: str, base: str = first_base, loras: list[str] = (), seed: float = 0, steps: float = 15,
        request: gr.Request = None, progress=gr.Progress(),  # noqa: B008
    ):  # fmt: skip
        with ui.stoppable(page, request) as stopped:
            settings = Settings(
                prompt=prompt or "", base=base, seed=int(seed or 0), num_inference_steps=int(steps),
                loras=dict.fromkeys(loras or [], 1.0),
            )  # fmt: skip
            settings.check()
            generate.prepare(page.models, settings, progress, stopped)
            tell = generate.Timer(progress, "Drawing", int(steps))
            return "", explore.attention(page.models, settings, tell, stopped)

    event = go.click(
        look, [prompt, base, loras, seed, steps], [status, maps], api_name="attention", show_progress_on=status,
        **ui.MODEL,
    )  # fmt: skip
    _cancel(page, stop, event, status)
    return loras


def _reward(page: ui.Page) -> None:
    gr.Markdown("Where on a picture a reward looks: how its score would change with each pixel.")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            upload = ui.picture_upload(height=240, elem_id="reward_picture")
            name = gr.Dropdown(
                list(explore.REWARDS), value="aesthetic", label="Reward",
                info="aesthetic and alignment by the emoji world's judges, which know nothing of photographs",
            )  # fmt: skip
            prompt = gr.Textbox("a cat on a blue background", label="Prompt, for alignment")
            method = gr.Radio(["saliency", "integrated gradients"], value="integrated gradients", label="Method")
            with gr.Row():
                go = gr.Button("Look", variant="primary", min_width=120, elem_id="reward_map")
                stop = gr.Button("Cancel", min_width=80)
        with gr.Column(scale=3, min_width=300):
            found = gr.Image(
                label="Map", format="png", interactive=False, height=320, buttons=ui.BUTTONS, elem_classes="pixels",
                elem_id="reward_image",
            )  # fmt: skip
            status = gr.Markdown("", min_height=60)

    @ui.said
    def look(
        upload: str | None, name: str = "aesthetic", prompt: str = "", method: str = "integrated gradients",
        request: gr.Request = None, progress=gr.Progress(),  # noqa: B008
    ):  # fmt: skip
        if not upload:
            raise ValueError("Upload a picture first.")
        with ui.stoppable(page, request) as stopped:
            progress(0, desc="Loading")
            tell = generate.Timer(progress, "Looking", explore.reward_calls(method))
            picture, score = explore.reward_map(name, safety.open_picture(upload), prompt, method, tell, stopped)
            return f"{name}: {score:.4g}", picture

    event = go.click(
        look, [upload, name, prompt, method], [status, found], api_name="reward_map", show_progress_on=status,
        **ui.MODEL,
    )  # fmt: skip
    _cancel(page, stop, event, status)


def _cancel(page: ui.Page, button: gr.Button, event, status: gr.Markdown) -> None:
    def cancel(request: gr.Request) -> str:
        ui.cancel(page, request)
        return "Cancelled."

    button.click(cancel, None, status, cancels=[event], queue=False, api_visibility="private")
