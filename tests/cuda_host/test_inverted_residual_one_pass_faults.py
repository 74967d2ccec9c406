"""Faults planted in csrc/cuda/inverted_residual/one_pass*.cuh: each shows in the bits, in some order of the threads.

Fails when one of them no longer does.
"""

import pytest
import torch
from cuda_host import harness
from cuda_host.cases.inverted_residual import draw_case
from cuda_host.test_inverted_residual_one_pass import excited, in_one_pass, in_several

pytestmark = [harness.needs_toolkit, pytest.mark.slow, pytest.mark.usefixtures("nan_outputs")]
OP = "inverted_residual"
FILE, PLAN = "inverted_residual/one_pass.cuh", "inverted_residual/one_pass_plan.cuh"
EXCITE = "inverted_residual/one_pass_excite.cuh"
FAULTS = {
    "no cluster barrier before the means": (FILE, "cluster_barrier();  // all means", "__syncthreads();  // all means"),
    "no cluster barrier before the hidden values": (EXCITE, "cluster_barrier();  // all hidden", "// all hidden"),
    "no cluster barrier before d": (FILE, "cluster_barrier();  // all of d", "__syncthreads();  // all of d"),
    "a block leaves early": (FILE, "cluster_barrier();  // a block's", "// a block's"),
    "means of another block": (EXCITE, "c % rank_channels, c / rank_channels)", "c % rank_channels, rank)"),
    "hidden values of another block": (EXCITE, "row / p.hidden_rows), g.activation", "rank), g.activation"),
    "d of another block": (FILE, "owner = (first + i) / plan.rank_chunks", "owner = (first + i) / plan.chunks"),
    "another channel's gate": (EXCITE, "chunk * kChunk<T> + piece * kVec<T> + i", "chunk * kChunk<T> + i"),
    "no rounding of the gates": (EXCITE, "widen(narrow<T>(four.v[k]))", "four.v[k]"),
    "a gate beyond the last channel": (EXCITE, ": 0.0f);\n  __syncthreads();", ": 1e38f * 10);\n  __syncthreads();"),
    "a slice too far": (EXCITE, "values + begin / p.slice * pitch", "values + (begin > 0) * 2 * pitch"),
    "the first slice of weights": (EXCITE, "rows, begin, min(p.slice", "rows, 0, min(p.slice"),
    "another tile's d": (
        EXCITE,
        "(chunk * p.tiles + tile) * kTilePixels",
        "(chunk * p.tiles + tile / 2) * kTilePixels",
    ),
    "output channels of another block": (
        FILE,
        "task / plan.tiles * p.out_columns",
        "task / plan.tiles / 2 * p.out_columns",
    ),
    "no barrier between stages": (FILE, "__syncthreads();  // this stage is there", "// this stage is there"),
    "no barrier before the output": (FILE, "__syncthreads();  // both stages", "// both stages"),
    "no barrier between sums and d": (FILE, "__syncthreads();  // the tile's sums", "// the tile's sums"),
    "padding not zeroed": (FILE, "bits<Vec<T>>(uint4{})", "bits<Vec<T>>(uint4{~0u, ~0u, ~0u, ~0u})"),
    "a row of x too high": (FILE, "(i / s.width + s.pad_top)", "(i / s.width)"),
    "one sum of the strips for all tiles": (FILE, "total += sum_of_strips", "total = sum_of_strips"),
    "hidden values in one part": (PLAN, "p.sliced = !gate.one_launch()", "p.sliced = false"),
}
CASES = [
    (
        excited(8, 152, 40, (10, 17), n=1),
        torch.bfloat16,
    ),  # 5 chunks of which the last isn't full, 4 blocks, several tiles
    (excited(8, 136, 24, (5, 6), k=5, n=2), torch.float32),  # 9 chunks, 8 blocks
    (excited(8, 520, 24, (4, 5), n=1), torch.float32),  # hidden values in three parts
]


def check_all(host):
    for row, dtype in CASES:
        drawn = draw_case(row, dtype, decades=0.0)
        host.order(harness.FORWARD)
        wanted = in_several(host, drawn)
        for order in (harness.FORWARD, harness.REVERSE, harness.WARPS):
            host.order(order)
            assert in_one_pass(host, drawn).equal(wanted)


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
