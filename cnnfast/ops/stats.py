"""<op>_stats: convolutions for training beside batch normalisation.

y = op(pre_activation(x * scale + shift)), and the sums and sums of squares of y's channels, in one pass. Batch
normalisation with batch statistics is then no pass of its own: its statistics come from the sums of the convolution
before it, and its affine map (with the activation after it) is the scale, shift and pre_activation of the one after it.

Each differentiates once, through y and both sums; what backward needs of the prologue it computes again. conv2d_stats,
and on a GPU every one, may round to x's dtype what comes to y through y and the sums together, as PyTorch's batch
normalisation does, and the gradient of an intermediate that is rounded itself. Sums are those of y as it is stored,
added up in float32 (float64 for float64), the same bits on any number of threads and in every run.

Batch Normalization, https://arxiv.org/abs/1502.03167.
"""

from __future__ import annotations

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
from cnnfast.ops.arguments import (
    Ints,
    check_bias,
    check_dense_weight,
    check_depthwise_weight,
    check_pointwise_weight,
    check_scale_shift,
    check_x,
    edges,
    output_size,
    pair,
    pointwise_output_size,
)

Stats = tuple[Tensor, Tensor, Tensor]

_conv2d_op = torch.ops.cnnfast.conv2d_stats.default
_depthwise_op = torch.ops.cnnfast.depthwise_conv2d_stats.default
_pointwise_op = torch.ops.cnnfast.pointwise_conv2d_stats.default
_separable_op = torch.ops.cnnfast.separable_conv2d_stats.default


def conv2d_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    pre_activation: str | None = None,
    backend: str = "auto",
) -> Stats:
    """conv(pre_activation(x * scale + shift), weight) + bias, and the sums of its channels.

    x, weight, bias and geometry are conv2d's; the rest, what is returned and raised as for depthwise_conv2d_stats, with
    K for C * multiplier. What scale, shift and pre_activation make of x is a tensor of its own, of x's dtype: PyTorch's
    convolution reads it.
    """
    shape = check_x(x)
    out_channels, _, *kernel = check_dense_weight("weight", weight, x, shape[1])
    check_bias("bias", bias, x, out_channels)
    check_scale_shift(scale, shift, x)
    strides, pads, dilations = pair("stride", stride), edges(padding), pair("dilation", dilation)
    output_size(shape, kernel, strides, pads, dilations)
    pre = activations.code("pre_activation", pre_activation)
    code = backends.code("conv2d_stats", backend, x.device.type)
    if code == backends.REFERENCE:
        return reference.conv2d_stats(
            x, weight, bias, stride, padding, dilation, scale=scale, shift=shift, pre_activation=pre_activation
        )
    return _conv2d_op(x, weight, bias, scale, shift, strides, pads, dilations, pre, code)


def depthwise_conv2d_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    pre_activation: str | None = None,
    backend: str = "auto",
) -> Stats:
    """depthwise(pre_activation(x * scale + shift), weight) + bias, and the sums of its channels.

    Args:
        x, weight, bias, stride, padding, dilation, pre_activation: as depthwise_conv2d takes them. What padding adds is
            zero, whatever scale and shift make of a zero.
        scale, shift: (C), float32 (float64 beside a float64 x): batch normalisation's gamma / sqrt(var + eps) and
            beta - mean * scale, say; shift only with scale.
        backend: "auto", "cpu", "triton" or "reference" (plain torch).

    Returns:
        y, (N, C * multiplier, Ho, Wo), of x's dtype; the sums of y over images and pixels, and of y * y,
        (C * multiplier) each, float32 (float64 beside a float64 x).

    Raises:
        TypeError: a dtype that doesn't fit, or something that isn't a tensor or an int where one is wanted.
        ValueError: a shape, number, name or device that doesn't fit, or a backend that can't run here.
    """
    shape = check_x(x)
    weight_shape = check_depthwise_weight("weight", weight, x, shape[1])
    check_bias("bias", bias, x, weight_shape[0])
    check_scale_shift(scale, shift, x)
    strides, pads, dilations = pair("stride", stride), edges(padding), pair("dilation", dilation)
    output_size(shape, weight_shape[2:], strides, pads, dilations)
    pre = activations.code("pre_activation", pre_activation)
    code = backends.code("depthwise_conv2d_stats", backend, x.device.type)
    if code == backends.REFERENCE:
        return reference.depthwise_conv2d_stats(
            x, weight, bias, stride, padding, dilation, scale=scale, shift=shift, pre_activation=pre_activation
        )
    return _depthwise_op(x, weight, bias, scale, shift, strides, pads, dilations, pre, code)


