"""What ResNets and SENets are made of: residual blocks, convolutions whose input is added to their output,
https://arxiv.org/abs/1512.03385."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cnnfast.nn import FusedModule, PointwiseConv2d
from cnnfast.nn.fused import NotFusable
from cnnfast.nn.layers import DropPath
from cnnfast.nn.sequential import Call, Chain, fuse_run


class PaddedShortcut(nn.Module):
    """The paper's shortcut A: every `stride`-th pixel of x, and zeros for the channels that x doesn't have, behind its
    own; no parameters. (N, C, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride))"""

    def __init__(self, out_channels: int, stride: int):
        super().__init__()
        self.out_channels = out_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.out_channels - x.shape[1]))

    def extra_repr(self) -> str:
        return f"{self.out_channels}, stride={self.stride}"


def projection(in_channels: int, out_channels: int, stride: int, kernel_size: int = 1, **factory: Any) -> nn.Sequential:
    """The paper's shortcut B where the shapes differ: a strided convolution and BN. Keys `0`, `1`."""
    if kernel_size == 1:
        conv: nn.Conv2d = PointwiseConv2d(in_channels, out_channels, stride, bias=False, **factory)
    else:
        conv = conv3x3(in_channels, out_channels, stride, **factory)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels, **factory))


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1, **options: Any) -> nn.Conv2d:
    """Padded to keep the size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, dilation, dilation, bias=False, **options)


class ResidualBlock(FusedModule):
    """Convolutions, each with BN and ReLU; x, or what `downsample` makes of it, is added before the last ReLU.

    Keys `conv1`, `bn1`, `conv2`, ..., `downsample.0`, `downsample.1`, as in torchvision and timm. For inference one
    call a convolution: the last adds the shortcut and has the ReLU.

    Args:
        convs: the convolutions.
        downsample: None for x itself.
        skip: whether there is a shortcut; False for a plain network.
        drop_path: stochastic depth's probability to drop what is added to the shortcut.
    """

    def __init__(
        self,
        convs: Sequence[nn.Conv2d],
        downsample: nn.Module | None,
        skip: bool = True,
        drop_path: float = 0.0,
        **factory: Any,
    ):
        super().__init__()
        self.depth = len(convs)
        for n, conv in enumerate(convs, 1):
            setattr(self, f"conv{n}", conv)
            setattr(self, f"bn{n}", nn.BatchNorm2d(conv.out_channels, **factory))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.skip = skip
        self.drop_path = DropPath(drop_path)

    def units(self) -> list[tuple[Any, Any]]:
        """Convolutions and their batch normalisations."""
        return [(getattr(self, f"conv{n}"), getattr(self, f"bn{n}")) for n in range(1, self.depth + 1)]

    def layers(self, x: Tensor) -> Tensor:
        y, *units = x, *self.units()
        for conv, bn in units[:-1]:
            y = self.relu(bn(conv(y)))
        conv, bn = units[-1]
        y = self.drop_path(bn(conv(y)))
        if self.skip:
            y = y + (x if self.downsample is None else self.downsample(x))  # a hook may have kept y
        return self.relu(y)

    def fuse(self) -> Any:
        if type(self.drop_path) is not DropPath:
            raise NotFusable(f"{type(self.drop_path).__name__} isn't stochastic depth")
        calls = [fuse_run([conv, bn, self.relu], self.backend) for conv, bn in self.units()]
        if not self.skip:
            return Chain([("", call) for call in calls])
        *first, last = calls
        shortcut = self.fuse_shortcut()

        def call(x: Tensor) -> Tensor:
            y = x
            for unit in first:
                y = unit(y)
            return last(y, residual=shortcut(x))

        return call

    def fuse_shortcut(self) -> Call:
        if self.downsample is None:
            return lambda x: x
        if isinstance(self.downsample, nn.Sequential):
            return fuse_run([*self.downsample], self.backend)
        return self.downsample


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions, the first strided, and the shortcut: (N, in_channels, H, W) -> (N, channels, ceil(H /
    stride), ceil(W / stride)). `dilations` are those of the two; the rest as ResidualBlock."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        dilations: tuple[int, int] = (1, 1),
        downsample: nn.Module | None = None,
        skip: bool = True,
        drop_path: float = 0.0,
        **factory: Any,
    ):
        conv1 = conv3x3(in_channels, channels, stride, dilations[0], **factory)
        conv2 = conv3x3(channels, channels, 1, dilations[1], **factory)
        super().__init__([conv1, conv2], downsample, skip, drop_path, **factory)


class Bottleneck(ResidualBlock):
    """1x1, 3x3 (strided) and 1x1 convolutions, and the shortcut: (N, in_channels, H, W) -> (N, 4 * channels, ceil(H /
    stride), ceil(W / stride)). Of `dilations` the first is the 3x3 one's; the rest as ResidualBlock."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        dilations: tuple[int, int] = (1, 1),
        downsample: nn.Module | None = None,
        skip: bool = True,
        drop_path: float = 0.0,
        **factory: Any,
    ):
        conv1 = PointwiseConv2d(in_channels, channels, bias=False, **factory)
        conv2 = conv3x3(channels, channels, stride, dilations[0], **factory)
        conv3 = PointwiseConv2d(channels, channels * self.expansion, bias=False, **factory)
        super().__init__([conv1, conv2, conv3], downsample, skip, drop_path, **factory)
