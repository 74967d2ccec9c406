"""docs/kernels.md's first half: what every Triton kernel takes on every target, compiled ahead of time (no GPU).

    python tests/kernels_table.py            writes it
    python tests/kernels_table.py --check    compares; exit code 1 if the file is out of date

Registers may differ between versions of Triton: with another one than the file's, only spills and limits are checked.
"""

import argparse
import functools
import hashlib
import inspect
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import ahead_of_time
import kernels_file
import torch
import triton
import triton.language as tl
from ahead_of_time import SHARED_LIMIT, TARGETS, Compiled, compile_for
from kernel_cases import CASES, NARROW, PRODUCTS, WITH_TAPS
from triton.runtime.jit import JITCallable

from cnnfast.bench.launches import Launch, modules, recording

TITLE = kernels_file.TITLES[0]
TILE = ("STRIPS", "BLOCK_H", "BLOCK_W", "BLOCK_S", "BLOCK_P", "BLOCK_K", "BLOCK_E", "BLOCK_C")


@functools.cache
def launches(case: str, target: str = "sm_90") -> dict[str, Launch]:
    """By kernel name, those of the forward pass and of all gradients; of two launches of a kernel the first."""
    by_name: dict[str, Launch] = {}
    with recording(target) as recorded:
        CASES[case].launch()
    for launch in recorded:
        by_name.setdefault(launch.name, launch)
    return by_name


def compiled(case: str, kernel: str, target: str) -> Compiled:
    return compile_for(launches(case, target)[kernel], target)


