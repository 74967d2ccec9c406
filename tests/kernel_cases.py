"""The launches that docs/kernels.md is made of: every op's forward pass and gradients at the networks' shapes.

Its launchers run on meta tensors.
"""

from __future__ import annotations

import functools
import importlib
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from numerics import float32_by

BFLOAT16, FLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NHWC, NCHW = torch.channels_last, torch.contiguous_format


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    launch: Callable[[], object]  # forward, then all gradients
    wide: bool = True  # x is to be loaded 16 bytes a thread at a time
    quick: bool = False  # compiled in the default test run, too


def empty(*shape: int, dtype: torch.dtype, memory_format: torch.memory_format = NCHW) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


def depthwise_conv2d(shape, k, stride, dtype, memory_format=NHWC, pre_activation=0, activation=0):
    kernels = importlib.import_module("cnnfast.kernels.depthwise_conv2d")
    x = empty(*shape, dtype=dtype, memory_format=memory_format)
    weight, bias = empty(shape[1], 1, k, k, dtype=dtype), empty(shape[1], dtype=dtype)
    args = (x, weight, bias, (stride, stride), (), (1, 1), pre_activation, activation)
    y = kernels.depthwise_conv2d(*args)
    kernels.depthwise_conv2d_backward(torch.empty_like(y), *args, 0b111)


def conv2d(shape, out, k, dtype, memory_format=NHWC, activation=1):
    kernels = importlib.import_module("cnnfast.kernels.conv2d")
    x = empty(*shape, dtype=dtype, memory_format=memory_format)
    weight, bias = empty(out, shape[1], k, k, dtype=dtype), empty(out, dtype=torch.promote_types(dtype, FLOAT32))
    residual = empty(shape[0], out, *shape[2:], dtype=dtype, memory_format=memory_format)
    args = (x, weight, bias, residual, (1, 1), (), (1, 1), activation)
    y = kernels.conv2d(*args)
    kernels.conv2d_backward(torch.empty_like(y), *args, 0b1111)


