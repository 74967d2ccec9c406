"""Some of the equality and gradient tests in a few seconds, for a process with another $CNNFAST_ISA (test_backends.py)
or under a sanitizer (build/test_sanitizers.py). Usage: sample.py ISA [CASES], so many fuzzed ones an op besides.

Each op in three dtypes, in both layouts, with channels of whole and of broken panels, sums of several chains, the
strips of the depthwise kernels and what is outside them. Run as a program: pytest itself takes twice as long to start.
"""

import itertools
import sys
from pathlib import Path

import torch
from numerics import fresh_generator, nan_filled
from op_cases import OPS, WITH_SCALES, make
from ops import test_conv2d_winograd, test_stats
from ops.test_equality import check_both_forms
from ops.test_gradients import check_gradients, make_away_from_kinks
from ops.test_scales import ROWS as SCALED
from ops.test_scales import check_scaled

import cnnfast
from cnnfast import _C

ROWS = (
    {"c": 401, "out": 33, "size": (5, 20), "activation": "relu"},
    {
        "c": 16,
        "out": 64,
        "size": (15, 11),
        "k": (5, 5),
        "stride": 2,
        "activation": "silu",
        "excite": True,
        "pointwise_first": True,
        "layout": "nchw",
    },
    {
        "c": 17,
        "out": 16,
        "size": (8, 9),
        "k": (2, 3),
        "stride": (2, 1),
        "dilation": 2,
        "activation": None,
        "multiplier": 2,
    },
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main(isa: str, cases: int = 0) -> None:
    assert _C.isa == isa, f"the kernels are those of {_C.isa}, not {isa}"
    for op in OPS:
        for dtype in DTYPES:
            for row in ROWS:
                with nan_filled():
                    check_both_forms(make(op, fresh_generator(), **row, dtype=dtype, decades=3))
            check_gradients(make_away_from_kinks(op, fresh_generator(), **ROWS[-1], dtype=dtype))
    for row in (ROWS[0], ROWS[2] | {"stride": 1, "dilation": 1, "residual": True}):
        test_conv2d_winograd.check(make("conv2d", fresh_generator(), **row | {"k": (3, 3), "padding": 1}))
    for op, row in itertools.product(WITH_SCALES, SCALED):
        with nan_filled():
            check_scaled(make(op, fresh_generator(), **row, dtype=torch.bfloat16, decades=3))
    for op, dtype in itertools.product(test_stats.OPS, DTYPES[:2]):
        test_stats.check(op, *test_stats.make(op, dtype=dtype))
    if cases:
        from ops import test_fuzz

        for op in test_fuzz.FUZZED:
            test_fuzz.test_forward(op, cases)
            test_fuzz.test_gradients(op, cases // 5)
        for op in test_stats.OPS:
            test_fuzz.test_statistics(op, cases)
    print(f"{Path(cnnfast.__file__).parent}: ok")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
