from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnnfast import reference
from cnnfast.ops import backends
from cnnfast.ops._registration import fake, library, register_cuda
from cnnfast.ops.arguments import check_x

_op = torch.ops.cnnfast.batch_norm_scale_shift.default
_backward_op = torch.ops.cnnfast.batch_norm_scale_shift_backward.default


def batch_norm_scale_shift(
    y: Tensor,
    sum: Tensor,
    squares: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch normalisation of y from the sums that an <op>_stats returns with it: what y is to be scaled and shifted by.

    In float64 whatever the dtype. The variance is the mean of squares less the square of the mean, and at least 0: in
    float32 its relative error is about 2^-23 (mean / deviation)^2. Differentiable once, through scale and shift.

    Args:
        y: (N, C, H, W); its shape tells how many values are in a sum.
        sum, squares: (C), float32 (float64 beside a float64 y).
        weight, bias: (C), of any floating dtype; None for ones and zeros.
        eps: added to the variance.
        backend: "auto", "cpu", "triton" or "reference" (plain torch).

    Returns:
        scale = weight / sqrt(var + eps) and shift = bias - mean * scale; the mean and the unbiased variance, for
        running statistics, not differentiable. (C) each, of the dtype of `sum`.

    Raises:
        TypeError: a dtype that doesn't fit, or something that isn't a tensor where one is wanted.
        ValueError: a shape or device that doesn't fit, or a backend that can't run here.

    Batch Normalization, https://arxiv.org/abs/1502.03167.
    """
    shape = check_x(y)
    dtype = torch.promote_types(y.dtype, torch.float32)
    for name, row in (("sum", sum), ("squares", squares), ("weight", weight), ("bias", bias)):
        if row is None and name in ("weight", "bias"):
            continue
        if not isinstance(row, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(row).__name__}")
        if name in ("sum", "squares") and row.dtype is not dtype:
            raise TypeError(f"{name} must have dtype {dtype} beside a y of {y.dtype}, got {row.dtype}")
        if row.device != y.device:
            raise ValueError(f"{name} must be on {y.device} like y, got {row.device}")
        if tuple(row.shape) != (shape[1],):
            raise ValueError(f"{name} must have shape ({shape[1]},), got {tuple(row.shape)}")
    weight, bias = (None if row is None else row.to(dtype) for row in (weight, bias))
    code = backends.code("batch_norm_scale_shift", backend, y.device.type)
    if code == backends.REFERENCE:
        return reference.batch_norm_scale_shift(y, sum, squares, weight, bias, eps)
    return _op(y, sum, squares, weight, bias, eps, code)


@fake("batch_norm_scale_shift")
def _(y, sum, squares, weight, bias, eps, backend=0):
    return tuple(torch.empty_like(sum) for _ in range(4))


@fake("batch_norm_scale_shift_backward")
def _(grad_scale, grad_shift, y, sum, squares, weight, eps, backend=0):
    return tuple(torch.empty_like(sum) for _ in range(4))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    y, sum, squares, weight, _, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(y, sum, squares, weight)
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx: Any, grad_scale: Tensor, grad_shift: Tensor, *_: Any) -> tuple[Any, ...]:
    gradients = _backward_op(grad_scale, grad_shift, *ctx.saved_tensors, ctx.eps, ctx.backend)
    wanted = (gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad[1:], strict=False))
    return (None, *wanted, None, None)


def _backward_twice(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        'batch_norm_scale_shift can be differentiated once; backend="reference" can be differentiated again'
    )


torch.library.register_autograd("cnnfast::batch_norm_scale_shift", _backward, setup_context=_setup_context, lib=library)
torch.library.register_autograd("cnnfast::batch_norm_scale_shift_backward", _backward_twice, lib=library)
register_cuda("batch_norm_scale_shift")
