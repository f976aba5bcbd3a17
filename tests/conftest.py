"""How pytest itself behaves here."""

import os
import signal

import pytest

# See alignkit/run.py. Here, since many a test compares pictures to the bit and starts no run.
os.environ.setdefault("MKL_CBWR", "AUTO")


def pytest_exception_interact(call: pytest.CallInfo) -> None:
    """A SIGTERM that reaches a trainer within a test ends pytest, which takes SystemExit for one more failed test."""
    error = call.excinfo.value
    if isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM:
        pytest.exit("stopped by SIGTERM", returncode=error.code)
