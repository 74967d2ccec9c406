"""What nvcc makes of the kernels: registers, spills, local memory, the instructions of the memory accesses.

Fails when a kernel spills, keeps an array in local memory, takes more registers than its header promises, or no longer
loads 16 bytes at once.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_host import harness

from build_backend.cuda import ARCHES

pytestmark = harness.needs_toolkit
GENERIC_REGISTERS = 64  # generic.cuh
KERNEL = re.compile(r"\d+(depthwise_conv2d_\w+?_kernel)I")


def short_name(mangled):
    """("depthwise_conv2d_forward_kernel", 3, 1), or the name alone where there is no kernel size and stride."""
    name = KERNEL.search(mangled)[1]
    sizes = re.findall(r"Li(\d+)E", mangled)
    return (name, *map(int, sizes)) if sizes else name


def resources(cubin):
    """{kernel: {"registers", "stack", "spills"}} from ptxas's report."""
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


def find_disassembler():
    """The toolkit's, or the one that comes with Triton."""
    try:
        import triton
    except ImportError:
        bundled = None
    else:
        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    candidates = [harness.toolkit() / "bin" / "cuobjdump", shutil.which("cuobjdump"), bundled]
    return next((path for path in candidates if path and Path(path).exists()), None)


def check_resources(cubin, record_proof, arch):
    promises, found = harness.library().promises(), resources(cubin)
    assert found
    for kernel, used in found.items():
        promised = promises[kernel].registers if kernel in promises else GENERIC_REGISTERS
        assert used["registers"] <= promised, (kernel, used)
        assert used["stack"] == used["spills"] == 0, (kernel, used)
        record_proof("compiled", kernel=kernel if isinstance(kernel, str) else kernel[0], target=f"sm_{arch}")
    return found


@pytest.mark.parametrize(("dtype", "arch"), harness.NVCC_QUICK)
def test_registers_and_spills(dtype, arch, record_proof):
    found = check_resources(harness.built(f"{dtype} sm_{arch}"), record_proof, arch)
    assert set(harness.library().promises()) < set(found)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", harness.TYPES)
def test_registers_and_spills_of_all_types(dtype, arch, record_proof):
    check_resources(harness.nvcc(arch, dtype)(), record_proof, arch)


@pytest.mark.parametrize(("dtype", "arch"), harness.NVCC_QUICK)
def test_accesses_are_16_bytes_wide(dtype, arch):
    disassembler = find_disassembler()
    if disassembler is None:
        pytest.skip("no cuobjdump, neither the toolkit's nor Triton's")
    command = [disassembler, "-sass", harness.built(f"{dtype} sm_{arch}")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = {short_name(part.split("\n", 1)[0]): part for part in text.split("Function : ")[1:]}
    promises = harness.library().promises()
    assert set(promises) < set(functions)
    for kernel, promise in promises.items():
        code = functions[kernel]
        in_a_row = promise.loads_per_strip // kernel[1]  # of one kernel row: unrolled, independent loads in flight
        assert len(re.findall(r"LDG\.E\.128", code)) >= in_a_row // 2, kernel
        assert "STG.E.128" in code and "LDS.128" in code, kernel
        assert not re.search(r"\b(LDL|STL|ATOM|ATOMG|RED)\b", code), kernel
