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
    check_scale,
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
    order: str = "depthwise_first",
    residual: Tensor | None = None,
    pre_activation: str | None = None,
    mid_activation: str | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Depthwise-separable convolution: depthwise, then pointwise, the tensor between them never in memory.

    t = mid_activation(depthwise(pre_activation(x), dw_weight) + dw_bias);
    activation(conv1x1(t, pw_weight) + pw_bias + residual); differentiable once. bfloat16 and float16 are storage, the
    arithmetic is float32 (float64 for float64); a backend may round one intermediate to x's dtype: t, or with
    order="pointwise_first" pre_activation(x).

    order="pointwise_first" is the other way round, Inception's and Xception's "modified" form:
    t = mid_activation(conv1x1(pre_activation(x), pw_weight) + pw_bias);
    activation(depthwise(t, dw_weight) + dw_bias + residual).

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16; channels_last memory is the fast path, and the output's
            memory format follows it.
        dw_weight: (C * multiplier, 1, kh, kw), of x's dtype; with the pointwise stage first (out_channels, 1, kh, kw),
            out_channels a multiple of pw_weight's K.
        pw_weight: (out_channels, C * multiplier, 1, 1), of x's dtype; with the pointwise stage first (K, C, 1, 1).
        dw_bias, pw_bias: a number for each channel that their stage makes, of x's dtype, or float32 beside a bfloat16
            or float16 x.
        stride, dilation: of the depthwise stage, int or (vertical, horizontal).
        padding: of the depthwise stage: int, (vertical, horizontal), (top, bottom, left, right), or "same": output =
            ceil(input / stride), the odd row or column of zeros at the bottom or right.
        order: "depthwise_first" or "pointwise_first".
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
    pointwise_first = _pointwise_first(order)
    out_channels = _check_weights(x, shape[1], dw_weight, pw_weight, dw_bias, pw_bias, pointwise_first)
    strides, pads, dilations = pair("stride", stride), edges(padding), pair("dilation", dilation)
    size = output_size(shape, dw_weight.shape[2:], strides, pads, dilations)
    check_residual(residual, x, (shape[0], out_channels, *size))
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
            order=order,
            residual=residual,
            pre_activation=pre_activation,
            mid_activation=mid_activation,
            activation=activation,
        )
    geometry = strides, pads, dilations, pointwise_first
    return _op(x, dw_weight, dw_bias, pw_weight, pw_bias, residual, *geometry, pre, mid, post, code)


def pack_separable_conv2d(
    dw_weight: Tensor,
    pw_weight: Tensor,
    dw_bias: Tensor | None = None,
    pw_bias: Tensor | None = None,
    dw_scale: Tensor | None = None,
    pw_scale: Tensor | None = None,
    *,
    order: str = "depthwise_first",
) -> Tensor:
    """The weights laid out for the kernel, as one opaque uint8 tensor for separable_conv2d_packed.

    Weights, biases and order as separable_conv2d takes them; on CPU. dw_scale, pw_scale: a number for each channel that
    their stage makes, float32 (float64 beside float64): batch normalisation's, by which the sums are multiplied in that
    dtype, before the bias is added; the weights are never rounded for it. Inference only: under grad mode, weights that
    require grad are refused (ValueError).
    """
    check_weight("dw_weight", dw_weight)
    check_weight("pw_weight", pw_weight)
    pointwise_first = _pointwise_first(order)
    channels = pw_weight.shape[1] if pointwise_first else 1
    _check_weights(dw_weight, channels, dw_weight, pw_weight, dw_bias, pw_bias, pointwise_first, like="dw_weight")
    check_scale("dw_scale", dw_scale, dw_weight, dw_weight.shape[0], like="dw_weight")
    check_scale("pw_scale", pw_scale, dw_weight, pw_weight.shape[0], like="dw_weight")
    if torch.is_grad_enabled():
        check_inference(
            "pack_separable_conv2d",
            "detach it",
            dw_weight=dw_weight,
            pw_weight=pw_weight,
            dw_bias=dw_bias,
            pw_bias=pw_bias,
            dw_scale=dw_scale,
            pw_scale=pw_scale,
        )
    backends.code("separable_conv2d_packed", "auto", dw_weight.device.type)
    return _pack_op(dw_weight, dw_bias, pw_weight, pw_bias, pointwise_first, dw_scale, pw_scale)


