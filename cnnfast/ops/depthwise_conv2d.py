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
    check_packed,
    check_weight,
    check_x,
    edges,
    output_size,
    pair,
    positive,
)

_op = torch.ops.cnnfast.depthwise_conv2d.default
_packed_op = torch.ops.cnnfast.depthwise_conv2d_packed.default
_pack_op = torch.ops.cnnfast.pack_depthwise_conv2d.default
_squeeze_op = torch.ops.cnnfast.depthwise_conv2d_squeeze.default
_squeeze_packed_op = torch.ops.cnnfast.depthwise_conv2d_squeeze_packed.default


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    *,
    pre_activation: str | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Depthwise convolution, with the activation before it, bias and activation after it, in one pass over memory.

    activation(depthwise(pre_activation(x), weight) + bias); differentiable once. No intermediate is rounded to x's
    dtype: bfloat16 and float16 are storage, the arithmetic is float32 (float64 for float64).

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16; channels_last memory is the fast path, and the output's
            memory format follows it.
        weight: (C * multiplier, 1, kh, kw), of x's dtype; output channel c reads input channel c // multiplier.
        bias: (C * multiplier), of x's dtype, or float32 beside a bfloat16 or float16 x.
        stride: int or (vertical, horizontal).
        padding: int, (vertical, horizontal), (top, bottom, left, right), or "same": output = ceil(input / stride), the
            odd row or column of zeros at the bottom or right (TensorFlow's rule; for stride 1 also PyTorch's).
        dilation: int or (vertical, horizontal).
        pre_activation, activation: None, "identity", "relu", "relu6",
            "sigmoid", "silu", "gelu" (exact, by the error function) or "tanh".
        backend: "auto", "cpu", "cuda", "triton" or "reference" (plain torch).

    Returns:
        (N, C * multiplier, Ho, Wo), of x's dtype.

    Raises:
        TypeError: a dtype that doesn't fit, or something that isn't a tensor or an int where one is wanted.
        ValueError: a shape, number, name or device that doesn't fit, or a backend that can't run here.

    MobileNets, https://arxiv.org/abs/1704.04861; Xception, https://arxiv.org/abs/1610.02357.
    """
    geometry = _check_plain(x, weight, bias, stride, padding, dilation)
    pre, post = activations.code("pre_activation", pre_activation), activations.code("activation", activation)
    code = backends.code("depthwise_conv2d", backend, x.device.type)
    if code == backends.REFERENCE:
        return reference.depthwise_conv2d(
            x, weight, bias, stride, padding, dilation, pre_activation=pre_activation, activation=activation
        )
    return _op(x, weight, bias, *geometry, pre, post, code)


def pack_depthwise_conv2d(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The weights laid out for the kernel, as one opaque uint8 tensor for depthwise_conv2d_packed.

    weight (channels, 1, kh, kw) and bias (channels) as depthwise_conv2d takes them, on CPU or CUDA. Inference only:
    under grad mode, weights that require grad are refused (ValueError).
    """
    check_weight("weight", weight)
    check_depthwise_weight("weight", weight, weight, 1)
    check_bias("bias", bias, weight, weight.shape[0], like="weight")
    if torch.is_grad_enabled():
        check_inference("pack_depthwise_conv2d", "detach it", weight=weight, bias=bias)
    backends.code("depthwise_conv2d_packed", "auto", weight.device.type)
    return _pack_op(weight, bias)


