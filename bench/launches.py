"""The launches of Triton kernels that launchers make, recorded as for a GPU that needn't be there; nothing runs.

Tensors may be on the meta device: what a launch says of them are shapes, strides and dtypes.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch


@dataclass
class Launch:
    kernel: Any  # triton.runtime.jit.JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def arguments(self) -> dict[str, Any]:
        """All of them, by name."""
        return dict(zip(self.kernel.arg_names, self.args, strict=False), **self.kwargs)


def modules() -> list[ModuleType]:
    package = importlib.import_module("cnnfast.kernels")
    return [importlib.import_module(f"cnnfast.kernels.{info.name}") for info in pkgutil.iter_modules(package.__path__)]


def is_kernel(name: str, value: object) -> bool:
    """Whether a module's attribute is one that launchers launch."""
    return name.endswith("_kernel") and hasattr(value, "arg_names")


@contextlib.contextmanager
def recording(target: str) -> Iterator[list[Launch]]:
    """The launches of cnnfast.kernels' kernels meanwhile, as on `target` ("sm_90", "gfx942"), as a list."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any):
            self.kernel = kernel
            self.__name__ = kernel.__name__

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **kwargs: launches.append(Launch(self.kernel, grid, args, kwargs))

    kernels = [(module, *item) for module in modules() for item in vars(module).items() if is_kernel(*item)]
    matched = re.fullmatch(r"(?:sm_|gfx)(\d+)(\d)\w*", target)
    assert matched, target
    capability = tuple(map(int, matched.groups()))
    hip = "7.0" if target.startswith("gfx") else None
    try:
        for module, name, kernel in kernels:
            setattr(module, name, Recorder(kernel))
        here = mock.patch("cnnfast.kernels.launch.capability", lambda device: capability)
        with here, mock.patch.object(torch.version, "hip", hip):
            yield launches
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)
