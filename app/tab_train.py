"""Align, Control, Personalize: a form for each trainer, and what its trainings are doing."""

import functools
import itertools
from typing import Any

import gradio as gr

from app import data, forms, generate, jobs, safety, ui

TABS = {"Align": ("alignprop",), "Control": ("controlnetpp",), "Personalize": ("neti", "customize")}
TITLES = {"neti": "A word (NeTI)", "customize": "DreamBooth, Custom Diffusion"}
ABOUT = {
    "alignprop": "**AlignProp** trains the model until its pictures please a judge: prettier, closer to the prompt.",
    "controlnetpp": "**ControlNet++** teaches the model to follow a map: depth, edges, segments.",
    "neti": "**NeTI** learns a new word from three to eight pictures. The model itself stays as it is.",
    "customize": "**DreamBooth** with a LoRA, or **Custom Diffusion**: they change the model for one thing you show.",
}
ABOUT_DATA = {
    "controlnetpp": "Pictures, a caption for each. Maps (labels, depths) are read off them unless you give your own. "
    "Or one zip: `cat.jpg`, its caption `cat.txt`, its map `maps/cat.png`; or with the `metadata.jsonl` of the docs.",
    "neti": "Three to eight pictures of one thing; captions and masks if you like: captions hold the new word, and "
    "white in a mask is what it learns. Or one zip: `cat.jpg`, its caption `cat.txt`, its mask `masks/cat.png`.",
    "customize": "Three to eight pictures of one thing, or one zip of them.",
}
SMALLEST = 64  # pixels of the bundled base; what a larger one refuses besides, it says before it trains
EXAMPLE = "configs/customize/emoji_concept"
CONFIG_OWN, EXAMPLE_PICTURES = "as the settings say", "example: a cat of the emoji world"
POLL_SECONDS = 2.0
FIRST_CURVES = ("reward/aesthetic", "reward/alignment", "loss")


def build(page: ui.Page, methods: tuple[str, ...]) -> None:
    if len(methods) == 1:
        return _build(page, methods[0])
    with gr.Tabs():
        for method in methods:
            with gr.Tab(TITLES[method]):
                _build(page, method)


def _build(page: ui.Page, method: str) -> None:
    gr.Markdown(ABOUT[method])
    with gr.Row():
        left, right = (gr.Column(scale=scale, min_width=300) for scale in (2, 3))
    with right:
        run, watching = _watched(page, method)
    with left:
        name, settings = _settings(page, method)
        _buttons(page, method, name, settings, run, watching)


def _settings(page: ui.Page, method: str) -> tuple[gr.Textbox, list[gr.components.Component]]:
    """The run's name; and what `_resolved` makes a config of: the YAML, its text as the fields had it last, the data
    and the fields."""
    first_base, place = next(iter(page.bases.items()))
    presets = forms.presets(method, first_base, page.configs_of(first_base))
    first = next(iter(presets))
    example = "emoji" in page.bases.values() and method in ("neti", "customize")
    choices = [CONFIG_OWN, *([EXAMPLE_PICTURES] if example else [])]
    text = gr.Code(
        presets[first], language="yaml", label="Settings", max_lines=30, interactive=True, elem_id=f"{method}_yaml",
        render=False,
    )  # fmt: skip
    # no gr.State: that is the server's, which is ahead of what the browser sends with a button
    agreed = gr.Textbox(presets[first], visible="hidden", elem_id=f"{method}_agreed")
    preset = gr.Dropdown(list(presets), value=first, label="Start from", elem_id=f"{method}_preset")
    about = gr.Markdown(forms.about(presets[first]))
    name = gr.Textbox(label="Name of the run", info="Letters, digits, - and _", elem_id=f"{method}_name")
    source = gr.Dropdown(choices, value=choices[-1 if place == "emoji" else 0], label="Data", allow_custom_value=True)
    with gr.Accordion("Data of your own", open=False):
        _build_data(page, method, source, choices, text)
    fields = _fields(page, method, presets[first])
    with gr.Accordion("All settings (YAML)", open=False):
        text.render()
        with gr.Row():
            upload = gr.UploadButton(
                "Upload", file_types=[".yaml", ".yml"], min_width=100, elem_id=f"{method}_upload"
            )  # fmt: skip
            download = gr.Button("File to download", min_width=100, elem_id=f"{method}_download")
        given = gr.File(label="Settings", interactive=False, visible=False, elem_id=f"{method}_given")

    @ui.said
    def choose(preset: str, base: str):
        config = forms.presets(method, base, page.configs_of(base))[preset]
        return forms.about(config), config, config, *forms.values(method, config)

    @ui.said
    def rebase(base: str):
        presets = forms.presets(method, base, page.configs_of(base))
        first = next(iter(presets))
        return gr.Dropdown(list(presets), value=first), *choose(first, base)

    @ui.said
    def fill(config: str, *values: Any):
        config = forms.filled(method, config, list(values))
        return config, config

    @ui.said
    def read(config: str):
        return config, *forms.values(method, config)

    @ui.said
    def take(path: str):
        with open(path, encoding="utf-8", errors="strict") as file:
            config = file.read(safety.MAX_YAML_BYTES + 1)
        values = forms.values(method, config)
        return config, config, *values

    @ui.said
    def give(name: str, *settings: Any):
        config = _resolved(page, method, *settings)
        file = page.folder / jobs.CACHE / f"{safety.inside(page.folder, name or method).name}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(config, encoding="utf-8")
        return gr.File(str(file), visible=True)

    base, *others = fields
    settings = [text, agreed, source, *fields]
    preset.input(choose, [preset, base], [about, text, agreed, *fields], **ui.ACTION)
    base.input(rebase, base, [preset, about, text, agreed, *fields], **ui.ACTION)
    for field in others:
        changed = field.input if hasattr(field, "input") else field.change
        changed(fill, [text, *fields], [text, agreed], **ui.ACTION)
    text.blur(read, text, [agreed, *fields], **ui.ACTION)
    upload.upload(take, upload, [text, agreed, *fields], **ui.ACTION)
    download.click(give, [name, *settings], given, **ui.ACTION)

    def refresh():
        return fresh_name(page, method), gr.Dropdown([*choices, *data.sets(page.data, method)])

    page.on_load.append((refresh, [name, source]))
    return name, settings


