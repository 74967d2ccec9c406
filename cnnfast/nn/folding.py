"""Batch normalisation folded into the convolution before it: the one place where weights and scales are made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fold(conv: Any, bn: Any = None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the convolution that equals `conv` followed by `bn` with its running statistics.

    The arithmetic is float64 and the result float32 (float64 for a float64 `conv`) whatever the dtype of the
    parameters: weight * gamma / sqrt(var + eps) may overflow float16 where the unfolded network doesn't.

    Args:
        conv: a convolution, any number of groups; weight (K, C / groups, kh, kw).
        bn: BatchNorm2d of K channels, with or without affine parameters; None folds nothing.
    """
    scale, bias = _in_float64(conv, bn)
    weight = conv.weight if scale is None else conv.weight.double() * scale[:, None, None, None]
    dtype = _dtype(conv)
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def fold_apart(conv: Any, bn: Any = None, factor: float = 1.0) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight, bias and scale: factor * bn(conv(x)) = conv(x, weight) * scale + bias, as exact as fold's.

    The weight is conv's own, so that a bfloat16 one isn't rounded again. None: no bias, a scale of 1.
    """
    scale, bias = _in_float64(conv, bn)
    if factor != 1:
        scale = factor * (conv.weight.new_ones(len(conv.weight), dtype=torch.float64) if scale is None else scale)
        bias = None if bias is None else bias * factor
    dtype = _dtype(conv)
    return conv.weight, *(None if row is None else row.to(dtype) for row in (bias, scale))


def _dtype(conv: Any) -> torch.dtype:
    return torch.float64 if conv.weight.dtype == torch.float64 else torch.float32


def _in_float64(conv: Any, bn: Any) -> tuple[Tensor | None, Tensor | None]:
    """(scale, bias) by which conv's sums become bn's output."""
    if bn is None:
        return None, None if conv.bias is None else conv.bias.double()
    scale = torch.rsqrt(bn.running_var.double() + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight.double()
    bias = -bn.running_mean.double() if conv.bias is None else conv.bias.double() - bn.running_mean.double()
    bias = bias * scale
    if bn.bias is not None:
        bias = bias + bn.bias.double()
    return scale, bias
