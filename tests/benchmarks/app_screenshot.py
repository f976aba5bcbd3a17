"""docs/page.png: the Generate tab of the real page, after a picture was drawn with a LoRA of the runs folder.

python -m tests.benchmarks.app_screenshot docs/page.png --folder runs
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from playwright.sync_api import Error, expect, sync_playwright

from app import generate

ROOT = Path(__file__).parent.parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--folder", default="runs")
    parser.add_argument("--lora", help="Run with it; by default the newest one.")
    parser.add_argument("--prompt", default="a cat on a blue background")
    parser.add_argument("--port", type=int, default=7874)
    options = parser.parse_args()
    found = [options.lora] if options.lora else generate.loras(Path(options.folder).resolve())
    if not found:
        raise SystemExit(f"error: there is no LoRA in {options.folder}: train one first, such as `make demo`.")
    command = [sys.executable, "-m", "app", "--folder", options.folder, "--port", str(options.port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with sync_playwright() as playwright:
            arguments = ["--headless", "--no-sandbox", "--disable-gpu"]
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
            screen = browser.new_page(viewport={"width": 1100, "height": 780})
            draw(screen, f"http://127.0.0.1:{options.port}/?__theme=light", options.prompt, found[0])
            screen.screenshot(path=options.output)
            browser.close()
    finally:
        server.terminate()
        server.wait()


def draw(screen, url: str, prompt: str, lora: str) -> None:
    for _ in range(300):
        try:
            screen.goto(url)
            break
        except Error:  # not there yet
            time.sleep(1)
    screen.locator("#prompt textarea").fill(prompt, timeout=120_000)
    box = screen.locator("#loras input").first
    box.fill(lora)
    box.press("Enter")
    screen.locator("#generate").click()
    expect(screen.locator("#tuned_image img")).to_be_visible(timeout=300_000)
    screen.wait_for_timeout(1000)


if __name__ == "__main__":
    main()
