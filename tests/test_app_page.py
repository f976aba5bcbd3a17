"""The running page through its API: what a program of yours would call, and what somebody with bad intentions."""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import httpx
import psutil
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import EpsImagePlugin, Image

from app import generate, jobs, page, safety, tab_generate
from tests.app_server import make_world, serving
from tests.benchmarks.app_process import page_process
from tests.benchmarks.app_soak import soak
from tests.test_app import png_of_size

OUTWARD: list[tuple] = []  # connections to anywhere but this machine


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return folder, make_world(folder)


@pytest.fixture(scope="module")
def url(world):
    folder, bases = world
    connect = socket.socket.connect

    def watched(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            OUTWARD.append(address)
        return connect(self, address)

    socket.socket.connect = watched
    try:
        with serving(folder / "runs", bases, queue_size=4) as url:
            yield url
    finally:
        socket.socket.connect = connect


@pytest.fixture(scope="module")
def client(url, tmp_path_factory):
    return Client(url, verbose=False, httpx_kwargs={"timeout": 60}, download_files=tmp_path_factory.mktemp("downloads"))


def wait_for(client: Client, run: str, state: str, steps: int = 0) -> dict:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        status = client.predict(run, api_name="/run_status")
        if status["state"] == state and status["step"] >= steps:
            return status
        time.sleep(0.1)
    pytest.fail(f"{run} is {status}, not {state}")


def test_what_is_public_has_a_name(client):
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(named) == {
        "/generate", "/cancel", "/preview_control", "/read_settings", "/grid", "/attention", "/reward_map",
        "/list_runs", "/run_status", "/run_curves", "/presets", "/start_training", "/dry_run", "/stop_training",
        "/resume_training", "/delete_run", "/inspect_run", "/run_files", "/keep_prompts", "/keep_pictures_controlnetpp",
        "/keep_pictures_neti", "/keep_pictures_customize",
    }  # fmt: skip
    for name, endpoint in named.items():
        names = [parameter["parameter_name"] for parameter in endpoint["parameters"]]
        assert not any(re.match(r"param_\d|value_\d", parameter) for parameter in names), (name, names)


def test_base_and_tuned_side_by_side_and_again_from_the_png(client):
    _, base, tuned, used = client.predict(
        "a hat", seed=3, steps=2, loras=["alignprop/style"], weights="0.8", api_name="/generate"
    )
    assert Image.open(base).tobytes() != Image.open(tuned).tobytes()
    assert used["loras"] == {"alignprop/style": 0.8} and used["seed"] == 3
    read = client.predict(handle_file(tuned), api_name="/read_settings")
    assert read[:5] == ("a hat", 3, "tiny", ["alignprop/style"], "0.8") and read[-1] == used
    _, _, again, _ = client.predict(
        read[0], seed=read[1], base=read[2], loras=read[3], weights=read[4], steps=read[14], guidance=read[15],
        api_name="/generate",
    )  # fmt: skip
    assert Image.open(again).tobytes() == Image.open(tuned).tobytes()


def test_a_controlnet_follows_an_upload_a_drawing_and_its_own_png(client, tmp_path):
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "picture.png")
    guided = {"prompt": "a hat", "seed": 3, "steps": 2, "controlnet": "controlnetpp/edges", "api_name": "/generate"}
    given = handle_file(str(tmp_path / "picture.png"))
    drawing = {"background": None, "layers": [], "composite": given}
    _, base, tuned, _ = client.predict(upload=given, **guided)  # at the strength of the form, a whole number in JSON
    _, _, drawn, _ = client.predict(sketch=drawing, **guided)
    _, _, weak, _ = client.predict(upload=given, control_scale=0, **guided)
    assert pixels(drawn) == pixels(tuned) != pixels(base) == pixels(weak)
    shown = client.predict("tiny", "controlnetpp/edges", tab_generate.PICTURE, given, None, api_name="/preview_control")
    read = client.predict(handle_file(tuned), api_name="/read_settings")
    kind, control = read[11:13]
    assert kind == tab_generate.MAP and pixels(control) == pixels(shown)
    _, _, again, _ = client.predict(upload=handle_file(control), kind=kind, **guided)
    assert pixels(again) == pixels(tuned)
    with pytest.raises(AppError, match="a picture and a drawing"):
        client.predict(upload=given, sketch=drawing, **guided)


