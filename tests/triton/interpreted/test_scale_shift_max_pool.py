"""The Triton kernels of scale_shift_max_pool, run by the interpreter on CPU tensors through their launchers.

Fails if an element is wrong by the policy of numerics.py or unwritten (outputs and scratch are NaN-filled), a gradient
goes to another pixel of a window than PyTorch's, bits depend on the run or an image's result on its neighbours, or a
memory format or dtype is not what the fakes promise. The test of faults shows that they would: it breaks copies of the
kernels, a line at a time, and wants the same checks to fail.
"""

import importlib
import math

import launchers
import pytest
import torch
import torch.nn.functional as F
from launchers import padded_by_nan, survivors
from numerics import LAYOUTS, draw, fresh_generator
from op_cases import NONCONTIGUOUS, Case, all_pairs, identifier
from scale_shift_max_pool_cases import GEOMETRIES, LARGE, check_gradients, check_output, make

from cnnfast.ops import activations
from cnnfast.ops._registration import empty_image

KERNELS = ("scale_shift_max_pool_fwd", "scale_shift_bwd", "add_up")
pytestmark = [pytest.mark.proof("interpreted", kernel=f"{name}_kernel") for name in KERNELS]
FACTORS = {
    "dtype": (torch.float32, torch.float16, torch.float64),
    "layout": ("channels_last", "nchw"),
    "activation": ("silu", None, "relu6"),
    "geometry": GEOMETRIES,
}
FAST = all_pairs({name: values[:2] for name, values in FACTORS.items()})
ALL = all_pairs(FACTORS | {"activation": tuple(activations.CODES)})


def case_of(geometry=GEOMETRIES[0], **row):
    return make(*geometry, **row)


def forward(case, module=None):
    """(y, taps)"""
    return launchers.run(case, module)


def backward(case, grad, taps, output_mask=-1, module=None):
    return launchers.gradients(case, grad, output_mask, module, taps=taps)


def check(case, module=None, seed=None):
    """Forward and gradients."""
    y, taps = forward(case, module)
    check_output(case, y)
    assert taps.dtype is torch.uint8 and taps.stride() == y.stride()
    grad = draw(fresh_generator(seed), y.shape, y.dtype)
    ours = backward(case, grad, taps, module=module)
    check_gradients(case, grad, ours)
    assert ours["x"].stride() == empty_image(case.x, case.x.shape).stride()


@pytest.mark.parametrize("row", FAST, ids=identifier)
def test_pairs(row):
    check(case_of(**row))


@pytest.mark.slow
@pytest.mark.parametrize("row", ALL, ids=identifier)
def test_all_pairs(row):
    check(case_of(**row))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_image(layout):
    check(case_of(LARGE, layout=layout, activation="relu6"))


@pytest.mark.parametrize("geometry", GEOMETRIES[2:], ids=str)
def test_geometries(geometry):
    check(case_of(geometry))


def test_ties_and_special_values():
    """As F.max_pool2d's: the first of equal values, a NaN before all, windows of nothing but -Inf."""
    generator = fresh_generator()
    x = torch.randint(-2, 3, (2, 5, 9, 9), generator=generator).float()
    x[0, :, 2, 3] = math.nan
    x[1, :, :4, :4] = -math.inf
    x[1, :, 6, 6] = math.inf
    tensors = {"x": LAYOUTS["channels_last"](x), "scale": torch.ones(5), "shift": torch.zeros(5)}
    for pool in ((3, 2, 1), (2, 2, 0), (3, 1, 0)):
        case = Case("scale_shift_max_pool", tensors, {"max_pool": pool, "activation": None})
        plain = x.clone().requires_grad_()
        exact, (y, taps) = F.max_pool2d(plain, *pool), forward(case)
        torch.testing.assert_close(y, exact, rtol=0, atol=0, equal_nan=True)
        grad = draw(generator, y.shape)
        exact.backward(grad)
        torch.testing.assert_close(backward(case, grad, taps)["x"], plain.grad)


