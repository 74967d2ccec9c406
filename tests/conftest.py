"""Shared by all tests: where helpers lie (pyproject.toml puts tests/ on the path), and what runs only with a GPU."""

import gc
import os

import pytest
import torch

pytest_plugins = ["summary"]  # what was proven how, at the end of a run


# After all others what waits for what is made meanwhile (programs, the interpreter's runs); then what wants every core.
LAST = {"cuda_host": 1, "triton": 1, "cpu_host": 2}


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """`pytest` alone, which is all but the slow tests, goes to as many workers as there are cores, of up to four."""
    if hasattr(config, "workerinput"):  # a worker is asked, too
        return
    all_of_them = config.args_source is pytest.Config.ArgsSource.TESTPATHS and config.option.markexpr == "not slow"
    if all_of_them and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None:
        config.option.numprocesses = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
        config.option.dist = "worksteal"
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # their threads would spin on each other's cores


def pytest_configure():
    """pytest-xdist's workers share the cores."""
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LAST.get(item.path.parent.name, 0))


def pytest_collection_finish():
    """Looking for garbage takes a tenth of a run, most of it among what stays: torch, and all that was collected."""
    gc.freeze()
    gc.set_threshold(5_000)


def pytest_runtest_setup(item):
    # Here, not by a mark: one line of the report for all of them, not one for each.
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
