"""Each op's kernels on one host thread per CUDA thread under ASan + UBSan and under TSan.

Fails on an access out of bounds or misaligned, a race, or a result that isn't the one of the plain loops beside it.
"""

import subprocess

import pytest
from cuda_host import harness

pytestmark = harness.needs_toolkit


def check(program):
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "all equal\n", done.stdout + done.stderr[:4000]
    assert not done.stderr


@pytest.mark.parametrize("op", [op for op in harness.OPS if op not in harness.ASAN_SLOW])
def test_asan(op):
    check(harness.built(op, "asan"))


@pytest.mark.slow
@pytest.mark.parametrize("op", harness.ASAN_SLOW)
def test_asan_of_many_kernels(op):
    check(harness.gcc(f"sanitized/{op}.cpp", *harness.ASAN)())


@pytest.mark.slow
@pytest.mark.parametrize("op", harness.OPS)
def test_tsan(op):
    check(harness.gcc(f"sanitized/{op}.cpp", *harness.TSAN)())
