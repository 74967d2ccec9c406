from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cnnfast.reference.common import Ints, activate, bias_like, pad


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
) -> Tensor:
    """activation(conv(x, weight) + bias + residual); see cnnfast.ops.conv2d."""
    x = pad(x, padding, weight.shape[2:], stride, dilation)
    y = F.conv2d(x, weight, bias_like(bias, x), stride, 0, dilation)
    return activate(y if residual is None else y + residual, activation)
