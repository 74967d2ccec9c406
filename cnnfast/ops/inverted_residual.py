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
    check_depthwise_weight,
    check_inference,
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

_op = torch.ops.cnnfast.inverted_residual.default
_packed_op = torch.ops.cnnfast.inverted_residual_packed.default
_pack_op = torch.ops.cnnfast.pack_inverted_residual.default


def inverted_residual(
    x: Tensor,
    expand_weight: Tensor,
    dw_weight: Tensor,
    project_weight: Tensor,
    expand_bias: Tensor | None = None,
    dw_bias: Tensor | None = None,
    project_bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    *,
    residual: Tensor | None = None,
    activation: str | None = "relu6",
    backend: str = "auto",
) -> Tensor:
    """Inverted residual (MBConv without squeeze-excite) in one call, the expanded tensor never in memory.

    e = activation(conv1x1(x, expand_weight) + expand_bias); d = activation(depthwise(e, dw_weight) + dw_bias);
    conv1x1(d, project_weight) + project_bias + residual; differentiable once. bfloat16 and float16 are storage, the
    arithmetic is float32 (float64 for float64); a backend may round two intermediates, e and d, to x's dtype.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16; channels_last memory is the fast path, and the output's
            memory format follows it.
        expand_weight: (expanded, C, 1, 1), of x's dtype, as the other weights.
        dw_weight: (expanded, 1, kh, kw).
        project_weight: (out_channels, expanded, 1, 1).
        expand_bias, dw_bias, project_bias: one number an output channel of their stage, of x's dtype, or float32
            beside a bfloat16 or float16 x.
        stride, dilation: of the depthwise stage, int or (vertical, horizontal).
        padding: of the depthwise stage: int, (vertical, horizontal), (top, bottom, left, right), or "same": output =
            ceil(input / stride), the odd row or column of zeros at the bottom or right.
        residual: of the output's shape and x's dtype; added last, the block's own x where its shape is the output's.
        activation: after the expansion and after the depthwise stage: None, "identity", "relu", "relu6",
            "sigmoid", "silu", "gelu" (exact, by the error function) or "tanh".
        backend: "auto", "cpu", "cuda", "triton" or "reference" (plain torch).

    Returns:
        (N, out_channels, Ho, Wo), of x's dtype.

    Raises:
        TypeError: a dtype that doesn't fit, or something that isn't a tensor or an int where one is wanted.
        ValueError: a shape, number, name or device that doesn't fit, or a backend that can't run here.

    MobileNetV2, https://arxiv.org/abs/1801.04381; EfficientNet, https://arxiv.org/abs/1905.11946.
    """
    shape = check_x(x)
    expand_shape = check_pointwise_weight("expand_weight", expand_weight, x, shape[1])
    dw_shape = check_depthwise_weight("dw_weight", dw_weight, x, expand_shape[0], multiplier=1)
    project_shape = check_pointwise_weight("project_weight", project_weight, x, dw_shape[0])
    check_bias("expand_bias", expand_bias, x, expand_shape[0])
    check_bias("dw_bias", dw_bias, x, dw_shape[0])
    check_bias("project_bias", project_bias, x, project_shape[0])
    strides, pads, dilations = pair("stride", stride), edges(padding), pair("dilation", dilation)
    size = output_size(shape, dw_shape[2:], strides, pads, dilations)
    check_residual(residual, x, (shape[0], project_shape[0], *size))
    act = activations.code("activation", activation)
    code = backends.code("inverted_residual", backend, x.device.type)
    if code == backends.REFERENCE:
        return reference.inverted_residual(
            x,
            expand_weight,
            dw_weight,
            project_weight,
            expand_bias,
            dw_bias,
            project_bias,
            stride,
            padding,
            dilation,
            residual=residual,
            activation=activation,
        )
    return _op(
        x,
        expand_weight,
        expand_bias,
        dw_weight,
        dw_bias,
        project_weight,
        project_bias,
        residual,
        strides,
        pads,
        dilations,
        act,
        code,
    )