@pytest.mark.parametrize("change", NONCONTIGUOUS)
def test_inputs_that_are_not_dense(change):
    """The same bits, whatever the strides of images, vectors and the gradient that comes in."""
    dense = case_of(((2, 4, 5, 4), (3, 2, 1)), activation="silu")
    strided = Case(dense.op, dense.tensors | {"x": NONCONTIGUOUS[change](dense.x)}, dense.options)
    dense.tensors["x"] = LAYOUTS["channels_last"](strided.x) if not strided.x.is_contiguous() else strided.x.clone()
    for name in ("scale", "shift"):
        strided.tensors[name] = strided.tensors[name].repeat_interleave(2)[::2]
    (y, taps), (expected, _) = forward(strided), forward(dense)
    assert torch.equal(y, expected)
    other = LAYOUTS["nchw" if dense.x.stride(1) == 1 else "channels_last"]
    grad = draw(fresh_generator(), y.shape)
    ours, wanted = backward(strided, other(grad), other(taps)), backward(dense, grad, taps)
    for name, gradient in ours.items():
        assert torch.equal(gradient, wanted[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeatable_and_independent_of_the_batch(layout):
    case = case_of(((6, 5, 7, 5), (3, 2, 1)), layout=layout, activation="silu")
    y, taps = forward(case)
    grad = LAYOUTS[layout](draw(fresh_generator(), y.shape))
    first, second = backward(case, grad, taps), backward(case, grad, taps)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    case.tensors["x"] = case.x[5:]
    assert torch.equal(forward(case)[0], y[5:])
    assert torch.equal(backward(case, grad[5:], taps[5:])["x"], first["x"][5:])


def test_output_mask():
    case = case_of()
    y, taps = forward(case)
    grad = draw(fresh_generator(), y.shape)
    every = backward(case, grad, taps)
    for i, name in enumerate(case.tensors):
        some = backward(case, grad, taps, 1 << i)
        assert torch.equal(some.pop(name), every[name]), name
        assert not any(gradient.numel() for gradient in some.values()), name


# (what breaks, the text to replace, its replacement); the first occurrence is taken.
FORWARD_FAULTS = {
    "shift left out": ("b_scale, b_shift), ACTIVATION", "b_scale, None), ACTIVATION"),
    "not activated": ("b_scale, b_shift), ACTIVATION)", "b_scale, b_shift), 0)"),
    "padding is a value": ("larger = m_x &", "larger = m_y &"),
    "the last of equal values": ("(b_v > b_y)", "(b_v >= b_y)"),
    "a NaN is passed over": ("| (b_v != b_v)", ""),
    "rows and columns exchanged": ("r * KERNEL + s, b_tap", "s * KERNEL + r, b_tap"),
    "the window's last row left out": ("for r in range(KERNEL)", "for r in range(KERNEL - 1)"),
    "no first pixel": ("(tl.maximum(-top, 0) * KERNEL", "(0 * KERNEL"),
}
BACKWARD_FAULTS = {
    "one window a row": ("for i in range(REACH)", "for i in range(1)"),
    "every pixel is the largest": ("largest = m_g & (", "largest = m_g | ("),
    "windows of the row before": ("o_h = row // STRIDE - i", "o_h = row // STRIDE - i - 1"),
    "no padding": ("row, column = o_p // width + PADDING", "row, column = o_p // width"),
    "windows beyond the image": ("(o_w < out_width) & (s < KERNEL)", "(s < KERNEL)"),
    "the first tile's windows": ("m_x, i_n, first + o_p", "m_x, i_n, o_p"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stem", "faults"), [("scale_shift_max_pool", FORWARD_FAULTS), ("scale_shift", BACKWARD_FAULTS)]
)
def test_faults(stem, faults, tmp_path, monkeypatch):
    cases = [
        case_of(((2, 3, 19, 16), (3, 2, padding)), activation="silu", seed=1).to(padded_by_nan) for padding in (0, 1)
    ]
    ties = case_of(((2, 3, 5, 5), (3, 2, 1)), activation=None)
    ties.x[:, :, 1:4], ties.tensors["scale"] = 1.0, ties.tensors["scale"].abs()
    ties.x[0, 0, 2, 2], ties.x[1, 1, :3, :3] = math.nan, -math.inf

    def check_module(module):
        module = importlib.import_module(f"{module.__package__}.scale_shift_max_pool")
        for case in cases:
            check(case, module, seed=2)
        for ours, wanted in zip(forward(ties, module), forward(ties), strict=True):
            assert torch.equal(ours.nan_to_num(), wanted.nan_to_num())

    assert not survivors(stem, faults, check_module, tmp_path, monkeypatch)
