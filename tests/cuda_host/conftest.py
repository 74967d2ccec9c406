import numerics
import pytest
import torch
from cuda_host import harness

nan_outputs = numerics.nan_outputs


@pytest.fixture
def host():
    return harness.library()


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
