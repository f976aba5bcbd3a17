"""The page under load: 200 mixed requests from 8 clients at once. None may be lost, and memory has to stay level.

    python tests/benchmarks/app_soak.py

Starts the page itself, on the emoji world, in a scratch folder. A request that is refused because the queue is full is
asked again, as a client would; it counts as lost when no answer comes at all or one that nobody expected. Memory is the
page's resident set; level means that the second half of the requests adds less than 5 % to it.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from gradio_client import Client
from gradio_client.exceptions import AppError

ROOT = Path(__file__).parent.parent.parent


def ask(page: Client, kind: str, number: int) -> None:
    prompt = f"a {random.Random(number).choice(['cat', 'rose', 'rocket'])} on a blue background"
    if kind == "generate":
        page.predict(prompt, seed=number, steps=2, api_name="/generate")
    elif kind == "grid":
        page.predict(prompt, xs="1, 3", ys="0", steps=1, api_name="/grid")
    elif kind == "attention":
        page.predict(prompt, seed=number, steps=1, api_name="/attention")
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


KINDS = ("generate", "generate", "grid", "attention", "wrong", "presets", "list")


def work(url: str, mine: list[int], lost: list[str], done: list[int]) -> None:
    page = Client(url, verbose=False, httpx_kwargs={"timeout": 300})
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
    url = f"http://127.0.0.1:{options.port}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "app", "--folder", folder, "--port", str(options.port)]
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            soak(url, options, psutil.Process(server.pid))
        finally:
            server.terminate()
            server.wait()


def soak(url: str, options: argparse.Namespace, server: psutil.Process) -> None:
    for _ in range(300):
        try:
            Client(url, verbose=False, httpx_kwargs={"timeout": 300}).predict(steps=1, api_name="/generate")
            break
        except Exception:
            time.sleep(1)
    lost, done, memory = [], [], []
    shares = [list(range(i, options.requests, options.clients)) for i in range(options.clients)]
    threads = [threading.Thread(target=work, args=(url, share, lost, done)) for share in shares]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        memory.append((len(done), server.memory_info().rss / 2**20))
        time.sleep(1)
    memory.append((len(done), server.memory_info().rss / 2**20))
    half = next(used for count, used in memory if count >= options.requests / 2)
    growth = memory[-1][1] / half - 1
    print(
        f"{len(done)} requests, {options.clients} clients, {time.perf_counter() - started:.0f} s, {len(lost)} lost; "
        f"memory {memory[0][1]:.0f} MB at first, {half:.0f} half-way, {memory[-1][1]:.0f} at last ({growth:+.1%})"
    )
    print("\n".join(lost))
    if lost or len(done) < options.requests or growth > 0.05:
        sys.exit(1)


if __name__ == "__main__":
    main()
