"""The cases of `cnnfast bench ops`: each op at the real networks' shapes.

Ours is the packed form where the op has weights, one op call. The peers run plain convolutions whose BN is folded into
weight and bias already (the strongest form that eager PyTorch has), with explicit padding where TensorFlow's 'same'
needs it, as timm does.
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

from . import backward
from .channel_ops import SCALE_SHIFTS, LocalResponseNormCase, ScaleShiftCase, SqueezeExciteCase
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
class OpCase:
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


def _layers(case: OpCase) -> list[PlainConv]:
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


def _options(case: OpCase) -> dict[str, Any]:
    """What the op takes besides tensors."""
    before, after = case.padding
    options: dict[str, Any] = {"stride": case.stride, "activation": case.activation}
    if case.group != "pointwise_conv2d":
        options["padding"] = (before, after, before, after)
    if case.group == "separable_conv2d":
        options |= {"pre_activation": case.pre_activation, "mid_activation": case.mid_activation}
    return options


def _ours(case: OpCase, plain: PlainBlock, x: torch.Tensor) -> Callable[[], torch.Tensor]:
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


def _separable(network: str, channels: tuple[int, int], size: int, **kw) -> OpCase:
    return OpCase("separable_conv2d", network, *channels, size, kernel=3, **kw)


def _mbconv(network: str, channels: tuple[int, int], size: int, kernel: int, stride: int, tf_same: bool) -> OpCase:
    expanded = 6 * channels[0]
    return OpCase("inverted_residual", network, *channels, size, kernel, stride, expanded, tf_same, activation="relu6")


def _depthwise(network: str, channels: int, size: int, kernel: int, stride: int = 1, **kw) -> OpCase:
    return OpCase("depthwise_conv2d", network, channels, channels, size, kernel, stride, **kw)


def _dense(network: str, channels: tuple[int, int], size: int, kernel: int, stride: int = 1, **kw) -> OpCase:
    return OpCase("conv2d", network, *channels, size, kernel, stride, **kw)


def _pointwise(network: str, channels: tuple[int, int], size: int, stride: int = 1, **kw) -> OpCase:
    return OpCase("pointwise_conv2d", network, *channels, size, stride=stride, **kw)


_LITE0, _V1, _V2, _XCEPTION = "lite0", "mobilenetv1", "mobilenetv2", "xception"
_ALEXNET, _GOOGLENET, _SERESNET = "alexnet", "googlenet", "seresnet50"

AnyCase = OpCase | SqueezeExciteCase | LocalResponseNormCase | ScaleShiftCase
CASES: tuple[AnyCase, ...] = (
    _depthwise(_XCEPTION, 128, 147, 3),
    _depthwise(_XCEPTION, 728, 19, 3),
    _depthwise(_LITE0, 96, 112, 3, 2, tf_same=True, activation="relu6"),
    _depthwise(_LITE0, 144, 56, 5, 2, tf_same=True, activation="relu6"),
    _depthwise(_LITE0, 672, 14, 5, activation="relu6"),
    _depthwise(_LITE0, 1152, 7, 5, activation="relu6"),
    _pointwise(_XCEPTION, (64, 128), 147, stride=2),
    _pointwise(_XCEPTION, (728, 1024), 19, stride=2),
    _pointwise(_V2, (32, 192), 28, activation="relu6"),
    _pointwise(_V2, (576, 96), 14),
    _pointwise(_LITE0, (320, 1280), 7, activation="relu6"),
    # every distinct unit of Xception at 299 (those of 728 @19 make up 25 of its 34)
    _separable(_XCEPTION, (64, 128), 147),
    _separable(_XCEPTION, (128, 128), 147, pre_activation="relu"),
    _separable(_XCEPTION, (128, 256), 74, pre_activation="relu"),
    _separable(_XCEPTION, (256, 256), 74, pre_activation="relu"),
    _separable(_XCEPTION, (256, 728), 37, pre_activation="relu"),
    _separable(_XCEPTION, (728, 728), 37, pre_activation="relu"),
    _separable(_XCEPTION, (728, 728), 19, pre_activation="relu"),
    _separable(_XCEPTION, (728, 1024), 19, pre_activation="relu"),
    _separable(_XCEPTION, (1024, 1536), 10, activation="relu"),
    _separable(_XCEPTION, (1536, 2048), 10, activation="relu"),
    _separable(_LITE0, (32, 16), 112, mid_activation="relu6"),
    # every distinct unit of MobileNetV1 at 224 (that of 512 @14 is 5 of its 13)
    *(
        _separable(_V1, channels, size, stride=stride, mid_activation="relu6", activation="relu6")
        for channels, size, stride in (
            ((32, 64), 112, 1),
            ((64, 128), 112, 2),
            ((128, 128), 56, 1),
            ((128, 256), 56, 2),
            ((256, 256), 28, 1),
            ((256, 512), 28, 2),
            ((512, 512), 14, 1),
            ((512, 1024), 14, 2),
            ((1024, 1024), 7, 1),
        )
    ),
    # every distinct block of EfficientNet-Lite0 at 224
    _mbconv(_LITE0, (16, 24), 112, 3, 2, True),
    _mbconv(_LITE0, (24, 24), 56, 3, 1, True),
    _mbconv(_LITE0, (24, 40), 56, 5, 2, True),
    _mbconv(_LITE0, (40, 40), 28, 5, 1, True),
    _mbconv(_LITE0, (40, 80), 28, 3, 2, True),
    _mbconv(_LITE0, (80, 80), 14, 3, 1, True),
    _mbconv(_LITE0, (80, 112), 14, 5, 1, True),
    _mbconv(_LITE0, (112, 112), 14, 5, 1, True),
    _mbconv(_LITE0, (112, 192), 14, 5, 2, True),
    _mbconv(_LITE0, (192, 192), 7, 5, 1, True),
    _mbconv(_LITE0, (192, 320), 7, 3, 1, True),
    # every block of MobileNetV2 at 224 that Lite0 doesn't have (32-16 and 24-144-24 @56 are the same in both)
    _mbconv(_V2, (16, 24), 112, 3, 2, False),
    _mbconv(_V2, (24, 32), 56, 3, 2, False),
    _mbconv(_V2, (32, 32), 28, 3, 1, False),
    _mbconv(_V2, (32, 64), 28, 3, 2, False),
    _mbconv(_V2, (64, 64), 14, 3, 1, False),
    _mbconv(_V2, (64, 96), 14, 3, 1, False),
    _mbconv(_V2, (96, 96), 14, 3, 1, False),
    _mbconv(_V2, (96, 160), 14, 3, 2, False),
    _mbconv(_V2, (160, 160), 7, 3, 1, False),
    _mbconv(_V2, (160, 320), 7, 3, 1, False),
    _dense(_LITE0, (3, 32), 224, 3, 2, tf_same=True, activation="relu6"),
    _dense(_SERESNET, (3, 64), 224, 7, 2, activation="relu"),
    _dense(_SERESNET, (64, 64), 56, 3, activation="relu"),
    _dense(_SERESNET, (256, 256), 14, 3, activation="relu"),
    SqueezeExciteCase(_SERESNET, 256, 56),
    SqueezeExciteCase(_SERESNET, 512, 28),
    SqueezeExciteCase(_SERESNET, 1024, 14),
    SqueezeExciteCase(_SERESNET, 2048, 7),
    LocalResponseNormCase(_ALEXNET, 96, 55, k=2.0),
    LocalResponseNormCase(_ALEXNET, 256, 27, k=2.0),
    LocalResponseNormCase(_GOOGLENET, 64, 56, k=1.0),
    LocalResponseNormCase(_GOOGLENET, 192, 56, k=1.0),
    *SCALE_SHIFTS,
)
OPS: tuple[str, ...] = tuple(dict.fromkeys(case.group for case in (*CASES, *backward.CASES)))
_QUICK = {"728-728 @19 k3 (xception)", "728-1024 @19 s2 (xception)", "32-16 @112 k3 (lite0)"}
_QUICK |= {"24-144-24 @56 k3 (lite0)", "112-672-112 @14 k5 (lite0)", "96 @55 (alexnet)", "512 @28 (seresnet50)"}
_QUICK |= {"728 @19 k3 (xception)", "3-32 @224 k3 s2 (lite0)", "64-64 @56 k3 (seresnet50)"}
_QUICK |= {"728 @19 residual (xception)", "240 @28 silu (efficientnet_b0)", "728 @37 pool (xception)"}


def select(names: list[str] | None = None, quick: bool = False) -> list[AnyCase | backward.DepthwiseBackwardCase]:
    """The cases of the ops `names` (all if None); `quick`: one or two of each op."""
    cases = *CASES, *backward.CASES
    return [case for case in cases if (not names or case.group in names) and (not quick or case.name in _QUICK)]
