"""conv2d_packed against torch's convolution in float64.

Fails if a window misses a pixel, reads a neighbour's (copies are longer than what is wanted), or a border isn't zeros.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import LAYOUTS, assert_close_by_policy, channel_scales, draw, fresh_generator

import cnnfast
from cnnfast.nn.fusion import fuse_conv2d
from cnnfast.nn.layers import Conv2dSame
from cnnfast.reference.common import activate, pad

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CASES = [  # n, c, height, width, out, kernel, stride, padding, dilation
    (1, 3, 224, 224, 32, (3, 3), (2, 2), "same", (1, 1)),
    (2, 3, 61, 47, 33, (3, 3), (2, 2), "same", (1, 1)),
    (3, 3, 17, 19, 64, (7, 7), (2, 2), 3, (1, 1)),
    (2, 4, 11, 5, 7, (3, 5), (1, 2), (1, 2, 0, 3), (2, 1)),
    (1, 1, 9, 9, 16, (5, 5), (3, 3), (2, 1), (1, 2)),
    (2, 37, 12, 10, 20, (3, 3), (1, 1), 1, (1, 1)),
    (1, 3, 1, 1, 5, (3, 3), (2, 2), "same", (1, 1)),
    (1, 3, 2, 3, 8, (3, 3), (1, 1), (4, 0, 0, 5), (1, 1)),  # windows that see padding only
    (2, 2, 5, 1, 3, (1, 1), (1, 1), 0, (1, 1)),
    (0, 3, 8, 8, 8, (3, 3), (2, 2), "same", (1, 1)),
]


def reference(x, weight, bias, stride, padding, dilation, activation):
    x = pad(x, padding, weight.shape[2:], stride, dilation)
    return activate(F.conv2d(x, weight, bias, stride, 0, dilation), activation)


def drawn(case, dtype, layout, with_bias=True, decades=0.0):
    n, c, height, width, out, kernel, stride, padding, dilation = case
    generator = fresh_generator()
    x = LAYOUTS[layout](draw(generator, (n, c, height, width), dtype))
    scale = channel_scales(generator, out, decades)
    fan_in = c * kernel[0] * kernel[1]
    weight = draw(generator, (out, c, *kernel), dtype, scale=2 / fan_in**0.5 * scale.reshape(-1, 1, 1, 1))
    bias = draw(generator, (out,), dtype, scale=scale / 8) if with_bias else None
    return x, weight, bias, dict(stride=stride, padding=padding, dilation=dilation)


def run(x, weight, bias, options, activation=None):
    packed = cnnfast.pack_conv2d(weight, bias)
    return cnnfast.conv2d_packed(
        x, packed, out_channels=weight.shape[0], kernel_size=weight.shape[2:], activation=activation, **options
    )


@pytest.mark.usefixtures("nan_outputs")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal(case, dtype, layout):
    activation = (None, "relu", "relu6")[CASES.index(case) % 3]
    x, weight, bias, options = drawn(case, dtype, layout, with_bias=CASES.index(case) % 4 != 1, decades=3.0)
    ours = run(x, weight, bias, options, activation)
    if x.numel() == 0:
        assert ours.shape == (0, 8, 4, 4)
        return
    terms = weight[0].numel()
    assert_close_by_policy(ours, reference, x, weight, bias, terms=terms, **options, activation=activation)
    like = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="meta")
    meta = run(like, weight.to("meta"), None if bias is None else bias.to("meta"), options, activation)
    assert ours.stride() == meta.stride() and ours.shape == meta.shape


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_special_values_stay_in_their_windows(wrong):
    """Copies are longer than windows: what lies beside them must not get in."""
    x, weight, bias, options = drawn((2, 3, 15, 15, 8, (3, 3), (2, 2), "same", (1, 1)), torch.float32, "channels_last")
    x[0, 1, 7, 7] = wrong
    expected = reference(x.double(), weight.double(), bias.double(), **options, activation="relu6")
    ours = run(x, weight, bias, options, "relu6").double()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_independent_of_threads_and_neighbours():
    x, weight, bias, options = drawn((3, 3, 33, 41, 24, (3, 3), (2, 2), "same", (1, 1)), torch.float32, "channels_last")
    whole = run(x, weight, bias, options)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(run(x[1:2], weight, bias, options), whole[1:2])
    finally:
        torch.set_num_threads(threads)


def test_end_of_memory():
    """The last window is copied without reading past x: x ends where a page does, and the next one can't be read."""
    import ctypes
    import mmap

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
    _, weight, bias, options = drawn(
        (n, c, height, width, 8, (3, 3), (1, 1), 0, (1, 1)), torch.float32, "channels_last"
    )
    assert torch.equal(run(x, weight, bias, options), run(x.clone(), weight, bias, options))