def _resolved(page: ui.Page, method: str, config: str, agreed: str, source: str, *values: Any) -> str:
    """The YAML with the fields' values and the data that was chosen.

    A button may be pressed before what was just typed has gone from one to the other: what the YAML says that the
    fields never had is newer than they are.
    """
    lines, those_of_fields = ([line.rstrip() for line in text.strip().splitlines()] for text in (config, agreed))
    if lines == those_of_fields:
        config = forms.filled(method, config, list(values))
    if source == CONFIG_OWN:
        return config
    if source == EXAMPLE_PICTURES:
        return jobs.set_values(config, {forms.DATA_KEY[method]: EXAMPLE})
    path = safety.inside(page.data, source)
    if source not in data.sets(page.data, method):
        raise ValueError(f"There is no set {source} for this trainer.")
    path = path / data.PROMPTS if method == "alignprop" else path
    return jobs.set_values(config, {forms.DATA_KEY[method]: str(path)})


def _buttons(
    page: ui.Page, method: str, name: gr.Textbox, settings: list[gr.components.Component], run: gr.Dropdown,
    watching: dict[str, Any],
) -> None:  # fmt: skip
    """Start and dry run. `watching`: the event that shows what the run of `run` is doing."""
    with gr.Row():
        begin = gr.Button("Start", variant="primary", min_width=100, elem_id=f"{method}_start")
        dry = gr.Button("Dry run", min_width=100, elem_id=f"{method}_dry_run")
        cancel = gr.Button("Cancel the dry run", min_width=100, visible=False)
    measured = gr.Markdown("", elem_id=f"{method}_measured")

    @ui.said
    def start(name: str, *settings: Any):
        config = _resolved(page, method, *settings)
        given = (method, (name or "").strip(), config, page.bases, page.base_config)
        started = generate.with_room(page.models, lambda: jobs.start(page.folder, *given))
        return gr.Dropdown(_runs(page, method), value=started), fresh_name(page, method)

    @ui.said
    def measure(request: gr.Request, *settings: Any):
        config = _resolved(page, method, *settings)
        with ui.stoppable(page, request) as stopped:
            said = jobs.dry_run(page.folder, method, config, page.bases, page.base_config)
            first = generate.with_room(page.models, lambda: next(said))
            for words in itertools.chain([first], said):
                if stopped.is_set():
                    said.close()
                    yield "The dry run was cancelled.", gr.Button(visible=False)
                    return
                yield words, gr.Button(visible=words.endswith("…"))

    def end(request: gr.Request):
        ui.cancel(page, request)

    begin.click(start, [name, *settings], [run, name], **ui.ACTION).success(**watching, **ui.QUICK)
    dry.click(
        measure, settings, [measured, cancel], api_visibility="private", show_progress_on=measured, **ui.MODEL
    )  # fmt: skip
    cancel.click(end, None, None, **ui.QUICK)