def pixels(file: str) -> bytes:
    return Image.open(file).convert("RGB").tobytes()


def test_a_drawing_is_read_as_any_upload_is(client, tmp_path, monkeypatch):
    """By no reader of Pillow's but those of four kinds: PostScript, for one, would be run."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("PostScript was run"))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "bomb.png").write_bytes(png_of_size(60_000, 60_000))
    for name, why in [("a.eps", "not a picture"), ("bomb.png", "million pixels")]:
        drawing = {"background": None, "layers": [], "composite": handle_file(str(tmp_path / name))}
        with pytest.raises(AppError, match=why):
            client.predict("a", controlnet="controlnetpp/edges", sketch=drawing, api_name="/generate")


def test_what_explore_shows(client, tmp_path):
    words = {"prompt": "a <thing> hat", "concepts": ["neti/thing"], "steps": 1}
    _, sheet = client.predict(
        x="truncation", xs="1, 4", y="AlignIT strength", ys="0, 1", **words, api_name="/grid"
    )  # fmt: skip
    assert Image.open(sheet).height == 24 + 2 * (16 * 8 + 4)
    _, maps = client.predict("a red hat", loras=["alignprop/style"], steps=1, api_name="/attention")
    assert [entry["caption"] for entry in maps] == ["the picture", "a", "red", "hat"]
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "picture.png")
    score, heat = client.predict(
        handle_file(str(tmp_path / "picture.png")), "incompressibility", method="saliency", api_name="/reward_map"
    )
    assert re.fullmatch(r"incompressibility: -?[\d.]+", score) and Image.open(heat).size == (64, 64)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "x " * 60}, "Prompt too long"),
        ({"prompt": "a", "loras": ["alignprop/style"], "weights": "heavy"}, "numbers with commas"),
        ({"prompt": "a", "loras": ["../../etc"]}, "begins with a letter or digit"),
        ({"prompt": "a", "loras": ["<img src=x onerror=alert(1)>"]}, "&lt;img"),
        ({"prompt": "a", "controlnet": "alignprop/style"}, "Upload or draw something"),
    ],
)
def test_errors_are_sentences(client, arguments, sentence):
    with pytest.raises(AppError, match=sentence) as error:
        client.predict(**arguments, api_name="/generate")
    assert "Traceback" not in str(error.value) and 'File "' not in str(error.value)


def test_what_nobody_expected_does_not_reach_the_page(client, monkeypatch):
    def broken(*_):
        raise RuntimeError("the secret path /home/me")

    monkeypatch.setattr(jobs, "runs", broken)
    with pytest.raises(AppError, match="Something went wrong") as error:
        client.predict(api_name="/list_runs")
    assert "secret" not in str(error.value)


def test_drawing_is_cancelled(client):
    """Not only the answer: the work ends, so that the next one need not wait for it."""
    job = client.submit("a hat", steps=100, guidance=5, api_name="/generate")
    while not job.status().progress_data and not job.done():
        time.sleep(0.01)
    client.predict(api_name="/cancel")
    with pytest.raises(AppError, match="Cancelled"):
        job.result(timeout=30)


def test_a_training_from_its_start_to_its_end(client, world):
    config = client.predict("alignprop", api_name="/presets")["emoji"]
    config = config.replace("max_train_steps: 60", "max_train_steps: 200\nwait: 0.02")
    assert "0.10 s a step" in client.predict("alignprop", "max_train_steps: 1", api_name="/dry_run")
    config = config.replace("pretrained_model_name_or_path: emoji", "pretrained_model_name_or_path: tiny")
    run = client.predict("alignprop", "mine", config, api_name="/start_training")
    wait_for(client, run, "running", steps=2)
    with pytest.raises(AppError, match="one training at a time"):
        client.predict("alignprop", "second", "max_train_steps: 1", api_name="/start_training")
    with pytest.raises(AppError, match="stop it first"):
        client.predict(run, run, api_name="/delete_run")
    client.predict(run, api_name="/stop_training")
    stopped = wait_for(client, run, "stopped")
    client.predict(run, api_name="/resume_training")
    wait_for(client, run, "running", steps=stopped["step"] + 1)
    client.predict(run, api_name="/stop_training")
    wait_for(client, run, "stopped", steps=stopped["step"] + 1)
    assert client.predict(api_name="/list_runs")[0] == run
    assert client.predict(run, api_name="/run_curves")[0] == {"run": run, "step": 1, "curve": "loss", "value": 1.0}
    base = world[1]["tiny"]
    assert f"pretrained_model_name_or_path: {base}" in (world[0] / "runs" / run / jobs.CONFIG).read_text()
    with pytest.raises(AppError, match="name again"):
        client.predict(run, "", api_name="/delete_run")
    client.predict(run, run, api_name="/delete_run")
    assert run not in client.predict(api_name="/list_runs")


def test_a_program_learns_from_its_own_pictures_and_fetches_what_came_of_it(client, world, tmp_path):
    good, bad = tmp_path / "a.png", tmp_path / "b.png"
    Image.effect_noise((64, 64), 90).convert("RGB").save(good)
    bad.write_bytes(b"no picture")
    _, told, table = client.predict(
        "mine", [handle_file(str(good)), handle_file(str(bad))], "a <thing>\na <thing>", None, "resolution: 64",
        api_name="/keep_pictures_neti",
    )  # fmt: skip
    assert "1 " in told and [row[1] for row in table["value"]["data"]] == ["used", "refused"]
    client.predict("words", "a cat\na dog", api_name="/keep_prompts")
    assert (world[0] / "runs" / "data" / "words" / "prompts.txt").read_text() == "a cat\na dog"
    config = f"max_train_steps: 2\ntrain_data_dir: {world[0]}/runs/data/mine"
    run = client.predict("neti", "learnt", config, api_name="/start_training")
    wait_for(client, run, "finished")
    status, pictures, said = client.predict(run, api_name="/inspect_run")
    assert "finished" in status and len(pictures) == 2 and said == config
    files = {Path(file).name for file in client.predict(run, api_name="/run_files")}
    assert files >= {"pytorch_lora_weights.safetensors", jobs.CONFIG}
    client.predict(run, run, api_name="/delete_run")


def test_a_dry_run_is_cancelled(client, world):
    job = client.submit("alignprop", "max_train_steps: 1\nwait: 60", api_name="/dry_run")
    while not job.outputs() and not job.done():
        time.sleep(0.01)
    client.predict(api_name="/cancel")
    with pytest.raises(AppError, match="Cancelled"):
        job.result(timeout=30)
    assert list((world[0] / "runs" / ".dry-run").iterdir()) == []


@pytest.mark.parametrize("config", ["train_data_dir: /etc", "rewards: [{name: 'os:system'}]", "report_to: wandb"])
def test_a_config_does_not_reach_out(client, config):
    with pytest.raises(AppError):
        client.predict("alignprop", "bad", config, api_name="/start_training")
    assert "alignprop/bad" not in client.predict(api_name="/list_runs")


def test_the_example_of_a_client(world, tmp_path):
    """As a program of its own; the tiny base has the name of the one that its config trains."""
    script = Path(page.__file__).with_name("example_client.py")
    with serving(world[0] / "runs", {"emoji": world[1]["tiny"]}) as url:
        command = [sys.executable, str(script), "--url", url, "--max_train_steps", "2"]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    assert jobs.status(world[0] / "runs", "alignprop/example").step == 2
    jobs.delete(world[0] / "runs", "alignprop/example")
    assert pixels(str(tmp_path / "base.png")) != pixels(str(tmp_path / "tuned.png"))
    used, _ = generate.read_settings(tmp_path / "tuned.png")
    assert used.loras == {"alignprop/example": 1.0} and used.seed == 3


# What is asked past the client


def test_files_of_the_machine_are_not_served(url, world):
    secret = world[0] / "secret.txt"
    secret.write_text("sesame street")
    (world[0] / "runs" / "notes.txt").write_text("sesame street")
    for path in ["/etc/passwd", str(secret), f"{world[0]}/runs/notes.txt", f"{world[0]}/runs/../secret.txt",
                 f"{world[0]}/runs/alignprop/style/{jobs.CONFIG}", str(Path(jobs.__file__)), f"{url}/config",
                 "notes.txt", "http://169.254.169.254/latest"]:  # fmt: skip
        answer = httpx.get(f"{url}/gradio_api/file={path}")
        assert answer.status_code in (403, 404) and "sesame" not in answer.text, path


def test_uploads_have_a_size_and_a_kind(url, client, tmp_path):
    with open(tmp_path / "large.zip", "w+b") as large:
        large.truncate(safety.MAX_ZIP_BYTES + 1)
        answer = httpx.post(f"{url}/gradio_api/upload", files={"files": ("large.zip", large)}, timeout=60)
    assert answer.status_code == 413
    for name, content, why in [("bomb.png", png_of_size(60_000, 60_000), "million pixels"),
                               ("page.png", b"<html>", "not a picture"),
                               ("large.png", bytes(safety.MAX_FILE_BYTES + 1), "more than 20 MB")]:  # fmt: skip
        (tmp_path / name).write_bytes(content)
        given = handle_file(str(tmp_path / name))
        with pytest.raises(AppError, match=why):
            client.predict(given, api_name="/reward_map")
        with pytest.raises(AppError, match=why):
            client.predict(given, api_name="/read_settings")


def test_a_zip_may_hold_more_than_a_file(client, tmp_path):
    """As photographs of a phone do; each of them is measured alone."""
    photograph = io.BytesIO()
    Image.frombytes("RGB", (1700, 1700), os.urandom(3 * 1700**2)).save(photograph, "PNG", compress_level=0)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for i in range(3):
            archive.writestr(f"{i}.png", photograph.getvalue())
    assert (tmp_path / "set.zip").stat().st_size > safety.MAX_FILE_BYTES
    given = [handle_file(str(tmp_path / "set.zip"))], "", None, "resolution: 64"
    *_, table = client.predict("photos", *given, api_name="/keep_pictures_customize")
    assert [row[1] for row in table["value"]["data"]] == ["used"] * 3
    with zipfile.ZipFile(tmp_path / "set.zip", "a") as archive:
        archive.writestr("3.png", bytes(safety.MAX_FILE_BYTES + 1))
    with pytest.raises(AppError, match="3.png has more than 20 MB"):
        client.predict("large", *given, api_name="/keep_pictures_customize")


def test_a_path_that_was_not_uploaded_is_not_opened(url, client, world):
    """The data of a request may say that a file lies anywhere."""
    _, drawn, *_ = client.predict("a hat", steps=1, api_name="/generate")
    shutil.copy(drawn, world[0] / "runs" / "secret.png")
    with tempfile.NamedTemporaryFile(suffix=".png") as other:
        shutil.copy(world[0] / "runs" / "secret.png", other.name)
        for path in ("/etc/passwd", str(world[0] / "runs" / "secret.png"), "secret.png", other.name):
            file = {"path": path, "meta": {"_type": "gradio.FileData"}}
            answer = call(url, "read_settings", [file])
            assert "root:" not in answer and "a hat" not in answer and "error" in answer, path


def test_pictures_in_requests_are_counted_too(url):
    """As a data URL, a picture comes past the upload, and Gradio decodes it."""
    import base64

    bomb = "data:image/png;base64," + base64.b64encode(png_of_size(60_000, 60_000)).decode()
    file = {"url": bomb, "path": "x.png", "meta": {"_type": "gradio.FileData"}}
    started = time.monotonic()
    assert "error" in call(url, "reward_map", [file, "aesthetic", "", "saliency"])
    assert time.monotonic() - started < 20


def call(url: str, name: str, values: list) -> str:
    """The end of an endpoint's stream of events."""
    made = httpx.post(f"{url}/gradio_api/call/{name}", json={"data": values})
    if made.status_code != 200:
        return f"error {made.status_code}"
    return httpx.get(f"{url}/gradio_api/call/{name}/{made.json()['event_id']}", timeout=60).text


