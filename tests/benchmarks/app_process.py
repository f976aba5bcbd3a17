"""The real page as a process of its own, for the scripts here that use it as a browser or a program would."""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent.parent
WAIT = 600  # seconds for each thing that is waited for: on a busy machine, loading alone takes minutes


@contextlib.contextmanager
def page_process(folder: Path, port: int, *start: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """Its address, once it answers, and its process. What it said is shown where something goes wrong.

    start: what Python starts it with, in place of -m app.
    """
    command = [sys.executable, *(start or ("-m", "app")), "--folder", str(folder), "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            yield _answering(server, f"http://127.0.0.1:{port}"), server
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace"))
            raise
        finally:
            server.terminate()
            server.wait()


def _answering(server: subprocess.Popen, url: str) -> str:
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        if server.poll() is not None:
            raise SystemExit("error: the page has ended:")
        try:
            httpx.get(f"{url}/config", timeout=WAIT).raise_for_status()
            return url
        except httpx.TransportError:  # not there yet
            time.sleep(0.5)
    raise SystemExit(f"error: the page did not answer in {WAIT} s:")
