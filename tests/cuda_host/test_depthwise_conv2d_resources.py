"""What nvcc makes of the kernels: registers, spills, local memory, the instructions of the memory accesses.

Fails when a kernel spills, keeps an array in local memory, takes more registers than its header promises, or no longer
loads 16 bytes at once.
"""

import re

import pytest
from cuda_host import compiled, harness

from build_backend.cuda import ARCHES

pytestmark = harness.needs_toolkit
OP = "depthwise_conv2d"
GENERIC_REGISTERS = 64  # generic.cuh


@pytest.mark.parametrize(("dtype", "arch"), harness.NVCC_QUICK)
def test_registers_and_spills(dtype, arch, record_proof):
    cubin = harness.built(OP, f"{dtype} sm_{arch}")
    found = compiled.check_resources(OP, cubin, arch, record_proof, GENERIC_REGISTERS)
    assert set(harness.library(OP).promises()) < set(found)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", harness.TYPES)
def test_registers_and_spills_of_all_types(dtype, arch, record_proof):
    compiled.check_resources(OP, harness.nvcc(OP, arch, dtype)(), arch, record_proof, GENERIC_REGISTERS)


@pytest.mark.parametrize(("dtype", "arch"), harness.NVCC_QUICK)
def test_accesses_are_16_bytes_wide(dtype, arch):
    functions = compiled.instructions(harness.built(OP, f"{dtype} sm_{arch}"))
    promises = harness.library(OP).promises()
    assert set(promises) < set(functions)
    for kernel, promise in promises.items():
        code = functions[kernel]
        in_a_row = promise.loads_per_strip // kernel[1]  # of one kernel row: unrolled, independent loads in flight
        assert len(re.findall(r"LDG\.E\.128", code)) >= in_a_row // 2, kernel
        assert "STG.E.128" in code and "LDS.128" in code, kernel
        assert not re.search(r"\b(LDL|STL|ATOM|ATOMG|RED)\b", code), kernel
