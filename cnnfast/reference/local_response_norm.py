from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def local_response_norm(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """x / (k + alpha / size * sum of squares over neighbouring channels)^beta; see cnnfast.ops.local_response_norm."""
    return F.local_response_norm(x, size, alpha, beta, k)
