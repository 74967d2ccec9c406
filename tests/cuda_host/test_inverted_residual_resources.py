"""What nvcc makes of inverted_residual's kernels: registers, spills, local memory, tensor cores, widths of accesses.

Fails when a kernel spills, keeps an array in local memory, takes more registers than its header promises, doesn't
multiply on tensor cores where it should, no longer moves 16 bytes at once, or has an atomic.
"""

import re

import pytest
from cuda_host import compiled, harness

from build_backend.cuda import ARCHES

pytestmark = harness.needs_toolkit
OP = "inverted_residual"
ONE_PASS = "inverted_residual_one_pass_kernel"
DTYPES = ("bfloat16", "float16", "float32")


COMPILED = [
    *harness.quick(OP),
    *(pytest.param(*pair, marks=pytest.mark.slow) for pair in harness.NVCC_SLOW[OP]),
]


def cubin_of(dtype, arch):
    if (dtype, arch) in harness.quick(OP):
        return harness.built(OP, f"{dtype} sm_{arch}")  # begun when the tests were collected
    return harness.nvcc(OP, arch, dtype)()


@pytest.mark.parametrize(("dtype", "arch"), COMPILED)
def test_registers_and_spills(dtype, arch, record_proof):
    found = compiled.check_resources(OP, cubin_of(dtype, arch), arch, record_proof, unpromised=0)
    wanted = {key for key in harness.library(OP).promises() if dtype == "float32" or key[1] == 0}
    assert set(found) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_registers_and_spills_of_all_types(dtype, arch, record_proof):
    compiled.check_resources(OP, harness.nvcc(OP, arch, dtype)(), arch, record_proof, unpromised=0)


@pytest.mark.parametrize(("dtype", "arch"), COMPILED)
def test_instructions(dtype, arch):
    for (kernel, tf32, *_), code in compiled.instructions(cubin_of(dtype, arch)).items():
        if kernel == ONE_PASS and int(arch.rstrip("a")) < 90:  # no clusters
            assert "BPT.TRAP" in code and not re.search(r"\b(LDG|STG|LDS|STS)\b", code)
            continue
        on_tensor_cores = dtype != "float32" or tf32
        assert bool(re.search(r"\bHMMA\b", code)) == on_tensor_cores, kernel
        assert bool(re.search(r"\bLDSM\.16\.M88\.4\b", code)) == on_tensor_cores, kernel
        assert "LDGSTS.E" in code and re.search(r"LDGSTS\S*\.128", code), kernel
        assert "STG.E.128" in code and "LDS.128" in code, kernel
        assert "LDS.U8" not in code, kernel  # words byte by byte
        if kernel == ONE_PASS:
            assert "UCGABAR_ARV" in code and re.search(r"\bLD\.E\.128", code), kernel
        assert not re.search(r"\b(LDL|STL|ATOM|ATOMG|RED)\b", code), kernel
