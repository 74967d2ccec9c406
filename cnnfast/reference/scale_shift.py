from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnfast.reference.common import activate
from cnnfast.reference.squeeze_excite import squeeze_excite


def scale_shift(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """activation(x * scale + shift + residual); see cnnfast.ops.scale_shift."""
    y = x.to(scale.dtype) * scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1)
    return activate(y if residual is None else y + residual, activation).to(x.dtype)


def scale_shift_excite(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    reduce_bias: Tensor | None = None,
    expand_bias: Tensor | None = None,
    *,
    activation: str | None = None,
    se_activation: str | None = "relu",
    gate_activation: str | None = "sigmoid",
) -> Tensor:
    """squeeze_excite of activation(x * scale + shift); see cnnfast.ops.scale_shift."""
    z = scale_shift(x, scale, shift, activation=activation)
    weights = reduce_weight, expand_weight, reduce_bias, expand_bias
    return squeeze_excite(z, *weights, activation=se_activation, gate_activation=gate_activation)


def scale_shift_max_pool(
    x: Tensor, scale: Tensor, shift: Tensor, max_pool: Sequence[int], *, activation: str | None = None
) -> Tensor:
    """F.max_pool2d of activation(x * scale + shift); see cnnfast.ops.scale_shift_max_pool."""
    z = activate(x.to(scale.dtype) * scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1), activation)
    kernel, stride, padding = max_pool
    return F.max_pool2d(z, kernel, stride, padding).to(x.dtype)


def batch_norm_scale_shift(
    y: Tensor,
    sum: Tensor,
    squares: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch normalisation from sums; see cnnfast.ops.batch_norm. count: of what is in a sum, above 1; None: y's."""
    values: Tensor | int = y.numel() // y.shape[1] if count is None else count
    mean = sum.double() / values
    var = (squares.double() / values - mean.square()).clamp_min(0)
    scale = (var + eps).rsqrt() * (1 if weight is None else weight)
    shift = -mean * scale if bias is None else bias - mean * scale
    defined = count is not None or values > 1
    unbiased = var * (values / (values - 1)) if defined else torch.full_like(var, torch.nan)
    dtype = sum.dtype
    return scale.to(dtype), shift.to(dtype), mean.detach().to(dtype), unbiased.detach().to(dtype)
