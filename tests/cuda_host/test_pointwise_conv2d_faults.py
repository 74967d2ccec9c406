"""Faults planted in csrc/cuda/pointwise_conv2d and matrix.cuh: the checks of test_pointwise_conv2d.py find each.

Fails when one of them no longer shows.
"""

import pytest
import torch
from cuda_host import harness
from cuda_host.cases.pointwise_conv2d import case, run, tensors_of
from cuda_host.test_pointwise_conv2d import check
from numerics import fresh_generator

pytestmark = [harness.needs_toolkit, pytest.mark.slow, pytest.mark.usefixtures("nan_outputs")]
OP = "pointwise_conv2d"
FORWARD = "pointwise_conv2d/forward.cuh"
FAULTS = {
    "no barrier before a slice": (
        FORWARD,
        "__syncthreads();               // everyone's",
        "               // everyone's",
    ),
    "no barrier before the output": (FORWARD, "__syncthreads();  // the sums go", "//"),
    "no warp barrier in the output": (
        FORWARD,
        "      __syncwarp();\n      // The curves",
        "      // The curves",
    ),
    "one slice too few waited for": (FORWARD, "cp_async_wait<kStages - 2>", "cp_async_wait<kStages - 1>"),
    "one slice too many under way": (
        FORWARD,
        "if (slice + kStages - 1 < slices) loader.load(slice + kStages - 1);",
        "if (slice + kStages < slices) loader.load(slice + kStages);",
    ),
    "no end of x's rows": (FORWARD, "inside && x_at[i] >= 0", "x_at[i] >= 0"),
    "no end of the weight's rows": (FORWARD, "inside && i < rows_of_weight", "i < rows_of_weight"),
    "no end of an image": (FORWARD, "pixel < end_pixel ? a.shape", "true ? a.shape"),
    "another image's gate": (FORWARD, "gate_at = image * a.shape.channels + c", "gate_at = c"),
    "no bias": (FORWARD, "four.v[k] + bias[i + k] + widen", "four.v[k] + widen"),
    "no residual": (FORWARD, "a.residual && valid(begin, pass)", "false"),
    "another row of sums": (FORWARD, "lane / 8 + lane / 4 % 2 * 4", "lane / 4"),
    "another half of k": ("matrix.cuh", "piece + matrix % 2)", "piece + 1 - matrix % 2)"),
    "sums of another row": ("matrix.cuh", "e / 2 * 8;", "(1 - e / 2) * 8;"),
    "no stride": ("pointwise_conv2d/common.cuh", "column * stride_w", "column"),
}
CASES = [
    case(2, 104, 72, (9, 10), act="silu", gate=True, residual=True),
    case(2, 40, 136, (9, 9), s=2, residual=True),
    case(3, 136, 24, (7, 13), act="relu"),
]


def check_all(host):
    """Bounds of the reference, pixels of NaN and infinity among the others, the order of threads."""
    generator = fresh_generator()
    for dtype in (torch.bfloat16, torch.float32):
        for case_ in CASES:
            tensors = tensors_of(case_, dtype, generator)
            tensors["x"][0, 1, 2, 4], tensors["x"][1, 3, 4, 2] = torch.nan, torch.inf
            results = []
            for order in (harness.FORWARD, harness.REVERSE, harness.WARPS):
                host.order(order)
                results.append(run(host, case_, **tensors))
                check(results[-1], case_, tensors)


def test_without_a_fault():
    host = harness.library(OP)
    try:
        check_all(host)
    finally:
        host.order(harness.FORWARD)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(fault):
    host = harness.faulty_library(OP, *FAULTS[fault])
    with pytest.raises(AssertionError):
        check_all(host)
