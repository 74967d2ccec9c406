from __future__ import annotations

from torch import Tensor

from cnnfast.reference.common import Ints
from cnnfast.reference.depthwise_conv2d import depthwise_conv2d
from cnnfast.reference.pointwise_conv2d import pointwise_conv2d


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
) -> Tensor:
    """Expand, depthwise, project; see cnnfast.ops.inverted_residual."""
    expanded = pointwise_conv2d(x, expand_weight, expand_bias, activation=activation)
    mid = depthwise_conv2d(expanded, dw_weight, dw_bias, stride, padding, dilation, activation=activation)
    return pointwise_conv2d(mid, project_weight, project_bias, residual=residual)
