"""Batch normalisation folded into the convolution before it: the one place where folded weights are made."""

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
    dtype = torch.float64 if conv.weight.dtype == torch.float64 else torch.float32
    if bn is None:
        return conv.weight.to(dtype), None if conv.bias is None else conv.bias.to(dtype)
    scale = torch.rsqrt(bn.running_var.double() + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight.double()
    bias = -bn.running_mean.double() if conv.bias is None else conv.bias.double() - bn.running_mean.double()
    bias = bias * scale
    if bn.bias is not None:
        bias = bias + bn.bias.double()
    return (conv.weight.double() * scale[:, None, None, None]).to(dtype), bias.to(dtype)
