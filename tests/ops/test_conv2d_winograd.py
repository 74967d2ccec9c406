"""conv2d_packed by Winograd's F(2x2, 3x3).

Fails if an element is further from the float64 reference than the policy allows for what the algorithm adds up, or an
image's root mean square error is more than one and a half times PyTorch's; if tiles at an edge are wrong, if a result
depends on the batch or the threads, or if weights or geometry that it can't compute are taken.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from numerics import (
    LAYOUTS,
    activations_as_bounds,
    assert_within,
    channel_scales,
    draw,
    fresh_generator,
    nan_filled,
    threads,
)
from op_cases import make
from ops import fuzzing
from torch import nn

import cnnfast
from cnnfast import reference
from cnnfast.nn.fusion import fuse_conv2d
from cnnfast.ops import arguments
from cnnfast.ops._registration import empty_image
from cnnfast.reference.common import ACTIVATIONS

TO_TILE = torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], dtype=torch.float64)
OF_WEIGHT = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
FROM_TILE = torch.tensor([[1, 1, 1, 0], [0, 1, -1, -1]], dtype=torch.float64)


def run(x, weight, bias=None, residual=None, **options):
    packed = cnnfast.pack_conv2d(weight, bias, winograd=True)
    return cnnfast.conv2d_packed(x, packed, residual, out_channels=weight.shape[0], kernel_size=3, **options)


def winograd(x, weight, padding, transforms=(TO_TILE, OF_WEIGHT, FROM_TILE)):
    """The algorithm in float64, as its paper has it; with absolute values of everything, what its sums add up."""
    to_tile, of_weight, from_tile = transforms
    top, bottom, left, right = arguments.edges(padding) if padding != "same" else (1, 1, 1, 1)
    height, width = x.shape[2] + top + bottom - 2, x.shape[3] + left + right - 2
    padded = F.pad(x.double(), (left, right + width % 2, top, bottom + height % 2))
    v = to_tile @ padded.unfold(2, 4, 2).unfold(3, 4, 2) @ to_tile.T  # (N, C, tiles, tiles, 4, 4)
    m = torch.einsum("nchwij,kcij->nkhwij", v, of_weight @ weight.double() @ of_weight.T)
    y = from_tile @ m @ from_tile.T
    return y.permute(0, 1, 2, 4, 3, 5).flatten(4).flatten(2, 3)[:, :, :height, :width]


ABSOLUTE = tuple(t.abs() for t in (TO_TILE, OF_WEIGHT, FROM_TILE))
CASES = [
    {"c": 16, "out": 16, "size": (8, 8), "n": 1},
    {"c": 33, "out": 47, "size": (7, 9), "activation": "relu", "residual": True},
    {"c": 64, "out": 64, "size": (14, 14), "activation": "relu6", "n": 3},
    {"c": 3, "out": 130, "size": (5, 31), "activation": "silu", "residual": True},
    {"c": 200, "out": 17, "size": (1, 1), "activation": "gelu"},
    {"c": 257, "out": 65, "size": (6, 5), "padding": 0},
    {"c": 48, "out": 32, "size": (9, 4), "padding": (0, 1, 2, 0), "residual": True},
    {"c": 20, "out": 24, "size": (3, 3), "padding": (3, 4, 2, 5)},
    {"c": 17, "out": 16, "size": (29, 1), "padding": "same", "activation": "tanh", "residual": False},
    {"c": 1, "out": 1, "size": (2, 2), "padding": "same", "bias": False},
    {"c": 1024, "out": 16, "size": (4, 6)},
    {"c": 32, "out": 64, "size": (113, 75), "n": 2, "activation": "relu", "residual": True},
]


def check(case):
    """Against the reference; where x is narrower than float32, weights and bias are float32 beside it."""
    tensors = {name: t.float() if name in ("weight", "bias") else t for name, t in case.tensors.items()}
    options = {name: case.options[name] for name in ("padding", "activation")}
    with nan_filled(), torch.no_grad():
        ours = run(**tensors, **options)
        doubles = {name: tensor.double() for name, tensor in tensors.items()}
        ref = reference.conv2d(**doubles, **options)
    x, weight = doubles.pop("x").abs(), doubles.pop("weight").abs()
    sums = winograd(x, weight, options["padding"], ABSOLUTE)
    for name, tensor in doubles.items():
        sums = sums + (tensor[:, None, None] if name == "bias" else tensor).abs()
    with activations_as_bounds():
        scale = ACTIVATIONS[options["activation"]](sums)
    assert ours.dtype == case.x.dtype
    assert ours.stride() == empty_image(case.x, ours.shape).stride()
    assert_within(ours, ref, scale, terms=9 * weight.shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row", CASES, ids=str)
def test_equals_the_reference(row, layout, dtype):
    """Channels' scales over three decades."""
    row = {"k": (3, 3), "padding": 1, "dtype": dtype, "layout": layout, "decades": 3} | row
    check(make("conv2d", fresh_generator(), **row))


