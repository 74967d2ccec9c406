"""Builds the CUDA sources with the host compiler (cuda_host.h) and runs them: as torch ops on CPU tensors, or as
programs under a sanitizer. What was built is kept in build/cuda_host/ until a source, flag or compiler changes."""

import ctypes
import functools
import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from build_backend.command import STABLE_ABI
from build_backend.cuda import find_nvcc
from build_backend.toolchain import ROOT, find_compiler, require_torch

HERE = Path(__file__).parent
FLAGS = ("-std=c++20", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function", "-pthread")
FORWARD, REVERSE = 1, 2  # host::Order


@functools.cache
def toolkit() -> Path | None:
    nvcc = find_nvcc()
    root = nvcc.parent.parent if nvcc else None
    return root if root and (root / "include" / "cuda_bf16.h").exists() else None


needs_toolkit = pytest.mark.skipif(toolkit() is None, reason="no CUDA toolkit: cuda_fp16.h and cuda_bf16.h are its")


def build(source: str, *flags: str, program: bool = True) -> Path:
    """The program or shared library made of tests/cuda_host/<source>."""
    compiler = find_compiler()
    files = sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp"), *(ROOT / "csrc").glob("cuda/**/*"), ROOT / "csrc/packing.h"])
    command = [*compiler.command, *FLAGS, *flags, f"-isystem{toolkit() / 'include'}", str(HERE / source)]
    digest = hashlib.sha256(f"{compiler.version} {command}".encode())
    for file in files:
        if file.is_file():
            digest.update(file.read_bytes())
    made = ROOT / "build" / "cuda_host" / f"{Path(source).stem}-{digest.hexdigest()[:16]}{'' if program else '.so'}"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        partial = made.with_name(f"{made.name}.{os.getpid()}")
        libraries = [] if program else ["-fPIC", "-shared", f"-L{require_torch().root / 'lib'}", "-ltorch_cpu", "-lc10"]
        done = subprocess.run([*command, "-o", str(partial), *libraries], capture_output=True, text=True)
        assert done.returncode == 0, f"{source} does not compile:\n{done.stderr[-4000:]}"
        partial.replace(made)
    return made


class Promise(NamedTuple):
    """What the header of a vectorised kernel promises."""

    strip: int
    loads_per_strip: int
    sectors_per_request: int
    registers: int


class HostLibrary:
    """torch.ops.cnnfast_cuda_host, and what was run and counted."""

    def __init__(self) -> None:
        path = build(
            "depthwise_conv2d.cpp", "-O1", *STABLE_ABI, f"-isystem{require_torch().root / 'include'}", program=False
        )
        torch.ops.load_library(path)
        self.ops = torch.ops.cnnfast_cuda_host
        self.c = ctypes.CDLL(str(path))
        for text in (self.c.host_kernels_run, self.c.host_stop_counting, self.c.host_promises):
            text.restype = ctypes.c_char_p
        self.c.host_trapped.restype = ctypes.c_bool
        self.c.host_name_buffer.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64]
        self.c.host_only_block_from_end.argtypes = [ctypes.c_int64]

    def order(self, order: int) -> None:
        self.c.host_set_order(order)

    def kernels_run(self) -> list[str]:
        """Names of the kernels launched since the last call."""
        return self.c.host_kernels_run().decode().split()

    def trapped(self) -> bool:
        """Whether a kernel called fail() since the last call."""
        return self.c.host_trapped()

    def promises(self) -> dict[tuple[str, int, int], Promise]:
        """By kernel, kernel size and stride."""
        rows = [line.split() for line in self.c.host_promises().decode().splitlines()]
        return {(name, int(k), int(s)): Promise(*map(int, rest)) for name, k, s, *rest in rows}

    def count(self, run, **tensors: torch.Tensor) -> list[dict]:
        """What each launch of run() did to the named tensors ("load x", ...), to "unnamed" and to "shared" memory."""
        self.c.host_start_counting()
        for name, tensor in tensors.items():
            self.c.host_name_buffer(name.encode(), tensor.data_ptr(), tensor.numel() * tensor.element_size())
        kept = run()  # until counted: another tensor at its outputs' address would take their name
        counted = json.loads(self.c.host_stop_counting().decode())
        del kept
        return counted


@functools.cache
def library() -> HostLibrary:
    return HostLibrary()
