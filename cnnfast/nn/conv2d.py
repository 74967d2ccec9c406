"""Dense convolutions: by ATen, or for the first layer of some networks by ours, batch normalisation folded in."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cnnfast.nn.fused import FusedModule
from cnnfast.nn.fusion import activation_name, fuse_conv2d
from cnnfast.nn.layers import Conv2dSame, activation_module


class ConvBN(FusedModule):
    """Dense convolution, batch normalisation, activation: (N, in_channels, H, W) -> (N, out_channels, H', W').

    Keys `conv`, `bn`. In eval mode with grad disabled the normalisation is folded into the convolution.

    Args:
        padding: int, (vertical, horizontal) or "same" (TensorFlow's, for any stride).
        activation: as the ops': None, "relu", "relu6", "silu", ...
        eps, momentum: of the batch normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int = 1,
        *,
        activation: str | None = "relu",
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        options = dict(dilation=dilation, bias=False, device=device, dtype=dtype)
        if padding == "same":
            self.conv: nn.Conv2d = Conv2dSame(in_channels, out_channels, kernel_size, stride, **options)
        else:
            self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, **options)
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, device=device, dtype=dtype)
        self.act = activation_module(activation)

    def layers(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def fuse(self) -> Any:
        return fuse_conv2d(self.conv, self.bn, activation=activation_name(self.act), backend=self.backend)
