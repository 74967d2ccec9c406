"""Pooling, local response normalisation and concatenation as steps of a sequence.

Fails if pooling isn't PyTorch's to the bit, or local response normalisation our layer's, a part of a concatenation lies
elsewhere than torch.cat has it or overwrites its neighbour, a value is written there that something else reads too, or
what is no such step is recorded.
"""

import pytest
import torch
import torch.nn.functional as F
from numerics import draw, fresh_generator
from torch import nn

from cnnfast import _C
from cnnfast import nn as blocks_of
from cnnfast.nn.recording import NotRecordable, Recorder, record
from cnnfast.nn.sequential import Chain

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FORMATS = [torch.contiguous_format, torch.channels_last]


def always(call):
    return True


def alone(function, x):
    """function(x) as a sequence of its own."""
    recorder = Recorder()
    function(recorder.values[0])
    return torch.ops.cnnfast.packed_sequence(x, recorder.packed, recorder.program())


def with_specials(x, generator):
    """NaN and Inf at some places, and an image of NaN only."""
    special = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=x.dtype)
    at = torch.randint(x[0].numel(), (3, 5), generator=generator)
    for value, places in zip(special, at, strict=True):
        x[0].view(-1)[places] = value
    x[-1] = torch.nan
    return x


# kernel, stride, padding, ceil_mode
POOLINGS = [
    (3, 1, 1, False),
    (3, 2, 0, False),
    (3, 2, 1, False),
    (3, 2, 0, True),
    (2, 2, 0, True),
    (2, None, 1, True),
    ((3, 2), (2, 1), (1, 0), True),
    ((1, 5), (3, 1), (0, 2), False),
    (6, 4, 3, True),
    (1, 1, 0, False),
]


@pytest.mark.usefixtures("nan_outputs")
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
def test_pooling_is_torchs(pooling, dtype, memory_format):
    *sizes, ceil_mode = pooling
    functions = [
        lambda x: F.max_pool2d(x, *sizes, ceil_mode=ceil_mode),
        lambda x: F.avg_pool2d(x, *sizes, ceil_mode=ceil_mode),
        lambda x: F.avg_pool2d(x, *sizes, ceil_mode=ceil_mode, count_include_pad=False),
    ]
    generator = fresh_generator()
    for shape in ((3, 37, 12, 9), (2, 16, 7, 7), (4, 1, 6, 13), (2, 70, 4, 5), (0, 5, 8, 8)):
        x = draw(generator, shape, dtype)
        x = (with_specials(x, generator) if x.numel() else x).contiguous(memory_format=memory_format)
        before = x.clone()
        for function in functions:
            expected = function(x)
            for threads in (1, 2):
                torch_threads = torch.get_num_threads()
                torch.set_num_threads(threads)
                try:
                    y = alone(function, x)
                finally:
                    torch.set_num_threads(torch_threads)
                torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
                assert x.numel() == 0 or y.is_contiguous(memory_format=memory_format)
        assert torch.equal(x.nan_to_num(7), before.nan_to_num(7))


@pytest.mark.usefixtures("nan_outputs")
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_local_response_normalisation_is_the_layers(dtype, memory_format):
    generator = fresh_generator()
    for shape in ((3, 37, 12, 9), (2, 16, 1, 1), (4, 1, 6, 13), (0, 5, 8, 8)):
        x = draw(generator, shape, dtype)
        x = (with_specials(x, generator) if x.numel() else x).contiguous(memory_format=memory_format)
        for layer in (blocks_of.LocalResponseNorm(5), blocks_of.LocalResponseNorm(4, 1.7e-3, 0.6, 2.25)):
            torch.testing.assert_close(alone(layer, x), layer(x), rtol=0, atol=0, equal_nan=True)


