from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cnnfast.reference.common import Ints, activate, bias_like


def pointwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    *,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """activation(conv1x1(x * gate, weight) + bias + residual); see cnnfast.ops.pointwise_conv2d."""
    x = x if gate is None else x * gate
    y = F.conv2d(x, weight, bias_like(bias, x), stride)
    return activate(y if residual is None else y + residual, activation)