def depthwise_conv2d_packed(
    x: Tensor,
    packed: Tensor,
    *,
    out_channels: int,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    pre_activation: str | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """depthwise_conv2d with weights packed by pack_depthwise_conv2d: the fast form, inference only.

    `out_channels` and `kernel_size` are those of the packed weight (a packing made for others raises); the rest as
    for depthwise_conv2d. x is float64 exactly where the weight was. Under grad mode, an x that requires grad is
    refused (ValueError).
    """
    arguments = _check_packed(x, packed, out_channels, kernel_size, stride, padding, dilation)
    pre, post = activations.code("pre_activation", pre_activation), activations.code("activation", activation)
    if torch.is_grad_enabled():
        check_inference("depthwise_conv2d_packed", "call depthwise_conv2d", x=x)
    code = backends.code("depthwise_conv2d_packed", backend, x.device.type)
    return _packed_op(x, packed, out_channels, *arguments, pre, post, code)


def depthwise_conv2d_squeeze(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    *,
    pre_activation: str | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """depthwise_conv2d, and the mean of each channel of its result: squeeze-and-excitation's squeeze, in the same pass.

    Arguments and errors are depthwise_conv2d's; differentiable once, through both results.

    Returns:
        y, (N, C * multiplier, Ho, Wo), and its means over each image's pixels, (N, C * multiplier, 1, 1), both of x's
        dtype; the means are those of y as it is stored, summed in float32 (float64 for float64).
    """
    geometry = _check_plain(x, weight, bias, stride, padding, dilation)
    pre, post = activations.code("pre_activation", pre_activation), activations.code("activation", activation)
    code = backends.code("depthwise_conv2d_squeeze", backend, x.device.type)
    if code == backends.REFERENCE:
        options = dict(pre_activation=pre_activation, activation=activation)
        return reference.depthwise_conv2d_squeeze(x, weight, bias, stride, padding, dilation, **options)
    return _squeeze_op(x, weight, bias, *geometry, pre, post, code)


def depthwise_conv2d_squeeze_packed(
    x: Tensor,
    packed: Tensor,
    *,
    out_channels: int,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    pre_activation: str | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """depthwise_conv2d_squeeze with weights packed by pack_depthwise_conv2d; arguments as depthwise_conv2d_packed's."""
    arguments = _check_packed(x, packed, out_channels, kernel_size, stride, padding, dilation)
    pre, post = activations.code("pre_activation", pre_activation), activations.code("activation", activation)
    if torch.is_grad_enabled():
        check_inference("depthwise_conv2d_squeeze_packed", "call depthwise_conv2d_squeeze", x=x)
    code = backends.code("depthwise_conv2d_squeeze_packed", backend, x.device.type)
    return _squeeze_packed_op(x, packed, out_channels, *arguments, pre, post, code)


def _check_plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints | str, dilation: Ints
) -> tuple[Sequence[int], ...]:
    """stride, padding and dilation as the schemas take them."""
    shape = check_x(x)
    weight_shape = check_depthwise_weight("weight", weight, x, shape[1])
    check_bias("bias", bias, x, weight_shape[0])
    strides, pads, dilations = pair("stride", stride), edges(padding), pair("dilation", dilation)
    output_size(shape, weight_shape[2:], strides, pads, dilations)
    return strides, pads, dilations


def _check_packed(
    x: Tensor, packed: Tensor, out_channels: int, kernel_size: Ints, stride: Ints, padding: Ints | str, dilation: Ints
) -> tuple[Sequence[int], ...]:
    """kernel_size, stride, padding and dilation as the schemas take them."""
    shape = check_x(x)
    check_packed(packed, x, "depthwise_conv2d")
    if positive("out_channels", out_channels) % shape[1]:
        raise ValueError(f"out_channels must be a multiple of x's {shape[1]} channels, got {out_channels}")
    kernel, strides, pads, dilations = (
        pair("kernel_size", kernel_size),
        pair("stride", stride),
        edges(padding),
        pair("dilation", dilation),
    )
    output_size(shape, kernel, strides, pads, dilations)
    return kernel, strides, pads, dilations


@fake("depthwise_conv2d")
def _(x, weight, bias, stride, padding, dilation, pre_activation, activation, backend=0):
    size = output_size(x.shape, weight.shape[2:], stride, padding, dilation)
    return empty_image(x, (x.shape[0], weight.shape[0], *size))


@fake("depthwise_conv2d_backward")
def _(grad, x, weight, bias, stride, padding, dilation, pre_activation, activation, output_mask, backend=0):
    return empty_gradients(output_mask, x, (weight, bias))


@fake("pack_depthwise_conv2d")
def _(weight, bias):
    channels = weight.shape[0]
    return empty_packed("depthwise_conv2d", weight, channels, channels, channels, weight.shape[2:])


@fake("depthwise_conv2d_packed")
def _(x, packed, out_channels, kernel_size, stride, padding, dilation, pre_activation, activation, backend=0):
    size = output_size(x.shape, kernel_size, stride, padding, dilation)
    return empty_image(x, (x.shape[0], out_channels, *size))


@fake("depthwise_conv2d_squeeze")
def _(x, weight, bias, stride, padding, dilation, pre_activation, activation, backend=0):
    size = output_size(x.shape, weight.shape[2:], stride, padding, dilation)
    return _empty_squeezed(x, weight.shape[0], size)


@fake("depthwise_conv2d_squeeze_backward")
def _(
    grad, grad_squeezed, x, weight, bias, stride, padding, dilation, pre_activation, activation, output_mask, backend=0
):
    return empty_gradients(output_mask, x, (weight, bias))


@fake("depthwise_conv2d_squeeze_packed")
def _(x, packed, out_channels, kernel_size, stride, padding, dilation, pre_activation, activation, backend=0):
    return _empty_squeezed(x, out_channels, output_size(x.shape, kernel_size, stride, padding, dilation))


def _empty_squeezed(x: Tensor, channels: int, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    return empty_image(x, (x.shape[0], channels, *size)), x.new_empty((x.shape[0], channels, 1, 1))


register_gradients("depthwise_conv2d")
register_cuda("depthwise_conv2d", packed=True)
register_autocast("depthwise_conv2d")
register_autocast("depthwise_conv2d_packed")
register_gradients("depthwise_conv2d_squeeze")
register_cuda("depthwise_conv2d_squeeze", packed=True)
register_autocast("depthwise_conv2d_squeeze")
register_autocast("depthwise_conv2d_squeeze_packed")
