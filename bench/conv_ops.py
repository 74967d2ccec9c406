"""Cases of `cnnfast bench ops` for convolutions, alone and in fused blocks.

Ours is the packed form, one op call. The peers run plain convolutions whose BN is folded into weight and bias already
(the strongest form that eager PyTorch has), with explicit padding where TensorFlow's 'same' needs it, as timm does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from cnnfast import ops

from .measure import Problem, Settings

ACTIVATIONS: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
    None: lambda t: t,
    "relu": F.relu,
    "relu6": F.relu6,
}


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after, so that the output has ceil(size / stride) elements: the odd one comes after."""
    total = max(0, (math.ceil(size / stride) - 1) * stride + kernel - size)
    return total // 2, total - total // 2


class PlainConv(nn.Module):
    """(activation ->) pad -> conv + bias (-> activation), each an op of its own."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        padding: tuple[int, int] = (0, 0),
        pre_activation: str | None = None,
        activation: str | None = None,
    ):
        super().__init__()
        symmetric = padding[0] == padding[1]
        self.pad = None if symmetric else (*padding, *padding)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, padding[0] if symmetric else 0, groups=groups
        ).requires_grad_(False)
        fan_in = self.conv.weight[0].numel()
        nn.init.normal_(self.conv.weight, std=fan_in**-0.5)
        nn.init.normal_(self.conv.get_parameter("bias"))
        self.pre_activation, self.activation = ACTIVATIONS[pre_activation], ACTIVATIONS[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pre_activation(x)
        x = x if self.pad is None else F.pad(x, self.pad)
        return self.activation(self.conv(x))


class PlainBlock(nn.Sequential):
    """Convolutions in a row, with a shortcut around them or not."""

    def __init__(self, *layers: PlainConv, residual: bool):
        super().__init__(*layers)
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y + x if self.residual else y

    def convs(self) -> list[nn.Conv2d]:
        return [module for module in self.modules() if isinstance(module, nn.Conv2d)]


@dataclass(frozen=True)
class ConvCase:
    """An op at one shape. `size` is the input's height and width; `expanded` is inverted_residual's middle."""

    group: str
    network: str
    in_channels: int
    out_channels: int
    size: int
    kernel: int = 1
    stride: int = 1
    expanded: int = 0
    tf_same: bool = False
    pre_activation: str | None = None
    mid_activation: str | None = None
    activation: str | None = None

    @property
    def residual(self) -> bool:
        return self.group == "inverted_residual" and self.stride == 1 and self.in_channels == self.out_channels

    @property
    def name(self) -> str:
        channels = [self.in_channels, *([self.expanded] if self.expanded else []), self.out_channels]
        kernel = f" k{self.kernel}" if self.kernel > 1 else ""
        stride = f" s{self.stride}" if self.stride > 1 else ""
        return f"{'-'.join(map(str, channels))} @{self.size}{kernel}{stride} ({self.network})"

    @property
    def padding(self) -> tuple[int, int]:
        symmetric = (self.kernel // 2, self.kernel // 2)
        return same_padding(self.size, self.kernel, self.stride) if self.tf_same else symmetric

    def op(self, plain: nn.Module, backend: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """The op's plain, differentiable form, with the weights of the module that `build` made."""
        convs = [module for module in plain.modules() if isinstance(module, nn.Conv2d)]
        run, options = getattr(ops, self.group), _options(self)

        def call(x: torch.Tensor) -> torch.Tensor:
            residual = {"residual": x} if self.residual else {}
            tensors = (*(conv.weight for conv in convs), *(conv.bias for conv in convs))
            return run(x, *tensors, **options, **residual, backend=backend)

        return call

    def build(self, settings: Settings) -> Problem:
        plain = PlainBlock(*_layers(self), residual=self.residual).to(settings.dtype).eval()
        x = torch.randn(settings.batch, self.in_channels, self.size, self.size).to(settings.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        flops, elements = _count(plain, x)
        return Problem(lambda: _ours(self, plain, x), plain, x, flops, elements * x.element_size())


def _layers(case: ConvCase) -> list[PlainConv]:
    c, k = case.in_channels, case.out_channels
    depthwise: dict[str, Any] = {"kernel": case.kernel, "stride": case.stride, "padding": case.padding}
    if case.group == "depthwise_conv2d":
        return [PlainConv(c, c, groups=c, **depthwise, activation=case.activation)]
    if case.group == "conv2d":
        return [PlainConv(c, k, case.kernel, case.stride, padding=case.padding, activation=case.activation)]
    if case.group == "pointwise_conv2d":
        return [PlainConv(c, k, stride=case.stride, activation=case.activation)]
    if case.group == "separable_conv2d":
        depthwise |= {"pre_activation": case.pre_activation, "activation": case.mid_activation}
        return [PlainConv(c, c, groups=c, **depthwise), PlainConv(c, k, activation=case.activation)]
    e = case.expanded
    return [
        PlainConv(c, e, activation="relu6"),
        PlainConv(e, e, groups=e, **depthwise, activation="relu6"),
        PlainConv(e, k),
    ]


def _options(case: ConvCase) -> dict[str, Any]:
    """What the op takes besides tensors."""
    before, after = case.padding
    options: dict[str, Any] = {"stride": case.stride, "activation": case.activation}
    if case.group != "pointwise_conv2d":
        options["padding"] = (before, after, before, after)
    if case.group == "separable_conv2d":
        options |= {"pre_activation": case.pre_activation, "mid_activation": case.mid_activation}
    return options


def _ours(case: ConvCase, plain: PlainBlock, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Pack the weights of `plain`; the call is one op."""
    convs = plain.convs()
    options = _options(case) | {"out_channels": case.out_channels}
    if case.group != "pointwise_conv2d":
        options["kernel_size"] = case.kernel
    if case.group == "inverted_residual":
        options |= {"expanded_channels": case.expanded, "residual": x if case.residual else None}
    packed = getattr(ops, f"pack_{case.group}")(*(conv.weight for conv in convs), *(conv.bias for conv in convs))
    run = getattr(ops, f"{case.group}_packed")
    return lambda: run(x, packed, **options)


def _count(plain: PlainBlock, x: torch.Tensor) -> tuple[int, int]:
    """FLOPs (two a multiply-add) and the elements of input, weights, output and residual, once each."""
    macs, weights, y = 0, 0, x
    for layer, conv in zip(plain, plain.convs(), strict=True):
        y = layer(y)
        macs += y.numel() * conv.weight[0].numel()
        weights += sum(parameter.numel() for parameter in conv.parameters())
    return 2 * macs, x.numel() + weights + y.numel()  # the residual is x itself