def _pointwise_first(order: str) -> bool:
    wanted = "order must be 'depthwise_first' or 'pointwise_first'"
    if not isinstance(order, str):  # an array is neither equal nor unequal
        raise TypeError(f"{wanted}, got {type(order).__name__}")
    if order not in ("depthwise_first", "pointwise_first"):
        raise ValueError(f"{wanted}, got {order!r}")
    return order == "pointwise_first"


def _check_weights(
    x: Tensor,
    channels: int,
    dw_weight: Tensor,
    pw_weight: Tensor,
    dw_bias: Tensor | None,
    pw_bias: Tensor | None,
    pointwise_first: bool,
    like: str = "x",
) -> int:
    """Both stages' weights for `channels` that come in; returns how many go out."""
    if pointwise_first:
        pw_channels = check_pointwise_weight("pw_weight", pw_weight, x, channels, like)[0]
        dw_channels = check_depthwise_weight("dw_weight", dw_weight, x, pw_channels, like)[0]
    else:
        dw_channels = check_depthwise_weight("dw_weight", dw_weight, x, channels, like)[0]
        pw_channels = check_pointwise_weight("pw_weight", pw_weight, x, dw_channels, like)[0]
    check_bias("dw_bias", dw_bias, x, dw_channels, like)
    check_bias("pw_bias", pw_bias, x, pw_channels, like)
    return dw_channels if pointwise_first else pw_channels


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
    order: str = "depthwise_first",
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
    unpooled one is never in memory. Not together with a residual, nor with order="pointwise_first".
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
    pointwise_first = _pointwise_first(order)
    if pointwise_first and max_pool is not None:
        raise ValueError("max_pool can't be combined with order='pointwise_first': pool the result")
    pre, mid, post = (
        activations.code("pre_activation", pre_activation),
        activations.code("mid_activation", mid_activation),
        activations.code("activation", activation),
    )
    if torch.is_grad_enabled():
        check_inference("separable_conv2d_packed", "call separable_conv2d", x=x, residual=residual)
    code = backends.code("separable_conv2d_packed", backend, x.device.type)
    geometry = kernel, strides, pads, dilations, pointwise_first
    return _packed_op(x, packed, residual, out_channels, *geometry, pre, mid, post, pool, code)


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
    pointwise_first,
    *options,
):
    size = output_size(x.shape, dw_weight.shape[2:], stride, padding, dilation)
    return empty_image(x, (x.shape[0], (dw_weight if pointwise_first else pw_weight).shape[0], *size))


@fake("separable_conv2d_backward")
def _(grad, x, dw_weight, dw_bias, pw_weight, pw_bias, residual, *options):
    output_mask = options[7]  # after stride, padding, dilation, pointwise_first and three activations
    return empty_gradients(output_mask, x, (dw_weight, dw_bias, pw_weight, pw_bias), residual, images=2)


@fake("pack_separable_conv2d")
def _(dw_weight, dw_bias, pw_weight, pw_bias, pointwise_first, dw_scale=None, pw_scale=None):
    channels, kernel = dw_weight.shape[0], dw_weight.shape[2:]
    if pointwise_first:
        sizes = pw_weight.shape[1], pw_weight.shape[0], channels
        return empty_packed("separable_conv2d_pointwise_first", dw_weight, *sizes, kernel)
    return empty_packed("separable_conv2d", dw_weight, channels, channels, pw_weight.shape[0], kernel)


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
    pointwise_first,
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