def test_foreign_packings():
    x, weight, bias, options = drawn(CASES[1], torch.float32, "channels_last")
    packed = cnnfast.pack_conv2d(weight, bias)
    call = dict(out_channels=33, kernel_size=3, **options)
    noise = torch.randint(0, 256, packed.shape, dtype=torch.uint8)
    for wrong in (packed[:-1], torch.zeros_like(packed), noise, cnnfast.pack_conv2d(weight.double(), bias.double())):
        with pytest.raises(RuntimeError, match="pack"):
            cnnfast.conv2d_packed(x, wrong, **call)
    for changes in (dict(out_channels=32), dict(kernel_size=5)):
        with pytest.raises(RuntimeError, match="packed has"):
            cnnfast.conv2d_packed(x, packed, **{**call, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"x": torch.zeros(3, 8, 8)}, ValueError, "x must have 4 dimensions"),
        ({"x": torch.zeros(1, 3, 8, 8, dtype=torch.int64)}, TypeError, "x must be float32"),
        ({"packed": torch.zeros(100)}, ValueError, "packed must be the contiguous uint8 tensor that pack_conv2d"),
        ({"stride": -1}, ValueError, "stride must be a positive int"),
        ({"padding": "valid"}, ValueError, "padding must be 'same' or ints"),
        ({"activation": "swish"}, ValueError, "activation must be"),
        ({"out_channels": 0}, ValueError, "out_channels must be at least 1"),
        ({"backend": "triton"}, ValueError, "triton takes tensors on cuda"),
        ({"backend": "reference"}, ValueError, "reference takes plain weights"),
        ({"x": torch.zeros(1, 3, 8, 8, requires_grad=True)}, ValueError, "x requires grad"),
    ],
    ids=str,
)
def test_bad_arguments(changes, error, says):
    packed = cnnfast.pack_conv2d(torch.zeros(4, 3, 3, 3))
    arguments = dict(x=torch.zeros(1, 3, 8, 8), packed=packed, out_channels=4, kernel_size=3)
    with pytest.raises(error, match=says):
        cnnfast.conv2d_packed(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("weight", "bias", "error", "says"),
    [
        (torch.zeros(4, 3, 3), None, ValueError, "weight must have 4 dimensions"),
        (torch.zeros(0, 3, 3, 3), None, ValueError, "none of them 0"),
        (torch.zeros(4, 3, 3, 3), torch.zeros(3), ValueError, r"bias must have shape \(4,\)"),
        (torch.zeros(4, 3, 3, 3, requires_grad=True), None, ValueError, "weight requires grad"),
    ],
    ids=str,
)
def test_bad_weights(weight, bias, error, says):
    with pytest.raises(error, match=says):
        cnnfast.pack_conv2d(weight, bias)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_and_compile(layout):
    x, weight, bias, options = drawn(CASES[1], torch.float32, layout)
    packed = cnnfast.pack_conv2d(weight, bias)
    torch.library.opcheck(torch.ops.cnnfast.pack_conv2d.default, (weight, bias))
    overload = torch.ops.cnnfast.conv2d_packed.default
    torch.library.opcheck(overload, (x, packed, 33, [3, 3], [2, 2], [-1], [1, 1], 2))

    def call(x):
        return cnnfast.conv2d_packed(x, packed, out_channels=33, kernel_size=3, **options)

    torch.testing.assert_close(torch.compile(call, fullgraph=True, dynamic=True)(x), call(x))


def test_autocast():
    x, weight, bias, options = drawn(CASES[1], torch.float32, "channels_last")
    with torch.autocast("cpu", torch.bfloat16):
        assert run(x, weight, bias, options).dtype is torch.bfloat16
    assert cnnfast.can_run("conv2d_packed") == [] and "packed form only" in cnnfast.can_run("conv2d")[0]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_a_network(dtype, memory_format):
    """A stem with TensorFlow's padding is one call; others are ATen's."""
    conv, bn = Conv2dSame(3, 16, 3, 2, bias=False, dtype=dtype), torch.nn.BatchNorm2d(16, dtype=dtype).eval()
    torch.nn.init.normal_(bn.running_mean), torch.nn.init.uniform_(bn.running_var, 0.5, 2)
    x = torch.randn(2, 3, 21, 30, dtype=dtype).contiguous(memory_format=memory_format)
    with torch.no_grad():
        call = fuse_conv2d(conv, bn, activation="relu6", channels_last=True)
        with torch.profiler.profile() as profile:
            ours = call(x)
        expected = F.relu6(bn.double()(conv.double()(x.double())))
    assert {"cnnfast::conv2d_packed"} == {e.name for e in profile.events() if "conv" in e.name}
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=2e-2)
