"""The op of a test file, test_<op>*.py, is built as soon as its tests are known to run."""

from pathlib import Path

import numerics
import pytest
import torch
from cuda_host import harness

nan_outputs = numerics.nan_outputs


def ops_of(path):
    """The ops that a test file is about."""
    return [op for op in harness.OPS if path.stem.startswith(f"test_{op}")]


def pytest_collection_finish(session):
    if harness.toolkit() is None or session.config.option.collectonly:
        return
    for path in dict.fromkeys(item.path for item in session.items if item.path.parent == Path(__file__).parent):
        for op in ops_of(path):
            harness.start(op)


@pytest.fixture
def host(request):
    """The library of the op that the test's file is named after."""
    [op] = ops_of(request.path)
    return harness.library(op)


@pytest.fixture
def forward_order(host):
    host.kernels_run()
    yield
    host.order(harness.FORWARD)


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """The reference's tensors are tiny, and the builds in the background want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
