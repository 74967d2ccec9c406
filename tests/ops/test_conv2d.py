"""What is conv2d's alone, beside the tests that run over every op: whose kernel it is, windows at the ends of memory.

Fails if a result that is ATen's isn't bit for bit, if what oneDNN computes wrongly is left to it, or if a window reads
a neighbour's pixels (copies are longer than what is wanted).
"""

import ctypes
import itertools
import mmap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import LAYOUTS, draw, fresh_generator, nan_filled
from op_cases import make
from ops.test_equality import check_both_forms
from ops.test_gradients import check_gradients, make_away_from_kinks
from torch import nn

import cnnfast
from cnnfast.nn.fusion import fuse_conv2d
from cnnfast.nn.layers import Conv2dSame
from cnnfast.ops import _registration

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def run_packed(x, weight, bias, **options):
    packed = cnnfast.pack_conv2d(weight, bias)
    return cnnfast.conv2d_packed(x, packed, out_channels=weight.shape[0], kernel_size=weight.shape[2:], **options)


@pytest.mark.parametrize("residual", (True, False))
@pytest.mark.parametrize("activation", (None, "relu", "relu6"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float_results_are_atens(layout, activation, residual):
    """Whose convolution it is, and that a residual and a clamp after it round once each, as PyTorch's do."""
    case = make("conv2d", fresh_generator(), c=24, padding=1, activation=activation, residual=residual, layout=layout)
    x = case.x.to(memory_format=torch.channels_last)
    assert torch.equal(case.run(), case.reference(**{**case.tensors, "x": x}, **case.options))


# Whole kPairDepths of channels: in bfloat16 a packing holds pairs, and where the CPU multiplies these the product reads
# windows of bfloat16. Lines shorter than a tile of 16 rows, of one, of several that don't fill them.
PAIRED = [
    {"c": 32, "size": (5, 7), "k": (3, 3), "padding": 1},
    {"c": 64, "size": (9, 17), "k": (3, 3), "padding": "same", "stride": 2, "residual": True},
    {"c": 32, "size": (6, 33), "k": (1, 7), "padding": (0, 3), "activation": "silu"},
    {"c": 96, "size": (12, 16), "k": (7, 1), "padding": (3, 0), "out": 17, "residual": True},
    {"c": 32, "size": (13, 5), "k": (7, 1), "padding": (3, 0), "n": 2},  # lines that follow on each other
    {"c": 64, "size": (8, 31), "k": (3, 2), "padding": (0, 1, 2, 0), "dilation": (2, 3), "n": 3},
    {"c": 32, "size": (19, 50), "k": (5, 5), "padding": 0, "stride": (2, 1), "out": 48},
    {"c": 64, "size": (1, 1), "k": (3, 3), "padding": 1, "out": 5},
    {"c": 160, "size": (4, 3), "k": (1, 1), "padding": 0, "out": 33, "activation": "relu"},
    # Rows of a window that end within a tile: what lies after them is multiplied by zeros.
    {"c": 3, "size": (20, 23), "k": (7, 7), "padding": 3, "stride": 2, "out": 64, "activation": "relu"},
    {"c": 3, "size": (15, 15), "k": (3, 3), "padding": "same", "stride": 2, "n": 3, "activation": "silu"},
    {"c": 48, "size": (9, 20), "k": (5, 5), "padding": 2, "out": 64, "residual": True},
    {"c": 80, "size": (6, 7), "k": (3, 3), "padding": 0, "n": 2},  # x itself isn't read beyond its end
    {"c": 17, "size": (1, 1), "k": (1, 1), "padding": 0, "n": 1},
    {"c": 48, "size": (9, 20), "k": (3, 3), "padding": (1, 2), "dilation": (1, 2), "out": 33},  # floats anew
    {"c": 16, "size": (9, 20), "k": (3, 2), "padding": (1, 2), "dilation": (1, 2), "out": 33},  # and with whole pairs
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("changes", PAIRED, ids=str)
def test_pairs_of_channels(changes, layout):
    check_both_forms(make("conv2d", fresh_generator(), dtype=torch.bfloat16, layout=layout, **changes))


def test_packings_of_bfloat16():
    """Pairs, the taps of a window's row filled up to whole tiles of AMX; one of floats, of before, still fits."""
    for channels, width in ((32, 96), (64, 192), (33, 128), (16, 64), (3, 32)):
        weight = torch.randn(16, channels, 3, 3)
        packed, floats = (cnnfast.pack_conv2d(w, None) for w in (weight.bfloat16(), weight.bfloat16().float()))
        assert cnnfast.pack_conv2d(weight.bfloat16().to("meta"), None).shape == packed.shape  # the fake's
        assert packed.numel() == 64 + 2 * 16 * 4 + 3 * width * 16 * 2  # header, bias and scale, three rows
        assert floats.numel() == 64 + 16 * 4 + weight.numel() * 4
        x = torch.randn(1, channels, 5, 5).bfloat16()
        options = dict(out_channels=16, kernel_size=3, padding=1)
        y, expected = (cnnfast.conv2d_packed(x, p, **options) for p in (packed, floats))
        torch.testing.assert_close(y, expected, rtol=2**-7, atol=1e-2)


def kernels_of(case):
    with torch.profiler.profile() as profile:
        case.run()
    return {event.name for event in profile.events() if "convolution" in event.name}


# Forward passes that PyTorch 2.13's oneDNN gets wrong on CPUs with AVX-512 or AMX: garbage, or a crash.
WRONG = [
    {"size": (53, 3), "k": (5, 2), "stride": (1, 3), "padding": (2, 0), "c": 13, "out": 15, "n": 2},
    {"size": (17, 9), "k": (7, 7), "stride": (1, 3), "padding": (2, 0), "c": 1, "out": 48, "n": 3, "dilation": (2, 1)},
    {"size": (15, 1), "k": (7, 5), "stride": (1, 3), "padding": (5, 3), "c": 1, "out": 3, "n": 3},
    {"size": (13, 4), "k": (1, 7), "stride": (1, 5), "padding": (0, 3), "c": 1, "out": 8, "dilation": (2, 1)},
]
WRONG_IN_BFLOAT16 = [
    {"size": (15, 17), "k": (1, 7), "stride": (2, 1), "padding": (0, 9), "c": 64, "out": 17, "dilation": (1, 2)},
    {"size": (1, 11), "k": (7, 2), "stride": (2, 1), "padding": (9, 1), "c": 16, "out": 17, "dilation": (2, 1)},
    {"size": (67, 7), "k": (1, 3), "stride": (3, 1), "padding": (0, 0), "c": 32, "out": 48, "n": 1},
]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("row", WRONG + WRONG_IN_BFLOAT16, ids=str)
def test_what_onednn_gets_wrong_is_not_left_to_it(row, dtype):
    with nan_filled():
        case = make("conv2d", fresh_generator(), **row, dtype=dtype, decades=3)
        check_both_forms(case)
        ours = row in WRONG or dtype is torch.bfloat16
        assert kernels_of(case) == set() if ours else "aten::convolution" in kernels_of(case)
        check_gradients(make_away_from_kinks("conv2d", fresh_generator(), **row, dtype=dtype))


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("size", list(itertools.product((1, 5), (1, 4))), ids=str)
def test_strides_where_dimensions_are_one(size, memory_format):
    """As the fake promises, of the output and of x's gradient: ATen's own differ."""
    for n, c, out, k in itertools.product((1, 2), (1, 3), (1, 4), (1, 3)):
        x = torch.randn(n, c, *size).to(memory_format=memory_format)
        weight, options = torch.randn(out, c, k, k), ([1, 1], [k // 2] * 4, [1, 1], 0)
        y = torch.ops.cnnfast.conv2d(x, weight, None, None, *options)
        gradient, *_ = torch.ops.cnnfast.conv2d_backward(y, x, weight, None, None, *options, 1)
        assert y.stride() == _registration.empty_image(x, y.shape).stride(), (n, c, out, k)
        assert gradient.stride() == _registration.empty_image(x, x.shape).stride(), (n, c, out, k)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_special_values_stay_in_their_windows(wrong):
    """Copies are longer than windows: what lies beside them must not get in."""
    case = make("conv2d", fresh_generator(), c=3, size=(15, 15), stride=2, activation="relu6", residual=False)
    case.x[0, 1, 7, 7] = wrong
    doubles = case.to(torch.Tensor.double)
    expected = doubles.reference(**doubles.tensors, **doubles.options)
    torch.testing.assert_close(case.run_packed().double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_end_of_memory():
    """The last window is copied without reading past x: x ends where a page does, and the next one can't be read."""
    n, c, height, width = 1, 3, 8, 8
    size, page = n * c * height * width * 4, mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert libc.mprotect(start + page, page, 0) == 0
    array = np.frombuffer(memory, np.float32, size // 4, offset=page - size)
    array[:] = np.random.default_rng().standard_normal(size // 4)
    x = torch.from_numpy(array).reshape(n, height, width, c).permute(0, 3, 1, 2)
    weight, bias = draw(fresh_generator(), (8, c, 3, 3)), draw(fresh_generator(), (8,))
    assert torch.equal(run_packed(x, weight, bias), run_packed(x.clone(), weight, bias))


def test_empty_weights():
    with pytest.raises(ValueError, match="none of them 0"):
        cnnfast.pack_conv2d(torch.zeros(0, 3, 3, 3))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_a_network(dtype, memory_format):
    """A stem with TensorFlow's padding is one call; others are ATen's."""
    conv, bn = Conv2dSame(3, 16, 3, 2, bias=False, dtype=dtype), nn.BatchNorm2d(16, dtype=dtype).eval()
    nn.init.normal_(bn.running_mean), nn.init.uniform_(bn.running_var, 0.5, 2)
    x = torch.randn(2, 3, 21, 30, dtype=dtype).contiguous(memory_format=memory_format)
    with torch.no_grad():
        call = fuse_conv2d(conv, bn, activation="relu6", channels_last=True)
        with torch.profiler.profile() as profile:
            ours = call(x)
        expected = F.relu6(bn.double()(conv.double()(x.double())))
    assert {"cnnfast::conv2d_packed"} == {e.name for e in profile.events() if "conv" in e.name}
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=2e-2)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])  # gelu has no form in place
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_in_a_network(dtype, activation, groups):
    """As a residual block ends: added before the activation, in the packed form and beside ATen's, left as it was."""
    conv, bn = nn.Conv2d(8, 12, 3, padding=1, groups=groups, bias=False, dtype=dtype), nn.BatchNorm2d(12, dtype=dtype)
    nn.init.normal_(bn.running_mean), nn.init.uniform_(bn.running_var, 0.5, 2), bn.eval()
    formats = torch.contiguous_format, torch.channels_last
    with torch.no_grad():
        call = fuse_conv2d(conv, bn, activation=activation)
        first = fuse_conv2d(conv, bn, activation=activation, channels_last=True)
        x, residual = torch.randn(2, 8, 9, 7, dtype=dtype), torch.randn(2, 12, 9, 7, dtype=dtype)
        exact = bn.double()(conv.double()(x.double())) + residual.double()
        expected = exact if activation is None else getattr(F, activation)(exact)
        for of_x, of_residual in itertools.product(formats, formats):
            given = residual.clone(memory_format=of_residual)
            for function in (call, first):
                y = function(x.contiguous(memory_format=of_x), residual=given)
                tolerance = 5e-2 if dtype.itemsize == 2 else 1e-5
                torch.testing.assert_close(y.double(), expected, rtol=tolerance / 2, atol=tolerance)
            assert torch.equal(given, residual)
