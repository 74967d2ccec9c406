from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnnfast import reference
from cnnfast.ops import activations, backends
from cnnfast.ops._registration import (
    empty_gradients,
    empty_image,
    empty_packed,
    fake,
    register_autocast,
    register_cuda,
    register_gradients,
)
from cnnfast.ops.arguments import check_excite, check_inference, check_packed, check_residual, check_weight, check_x

_op = torch.ops.cnnfast.squeeze_excite.default
_packed_op = torch.ops.cnnfast.squeeze_excite_packed.default
_pack_op = torch.ops.cnnfast.pack_squeeze_excite.default


def squeeze_excite(
    x: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    reduce_bias: Tensor | None = None,
    expand_bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = "relu",
    gate_activation: str | None = "sigmoid",
    post_activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Squeeze-and-excitation: each channel times a gate that is computed from the means of all channels.

    m = mean of x over its pixels; gates = gate_activation(conv1x1(activation(conv1x1(m, reduce_weight) + reduce_bias),
    expand_weight) + expand_bias); post_activation(x * gates + residual); differentiable once. No intermediate is
    rounded to x's dtype: bfloat16 and float16 are storage, the arithmetic is float32 (float64 for float64).

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16; channels_last memory is the fast path, and the output's
            memory format follows it.
        reduce_weight: (R, C, 1, 1), of x's dtype.
        expand_weight: (C, R, 1, 1), of x's dtype.
        reduce_bias, expand_bias: (R) and (C), of x's dtype, or float32 beside a bfloat16 or float16 x.
        residual: of x's shape and dtype; added before post_activation, as SENet's blocks do.
        activation, gate_activation, post_activation: None, "identity", "relu", "relu6", "sigmoid", "silu", "gelu"
            (exact, by the error function) or "tanh".
        backend: "auto", "cpu", "cuda", "triton" or "reference" (plain torch).

    Returns:
        (N, C, H, W), of x's dtype.

    Raises:
        TypeError: a dtype that doesn't fit, or something that isn't a tensor where one is wanted.
        ValueError: a shape, name or device that doesn't fit, or a backend that can't run here.

    Squeeze-and-Excitation Networks, https://arxiv.org/abs/1709.01507.
    """
    shape = check_x(x)
    check_excite(x, shape[1], reduce_weight, expand_weight, reduce_bias, expand_bias)
    check_residual(residual, x, shape)
    codes = _codes(activation, gate_activation, post_activation)
    code = backends.code("squeeze_excite", backend, x.device.type)
    if code == backends.REFERENCE:
        return reference.squeeze_excite(
            x,
            reduce_weight,
            expand_weight,
            reduce_bias,
            expand_bias,
            residual=residual,
            activation=activation,
            gate_activation=gate_activation,
            post_activation=post_activation,
        )
    return _op(x, reduce_weight, reduce_bias, expand_weight, expand_bias, residual, *codes, code)


def pack_squeeze_excite(
    reduce_weight: Tensor,
    expand_weight: Tensor,
    reduce_bias: Tensor | None = None,
    expand_bias: Tensor | None = None,
) -> Tensor:
    """The weights laid out for the kernel, as one opaque uint8 tensor for squeeze_excite_packed.

    Weights and biases as squeeze_excite takes them; on CPU. Inference only: under grad mode, weights that require grad
    are refused (ValueError).
    """
    check_weight("reduce_weight", reduce_weight)
    channels = reduce_weight.shape[1]
    weights: dict[str, Any] = dict(
        reduce_weight=reduce_weight, expand_weight=expand_weight, reduce_bias=reduce_bias, expand_bias=expand_bias
    )
    check_excite(reduce_weight, channels, **weights, like="reduce_weight")
    if torch.is_grad_enabled():
        check_inference("pack_squeeze_excite", "detach it", **weights)
    backends.code("squeeze_excite_packed", "auto", reduce_weight.device.type)
    return _pack_op(reduce_weight, reduce_bias, expand_weight, expand_bias)


def squeeze_excite_packed(
    x: Tensor,
    packed: Tensor,
    residual: Tensor | None = None,
    *,
    activation: str | None = "relu",
    gate_activation: str | None = "sigmoid",
    post_activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """squeeze_excite with weights packed by pack_squeeze_excite: the fast form, inference only.

    x has the channels that the weights were packed for (others raise), and is float64 exactly where they were; the rest
    as for squeeze_excite. Under grad mode, an x or residual that requires grad is refused (ValueError).
    """
    shape = check_x(x)
    check_packed(packed, x, "squeeze_excite")
    check_residual(residual, x, shape)
    codes = _codes(activation, gate_activation, post_activation)
    if torch.is_grad_enabled():
        check_inference("squeeze_excite_packed", "call squeeze_excite", x=x, residual=residual)
    code = backends.code("squeeze_excite_packed", backend, x.device.type)
    return _packed_op(x, packed, residual, *codes, code)


def _codes(activation: str | None, gate_activation: str | None, post_activation: str | None) -> tuple[int, int, int]:
    return (
        activations.code("activation", activation),
        activations.code("gate_activation", gate_activation),
        activations.code("post_activation", post_activation),
    )


@fake("squeeze_excite")
def _(x, *arguments):
    return empty_image(x, x.shape)


@fake("squeeze_excite_backward")
def _(grad, x, reduce_weight, reduce_bias, expand_weight, expand_bias, residual, *options):
    parameters = (reduce_weight, reduce_bias, expand_weight, expand_bias)
    return empty_gradients(options[3], x, parameters, residual, images=2)


@fake("pack_squeeze_excite")
def _(reduce_weight, reduce_bias, expand_weight, expand_bias):
    squeezed, channels = reduce_weight.shape[:2]
    return empty_packed("squeeze_excite", reduce_weight, channels, channels, channels, (1, 1), squeezed)


@fake("squeeze_excite_packed")
def _(x, *arguments):
    return empty_image(x, x.shape)


register_gradients("squeeze_excite", activation_after_residual=True)
register_cuda("squeeze_excite")
register_autocast("squeeze_excite")
register_autocast("squeeze_excite_packed")
