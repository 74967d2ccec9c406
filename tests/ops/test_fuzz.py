"""Whatever hypothesis thinks of: shapes, options, layouts, alignment, threads, special values, and arguments that no op
should take.

Forward: both forms against the reference in float64 by the policy of numerics.py, into NaN-filled outputs of the
strides that the fake promises; inputs, and what lies between and around their elements, unchanged. Gradients likewise.
Mistakes: one sentence, a ValueError or TypeError; what is taken all the same is computed as the reference does.
Fails if an element is wrong or unwritten, memory is written that isn't the op's, or a mistake reaches a kernel.

A few cases an op by default; $CNNFAST_FUZZ_CASES, or 10,000, with `-m slow`; a tenth of it for gradients and mistakes.
"""

import inspect
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from numerics import draw, nan_filled, threads
from op_cases import DTYPES, make
from ops import test_stats
from ops.fuzzing import ARGUMENTS, CASES, FUZZED, NORM, case_of, few, fuzz, one_of, placed, places_of_gradients, rows
from ops.test_gradients import check_gradients, distance_from_kinks
from ops.test_local_response_norm import check as check_norm

import cnnfast.ops

SLOW = pytest.mark.slow
small = one_of(*range(1, 10))


def snapshot(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of the buffer that a tensor is a view of."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).clone()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype is b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def check_forward(op: str, row: dict) -> None:
    case, _ = case_of(op, row)
    before = {name: snapshot(tensor) for name, tensor in case.tensors.items()}
    with nan_filled(), threads(row["threads"]):
        plain, packed = case.run(), case.run_packed()
    for name, tensor in case.tensors.items():
        assert torch.equal(snapshot(tensor), before[name]), f"{name} was written to"
    case.check(plain)
    if not same(packed, plain):
        case.check(packed, packed=True)
    meta = case.to(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")).run()
    assert plain.stride() == packed.stride() == meta.stride()


def test_table_has_what_cases_are_made_with():
    drawn_otherwise = {"op", "generator", "layout", "away_from_kinks"}
    assert set(ARGUMENTS) == set(inspect.signature(make).parameters) - drawn_otherwise


@pytest.mark.parametrize("cases", [CASES // 200, pytest.param(CASES, marks=SLOW)])
@pytest.mark.parametrize("op", FUZZED)
def test_forward(op, cases):
    fuzz(rows(op), lambda row: check_forward(op, row), cases)


def check_backward(op: str, row: dict) -> None:
    kinks = {} if op == NORM else {"away_from_kinks": True}
    case, generator = case_of(op, row, **kinks)
    grad = placed(draw(generator, case.run().shape, case.x.dtype), row["grad_place"])
    if op == NORM:
        check_norm(case.x, grad, case.options)
        return
    assume(distance_from_kinks(case) > 1e-5)
    with threads(row["threads"]):
        check_gradients(case, grad)


@pytest.mark.parametrize("cases", [CASES // 500, pytest.param(CASES // 10, marks=SLOW)])
@pytest.mark.parametrize("op", FUZZED)
def test_gradients(op, cases):
    gentle = {"c": few, "out": few, "size": st.tuples(small, small), "special": st.none(), "decades": st.just(0.0)}
    fuzz(rows(op, **gentle, grad_place=places_of_gradients), lambda row: check_backward(op, row), cases)


STATISTICS = st.fixed_dictionaries(
    {name: how for name, (how, _) in ARGUMENTS.items() if name in ("n", "c", "out", "k", "stride", "dtype", "bias")}
    | {
        "size": st.tuples(one_of(*range(1, 13), 70), one_of(*range(1, 13))),
        "padding": st.sampled_from(("same", 3, (3, 4), (7, 0, 3, 6))),
        "prologue": st.sampled_from(sorted(test_stats.PROLOGUES)),
        "layout": st.sampled_from(("nchw", "channels_last")),
        "seed": st.integers(0, 2**32 - 1),
    }
)


def check_statistics(op: str, row: dict) -> None:
    padding = row["padding"] if row["padding"] == "same" or max(row["k"]) <= 4 else "same"  # the kernel has to fit
    with nan_filled(), threads(1 + row["seed"] % 3):
        test_stats.check(op, *test_stats.make(op, **row | {"padding": padding}))


@pytest.mark.parametrize("cases", [CASES // 500, pytest.param(CASES, marks=SLOW)])
@pytest.mark.parametrize("op", test_stats.OPS)
def test_statistics(op, cases):
    fuzz(STATISTICS, lambda row: check_statistics(op, row), cases)


NO_TENSOR = one_of(
    *(0, -1, 2, 3, 2**31, 2**63, 2**70, 1.5, math.nan, math.inf, "x", "same", "relu", "cuda", "triton", b"relu", None),
    *((), (1,), (1, 2), [2, 1], (1, 2, 3), (1, 2, 3, 4), (1, "x"), (1.5, 2), (0, 1), (1, -1), (1, 2**31), {}),
    *(np.int64(2), np.ones(2), [torch.ones(2)]),
)
DTYPE = one_of(*DTYPES, torch.int32, torch.bool, torch.complex64, torch.float8_e5m2)
AXIS = st.integers(0, 3)
TENSOR = st.one_of(  # what is done to one
    st.tuples(st.just("to"), DTYPE),
    st.tuples(st.just("to"), st.just("meta")),
    st.tuples(st.just("drop"), AXIS),
    st.tuples(st.just("add"), AXIS),
    st.tuples(st.just("swap"), AXIS, AXIS),
    st.tuples(st.just("resize"), AXIS, one_of(0, 1, 2, 7, 8, 9, 13, 16)),
    st.tuples(st.just("nothing but"), NO_TENSOR),
)


def changed(tensor: torch.Tensor, how: str, *what) -> object:
    axis, other = (what[i] % max(1, tensor.dim()) if i < len(what) and isinstance(what[i], int) else 0 for i in (0, 1))
    if how == "to":
        return tensor.to(*what)
    if how == "drop":
        return tensor.select(axis, 0) if tensor.numel() and tensor.dim() else tensor
    if how == "add":
        return tensor.unsqueeze(axis)
    if how == "swap":
        return tensor.transpose(axis, other)
    if how == "resize" and tensor.dim():
        shape = list(tensor.shape)
        shape[axis] = what[1]
        return torch.randn(shape).to(tensor.dtype)
    return what[0] if how == "nothing but" else tensor


def check_mistakes(op: str, row: dict, form: str) -> None:
    case, _ = case_of(op, row)
    function = getattr(cnnfast.ops, op + form)
    names = list(inspect.signature(function).parameters)
    arguments = {**case.absent, **case.tensors, **case.options}
    if form:
        arguments = {"x": case.x, "packed": case.pack(), **case.packed_options}
    for which, tensor_change, value in row["mistakes"]:
        name = names[which % len(names)]
        if name in ("alpha", "beta", "k") and isinstance(value, (int, float)):
            value = str(value)  # any number is taken there, and with some the sums cancel
        old = arguments.get(name)
        arguments[name] = changed(old, *tensor_change) if isinstance(old, torch.Tensor) else value
    try:
        ours = function(**arguments)
    except (ValueError, TypeError) as error:
        said = str(error)
        assert "\n" not in said and any(re.search(rf"\b{name}\b", said) for name in names), said
        return
    except RuntimeError as error:  # what only the packing's header tells
        assert form and "packed" in str(error), error
        return
    if ours.is_meta:
        return
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor) and name != "packed"}
    known = inspect.signature(case.reference).parameters
    options = {name: value for name, value in (case.options | arguments).items() if name in known}
    tensors = {name: t for name, t in (case.tensors | tensors).items() if options.get(name, t) is not None}
    taken = type(case)(op, tensors, {name: value for name, value in options.items() if name not in tensors})
    taken.check(ours, packed=bool(form))


@pytest.mark.parametrize("cases", [CASES // 200, pytest.param(CASES // 5, marks=SLOW)])
@pytest.mark.parametrize(
    ("op", "form"), [(op, form) for op in FUZZED for form in ("", "_packed") if hasattr(cnnfast.ops, op + form)]
)
def test_mistakes(op, form, cases):
    mistake = st.tuples(st.integers(0, 19), TENSOR, NO_TENSOR)
    gentle = {"c": small, "out": small, "size": st.tuples(small, small), "special": st.none()}
    strategy = rows(op, **gentle, mistakes=st.lists(mistake, min_size=1, max_size=2))
    fuzz(strategy, lambda row: check_mistakes(op, row, form), cases)
