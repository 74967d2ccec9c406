"""Faults planted in csrc/cuda/pointwise_conv2d and matrix.cuh: each is found.

Fails when the checks of results, the address sanitizer or the counters no longer show one of them.
"""

import subprocess

import pytest
import torch
from cuda_host import harness
from cuda_host.cases.pointwise_conv2d import case, run, tensors_of
from cuda_host.test_pointwise_conv2d import check
from numerics import fresh_generator

pytestmark = [harness.needs_toolkit, pytest.mark.slow, pytest.mark.usefixtures("nan_outputs")]
OP = "pointwise_conv2d"
FORWARD = "pointwise_conv2d/forward.cuh"
OUTPUT = "pointwise_conv2d/output.cuh"
TILE = "matrix.cuh"
WRONG = {
    "no barrier before a slice": (FORWARD, "__syncthreads();               // everyone's", "//"),
    "no barrier before the output": (FORWARD, "__syncthreads();  // the sums go", "//"),
    "no warp barrier in the output": (OUTPUT, "      __syncwarp();\n      // The curves", "      // The curves"),
    "one slice too few waited for": (FORWARD, "cp_async_wait<kStages - 2>", "cp_async_wait<kStages - 1>"),
    "one slice too many under way": (
        FORWARD,
        "if (slice + kStages - 1 < slices) loader.load(slice + kStages - 1);",
        "if (slice + kStages < slices) loader.load(slice + kStages);",
    ),
    "no end of x's rows": (FORWARD, "inside && x_at[i] >= 0", "x_at[i] >= 0"),
    "no end of the weight's rows": (FORWARD, "inside && i < rows_of_weight", "i < rows_of_weight"),
    "another image's gate": (FORWARD, "gate_at = static_cast<int64_t>(image) * a.shape.channels + c", "gate_at = c"),
    "no bias": (OUTPUT, "four.v[k] + bias[i + k] + widen", "four.v[k] + widen"),
    "no residual": (OUTPUT, "a.residual && valid(begin, pass)", "false"),
    "slices from the second on": (FORWARD, "c = slice * Tile::kDepth;", "c = (slice + 1) * Tile::kDepth;"),
    "another half of k": (TILE, "piece + matrix % 2)", "piece + 1 - matrix % 2)"),
    "sums of another row": (TILE, "e / 2 * 8;", "(1 - e / 2) * 8;"),
    "no stride": ("pointwise_conv2d/common.cuh", "column * stride_w", "column"),
}
OUT_OF_BOUNDS = {
    "no end of x": (FORWARD, "row < rows ? a.shape", "true ? a.shape"),
    "no end of the weight": (FORWARD, "inside && i < rows_of_weight", "inside"),
    "no end of y": (OUTPUT, "return inside && row(begin, pass) < rows", "return inside"),
    "no end of y's channels": (OUTPUT, "inside = column < a.shape.out_channels", "inside = true"),
}
CONFLICTING = {
    "rows of sums that share banks": (OUTPUT, "lane / 8 + lane / 4 % 2 * 4", "lane / 4"),
    "sums in plain order": (OUTPUT, "(row % 4 * 2 + row / 4 % 2)", "0"),
    "operands in plain order": (TILE, "(piece ^ row / (8 / kSwapped) % kSwapped)", "piece"),
}
CASES = [
    case(2, 104, 72, (9, 10), act="silu", gate=True, residual=True),
    case(2, 40, 136, (9, 9), s=2, residual=True),
    case(3, 136, 24, (7, 13), act="relu"),
]


def check_all(host):
    """Bounds of the reference, NaN and infinity among the other pixels and weights, the order of threads."""
    generator = fresh_generator()
    for dtype in (torch.bfloat16, torch.float32):
        for case_ in CASES:
            tensors = tensors_of(case_, dtype, generator)
            tensors["x"][0, 1, 2, 4], tensors["x"][1, 3, 4, 2], tensors["weight"][1, 0] = (
                torch.nan,
                torch.inf,
                torch.nan,
            )
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


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_results_are_found(fault):
    host = harness.faulty_library(OP, *WRONG[fault])
    with pytest.raises(AssertionError):
        check_all(host)


@pytest.mark.parametrize("fault", OUT_OF_BOUNDS)
def test_accesses_out_of_bounds_are_found(fault):
    program = harness.gcc(f"sanitized/{OP}.cpp", *harness.ASAN, csrc=harness.faulty_sources(*OUT_OF_BOUNDS[fault]))()
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


@pytest.mark.parametrize("fault", CONFLICTING)
def test_bank_conflicts_are_found(fault):
    host = harness.faulty_library(OP, *CONFLICTING[fault])
    case_ = CASES[0]
    tensors = tensors_of(case_, torch.bfloat16, fresh_generator())
    [launch] = host.count(lambda: check(run(host, case_, **tensors), case_, tensors))
    assert sum(launch["counts"][f"{access} shared"]["conflicts"] for access in ("load", "store")) > 0
