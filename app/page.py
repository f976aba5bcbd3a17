"""The page: its tabs, and how it is served."""

import os
import shutil
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported, which would ask for its version else

import gradio as gr
from starlette.middleware import Middleware

from alignkit.emoji import EXAMPLES_DIR
from app import jobs, safety, tab_explore, tab_generate, tab_runs, tab_train, ui
from app.generate import Models

QUEUE_SIZE = 16
TITLE = "alignkit"
RIGHTS = (
    "Use pictures that you have the right to use, and of people only those who agree. What you upload and draw stays "
    "on this machine, in the folder of the page: what is drawn in its `outputs`."
)
# The system's own fonts: Gradio's themes fetch theirs from elsewhere.
THEME = gr.themes.Default(
    primary_hue="indigo",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(  # the theme's own gray is too light to read
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    block_label_text_color="*neutral_600",
    block_label_text_color_dark="*neutral_200",
)
CSS = """
.pixels img {
    image-rendering: pixelated;
    width: 100% !important;
    height: 100% !important;
    object-fit: contain !important;
}
"""


def build(
    folder: str | Path,
    bases: dict[str, str] | None = None,
    safety_checker: str | None = None,
    base_config: str | None = None,
) -> gr.Blocks:
    """The page over a folder of runs, which is made if it is not there.

    bases: name -> folder, file or Hub name. base_config: of those that are files, `config` of `load_base`.
    """
    folder, bases = Path(folder).resolve(), bases or {"emoji": "emoji"}
    folder.mkdir(parents=True, exist_ok=True)
    if "emoji" in bases.values():
        lay_out_examples(folder)
    os.environ["GRADIO_TEMP_DIR"] = str(folder / jobs.CACHE)  # components look at it when they are made
    page = ui.Page(folder, bases, Models(folder, bases, safety_checker, base_config), base_config)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as demo:
        gr.Markdown(f"# {TITLE}\nTeach a text-to-image model what you like, to follow a map, and new words. {RIGHTS}")
        with gr.Tabs(overflow_behavior="wrap"):
            with gr.Tab("Generate", id="generate") as generating:
                tab_generate.build(page)
            look_again = {generating: list(page.on_load)}
            for title, methods in tab_train.TABS.items():
                with gr.Tab(title, id=title.lower()):
                    tab_train.build(page, methods)
            built = len(page.on_load)
            with gr.Tab("Explore", id="explore") as exploring:
                tab_explore.build(page)
            look_again[exploring] = page.on_load[built:]
            with gr.Tab("Runs", id="runs"):
                tab_runs.build(page)
        for function, outputs in page.on_load:
            demo.load(function, None, outputs, **ui.QUICK)
        for tab, functions in look_again.items():  # for what was trained since
            for function, outputs in functions:
                tab.select(function, None, outputs, **ui.QUICK)

        def leave(request: gr.Request) -> None:
            ui.cancel(page, request)

        demo.unload(leave)
    return demo.queue(max_size=QUEUE_SIZE)


def lay_out_examples(folder: Path) -> None:
    """Copies of what ships with the emoji world, as runs: something to draw with before anything is trained.

    Once: they may be deleted, and do not come back.
    """
    laid = folder / ".examples"
    if not laid.exists():
        for example in sorted(EXAMPLES_DIR.glob("*")):
            shutil.copytree(example, folder / "examples" / example.name, dirs_exist_ok=True)
        laid.touch()


def launch(
    demo: gr.Blocks,
    folder: str | Path,
    host: str = "127.0.0.1",
    port: int | None = None,
    password: str | None = None,
    **options: Any,
) -> tuple[Any, str, str]:
    """Serves it, on this machine alone unless told; `options` are those of Gradio's launch.

    The process moves into the folder, since Gradio serves copies of what functions return from the current one.
    Raises ValueError for an address that others can reach without a password.
    """
    if not password and not safety.is_loopback(host):
        raise ValueError(f"{host} can be reached by others: give a password with it, or stay on 127.0.0.1.")
    folder = Path(folder).resolve()
    safety.limit_pixels()
    os.chdir(folder)
    return demo.launch(
        server_name=host,
        server_port=port,
        share=False,
        auth=safety.login("alignkit", password) if password else None,
        auth_message="The name is alignkit; the password is what the page was started with." if password else None,
        show_error=False,
        max_file_size=safety.MAX_ZIP_BYTES,  # what is no zip is measured where it is opened
        allowed_paths=[],
        strict_cors=True,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        run_history=False,  # it would offer to send what was drawn to the Hub
        footer_links=["api"],
        app_kwargs={"middleware": [Middleware(safety.OwnSite, loopback_only=not password)]},
        _frontend=False,  # skips a look at the page that gives up after 3 s, which a busy machine needs longer for
        theme=THEME,
        css=CSS,
        **options,
    )