def pointwise_conv2d_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    pre_activation: str | None = None,
    backend: str = "auto",
) -> Stats:
    """conv1x1(pre_activation(x * scale + shift), weight) + bias, and the sums of its channels.

    x, weight, bias and stride are pointwise_conv2d's; the rest, what is returned and raised as for
    depthwise_conv2d_stats, with out_channels for C * multiplier. A backend may round one intermediate, the product's
    input, to x's dtype.
    """
    shape = check_x(x)
    weight_shape = check_pointwise_weight("weight", weight, x, shape[1])
    check_bias("bias", bias, x, weight_shape[0])
    check_scale_shift(scale, shift, x)
    strides = pair("stride", stride)
    pre = activations.code("pre_activation", pre_activation)
    code = backends.code("pointwise_conv2d_stats", backend, x.device.type)
    if code == backends.REFERENCE:
        return reference.pointwise_conv2d_stats(
            x, weight, bias, stride, scale=scale, shift=shift, pre_activation=pre_activation
        )
    return _pointwise_op(x, weight, bias, scale, shift, strides, pre, code)


def separable_conv2d_stats(
    x: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    dw_bias: Tensor | None = None,
    pw_bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    pre_activation: str | None = None,
    mid_activation: str | None = None,
    backend: str = "auto",
) -> Stats:
    """separable_conv2d(pre_activation(x * scale + shift)), depthwise first, and the sums of its channels.

    For units without batch normalisation between their two stages, as Xception's. Weights, biases, geometry and
    mid_activation are separable_conv2d's; the rest, what is returned and raised as for depthwise_conv2d_stats, with
    out_channels for C * multiplier. A backend may round one intermediate, the depthwise result, to x's dtype; on a GPU
    that is in memory, between the kernels of the two stages.
    """
    shape = check_x(x)
    dw_shape = check_depthwise_weight("dw_weight", dw_weight, x, shape[1])
    pw_shape = check_pointwise_weight("pw_weight", pw_weight, x, dw_shape[0])
    check_bias("dw_bias", dw_bias, x, dw_shape[0])
    check_bias("pw_bias", pw_bias, x, pw_shape[0])
    check_scale_shift(scale, shift, x)
    strides, pads, dilations = pair("stride", stride), edges(padding), pair("dilation", dilation)
    output_size(shape, dw_shape[2:], strides, pads, dilations)
    codes = activations.code("pre_activation", pre_activation), activations.code("mid_activation", mid_activation)
    code = backends.code("separable_conv2d_stats", backend, x.device.type)
    if code == backends.REFERENCE:
        return reference.separable_conv2d_stats(
            x,
            dw_weight,
            pw_weight,
            dw_bias,
            pw_bias,
            stride,
            padding,
            dilation,
            scale=scale,
            shift=shift,
            pre_activation=pre_activation,
            mid_activation=mid_activation,
        )
    weights = dw_weight, dw_bias, pw_weight, pw_bias
    return _separable_op(x, *weights, scale, shift, strides, pads, dilations, *codes, code)


def _empty_stats(x: Tensor, channels: int, size: tuple[int, int]) -> Stats:
    dtype = torch.promote_types(x.dtype, torch.float32)
    sums, squares = (x.new_empty((channels,), dtype=dtype) for _ in range(2))
    return empty_image(x, (x.shape[0], channels, *size)), sums, squares


@fake("conv2d_stats")
@fake("depthwise_conv2d_stats")
def _(x, weight, bias, scale, shift, stride, padding, dilation, pre_activation, backend=0):
    return _empty_stats(x, weight.shape[0], output_size(x.shape, weight.shape[2:], stride, padding, dilation))


@fake("pointwise_conv2d_stats")
def _(x, weight, bias, scale, shift, stride, pre_activation, backend=0):
    return _empty_stats(x, weight.shape[0], pointwise_output_size(x.shape, stride))


@fake("separable_conv2d_stats")
def _(x, dw_weight, dw_bias, pw_weight, pw_bias, scale, shift, stride, padding, dilation, *options):
    return _empty_stats(x, pw_weight.shape[0], output_size(x.shape, dw_weight.shape[2:], stride, padding, dilation))


@fake("conv2d_stats_backward")
@fake("depthwise_conv2d_stats_backward")
def _(grad, grad_sum, grad_squares, x, weight, bias, scale, shift, y, *options):
    output_mask = options[4]  # after stride, padding, dilation and pre_activation
    return empty_gradients(output_mask, x, (weight, bias, scale, shift))


@fake("pointwise_conv2d_stats_backward")
def _(grad, grad_sum, grad_squares, x, weight, bias, scale, shift, y, stride, pre_activation, output_mask, backend=0):
    return empty_gradients(output_mask, x, (weight, bias, scale, shift))


@fake("separable_conv2d_stats_backward")
def _(grad, grad_sum, grad_squares, x, dw_weight, dw_bias, pw_weight, pw_bias, scale, shift, y, *options):
    output_mask = options[5]  # after stride, padding, dilation and two activations
    return empty_gradients(output_mask, x, (dw_weight, dw_bias, pw_weight, pw_bias, scale, shift))


for _op in ("conv2d_stats", "depthwise_conv2d_stats", "pointwise_conv2d_stats", "separable_conv2d_stats"):
    register_gradients(_op)
    register_cuda(_op)
    register_autocast(_op)
