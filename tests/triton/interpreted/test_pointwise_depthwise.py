"""The Triton kernel of a pointwise convolution and the depthwise one after it, run by the interpreter on CPU tensors.

Fails if an element is wrong by the policy of numerics.py or unwritten (outputs and scratch are NaN-filled), or if the
sums that squeeze-excite starts from are not those of the result. test_faults shows that it would: it breaks a copy of
the kernel, a line at a time, and wants the same checks to fail.
"""

import pytest
import torch
from launchers import arguments, kernels_of, padded_by_nan, survivors
from numerics import assert_close_by_policy, float32_by, fresh_generator, nan_filled
from op_cases import all_pairs, identifier, make

pytestmark = pytest.mark.proof("interpreted", kernel="pointwise_depthwise_fwd_kernel")
FACTORS = {
    "dtype": (torch.float32, torch.float16, torch.float64),
    "layout": ("channels_last", "nchw"),
    "k": ((3, 3), (5, 5), (1, 2)),
    "stride": (1, 2, (3, 1)),
    "dilation": (1, (2, 1)),
    "padding": ("same", 0, (1, 0, 2, 3)),
    "activation": ("relu6", None, "silu", "sigmoid"),
    "c": (17, 3, 40),
    "out": (12, 5, 24),
    "multiplier": (1, 2),
    "bias": (True, False),
    "residual": (True, False),
    "size": ((9, 8), (7, 11)),
    "precision": ("tf32", "ieee"),
}
NAMES = ("dtype", "layout", "k", "stride", "activation", "multiplier", "precision")
FAST = all_pairs({name: FACTORS[name][:2] for name in NAMES})
ALL = all_pairs(FACTORS | {"c": (16, 1, 3, 24, 70), "out": (16, 1, 3, 70), "size": ((9, 11), (20, 5))})


def run(case, squeeze=False, module=None):
    """(y, sums over its pixels or None)"""
    x, dw_weight, dw_bias, pw_weight, pw_bias, residual, *options = arguments(case, "separable_conv2d")
    assert options.pop(3), "pointwise_first"
    launcher = (module or kernels_of("pointwise_depthwise")).pointwise_depthwise
    with nan_filled():
        y, partial = launcher(x, pw_weight, pw_bias, dw_weight, dw_bias, residual, *options, squeeze)
    return y, None if partial is None else partial.sum(1)


def check(case, squeeze=False, module=None):
    y, sums = run(case, squeeze, module)
    case.check(y)
    if squeeze:

        def reference(**kwargs):
            return case.reference(**kwargs).sum((2, 3))

        terms = y.shape[2] * y.shape[3] + case.terms
        assert_close_by_policy(sums, reference, terms=terms, **case.tensors, **case.options)


def drawn(generator, precision="ieee", **row):
    return make("separable_conv2d", generator, pointwise_first=True, **row)


@pytest.mark.parametrize("row", FAST, ids=identifier)
def test_pairs(row):
    with float32_by(row["precision"]):
        check(drawn(fresh_generator(), c=5, out=7, n=1, size=(5, 4), decades=3.0, **row))


@pytest.mark.slow
@pytest.mark.parametrize("row", ALL, ids=identifier)
def test_all_pairs(row):
    with float32_by(row["precision"]):
        check(drawn(fresh_generator(), decades=3.0, **row))


@pytest.mark.parametrize(("size", "most_tiles"), (((1, 1), 64), ((37, 5), 64), ((37, 5), 1)))
def test_squeeze(size, most_tiles, monkeypatch):
    """One tile, some, and more than who reads them takes."""
    monkeypatch.setattr("cnnfast.kernels.channels.MOST_TILES", most_tiles)
    check(drawn(fresh_generator(), c=3, out=5, size=size, activation="relu"), squeeze=True)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ("gelu", "tanh"))
def test_curved_activations(activation):
    check(drawn(fresh_generator(), c=3, out=5, activation=activation))


def test_batch_of_none():
    y, sums = run(drawn(fresh_generator(), n=0, out=5), squeeze=True)
    assert y.shape[:2] == sums.shape == (0, 5)


@pytest.mark.parametrize("layout", ("channels_last", pytest.param("nchw", marks=pytest.mark.slow)))
def test_special_values(layout):
    """Channels and pixels beyond the edge of a block get no part of them."""
    case = drawn(fresh_generator(), n=1, c=5, out=7, size=(9, 9), activation="relu6", layout=layout)
    for i, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        case.x[0, i, 4 * i, 4 * i] = value
    check(case)


def test_independent_of_the_batch():
    case = drawn(fresh_generator(), n=3, c=5, out=7, activation="silu")
    y, sums = run(case, squeeze=True)
    for name in ("x", "residual"):
        case.tensors[name] = case.tensors[name][1:2]
    alone, alone_sums = run(case, squeeze=True)
    assert torch.equal(alone, y[1:2]) and torch.equal(alone_sums, sums[1:2])


# (what breaks, the text to replace, its replacement); the first occurrence is taken.
FAULTS = {
    "the last channel of x left out": ("m_c = c + o_c < C  #", "m_c = c + o_c < C - 1  #"),
    "x beyond the last channel": ("m_x[:, None] & m_c[None, :], PRE", "m_x[:, None], PRE"),
    "x not activated": ("if ACTIVATION != 0:", "if False:"),
    "e's bias on padding": ("tl.where(m_x[:, None], activate(acc + b_bias, MID_ACTIVATION), 0.0)", "acc + b_bias"),
    "the filter's last row left out": ("any(i * step % stride == row", "any(i * step % stride == row and row == 0"),
    "a row of taps for another": ("(m * STRIDE_H + q) // DILATION_H * KW + j", "(KH - 1) * KW + j"),
    "taps of another channel": ("taps + i_tap * w_stride + o_e", "taps + i_tap * w_stride + o_e + 1"),
    "the column not padded": ("(left + j * DILATION_W >= 0) & ", ""),
    "the row not padded": ("& (top + i_h < H)", ""),
    "sums not moved on": ("accs = (zero,) + accs[: WINDOW - 1]", "accs = (zero,) * WINDOW"),
    "the last row not stored": ("(o_h + o < OH)", "(o_h + o < OH - 1)"),
    "a row of the next strip": ("for t in range(rows + WINDOW - 1)", "for t in range(rows + WINDOW - 2)"),
    "columns beyond the edge summed": ("tl.where(m_p[:, None], b_y, 0.0)", "b_y"),
    "the residual left out": ("if residual is not None:\n            b_y", "if residual is False:\n            b_y"),
    "another channel's mean": (
        "partial + i_tile.to(tl.int64) * K + o_k",
        "partial + i_tile.to(tl.int64) * K + o_k // 2",
    ),
    "a tile's sums for another's": ("tl.store(partial + i_tile.", "tl.store(partial + (i_tile * 0)."),
}


@pytest.mark.slow
def test_faults(tmp_path, monkeypatch):
    case = drawn(fresh_generator(1), n=2, c=3, out=2, size=(5, 3), stride=(2, 1), activation="sigmoid", multiplier=2)
    case = case.to(padded_by_nan)
    assert not survivors("pointwise_depthwise", FAULTS, lambda module: check(case, True, module), tmp_path, monkeypatch)
