"""Builds the CUDA sources with the host compiler (cuda_host.h) and runs them: as torch ops on CPU tensors, or as
programs under a sanitizer. What was built is kept in build/cuda_host/ until a source, flag or compiler changes."""

import ctypes
import functools
import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from build_backend.command import STABLE_ABI
from build_backend.cuda import find_nvcc
from build_backend.toolchain import ROOT, find_compiler, require_torch

HERE = Path(__file__).parent
FORWARD, REVERSE = 1, 2  # host::Order

GCC = ("-std=c++20", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function", "-pthread")
ASAN = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TSAN = ("-O1", "-fsanitize=thread")
NVCC = ("-std=c++20", "-O3", "-Xptxas", "-v", "-cubin")
NVCC_QUICK = (("bfloat16", "90a"), ("bfloat16", "80"), ("float32", "90a"))
TYPES = {"bfloat16": "__nv_bfloat16", "float32": "float", "float16": "__half", "float64": "double"}


@functools.cache
def toolkit() -> Path | None:
    nvcc = find_nvcc()
    root = nvcc.parent.parent if nvcc else None
    return root if root and (root / "include" / "cuda_bf16.h").exists() else None


needs_toolkit = pytest.mark.skipif(toolkit() is None, reason="no CUDA toolkit: cuda_fp16.h and cuda_bf16.h are its")


def library_flags() -> tuple[str, ...]:
    torch_root = require_torch().root
    return ("-O1", *STABLE_ABI, f"-isystem{torch_root / 'include'}", "-fPIC", "-shared", f"-L{torch_root / 'lib'}")


def gcc(source: str, *flags: str) -> Callable[[], Path]:
    last = ["-ltorch_cpu", "-lc10"] if "-shared" in flags else []
    include = f"-isystem{toolkit() / 'include'}"
    return lambda: build([*find_compiler().command, *GCC, *flags, include], HERE / source, last)


def nvcc(arch: str, dtype: str) -> Callable[[], Path]:
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    return lambda: build([str(find_nvcc()), *NVCC, target, f"-DTYPE={TYPES[dtype]}"], HERE / "instances.cu", [])


def builds() -> dict[str, Callable[[], Path]]:
    """All that the tests build by default, the longest first."""
    return {
        "library": gcc("depthwise_conv2d.cpp", *library_flags()),
        **{f"{dtype} sm_{arch}": nvcc(arch, dtype) for dtype, arch in NVCC_QUICK},
        "sanitized asan": gcc("sanitized.cpp", *ASAN),
        "sanitized tsan": gcc("sanitized.cpp", *TSAN),
        "faults": gcc("faults.cpp", "-O0"),
        "faults asan": gcc("faults.cpp", *ASAN),
        "faults tsan": gcc("faults.cpp", *TSAN),
    }


@functools.cache
def _started() -> dict[str, Future]:
    pool = ThreadPoolExecutor(2)
    return {name: pool.submit(make) for name, make in builds().items()}


def built(name: str) -> Path:
    """The first call starts all builds, two at a time; each waits for its own."""
    return _started()[name].result()


def build(command: list[str], source: Path, last: list[str]) -> Path:
    """Runs the command for the source, unless that was done before; what it said lies beside the result as .log."""
    digest = hashlib.sha256(f"{find_compiler().version} {command} {last}".encode())
    for file in sorted(
        [*HERE.glob("*.h"), *HERE.glob("*.c*"), *(ROOT / "csrc/cuda").rglob("*"), ROOT / "csrc/packing.h"]
    ):
        if file.is_file():
            digest.update(file.read_bytes())
    made = ROOT / "build" / "cuda_host" / f"{source.stem}-{digest.hexdigest()[:16]}"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        partial = made.with_name(f"{made.name}.{os.getpid()}")
        done = subprocess.run([*command, str(source), "-o", str(partial), *last], capture_output=True, text=True)
        assert done.returncode == 0, f"{source.name} does not compile:\n{done.stderr[-4000:]}"
        made.with_suffix(".log").write_text(done.stderr)
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
        path = built("library")
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
