"""docs/page.png: the Generate tab of the real page, after a picture was drawn with a LoRA of the runs folder.

python -m tests.benchmarks.app_screenshot docs/page.png --folder runs
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from app import generate
from tests.benchmarks.app_process import WAIT, page_process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--folder", default="runs")
    parser.add_argument("--lora", help="Run with it; by default the newest one.")
    parser.add_argument("--prompt", default="a cat on a blue background")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=7874)
    options = parser.parse_args()
    folder = Path(options.folder).resolve()
    found = generate.loras(folder)
    lora = options.lora or next(iter(found), None)
    if lora not in found:
        raise SystemExit(f"error: there is no LoRA {lora or ''} in {folder}: train one first, such as by `make demo`.")
    with page_process(folder, options.port) as (url, _), sync_playwright() as playwright:
        arguments = ["--headless", "--no-sandbox", "--disable-gpu"]
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments, timeout=1000 * WAIT)
        screen = browser.new_page(viewport={"width": 1100, "height": 780})
        screen.set_default_timeout(1000 * WAIT)
        expect.set_options(timeout=1000 * WAIT)
        screen.goto(f"{url}/?__theme=light", wait_until="domcontentloaded")
        draw(screen, options.prompt, options.seed, lora)
        screen.screenshot(path=options.output)
        browser.close()


def draw(screen: Page, prompt: str, seed: int, lora: str) -> None:
    screen.locator("#prompt textarea").fill(prompt)
    screen.locator("#seed input").fill(str(seed))
    screen.locator("#loras input").first.click()
    screen.get_by_role("option", name=lora, exact=True).click()  # which comes with the page's lists
    expect(screen.locator("#loras")).to_contain_text(lora)
    screen.keyboard.press("Escape")
    screen.locator("#generate").click()
    complaint = screen.get_by_test_id("toast-body")
    expect(screen.locator("#tuned_image img").or_(complaint).first).to_be_visible()
    if complaint.is_visible():
        raise SystemExit(f"error: {complaint.inner_text()}")
    expect(screen.locator("#generate_status")).not_to_contain_text("left")
    screen.wait_for_timeout(1000)


if __name__ == "__main__":
    main()
