from __future__ import annotations

from torch import Tensor

from cnnfast.reference.common import Ints, activate
from cnnfast.reference.depthwise_conv2d import depthwise_conv2d
from cnnfast.reference.pointwise_conv2d import pointwise_conv2d


def separable_conv2d(
    x: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    dw_bias: Tensor | None = None,
    pw_bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    *,
    order: str = "depthwise_first",
    residual: Tensor | None = None,
    pre_activation: str | None = None,
    mid_activation: str | None = None,
    activation: str | None = None,
) -> Tensor:
    """Depthwise, then pointwise, or the other way round; see cnnfast.ops.separable_conv2d."""
    if order == "pointwise_first":
        mid = pointwise_conv2d(activate(x, pre_activation), pw_weight, pw_bias, activation=mid_activation)
        y = depthwise_conv2d(mid, dw_weight, dw_bias, stride, padding, dilation)
        return activate(y if residual is None else y + residual, activation)
    mid = depthwise_conv2d(
        x, dw_weight, dw_bias, stride, padding, dilation, pre_activation=pre_activation, activation=mid_activation
    )
    return pointwise_conv2d(mid, pw_weight, pw_bias, residual=residual, activation=activation)
