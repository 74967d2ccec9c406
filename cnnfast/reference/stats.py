from __future__ import annotations

import torch
from torch import Tensor

from cnnfast.reference.common import Ints, activate
from cnnfast.reference.conv2d import conv2d
from cnnfast.reference.depthwise_conv2d import depthwise_conv2d
from cnnfast.reference.pointwise_conv2d import pointwise_conv2d
from cnnfast.reference.separable_conv2d import separable_conv2d

Stats = tuple[Tensor, Tensor, Tensor]


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
) -> Stats:
    """The op of pre_activation(x * scale + shift), and its sums by channel; see cnnfast.ops.stats."""
    return _with_sums(conv2d(_prologue(x, scale, shift, pre_activation), weight, bias, stride, padding, dilation))


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
) -> Stats:
    """The op of pre_activation(x * scale + shift), and its sums by channel; see cnnfast.ops.stats."""
    return _with_sums(
        depthwise_conv2d(_prologue(x, scale, shift, pre_activation), weight, bias, stride, padding, dilation)
    )


def pointwise_conv2d_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    pre_activation: str | None = None,
) -> Stats:
    """The op of pre_activation(x * scale + shift), and its sums by channel; see cnnfast.ops.stats."""
    return _with_sums(pointwise_conv2d(_prologue(x, scale, shift, pre_activation), weight, bias, stride))


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
) -> Stats:
    """The op of pre_activation(x * scale + shift), and its sums by channel; see cnnfast.ops.stats."""
    weights = dw_weight, pw_weight, dw_bias, pw_bias
    x = _prologue(x, scale, shift, pre_activation)
    return _with_sums(separable_conv2d(x, *weights, stride, padding, dilation, mid_activation=mid_activation))


def _prologue(x: Tensor, scale: Tensor | None, shift: Tensor | None, activation: str | None) -> Tensor:
    if scale is not None:
        y = x.to(scale.dtype) * scale.reshape(-1, 1, 1)
        x = (y if shift is None else y + shift.reshape(-1, 1, 1)).to(x.dtype)
    return activate(x, activation)


def _with_sums(y: Tensor) -> Stats:
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    return y, wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))
