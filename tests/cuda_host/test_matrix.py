"""The warp-level matrix product of csrc/cuda/matrix.cuh and the PTX wrappers below it, on host threads against plain
loops, with faults planted.

Fails when a fragment's rows or columns are taken for others, shared memory isn't free of bank conflicts, or the host
twins no longer show a copy that nobody waited for, a missing barrier, or a copy into what is still read.
"""

import functools
import json
import math
import subprocess

import pytest
from cuda_host import harness

pytestmark = harness.needs_toolkit
TYPES = ["half_32", "half_64", "half_128", "half_256", "bfloat16_64", "tf32_64", "float_64", "float_128"]
SM_75 = ["bfloat16_fma_64"]  # multiplies bfloat16 by FMA
ORDERS = {"forward": harness.FORWARD, "reverse": harness.REVERSE, "warps": harness.WARPS}


@functools.cache
def program(flags):
    return harness.gcc("matrix.cpp", *flags)()


def product(type_, fault="none", order=harness.FORWARD, flags=("-O1",)):
    """(error as a share of what the arithmetic may make, counts)."""
    command = [program(flags), type_, fault, str(order)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr, done.stderr[:4000]
    error, counted = done.stdout.split("\n", 1)
    return float(error), json.loads(counted)[0]["counts"]


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("type_", TYPES + SM_75)
def test_product(type_, order):
    assert product(type_, order=order)[0] < 1


@pytest.mark.parametrize("type_", TYPES + SM_75)
def test_shared_memory_is_free_of_conflicts(type_):
    counts = product(type_)[1]
    assert counts["load shared"]["conflicts"] == 0
    assert counts["store shared"]["conflicts"] == 0


@pytest.mark.parametrize("fault", ["no_wait", "overtaking"])
@pytest.mark.parametrize("type_", ["half_64", "tf32_64", "float_64"])
def test_what_is_under_way_is_nan(type_, fault):
    assert math.isnan(product(type_, fault)[0])


@pytest.mark.parametrize("fault", ["wrong_row", "unswapped"])
@pytest.mark.parametrize("type_", ["half_64", "tf32_64", "float_64"])
def test_rows_in_other_places_are_wrong(type_, fault):
    assert product(type_, fault)[0] > 100


@pytest.mark.parametrize("type_", ["half_64", "tf32_64", "float_64"])
def test_missing_barrier_shows_in_the_order_of_warps(type_):
    assert not product(type_, "no_barrier", harness.WARPS)[0] < 1


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", [harness.ASAN, harness.TSAN], ids=["asan", "tsan"])
@pytest.mark.parametrize("type_", TYPES + SM_75)
def test_sanitizers(type_, sanitizer):
    assert product(type_, order=harness.THREADS, flags=sanitizer)[0] < 1
