"""Gradients of the depthwise ops where the kernels take another way: blocks, bands and groups, broken panels, strips.

Fails if a gradient differs from the reference's by more than the policy allows, if its bits depend on the threads or
on which others are asked for, if a NaN or an infinity spreads beyond the taps that meet it, or if 16-bit tensors are
copied as a whole.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numerics import draw, fresh_generator, threads
from stats_cases import ROUNDED, check_gradients, make, run

import cnnfast.ops
from cnnfast.bench.timing import peak_growth

pytestmark = pytest.mark.usefixtures("nan_outputs")

OPS = ("depthwise_conv2d_stats", "depthwise_conv2d_squeeze")
# multiplier 2 is stats_cases' own: weights of 2 c channels
ROWS = {
    "bands": {"n": 1, "c": 19, "size": (70, 9)},
    "bands of large strides": {"n": 1, "c": 16, "size": (67, 11), "stride": 2, "k": (5, 5)},
    "blocks with a broken panel": {"n": 1, "c": 200, "size": (9, 6)},
    "groups of images": {"n": 37, "c": 17, "size": (3, 5)},
    "more images than shares": {"n": 70, "c": 3, "size": (2, 2), "k": (2, 3)},
    "rows of one": {"c": 40, "size": (11, 1), "k": (3, 3)},
    "windows of padding": {"c": 16, "size": (3, 2), "padding": (4, 0, 0, 5)},
    "outputs between which there are inputs": {"c": 33, "size": (13, 12), "k": (3, 3), "stride": (5, 4), "padding": 1},
    "rows of seven": {"c": 35, "size": (7, 7), "k": (3, 3), "padding": 1},
    "rows of two sevens": {"c": 32, "size": (4, 14), "k": (3, 3), "padding": 1},
    "wide strips": {"n": 1, "c": 16, "size": (5, 43), "k": (5, 5)},
    "wide strips, stride 2": {"n": 1, "c": 16, "size": (6, 44), "stride": 2, "padding": (1, 0, 0, 1)},
    "rows that no output meets": {"c": 32, "size": (8, 9), "k": (1, 3), "stride": (2, 1)},
    "windows of more rows than columns": {"c": 32, "size": (9, 12), "k": (5, 3)},
    "dilated": {"c": 24, "size": (12, 13), "dilation": (3, 2)},
}


def gradients(op, tensors, options, grads, wanted=None):
    leaves = {name: t.clone().requires_grad_(wanted is None or name in wanted) for name, t in tensors.items()}
    torch.autograd.backward(run(op, leaves, options), grads)
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def drawn(op, tensors, options):
    return [draw(fresh_generator(), t.shape, t.dtype) for t in run(op, tensors, options)]


def plain(tensors, multiplier):
    """The weights of a depthwise convolution with this multiplier."""
    channels = tensors["x"].shape[1] * multiplier
    return tensors | {name: tensors[name][:channels].clone() for name in ("weight", "bias")}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("multiplier", (1, 2))
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("op", OPS)
def test_shapes(op, row, multiplier, dtype):
    for prologue in ("none", "all"):
        tensors, options = make(op, dtype=dtype, prologue=prologue, **ROWS[row])
        tensors = plain(tensors, multiplier)
        grads = drawn(op, tensors, options)
        check_gradients(op, tensors, options, grads, gradients(op, tensors, options, grads), ROUNDED[op] + 1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("row", ROWS)
def test_same_bits(row, dtype):
    """With others or alone, on one thread or three; a bias's gradient is another way for the rest, too."""
    tensors, options = make("depthwise_conv2d_squeeze", dtype=dtype, prologue="none", **ROWS[row])
    tensors = plain(tensors, 1)
    x, weight, bias = tensors["x"], tensors["weight"], tensors["bias"]
    arguments = (weight, bias, options["stride"], options["padding"], options["dilation"])
    grad = draw(fresh_generator(), cnnfast.ops.depthwise_conv2d(x, *arguments).shape, dtype)

    def masked(wanted):
        leaves = [t.clone().requires_grad_(bit) for t, bit in zip((x, weight, bias), wanted, strict=True)]
        y = cnnfast.ops.depthwise_conv2d(leaves[0], *leaves[1:], *arguments[2:])
        y.backward(grad)
        return [leaf.grad for leaf in leaves]

    together = masked((True, True, True))
    for wanted in itertools.product((False, True), repeat=3):
        if not any(wanted):
            continue
        for count in (1, 2, 3):
            with threads(count):
                for got, expected, bit in zip(masked(wanted), together, wanted, strict=True):
                    assert torch.equal(got, expected) if bit else got is None, (wanted, count)


