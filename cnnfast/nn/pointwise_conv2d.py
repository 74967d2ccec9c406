from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cnnfast.nn.fusable import activation_name
from cnnfast.nn.fused import FusedModule
from cnnfast.nn.fusion import fuse_pointwise_conv2d
from cnnfast.nn.layers import PointwiseConv2d, activation_module
from cnnfast.nn.training import check_device, in_layout_of, step


class PointwiseConvBN(FusedModule):
    """1x1 convolution, batch normalisation, residual, activation: (N, in_channels, H, W) -> (N, out_channels, H', W').

    forward(x, residual=None) is activation(bn(conv(x)) + residual). Keys `conv`, `bn`.

    Args:
        activation: as the ops': None, "relu", "relu6", "silu", ...
        eps, momentum: of the batch normalisation.

    Network in Network, https://arxiv.org/abs/1312.4400.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        activation: str | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        self.conv = PointwiseConv2d(in_channels, out_channels, stride, bias=False, device=device, dtype=dtype)
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, device=device, dtype=dtype)
        self.act = activation_module(activation)

    def layers(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.bn(self.conv(x))
        return self.act(y if residual is None else y + residual)

    def fuse(self) -> Any:
        call = fuse_pointwise_conv2d(self.conv, self.bn, activation=activation_name(self.act), backend=self.backend)
        return lambda x, residual=None: call(x, residual=residual)

    def fuse_training(self) -> Any:
        check_device(self.conv.weight.device, self.backend)
        pending = step(self.conv, self.bn, self.act, self.backend)

        def call(x: Tensor, residual: Tensor | None = None) -> Tensor:
            if residual is None:
                return in_layout_of(x, lambda x: pending(x).tensor())
            return in_layout_of(x, lambda x: pending(x).tensor(residual))

        return call
