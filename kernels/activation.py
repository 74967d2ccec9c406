"""Activations and their derivatives, by the codes of the schemas: 0 identity, 1 relu, 2 relu6, 3 sigmoid, 4 silu,
5 gelu, 6 tanh. Element by element, in v's dtype, float32 or float64. NaN goes through; -Inf in silu and gelu is NaN, as
PyTorch's.

Numbers   exp is the GPU's fast one in float32, whose error grows with |v| where its result is small: errors are some
          2^-24 of max(|v|, 1), not of the result; those of tanh a few 2^-24 of itself.
"""

import triton
import triton.language as tl

RELU: tl.constexpr = tl.constexpr(1)
RELU6: tl.constexpr = tl.constexpr(2)
SIGMOID: tl.constexpr = tl.constexpr(3)
SILU: tl.constexpr = tl.constexpr(4)
GELU: tl.constexpr = tl.constexpr(5)
TANH: tl.constexpr = tl.constexpr(6)


@triton.jit
def logistic(v):
    """(sigmoid(v), sigmoid(-v)), both without cancellation."""
    e = tl.exp(-tl.abs(v))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(v >= 0.0, large, small), tl.where(v >= 0.0, small, large)


@triton.jit
def normal_integral(v):
    """The normal distribution's integral up to v."""
    return 0.5 + 0.5 * tl.erf(v * 0.70710678118654752440)


@triton.jit
def hyperbolic_tangent(v):
    """From exp, but near 0, where that loses digits, sinh / cosh by their series: 2^-56 of it at 0.6."""
    square = tl.minimum(v * v, 0.36)
    sinh = 1.0 + square * (1.0 / 210.0) * (1.0 + square * (1.0 / 272.0))
    cosh = 1.0 + square * (1.0 / 182.0) * (1.0 + square * (1.0 / 240.0))
    for n in tl.static_range(6, 0, -1):
        sinh = 1.0 + square * (1.0 / (2 * n * (2 * n + 1))) * sinh
        cosh = 1.0 + square * (1.0 / (2 * n * (2 * n - 1))) * cosh
    e = tl.exp(-2.0 * tl.abs(v))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(v) < 0.6, v * sinh / cosh, tl.where(v < 0.0, -large, large))


@triton.jit
def scaled(v, scale, shift):
    """v * scale + shift, without one that is None."""
    if scale is not None:
        v = v * scale
    if shift is not None:
        v = v + shift
    return v


@triton.jit
def activate_loaded(v, mask, CODE: tl.constexpr, scale=None, shift=None):
    """activate(v * scale + shift) of what was loaded under `mask`, and 0 elsewhere: beyond the edge is padding."""
    v = scaled(v, scale, shift)
    if CODE != 0:
        v = activate(v, CODE)
    if (CODE == SIGMOID) | (scale is not None):  # what doesn't take 0 to 0
        v = tl.where(mask, v, 0.0)
    return v


@triton.jit
def activate(v, CODE: tl.constexpr):
    tl.static_assert(CODE <= 6, "activation codes are 0 to 6")
    if (CODE >= RELU) & (CODE <= RELU6):
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if CODE == RELU6:
        v = tl.minimum(v, 6.0, propagate_nan=tl.PropagateNan.ALL)
    if CODE == SIGMOID:
        v, _ = logistic(v)
    if CODE == SILU:
        sigmoid, _ = logistic(v)
        v = v * sigmoid
    if CODE == GELU:
        v = v * normal_integral(v)
    if CODE == TANH:
        v = hyperbolic_tangent(v)
    return v


@triton.jit
def gate(v, grad, CODE: tl.constexpr):
    """grad * activate'(v). As in PyTorch: relu's is 0 at the kinks, and where v is NaN the gradient passes."""
    tl.static_assert(CODE <= 6, "activation codes are 0 to 6")
    if (CODE >= RELU) & (CODE <= RELU6):
        grad = tl.where(v <= 0.0, 0.0, grad)
    if CODE == RELU6:
        grad = tl.where(v >= 6.0, 0.0, grad)
    if CODE == SIGMOID:
        sigmoid, rest = logistic(v)
        grad = grad * (sigmoid * rest)
    if CODE == SILU:
        sigmoid, rest = logistic(v)
        grad = grad * (sigmoid * (1.0 + v * rest))
    if CODE == GELU:
        density = tl.exp(-0.5 * v * v) * 0.39894228040143267794
        grad = grad * (normal_integral(v) + v * density)
    if CODE == TANH:
        tanh = hyperbolic_tangent(v)
        grad = grad * (1.0 - tanh * tanh)
    return grad
