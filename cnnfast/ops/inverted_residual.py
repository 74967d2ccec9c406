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
from cnnfast.ops.arguments import (
    Ints,
    check_bias,
    check_depthwise_weight,
    check_excite,
    check_inference,
    check_packed,
    check_pointwise_weight,
    check_residual,
    check_scale,
    check_together,
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
    expand_weight: Tensor | None,
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
    se_reduce_weight: Tensor | None = None,
    se_expand_weight: Tensor | None = None,
    se_reduce_bias: Tensor | None = None,
    se_expand_bias: Tensor | None = None,
    se_activation: str | None = "silu",
    gate_activation: str | None = "sigmoid",
    backend: str = "auto",
) -> Tensor:
    """Inverted residual (MBConv) in one call, with or without squeeze-excite and expansion.

    e = activation(conv1x1(x, expand_weight) + expand_bias), or x; d = activation(depthwise(e, dw_weight) + dw_bias),
    times the gates of squeeze_excite(d) where its weights are given; conv1x1(d, project_weight) + project_bias +
    residual; differentiable once. On the CPU e is never in memory, and d only as far as the gates, which need all of
    it, have to be waited for: one image of it a thread (and of x, where its rows have to be padded or widened). On the
    GPU d is in memory where there are gates (cuda: unless a cluster makes an image); otherwise neither is (cuda), or
    neither or both are, as a rule expects to be faster (triton: kernels/inverted_residual.py). bfloat16 and float16
    are storage, the arithmetic is float32 (float64 for float64); a backend may round the intermediates e and d to x's
    dtype, triton and cuda d times its gates too, and cuda the gates.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16; channels_last memory is the fast path, and the output's
            memory format follows it.
        expand_weight: (expanded, C, 1, 1), of x's dtype, as the other weights; None for a block without expansion
            (expanded = C).
        dw_weight: (expanded, 1, kh, kw).
        project_weight: (out_channels, expanded, 1, 1).
        expand_bias, dw_bias, project_bias: one number an output channel of their stage, of x's dtype, or float32
            beside a bfloat16 or float16 x.
        stride, dilation: of the depthwise stage, int or (vertical, horizontal).
        padding: of the depthwise stage: int, (vertical, horizontal), (top, bottom, left, right), or "same": output =
            ceil(input / stride), the odd row or column of zeros at the bottom or right.
        residual: of the output's shape and x's dtype; added last, the block's own x where its shape is the output's.
        activation: after the expansion and after the depthwise stage; each activation is None, "identity",
            "relu", "relu6", "sigmoid", "silu", "gelu" (exact, by the error function) or "tanh".
        se_reduce_weight, se_expand_weight: (R, expanded, 1, 1) and (expanded, R, 1, 1), both or neither.
        se_reduce_bias, se_expand_bias: (R) and (expanded).
        se_activation, gate_activation: between squeeze-excite's two products, and of its gates.
        backend: "auto", "cpu", "cuda", "triton" or "reference" (plain torch).

    Returns:
        (N, out_channels, Ho, Wo), of x's dtype.

    Raises:
        TypeError: a dtype that doesn't fit, or something that isn't a tensor or an int where one is wanted.
        ValueError: a shape, number, name or device that doesn't fit, or a backend that can't run here.

    MobileNetV2, https://arxiv.org/abs/1801.04381; EfficientNet, https://arxiv.org/abs/1905.11946.
    """
    shape = check_x(x)
    weights: dict[str, Any] = dict(
        expand_weight=expand_weight,
        dw_weight=dw_weight,
        project_weight=project_weight,
        expand_bias=expand_bias,
        dw_bias=dw_bias,
        project_bias=project_bias,
        se_reduce_weight=se_reduce_weight,
        se_expand_weight=se_expand_weight,
        se_reduce_bias=se_reduce_bias,
        se_expand_bias=se_expand_bias,
    )
    _check_weights(x, shape[1], "x", **weights)
    dw_shape, project_shape = dw_weight.shape, project_weight.shape
    strides, pads, dilations = pair("stride", stride), edges(padding), pair("dilation", dilation)
    size = output_size(shape, dw_shape[2:], strides, pads, dilations)
    check_residual(residual, x, (shape[0], project_shape[0], *size))
    codes = _codes(activation, se_activation, gate_activation)
    code = backends.code("inverted_residual", backend, x.device.type)
    if code == backends.REFERENCE:
        return reference.inverted_residual(
            x,
            **weights,
            stride=stride,
            padding=padding,
            dilation=dilation,
            residual=residual,
            activation=activation,
            se_activation=se_activation,
            gate_activation=gate_activation,
        )
    return _op(x, *_in_schema_order(**weights), residual, strides, pads, dilations, *codes, code)


