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
    check_dense_weight,
    check_inference,
    check_packed,
    check_residual,
    check_scale,
    check_weight,
    check_x,
    edges,
    output_size,
    pair,
    positive,
)

_op = torch.ops.cnnfast.conv2d.default
_packed_op = torch.ops.cnnfast.conv2d_packed.default
_pack_op = torch.ops.cnnfast.pack_conv2d.default
_WINOGRAD_TILE = (4, 4)  # kWinogradTile in csrc/packing.h


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Dense convolution with bias, residual and activation.

    activation(conv(x, weight) + bias + residual); differentiable once. The convolution is PyTorch's own (oneDNN's),
    residual and activation are one pass over its result, in place; zeros that aren't alike on both sides (x would be
    copied to be padded) and what oneDNN computes wrongly are the packed form's. bfloat16 and float16 are storage; one
    intermediate is rounded to them, PyTorch's result, where a residual, an activation or a float32 bias is added to it.
    In bfloat16 a NaN or Inf may reach neighbouring pixels, as PyTorch's does. The gradients are computed in float32
    (float64 for float64). The same call gives the same bits; with other threads or neighbours in the batch PyTorch may
    add in another order.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16; channels_last memory is the fast path, and the output's
            memory format follows it.
        weight: (K, C, kh, kw), of x's dtype; one group.
        bias: (K), of x's dtype, or float32 beside a bfloat16 or float16 x.
        stride, dilation: int or (vertical, horizontal).
        padding: int, (vertical, horizontal), (top, bottom, left, right), or "same": output = ceil(input / stride), the
            odd row or column of zeros at the bottom or right.
        residual: of the output's shape and x's dtype; added before the activation.
        activation: None, "identity", "relu", "relu6",
            "sigmoid", "silu", "gelu" (exact, by the error function) or "tanh".
        backend: "auto", "cpu" or "reference" (plain torch).

    Returns:
        (N, K, Ho, Wo), of x's dtype.

    Raises:
        TypeError: a dtype that doesn't fit, or something that isn't a tensor or an int where one is wanted.
        ValueError: a shape, number, name or device that doesn't fit, or a backend that can't run here.
    """
    shape = check_x(x)
    out_channels, _, *kernel = check_dense_weight("weight", weight, x, shape[1])
    check_bias("bias", bias, x, out_channels)
    strides, pads, dilations = pair("stride", stride), edges(padding), pair("dilation", dilation)
    size = output_size(shape, kernel, strides, pads, dilations)
    if residual is not None:
        check_residual(residual, x, (shape[0], out_channels, *size))
    post = activations.code("activation", activation)
    code = backends.code("conv2d", backend, x.device.type)
    if code == backends.REFERENCE:
        return reference.conv2d(x, weight, bias, stride, padding, dilation, residual=residual, activation=activation)
    return _op(x, weight, bias, residual, strides, pads, dilations, post, code)


def pack_conv2d(
    weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None, *, winograd: bool = False
) -> Tensor:
    """The weights of a dense convolution laid out for the kernel, as one opaque uint8 tensor for conv2d_packed.

    weight (K, C, kh, kw), bias (K), as torch.nn.functional.conv2d takes them (one group); on CPU. scale (K), float32
    (float64 beside float64): batch normalisation's, by which the sums are multiplied in that dtype, before the bias is
    added; the weights are never rounded for it. Inference only: under grad mode, weights that require grad are refused
    (ValueError).

    winograd: for 3 x 3 windows of stride and dilation 1 and float32 weights (else ValueError): lays out the weights of
    Winograd's F(2x2, 3x3) (Lavin and Gray, 2016, https://arxiv.org/abs/1509.09308), 16 / 9 as many, with which
    conv2d_packed takes 2.25 times fewer multiplications. Its rounding is that of PyTorch's convolution where the nine
    weights of a channel are of like size; else it is as if all were as the largest. An Inf in a window makes NaN of
    what PyTorch may have an Inf for.
    """
    check_weight("weight", weight)
    if not isinstance(winograd, bool):
        raise TypeError(f"winograd must be a bool, got {winograd!r}")
    if 0 in weight.shape:
        raise ValueError(f"weight must have shape (K, C, kh, kw), none of them 0, got {tuple(weight.shape)}")
    check_bias("bias", bias, weight, weight.shape[0], like="weight")
    check_scale("scale", scale, weight, weight.shape[0], like="weight")
    if winograd and (weight.shape[2:] != (3, 3) or weight.dtype != torch.float32):
        raise ValueError(
            f"winograd=True wants a float32 weight (K, C, 3, 3), got {weight.dtype} and {tuple(weight.shape)}"
        )
    if torch.is_grad_enabled():
        check_inference("pack_conv2d", "detach it", weight=weight, bias=bias, scale=scale)
    backends.code("conv2d_packed", "auto", weight.device.type)
    return _pack_op(weight, bias, scale, winograd)


def conv2d_packed(
    x: Tensor,
    packed: Tensor,
    residual: Tensor | None = None,
    *,
    out_channels: int,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Dense convolution, activation(conv(x) * scale + bias + residual), inference only: conv2d with its weights laid
    out once (scale is pack_conv2d's), any padding without a copy of x. bfloat16 and float16 are storage, the arithmetic
    is float32 (float64 for float64), no intermediate rounded; bfloat16 is multiplied as such where the CPU does (AMX).
    For weights packed with winograd=True, stride and dilation must be 1. In bfloat16 a NaN or
    Inf may reach neighbouring pixels, as PyTorch's does, unless C * kw is a multiple of 32.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16, float64 exactly where the weights were; channels_last
            memory is the fast path, and the output's memory format follows it.
        packed: what pack_conv2d returned.
        residual: of the output's shape and x's dtype; added before the activation.
        out_channels, kernel_size: those of the packed weights (a packing made for others raises).
        stride, dilation: int or (vertical, horizontal).
        padding: int, (vertical, horizontal), (top, bottom, left, right), or "same": output = ceil(input / stride), the
            odd row or column of zeros at the bottom or right.
        activation: None, "identity", "relu", "relu6",
            "sigmoid", "silu", "gelu" (exact, by the error function) or "tanh".
        backend: "auto" or "cpu".

    Returns:
        (N, out_channels, Ho, Wo), of x's dtype.

    Raises:
        TypeError: a dtype that doesn't fit, or something that isn't a tensor or an int where one is wanted.
        ValueError: a shape, number, name or device that doesn't fit, an x or residual that requires grad under grad
            mode, or a backend that can't run here.
    """
    shape = check_x(x)
    check_packed(packed, x, "conv2d")
    positive("out_channels", out_channels)
    kernel, strides, pads, dilations = (
        pair("kernel_size", kernel_size),
        pair("stride", stride),
        edges(padding),
        pair("dilation", dilation),
    )
    size = output_size(shape, kernel, strides, pads, dilations)
    if residual is not None:
        check_residual(residual, x, (shape[0], out_channels, *size))
    post = activations.code("activation", activation)
    if torch.is_grad_enabled():
        check_inference("conv2d_packed", "call conv2d", x=x, residual=residual)
    code = backends.code("conv2d_packed", backend, x.device.type)
    return _packed_op(x, packed, residual, out_channels, kernel, strides, pads, dilations, post, code)


@fake("conv2d")
def _(x, weight, bias, residual, stride, padding, dilation, activation, backend=0):
    out_channels, _, *kernel = weight.shape
    return empty_image(x, (x.shape[0], out_channels, *output_size(x.shape, kernel, stride, padding, dilation)))


@fake("conv2d_backward")
def _(grad, x, weight, bias, residual, stride, padding, dilation, activation, output_mask, backend=0):
    return empty_gradients(output_mask, x, (weight, bias), residual, images=2)


@fake("pack_conv2d")
def _(weight, bias, scale=None, winograd=False):
    out, channels, kh, kw = weight.shape
    return empty_packed("conv2d", weight, channels, channels, out, _WINOGRAD_TILE if winograd else (kh, kw))


@fake("conv2d_packed")
def _(x, packed, residual, out_channels, kernel_size, stride, padding, dilation, activation, backend=0):
    return empty_image(x, (x.shape[0], out_channels, *output_size(x.shape, kernel_size, stride, padding, dilation)))


register_gradients("conv2d", activation_after_residual=True)
register_cuda("conv2d")
register_autocast("conv2d")
register_autocast("conv2d_packed")