def pack_inverted_residual(
    expand_weight: Tensor,
    dw_weight: Tensor,
    project_weight: Tensor,
    expand_bias: Tensor | None = None,
    dw_bias: Tensor | None = None,
    project_bias: Tensor | None = None,
) -> Tensor:
    """The weights laid out for the kernel, as one opaque uint8 tensor for inverted_residual_packed.

    Weights and biases as inverted_residual takes them; on CPU. Inference only: under grad mode, weights that require
    grad are refused (ValueError).
    """
    check_weight("expand_weight", expand_weight)
    expanded = check_pointwise_weight("expand_weight", expand_weight, expand_weight, expand_weight.shape[1])[0]
    check_depthwise_weight("dw_weight", dw_weight, expand_weight, expanded, like="expand_weight", multiplier=1)
    check_pointwise_weight("project_weight", project_weight, expand_weight, expanded, like="expand_weight")
    check_bias("expand_bias", expand_bias, expand_weight, expanded, like="expand_weight")
    check_bias("dw_bias", dw_bias, expand_weight, expanded, like="expand_weight")
    check_bias("project_bias", project_bias, expand_weight, project_weight.shape[0], like="expand_weight")
    if torch.is_grad_enabled():
        check_inference(
            "pack_inverted_residual",
            "detach it",
            expand_weight=expand_weight,
            dw_weight=dw_weight,
            project_weight=project_weight,
            expand_bias=expand_bias,
            dw_bias=dw_bias,
            project_bias=project_bias,
        )
    backends.code("inverted_residual_packed", "auto", expand_weight.device.type)
    return _pack_op(expand_weight, expand_bias, dw_weight, dw_bias, project_weight, project_bias)


def inverted_residual_packed(
    x: Tensor,
    packed: Tensor,
    residual: Tensor | None = None,
    *,
    expanded_channels: int,
    out_channels: int,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    activation: str | None = "relu6",
    backend: str = "auto",
) -> Tensor:
    """inverted_residual with weights packed by pack_inverted_residual: the fast form, inference only.

    `expanded_channels`, `out_channels` and `kernel_size` are those of the packed weights (a packing made for others
    raises); the rest as for inverted_residual. x is float64 exactly where the weights were. Under grad mode, an x or
    residual that requires grad is refused (ValueError).
    """
    shape = check_x(x)
    check_packed(packed, x, "inverted_residual")
    positive("expanded_channels", expanded_channels)
    positive("out_channels", out_channels)
    kernel, strides, pads, dilations = (
        pair("kernel_size", kernel_size),
        pair("stride", stride),
        edges(padding),
        pair("dilation", dilation),
    )
    size = output_size(shape, kernel, strides, pads, dilations)
    check_residual(residual, x, (shape[0], out_channels, *size))
    act = activations.code("activation", activation)
    if torch.is_grad_enabled():
        check_inference("inverted_residual_packed", "call inverted_residual", x=x, residual=residual)
    code = backends.code("inverted_residual_packed", backend, x.device.type)
    return _packed_op(x, packed, residual, expanded_channels, out_channels, kernel, strides, pads, dilations, act, code)


@fake("inverted_residual")
def _(
    x,
    expand_weight,
    expand_bias,
    dw_weight,
    dw_bias,
    project_weight,
    project_bias,
    residual,
    stride,
    padding,
    dilation,
    activation,
    backend=0,
):
    size = output_size(x.shape, dw_weight.shape[2:], stride, padding, dilation)
    return empty_image(x, (x.shape[0], project_weight.shape[0], *size))


@fake("inverted_residual_backward")
def _(grad, x, *arguments):
    parameters, residual, output_mask = arguments[:6], arguments[6], arguments[11]  # 7 to 10: stride to activation
    return empty_gradients(output_mask, x, parameters, residual, images=2)


@fake("pack_inverted_residual")
def _(expand_weight, expand_bias, dw_weight, dw_bias, project_weight, project_bias):
    expanded, channels = expand_weight.shape[0], expand_weight.shape[1]
    taps = dw_weight.shape[2] * dw_weight.shape[3]
    return empty_packed("inverted_residual", expand_weight, channels, expanded, project_weight.shape[0], taps)


@fake("inverted_residual_packed")
def _(
    x,
    packed,
    residual,
    expanded_channels,
    out_channels,
    kernel_size,
    stride,
    padding,
    dilation,
    activation,
    backend=0,
):
    size = output_size(x.shape, kernel_size, stride, padding, dilation)
    return empty_image(x, (x.shape[0], out_channels, *size))


register_gradients("inverted_residual")
register_cuda("inverted_residual")
register_autocast("inverted_residual")
register_autocast("inverted_residual_packed")
