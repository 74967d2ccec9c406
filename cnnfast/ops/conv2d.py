from __future__ import annotations

import torch
from torch import Tensor

from cnnfast.ops import activations, backends
from cnnfast.ops._registration import empty_image, empty_packed, fake, register_autocast
from cnnfast.ops.arguments import (
    Ints,
    check_bias,
    check_inference,
    check_packed,
    check_weight,
    check_x,
    edges,
    output_size,
    pair,
    positive,
)

_packed_op = torch.ops.cnnfast.conv2d_packed.default
_pack_op = torch.ops.cnnfast.pack_conv2d.default


def pack_conv2d(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The weights of a dense convolution laid out for the kernel, as one opaque uint8 tensor for conv2d_packed.

    weight (K, C, kh, kw), bias (K), as torch.nn.functional.conv2d takes them (one group); on CPU. Inference only: under
    grad mode, weights that require grad are refused (ValueError).
    """
    check_weight("weight", weight)
    if 0 in weight.shape:
        raise ValueError(f"weight must have shape (K, C, kh, kw), none of them 0, got {tuple(weight.shape)}")
    check_bias("bias", bias, weight, weight.shape[0], like="weight")
    if torch.is_grad_enabled():
        check_inference("pack_conv2d", "detach it", weight=weight, bias=bias)
    backends.code("conv2d_packed", "auto", weight.device.type)
    return _pack_op(weight, bias)


def conv2d_packed(
    x: Tensor,
    packed: Tensor,
    *,
    out_channels: int,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Dense convolution, activation(conv(x) + bias), inference only. For a network's first layer where its padding is
    one that torch has to copy x for; torch.nn.functional.conv2d is the differentiable form, and the faster one where it
    pads itself. bfloat16 and float16 are storage, the arithmetic is
    float32 (float64 for float64).

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16, float64 exactly where the weights were; channels_last
            memory is the fast path, and the output's memory format follows it.
        packed: what pack_conv2d returned.
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
        ValueError: a shape, number, name or device that doesn't fit, an x that requires grad under grad mode, or a
            backend that can't run here.
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
    output_size(shape, kernel, strides, pads, dilations)
    post = activations.code("activation", activation)
    if torch.is_grad_enabled():
        check_inference("conv2d_packed", "call torch.nn.functional.conv2d", x=x)
    code = backends.code("conv2d_packed", backend, x.device.type)
    return _packed_op(x, packed, out_channels, kernel, strides, pads, dilations, post, code)


@fake("pack_conv2d")
def _(weight, bias):
    out, channels, kh, kw = weight.shape
    return empty_packed("conv2d", weight, channels, channels, out, kh * kw)


@fake("conv2d_packed")
def _(x, packed, out_channels, kernel_size, stride, padding, dilation, activation, backend=0):
    return empty_image(x, (x.shape[0], out_channels, *output_size(x.shape, kernel_size, stride, padding, dilation)))


register_autocast("conv2d_packed")