def _watched(page: ui.Page, method: str) -> tuple[gr.Dropdown, dict[str, Any]]:
    """A run: its state, curve and pictures, and the buttons that stop and resume it. The run, and the event's arguments
    that show it."""
    run = gr.Dropdown([], label="Run", allow_custom_value=True, elem_id=f"{method}_run")
    status = gr.Markdown("No training yet.", elem_id=f"{method}_status")
    with gr.Row():
        stop = gr.Button("Stop and save", min_width=100, elem_id=f"{method}_stop")
        resume = gr.Button("Resume", min_width=100, elem_id=f"{method}_resume")
    curve = gr.Dropdown([], label="Curve", allow_custom_value=True)
    plot = gr.LinePlot(x="step", y="value", height=260, elem_id=f"{method}_plot", x_title="step", y_title=" ")
    pictures = gr.Gallery(
        label="Pictures on the way, the newest first", columns=2, height="auto", elem_classes="pixels",
        elem_id=f"{method}_pictures", interactive=False, buttons=ui.BUTTONS,
    )  # fmt: skip
    with gr.Accordion("What the trainer says", open=False):
        log = gr.Textbox(lines=12, max_lines=12, show_label=False, container=False, interactive=False)
    shown = gr.State("")
    timer = gr.Timer(POLL_SECONDS, active=False)

    @ui.said
    def halt(run: str) -> str:
        jobs.stop(page.folder, run)
        return "Stopping after this step, and saving…"

    @ui.said
    def go_on(run: str):
        generate.with_room(page.models, lambda: jobs.resume(page.folder, run, page.bases, page.base_config))

    def watch(run: str | None, curve: str | None, shown: str):
        if run not in jobs.runs(page.folder):
            told = f"There is no run {run}." if run else "No training yet."
            return told, gr.skip(), [], "", gr.skip(), "", gr.Timer(active=False)
        state = jobs.status(page.folder, run)
        table = ui.curves(page.folder, [run])
        names = sorted(table["curve"].unique())
        if curve not in names:
            curve = next((name for name in FIRST_CURVES if name in names), names[0] if names else None)
        samples = jobs.samples(page.folder, run)
        key = f"{run}:{len(samples)}"
        return (
            str(state),
            table[table["curve"] == curve],
            gr.skip() if key == shown else samples,
            jobs.log_tail(page.folder, run),
            gr.Dropdown(names, value=curve),
            key,
            gr.Timer(active=state.state == "running"),
        )

    watching = {"fn": watch, "inputs": [run, curve, shown]}
    watching |= {"outputs": [status, plot, pictures, log, curve, shown, timer]}
    stop.click(halt, run, status, **ui.ACTION)
    resume.click(go_on, run, None, **ui.ACTION).success(**watching, **ui.QUICK)
    gr.on([run.input, curve.input, timer.tick], **watching, **ui.QUICK)

    def refresh():
        found = _runs(page, method)
        chosen = next((run for run in found if jobs.running(page.folder / run)), found[0] if found else None)
        return gr.Dropdown(found, value=chosen), *watch(chosen, None, "")

    page.on_load.append((refresh, [run, *watching["outputs"]]))
    return run, watching


def _runs(page: ui.Page, method: str) -> list[str]:
    return [run for run in jobs.runs(page.folder) if run.startswith(f"{method}/")]


def fresh_name(page: ui.Page, method: str) -> str:
    number = 1
    while (page.folder / method / f"run-{number}").exists():
        number += 1
    return f"run-{number}"


def _fields(page: ui.Page, method: str, config: str) -> list[gr.components.Component]:
    """A widget for each visible setting, two in a row, with the dataclass's own words."""
    made, pairs = [], list(zip(forms.visible(method), forms.values(method, config), strict=True))
    for i in range(0, len(pairs), 2):
        with gr.Row():
            for setting, value in pairs[i : i + 2]:
                label = setting.key.replace("_", " ").replace(".", ": ")
                common = {"label": label, "info": setting.help, "min_width": 140}
                common |= {"elem_id": f"{method}_{setting.key.replace('.', '_')}"}
                if setting.key == forms.BASE:
                    common |= {
                        "label": "Base model",
                        "info": "A base of this page; others by --base on its command line",
                    }
                    made.append(gr.Dropdown(list(page.bases), value=value, allow_custom_value=True, **common))
                elif setting.kind == "choice":
                    made.append(gr.Dropdown(list(setting.choices), value=value, **common))
                elif setting.kind in ("int", "float"):
                    made.append(gr.Number(value, precision=0 if setting.kind == "int" else None, **common))
                elif setting.kind == "bool":
                    made.append(gr.Checkbox(bool(value), **common))
                else:
                    made.append(gr.Textbox(value, **common))
    return made


