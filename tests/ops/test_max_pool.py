"""Pooling inside separable_conv2d_packed. Fails if a pooled row misses one of its convolved rows, in particular where a
thread's range begins or a tile of rows is handed on."""

import pytest
import torch
import torch.nn.functional as F
from numerics import fresh_generator

import cnnfast

SHAPES = [  # n, in, height, width, out, (kernel, stride, padding): some longer than one tile and one task
    (1, 16, 9, 9, 24, (3, 2, 1)),
    (2, 40, 31, 17, 50, (3, 2, 1)),
    (3, 5, 8, 8, 7, (2, 2, 0)),
    (1, 64, 20, 20, 33, (2, 3, 1)),
    (1, 7, 5, 5, 20, (3, 1, 1)),
    (5, 7, 30, 30, 20, (3, 4, 0)),
    (1, 1, 1, 1, 1, (3, 2, 1)),
    (1, 128, 97, 90, 40, (3, 2, 1)),
    (0, 8, 6, 6, 8, (3, 2, 1)),
]


def arguments(n, channels, height, width, out, dtype, memory_format):
    generator = fresh_generator()
    x = torch.randn(n, channels, height, width, generator=generator).to(dtype).contiguous(memory_format=memory_format)
    dw = torch.randn(channels, 1, 3, 3, generator=generator).to(dtype)
    pw = torch.randn(out, channels, 1, 1, generator=generator).to(dtype)
    packed = cnnfast.pack_separable_conv2d(dw, pw, None, torch.randn(out, generator=generator).to(dtype))
    return x, packed, dict(out_channels=out, kernel_size=3, padding=1, pre_activation="relu", activation="relu6")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pools_what_it_would_return(shape, dtype, memory_format):
    """The same bits as pooling afterwards: rounding to the dtype keeps the order of values."""
    *sizes, pool = shape
    x, packed, options = arguments(*sizes, dtype, memory_format)
    if x.numel() > 100:
        x[-1, -1, 2, 3] = torch.nan
    ours = cnnfast.separable_conv2d_packed(x, packed, **options, max_pool=pool)
    pooled = F.max_pool2d(cnnfast.separable_conv2d_packed(x, packed, **options), *pool)
    torch.testing.assert_close(ours, pooled, rtol=0, atol=0, equal_nan=True)
    assert ours.isnan().any() == (x.numel() > 100)
    if x.numel():
        assert ours.stride() == pooled.stride()


def test_independent_of_threads_and_neighbours():
    x, packed, options = arguments(3, 24, 33, 40, 24, torch.float32, torch.channels_last)
    whole = cnnfast.separable_conv2d_packed(x, packed, **options, max_pool=(3, 2, 1))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = cnnfast.separable_conv2d_packed(x[1:2], packed, **options, max_pool=(3, 2, 1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole[1:2], alone)


def test_compiles():
    x, packed, options = arguments(2, 8, 12, 12, 8, torch.float32, torch.channels_last)

    def call(x):
        return cnnfast.separable_conv2d_packed(x, packed, **options, max_pool=(3, 2, 1))

    torch.testing.assert_close(torch.compile(call, fullgraph=True, dynamic=True)(x), call(x))


@pytest.mark.parametrize(
    ("pool", "error", "says"),
    [
        (2, TypeError, "max_pool must be None or three ints"),
        ((2, 2), TypeError, "max_pool must be None or three ints"),
        ((2.0, 2, 0), TypeError, "max_pool must be None or three ints"),
        ((0, 2, 0), ValueError, "positive kernel and stride"),
        ((3, 2, 2), ValueError, "at most half the kernel"),
        ((9, 2, 1), ValueError, "must fit the padded result of 6 x 6"),
    ],
)
def test_bad_pool(pool, error, says):
    x, packed, options = arguments(1, 8, 6, 6, 8, torch.float32, torch.channels_last)
    with pytest.raises(error, match=says):
        cnnfast.separable_conv2d_packed(x, packed, **options, max_pool=pool)


def test_no_residual():
    x, packed, options = arguments(1, 8, 6, 6, 8, torch.float32, torch.channels_last)
    with pytest.raises(ValueError, match="max_pool can't be combined with a residual"):
        cnnfast.separable_conv2d_packed(x, packed, x, **options, max_pool=(3, 2, 1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_opcheck(memory_format):
    x, packed, _ = arguments(2, 8, 7, 6, 8, torch.float32, memory_format)
    overload = torch.ops.cnnfast.separable_conv2d_packed.default
    torch.library.opcheck(overload, (x, packed, None, 8, [3, 3], [1, 1], [1] * 4, [1, 1], False, 1, 0, 2, [3, 2, 1]))