def conv(channels, out_channels, kernel_size, stride=1):
    padding = tuple(k // 2 for k in kernel_size) if isinstance(kernel_size, tuple) else kernel_size // 2
    return blocks_of.ConvBN(channels, out_channels, kernel_size, stride, padding)


def side_by_side(*branches):
    return lambda x: torch.cat([branch(x) for branch in branches], 1)


def networks(dtype):
    """Lists of calls: by name, what concatenations there are of."""

    def fused(*arguments):
        return conv(*arguments).eval().to(dtype).fused()

    pool, projected = nn.MaxPool2d(3, 1, 1), fused(33, 20, 1)
    first = fused(3, 33, 3)
    narrow = [fused(33, 7, 1), fused(33, 40, 3), fused(33, 33, 5), fused(33, 1, (1, 7)), lambda x: projected(pool(x))]
    halved = [fused(33, 19, 3, 2), fused(33, 16, 1, 2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1)]
    one, two = fused(33, 17, 1), fused(17, 33, 3)

    def read_again(x):
        y = one(x)
        return torch.cat([two(y), y, x], 1)

    inner = [fused(33, 7, 1), side_by_side(fused(33, 16, 1), fused(33, 5, 3)), pool]
    twice = fused(33, 9, 1)
    return {
        "convolutions and a pooling before one": [first, side_by_side(*narrow), fused(101, 8, 1)],
        "at stride 2, with pooling": [first, side_by_side(*halved), fused(101, 33, 1), fused(33, 8, 3)],
        "what others read too": [first, read_again, fused(83, 8, 1)],
        "a concatenation in one": [first, side_by_side(*inner), fused(61, 8, 1)],
        "the same twice": [first, lambda x: (lambda y: torch.cat([y, y], 1))(twice(x)), fused(18, 8, 1)],
        "at the end": [first, side_by_side(*narrow)],
        "at the start": [side_by_side(fused(3, 5, 1), fused(3, 18, 3), nn.MaxPool2d(3, 1, 1)), fused(26, 8, 1)],
    }


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_branches_are_where_they_belong(dtype, memory_format, threads):
    generator, torch_threads = fresh_generator(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            for name, calls in networks(dtype).items():
                joined = record(calls, always)
                if dtype is torch.float32 or _C.isa == "amx":  # elsewhere dense bfloat16 convolutions are ATen's
                    assert len(joined) == 1, name
                whole = Chain([("", call) for call in joined])
                for shape in ((3, 3, 13, 10), (1, 3, 35, 35), (2, 3, 1, 1), (0, 3, 9, 9)):
                    x = draw(generator, shape, dtype).contiguous(memory_format=memory_format)
                    # The images of a call with NaN are the memory of the next.
                    assert whole(torch.full_like(x, torch.nan)).isnan().all(), name
                    expected = x
                    for call in calls:
                        expected = call(expected)
                    y = whole(x)
                    assert torch.equal(y, expected) and not y.isnan().any(), (name, shape)
    finally:
        torch.set_num_threads(torch_threads)


def test_who_writes_where():
    """Values that one concatenation alone reads, of ops that can write there: its number, first channel, channels."""
    recorder = Recorder()
    x = recorder.values[0]
    a = recorder.add(5, [x, None], channels=7)
    b = recorder.add(1, [a], channels=7)  # depthwise_conv2d writes whole images only
    c = recorder.add(2, [a, None, None], channels=5)
    d = F.max_pool2d(c, 3)
    e = recorder.add(2, [d, None, None], channels=4)
    torch.cat([b, c, e], 1)
    assert recorder._places() == {5: [6, 12, 16]}
    torch.cat([e, recorder.add(2, [x, None, None], channels=3)], dim=1)
    assert recorder._places() == {7: [8, 4, 7]}
    torch.cat([F.max_pool2d(x, 3), recorder.add(2, [x, None, None], channels=3)], 1)  # nothing tells x's channels
    assert recorder._places() == {7: [8, 4, 7]}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.max_pool2d(x, 3, dilation=2),
        lambda x: F.max_pool2d(x, 3, return_indices=True),
        lambda x: F.max_pool2d(x, (3,)),
        lambda x: F.avg_pool2d(x, 3, divisor_override=2),
        lambda x: F.adaptive_avg_pool2d(x, 2),
        lambda x: torch.cat([x, x]),
        lambda x: torch.cat([x, torch.zeros(1, 3, 9, 9)], 1),
        lambda x: torch.cat([x, x], 1, out=torch.empty(0)),
        lambda x: x.shape,
        lambda x: x.local_response_norm(5, 1e-4, 0.75, 1.0, "triton"),
    ],
)
def test_is_not_recorded(function):
    with pytest.raises((NotRecordable, TypeError)):
        function(Recorder().values[0])


def test_pooling_alone_stays_what_it_is():
    """Nothing is gained, and it may be of a network that isn't on a CPU."""
    calls = [nn.MaxPool2d(3), nn.AvgPool2d(3)]
    assert record(calls, always) == calls


def test_errors_are_those_of_the_single_call():
    with torch.no_grad():
        calls = [conv(3, 5, 1).eval().fused(), nn.MaxPool2d(5), nn.AvgPool2d(2)]
        (whole,) = record(calls, always)
        with pytest.raises(RuntimeError, match="Output size is too small"):
            whole(torch.zeros(1, 3, 4, 4))
        (odd,) = record([calls[0], side_by_side(nn.MaxPool2d(3), nn.MaxPool2d(2))], always)
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            odd(torch.zeros(1, 3, 9, 9))
