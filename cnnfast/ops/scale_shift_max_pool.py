"""What training has between a convolution with batch normalisation and a pooling: its affine map, the activation and
the pooling in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnnfast import reference
from cnnfast.ops import activations, backends
from cnnfast.ops._registration import empty_gradients, empty_image, fake, register_cuda, register_gradients
from cnnfast.ops.arguments import check_max_pool, check_scale_shift, check_x

_op = torch.ops.cnnfast.scale_shift_max_pool.default
LARGEST_KERNEL = 15  # a pixel of the window is a byte


def scale_shift_max_pool(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    max_pool: Sequence[int],
    *,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """F.max_pool2d of activation(x * scale + shift), by channel, in one pass; differentiable once, by another one.

    What is pooled is never in memory, nor is its gradient. Backward keeps x and a byte for each pooled value: which of
    its window's pixels that is, the first of equal ones, as in PyTorch; but before x * scale + shift is rounded to x's
    dtype, where PyTorch compares after it. Sums are the same bits on any number of threads.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16; channels_last memory is the fast path, and the output's
            memory format follows it.
        scale, shift: (C), float32 (float64 beside a float64 x).
        max_pool: (kernel, stride, padding) of a square pooling; a kernel of at most 15, a padding of at most half of
            it.
        activation: None, "identity", "relu", "relu6", "sigmoid", "silu", "gelu" (exact, by the error function) or
            "tanh".
        backend: "auto", "cpu", "triton" or "reference" (plain torch).

    Returns:
        (N, C, (H + 2 padding - kernel) // stride + 1, likewise of W), of x's dtype.

    Raises:
        TypeError: a dtype that doesn't fit, or something that isn't a tensor or a triple of ints where that is wanted.
        ValueError: a shape, size, name or device that doesn't fit, or a backend that can't run here.
    """
    shape = check_x(x)
    check_scale_shift(scale, shift, x)
    if max_pool is None:
        raise TypeError("max_pool must be three ints (kernel, stride, padding), got None")
    check_max_pool(max_pool, shape[2:], None)
    if max_pool[0] > LARGEST_KERNEL:
        raise ValueError(f"max_pool must have a kernel of at most {LARGEST_KERNEL}, got {max_pool!r}")
    act = activations.code("activation", activation)
    code = backends.code("scale_shift_max_pool", backend, x.device.type)
    if code == backends.REFERENCE:
        return reference.scale_shift_max_pool(x, scale, shift, max_pool, activation=activation)
    return _op(x, scale, shift, max_pool, act, code)[0]


@fake("scale_shift_max_pool")
def _(x, scale, shift, max_pool, activation, backend=0):
    kernel, stride, padding = max_pool
    size = [(side + 2 * padding - kernel) // stride + 1 for side in x.shape[2:]]
    y = empty_image(x, (*x.shape[:2], *size))
    return y, torch.empty_like(y, dtype=torch.uint8)


@fake("scale_shift_max_pool_backward")
def _(grad, x, scale, shift, taps, max_pool, activation, output_mask, backend=0):
    return empty_gradients(output_mask, x, (scale, shift))


register_gradients("scale_shift_max_pool")
register_cuda("scale_shift_max_pool")
