"""The launches that docs/kernels.md is made of: every op's forward pass and gradients at the networks' shapes."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from kernel_launches import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    NCHW,
    NHWC,
    batch_norm_scale_shift,
    conv2d,
    depthwise_conv2d,
    inverted_residual,
    local_response_norm,
    pointwise_conv2d,
    pointwise_conv2d_slope,
    pointwise_depthwise,
    scale_shift,
    scale_shift_excite,
    scale_shift_max_pool,
    separable_conv2d,
    squeeze,
    squeeze_excite,
    stats,
    stats_gradients,
)


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    launch: Callable[[], object]  # forward, then all gradients
    wide: bool = True  # x is to be loaded 16 bytes a thread at a time
    quick: bool = False  # compiled in the default test run, too


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
SCALE_SHIFT = functools.partial(case, scale_shift)
SCALED_POOL = functools.partial(case, scale_shift_max_pool)
SCALED_EXCITE = functools.partial(case, scale_shift_excite)
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
    "scale, shift, residual, relu, 728 @ 19, bf16": SCALE_SHIFT(
        (32, 728, 19, 19), dtype=BFLOAT16, residual=True, activation=1, quick=True
    ),
    "scale, shift 24 @ 56, fp32": SCALE_SHIFT((32, 24, 56, 56), dtype=FLOAT32, activation=0),
    "scale, shift, relu6, 1280 @ 7, fp16": SCALE_SHIFT((32, 1280, 7, 7), dtype=FLOAT16),
    "scale, shift, residual, gelu, 256 @ 56, fp32": SCALE_SHIFT(
        (32, 256, 56, 56), dtype=FLOAT32, residual=True, activation=5
    ),
    "scale, shift, residual, silu, 256 @ 56, fp64": SCALE_SHIFT(
        (4, 256, 56, 56), dtype=FLOAT64, residual=True, activation=4
    ),
    "scale, shift, residual, relu, 256 @ 56, bf16, NCHW": SCALE_SHIFT(
        (32, 256, 56, 56), dtype=BFLOAT16, memory_format=NCHW, residual=True, activation=1
    ),
    "scale, shift, silu, 240 @ 28, excite, bf16": SCALED_EXCITE((32, 240, 28, 28), 10, dtype=BFLOAT16, quick=True),
    "scale, shift, silu, 1152 @ 7, excite, fp16": SCALED_EXCITE((32, 1152, 7, 7), 48, dtype=FLOAT16),
    "scale, shift, silu, 96 @ 112, excite, fp32": SCALED_EXCITE((32, 96, 112, 112), 4, dtype=FLOAT32),
    "scale, shift, tanh, 240 @ 28, excite, fp64": SCALED_EXCITE((4, 240, 28, 28), 10, dtype=FLOAT64, activation=6),
    "scale, shift, silu, 240 @ 28, excite, fp32, NCHW": SCALED_EXCITE(
        (32, 240, 28, 28), 10, dtype=FLOAT32, memory_format=NCHW
    ),
    "scale, shift, 3x3 max pool / 2, 128 @ 147, bf16": SCALED_POOL(
        (32, 128, 147, 147), dtype=BFLOAT16, activation=0, quick=True
    ),
    "scale, shift, 3x3 max pool / 2, 728 @ 37, fp32": SCALED_POOL((32, 728, 37, 37), dtype=FLOAT32, activation=0),
    "scale, shift, relu, 2x2 max pool / 2, 64 @ 56, fp16": SCALED_POOL(
        (32, 64, 56, 56), dtype=FLOAT16, max_pool=(2, 2, 0)
    ),
    "scale, shift, silu, 3x3 max pool / 2, 64 @ 112, fp64": SCALED_POOL((4, 64, 112, 112), dtype=FLOAT64, activation=4),
    "scale, shift, relu, 3x3 max pool / 2, 64 @ 112, bf16, NCHW": SCALED_POOL(
        (32, 64, 112, 112), dtype=BFLOAT16, memory_format=NCHW
    ),
    "batch norm of sums, 960, bf16": case(batch_norm_scale_shift, (32, 960, 7, 7), dtype=BFLOAT16, quick=True),
    "batch norm of sums, 960, fp64": case(batch_norm_scale_shift, (4, 960, 7, 7), dtype=FLOAT64),
    "gradients before silu, stats, bf16": case(stats_gradients, (32, 728, 19, 19), 3, dtype=BFLOAT16),
    "gradients before silu, stats, fp32": case(stats_gradients, (32, 728, 19, 19), 3, dtype=FLOAT32),
}
# Kernels that read partial sums, small vectors and weights, or (wide windows) single channels: a few bytes a thread.
NARROW = {
    "add_up_kernel",
    "batch_norm_scale_shift_bwd_kernel",
    "batch_norm_scale_shift_fwd_kernel",
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