def by_taps(grad, x, weight, stride, padding):
    """Both gradients, tap by tap over the pixels that are in the image. (float64's own multiplies padding, too.)"""

    def inside(out, size, tap):
        outputs = [o for o in range(out) if 0 <= o * stride - padding + tap < size]
        return outputs, [o * stride - padding + tap for o in outputs]

    dx, dweight = torch.zeros_like(x), torch.zeros_like(weight)
    for i, j in itertools.product(range(weight.shape[2]), range(weight.shape[3])):
        (oh, ih), (ow, iw) = inside(grad.shape[2], x.shape[2], i), inside(grad.shape[3], x.shape[3], j)
        g = grad[:, :, oh][..., ow]
        dx[:, :, torch.tensor(ih)[:, None], torch.tensor(iw)] += g * weight[:, 0, i, j][:, None, None]
        dweight[:, 0, i, j] = (g * x[:, :, ih][..., iw]).sum((0, 2, 3))
    return dx, dweight


@pytest.mark.parametrize("width", (7, 14, 23))
@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("k", (3, 5, 2))
@pytest.mark.parametrize("where", ("weight", "grad", "x"))
def test_special_values(where, k, stride, width):
    """Taps outside the image are skipped: an infinity there meets no zero."""
    generator = fresh_generator()
    x = draw(generator, (2, 40, 12, width)).to(memory_format=torch.channels_last)
    weight = draw(generator, (40, 1, k, k))
    grad = draw(generator, cnnfast.ops.depthwise_conv2d(x, weight, None, stride, k // 2).shape)
    for value, channel in ((torch.inf, 3), (-torch.inf, 17), (torch.nan, 39)):
        plane = weight[channel, 0] if where == "weight" else {"grad": grad, "x": x}[where][1, channel]
        plane[0, 0] = plane[-1, -1] = value

    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    cnnfast.ops.depthwise_conv2d(*leaves, None, stride, k // 2).backward(grad)
    for leaf, expected in zip(leaves, by_taps(grad.double(), x.double(), weight.double(), stride, k // 2), strict=True):
        torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-4, atol=1e-4, equal_nan=True)


GROWTH = 3_000_000  # rows of two threads, and the shares of the sums


def growth(dtype: torch.dtype) -> tuple[int, int]:
    """Of depthwise_conv2d_stats' backward in a process of its own, and the bytes of what it returns."""
    torch.set_num_threads(2)
    tensors, options = make("depthwise_conv2d_stats", dtype=dtype, prologue="batch_norm", n=8, c=64, size=(96, 96))
    tensors = plain(tensors, 1)
    y, total, squares = run("depthwise_conv2d_stats", tensors, options)
    x, weight, bias, scale, shift = (tensors[name] for name in ("x", "weight", "bias", "scale", "shift"))
    backward = torch.ops.cnnfast.depthwise_conv2d_stats_backward
    grad = torch.randn_like(y)

    def call(images):
        part = (grad[:images], total, squares, x[:images], weight, bias, scale, shift, y[:images])
        return backward(*part, [1, 1], [1, 1, 1, 1], [1, 1], 1, 31, 0)

    call(1)
    got, grown = peak_growth(lambda: call(8))
    return grown, sum(t.numel() * t.element_size() for t in got)


@pytest.mark.slow  # seconds each
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets the peak of a process's memory")
@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_read_in_place(dtype):
    code = f"import torch, test_depthwise_backward as t; print(*t.growth(torch.{dtype}))"
    here = Path(__file__).parent
    path = os.pathsep.join(str(folder) for folder in (here, here.parent, here.parents[1]))
    command = (sys.executable, "-c", code)
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown, returned = map(int, done.stdout.split()[-2:])
    assert returned <= grown <= returned + GROWTH
