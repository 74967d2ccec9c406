from __future__ import annotations

from collections.abc import Sequence

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
    check_depthwise_weight,
    check_inference,
    check_max_pool,
    check_packed,
    check_pointwise_weight,
    check_residual,
    check_weight,
    check_x,
    edges,
    output_size,
    pair,
    positive,
)

_op = torch.ops.cnnfast.separable_conv2d.default
_packed_op = torch.ops.cnnfast.separable_conv2d_packed.default
_pack_op = torch.ops.cnnfast.pack_separable_conv2d.default


def separable_conv2d(
    x: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    dw_bias: Tensor | None = None,
    pw_bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    *,
    residual: Tensor | None = None,
    pre_activation: str | None = None,
    mid_activation: str | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Depthwise-separable convolution: depthwise, then pointwise, the tensor between them never in memory.

    t = mid_activation(depthwise(pre_activation(x), dw_weight) + dw_bias);
    activation(conv1x1(t, pw_weight) + pw_bias + residual); differentiable once. bfloat16 and float16 are storage, the
    arithmetic is float32 (float64 for float64); a backend may round one intermediate, t, to x's dtype.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16; channels_last memory is the fast path, and the output's
            memory format follows it.
        dw_weight: (C * multiplier, 1, kh, kw), of x's dtype.
        pw_weight: (out_channels, C * multiplier, 1, 1), of x's dtype.
        dw_bias, pw_bias: (C * multiplier) and (out_channels), of x's dtype, or float32 beside a bfloat16 or float16 x.
        stride, dilation: of the depthwise stage, int or (vertical, horizontal).
        padding: of the depthwise stage: int, (vertical, horizontal), (top, bottom, left, right), or "same": output =
            ceil(input / stride), the odd row or column of zeros at the bottom or right.
        residual: of the output's shape and x's dtype; added before the last activation.
        pre_activation, mid_activation, activation: None, "identity", "relu", "relu6",
            "sigmoid", "silu", "gelu" (exact, by the error function) or "tanh".
        backend: "auto", "cpu", "cuda", "triton" or "reference" (plain torch).

    Returns:
        (N, out_channels, Ho, Wo), of x's dtype.

    Raises:
        TypeError: a dtype that doesn't fit, or something that isn't a tensor or an int where one is wanted.
        ValueError: a shape, number, name or device that doesn't fit, or a backend that can't run here.

    Xception, https://arxiv.org/abs/1610.02357; MobileNets, https://arxiv.org/abs/1704.04861.
    """
    shape = check_x(x)
    dw_shape = check_depthwise_weight("dw_weight", dw_weight, x, shape[1])
    pw_shape = check_pointwise_weight("pw_weight", pw_weight, x, dw_shape[0])
    check_bias("dw_bias", dw_bias, x, dw_shape[0])
    check_bias("pw_bias", pw_bias, x, pw_shape[0])
    strides, pads, dilations = pair("stride", stride), edges(padding), pair("dilation", dilation)
    size = output_size(shape, dw_shape[2:], strides, pads, dilations)
    check_residual(residual, x, (shape[0], pw_shape[0], *size))
    pre, mid, post = (
        activations.code("pre_activation", pre_activation),
        activations.code("mid_activation", mid_activation),
        activations.code("activation", activation),
    )
    code = backends.code("separable_conv2d", backend, x.device.type)
    if code == backends.REFERENCE:
        return reference.separable_conv2d(
            x,
            dw_weight,
            pw_weight,
            dw_bias,
            pw_bias,
            stride,
            padding,
            dilation,
            residual=residual,
            pre_activation=pre_activation,
            mid_activation=mid_activation,
            activation=activation,
        )
    return _op(x, dw_weight, dw_bias, pw_weight, pw_bias, residual, strides, pads, dilations, pre, mid, post, code)


def pack_separable_conv2d(
    dw_weight: Tensor, pw_weight: Tensor, dw_bias: Tensor | None = None, pw_bias: Tensor | None = None
) -> Tensor:
    """The weights laid out for the kernel, as one opaque uint8 tensor for separable_conv2d_packed.

    Weights and biases as separable_conv2d takes them; on CPU. Inference only: under grad mode, weights that require
    grad are refused (ValueError).
    """
    check_weight("dw_weight", dw_weight)
    check_depthwise_weight("dw_weight", dw_weight, dw_weight, 1)
    check_pointwise_weight("pw_weight", pw_weight, dw_weight, dw_weight.shape[0], like="dw_weight")
    check_bias("dw_bias", dw_bias, dw_weight, dw_weight.shape[0], like="dw_weight")
    check_bias("pw_bias", pw_bias, dw_weight, pw_weight.shape[0], like="dw_weight")
    if torch.is_grad_enabled():
        check_inference(
            "pack_separable_conv2d",
            "detach it",
            dw_weight=dw_weight,
            pw_weight=pw_weight,
            dw_bias=dw_bias,
            pw_bias=pw_bias,
        )
    backends.code("separable_conv2d_packed", "auto", dw_weight.device.type)
    return _pack_op(dw_weight, dw_bias, pw_weight, pw_bias)


def separable_conv2d_packed(
    x: Tensor,
    packed: Tensor,
    residual: Tensor | None = None,
    *,
    out_channels: int,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    pre_activation: str | None = None,
    mid_activation: str | None = None,
    activation: str | None = None,
    max_pool: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """separable_conv2d with weights packed by pack_separable_conv2d: the fast form, inference only.

    `out_channels` and `kernel_size` are those of the packed weights (a packing made for others raises); the rest as
    for separable_conv2d. x is float64 exactly where the weights were. Under grad mode, an x or residual that requires
    grad is refused (ValueError).

    `max_pool`, (kernel, stride, padding), has the result max-pooled as F.max_pool2d does, in the same pass: the
    unpooled one is never in memory. Not together with a residual.
    """
    shape = check_x(x)
    check_packed(packed, x, "separable_conv2d")
    positive("out_channels", out_channels)
    kernel, strides, pads, dilations = (
        pair("kernel_size", kernel_size),
        pair("stride", stride),
        edges(padding),
        pair("dilation", dilation),
    )
    size = output_size(shape, kernel, strides, pads, dilations)
    check_residual(residual, x, (shape[0], out_channels, *size))
    pool = check_max_pool(max_pool, size, residual)
    pre, mid, post = (
        activations.code("pre_activation", pre_activation),
        activations.code("mid_activation", mid_activation),
        activations.code("activation", activation),
    )
    if torch.is_grad_enabled():
        check_inference("separable_conv2d_packed", "call separable_conv2d", x=x, residual=residual)
    code = backends.code("separable_conv2d_packed", backend, x.device.type)
    return _packed_op(x, packed, residual, out_channels, kernel, strides, pads, dilations, pre, mid, post, pool, code)


@fake("separable_conv2d")
def _(
    x,
    dw_weight,
    dw_bias,
    pw_weight,
    pw_bias,
    residual,
    stride,
    padding,
    dilation,
    pre_activation,
    mid_activation,
    activation,
    backend=0,
):
    size = output_size(x.shape, dw_weight.shape[2:], stride, padding, dilation)
    return empty_image(x, (x.shape[0], pw_weight.shape[0], *size))


@fake("separable_conv2d_backward")
def _(grad, x, dw_weight, dw_bias, pw_weight, pw_bias, residual, *options):
    output_mask = options[6]  # after stride, padding, dilation and three activations
    return empty_gradients(output_mask, x, (dw_weight, dw_bias, pw_weight, pw_bias), residual, images=2)


@fake("pack_separable_conv2d")
def _(dw_weight, dw_bias, pw_weight, pw_bias):
    channels, taps = dw_weight.shape[0], dw_weight.shape[2] * dw_weight.shape[3]
    return empty_packed("separable_conv2d", dw_weight, channels, channels, pw_weight.shape[0], taps)


@fake("separable_conv2d_packed")
def _(
    x,
    packed,
    residual,
    out_channels,
    kernel_size,
    stride,
    padding,
    dilation,
    pre_activation,
    mid_activation,
    activation,
    max_pool,
    backend=0,
):
    size = output_size(x.shape, kernel_size, stride, padding, dilation)
    if len(max_pool) == 3:
        kernel, stride, padding = max_pool
        size = output_size((*x.shape[:2], *size), (kernel,) * 2, (stride,) * 2, (padding,) * 4, (1, 1))
    return empty_image(x, (x.shape[0], out_channels, *size))


register_gradients("separable_conv2d", activation_after_residual=True)
register_cuda("separable_conv2d")
register_autocast("separable_conv2d")
register_autocast("separable_conv2d_packed")
