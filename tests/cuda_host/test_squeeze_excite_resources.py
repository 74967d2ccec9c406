"""What nvcc makes of squeeze_excite's kernels: registers, spills, local memory, instructions of the memory accesses.

Fails when a kernel spills, keeps an array in local memory, takes more registers than its header promises, no longer
loads 16 bytes at once, or has an atomic.
"""

import re

import pytest
from cuda_host import compiled, harness

from build_backend.cuda import ARCHES

pytestmark = harness.needs_toolkit
OP = "squeeze_excite"
KERNELS = {"pool": 4, "pool_nchw": 4, "scale": 4, "scale_nchw": 4, "gate": 4, "reduce": 4, "expand": 4}
SHARED = {"pool", "gate", "reduce", "expand"}
DTYPES = ("bfloat16", "float16", "float32")


@pytest.mark.parametrize(("dtype", "arch"), harness.NVCC_QUICK)
def test_registers_and_spills(dtype, arch, record_proof):
    found = compiled.check_resources(OP, harness.built(OP, f"{dtype} sm_{arch}"), arch, record_proof, unpromised=0)
    assert {kernel for kernel, *_ in found} == {f"squeeze_excite_{kernel}_kernel" for kernel in KERNELS}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_registers_and_spills_of_all_types(dtype, arch, record_proof):
    compiled.check_resources(OP, harness.nvcc(OP, arch, dtype)(), arch, record_proof, unpromised=0)


@pytest.mark.parametrize(("dtype", "arch"), harness.NVCC_QUICK)
def test_accesses_are_16_bytes_wide(dtype, arch):
    """Of the vectorised kernels as many loads in a row as a thread keeps in flight."""
    functions = compiled.instructions(harness.built(OP, f"{dtype} sm_{arch}"))
    vector = 4 if dtype == "float32" else 8
    for kernel in KERNELS:
        name = f"squeeze_excite_{kernel}_kernel"
        code = functions[(name,) if (name,) in functions else (name, vector)]
        assert len(re.findall(r"LDG\.E\.128", code)) >= KERNELS[kernel], kernel
        assert ("LDS.128" in code) == (kernel in SHARED), kernel
        assert kernel not in ("scale", "scale_nchw") or "STG.E.128" in code, kernel
    for kernel, code in functions.items():
        assert not re.search(r"\b(LDL|STL|ATOM|ATOMG|RED)\b", code), kernel