def pack_inverted_residual(
    expand_weight: Tensor | None,
    dw_weight: Tensor,
    project_weight: Tensor,
    expand_bias: Tensor | None = None,
    dw_bias: Tensor | None = None,
    project_bias: Tensor | None = None,
    expand_scale: Tensor | None = None,
    dw_scale: Tensor | None = None,
    project_scale: Tensor | None = None,
    *,
    se_reduce_weight: Tensor | None = None,
    se_expand_weight: Tensor | None = None,
    se_reduce_bias: Tensor | None = None,
    se_expand_bias: Tensor | None = None,
) -> Tensor:
    """The weights laid out for the kernel, as one opaque uint8 tensor for inverted_residual_packed.

    Weights and biases as inverted_residual takes them; on CPU. expand_scale, dw_scale, project_scale: a number for each
    channel that their stage makes, float32 (float64 beside float64): batch normalisation's, by which the sums are
    multiplied in that dtype, before the bias is added; the weights are never rounded for it. Inference only: under grad
    mode, weights that require grad are refused (ValueError).
    """
    weights: dict[str, Any] = dict(
        expand_weight=expand_weight,
        dw_weight=dw_weight,
        project_weight=project_weight,
        expand_bias=expand_bias,
        dw_bias=dw_bias,
        project_bias=project_bias,
        se_reduce_weight=se_reduce_weight,
        se_expand_weight=se_expand_weight,
        se_reduce_bias=se_reduce_bias,
        se_expand_bias=se_expand_bias,
    )
    first, name = (dw_weight, "dw_weight") if expand_weight is None else (expand_weight, "expand_weight")
    check_weight(name, first)
    _check_weights(first, first.shape[0 if expand_weight is None else 1], name, **weights)
    scales = dict(expand_scale=expand_scale, dw_scale=dw_scale, project_scale=project_scale)
    if expand_weight is not None:
        check_scale("expand_scale", expand_scale, first, expand_weight.shape[0], name)
    elif expand_scale is not None:
        raise ValueError(f"expand_scale must be None where expand_weight is, got a {type(expand_scale).__name__}")
    check_scale("dw_scale", dw_scale, first, dw_weight.shape[0], name)
    check_scale("project_scale", project_scale, first, project_weight.shape[0], name)
    if torch.is_grad_enabled():
        check_inference("pack_inverted_residual", "detach it", **weights, **scales)
    backends.code("inverted_residual_packed", "auto", dw_weight.device.type)
    return _pack_op(*_in_schema_order(**weights), *scales.values())


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
    se_activation: str | None = "silu",
    gate_activation: str | None = "sigmoid",
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
    codes = _codes(activation, se_activation, gate_activation)
    if torch.is_grad_enabled():
        check_inference("inverted_residual_packed", "call inverted_residual", x=x, residual=residual)
    code = backends.code("inverted_residual_packed", backend, x.device.type)
    return _packed_op(
        x, packed, residual, expanded_channels, out_channels, kernel, strides, pads, dilations, *codes, code
    )


def _check_weights(
    x: Tensor,
    channels: int,
    like: str,
    expand_weight: Tensor | None,
    dw_weight: Tensor,
    project_weight: Tensor,
    expand_bias: Tensor | None,
    dw_bias: Tensor | None,
    project_bias: Tensor | None,
    se_reduce_weight: Tensor | None,
    se_expand_weight: Tensor | None,
    se_reduce_bias: Tensor | None,
    se_expand_bias: Tensor | None,
) -> None:
    expanded = channels
    if expand_weight is not None:
        expanded = check_pointwise_weight("expand_weight", expand_weight, x, channels, like)[0]
        check_bias("expand_bias", expand_bias, x, expanded, like)
    elif expand_bias is not None:
        raise ValueError(f"expand_bias must be None where expand_weight is, got a {type(expand_bias).__name__}")
    check_depthwise_weight("dw_weight", dw_weight, x, expanded, like, multiplier=1)
    check_bias("dw_bias", dw_bias, x, expanded, like)
    check_pointwise_weight("project_weight", project_weight, x, expanded, like)
    check_bias("project_bias", project_bias, x, project_weight.shape[0], like)
    excite = se_reduce_weight, se_expand_weight, se_reduce_bias, se_expand_bias
    if check_together(
        se_reduce_weight=se_reduce_weight,
        se_expand_weight=se_expand_weight,
        se_reduce_bias=se_reduce_bias,
        se_expand_bias=se_expand_bias,
    ):
        check_excite(x, expanded, *excite, prefix="se_", like=like)  # type: ignore[arg-type]  # given together


def _in_schema_order(**weights: Tensor | None) -> list[Tensor | None]:
    stages = "expand", "dw", "se_reduce", "se_expand", "project"
    return [weights[f"{stage}_{kind}"] for stage in stages for kind in ("weight", "bias")]


def _codes(activation: str | None, se_activation: str | None, gate_activation: str | None) -> tuple[int, int, int]:
    return (
        activations.code("activation", activation),
        activations.code("se_activation", se_activation),
        activations.code("gate_activation", gate_activation),
    )


@fake("inverted_residual")
def _(x, *arguments):
    dw_weight, project_weight, geometry = arguments[2], arguments[8], arguments[11:14]
    return empty_image(x, (x.shape[0], project_weight.shape[0], *output_size(x.shape, dw_weight.shape[2:], *geometry)))


@fake("inverted_residual_backward")
def _(grad, x, *arguments):
    parameters, residual, output_mask = arguments[:10], arguments[10], arguments[17]  # 11 to 16: stride to activations
    return empty_gradients(output_mask, x, parameters, residual, images=2)


@fake("pack_inverted_residual")
def _(expand_weight, expand_bias, dw_weight, dw_bias, se_reduce_weight, *others):
    expanded, kernel = dw_weight.shape[0], dw_weight.shape[2:]
    channels = expanded if expand_weight is None else expand_weight.shape[1]
    squeezed = 0 if se_reduce_weight is None else se_reduce_weight.shape[0]
    out_channels = others[3].shape[0]
    return empty_packed(
        "inverted_residual", dw_weight, channels, expanded, out_channels, kernel, squeezed, expand_weight is None
    )


@fake("inverted_residual_packed")
def _(x, packed, residual, expanded_channels, out_channels, kernel_size, stride, padding, dilation, *options):
    return empty_image(x, (x.shape[0], out_channels, *output_size(x.shape, kernel_size, stride, padding, dilation)))


register_gradients("inverted_residual")
register_cuda("inverted_residual")
register_autocast("inverted_residual")
register_autocast("inverted_residual_packed")
