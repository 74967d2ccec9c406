from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cnnfast.reference.common import Ints, activate, bias_like, pad


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    *,
    pre_activation: str | None = None,
    activation: str | None = None,
) -> Tensor:
    """activation(depthwise(pre_activation(x), weight) + bias); see cnnfast.ops.depthwise_conv2d."""
    x = pad(activate(x, pre_activation), padding, weight.shape[2:], stride, dilation)
    y = F.conv2d(x, weight, bias_like(bias, x), stride, 0, dilation, groups=x.shape[1])
    return activate(y, activation)


def depthwise_conv2d_squeeze(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    *,
    pre_activation: str | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """depthwise_conv2d and the means of its channels; see cnnfast.ops.depthwise_conv2d_squeeze."""
    options = dict(pre_activation=pre_activation, activation=activation)
    y = depthwise_conv2d(x, weight, bias, stride, padding, dilation, **options)
    return y, y.mean((2, 3), keepdim=True)
