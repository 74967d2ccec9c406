"""The bytes, sectors and bank conflicts that the headers of csrc/cuda/depthwise_conv2d/*.cuh promise, counted.

Fails when a kernel loads more than its header says, loads something twice, or an access stops being coalesced or free
of bank conflicts.
"""

import pytest
import torch
from cuda_host import harness
from numerics import channels_last

pytestmark = harness.needs_toolkit
CHANNELS = {torch.bfloat16: 256, torch.float32: 128}  # 32 vectors: a warp is one pixel
SHAPES = [(k, s) for k in (3, 5) for s in (1, 2)]


def draw(n, c, h, w, dtype):
    return channels_last(torch.randn(n, c, h, w).to(dtype))


def size(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def assert_coalesced(counts, promise):
    """Every byte of every sector was asked for, by requests as wide as promised."""
    assert counts["sectors"] * 32 == counts["bytes"]
    assert counts["most_sectors"] == promise.sectors_per_request == counts["sectors"] / counts["requests"]


def spans(total, block):
    return [min(block, total - begin) for begin in range(0, total, block)]


@pytest.mark.parametrize("dtype", CHANNELS, ids=str)
@pytest.mark.parametrize(("k", "s"), SHAPES)
def test_forward(host, dtype, k, s):
    channels = CHANNELS[dtype]
    promise = host.promises()["depthwise_conv2d_forward_kernel", k, s]
    rows, columns = 3, 8
    x = draw(2, channels, (rows - 1) * s + k, (columns - 1) * s + k, dtype)  # no padding: every load is made
    weight, bias = torch.randn(channels, 1, k, k).to(dtype), torch.randn(channels).to(dtype)
    [launch] = host.count(
        lambda: host.ops.depthwise_conv2d(x, weight, bias, [s, s], [0] * 4, [1, 1], 1, 2), x=x, weight=weight, bias=bias
    )
    counts, strips = launch["counts"], 2 * rows * columns // promise.strip
    assert counts["load x"]["requests"] == strips * promise.loads_per_strip
    assert_coalesced(counts["load x"], promise)
    assert counts["load x"]["unique_sectors"] * 32 == size(x)
    tiles = [  # the block's own halo, once: 2 images, rows and columns of a block's outputs
        ((r - 1) * s + k) * ((c - 1) * s + k)
        for r in spans(rows, launch["block"][2])
        for c in spans(columns, launch["block"][1] * promise.strip)
    ]
    assert counts["load x"]["block_sectors"] * 32 == 2 * sum(tiles) * channels * x.element_size()
    assert counts["store unnamed"]["bytes"] == 2 * rows * columns * channels * x.element_size()
    assert_coalesced(counts["store unnamed"], promise)
    assert counts["load weight"]["unique_sectors"] * 32 == size(weight)
    assert counts["load shared"]["conflicts"] == 0
    assert launch["shared_bytes"] == (k * k + 1) * (channels + 4) * 4


@pytest.mark.parametrize("dtype", CHANNELS, ids=str)
@pytest.mark.parametrize(("k", "s"), SHAPES)
def test_input_gradient(host, dtype, k, s):
    channels = CHANNELS[dtype]
    promise = host.promises()["depthwise_conv2d_input_gradient_kernel", k, s]
    x = draw(1, channels, 8, 8, dtype)
    pad = k // 2
    weight = torch.randn(channels, 1, k, k).to(dtype)
    y = host.ops.depthwise_conv2d(x, weight, None, [s, s], [pad] * 4, [1, 1], 0, 0)
    grad = draw(*y.shape, dtype)
    [launch] = host.count(
        lambda: host.ops.depthwise_conv2d_backward(grad, x, weight, None, [s, s], [pad] * 4, [1, 1], 1, 0, 1),
        x=x, grad=grad, weight=weight,
    )  # fmt: skip
    counts = launch["counts"]
    assert_coalesced(counts["load grad"], promise)
    assert counts["load grad"]["unique_sectors"] * 32 == size(grad)
    shift, width = pad % s, promise.loads_per_strip // -(-k // s)  # gradient columns that a strip loads
    firsts = [(begin + pad) // s - (k - 1) // s for begin in range(-shift, 8, promise.strip)]
    columns = sum(0 <= first + j < y.shape[3] for first in firsts for j in range(width))
    rows = sum(0 <= row * s - pad + tap < 8 for row in range(y.shape[2]) for tap in range(k))
    assert counts["load grad"]["requests"] == rows * columns
    for name in ("load x", "store unnamed"):  # x for the pre-activation's mask
        assert_coalesced(counts[name], promise)
        assert counts[name]["bytes"] == counts[name]["unique_sectors"] * 32 == size(x)
    assert counts["load shared"]["conflicts"] == 0


@pytest.mark.parametrize("dtype", CHANNELS, ids=str)
@pytest.mark.parametrize(("k", "s"), SHAPES)
def test_weight_gradient(host, dtype, k, s):
    channels = CHANNELS[dtype]
    promise = host.promises()["depthwise_conv2d_weight_gradient_kernel", k, s]
    rows, columns = 3, 12
    x = draw(2, channels, (rows - 1) * s + k, (columns - 1) * s + k, dtype)
    grad = draw(2, channels, rows, columns, dtype)
    weight, bias = torch.randn(channels, 1, k, k).to(dtype), torch.randn(channels).to(dtype)
    first, second = host.count(
        lambda: host.ops.depthwise_conv2d_backward(grad, x, weight, bias, [s, s], [0] * 4, [1, 1], 1, 0, 6),
        x=x, grad=grad,
    )  # fmt: skip
    counts, strips = first["counts"], 2 * rows * columns // promise.strip
    assert counts["load x"]["requests"] + counts["load grad"]["requests"] == strips * promise.loads_per_strip
    for name, tensor in (("load x", x), ("load grad", grad)):
        assert_coalesced(counts[name], promise)
        assert counts[name]["unique_sectors"] * 32 == size(tensor)
    assert counts["load grad"]["block_sectors"] * 32 == size(grad)
    chunks = first["grid"][0]
    assert chunks == 2 * rows and chunks * first["grid"][1] <= 512
    partial = chunks * (k * k + 1) * channels * 4
    stores, loads = counts["store unnamed"], second["counts"]["load unnamed"]
    assert stores["bytes"] == stores["unique_sectors"] * 32 == partial
    assert stores["most_sectors"] == (32 if dtype is torch.bfloat16 else 16)  # two halves of 8 channels, or one of 4
    assert loads["bytes"] == loads["sectors"] * 32 == partial
    for access in ("load shared", "store shared"):
        assert counts[access]["conflicts"] == 0
    assert first["shared_bytes"] <= 8192


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 12, 16, 24])
def test_fewer_lanes_than_a_warp(host, lanes):
    """Narrow layers: warps span strips. Sectors stay whole, and the banks free wherever the header says so."""
    channels = lanes * 8
    x, weight = draw(1, channels, 10, 18, torch.bfloat16), torch.randn(channels, 1, 3, 3).bfloat16()
    [launch] = host.count(lambda: host.ops.depthwise_conv2d(x, weight, None, [1, 1], [0] * 4, [1, 1], 0, 0), x=x)
    assert launch["block"][0] == lanes
    counts = launch["counts"]
    if lanes % 2 == 0:
        assert counts["load x"]["sectors"] * 32 == counts["load x"]["bytes"]
    conflict_free = lanes % 8 == 0 or 8 % lanes == 0
    assert (counts["load shared"]["conflicts"] == 0) == conflict_free
    assert counts["load shared"]["conflicts"] <= counts["load shared"]["wavefronts"] / 2
