"""docs/kernels.md's second half: what every CUDA C++ kernel takes on every architecture, compiled by nvcc (no GPU).

    python tests/cuda_table.py            writes it
    python tests/cuda_table.py --check    compares; exit code 1 if the file is out of date

Registers may differ between versions of nvcc: with another one than the file's, only spills and local memory are
checked.
"""

import argparse
import functools
import hashlib
import inspect
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import kernels_file

sys.path.append(str(kernels_file.ROOT))  # for build_backend, which isn't installed

from cuda_host import compiled, harness

from build_backend.cuda import ARCHES, find_nvcc
from build_backend.toolchain import ROOT

TITLE = kernels_file.TITLES[1]
OPS = sorted(source.stem for source in (harness.HERE / "instances").glob("*.cu"))
WITH_FLOAT64 = ("depthwise_conv2d",)
ABBREVIATIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
SHOWN = "90a"  # whose instructions are listed
SEEN = {  # SASS: loads and stores of 16 bytes, copies past the registers, matrices from shared memory, products
    "LDG.128": r"LDG\.E\.128",
    "STG.128": r"STG\.E\.128",
    "LDS.128": r"LDS\.128",
    "STS.128": r"STS\.128",
    "LDGSTS": r"LDGSTS",
    "LDSM": r"LDSM",
    "HMMA": r"HMMA",
    "HGMMA": r"HGMMA",
}


def builds() -> list[tuple[str, str, str]]:
    """(op, dtype, architecture) of every compilation."""
    return [
        (op, dtype, arch)
        for op in OPS
        for dtype in ABBREVIATIONS
        if dtype != "float64" or op in WITH_FLOAT64
        for arch in ARCHES
    ]


@functools.cache
def nvcc_version() -> str:
    said = subprocess.run([str(find_nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release \S+, V(\S+)", said)[1]


def code_of(source: str) -> list[str]:
    """Its words, less comments."""
    return re.sub(r"//.*", "", source).split()


@functools.cache
def digest() -> str:
    """Of what the figures depend on: the kernels' code without its comments, the compiler's flags, how code is read."""
    sources = [
        *(ROOT / "csrc/cuda").rglob("*.cuh"),
        ROOT / "csrc/packing.h",
        *(harness.HERE / "instances").glob("*.cu"),
    ]
    code = [(file.relative_to(ROOT).as_posix(), code_of(file.read_text(encoding="utf-8"))) for file in sorted(sources)]
    readers = [
        inspect.getsource(reader)
        for reader in (compiled.short_name, compiled.resources, code_of, cell, row, objections)
    ]
    return hashlib.sha256(repr((code, harness.NVCC, builds(), SEEN, readers)).encode()).hexdigest()[:16]


def objections(op: str, dtype: str, arch: str, kernel: tuple, used: dict[str, int]) -> list[str]:
    """What is wrong with it, whatever the version of nvcc."""
    where = f"{' '.join(map(str, kernel))}, {op}, {dtype}, sm_{arch}"
    return [f"{where}: {used[what]} bytes of {what}" for what in ("stack", "spills") if used[what]]


def cell(used: dict[str, int]) -> str:
    """Registers, and in brackets the bytes of local memory (arrays and spills) where there are any."""
    return str(used["registers"]) + (f" ({used['stack']})" if used["stack"] else "")


def row(dtype: str, kernel: tuple, by_arch: dict[str, dict[str, int]], code: str) -> str:
    """by_arch: registers and so on of each architecture; code: SASS of the one shown."""
    name, *constants = kernel
    registers = " | ".join(cell(by_arch[arch]) if arch in by_arch else "" for arch in ARCHES)
    counts = {mnemonic: len(re.findall(pattern, code)) for mnemonic, pattern in SEEN.items()}
    seen = ", ".join(f"{count} {mnemonic}" for mnemonic, count in counts.items() if count)
    return f"| {name} | {', '.join(map(str, constants))} | {ABBREVIATIONS[dtype]} | {registers} | {seen} |"


def table() -> tuple[str, list[str]]:
    """(the half, what is wrong with any kernel)."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(lambda build: harness.nvcc(build[0], build[2], build[1])(), builds())
        cubins = dict(zip(builds(), made, strict=True))
    lines, wrong = [], []
    for op, dtype in dict.fromkeys((op, dtype) for op, dtype, _ in builds()):
        found = {arch: compiled.resources(cubins[op, dtype, arch]) for arch in ARCHES}
        codes = compiled.instructions(cubins[op, dtype, SHOWN])
        for kernel in sorted({kernel for kernels in found.values() for kernel in kernels}, key=str):
            by_arch = {arch: kernels[kernel] for arch, kernels in found.items() if kernel in kernels}
            lines.append(row(dtype, kernel, by_arch, codes.get(kernel, "")))
            wrong += [text for arch, used in by_arch.items() for text in objections(op, dtype, arch, kernel, used)]
    targets = " | ".join(f"sm_{arch}" for arch in ARCHES)
    return (
        f"""{TITLE}

Made by `python tests/cuda_table.py` with nvcc {nvcc_version()} (sources {digest()}); nothing here needed a GPU.
Registers are a thread's, by architecture; in brackets the bytes of local memory, where a kernel has any. Constants are
the ints of the kernel's template, in the order of its source. Shared memory is asked for at the launch: each kernel's
header states how much. Instructions are those seen in sm_{SHOWN}'s code, how often they stand there: 16-byte accesses,
asynchronous copies to shared memory (LDGSTS), loads of matrices from there (LDSM), products on the tensor cores (HMMA).

| kernel | constants | dtype | {targets} | instructions |
|---|---|---|{"---|" * len(ARCHES)}---|
"""
        + "\n".join(lines)
        + "\n",
        wrong,
    )


def made_with() -> tuple[str, str] | None:
    """(version of nvcc, digest of the sources) that the file states; None before its first time."""
    stated = re.search(r"with nvcc (\S+) \(sources (\w+)\)", kernels_file.halves()[TITLE])
    return stated and stated.groups()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with docs/kernels.md instead of writing it")
    check = parser.parse_args().check
    text, wrong = table()
    if not check:
        kernels_file.write(text)
    elif made_with() is None or (made_with()[0] == nvcc_version() and text != kernels_file.halves()[TITLE]):
        wrong.append("docs/kernels.md is out of date: run python tests/cuda_table.py")
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
