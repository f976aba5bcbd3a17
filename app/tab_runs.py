"""Runs: what there is, how it went, what came of it; and the page's functions for other programs."""

import itertools
from collections.abc import Iterator

import gradio as gr

from app import jobs, safety, ui
from app.generate import Cancelled, with_room

COLUMNS = ["run", "state", "step", "of"]


def build(page: ui.Page) -> None:
    with gr.Row():
        table = gr.Dataframe(headers=COLUMNS, interactive=False, label="Runs", max_height=260, elem_id="runs_table")
    again = gr.Button("Look again", min_width=100, elem_id="runs_refresh")
    with gr.Tabs():
        with gr.Tab("Inspect"):
            run = gr.Dropdown([], label="Run", allow_custom_value=True, elem_id="runs_run")
            status = gr.Markdown("")
            with gr.Row():
                with gr.Column(min_width=300):
                    pictures = gr.Gallery(
                        label="Pictures",
                        columns=2,
                        height="auto",
                        elem_classes="pixels",
                        interactive=False,
                        buttons=ui.BUTTONS,
                    )
                with gr.Column(min_width=300):
                    config = gr.Code(language="yaml", label="Settings", interactive=False, max_lines=20)
            with gr.Row():
                pack = gr.Button("Files to download", min_width=120, elem_id="runs_pack")
                delete = gr.Button("Delete…", variant="stop", min_width=120, elem_id="runs_delete")
            files = gr.File(
                label="Files", file_count="multiple", interactive=False, visible=False, elem_id="runs_files"
            )
            asked = gr.State(None)  # what it was asked for, which a request past the page does not have
            with gr.Group(visible=False) as asking:
                question = gr.Markdown("", padding=True)
                with gr.Row():
                    sure = gr.Button("Delete it for good", variant="stop", min_width=120, elem_id="runs_sure")
                    keep = gr.Button("Keep it", min_width=120)
        with gr.Tab("Compare"):
            several = gr.Dropdown([], label="Runs", multiselect=True, allow_custom_value=True, elem_id="runs_several")
            curve = gr.Dropdown([], label="Curve", allow_custom_value=True)
            plot = gr.LinePlot(x="step", y="value", color="run", height=340, x_title="step", elem_id="runs_plot")

    def refresh():
        names = jobs.runs(page.folder)
        rows = []
        for name in names:
            state = jobs.status(page.folder, name)
            rows.append([name, state.state, state.step, state.max_steps])
        return gr.Dataframe(rows, headers=COLUMNS), gr.Dropdown(names), gr.Dropdown(names)

    @ui.said
    def inspect(run: str | None):
        if not run:
            return "", [], ""
        return str(jobs.status(page.folder, run)), jobs.samples(page.folder, run), jobs.config_of(page.folder, run)

    @ui.said
    def download(run: str) -> list[str]:
        return jobs.artifacts(page.folder, run)

    @ui.said
    def ask(run: str):
        path = jobs.find(page.folder, run)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())
        question = f"Delete **{run}**, {size / 2**20:.1f} MB with its checkpoints? Nobody can bring it back."
        return question, run, gr.Group(visible=True)

    @ui.said
    def remove(asked: str | None):
        if asked is None:
            raise ValueError("Nothing is deleted before it was asked for.")
        jobs.delete(page.folder, asked)
        rows, _, several = refresh()
        return rows, gr.Dropdown(jobs.runs(page.folder), value=None), several, gr.Group(visible=False)

    @ui.said
    def compare(runs: list[str], curve: str):
        rows = ui.curves(page.folder, runs or [])
        names = sorted(rows["curve"].unique())
        curve = curve if curve in names else (names[0] if names else None)
        return gr.LinePlot(rows[rows["curve"] == curve], y_title=curve), gr.Dropdown(names, value=curve)

    again.click(refresh, None, [table, run, several], **ui.QUICK)
    public = ui.ACTION | {"api_visibility": "public"}
    run.change(inspect, run, [status, pictures, config], api_name="inspect_run", **public)
    run.change(lambda: (gr.File(visible=False), gr.Group(visible=False)), None, [files, asking], **ui.QUICK)
    pack.click(
        download, run, files, api_name="run_files", show_progress_on=status, **public | {"show_progress": "full"}
    ).success(lambda: gr.File(visible=True), None, files, **ui.QUICK)  # fmt: skip
    delete.click(ask, run, [question, asked, asking], **ui.ACTION)
    keep.click(lambda: gr.Group(visible=False), None, asking, **ui.QUICK)
    sure.click(remove, asked, [table, run, several, asking], **ui.ACTION)
    gr.on([several.change, curve.input], compare, [several, curve], [plot, curve], **ui.ACTION)
    page.on_load.append((refresh, [table, run, several]))
    _api(page)


def _api(page: ui.Page) -> None:
    """What other programs call; the buttons do the same."""

    @ui.said
    def list_runs() -> list[str]:
        """Names of all runs, the newest first."""
        return jobs.runs(page.folder)

    @ui.said
    def run_status(run: str) -> dict:
        """state (running, finished, stopped or failed), step, max_steps, seconds_left, message."""
        return vars(jobs.status(page.folder, run))

    @ui.said
    def run_curves(run: str) -> list[dict]:
        """Rows {run, step, curve, value}."""
        return jobs.curves(page.folder, [run])

    @ui.said
    def presets(method: str) -> dict:
        """YAML by name, of the configs that come with alignprop, controlnetpp, neti or customize."""
        if method not in jobs.METHODS:
            raise ValueError(f"There is no trainer {method!r}: {', '.join(jobs.METHODS)}.")
        return jobs.presets(method)

    @ui.said
    def start_training(method: str, name: str, config: str) -> str:
        """Starts a training with this YAML; returns the run's name."""
        given = (method, name, config, page.bases, page.base_config)
        return with_room(page.models, lambda: jobs.start(page.folder, *given))

    @ui.said
    def dry_run(method: str, config: str, request: gr.Request) -> Iterator[str]:
        """How far it is, and at last the time and memory of a training, by two steps. /cancel ends it."""
        with ui.stoppable(page, request) as stopped:
            said = jobs.dry_run(page.folder, method, config, page.bases, page.base_config)
            first = with_room(page.models, lambda: next(said))
            for words in itertools.chain([first], said):
                if stopped.is_set():
                    said.close()
                    raise Cancelled
                yield words

    @ui.said
    def stop_training(run: str) -> str:
        """Saves and ends it after its current step."""
        jobs.stop(page.folder, run)
        return run

    @ui.said
    def resume_training(run: str) -> str:
        """Goes on from the newest checkpoint."""
        with_room(page.models, lambda: jobs.resume(page.folder, run, page.bases, page.base_config))
        return run

    @ui.said
    def delete_run(run: str, confirm: str) -> str:
        """Deletes a run for good; `confirm` is its name once more."""
        safety.inside(page.folder, run)
        if confirm != run:
            raise ValueError("Say the run's name again to delete it.")
        jobs.delete(page.folder, run)
        return run

    for function in (list_runs, run_status, run_curves, presets, start_training, stop_training, resume_training,
                     delete_run):  # fmt: skip
        gr.api(function, api_name=function.__name__, queue=False)
    gr.api(dry_run, api_name="dry_run", **ui.MODEL)