def _build_data(page: ui.Page, method: str, source: gr.Dropdown, choices: list[str], text: gr.Code) -> None:
    called = gr.Textbox(label="Name of the set", placeholder="my-pictures", elem_id=f"{method}_set")
    if method == "alignprop":
        prompts = gr.Textbox(label="Prompts, one a line", lines=5)
        keep = gr.Button("Keep these prompts")

        @ui.said
        def keep_prompts(name: str, text: str):
            data.save_prompts(page.data, name, text)
            return gr.Dropdown([*choices, *data.sets(page.data, method)], value=name)

        keep.click(
            keep_prompts, [called, prompts], source, api_name="keep_prompts", **ui.ACTION | {"api_visibility": "public"}
        )
        return
    gr.Markdown(ABOUT_DATA[method])
    uploads = gr.File(
        label="Pictures, or a zip", file_count="multiple", file_types=[*safety.IMAGE_SUFFIXES, ".zip"],
        elem_id=f"{method}_uploads",
    )  # fmt: skip
    captions = gr.Textbox(
        label="Captions, one a line, in the order of the pictures", lines=4, visible=method != "customize"
    )
    beside = gr.File(
        label="Maps, called as their pictures" if method == "controlnetpp" else "Masks, called as their pictures",
        file_count="multiple", file_types=safety.IMAGE_SUFFIXES, visible=method != "customize",
        elem_id=f"{method}_beside",
    )  # fmt: skip
    with gr.Row():
        keep = gr.Button("Check and keep", min_width=120, elem_id=f"{method}_keep")
        stop = gr.Button("Cancel", min_width=80)
    told = gr.Markdown("", min_height=60)
    table = gr.Dataframe(
        headers=["file", "", "why"], interactive=False, wrap=True, visible=False, elem_id=f"{method}_findings"
    )

    @ui.said
    def keep_pictures(
        name: str, uploads: list[str] | None = None, captions: str | None = "", beside: list[str] | None = None,
        config: str = text.value, request: gr.Request = None, progress=gr.Progress(),  # noqa: B008
    ):  # fmt: skip
        data.new_set(page.data, name)  # raises before any work
        beside_the_point = (forms.DATA_KEY[method], "pretrained_model_name_or_path", "base_config")
        said = {key: value for key, value in safety.read_config(config).items() if key not in beside_the_point}
        jobs.check(page.folder, said, page.bases)
        resolution = said.get("resolution") or SMALLEST
        with ui.stoppable(page, request) as stopped:
            if method == "controlnetpp":
                load = functools.partial(data.condition_of, said)
                condition = generate.watched(load, "Loading what reads the maps", progress, stopped)
                column = said.get("condition_column") or condition.column
                folder, keeping = data.MAPS, data.for_controlnets(condition, column)
            else:
                word = said.get("placeholder_token") if method == "neti" else None  # the other's are its templates
                column, folder = None, data.MASKS
                keeping = data.for_concepts(resolution, word)
            progress(0, desc="Opening what was uploaded")
            with data.given(uploads or [], captions or "", beside or [], folder, column) as items:
                tell = generate.Timer(progress, "Checking", max(1, len(items)))
                path, findings = data.save_pictures(page.data, name, items, keeping, tell, stopped)
        chosen = gr.skip() if path is None else gr.Dropdown([*choices, *data.sets(page.data, method)], value=name)
        words = ["None of these pictures can be used."] if path is None else data.check(path, resolution)
        return chosen, "\n\n".join(words), gr.Dataframe([list(finding) for finding in findings], visible=True)

    def cancel(request: gr.Request) -> str:
        ui.cancel(page, request)
        return "Cancelled: nothing was kept."

    event = keep.click(
        keep_pictures, [called, uploads, captions, beside, text], [source, told, table], show_progress_on=told,
        api_name=f"keep_pictures_{method}", **ui.ACTION | {"show_progress": "full", "api_visibility": "public"},
    )  # fmt: skip
    stop.click(cancel, None, told, cancels=[event], **ui.QUICK)