@pytest.mark.parametrize("name", ["upload", "call/list_runs", "call/generate"])
def test_other_sites_may_not_ask(url, name):
    """Nor may a site that calls itself by this machine's address, which makes it the page's own."""
    evil = {"Host": "evil.example", "Origin": "http://evil.example"}
    for headers in (
        evil,
        {"Host": "evil.example"},
        *({"Origin": o} for o in ("https://evil.example", "null", url + "0")),
    ):
        content = {"files": {"files": ("a.png", b"x")}} if name == "upload" else {"json": {"data": []}}
        answer = httpx.post(f"{url}/gradio_api/{name}", headers=headers, **content)
        assert answer.status_code == 403, headers
    for headers in ({}, {"Origin": url}):
        assert httpx.post(f"{url}/gradio_api/call/list_runs", json={"data": []}, headers=headers).status_code == 200


def test_nothing_is_deleted_unasked(url, client):
    """What is private has no name for the client, but an address all the same."""
    answer = call(url, "remove", ["alignprop/style"])
    assert "error" in answer and "alignprop/style" in client.predict(api_name="/list_runs")


def test_calls_are_not_recorded(url, client):
    assert httpx.get(f"{url}/config").json()["run_history"] is False


def test_a_full_queue_is_a_polite_refusal(client):
    waiting = [client.submit("a hat", steps=20, api_name="/generate") for _ in range(12)]
    answers = []
    for job in waiting:
        try:
            job.result(timeout=120)
            answers.append("drawn")
        except Exception as error:
            answers.append(str(error))
    refused = [answer for answer in answers if answer != "drawn"]
    assert refused and all("queue" in answer.lower() for answer in refused)
    assert answers.count("drawn") >= 4


