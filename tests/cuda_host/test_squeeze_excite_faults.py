"""Faults planted in csrc/cuda/squeeze_excite and activation.cuh: the checks of test_squeeze_excite.py find each.

Fails when one of them no longer shows.
"""

import pytest
import torch
from cuda_host import harness
from cuda_host.cases.squeeze_excite import CASES, TWO_LAUNCHES, run, tensors_of
from cuda_host.test_squeeze_excite import check, check_hard_values, check_nan_and_inf
from numerics import fresh_generator

from cnnfast.ops.activations import FUNCTIONS

pytestmark = [harness.needs_toolkit, pytest.mark.slow, pytest.mark.usefixtures("nan_outputs")]
OP = "squeeze_excite"
POOL, GATE, PRODUCT, SCALE = (f"squeeze_excite/{file}.cuh" for file in ("pool", "gate", "product", "scale"))
ACTIVATION = "activation.cuh"
FAULTS = {
    "no barrier before the slots' sum": (POOL, "__syncthreads();\n  if (threadIdx.y", "if (threadIdx.y"),
    "no end of a chunk": (POOL, "s.channels + channel, at < end", "s.channels + channel, at < s.pixels"),
    "no end of a row's chunk": (POOL, "row + at, at < end", "row + at, at < s.pixels"),
    "no last lanes": (POOL, "delta > 0;", "delta > 1;"),
    "a chunk left out": (GATE, "int chunk = 0;", "int chunk = a.chunks > 1;"),
    "no barrier after the means": (GATE, "c, true));\n  __syncthreads();", "c, true));"),
    "no barrier before the activation": (GATE, "__syncthreads();\n  for (int at", "for (int at"),
    "halves of a vector in one place": (PRODUCT, "(pitch / 2)", "(pitch / 4)"),
    "what lies beyond the values": (PRODUCT, "if (i >= inputs) continue;", ""),
    "another half of the values": (PRODUCT, "(upper ? high : low)", "(upper ? low : high)"),
    "half of the lanes": (PRODUCT, "for (; delta > 0;", "for (; delta > 1;"),
    "the bias on every lane": (PRODUCT, "threadIdx.x % lanes == 0 && row", "row"),
    "all slices in one place": (GATE, "* gridDim.y + blockIdx.y) * a.squeezed", "* gridDim.y) * a.squeezed"),
    "a slice left out": (GATE, "unsigned slice = 0;", "unsigned slice = gridDim.y > 1;"),
    "the first tile again": (GATE, "row = tile + at", "row = at"),
    "no barrier between tiles": (GATE, "if (a.squeezed > kTile) __syncthreads();", ""),
    "an image's gate for all": (SCALE, "image * s.channels + channel + part", "channel + part"),
    "a row's gate too early": (SCALE, "(first_pixel + i) / s.pixels", "(first_pixel / 2 + i) / s.pixels"),
    "a chunk's last pixel": (SCALE, "min(begin + t.chunk, s.pixels)", "min(begin + t.chunk - 1, s.pixels)"),
    "no residual": (SCALE, " + widen(residual.v[i])", ""),
    "NaN to 0": (ACTIVATION, "max_nan(v[i], A(0))", "v[i] > A(0) ? v[i] : A(0)"),
    "Inf / Inf": (ACTIVATION, "reciprocal(1.0f + expf(-x))", "expf(x) * reciprocal(1.0f + expf(x))"),
    "GELU by tanh": (
        ACTIVATION,
        "erff(x * 0.70710678f)",
        "tanhf(0.7978845608f * (x + 0.044715f * x * x * x))",
    ),
}
RUNS = [  # float32's bound shows what is wrong with a mean, bfloat16 has vectors of two halves
    (harness.FORWARD, torch.float32),
    (harness.FORWARD, torch.bfloat16),
    (harness.REVERSE, torch.float32),
]


def check_all(host):
    """Bounds of the reference in every order of threads; NaN and infinity; numbers of every size."""
    generator = fresh_generator()
    for case in (*(CASES[i] for i in (0, 3, 8, 10, 11, 13, 15)), *TWO_LAUNCHES[1:]):
        for order, dtype in RUNS:
            tensors = tensors_of(case, dtype, generator)
            host.order(order)
            check(case, run(host, case, tensors), tensors)
    for case in (CASES[0], CASES[8], CASES[10], TWO_LAUNCHES[1]):
        check_nan_and_inf(host, case)
    for activation in FUNCTIONS:
        check_hard_values(host, activation)


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
