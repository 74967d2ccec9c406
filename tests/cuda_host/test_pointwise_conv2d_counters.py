"""The bytes, sectors and bank conflicts that the header of csrc/cuda/pointwise_conv2d/forward.cuh promises, counted.

Fails when the kernel loads more than its header says, loads something twice, or an access stops being coalesced or free
of bank conflicts.
"""

import pytest
import torch
from cuda_host import harness
from numerics import channels_last

pytestmark = harness.needs_toolkit
NAME = "pointwise_conv2d_forward_kernel"
# (warps along pixels, along output channels, tiles of 16 pixels of a warp): output channels and multiprocessors for it
TILES = {(4, 1, 1): (32, 132), (2, 2, 2): (256, 132), (4, 2, 2): (192, 1), (2, 4, 4): (256, 1)}
TYPES = [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]


def draw(*shape, dtype):
    return channels_last(torch.randn(*shape).to(dtype))


def size(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def count(tile, dtype, tf32, gated=False, stride=1, bias_dtype=None):
    """(tensors, counts, promise) of a launch whose pixels, channels and output channels fill whole tiles."""
    host, (k, multiprocessors) = harness.library("pointwise_conv2d"), TILES[tile]
    c = 3 * 64 // dtype.itemsize  # three slices
    x = draw(2, c, 16 * stride, 16 * stride, dtype=dtype)
    weight, bias = torch.randn(k, c, 1, 1).to(dtype), torch.randn(k).to(bias_dtype or dtype)
    gate = torch.randn(2, c, 1, 1).to(dtype) if gated else None
    residual = draw(2, k, 16, 16, dtype=dtype)
    tensors = dict(x=x, weight=weight, bias=bias, gate=gate, residual=residual)
    host.c.host_set_multiprocessors(multiprocessors)
    try:
        [launch] = host.count(
            lambda: host.ops.pointwise_conv2d(*tensors.values(), [stride, stride], 1, tf32),
            **{name: t for name, t in tensors.items() if t is not None},
        )
    finally:
        host.c.host_set_multiprocessors(132)
    promise = host.promises()[(NAME, int(tf32), int(gated), *tile)]
    assert launch["kernel"] == NAME and launch["shared_bytes"] == promise.shared
    assert launch["grid"][0] == 512 // promise.rows * (k // promise.columns)
    return tensors, launch["counts"], promise


def assert_coalesced(counts, promise):
    """Every byte of every sector was asked for, by requests as wide as promised."""
    assert counts["sectors"] * 32 == counts["bytes"]
    assert counts["most_sectors"] == promise.sectors_per_request == counts["sectors"] / counts["requests"]


@pytest.mark.parametrize(
    ("tile", "gated", "dtype", "tf32"),
    [  # by default each tile with and without a gate, and each type
        pytest.param(tile, gated, *kind, marks=[pytest.mark.slow] * (kind != TYPES[-1] and tile != (2, 2, 2)))
        for tile in TILES
        for gated in (False, True)
        for kind in TYPES
    ],
    ids=str,
)
def test_forward(tile, gated, dtype, tf32):
    tensors, counts, promise = count(tile, dtype, tf32, gated)
    x, weight, residual = tensors["x"], tensors["weight"], tensors["residual"]
    again = {"x": weight.shape[0] // promise.columns, "weight": 512 // promise.rows, "residual": 1}
    for name, tensor in {"x": x, "weight": weight, "residual": residual}.items():
        load = counts[f"load {name}"]
        assert_coalesced(load, promise)
        assert load["bytes"] == load["block_sectors"] * 32 == again[name] * size(tensor)
        assert load["unique_sectors"] * 32 == size(tensor)
    assert_coalesced(counts["store unnamed"], promise)
    assert counts["store unnamed"]["bytes"] == size(residual)
    assert counts["load shared"]["conflicts"] == counts["store shared"]["conflicts"] == 0
    if gated:
        assert counts["load gate"]["bytes"] == again["x"] * 512 // promise.rows * size(tensors["gate"]) // 2


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bias(bias_dtype):
    tensors, counts, promise = count((2, 4, 4), torch.bfloat16, False, bias_dtype=bias_dtype)
    assert counts["load bias"]["block_sectors"] * 32 == 512 // promise.rows * size(tensors["bias"])


def test_only_the_pixels_sampled():
    tensors, counts, promise = count((2, 4, 4), torch.bfloat16, False, stride=2)
    assert_coalesced(counts["load x"], promise)
    assert counts["load x"]["unique_sectors"] * 32 == size(tensors["x"]) // 4
