"""A benchmark sets the number of threads: the tests after it get theirs back."""

import pytest
import torch


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