@pytest.mark.slow
def test_under_load(world, tmp_path):
    """200 requests of 8 clients: none is lost, and memory is level."""
    with page_process(tmp_path / "runs", 7877, "-m", "app", "--base", world[1]["tiny"]) as (url, process):
        assert soak(url, 200, 8, psutil.Process(process.pid))


def test_a_password_keeps_the_others_out(world, tmp_path):
    with serving(tmp_path, world[1], password="sesame") as url:
        for path in ("/config", "/gradio_api/info", "/gradio_api/file=/etc/passwd"):
            assert httpx.get(url + path).status_code == 401, path
        assert httpx.post(f"{url}/login", data={"username": "alignkit", "password": "x"}).status_code == 400
        assert (
            Client(url, auth=("alignkit", "sesame"), verbose=False, httpx_kwargs={"timeout": 60}).predict(
                api_name="/list_runs"
            )
            == []
        )


def test_it_starts_on_a_busy_machine(tmp_path, world, monkeypatch):
    """Where the page itself needs longer for its first answer than Gradio waits for it."""
    monkeypatch.setattr("gradio.networking.url_ok", lambda url: False)
    with serving(tmp_path, world[1]) as url:
        assert httpx.get(url, timeout=60).status_code == 200


def test_examples_are_laid_out_once(tmp_path, world, monkeypatch):
    """Also where a command has made the folder already."""
    monkeypatch.setattr(page, "EXAMPLES_DIR", world[0] / "runs" / "alignprop")
    folder, bases = tmp_path / "runs", {"emoji": "emoji"}
    folder.mkdir()
    page.build(folder, bases)
    assert generate.loras(folder) == ["examples/style"]
    shutil.rmtree(folder / "examples")
    page.build(folder, bases)
    assert generate.loras(folder) == []


