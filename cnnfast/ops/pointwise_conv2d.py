from __future__ import annotations

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
from cnnfast.ops.arguments import (
    Ints,
    check_bias,
    check_gate,
    check_inference,
    check_packed,
    check_pointwise_weight,
    check_residual,
    check_scale,
    check_weight,
    check_x,
    pair,
    pointwise_output_size,
    positive,
)

_op = torch.ops.cnnfast.pointwise_conv2d.default
_packed_op = torch.ops.cnnfast.pointwise_conv2d_packed.default
_pack_op = torch.ops.cnnfast.pack_pointwise_conv2d.default


def pointwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    *,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """1x1 convolution with gate, bias, residual and activation in the same pass over memory.

    activation(conv1x1(x * gate, weight) + bias + residual); differentiable once. bfloat16 and float16 are storage, the
    arithmetic is float32 (float64 for float64); a backend may round one intermediate, x * gate, to x's dtype.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16; channels_last memory is the fast path, and the output's
            memory format follows it.
        weight: (out_channels, C, 1, 1), of x's dtype.
        bias: (out_channels), of x's dtype, or float32 beside a bfloat16 or float16 x.
        stride: int or (vertical, horizontal).
        gate: (N, C, 1, 1), of x's dtype: what squeeze-excite scales each image's channels by.
        residual: of the output's shape and x's dtype; added before the activation.
        activation: None, "identity", "relu", "relu6",
            "sigmoid", "silu", "gelu" (exact, by the error function) or "tanh".
        backend: "auto", "cpu", "cuda", "triton" or "reference" (plain torch).

    Returns:
        (N, out_channels, ceil(H / stride), ceil(W / stride)), of x's dtype.

    Raises:
        TypeError: a dtype that doesn't fit, or something that isn't a tensor or an int where one is wanted.
        ValueError: a shape, number, name or device that doesn't fit, or a backend that can't run here.

    Network in Network, https://arxiv.org/abs/1312.4400; Xception, https://arxiv.org/abs/1610.02357.
    """
    shape = check_x(x)
    weight_shape = check_pointwise_weight("weight", weight, x, shape[1])
    check_bias("bias", bias, x, weight_shape[0])
    check_gate(gate, x)
    strides = pair("stride", stride)
    if residual is not None:
        check_residual(residual, x, (shape[0], weight_shape[0], *pointwise_output_size(shape, strides)))
    post = activations.code("activation", activation)
    code = backends.code("pointwise_conv2d", backend, x.device.type)
    if code == backends.REFERENCE:
        return reference.pointwise_conv2d(x, weight, bias, stride, gate=gate, residual=residual, activation=activation)
    return _op(x, weight, bias, gate, residual, strides, post, code)


def pack_pointwise_conv2d(weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """The weights laid out for the kernel, as one opaque uint8 tensor for pointwise_conv2d_packed.

    weight (out_channels, C, 1, 1) and bias (out_channels) as pointwise_conv2d takes them; on CPU. scale (out_channels),
    float32 (float64 beside float64): batch normalisation's, by which the sums are multiplied in that dtype, before the
    bias is added; the weights are never rounded for it. Inference only: under grad mode, weights that require grad are
    refused (ValueError).
    """
    check_weight("weight", weight)
    check_pointwise_weight("weight", weight, weight, weight.shape[1])
    check_bias("bias", bias, weight, weight.shape[0], like="weight")
    check_scale("scale", scale, weight, weight.shape[0], like="weight")
    if torch.is_grad_enabled():
        check_inference("pack_pointwise_conv2d", "detach it", weight=weight, bias=bias, scale=scale)
    backends.code("pointwise_conv2d_packed", "auto", weight.device.type)
    return _pack_op(weight, bias, scale)


def pointwise_conv2d_packed(
    x: Tensor,
    packed: Tensor,
    residual: Tensor | None = None,
    *,
    out_channels: int,
    stride: Ints = 1,
    gate: Tensor | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """pointwise_conv2d with weights packed by pack_pointwise_conv2d: the fast form, inference only.

    `out_channels` is that of the packed weight (a packing made for others raises); the rest as for pointwise_conv2d.
    x is float64 exactly where the weight was. Under grad mode, an x, gate or residual that requires grad is refused
    (ValueError).
    """
    shape = check_x(x)
    check_packed(packed, x, "pointwise_conv2d")
    positive("out_channels", out_channels)
    check_gate(gate, x)
    strides = pair("stride", stride)
    if residual is not None:
        check_residual(residual, x, (shape[0], out_channels, *pointwise_output_size(shape, strides)))
    post = activations.code("activation", activation)
    if torch.is_grad_enabled():
        check_inference("pointwise_conv2d_packed", "call pointwise_conv2d", x=x, gate=gate, residual=residual)
    code = backends.code("pointwise_conv2d_packed", backend, x.device.type)
    return _packed_op(x, packed, gate, residual, out_channels, strides, post, code)


@fake("pointwise_conv2d")
def _(x, weight, bias, gate, residual, stride, activation, backend=0):
    return empty_image(x, (x.shape[0], weight.shape[0], *pointwise_output_size(x.shape, stride)))


@fake("pointwise_conv2d_backward")
def _(grad, x, weight, bias, gate, residual, stride, activation, output_mask, backend=0):
    return empty_gradients(output_mask, x, (weight, bias, gate), residual, images=2)


@fake("pack_pointwise_conv2d")
def _(weight, bias, scale=None):
    out_channels, channels = weight.shape[0], weight.shape[1]
    return empty_packed("pointwise_conv2d", weight, channels, channels, out_channels, (1, 1))


@fake("pointwise_conv2d_packed")
def _(x, packed, gate, residual, out_channels, stride, activation, backend=0):
    return empty_image(x, (x.shape[0], out_channels, *pointwise_output_size(x.shape, stride)))


register_gradients("pointwise_conv2d", activation_after_residual=True)
register_cuda("pointwise_conv2d")
register_autocast("pointwise_conv2d")
register_autocast("pointwise_conv2d_packed")
