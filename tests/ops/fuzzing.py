"""What hypothesis draws for the ops: the arguments of op_cases.make as a table, where tensors lie in memory, and more.

A row, as drawn and as a failure shows it, is a dict of plain values; `case_of(op, row)` makes the same tensors of it
each time. Tensors come from a drawn seed, so that shrinking works on shapes and options.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numerics import LAYOUTS, channel_scales, draw
from op_cases import DTYPES, OPS, WITH_KERNEL, Case, make
from torch import Tensor

from cnnfast.ops import activations

CASES = int(os.environ.get("CNNFAST_FUZZ_CASES", "10000"))  # an op, in the slow suite; the one knob

GUARD = 32  # elements of NaN before and after a tensor's own
NORM = "local_response_norm"
FUZZED = (*OPS, NORM)
STRIDED = (*WITH_KERNEL, "pointwise_conv2d")
RESIDUAL = tuple(op for op in OPS if op != "depthwise_conv2d")


def one_of(*values: Any, rarely: Sequence[Any] = ()) -> st.SearchStrategy:
    """One of the values, which may be repeated; about one in twenty times a rare one. A single draw: cheap."""
    times = -(-19 * len(rarely) // len(values)) or 1
    return st.sampled_from((*values * times, *rarely))


def pairs(*values: int) -> list[tuple[int, int]]:
    return list(itertools.product(values, repeat=2))


images = one_of(1, 1, 1, 2, 2, 3, 0)
few = one_of(*range(1, 18), *(1, 2, 3, 8, 15, 16, 17) * 3, 24, 31, 32, 33, 40, 64, rarely=(97, 128, 200, 257, 385))
many = one_of(*range(1, 101), *(1, 3, 15, 16, 17, 31, 32, 33, 48, 64, 65, 97) * 8, rarely=(128, 257, 384, 400, 513))
sides = one_of(*range(1, 8), *range(1, 8), *range(1, 17), rarely=range(17, 41))
kernels = one_of(*((k, k) for k in (3, 3, 3, 1, 2, 5, 7)), *pairs(*range(1, 8)))
strides = one_of(1, 1, 1, 2, 2, 3, 4, (1, 2), (2, 1), (1, 4), (3, 1), (2, 3))
dilations = one_of(1, 1, 1, 1, 2, 3, (1, 2), (2, 1), (1, 3), (3, 2))
margins = one_of(0, 1, 2, 3, rarely=(4, 6, 11, 25))
paddings = st.one_of(st.just("same"), margins, st.tuples(margins, margins), st.tuples(*[margins] * 4))


# Where a tensor lies: its dimensions from the innermost, the step along each and the gap after each, in elements; how
# far it is from the buffer's aligned beginning; which dimensions repeat one element.
def places_with(*expanded: tuple[int, ...]) -> st.SearchStrategy:
    return st.one_of(
        one_of(*LAYOUTS),
        st.fixed_dictionaries(
            {
                "order": one_of(*[(1, 3, 2, 0), (3, 2, 1, 0)] * 12, *itertools.permutations(range(4))),
                "steps": one_of(*itertools.product((1, 1, 2), repeat=4)),
                "gaps": one_of(*itertools.product((0, 0, 1, 5), repeat=4)),
                "offset": st.integers(0, 16),
                "expanded": one_of(*expanded),
            }
        ),
    )


places = places_with(*[()] * 9, (0,), (1,), (2,), (3,), (2, 3), (0, 1))
# For the gradient of the output: where it and x repeat themselves, so do the terms of sums, and their roundings add up
# in one direction, PyTorch's too. The bound's sqrt(K) is for others.
places_of_gradients = places_with(())

# What op_cases.make takes, and which ops have it. `size` is that of the output at stride 1: see _row.
ARGUMENTS: dict[str, tuple[st.SearchStrategy, Sequence[str]]] = {
    "n": (images, FUZZED),
    "c": (few, FUZZED),
    "size": (st.tuples(sides, sides), FUZZED),
    "out": (many, ("conv2d", "pointwise_conv2d", "separable_conv2d", "inverted_residual")),
    "k": (kernels, WITH_KERNEL),
    "stride": (strides, STRIDED),
    "padding": (
        st.one_of(st.just("same"), margins, st.tuples(margins, margins), st.tuples(*[margins] * 4)),
        WITH_KERNEL,
    ),
    "dilation": (dilations, WITH_KERNEL),
    "activation": (one_of(*activations.CODES), OPS),
    "multiplier": (one_of(1, 1, 1, 2, 3), ("depthwise_conv2d", "separable_conv2d", "inverted_residual")),
    "expand": (st.booleans(), ("inverted_residual",)),
    "excite": (st.booleans(), ("inverted_residual", "pointwise_conv2d")),
    "pointwise_first": (st.booleans(), ("separable_conv2d",)),
    "bias": (st.booleans(), OPS),
    "residual": (st.booleans(), RESIDUAL),
    "dtype": (one_of(*DTYPES), FUZZED),
    "decades": (one_of(0.0, 3.0), FUZZED),
}
# What is done to a case after make, and how it is run.
CHANGES: dict[str, tuple[st.SearchStrategy, Sequence[str]]] = {
    "options": (
        st.fixed_dictionaries(
            {
                "size": one_of(*range(1, 13), rarely=(13, 64, 100, 600)),
                "alpha": one_of(1e-4, 1.0, 50.0),
                "beta": one_of(
                    0.75, 0.75, 0.5, 1.0, 0.3
                ),  # an error of the denominator counts beta times: up to 1 it is within S
                "k": one_of(0.5, 1.0, 2.0),
            }
        ),
        (NORM,),
    ),
    "float_biases": (st.booleans(), OPS),  # float32 ones beside a low-precision x
    "special": (one_of(*[None] * 12, math.nan, math.inf, -math.inf), FUZZED),  # in x or residual
    "x_place": (places, FUZZED),
    "residual_place": (places, RESIDUAL),
    "threads": (one_of(1, 2, 3), FUZZED),
    "seed": (st.integers(0, 2**32 - 1), FUZZED),
}


def rows(op: str, **other: st.SearchStrategy) -> st.SearchStrategy[dict[str, Any]]:
    """Rows for an op; `other` strategies in place of the tables' or besides."""
    table = {name: how for name, (how, ops) in (ARGUMENTS | CHANGES).items() if op in ops}
    more = {name: how for name, how in other.items() if name in table or name not in ARGUMENTS | CHANGES}
    return st.fixed_dictionaries(table | more).map(_row)


