"""How pytest itself behaves here."""

import signal

import pytest


def pytest_exception_interact(call: pytest.CallInfo) -> None:
    """A SIGTERM that reaches a trainer within a test ends pytest, which takes SystemExit for one more failed test."""
    error = call.excinfo.value
    if isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM:
        pytest.exit("stopped by SIGTERM", returncode=error.code)
