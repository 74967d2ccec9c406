"""What nvcc makes of the kernels: registers, spills, local memory, the instructions of memory accesses and products.

Fails when a kernel spills, keeps an array in local memory, takes more registers than its header promises, no longer
moves 16 bytes at once, or doesn't multiply on tensor cores where it should (or does where it must not).
"""

import re

import pytest
from cuda_host import compiled, harness

from build_backend.cuda import ARCHES

pytestmark = harness.needs_toolkit
OP = "pointwise_conv2d"
NAME = "pointwise_conv2d_forward_kernel"
GENERIC_REGISTERS = 64  # generic.cuh
TYPES = ("bfloat16", "float16", "float32")


def check_instructions(cubin, dtype, arch):
    functions = compiled.instructions(cubin)
    kernels = {kernel: code for kernel, code in functions.items() if kernel[0] == NAME}
    assert len(kernels) == (16 if dtype == "float32" else 8)  # tf32 or not, gated or not, four tiles
    for kernel, code in kernels.items():
        on_tensor_cores = dtype != "float32" or kernel[1]
        if arch == "75":
            on_tensor_cores = dtype == "float16"
        assert bool(re.search(r"\bHMMA\b", code)) == on_tensor_cores, kernel
        copies = r"LDG\.E\.128" if arch == "75" else r"LDGSTS\.E\.BYPASS\.LTC128B\.128"
        assert len(re.findall(copies, code)) >= 4, kernel  # two slices ahead, or more, of x and of weight
        if on_tensor_cores:
            assert re.search(r"LDSM\.16\.M88\.4", code), kernel
        assert re.search(r"LDG\.E\.128", code) and "STG.E.128" in code, kernel
        assert not re.search(r"\b(LDL|STL|ATOM|ATOMG|RED)\b", code), kernel


@pytest.mark.parametrize(("dtype", "arch"), harness.NVCC_QUICK)
def test_quick(dtype, arch, record_proof):
    cubin = harness.built(OP, f"{dtype} sm_{arch}")
    found = compiled.check_resources(OP, cubin, arch, record_proof, GENERIC_REGISTERS)
    assert {kernel for kernel in harness.library(OP).promises() if not kernel[1] or dtype == "float32"} < set(found)
    check_instructions(cubin, dtype, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", TYPES)
def test_all_types(dtype, arch, record_proof):
    cubin = harness.nvcc(OP, arch, dtype)()
    compiled.check_resources(OP, cubin, arch, record_proof, GENERIC_REGISTERS)
    check_instructions(cubin, dtype, arch)
