"""interpreted/ runs in its own processes with TRITON_INTERPRET=1: Triton reads the flag when a kernel is decorated.
They start as soon as their test is known to run; with pytest-xdist, whose workers all collect it, when it runs."""

import os

import pytest
from interpreted import Interpreted
from numerics import nan_outputs

__all__ = ["nan_outputs"]
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
started = []


def pytest_collection_finish(session):
    if session.config.option.collectonly or hasattr(session.config, "workerinput"):
        return
    if any("interpreted" in getattr(item, "fixturenames", ()) for item in session.items):
        started.append(Interpreted())


def pytest_sessionfinish():
    for runs in started:
        runs.stop()


@pytest.fixture
def interpreted():
    if not started:
        started.append(Interpreted())
    return started[0]
