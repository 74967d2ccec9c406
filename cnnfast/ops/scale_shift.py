"""What training needs between convolutions beside <op>_stats: batch normalisation's affine map with what follows it,
where that isn't the prologue of the next convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnnfast import reference
from cnnfast.ops import activations, backends
from cnnfast.ops._registration import (
    empty_gradients,
    empty_image,
    fake,
    register_autocast,
    register_cuda,
    register_gradients,
)
from cnnfast.ops.arguments import check_excite, check_residual, check_scale_shift, check_x

_op = torch.ops.cnnfast.scale_shift.default
_excite_op = torch.ops.cnnfast.scale_shift_excite.default


def scale_shift(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """activation(x * scale + shift + residual), by channel, in one pass; differentiable once, by another one.

    Backward keeps x, and residual where there is an activation, and computes the rest again. No intermediate is rounded
    to x's dtype. Sums are the same bits on any number of threads, and from
    run to run.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16; channels_last memory is the fast path, and the output's
            memory format follows it.
        scale, shift: (C), float32 (float64 beside a float64 x).
        residual: of x's shape and dtype.
        activation: None, "identity", "relu", "relu6", "sigmoid", "silu", "gelu" (exact, by the error function) or
            "tanh".
        backend: "auto", "cpu", "triton" or "reference" (plain torch).

    Returns:
        (N, C, H, W), of x's dtype.

    Raises:
        TypeError: a dtype that doesn't fit, or something that isn't a tensor where one is wanted.
        ValueError: a shape, name or device that doesn't fit, or a backend that can't run here.
    """
    shape = check_x(x)
    check_scale_shift(scale, shift, x)
    check_residual(residual, x, shape)
    act = activations.code("activation", activation)
    code = backends.code("scale_shift", backend, x.device.type)
    if code == backends.REFERENCE:
        return reference.scale_shift(x, scale, shift, residual, activation=activation)
    return _op(x, scale, shift, residual, act, code)


def scale_shift_excite(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    reduce_bias: Tensor | None = None,
    expand_bias: Tensor | None = None,
    *,
    activation: str | None = None,
    se_activation: str | None = "relu",
    gate_activation: str | None = "sigmoid",
    backend: str = "auto",
) -> Tensor:
    """squeeze_excite of z = activation(x * scale + shift), without z in memory: z * gates.

    Two passes over x, backward too; backward keeps x and computes the rest again. x, scale, shift, activation, backend,
    what is returned and raised as for scale_shift; weights, biases, se_activation (`activation` there) and
    gate_activation as for squeeze_excite.
    """
    shape = check_x(x)
    check_scale_shift(scale, shift, x)
    check_excite(x, shape[1], reduce_weight, expand_weight, reduce_bias, expand_bias)
    names: dict[str, Any] = dict(activation=activation, se_activation=se_activation, gate_activation=gate_activation)
    codes = [activations.code(name, value) for name, value in names.items()]
    code = backends.code("scale_shift_excite", backend, x.device.type)
    if code == backends.REFERENCE:
        weights = reduce_weight, expand_weight, reduce_bias, expand_bias
        return reference.scale_shift_excite(x, scale, shift, *weights, **names)
    return _excite_op(x, scale, shift, reduce_weight, reduce_bias, expand_weight, expand_bias, *codes, code)


@fake("scale_shift")
@fake("scale_shift_excite")
def _(x, *arguments):
    return empty_image(x, x.shape)


@fake("scale_shift_backward")
def _(grad, x, scale, shift, residual, activation, output_mask, backend=0):
    return empty_gradients(output_mask, x, (scale, shift), residual, images=2)


@fake("scale_shift_excite_backward")
def _(grad, x, *arguments):
    return empty_gradients(arguments[9], x, arguments[:6])


register_gradients("scale_shift", activation_after_residual=True)
register_gradients("scale_shift_excite")
register_autocast("scale_shift_excite")
register_cuda("scale_shift")
register_cuda("scale_shift_excite")
