"""Dense convolutions: by ATen, or for the first layer of some networks by ours, batch normalisation folded in."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cnnfast.nn.fusable import activation_name
from cnnfast.nn.fused import FusedModule
from cnnfast.nn.fusion import fuse_conv2d, fuse_pointwise_conv2d
from cnnfast.nn.layers import Conv2dSame, PointwiseConv2d, activation_module
from cnnfast.nn.training import block


class ConvBN(FusedModule):
    """Dense convolution, batch normalisation, activation: (N, in_channels, H, W) -> (N, out_channels, H', W').

    Keys `conv`, `bn`. In eval mode with grad disabled the normalisation is folded into the convolution; a 1x1 without
    padding is cnnfast.pointwise_conv2d.

    Args:
        kernel_size: int or (vertical, horizontal).
        padding: int, (vertical, horizontal) or "same" (TensorFlow's, for any stride).
        activation: as the ops': None, "relu", "relu6", "silu", ...
        bias: of the convolution, which the normalisation makes redundant; some checkpoints have it.
        channels_last: for inference the result is channels_last whatever x is: for the first layer of a network.
        eps, momentum: of the batch normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int = 1,
        *,
        activation: str | None = "relu",
        bias: bool = False,
        channels_last: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        factory: dict[str, Any] = dict(bias=bias, device=device, dtype=dtype)
        size: Any = kernel_size
        if size in (1, (1, 1)) and padding in (0, (0, 0), "same"):
            self.conv: nn.Conv2d = PointwiseConv2d(in_channels, out_channels, stride, **factory)
        elif padding == "same":
            self.conv = Conv2dSame(in_channels, out_channels, size, stride, dilation=dilation, **factory)
        else:
            self.conv = nn.Conv2d(in_channels, out_channels, size, stride, padding, dilation, **factory)
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, device=device, dtype=dtype)
        self.act = activation_module(activation)
        self.channels_last = channels_last

    def layers(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def fuse(self) -> Any:
        options: dict[str, Any] = dict(activation=activation_name(self.act), backend=self.backend)
        if isinstance(self.conv, PointwiseConv2d):
            return fuse_pointwise_conv2d(self.conv, self.bn, **options)
        return fuse_conv2d(self.conv, self.bn, channels_last=self.channels_last, **options)

    def fuse_training(self) -> Any:
        return block([(self.conv, self.bn, self.act)], None, None, self.backend)
