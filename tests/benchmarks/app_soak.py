"""The page under load: 200 mixed requests from 8 clients at once. None may be lost, and memory has to stay level.

    python -m tests.benchmarks.app_soak

Starts the page itself, on the emoji world, in a scratch folder. A request that is refused because the queue is full is
asked again, as a client would; it counts as lost when no answer comes at all or one that nobody expected. Memory is the
page's resident set, told at each quarter; level means that the second half of the requests adds less than 5 % to it.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from tests.benchmarks.app_process import WAIT, page_process


def ask(page: Client, kind: str, number: int) -> None:
    prompt = f"a {random.Random(number).choice(['cat', 'rose', 'rocket'])} on a blue background"
    if kind == "generate":
        page.predict(prompt, seed=number, steps=2, api_name="/generate")
    elif kind == "grid":
        page.predict(prompt, xs="1, 3", ys="0", steps=1, api_name="/grid")
    elif kind == "attention":
        page.predict(prompt, seed=number, steps=1, api_name="/attention")
    elif kind == "upload":
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            Image.effect_noise((64, 64), 10 + number).convert("RGB").save(file.name)
            picture = handle_file(file.name)
            page.predict(picture, "incompressibility", method="saliency", api_name="/reward_map")
    elif kind == "wrong":
        try:
            page.predict("", api_name="/generate")
        except AppError as error:
            if "prompt is empty" not in str(error):
                raise
        else:
            raise ValueError("an empty prompt was drawn")
    elif kind == "presets":
        page.predict("alignprop", api_name="/presets")
    else:
        page.predict(api_name="/list_runs")


KINDS = ("generate", "generate", "grid", "attention", "upload", "wrong", "presets", "list")


def work(url: str, mine: list[int], lost: list[str], done: list[int]) -> None:
    page = Client(url, verbose=False, httpx_kwargs={"timeout": WAIT})
    for number in mine:
        kind = KINDS[number % len(KINDS)]
        try:
            while True:
                try:
                    ask(page, kind, number)
                    break
                except Exception as error:
                    if "queue" not in str(error).lower():
                        raise
                    time.sleep(1)
        except Exception as error:
            lost.append(f"{kind} {number}: {error!r}")
        done.append(number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--port", type=int, default=7873)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, page_process(Path(folder), options.port) as (url, process):
        level = soak(url, options.requests, options.clients, psutil.Process(process.pid))
    if not level:
        sys.exit(1)


def soak(url: str, requests: int, clients: int, server: psutil.Process) -> bool:
    def memory() -> float:
        return server.memory_info().rss / 2**20

    warm = Client(url, verbose=False, httpx_kwargs={"timeout": WAIT})
    for number, kind in enumerate(sorted(set(KINDS))):  # what each kind loads is not what it leaves behind
        ask(warm, kind, number)
    print(f"0 of {requests} requests: {memory():.0f} MB", flush=True)
    lost, done, seen = [], [], {}
    shares = [list(range(i, requests, clients)) for i in range(clients)]
    threads = [threading.Thread(target=work, args=(url, share, lost, done)) for share in shares]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    quarters = [round(requests * part / 4) for part in range(1, 5)]
    while any(thread.is_alive() for thread in threads) or (quarters and len(done) >= quarters[0]):
        while quarters and len(done) >= quarters[0]:
            quarter = quarters.pop(0)
            seen[quarter] = memory()
            print(f"{quarter} of {requests} requests: {len(lost)} lost, {seen[quarter]:.0f} MB", flush=True)
        time.sleep(0.2)
    if quarters:
        raise SystemExit(f"error: only {len(done)} of {requests} requests were made:")
    half, end = seen[round(requests / 2)], seen[requests]
    seconds = time.perf_counter() - started
    print(f"{clients} clients, {seconds:.0f} s, {len(lost)} lost, {end / half - 1:+.1%} memory in the second half")
    print("\n".join(lost))
    return not lost and end / half < 1.05


if __name__ == "__main__":
    main()