def wanted_load(case: str, kernel: str, target: str) -> int:
    """Bytes that a thread should load at once: its share of a tile's row, 16 at most; for channels_last."""
    launch = launches(case, target)[kernel]
    if not CASES[case].wide or kernel in NARROW:
        return 1
    threads = launch.kwargs["num_warps"] * TARGETS[target].warp_size
    # For gfx942 Triton loads blocks that it transposes by 8 bytes, and a gate number by number in every thread.
    most = 4 if target == "gfx942" and kernel in PRODUCTS else 8 if kernel in WITH_TAPS else 16
    reads_taps = "grad" in launch.arguments and launch.arguments.get("taps") is not None  # bytes
    return min(elements_of_a_load(launch.kwargs) // threads * (1 if reads_taps else CASES[case].dtype.itemsize), most)


def elements_of_a_load(options: dict) -> int:
    """What all threads of a program load together of x: a row of a tile of pixels; of two matrices the smaller one."""
    pixels = options.get("STRIPS", 1) * options.get("BLOCK_W", 1) * options.get("BLOCK_P", 1)
    channels = [options[name] for name in ("BLOCK_K", "BLOCK_E") if name in options]
    if channels:
        sides = sorted((pixels, options["BLOCK_C"], *channels))
        return sides[0] * sides[1]
    return pixels * options["BLOCK_C"]


def objections(case: str, kernel: str, target: str, result: Compiled) -> list[str]:
    """What is wrong with it, whatever the version of Triton."""
    wrong = []
    if result.spilled:
        wrong.append(f"{result.spilled} bytes a thread are spilled")
    if result.shared > SHARED_LIMIT[target]:
        wrong.append(f"{result.shared} bytes of shared memory, the limit is {SHARED_LIMIT[target]}")
    wanted = wanted_load(case, kernel, target)
    if result.narrowest_load < wanted:
        wrong.append(f"a load is {result.narrowest_load} bytes wide, not {wanted}")
    if kernel in PRODUCTS:
        instruction = PRODUCTS[kernel](CASES[case].dtype, target, launches(case, target)[kernel].kwargs)
        if not instruction.search(result.assembly):
            wrong.append(f"no {instruction.pattern} is in its code")
    return [f"{kernel}, {case}, {target}: {text}" for text in wrong]


@functools.cache
def digest() -> str:
    """Of what the figures depend on: the kernels' code, what their launchers pass in each case, how code is judged.

    Not of the launchers' own code, nor of where in a file a kernel stands.
    """
    code = {
        f"{module.__name__}.{name}": code_of(value) if isinstance(value, JITCallable) else repr(value)
        for module in modules()
        for name, value in vars(module).items()
        if isinstance(value, (JITCallable, tl.constexpr))
    }
    passed = [
        (case, target, name, launch.grid, [*map(described, launch.args)], [*map(described, launch.kwargs.items())])
        for case in CASES
        for target in TARGETS
        for name, launch in launches(case, target).items()
    ]
    judges = [inspect.getsource(judge) for judge in (ahead_of_time, row, objections, wanted_load, elements_of_a_load)]
    return hashlib.sha256(repr((sorted(code.items()), passed, judges)).encode()).hexdigest()[:16]


def code_of(function: JITCallable) -> str:
    """With what its decorator says of the arguments."""
    unspecialized = (getattr(function, f"do_not_specialize{what}", None) for what in ("", "_on_alignment"))
    return f"{function.src} {[*unspecialized]}"


def described(argument: Any) -> str:
    if isinstance(argument, torch.Tensor):
        return f"{argument.dtype} {tuple(argument.shape)} {argument.stride()}"
    return repr(argument)


def row(case: str, kernel: str) -> tuple[str, list[str]]:
    """(line of the table, what is wrong with the kernel on any target)."""
    results = {target: compiled(case, kernel, target) for target in TARGETS}
    wrong = [text for target, result in results.items() for text in objections(case, kernel, target, result)]
    registers = " | ".join(str(result.registers) for result in results.values())
    shared = max(result.shared for result in results.values())
    options = launches(case)[kernel].kwargs
    tile = " x ".join(str(options[name]) for name in TILE if name in options)
    sm_90 = results["sm_90"]
    line = (
        f"| {kernel} | {case} | {tile} | {options['num_warps']} | {registers} | {shared} |"
        f" {sm_90.narrowest_load} | {sm_90.instructions} |"
    )
    return line, wrong


def table() -> tuple[str, list[str]]:
    lines, wrong = [], []
    cases, kernels = zip(*((case, kernel) for case in CASES for kernel in launches(case)), strict=True)
    # Fresh processes: a forked one would inherit locks that other threads of this one hold.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        for line, objected in pool.map(row, cases, kernels):
            lines.append(line)
            wrong += objected
            print(line, *objected, sep="\n", file=sys.stderr)
    targets = " | ".join(TARGETS)
    return (
        f"""{TITLE}

Made by `python tests/kernels_table.py` with Triton {triton.__version__} (sources {digest()}); nothing here needed a
GPU. Registers are a thread's (gfx942: vector registers a lane), on every target; shared memory is the most of any
target, in bytes a program; load is the narrowest one, in bytes a thread, and instructions the code's length, both on
sm_90. Nothing spills. Tile: those of {", ".join(TILE)} that the kernel has, as its launcher chose them for the case's
shape. Cases are op, filter / stride and dtype, channels_last unless they say NCHW.

| kernel | case | tile | warps | {targets} | shared | load | instructions |
|---|---|---|---|{"---|" * len(TARGETS)}---|---|---|
"""
        + "\n".join(lines)
        + "\n",
        wrong,
    )


def made_with() -> tuple[str, str]:
    """(version of Triton, digest of the sources) that the file states."""
    return re.search(r"with Triton (\S+) \(sources (\w+)\)", kernels_file.halves()[TITLE]).groups()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with docs/kernels.md instead of writing it")
    check = parser.parse_args().check
    text, wrong = table()
    if not check:
        kernels_file.write(text)
    elif made_with()[0] == triton.__version__ and text != kernels_file.halves()[TITLE]:
        wrong.append("docs/kernels.md is out of date: run python tests/kernels_table.py")
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