def _pair(value: int | Sequence[int]) -> Sequence[int]:
    return (value, value) if isinstance(value, int) else value


def _row(drawn: dict[str, Any]) -> dict[str, Any]:
    """The image large enough for the kernel: one output, and as many more rows and columns as were drawn; but small
    where channels are many."""
    row, padding = dict(drawn), drawn.get("padding", "same")
    if row.get("decades"):
        # Long sums that an early term dominates: every later rounding is as large as that term's, and among tens of
        # thousands of cases one exceeds the bound by chance (K = 203: 12.8 of 11.1 units), PyTorch's as ours.
        row |= {name: least for name, least in (("c", min(row["c"], 32)), ("multiplier", 1)) if name in row}
    channels = max(row["c"], row.get("out", 0))
    most = 40 if channels <= 20 else 12 if channels <= 100 else 5
    sums = (0, 0)
    if isinstance(padding, int) or (padding != "same" and len(padding) == 2):
        sums = tuple(2 * pad for pad in _pair(padding))
    elif padding != "same":
        sums = (padding[0] + padding[1], padding[2] + padding[3])
    size = [min(side, most) for side in row["size"]]
    if "k" in row and padding != "same":
        extents = [dilation * (k - 1) + 1 for k, dilation in zip(row["k"], _pair(row["dilation"]), strict=True)]
        size = [side + max(1, extent - pads) - 1 for side, extent, pads in zip(size, extents, sums, strict=True)]
    return row | {"size": tuple(size)}


def placed(x: Tensor, place: str | dict[str, Any]) -> Tensor:
    """x's values (of the first element where it is expanded) at a place, with NaN all around."""
    if isinstance(place, str):
        return LAYOUTS[place](x)
    shape = [1 if d in place["expanded"] and x.shape[d] else x.shape[d] for d in range(4)]
    strides, span = [0] * 4, 1
    for d in place["order"]:
        strides[d] = span * place["steps"][d]
        span *= place["steps"][d] * shape[d] + place["gaps"][d]
    buffer = torch.full((2 * GUARD + place["offset"] + span,), math.nan, dtype=x.dtype)
    view = buffer.as_strided(shape, strides, GUARD + place["offset"])
    view.copy_(x[tuple(slice(side) for side in shape)])
    return view.expand(x.shape)


class Norm(Case):
    """local_response_norm, which has no parameters and no packed form."""

    terms = property(lambda self: min(self.options["size"], self.x.shape[1]))

    def run_packed(self, packed: Tensor | None = None, **changes: Any) -> Tensor:
        return self.run(**changes)

    def check(self, ours: Tensor, rounded: int | None = None, packed: bool = False) -> None:
        super().check(ours, rounded or 0)


def make_norm(generator: torch.Generator, *, n, c, size, dtype, decades) -> Case:
    scale = 2 * channel_scales(generator, c, decades).reshape(-1, 1, 1)
    return Norm(NORM, {"x": draw(generator, (n, c, *size), dtype, scale=scale)})


MAKERS = {op: functools.partial(make, op) for op in OPS} | {NORM: make_norm}


def case_of(op: str, row: dict[str, Any], **more: Any) -> tuple[Case, torch.Generator]:
    """The row's case, and the generator for what else is drawn; `more` goes to make."""
    generator = torch.Generator().manual_seed(row["seed"])
    arguments = {name: row[name] for name in ARGUMENTS if name in row}
    case = MAKERS[op](generator, **arguments, **more)
    case.options |= row.get("options", {})
    if row.get("float_biases") and row["dtype"] is not torch.float64:
        case.tensors |= {name: t.float() for name, t in case.tensors.items() if name.endswith("bias")}
    pixels = [case.tensors[name] for name in ("x", "residual") if name in case.tensors and case.x.numel()]
    # In bfloat16 oneDNN multiplies pixels beside a window by zeros: a NaN spreads, in PyTorch's own as well.
    spreads = op == "conv2d" and row["dtype"] is torch.bfloat16
    if row["special"] is not None and pixels and not spreads:
        image = pixels[row["seed"] % len(pixels)]
        image[tuple(row["seed"] % side for side in image.shape)] = row["special"]
    for name in ("x", "residual"):
        if name in case.tensors:
            case.tensors[name] = placed(case.tensors[name], row[f"{name}_place"])
    return case, generator


def fuzz(strategy: st.SearchStrategy, body: Callable[[dict[str, Any]], None], examples: int) -> None:
    """body(row) for so many rows, new ones each time; a failure is shrunk, and shown with a blob that repeats it."""
    settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=False,
        print_blob=True,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=[HealthCheck.too_slow],
    )(given(row=strategy)(body))()
