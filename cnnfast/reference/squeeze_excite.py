from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cnnfast.reference.common import activate, bias_like


def squeeze_excite(
    x: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    reduce_bias: Tensor | None = None,
    expand_bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = "relu",
    gate_activation: str | None = "sigmoid",
    post_activation: str | None = None,
) -> Tensor:
    """post_activation(x * gates + residual), gates from the means of x's channels; see cnnfast.ops.squeeze_excite."""
    squeezed = F.conv2d(x.mean((2, 3), keepdim=True), reduce_weight, bias_like(reduce_bias, x))
    gates = F.conv2d(activate(squeezed, activation), expand_weight, bias_like(expand_bias, x))
    y = x * activate(gates, gate_activation)
    return activate(y if residual is None else y + residual, post_activation)
