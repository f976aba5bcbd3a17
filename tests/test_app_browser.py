"""The page in a real Chromium: what a person does with it, in the order in which a person does it.

ALIGNKIT_SCREENSHOTS=folder keeps pictures of every tab, at a desktop's and a phone's width, in light and dark.
"""

import contextlib
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image
from playwright import sync_api

from app import generate, jobs, safety
from tests.app_server import make_world, serving
from tests.test_app import png_bytes, png_of_size

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
TABS = ("Generate", "Align", "Control", "Personalize", "Explore", "Runs")
WAIT = 120_000  # milliseconds; a busy machine is slow, and what waits goes on as soon as it may

if CHROMIUM is None and not os.environ.get("CI"):
    pytest.skip("there is no chromium on this machine: apt-get install chromium", allow_module_level=True)
expect = sync_api.expect


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    return folder / "runs", make_world(folder)


@pytest.fixture(scope="module")
def url(world):
    with serving(*world) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def screen(browser, url):
    """An open page; at the end, it must have had no error, and have asked nobody but its server."""
    with looking(browser, url) as (screen, complaints):
        open_page(screen, url)
        yield screen
    assert complaints == []


@contextlib.contextmanager
def looking(browser, url: str):
    """An empty page, and what it complains of: errors, and whom it asks but its server."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(WAIT)
    screen, complaints = context.new_page(), []
    screen.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    screen.on("pageerror", lambda error: complaints.append(str(error)))
    screen.on("request", lambda request: complaints.append(request.url) if outside(request.url, url) else None)
    yield screen, complaints
    context.close()


def outside(address: str, url: str) -> bool:
    return not address.startswith((url, "data:", "blob:"))


def open_page(screen, url: str) -> None:
    screen.goto(url)
    expect(screen.locator("#prompt textarea")).to_be_visible(timeout=WAIT)


def go_to(screen, tab: str) -> None:
    screen.get_by_role("tab", name=tab, exact=True).first.click()


def choose(screen, box: str, value: str) -> None:
    """An entry of a dropdown, by the keyboard."""
    field = screen.locator(f"{box} input").first
    field.click()
    field.fill(value)
    field.press("Enter")


def test_generate_and_load_the_settings_from_the_picture(screen, tmp_path):
    screen.locator("#prompt textarea").fill("a hat")
    choose(screen, "#loras", "alignprop/style")
    screen.locator("#generate").click()
    tuned = screen.locator("#tuned_image img")
    expect(tuned).to_be_visible(timeout=WAIT)
    expect(screen.locator("#base_image img")).to_be_visible()
    assert screen.locator("#base_image img").get_attribute("src") != tuned.get_attribute("src")

    with screen.expect_download() as download:
        screen.locator("#tuned_image").get_by_role("button", name=re.compile("download", re.I)).click()
    file = tmp_path / "tuned.png"
    download.value.save_as(file)
    settings, _ = generate.read_settings(file)
    assert settings.prompt == "a hat" and settings.loras == {"alignprop/style": 1.0}

    screen.locator("#prompt textarea").fill("something else")
    screen.get_by_text("Settings of these pictures").click()
    screen.locator("input[type=file][accept*='.png']").first.set_input_files(file)
    expect(screen.locator("#prompt textarea")).to_have_value("a hat", timeout=WAIT)


def test_a_drawing_is_followed_with_a_concept_and_alignit(screen):
    screen.locator("#prompt textarea").fill("a <thing> hat")
    choose(screen, "#concepts", "neti/thing")
    screen.get_by_label("AlignIT", exact=True).filter(visible=True).check()
    screen.get_by_role("button", name="Control").filter(visible=True).click()
    choose(screen, "#controlnet", "controlnetpp/edges")
    screen.get_by_role("tab", name="Draw").click()
    canvas = screen.locator("#sketch canvas").first
    expect(canvas).to_be_visible(timeout=WAIT)
    screen.locator("#sketch").get_by_role("button", name="Brush").click()
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for x, y in ((0.3, 0.3), (0.7, 0.3), (0.5, 0.7)):
        screen.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        screen.mouse.down()
        screen.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=5)
        screen.mouse.up()
    screen.get_by_role("button", name="Preview what the ControlNet will see").click()
    expect(screen.locator("#seen img")).to_be_visible(timeout=WAIT)
    screen.locator("#generate").click()
    expect(screen.locator("#tuned_image img")).to_be_visible(timeout=3 * WAIT)  # AlignIT draws more than one picture
    keep(screen, "drawing")


def test_explore(screen, tmp_path):
    go_to(screen, "Explore")
    screen.locator("#grid_prompt textarea, #grid_prompt input").first.fill("a hat")
    screen.locator("#grid").click()
    expect(screen.locator("#grid_image img")).to_be_visible(timeout=WAIT)
    keep(screen, "grid")
    screen.get_by_role("tab", name="Attention").click()
    screen.locator("#attention").click()
    expect(screen.locator("#attention_maps img").nth(3)).to_be_visible(timeout=WAIT)
    keep(screen, "attention")
    screen.get_by_role("tab", name="Reward").click()
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "picture.png")
    screen.locator("#reward_picture input[type=file]").set_input_files(tmp_path / "picture.png")
    expect(screen.locator("#reward_picture img")).to_be_visible(timeout=WAIT)
    screen.locator("#reward_map").click()
    expect(screen.locator("#reward_image img")).to_be_visible(timeout=WAIT)
    keep(screen, "reward")


def test_by_the_keyboard_alone(screen):
    """From field to button by Tab, drawing and other tabs by Enter."""
    prompt = screen.locator("#prompt textarea")
    for _ in range(40):
        if prompt.evaluate("field => field === document.activeElement"):
            break
        screen.keyboard.press("Tab")
    screen.keyboard.press("ControlOrMeta+A")
    screen.keyboard.type("a hat")
    screen.keyboard.press("Tab")
    assert screen.locator("#generate").evaluate("button => button === document.activeElement")
    screen.keyboard.press("Enter")
    expect(screen.locator("#base_image img")).to_be_visible(timeout=WAIT)
    screen.get_by_role("tab", name="Generate", exact=True).first.focus()
    screen.keyboard.press("Tab")
    screen.keyboard.press("Enter")
    expect(screen.locator("#alignprop_start")).to_be_visible(timeout=WAIT)


@pytest.mark.parametrize(
    "loras, sentence",
    [
        (None, "Say what to draw: the prompt is empty."),
        ("<img src=x onerror=alert(1)>", "<img src=x onerror=alert(1)>"),
    ],
)
def test_what_goes_wrong_is_a_sentence(screen, loras, sentence):
    """And what was typed is text in it."""
    screen.locator("#prompt textarea").fill("a hat" if loras else "")
    if loras:
        choose(screen, "#loras", loras)
    screen.locator("#generate").click()
    toast = screen.get_by_test_id("toast-body")
    expect(toast).to_contain_text(sentence, timeout=WAIT)
    expect(toast.locator("img")).to_have_count(0)
    assert "Traceback" not in screen.content()


def test_a_config_that_reaches_out_is_refused(screen):
    go_to(screen, "Align")
    screen.get_by_role("button", name="All settings (YAML)").filter(visible=True).click()
    screen.locator("#alignprop_yaml .cm-content").fill("max_train_steps: 1\ntrain_data_dir: /etc\n")
    screen.locator("#alignprop_start").click()
    expect(screen.get_by_test_id("toast-body")).to_contain_text("only files of this page", timeout=WAIT)


def test_what_was_just_typed_is_what_is_trained(screen, world, tmp_path):
    """By a button that is pressed with the cursor still in the YAML, or in a field."""
    go_to(screen, "Align")
    screen.get_by_role("button", name="All settings (YAML)").filter(visible=True).click()
    screen.locator("#alignprop_yaml .cm-content").fill("max_train_steps: 3\nlora:\n  rank: 3\n")
    screen.locator("#alignprop_download").click()
    file = screen.locator("#alignprop_given a[download]")
    with screen.expect_download() as download:
        file.first.click(timeout=WAIT)
    download.value.save_as(tmp_path / "given.yaml")
    assert (tmp_path / "given.yaml").read_text() == "max_train_steps: 3\nlora:\n  rank: 3\n"

    screen.locator("#alignprop_yaml .cm-content").fill("max_train_steps: 2\nlora:\n  rank: 5\n")
    screen.locator("#alignprop_start").click()
    expect(screen.locator("#alignprop_status")).to_contain_text("2 of 2 steps", timeout=WAIT)
    expect(screen.locator("#alignprop_lora_rank input")).to_have_value("5")

    screen.locator("#alignprop_lora_rank input").fill("7")
    screen.locator("#alignprop_start").click()
    expect(screen.locator("#alignprop_run input")).to_have_value("alignprop/run-2", timeout=WAIT)
    configs = [safety.read_config(jobs.config_of(world[0], f"alignprop/run-{number}")) for number in (1, 2)]
    assert [(config["max_train_steps"], config["lora"]["rank"]) for config in configs] == [(2, 5), (2, 7)]


def test_drawing_is_cancelled(screen, monkeypatch):
    told = generate.Timer.__call__
    monkeypatch.setattr(generate.Timer, "__call__", lambda *args: (time.sleep(0.2), told(*args)))  # a real model's pace
    screen.locator("#prompt textarea").fill("a hat")
    screen.locator("#generate").click()
    expect(screen.get_by_text(re.compile(r"left")).first).to_be_visible(timeout=WAIT)  # the progress
    screen.locator("#cancel").click()
    expect(screen.locator("#generate_status")).to_contain_text("Cancelled.", timeout=WAIT)
    expect(screen.locator("#base_image img")).to_have_count(0)


def test_train_stop_reload_resume_compare_download_delete(screen, url, tmp_path):
    go_to(screen, "Align")
    screen.get_by_role("button", name="All settings (YAML)").filter(visible=True).click()
    yaml = screen.locator("#alignprop_yaml .cm-content")
    yaml.fill("max_train_steps: 4000\nwait: 0.05\nlora:\n  rank: 3\n")
    screen.locator("#alignprop_name textarea, #alignprop_name input").first.click()  # the form follows the YAML
    expect(screen.locator("#alignprop_lora_rank input")).to_have_value("3", timeout=WAIT)
    screen.locator("#alignprop_name textarea, #alignprop_name input").first.fill("mine")

    screen.locator("#alignprop_dry_run").click()
    expect(screen.locator("#alignprop_measured")).to_contain_text("0.10 s a step", timeout=WAIT)

    screen.locator("#alignprop_start").click()
    status = screen.locator("#alignprop_status")
    expect(status).to_contain_text("running", timeout=WAIT)
    expect(screen.locator("#alignprop_plot .mark-line path").first).to_be_attached(timeout=WAIT)
    for axis in ("X", "Y"):  # numbers, and no names
        shown = screen.locator(f'#alignprop_plot [aria-label^="{axis}-axis"]').first
        expect(shown).to_have_attribute("aria-label", re.compile("linear scale"), timeout=WAIT)
    expect(screen.locator("#alignprop_pictures img").first).to_be_visible(timeout=WAIT)
    expect(status).to_contain_text("left")
    keep(screen, "training")

    screen.locator("#alignprop_name textarea, #alignprop_name input").first.fill("second")
    screen.locator("#alignprop_start").click()
    expect(screen.get_by_test_id("toast-body")).to_contain_text("one training at a time", timeout=WAIT)

    open_page(screen, url)  # a reload finds the training again
    go_to(screen, "Align")
    expect(status).to_contain_text("running", timeout=WAIT)
    expect(screen.locator("#alignprop_pictures img").first).to_be_visible(timeout=WAIT)
    screen.locator("#alignprop_stop").click()
    expect(status).to_contain_text("resume goes on", timeout=WAIT)
    stopped = int(re.search(r"(\d+) of 4000", status.inner_text())[1])
    screen.locator("#alignprop_resume").click()
    expect(status).to_contain_text("running", timeout=WAIT)
    told = "/(\\d+) of 4000/.exec(document.querySelector('#alignprop_status').innerText)"
    # its trainer has begun, so it saves when it is stopped
    screen.wait_for_function(f"before => Number({told}?.[1]) > before", arg=stopped, timeout=WAIT)
    screen.locator("#alignprop_stop").click()
    expect(status).to_contain_text("resume goes on", timeout=WAIT)
    assert int(re.search(r"(\d+) of 4000", status.inner_text())[1]) > stopped

    go_to(screen, "Runs")
    screen.locator("#runs_refresh").click()
    expect(screen.locator("#runs_table")).to_contain_text("alignprop/mine", timeout=WAIT)
    screen.get_by_role("tab", name="Compare").click()
    choose(screen, "#runs_several", "alignprop/mine")
    expect(screen.locator("#runs_plot .mark-line path").first).to_be_attached(timeout=WAIT)

    screen.get_by_role("tab", name="Inspect").click()
    choose(screen, "#runs_run", "alignprop/mine")
    screen.locator("#runs_pack").click()
    with screen.expect_download() as download:
        screen.locator("#runs_files a[download]", has_text="").first.click()
    download.value.save_as(tmp_path / "file")
    assert (tmp_path / "file").stat().st_size > 0
    keep(screen, "inspecting")

    screen.locator("#runs_delete").click()
    expect(screen.get_by_text("Nobody can bring it back")).to_be_visible(timeout=WAIT)
    screen.locator("#runs_sure").click()
    expect(screen.locator("#runs_table")).not_to_contain_text("alignprop/mine", timeout=WAIT)


def test_pictures_of_ones_own_are_checked_one_by_one(screen, tmp_path):
    files = {"good.png": png_bytes(), "bomb.png": png_of_size(60_000, 60_000), "page.png": b"<script>alert(1)</script>"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    go_to(screen, "Personalize")
    screen.get_by_role("button", name="Data of your own").filter(visible=True).click()
    screen.locator("#neti_set textarea, #neti_set input").first.fill("mine")
    screen.locator("#neti_uploads input[type=file]").set_input_files([tmp_path / name for name in files])
    expect(screen.locator("#neti_uploads")).to_contain_text("page", timeout=WAIT)
    screen.locator("#neti_keep").click()
    table = screen.locator("#neti_findings")
    expect(table).to_contain_text("million pixels", timeout=WAIT)
    expect(table).to_contain_text("is not a picture")
    expect(table).to_contain_text("001.png")


def test_a_password_is_asked_for(browser, world):
    with serving(*world, password="sesame") as url, looking(browser, url) as (screen, complaints):
        screen.goto(url)
        expect(screen.get_by_text("The name is alignkit")).to_be_visible(timeout=WAIT)
        for password in ("guess", "sesame"):
            screen.get_by_label("username").fill("alignkit")
            screen.get_by_label("password").fill(password)
            screen.get_by_role("button", name="Login").click()
            if password == "guess":
                expect(screen.get_by_text("Incorrect Credentials")).to_be_visible(timeout=WAIT)
                expect(screen.locator("#prompt")).to_have_count(0)
        screen.locator("#prompt textarea").fill("a hat")
        screen.locator("#generate").click()
        expect(screen.locator("#base_image img")).to_be_visible(timeout=WAIT)
    (refusal,) = complaints  # the browser's own word about the wrong password
    assert "400 (Bad Request)" in refusal


@pytest.mark.parametrize("width, height", [(1280, 900), (390, 844)], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen(browser, url, width, height, scheme):
    """No tab is wider than the screen, and dark is dark."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.set_default_timeout(WAIT)
    screen = context.new_page()
    open_page(screen, f"{url}/?__theme={scheme}")
    for tab in TABS:
        go_to(screen, tab)
        assert screen.evaluate("document.documentElement.scrollWidth") <= width, tab
        keep(screen, f"{tab.lower()}-{'phone' if width < 500 else 'desktop'}-{scheme}")
    shade = screen.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", shade)[:3])) < 3 * 128) == (scheme == "dark")
    context.close()


def keep(screen, name: str) -> None:
    folder = os.environ.get("ALIGNKIT_SCREENSHOTS")
    if folder:
        path = Path(folder) / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        screen.screenshot(path=path, full_page=True)
        assert Image.open(path).width > 0
