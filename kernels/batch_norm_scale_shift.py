"""Batch normalisation from a convolution's sum and sum of squares by channel: what its output is to be scaled and
shifted by, mean and unbiased variance; and the gradients of the sums and of the affine parameters.

Layout    vectors (C), side by side, in the accumulator's dtype.
Tile      BLOCK_C channels;  grid one axis, a block of channels a program.
Bytes     each vector once, some 32 C; a launch is what it costs. As operators of plain torch it would be seventeen
          launches forward and more than twenty backward, for each of a network's 50 batch normalisations.
Numbers   float64 whatever the dtype: the variance is the mean of squares less the square of the mean.
"""

import torch
import triton
import triton.language as tl

from .launch import cdiv

__all__ = ["batch_norm_scale_shift", "batch_norm_scale_shift_backward"]

BLOCK = 128  # channels


@triton.jit
def statistics(sum, squares, o_c, m_c, count, EPS: tl.constexpr):
    """(mean, variance, 1 / sqrt(variance + EPS)), float64."""
    b_mean = tl.load(sum + o_c, m_c, 0.0).to(tl.float64) / count
    b_var = tl.load(squares + o_c, m_c, 0.0).to(tl.float64) / count - b_mean * b_mean
    b_var = tl.maximum(b_var, 0.0, propagate_nan=tl.PropagateNan.ALL)  # below 0 by rounding alone
    return b_mean, b_var, 1.0 / tl.sqrt(b_var + EPS)


@triton.jit
def load_double(p, o_c, m_c, OTHERWISE: tl.constexpr):
    """A vector in float64; OTHERWISE for one that is None."""
    if p is None:
        return tl.full(o_c.shape, OTHERWISE, tl.float64)
    else:
        return tl.load(p + o_c, m_c, 0.0).to(tl.float64)


@triton.jit(do_not_specialize=["count", "channels"])
def batch_norm_scale_shift_fwd_kernel(
    sum, squares, weight, bias, scale, shift, mean, var, count, channels, EPS: tl.constexpr, BLOCK_C: tl.constexpr
):
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    count = count.to(tl.float64)
    b_mean, b_var, b_rstd = statistics(sum, squares, o_c, m_c, count, EPS)
    b_scale = load_double(weight, o_c, m_c, 1.0) * b_rstd
    b_shift = load_double(bias, o_c, m_c, 0.0) - b_mean * b_scale
    dtype = scale.dtype.element_ty
    tl.store(scale + o_c, b_scale.to(dtype), m_c)
    tl.store(shift + o_c, b_shift.to(dtype), m_c)
    tl.store(mean + o_c, b_mean.to(dtype), m_c)
    tl.store(var + o_c, (b_var * (count / (count - 1.0))).to(dtype), m_c)


@triton.jit(do_not_specialize=["count", "channels"])
def batch_norm_scale_shift_bwd_kernel(
    grad_scale, grad_shift, sum, squares, weight, grad_sum, grad_squares, grad_weight, grad_bias, count, channels,
    EPS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    count = count.to(tl.float64)
    b_mean, b_var, b_rstd = statistics(sum, squares, o_c, m_c, count, EPS)
    b_weight = load_double(weight, o_c, m_c, 1.0)
    b_of_shift = tl.load(grad_shift + o_c, m_c, 0.0).to(tl.float64)
    b_of_scale = tl.load(grad_scale + o_c, m_c, 0.0).to(tl.float64) - b_of_shift * b_mean
    # Where all values are alike the variance is at its minimum.
    b_of_var = tl.where(b_var > 0.0, -0.5 * b_of_scale * b_weight * b_rstd * b_rstd * b_rstd, 0.0)
    b_of_sum = (-b_of_shift * b_weight * b_rstd - 2.0 * b_mean * b_of_var) / count
    dtype = grad_sum.dtype.element_ty
    tl.store(grad_sum + o_c, b_of_sum.to(dtype), m_c)
    tl.store(grad_squares + o_c, (b_of_var / count).to(dtype), m_c)
    tl.store(grad_weight + o_c, (b_of_scale * b_rstd).to(dtype), m_c)
    tl.store(grad_bias + o_c, b_of_shift.to(dtype), m_c)


def run(kernel, y, eps, *vectors):
    """Four vectors that the kernel makes of these."""
    N, C, H, W = y.shape
    vectors = [vector if vector is None else vector.contiguous() for vector in vectors]
    outputs = [vectors[0].new_empty(C) for _ in range(4)]
    with torch.cuda.device_of(y):
        kernel[(cdiv(C, BLOCK),)](*vectors, *outputs, N * H * W, C, EPS=eps, BLOCK_C=BLOCK, num_warps=4)
    return tuple(outputs)


def batch_norm_scale_shift(y, sum, squares, weight, bias, eps):
    """(scale, shift, mean, unbiased variance)"""
    return run(batch_norm_scale_shift_fwd_kernel, y, eps, sum, squares, weight, bias)


def batch_norm_scale_shift_backward(grad_scale, grad_shift, y, sum, squares, weight, eps):
    """Gradients of (sum, squares, weight, bias), from those of scale and shift."""
    return run(batch_norm_scale_shift_bwd_kernel, y, eps, grad_scale, grad_shift, sum, squares, weight)