PAGE = """
import sys
from app import __main__, jobs
from tests.app_server import toy_command
jobs._command = toy_command
__main__.main(sys.argv[1:])
"""


def test_a_page_that_is_started_again_finds_its_training(tmp_path):
    """By `python -m app`, with nothing but a folder; the first page has no time to say goodbye."""

    def connected(url: str) -> Client:
        return Client(url, verbose=False, httpx_kwargs={"timeout": 60}, download_files=tmp_path)

    with page_process(tmp_path / "runs", 7875, "-c", PAGE) as (url, process):
        run = connected(url).predict(
            "alignprop", "mine", "max_train_steps: 9999\nwait: 0.02", api_name="/start_training"
        )  # fmt: skip
        process.kill()
        process.wait()
    with page_process(tmp_path / "runs", 7876, "-c", PAGE) as (url, _):
        again = connected(url)
        seen = wait_for(again, run, "running")["step"]
        wait_for(again, run, "running", steps=seen + 1)
        again.predict(run, api_name="/stop_training")
        wait_for(again, run, "stopped")
        _, base, *_ = again.predict("a cat", steps=1, api_name="/generate")
        assert Image.open(base).size == (64, 64)


def test_nothing_was_asked_outside(client):
    """Neither at the start nor later: no analytics, no version check, no fonts."""
    assert OUTWARD == []
    config = json.dumps(httpx.get(f"{client.src.rstrip('/')}/config").json())
    assert json.loads(config)["analytics_enabled"] is False
    css = httpx.get(f"{client.src.rstrip('/')}/theme.css").text
    assert "http://" not in css.replace("http://www.w3.org", "") and "https://" not in css
