"""Faults planted in csrc/cuda/inverted_residual: each is found.

Fails when the checks of results, the orders of threads or the address sanitizer no longer show one of them.
"""

import subprocess

import pytest
import torch
from cuda_host import harness
from cuda_host.cases.inverted_residual import case, draw_case, run

pytestmark = [harness.needs_toolkit, pytest.mark.slow, pytest.mark.usefixtures("nan_outputs")]
OP = "inverted_residual"
STAGES, CHUNKS = "inverted_residual/stages.cuh", "inverted_residual/chunks.cuh"
FUSED, SQUEEZE = "inverted_residual/fused.cuh", "inverted_residual/squeeze.cuh"
WRONG = {
    "no barrier after the positions": (CHUNKS, "p, place);\n  __syncthreads();\n", "p, place);\n"),
    "no barrier before a chunk": (CHUNKS, "__syncthreads();  // this chunk's", "// this chunk's"),
    "no barrier before the depthwise stage": (CHUNKS, "__syncthreads();  // e is there\n", "\n"),
    "no barrier before the projection": (CHUNKS, "__syncthreads();  // d is there", "// d is there"),
    "no barrier before one stage's copies": (CHUNKS, "__syncthreads();  // the weights have", "// the weights have"),
    "no barrier before the output": (CHUNKS, "__syncthreads();  // all of shared", "// all of shared"),
    "weights not waited for": (CHUNKS, "cp_async_wait<0>", "cp_async_wait<1>"),
    "weights of the same chunk again": (CHUNKS, "copy_weights(next_weights, a, p, place, next);\n      cp", "cp"),
    "biases of the first chunk": (CHUNKS, "next_bias = load_bias(a, next)", "next_bias = load_bias(a, 0)"),
    "halo off by a row": (STAGES, "top = place.row * s.stride_h - s.pad_top", "top = place.row * s.stride_h"),
    "halo off by a column": (STAGES, "left + column < s.width", "left + column <= s.width"),
    "padding is activation(bias)": (STAGES, "place.inside ? v[2 * j] : 0.0f", "v[2 * j]"),
    "another chunk's rows": (STAGES, "static_cast<int64_t>(first + row) * s.channels", "int64_t{row} * s.channels"),
    "another chunk's columns": (STAGES, "* s.expanded + first + piece * kVec<T>", "* s.expanded + piece * kVec<T>"),
    "no end of the chunk": (STAGES, "row < channels ? count - piece * kVec<T> : 0", "row < channels ? kVec<T> : 0"),
    "strips of the same rows": (STAGES, "strip % 2 * 2;", "strip % 2;"),
    "outputs of another strip": (STAGES, "at(o * kStrips + strip, piece)", "at(strip * kStripOutputs + o, piece)"),
    "no activation of d": (STAGES, "  activate(sum, activation);\n", ""),
    "no residual": (STAGES, "v[0] += widen(residual.v[0]), v[1]", "v[1]"),
    "no bias": (STAGES, "[2 * half] + bias[0]", "[2 * half]"),
    "another image": (STAGES, "(place.image * s.height +", "("),
    "sums of outputs beyond the image": (STAGES, "o < outputs ? sum", "o <= outputs ? sum"),
    "half of the strips' sums": (STAGES, "strip < kStrips; ++strip", "strip < kStrips / 2; ++strip"),
    "another tile's sums": (SQUEEZE, "static_cast<int64_t>(blockIdx.x) * a", "static_cast<int64_t>(0) * a"),
}
OUT_OF_BOUNDS = {
    "no end of the outputs": (STAGES, "column >= s.out_width) return -1", "false) return -1"),
    "no end of the inputs": (STAGES, "top + row < s.height &&", ""),
    "no end of the expanded channels": (STAGES, "length = row < count ? s.channels : 0", "length = s.channels"),
}
CASES = [
    case(8, 40, 24, (9, 11), activation="silu"),
    case(16, 72, 72, (15, 16), s=2, activation="relu6"),
    case(16, 40, 24, (9, 9), k=5, excite=True, activation="silu"),
    case(5, None, 13, (9, 7), activation="relu"),
    case(8, None, 160, (6, 6), n=1),  # y on its way where d and weights were
    case(400, 72, 160, (6, 6), n=1),  # weights of one stage
]


def check_all(host):
    for dtype in (torch.float16, torch.float32):
        for row in CASES:
            drawn = draw_case(row, dtype, decades=0.0)
            drawn.tensors.get("expand_bias", drawn.tensors["dw_bias"]).add_(1)
            results = []
            for order in (harness.FORWARD, harness.REVERSE, harness.WARPS):
                host.order(order)
                results.append(run(host, drawn))
                drawn.check(results[-1], rounded=4 if row.get("excite") else 2)
            assert results[0].equal(results[1]) and results[0].equal(results[2])


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
