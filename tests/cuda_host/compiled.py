"""What nvcc made of an op's kernels: registers, stack and spills from ptxas's report, instructions from cuobjdump."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_host import harness

KERNEL = re.compile(r"7cnnfast4cuda\d+(\w+?_kernel)I")  # mangled, a template in the namespace cnnfast::cuda


def short_name(mangled: str) -> tuple:
    """("depthwise_conv2d_forward_kernel", 3, 1): the kernel and the ints of its template."""
    return (KERNEL.search(mangled)[1], *map(int, re.findall(r"L[ib](\d+)E", mangled)))


def resources(cubin: Path) -> dict[tuple, dict[str, int]]:
    """Of each kernel its "registers", "stack" and "spills", the last two in bytes."""
    found, kernel = {}, None
    for line in cubin.with_suffix(".log").read_text().splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = short_name(match[1])
            found[kernel] = {}
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            found[kernel] |= {"stack": int(match[1]), "spills": int(match[2]) + int(match[3])}
        elif match := re.search(r"Used (\d+) registers", line):
            found[kernel]["registers"] = int(match[1])
    return found


def find_disassembler() -> Path | str | None:
    """The toolkit's, or the one that comes with Triton."""
    try:
        import triton
    except ImportError:
        bundled = None
    else:
        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    candidates = [harness.toolkit() / "bin" / "cuobjdump", shutil.which("cuobjdump"), bundled]
    return next((path for path in candidates if path and Path(path).exists()), None)


def instructions(cubin: Path) -> dict[tuple, str]:
    """Of each kernel its SASS; skips the test where nothing can show it."""
    disassembler = find_disassembler()
    if disassembler is None:
        pytest.skip("no cuobjdump, neither the toolkit's nor Triton's")
    text = subprocess.run([disassembler, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    return {short_name(part.split("\n", 1)[0]): part for part in text.split("Function : ")[1:]}


def check_resources(op: str, cubin: Path, arch: str, record_proof, unpromised: int) -> dict[tuple, dict[str, int]]:
    """No kernel spills, keeps anything in local memory or takes more registers than its header promises, for this
    architecture if it says so (`unpromised` where it promises none)."""
    promises, found = harness.library(op).promises(), resources(cubin)
    assert found
    for kernel, used in found.items():
        promise = promises.get(kernel)
        promised = getattr(promise, f"registers_{arch}", promise.registers) if promise else unpromised
        assert used["registers"] <= promised, (kernel, used)
        assert used["stack"] == used["spills"] == 0, (kernel, used)
        record_proof("compiled", kernel=kernel[0], target=f"sm_{arch}")
    return found