def pointwise_conv2d(
    shape, out, stride=1, dtype=BFLOAT16, memory_format=NHWC, gate=False, residual=False, activation=0, tf32=False
):
    kernels = importlib.import_module("cnnfast.kernels.pointwise_conv2d")
    x = empty(*shape, dtype=dtype, memory_format=memory_format)
    weight, bias = empty(out, shape[1], 1, 1, dtype=dtype), empty(out, dtype=dtype)
    height, width = (-(-size // stride) for size in shape[2:])
    added = empty(shape[0], out, height, width, dtype=dtype, memory_format=memory_format) if residual else None
    gates = empty(*shape[:2], 1, 1, dtype=dtype) if gate else None
    args = (x, weight, bias, gates, added, (stride, stride), activation)
    with float32_by("tf32" if tf32 else "ieee"):
        y = kernels.pointwise_conv2d(*args)
        kernels.pointwise_conv2d_backward(torch.empty_like(y), *args, 0b11111)


def pointwise_conv2d_slope(shape, out, dtype, tf32=False, activation=4):
    """What the gradients of a curved activation start from: the forward kernel's other form."""
    kernels = importlib.import_module("cnnfast.kernels.pointwise_conv2d")
    x, y = (empty(shape[0], channels, *shape[2:], dtype=dtype, memory_format=NHWC) for channels in (shape[1], out))
    weight, bias = empty(out, shape[1], 1, 1, dtype=dtype), empty(out, dtype=dtype)
    with float32_by("tf32" if tf32 else "ieee"):
        kernels.forward(x, weight, bias, None, y, torch.empty_like(y), (1, 1), activation)


def pointwise_depthwise(
    shape, expanded, k, stride=1, dtype=BFLOAT16, memory_format=NHWC, tf32=False, residual=False, squeeze=False,
    activations=(0, 2, 2),
):  # fmt: skip
    kernels = importlib.import_module("cnnfast.kernels.pointwise_depthwise")
    x = empty(*shape, dtype=dtype, memory_format=memory_format)
    weights = empty(expanded, shape[1], 1, 1, dtype=dtype), empty(expanded, 1, k, k, dtype=dtype)
    bias = empty(expanded, dtype=dtype)
    height, width = (-(-size // stride) for size in shape[2:])
    added = empty(shape[0], expanded, height, width, dtype=dtype, memory_format=memory_format) if residual else None
    with float32_by("tf32" if tf32 else "ieee"):
        kernels.pointwise_depthwise(
            x, weights[0], bias, weights[1], bias, added, (stride, stride), (), (1, 1), *activations, squeeze
        )


def inverted_residual(
    shape, expanded, out, k, stride=1, dtype=BFLOAT16, memory_format=NHWC, tf32=False, squeezed=0, activation=2
):
    kernels = importlib.import_module("cnnfast.kernels.inverted_residual")
    x = empty(*shape, dtype=dtype, memory_format=memory_format)

    def layer(channels, *others):
        return empty(channels, *others, dtype=dtype), empty(channels, dtype=dtype)

    expand = layer(expanded, shape[1], 1, 1) if expanded != shape[1] else (None, None)
    excite = (None,) * 4
    if squeezed:
        excite = *layer(squeezed, expanded, 1, 1), *layer(expanded, squeezed, 1, 1)
    weights = *expand, *layer(expanded, 1, k, k), *excite, *layer(out, expanded, 1, 1)
    residual = x if stride == 1 and out == shape[1] else None
    args = (x, *weights, residual, (stride, stride), (), (1, 1), activation)
    with float32_by("tf32" if tf32 else "ieee"):
        if squeezed:
            y = kernels.inverted_residual(*args, activation, 3)
            kernels.inverted_residual_backward(torch.empty_like(y), *args, activation, 3, 0b111111111111)
        else:  # whatever fusion_pays says; apart and backward it is other ops' kernels
            kernels.fused(*args[:5], *args[9:])


def separable_conv2d(
    shape, out, k=3, stride=1, dtype=BFLOAT16, memory_format=NHWC, residual=False, activations=(1, 0, 0), tf32=False
):
    kernels = importlib.import_module("cnnfast.kernels.separable_conv2d")
    x, channels = empty(*shape, dtype=dtype, memory_format=memory_format), shape[1]
    height, width = (-(-size // stride) for size in shape[2:])
    added = empty(shape[0], out, height, width, dtype=dtype, memory_format=memory_format) if residual else None
    depthwise = empty(channels, 1, k, k, dtype=dtype), empty(channels, dtype=dtype)
    pointwise = empty(out, channels, 1, 1, dtype=dtype), empty(out, dtype=dtype)
    with float32_by("tf32" if tf32 else "ieee"):
        kernels.separable_conv2d(x, *depthwise, *pointwise, added, (stride, stride), (), (1, 1), False, *activations)


def local_response_norm(shape, size, dtype, memory_format=NHWC):
    kernels = importlib.import_module("cnnfast.kernels.local_response_norm")
    x = empty(*shape, dtype=dtype, memory_format=memory_format)
    options = (size, 1e-4, 0.75, 2.0)
    y = kernels.local_response_norm(x, *options)
    kernels.local_response_norm_backward(torch.empty_like(y), x, *options)


def squeeze_excite(shape, squeezed, dtype, memory_format=NHWC, residual=False, activation=1, post_activation=0):
    kernels = importlib.import_module("cnnfast.kernels.squeeze_excite")
    x, channels = empty(*shape, dtype=dtype, memory_format=memory_format), shape[1]
    reduce = empty(squeezed, channels, 1, 1, dtype=dtype), empty(squeezed, dtype=dtype)
    expand = empty(channels, squeezed, 1, 1, dtype=dtype), empty(channels, dtype=dtype)
    args = (x, *reduce, *expand, torch.empty_like(x) if residual else None, activation, 3, post_activation)
    y = kernels.squeeze_excite(*args)
    kernels.squeeze_excite_backward(torch.empty_like(y), *args, 0b111111)


def squeeze(shape, k, stride, dtype, memory_format=NHWC, activation=4, backward=False):
    """depthwise_conv2d_squeeze, or its gradient."""
    kernels = importlib.import_module("cnnfast.kernels.stats")
    x = empty(*shape, dtype=dtype, memory_format=memory_format)
    weight, bias = empty(shape[1], 1, k, k, dtype=dtype), empty(shape[1], dtype=dtype)
    args = (x, weight, bias, (stride, stride), (), (1, 1), 0, activation)
    y, means = kernels.depthwise_conv2d_squeeze(*args) if not backward else squeezed_shapes(x, stride)
    if backward:
        kernels.depthwise_conv2d_squeeze_backward(y, means, *args, 0b111)


def squeezed_shapes(x, stride):
    size = [-(-side // stride) for side in x.shape[2:]]
    return x.new_empty((*x.shape[:2], *size)), x.new_empty((*x.shape[:2], 1, 1))


def stats(
    op, shape, out=0, k=1, stride=1, dtype=BFLOAT16, memory_format=NHWC, prologue=True, pre_activation=1, tf32=False
):
    """<op>_stats, between two batch normalisations; prologue=False: with neither scale nor pre_activation."""
    kernels = importlib.import_module("cnnfast.kernels.stats")
    channels, wide = shape[1], torch.promote_types(dtype, FLOAT32)
    x = empty(*shape, dtype=dtype, memory_format=memory_format)
    depthwise, pointwise = empty(channels, 1, k, k, dtype=dtype), empty(out, channels, 1, 1, dtype=dtype)
    weights = {
        "conv2d": (empty(out, channels, k, k, dtype=dtype), None),
        "depthwise_conv2d": (depthwise, None),
        "pointwise_conv2d": (pointwise, None),
        "separable_conv2d": (depthwise, None, pointwise, None),
    }[op]
    affine = (empty(channels, dtype=wide), empty(channels, dtype=wide)) if prologue else (None, None)
    geometry = ((stride, stride),) if op == "pointwise_conv2d" else ((stride, stride), (), (1, 1))
    activations = (pre_activation if prologue else 0, *([4] if op == "separable_conv2d" else []))
    tensors = (x, *weights, *affine)
    with float32_by("tf32" if tf32 else "ieee"):
        y, total, squares = getattr(kernels, f"{op}_stats")(*tensors, *geometry, *activations)
        grads = torch.empty_like(y), total, squares
        getattr(kernels, f"{op}_stats_backward")(*grads, *tensors, y, *geometry, *activations, 0b1111111)


def stats_gradients(shape, k, dtype, memory_format=NHWC):
    """What backward launches of kernels that forward launches, too: gradients before an activation."""
    kernels = importlib.import_module("cnnfast.kernels.stats")
    x = empty(*shape, dtype=dtype, memory_format=memory_format)
    weight, affine = empty(shape[1], 1, k, k, dtype=dtype), empty(shape[1], dtype=torch.promote_types(dtype, FLOAT32))
    kernels.entered(x, affine, affine, torch.empty_like(x), 4, affine.dtype)
    kernels.separable_intermediate(x, weight, None, affine, affine, ((1, 1), (), (1, 1), 1), 4, torch.empty_like(x))


def case(
    op: Callable[..., object],
    *args: object,
    dtype: torch.dtype,
    quick: bool = False,
    wide: bool = True,
    **options: object,
) -> Case:
    launch = functools.partial(op, *args, dtype=dtype, **options)
    # TF32's wgmma and tcgen05 want the axis of the sum innermost: what isn't so stored goes there number by number.
    wide = wide and options.get("memory_format", NHWC) is NHWC and not options.get("tf32")
    return Case(dtype, launch, wide, quick)


INVERTED = functools.partial(case, inverted_residual)
SEPARABLE = functools.partial(case, separable_conv2d)
POINTWISE_DEPTHWISE = functools.partial(case, pointwise_depthwise)
DEPTHWISE = functools.partial(case, depthwise_conv2d)
POINTWISE = functools.partial(case, pointwise_conv2d)
EXCITE = functools.partial(case, squeeze_excite)
SENET = functools.partial(EXCITE, residual=True, post_activation=1)
RESPONSE_NORM = functools.partial(case, local_response_norm)
DEPTHWISE_STATS = functools.partial(case, stats, "depthwise_conv2d")
POINTWISE_STATS = functools.partial(case, stats, "pointwise_conv2d")
CASES = {
    "depthwise 3x3, bf16": DEPTHWISE((32, 728, 19, 19), 3, 1, dtype=BFLOAT16, pre_activation=1, quick=True),
    "depthwise 3x3 / 2, bf16": DEPTHWISE((32, 96, 112, 112), 3, 2, dtype=BFLOAT16, activation=2),
    "depthwise 5x5, bf16": DEPTHWISE((32, 672, 14, 14), 5, 1, dtype=BFLOAT16, activation=2),
    "depthwise 5x5, silu, bf16": DEPTHWISE((32, 672, 14, 14), 5, 1, dtype=BFLOAT16, activation=4),
    "depthwise 5x5 / 2, bf16": DEPTHWISE((32, 144, 56, 56), 5, 2, dtype=BFLOAT16, activation=2),
    "depthwise 3x3, fp16": DEPTHWISE((32, 144, 56, 56), 3, 1, dtype=FLOAT16, activation=2),
    "depthwise 3x3, fp32": DEPTHWISE((32, 728, 19, 19), 3, 1, dtype=FLOAT32, pre_activation=1),
    "depthwise 3x3, gelu, tanh, fp32": DEPTHWISE(
        (32, 728, 19, 19), 3, 1, dtype=FLOAT32, pre_activation=5, activation=6
    ),
    "depthwise 5x5, fp32": DEPTHWISE((32, 672, 14, 14), 5, 1, dtype=FLOAT32, activation=2),
    "depthwise 5x5 / 2, fp32": DEPTHWISE((32, 144, 56, 56), 5, 2, dtype=FLOAT32, activation=2),
    "depthwise 3x3, fp32, NCHW": DEPTHWISE(
        (32, 728, 19, 19), 3, 1, dtype=FLOAT32, memory_format=NCHW, pre_activation=1
    ),
    "depthwise 5x5, bf16, NCHW": DEPTHWISE((32, 672, 14, 14), 5, 1, dtype=BFLOAT16, memory_format=NCHW, activation=2),
    "depthwise 7x7, fp32": DEPTHWISE((32, 384, 28, 28), 7, 1, dtype=FLOAT32),
    "depthwise 3x3, fp64": DEPTHWISE((4, 728, 19, 19), 3, 1, dtype=FLOAT64, pre_activation=1),
    "conv2d 3x3, bf16": case(conv2d, (32, 256, 14, 14), 256, 3, dtype=BFLOAT16, quick=True),
    "conv2d 3x3, silu, fp32, NCHW": case(
        conv2d, (32, 64, 56, 56), 64, 3, dtype=FLOAT32, memory_format=NCHW, activation=4
    ),
    "conv2d 3x3, fp64": case(conv2d, (4, 64, 56, 56), 64, 3, dtype=FLOAT64),
    "pointwise 728 -> 728, bf16": POINTWISE((32, 728, 19, 19), 728, dtype=BFLOAT16, activation=1, quick=True),
    "pointwise 728 -> 728, residual, silu, bf16": POINTWISE(
        (32, 728, 19, 19), 728, dtype=BFLOAT16, residual=True, activation=4
    ),
    "pointwise 728 -> 728, slope of silu, bf16": case(
        pointwise_conv2d_slope, (32, 728, 19, 19), 728, dtype=BFLOAT16, activation=4
    ),
    "pointwise 144 -> 240, slope of tanh, TF32": case(
        pointwise_conv2d_slope, (32, 144, 28, 28), 240, dtype=FLOAT32, tf32=True, activation=6
    ),
    "pointwise 96 -> 24, fp16": POINTWISE((32, 96, 56, 56), 24, dtype=FLOAT16, residual=True),
    "pointwise 320 -> 1280, gate, bf16": POINTWISE((32, 320, 7, 7), 1280, dtype=BFLOAT16, gate=True, activation=2),
    "pointwise 672 -> 112, gate, silu, bf16": POINTWISE(
        (32, 672, 14, 14), 112, dtype=BFLOAT16, gate=True, activation=4
    ),
    "pointwise 64 -> 128 / 2, bf16": POINTWISE((32, 64, 56, 56), 128, 2, dtype=BFLOAT16),
    "pointwise 144 -> 40, gate, fp32": POINTWISE((32, 144, 28, 28), 40, dtype=FLOAT32, gate=True),
    "pointwise 144 -> 40, TF32": POINTWISE((32, 144, 28, 28), 40, dtype=FLOAT32, tf32=True),
    "pointwise 728 -> 728, fp32": POINTWISE((32, 728, 19, 19), 728, dtype=FLOAT32, activation=1),
    "pointwise 728 -> 728, TF32": POINTWISE((32, 728, 19, 19), 728, dtype=FLOAT32, activation=1, tf32=True),
    "pointwise 144 -> 40, fp32, NCHW": POINTWISE((32, 144, 28, 28), 40, dtype=FLOAT32, memory_format=NCHW),
    "pointwise 728 -> 728, bf16, NCHW": POINTWISE((32, 728, 19, 19), 728, dtype=BFLOAT16, memory_format=NCHW),
    "pointwise 144 -> 40, fp64": POINTWISE((4, 144, 28, 28), 40, dtype=FLOAT64),
    "pointwise, depthwise 3x3, 24 -> 144, bf16": POINTWISE_DEPTHWISE(
        (32, 24, 56, 56), 144, 3, dtype=BFLOAT16, quick=True
    ),
    "pointwise, depthwise 3x3, 728, bf16": POINTWISE_DEPTHWISE(
        (32, 728, 19, 19), 728, 3, dtype=BFLOAT16, activations=(1, 0, 0), residual=True
    ),
    "pointwise, depthwise 5x5, 40 -> 240, squeeze, silu, bf16": POINTWISE_DEPTHWISE(
        (32, 40, 28, 28), 240, 5, dtype=BFLOAT16, activations=(0, 4, 4), squeeze=True
    ),
    "pointwise, depthwise 5x5, 112 -> 672, squeeze, silu, fp16": POINTWISE_DEPTHWISE(
        (32, 112, 14, 14), 672, 5, dtype=FLOAT16, activations=(0, 4, 4), squeeze=True
    ),
    "pointwise, depthwise 3x3 / 2, 96 -> 576, bf16": POINTWISE_DEPTHWISE((32, 96, 14, 14), 576, 3, 2, dtype=BFLOAT16),
    "pointwise, depthwise 3x3 / 2, 24 -> 144, fp32": POINTWISE_DEPTHWISE((32, 24, 56, 56), 144, 3, 2, dtype=FLOAT32),
    "pointwise, depthwise 5x5, 112 -> 672, squeeze, silu, fp32": POINTWISE_DEPTHWISE(
        (32, 112, 14, 14), 672, 5, dtype=FLOAT32, activations=(0, 4, 4), squeeze=True
    ),
    "pointwise, depthwise 3x3, 24 -> 144, TF32": POINTWISE_DEPTHWISE(
        (32, 24, 56, 56), 144, 3, dtype=FLOAT32, tf32=True
    ),
    "pointwise, depthwise 3x3, 24 -> 144, fp64": POINTWISE_DEPTHWISE((4, 24, 56, 56), 144, 3, dtype=FLOAT64),
    "pointwise, depthwise 3x3, 24 -> 144, bf16, NCHW": POINTWISE_DEPTHWISE(
        (32, 24, 56, 56), 144, 3, dtype=BFLOAT16, memory_format=NCHW
    ),
    "pointwise, depthwise 5x5 / 2, 24 -> 144, fp32, NCHW": POINTWISE_DEPTHWISE(
        (32, 24, 56, 56), 144, 5, 2, dtype=FLOAT32, memory_format=NCHW
    ),
    "inverted residual 24, 144, 24 @ 56, bf16": INVERTED((32, 24, 56, 56), 144, 24, 3, dtype=BFLOAT16, quick=True),
    "inverted residual 32, 192, 32 @ 28, fp16": INVERTED((32, 32, 28, 28), 192, 32, 3, dtype=FLOAT16),
    "inverted residual 64, 384, 64 @ 14, bf16": INVERTED((32, 64, 14, 14), 384, 64, 3, dtype=BFLOAT16),
    "inverted residual 96, 576, 160 @ 14 / 2, bf16": INVERTED((32, 96, 14, 14), 576, 160, 3, 2, dtype=BFLOAT16),
    "inverted residual 160, 960, 160 @ 7, bf16": INVERTED((32, 160, 7, 7), 960, 160, 3, dtype=BFLOAT16),
    "inverted residual 32, 32, 16 @ 112, bf16": INVERTED((32, 32, 112, 112), 32, 16, 3, dtype=BFLOAT16),
    "inverted residual 5x5, silu, 40, 240, 40 @ 28, bf16": INVERTED(
        (32, 40, 28, 28), 240, 40, 5, dtype=BFLOAT16, activation=4
    ),
    "inverted residual 5x5, excite, silu, 112, 672, 112 @ 14, bf16": INVERTED(
        (32, 112, 14, 14), 672, 112, 5, dtype=BFLOAT16, activation=4, squeezed=28
    ),
    "inverted residual 24, 144, 24 @ 56, fp32": INVERTED((32, 24, 56, 56), 144, 24, 3, dtype=FLOAT32),
    "inverted residual 32, 32, 16 @ 112, fp32": INVERTED((32, 32, 112, 112), 32, 16, 3, dtype=FLOAT32),
    "inverted residual 64, 384, 64 @ 14, TF32": INVERTED((32, 64, 14, 14), 384, 64, 3, dtype=FLOAT32, tf32=True),
    "inverted residual 24, 144, 24 @ 56, fp64": INVERTED((4, 24, 56, 56), 144, 24, 3, dtype=FLOAT64),
    "inverted residual 32, 192, 32 @ 28, bf16, NCHW": INVERTED(
        (32, 32, 28, 28), 192, 32, 3, dtype=BFLOAT16, memory_format=NCHW
    ),
    "inverted residual 96, 576, 160 @ 14 / 2, fp32, NCHW": INVERTED(
        (32, 96, 14, 14), 576, 160, 3, 2, dtype=FLOAT32, memory_format=NCHW
    ),
    "separable 3x3, 728 -> 728, bf16": SEPARABLE((32, 728, 19, 19), 728, dtype=BFLOAT16, quick=True),
    "separable 3x3, 728 -> 728, residual, fp16": SEPARABLE((32, 728, 19, 19), 728, dtype=FLOAT16, residual=True),
    "separable 3x3, 512 -> 512, bf16": SEPARABLE((32, 512, 14, 14), 512, dtype=BFLOAT16, activations=(0, 2, 2)),
    "separable 3x3, 32 -> 64, bf16": SEPARABLE((32, 32, 112, 112), 64, dtype=BFLOAT16, activations=(0, 2, 2)),
    "separable 3x3, 32 -> 16, bf16": SEPARABLE((32, 32, 112, 112), 16, dtype=BFLOAT16, activations=(0, 2, 0)),
    "separable 3x3 / 2, 128 -> 256, bf16": SEPARABLE(
        (32, 128, 56, 56), 256, 3, 2, dtype=BFLOAT16, activations=(0, 2, 2)
    ),
    "separable 5x5, 240 -> 40, bf16": SEPARABLE((32, 240, 28, 28), 40, 5, dtype=BFLOAT16, activations=(0, 4, 0)),
    "separable 5x5, 672 -> 192, silu, fp16": SEPARABLE(
        (32, 672, 14, 14), 192, 5, dtype=FLOAT16, residual=True, activations=(4, 4, 4)
    ),
    "separable 3x3, 728 -> 728, fp32": SEPARABLE((32, 728, 19, 19), 728, dtype=FLOAT32),
    "separable 3x3, 728 -> 728, TF32": SEPARABLE((32, 728, 19, 19), 728, dtype=FLOAT32, tf32=True),
    "separable 3x3 / 2, 128 -> 256, fp32": SEPARABLE(
        (32, 128, 56, 56), 256, 3, 2, dtype=FLOAT32, activations=(0, 2, 2)
    ),
    "separable 5x5, 672 -> 192, silu, fp32": SEPARABLE(
        (32, 672, 14, 14), 192, 5, dtype=FLOAT32, residual=True, activations=(4, 4, 4)
    ),
    "separable 5x5, 672 -> 192, silu, TF32": SEPARABLE(
        (32, 672, 14, 14), 192, 5, dtype=FLOAT32, residual=True, activations=(4, 4, 4), tf32=True
    ),
    "separable 7x7, 96 -> 192, bf16": SEPARABLE((32, 96, 28, 28), 192, 7, dtype=BFLOAT16, activations=(0, 5, 0)),
    "separable 3x3, 728 -> 728, fp64": SEPARABLE((4, 728, 19, 19), 728, dtype=FLOAT64),
    "separable 3x3, 728 -> 728, bf16, NCHW": SEPARABLE((32, 728, 19, 19), 728, dtype=BFLOAT16, memory_format=NCHW),
    "separable 3x3, 728 -> 728, fp32, NCHW": SEPARABLE((32, 728, 19, 19), 728, dtype=FLOAT32, memory_format=NCHW),
    "squeeze-excite 256 @ 56, bf16": SENET((32, 256, 56, 56), 16, dtype=BFLOAT16, quick=True),
    "squeeze-excite 2048 @ 7, bf16": SENET((32, 2048, 7, 7), 128, dtype=BFLOAT16),
    "squeeze-excite 672 @ 14, silu, bf16": EXCITE((32, 672, 14, 14), 28, dtype=BFLOAT16, activation=4),
    "squeeze-excite 256 @ 56, fp32": SENET((32, 256, 56, 56), 16, dtype=FLOAT32),
    "squeeze-excite 2048 @ 7, fp32": SENET((32, 2048, 7, 7), 128, dtype=FLOAT32),
    "squeeze-excite 256 @ 56, gelu, tanh, fp16": EXCITE(
        (32, 256, 56, 56), 16, dtype=FLOAT16, residual=True, activation=5, post_activation=6
    ),
    "squeeze-excite 256 @ 56, fp64": SENET((4, 256, 56, 56), 16, dtype=FLOAT64),
    "squeeze-excite 256 @ 56, bf16, NCHW": SENET((32, 256, 56, 56), 16, dtype=BFLOAT16, memory_format=NCHW),
    "squeeze-excite 2048 @ 7, fp32, NCHW": SENET((32, 2048, 7, 7), 128, dtype=FLOAT32, memory_format=NCHW),
    "response norm 5, bf16": RESPONSE_NORM((32, 96, 55, 55), 5, dtype=BFLOAT16, quick=True),
    "response norm 5, fp32": RESPONSE_NORM((32, 96, 55, 55), 5, dtype=FLOAT32),
    "response norm 5, fp32, 256": RESPONSE_NORM((32, 256, 27, 27), 5, dtype=FLOAT32),
    "response norm 5, fp64": RESPONSE_NORM((32, 96, 55, 55), 5, dtype=FLOAT64),
    "response norm 17, bf16": RESPONSE_NORM((32, 96, 55, 55), 17, dtype=BFLOAT16),
    "response norm 40, fp32": RESPONSE_NORM((32, 96, 55, 55), 40, dtype=FLOAT32),
    "response norm 5, bf16, NCHW": RESPONSE_NORM((32, 96, 55, 55), 5, dtype=BFLOAT16, memory_format=NCHW),
    "response norm 5, fp32, NCHW": RESPONSE_NORM((32, 256, 27, 27), 5, dtype=FLOAT32, memory_format=NCHW),
    "depthwise 3x3, stats, bf16": DEPTHWISE_STATS((32, 728, 19, 19), k=3, dtype=BFLOAT16),
    "depthwise 5x5, stats, silu, bf16": DEPTHWISE_STATS((32, 672, 14, 14), k=5, dtype=BFLOAT16, pre_activation=4),
    "depthwise 3x3 / 2, stats, fp32": DEPTHWISE_STATS((32, 96, 112, 112), k=3, stride=2, dtype=FLOAT32),
    "depthwise 5x5, stats, fp32": DEPTHWISE_STATS((32, 672, 14, 14), k=5, dtype=FLOAT32, pre_activation=4),
    "depthwise 3x3, stats, bf16, NCHW": DEPTHWISE_STATS((32, 728, 19, 19), k=3, dtype=BFLOAT16, memory_format=NCHW),
    "depthwise 3x3, stats, fp64": DEPTHWISE_STATS((4, 728, 19, 19), k=3, dtype=FLOAT64),
    "depthwise 5x5, squeeze, silu, bf16": case(squeeze, (32, 672, 14, 14), 5, 1, dtype=BFLOAT16),
    "depthwise 5x5, squeeze, fp32": case(squeeze, (32, 672, 14, 14), 5, 1, dtype=FLOAT32, activation=2),
    "depthwise 5x5, squeeze's gradient, silu, bf16": case(
        squeeze, (32, 672, 14, 14), 5, 1, dtype=BFLOAT16, backward=True
    ),
    "pointwise 728 -> 728, stats, bf16": POINTWISE_STATS((32, 728, 19, 19), 728, dtype=BFLOAT16),
    "pointwise 144 -> 40, stats, silu, fp32": POINTWISE_STATS((32, 144, 28, 28), 40, dtype=FLOAT32, pre_activation=4),
    "pointwise 144 -> 40, stats, TF32": POINTWISE_STATS((32, 144, 28, 28), 40, dtype=FLOAT32, tf32=True),
    "pointwise 64 -> 128 / 2, stats, bf16, NCHW": POINTWISE_STATS(
        (32, 64, 56, 56), 128, stride=2, dtype=BFLOAT16, memory_format=NCHW
    ),
    "pointwise 144 -> 40, stats, fp64": POINTWISE_STATS(  # what is scaled is loaded as sm_80's and 90's DMMA takes it
        (4, 144, 28, 28), 40, dtype=FLOAT64, wide=False
    ),
    "separable 3x3 728 -> 728, stats, bf16": case(stats, "separable_conv2d", (32, 728, 19, 19), 728, 3, dtype=BFLOAT16),
    "conv2d 3x3, stats, bf16": case(stats, "conv2d", (32, 64, 56, 56), 64, 3, dtype=BFLOAT16),
    "conv2d 3x3, stats, fp64": case(stats, "conv2d", (4, 64, 56, 56), 64, 3, dtype=FLOAT64),
    "gradients before silu, stats, bf16": case(stats_gradients, (32, 728, 19, 19), 3, dtype=BFLOAT16),
    "gradients before silu, stats, fp32": case(stats_gradients, (32, 728, 19, 19), 3, dtype=FLOAT32),
}
# Kernels that read partial sums, small vectors and weights, or (wide windows) single channels: a few bytes a thread.
NARROW = {
    "add_up_kernel",
    "depthwise_conv2d_bwd_weight_sum_kernel",
    "local_response_norm_wide_kernel",
    "squeeze_excite_bwd_weight_kernel",
    "squeeze_excite_product_kernel",
}


# A product's results times a filter's taps: pairs of float32, as an instruction's results lie in registers.
WITH_TAPS = {"inverted_residual_fwd_kernel", "pointwise_depthwise_fwd_kernel"}


def columns(options: dict) -> int:
    """Of a tile of strips."""
    return options["STRIPS"] * options["BLOCK_W"]


def product(
    dtype: torch.dtype, target: str, options: dict, side: Callable = operator.itemgetter("BLOCK_P")
) -> re.Pattern:
    """What multiplies matrices; `side`: the one of its tiles that goes along an instruction's rows."""
    kind = {FLOAT16: "f16", BFLOAT16: "bf16", FLOAT32: "xf32"}.get(dtype)
    if not options["TENSOR_CORES"]:
        if target == "gfx942":
            return re.compile(r"v_mfma_f(32|64)_\w+_f\1\b")
        return re.compile(r"\A(?![\s\S]*\b(?:UTC\w*MMA|HG?MMA))[\s\S]*\b(?:FFMA|DFMA|DMMA)")
    if target == "gfx942":
        return re.compile(rf"v_mfma_f32_\w+_{kind}\b")
    large = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"} if side(options) >= 64 else {}
    return re.compile(rf"\b{large.get(target, 'HMMA')}\b")


# By kernel: (dtype, target, options) -> what its assembly must hold, for those that multiply matrices.
PRODUCTS: dict[str, Callable[[torch.dtype, str, dict], re.Pattern]] = {
    "pointwise_conv2d_fwd_kernel": product,
    "pointwise_conv2d_bwd_input_kernel": product,
    "pointwise_conv2d_bwd_weight_kernel": functools.partial(product, side=operator.itemgetter("BLOCK_K")),
    "inverted_residual_fwd_kernel": functools.partial(product, side=columns),
    "pointwise_depthwise_fwd_kernel": functools.partial(product, side=columns),
    "separable_conv2d_fwd_kernel": product,
}
