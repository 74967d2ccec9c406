"""Shared by all tests: where helpers lie (pyproject.toml puts tests/ on the path), and what runs only with a GPU."""

import pytest
import torch

pytest_plugins = ["summary"]  # what was proven how, at the end of a run


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
