from __future__ import annotations

from torch import Tensor

from cnnfast.reference.common import Ints
from cnnfast.reference.depthwise_conv2d import depthwise_conv2d
from cnnfast.reference.pointwise_conv2d import pointwise_conv2d
from cnnfast.reference.squeeze_excite import squeeze_excite


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
) -> Tensor:
    """Expand, depthwise, squeeze-excite, project; see cnnfast.ops.inverted_residual."""
    expanded = x if expand_weight is None else pointwise_conv2d(x, expand_weight, expand_bias, activation=activation)
    mid = depthwise_conv2d(expanded, dw_weight, dw_bias, stride, padding, dilation, activation=activation)
    if se_reduce_weight is not None and se_expand_weight is not None:
        weights = se_reduce_weight, se_expand_weight, se_reduce_bias, se_expand_bias
        mid = squeeze_excite(mid, *weights, activation=se_activation, gate_activation=gate_activation)
    return pointwise_conv2d(mid, project_weight, project_bias, residual=residual)
