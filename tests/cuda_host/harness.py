"""Builds the CUDA sources with the host compiler (cuda_host.h) and runs them: as torch ops on CPU tensors, or as
programs under a sanitizer. What was built is kept in build/cuda_host/ until a source, flag or compiler changes."""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from background import yielding

from build_backend.command import STABLE_ABI
from build_backend.cuda import find_nvcc
from build_backend.toolchain import ROOT, Compiler, find_compiler, require_torch

HERE = Path(__file__).parent
CSRC = ROOT / "csrc"
BUILT = ROOT / "build" / "cuda_host"
OPS = sorted(source.stem for source in (HERE / "library").glob("*.cpp"))
THREADS, FORWARD, REVERSE, WARPS = 0, 1, 2, 3  # host::Order

GCC = ("-std=c++20", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function", "-pthread")
ASAN = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TSAN = ("-O1", "-fsanitize=thread")
NVCC = ("-std=c++20", "-O3", "-Xptxas", "-v", "-cubin")
NVCC_QUICK = (("bfloat16", "90a"), ("bfloat16", "80"), ("float32", "90a"))
# A minute of nvcc, a minute of g++ and ASan, which the default run does without.
NVCC_SLOW = {"inverted_residual": NVCC_QUICK[1:]}
ASAN_SLOW = ("inverted_residual", "pointwise_conv2d", "squeeze_excite")
TYPES = {"bfloat16": "__nv_bfloat16", "float32": "float", "float16": "__half", "float64": "double"}


@functools.cache
def toolkit() -> Path | None:
    nvcc = find_nvcc()
    root = nvcc.parent.parent if nvcc else None
    return root if root and (root / "include" / "cuda_bf16.h").exists() else None


needs_toolkit = pytest.mark.skipif(toolkit() is None, reason="no CUDA toolkit: cuda_fp16.h and cuda_bf16.h are its")


# Of before the tests: while builds run beside them, some change PATH.
ENVIRONMENT = dict(os.environ)


@functools.cache
def compiler() -> Compiler:
    return find_compiler()


def gcc(source: str, *flags: str, csrc: Path = CSRC) -> Callable[[], Path]:
    last = ["-ltorch_cpu", "-lc10"] if "-shared" in flags else []
    system = f"-isystem{toolkit() / 'include'}"
    return lambda: build([*compiler().command, *GCC, *flags, system], HERE / source, last, csrc)


def host_library(op: str, name: str = "cnnfast_cuda_host", csrc: Path = CSRC) -> Callable[[], Path]:
    torch_root = require_torch().root
    include, link = f"-isystem{torch_root / 'include'}", f"-L{torch_root / 'lib'}"
    flags = ("-O1", *STABLE_ABI, include, "-fPIC", "-fvisibility=hidden", "-shared", link, f"-DCNNFAST_HOST={name}")
    return gcc(f"library/{op}.cpp", *flags, csrc=csrc)


def nvcc(op: str, arch: str, dtype: str) -> Callable[[], Path]:
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [str(find_nvcc()), *NVCC, target, f"-DTYPE={TYPES[dtype]}"]
    return lambda: build(command, HERE / "instances" / f"{op}.cu", [])


def quick(op: str) -> list[tuple[str, str]]:
    """(dtype, architecture) of what is compiled by default."""
    return [pair for pair in NVCC_QUICK if pair not in NVCC_SLOW.get(op, ())]


def builds(op: str) -> dict[str, Callable[[], Path]]:
    """All that an op's tests build by default, the longest first. "harness": what the harness's own tests build."""
    if op == "harness":
        return {
            "faults": gcc("faults.cpp", "-O0"),
            "asan": gcc("faults.cpp", *ASAN),
            "tsan": gcc("faults.cpp", *TSAN),
        }
    return {
        "library": host_library(op),
        **{f"{dtype} sm_{arch}": nvcc(op, arch, dtype) for dtype, arch in quick(op)},
        **({} if op in ASAN_SLOW else {"asan": gcc(f"sanitized/{op}.cpp", *ASAN)}),
    }


_pool = ThreadPoolExecutor(2)


@functools.cache
def start(op: str) -> dict[str, Future]:
    """Starts the op's builds, two at a time; conftest.py does so for all ops whose tests will run."""
    compiler()
    return {name: _pool.submit(make) for name, make in builds(op).items()}


def built(op: str, name: str) -> Path:
    return start(op)[name].result()


INCLUDE = re.compile(r'^#include "(.+)"', re.MULTILINE)


def included(source: Path, folders: list[Path], found: dict[Path, bytes]) -> None:
    """Adds to `found` the file and all that it includes by "name", however far down."""
    if source in found:
        return
    found[source] = source.read_bytes()
    for name in INCLUDE.findall(found[source].decode()):
        file = next(
            (file for folder in (source.parent, *folders) if (file := (folder / name).resolve()).exists()), None
        )
        assert file, f"{source} includes {name}, which is not there"
        included(file, folders, found)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone among processes: pytest-xdist's workers start the same builds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(command: list[str], source: Path, last: list[str], csrc: Path = CSRC) -> Path:
    """Runs the command for the source, unless that was done before; what it said lies beside the result as .log."""
    files: dict[Path, bytes] = {}
    included(source, [HERE, csrc], files)
    digest = hashlib.sha256(f"{compiler().version} {command} {last}".encode())
    for file in sorted(files):
        digest.update(files[file])
    made = BUILT / f"{source.parent.name}-{source.stem}-{digest.hexdigest()[:16]}"
    with locked(made.with_suffix(".lock")):
        if not made.exists():
            partial = made.with_name(f"{made.name}.{os.getpid()}")
            whole = [*command, f"-I{HERE}", f"-I{csrc}", str(source), "-o", str(partial), *last]
            done = subprocess.run(yielding(whole), capture_output=True, text=True, env=ENVIRONMENT)
            assert done.returncode == 0, f"{source.name} does not compile:\n{done.stderr[-4000:]}"
            made.with_suffix(".log").write_text(done.stderr)
            partial.replace(made)
    return made


class HostLibrary:
    """torch.ops.cnnfast_cuda_host, of which this op's functions are loaded, and what was run and counted."""

    def __init__(self, path: Path, name: str = "cnnfast_cuda_host") -> None:
        torch.ops.load_library(path)
        self.ops = getattr(torch.ops, name)
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

    def promises(self) -> dict[tuple, SimpleNamespace]:
        """What the kernels' headers promise, by kernel and the ints of its template."""
        found = {}
        for kernel, *words in (line.split() for line in self.c.host_promises().decode().splitlines()):
            key = (kernel, *(int(word) for word in words if "=" not in word))
            found[key] = SimpleNamespace(**{k: int(v) for k, v in (word.split("=") for word in words if "=" in word)})
        return found

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
def library(op: str) -> HostLibrary:
    return HostLibrary(built(op, "library"))


def faulty_sources(file: str, sound: str, fault: str) -> Path:
    """A copy of csrc with a fault planted in cuda/<file>, where `sound` stands once."""
    text = (CSRC / "cuda" / file).read_text()
    assert text.count(sound) == 1, f"{file} has {sound!r} {text.count(sound)} times"
    copy = BUILT / f"cnnfast_fault_{hashlib.sha256(f'{file} {sound} {fault}'.encode()).hexdigest()[:12]}"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(CSRC / "cuda", copy / "cuda")
    shutil.copy(CSRC / "packing.h", copy)
    (copy / "cuda" / file).write_text(text.replace(sound, fault))
    return copy


def faulty_library(op: str, file: str, sound: str, fault: str) -> HostLibrary:
    """The op's library with that fault."""
    copy = faulty_sources(file, sound, fault)
    return HostLibrary(host_library(op, copy.name, copy)(), copy.name)
