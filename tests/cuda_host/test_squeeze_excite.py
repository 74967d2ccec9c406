"""csrc/cuda/squeeze_excite, device code and host side, run on host threads against the reference.

Fails when a kernel's arithmetic, indexing, tails or layouts are wrong, an output stays unwritten (they begin as NaN),
the wrong kernel is chosen, or the order of a block's threads or the other images of the batch show in the result.
"""

import pytest
from cuda_host import harness
from cuda_host.cases.squeeze_excite import (
    CASES,
    DTYPES,
    EMPTY,
    TWO_LAUNCHES,
    options_of,
    run,
    tensors_of,
    terms_of,
)
from numerics import assert_close_by_policy, fresh_generator

from cnnfast import reference

pytestmark = [harness.needs_toolkit, pytest.mark.usefixtures("nan_outputs", "forward_order")]


def host_runs(*kernels):
    """Marks a test as the proof of these kernels."""

    def mark(function):
        for kernel in kernels:
            function = pytest.mark.proof("host-run", kernel=f"squeeze_excite_{kernel}_kernel")(function)
        return function

    return mark


def check(case, y, tensors):
    assert_close_by_policy(y, reference.squeeze_excite, **tensors, **options_of(case), terms=terms_of(case))


@host_runs("pool", "pool_nchw", "gate", "reduce", "expand", "scale", "scale_nchw")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES + TWO_LAUNCHES + EMPTY, ids=str)
def test_forward(host, case, dtype):
    tensors = tensors_of(case, dtype, fresh_generator())
    y = run(host, case, tensors)
    x = tensors["x"]
    of_layout = "_nchw" if x.is_contiguous() and x.shape[2:].numel() > 1 else ""  # C = 1 is, too
    gates = ["reduce", "expand"] if case in TWO_LAUNCHES else ["gate"]
    wanted = [f"squeeze_excite_{kernel}_kernel" for kernel in (f"pool{of_layout}", *gates, f"scale{of_layout}")]
    assert host.kernels_run() == ([] if case in EMPTY else wanted)
    check(case, y, tensors)
    assert case in EMPTY or y.stride() == x.stride()  # batch 0 is in both formats
