"""Activations and their derivatives, by the codes of the schemas: 0 identity, 1 relu, 2 relu6. NaN goes through."""

import triton
import triton.language as tl

RELU: tl.constexpr = tl.constexpr(1)
RELU6: tl.constexpr = tl.constexpr(2)


@triton.jit
def activate(v, CODE: tl.constexpr):
    tl.static_assert(CODE <= 2, "activation codes are 0 identity, 1 relu, 2 relu6")
    if CODE >= RELU:
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if CODE == RELU6:
        v = tl.minimum(v, 6.0, propagate_nan=tl.PropagateNan.ALL)
    return v


@triton.jit
def gate(v, grad, CODE: tl.constexpr):
    """grad * activate'(v). As in PyTorch: 0 at the kinks, and where v is NaN the gradient passes."""
    tl.static_assert(CODE <= 2, "activation codes are 0 identity, 1 relu, 2 relu6")
    if CODE >= RELU:
        grad = tl.where(v <= 0.0, 0.0, grad)
    if CODE == RELU6:
        grad = tl.where(v >= 6.0, 0.0, grad)
    return grad