@pytest.mark.parametrize("cases", [fuzzing.CASES // 200, pytest.param(fuzzing.CASES, marks=pytest.mark.slow)])
def test_fuzz(cases):
    """Shapes, padding, options, layouts, alignment and threads as for every other op."""
    fixed = dict(k=(3, 3), stride=1, dilation=1, special=None, float_biases=True)
    strategy = fuzzing.rows("conv2d", **{name: st.just(value) for name, value in fixed.items()})

    def body(row):
        assume(row["dtype"] != torch.float64)
        case, _ = fuzzing.case_of("conv2d", row)
        assume(0 not in case.x.shape)
        with threads(row["threads"]):
            check(case)

    fuzzing.fuzz(strategy, body, cases)


@pytest.mark.parametrize("decades", [2, 5])
def test_taps_of_any_size(decades):
    """Within the algorithm's own bound, which is what it adds up."""
    generator = fresh_generator()
    x = draw(generator, (2, 24, 10, 12), scale=channel_scales(generator, 24, 3)[:, None, None])
    weight = draw(generator, (32, 24, 3, 3), scale=channel_scales(generator, 9, decades).reshape(3, 3))
    with nan_filled(), torch.no_grad():
        ours = run(x, weight, padding=1)
    ref = F.conv2d(x.double(), weight.double(), padding=1)
    torch.testing.assert_close(winograd(x, weight, 1), ref, rtol=1e-9, atol=1e-12)  # the oracle's oracle
    assert_within(ours, ref, winograd(x.abs(), weight.abs(), 1, ABSOLUTE), terms=24)


def test_as_exact_as_pytorch():
    """Root mean square of the errors over an image, beside PyTorch's in its default memory format."""
    generator = fresh_generator()
    for channels in (32, 64, 96, 160, 256):
        x = draw(generator, (1, channels, 28, 28)).relu()
        weight = draw(generator, (channels, channels, 3, 3), scale=(9 * channels) ** -0.5)
        ref = F.conv2d(x.double(), weight.double(), padding=1)
        with torch.no_grad():
            ours, theirs = run(x, weight, padding=1), F.conv2d(x, weight, padding=1)
        ours, theirs = ((y - ref).square().mean().sqrt().item() for y in (ours, theirs))
        assert ours <= 1.5 * theirs, channels


def test_repeatable():
    """The same bits whatever the threads and the neighbours in the batch."""
    generator = fresh_generator()
    x, weight = draw(generator, (3, 40, 37, 29)), draw(generator, (72, 40, 3, 3))
    with torch.no_grad():
        ours = run(x, weight, padding=1)
        for count in (1, 2, 5):
            with threads(count):
                assert torch.equal(run(x, weight, padding=1), ours)
                for i in range(3):
                    assert torch.equal(run(x[i : i + 1], weight, padding=1), ours[i : i + 1])


def test_special_values_stay_in_their_windows():
    x, weight = torch.randn(1, 20, 12, 12), torch.randn(16, 20, 3, 3)
    for wrong in (torch.nan, torch.inf):
        x[0, 3, 5, 6] = wrong
        with torch.no_grad():
            finite = run(x, weight, padding=1).isfinite().all(1)[0]
        expected = torch.ones(12, 12, dtype=torch.bool)
        expected[4:7, 5:8] = False
        assert torch.equal(finite, expected)


def test_packing():
    weight, bias = torch.randn(40, 24, 3, 3), torch.randn(40)
    packed = cnnfast.pack_conv2d(weight, bias, winograd=True)
    assert packed.numel() == 64 + 48 * 4 + 16 * 24 * 48 * 4  # header, bias and 16 products, columns in whole panels
    assert cnnfast.pack_conv2d(weight.to("meta"), bias.to("meta"), winograd=True).shape == packed.shape
    torch.library.opcheck(torch.ops.cnnfast.pack_conv2d.default, (weight, bias, None, True))
    arguments = (torch.randn(2, 24, 9, 9), packed, None, 40, [3, 3], [1, 1], [1, 1, 1, 1], [1, 1], 1)
    torch.library.opcheck(torch.ops.cnnfast.conv2d_packed.default, arguments)
    with pytest.raises(RuntimeError, match="truncated"):
        cnnfast.conv2d_packed(arguments[0], packed[:-4], out_channels=40, kernel_size=3)


@pytest.mark.parametrize(
    ("weight", "winograd"),
    [(torch.zeros(8, 8, 1, 3), True), (torch.zeros(8, 8, 5, 5), True), (torch.zeros(8, 8, 3, 3).double(), True)],
    ids=str,
)
def test_weights_that_it_does_not_take(weight, winograd):
    with pytest.raises(ValueError, match=r"winograd=True wants a float32 weight \(K, C, 3, 3\), got torch.float"):
        cnnfast.pack_conv2d(weight, winograd=winograd)
    with pytest.raises(RuntimeError, match="winograd wants float32 weights of 3 x 3"):
        torch.ops.cnnfast.pack_conv2d(weight, None, None, True)
    with pytest.raises(TypeError, match="winograd must be a bool, got 1"):
        cnnfast.pack_conv2d(weight, winograd=1)


@pytest.mark.parametrize("options", [{"stride": 2}, {"dilation": (1, 2)}, {"stride": (2, 1)}], ids=str)
def test_geometry_that_it_does_not_compute(options):
    with pytest.raises(RuntimeError, match="winograd=True, which wants stride 1 and dilation 1"):
        run(torch.zeros(1, 8, 9, 9), torch.zeros(8, 8, 3, 3), padding=1, **options)


def test_in_a_network():
    """Whose convolutions fusion hands to it."""
    for options, expected in (
        ({}, True),
        ({"stride": 2}, False),
        ({"dilation": 2}, False),
        ({"kernel_size": 5}, False),
        ({"in_channels": 8}, False),
        ({"dtype": torch.float64}, False),
    ):
        conv = nn.Conv2d(**({"in_channels": 16, "out_channels": 32, "kernel_size": 3, "padding": 1} | options))
        x = torch.randn(1, conv.in_channels, 10, 10, dtype=conv.weight.dtype)
        with torch.no_grad():
            with torch.profiler.profile(record_shapes=True) as profile:
                y = fuse_conv2d(conv, nn.BatchNorm2d(32, dtype=x.dtype).eval(), activation="relu")(x)
            expected_y = F.relu(conv(x) / (1 + 1e-5) ** 0.5)
        packed = [e.input_shapes[1][0] for e in profile.events() if e.name == "cnnfast::conv2d_packed"]
        assert (packed == [64 + 32 * 4 + 16 * 16 * 32 * 4]) == expected, options
        torch.testing.assert_close(y, expected_y, rtol=1e-4, atol=1e-5)
