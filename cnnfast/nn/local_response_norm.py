from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from cnnfast import ops
from cnnfast.nn.layers import has_kernel
from cnnfast.nn.recording import Value


class LocalResponseNorm(nn.LocalResponseNorm):
    """nn.LocalResponseNorm (same arguments, no parameters) that runs cnnfast.local_response_norm on images (N, C, H, W)
    on the devices for which there is a kernel, and torch's own elsewhere.

    The paper's alpha isn't divided by size: AlexNet's LocalResponseNorm(5, alpha=5e-4, k=2) is its alpha of 1e-4.
    """

    __constants__ = [*nn.LocalResponseNorm.__constants__, "backend"]  # noqa: RUF012 (as torch's)
    backend: str = "auto"

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Value:
            return x.local_response_norm(self.size, self.alpha, self.beta, self.k, self.backend)
        if self.backend == "auto" and not (x.dim() == 4 and has_kernel("local_response_norm", x.device.type)):
            return super().forward(x)
        return ops.local_response_norm(x, self.size, self.alpha, self.beta, self.k, backend=self.backend)
