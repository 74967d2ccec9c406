"""ResNets, https://arxiv.org/abs/1512.03385, and the same paper's plain networks, which lack their shortcuts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from cnnfast.models.features import FeatureInfo, strided_stages
from cnnfast.models.network import Network
from cnnfast.models.registry import register_model
from cnnfast.models.residual import BasicBlock, Bottleneck, PaddedShortcut, ResidualBlock, projection


class ResNet(Network):
    """(N, in_chans, H, W) -> (N, num_classes). State-dict keys are torchvision's, which are timm's, too: `conv1`,
    `bn1`, `layer1.0.conv1`, ..., `layer2.0.downsample.0`, ..., `fc`.

    Trained layer by layer; in eval mode with grad disabled each convolution is one call, with its BN, its ReLU and,
    where a block ends, the shortcut. The fastest input is channels_last; the networks make it so after the first layer
    in any case.

    Bottlenecks have their stride in the 3x3 convolution, as torchvision's and timm's. The paper has it in the first 1x1
    one (as se_resnet50): 3.9 GMACs for ResNet-50, which it counts as 3.8 GFLOPs, where these take 4.1. It subtracts
    each pixel's mean from the input; here, as for the published weights, the input is normalised by ImageNet's mean and
    deviation, RGB.

    Args:
        block: BasicBlock or Bottleneck.
        depths: blocks of each stage.
        num_classes: outputs; 0 for none (forward returns pooled features).
        in_chans: channels of x.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, growing linearly from 0 at the first block to this at the last.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "".
        output_stride: 32, 16 or 8: from where strides would exceed it convolutions are dilated instead.
        shortcut: where a block changes the shape: "B", a projection, or "A", without parameters: x strided, zeros for
            the channels that it lacks. None: no shortcut in any block, the paper's plain networks.
        zero_init_last: blocks begin as their shortcuts: the weights of each last batch normalisation as zeros
            (https://arxiv.org/abs/1706.02677); timm's default, not torchvision's and the paper's.

    Raises:
        ValueError: another output_stride or shortcut, or a drop_path_rate where there is no shortcut.

    Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385.
    """

    classifier_name = "fc"
    key_source = "torchvision"
    widths: tuple[int, ...] = (64, 128, 256, 512)  # of the stages
    output_strides: tuple[int, ...] = (8, 16, 32)

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        *,
        output_stride: int = 32,
        shortcut: str | None = "B",
        zero_init_last: bool = False,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        if shortcut not in ("A", "B", None):
            raise ValueError(f"shortcut must be 'A', 'B' or None, got {shortcut!r}")
        if shortcut is None and drop_path_rate:
            raise ValueError(f"drop_path_rate must be 0 without shortcuts, got {drop_path_rate}")
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans = in_chans
        self.in_pretrainedmodels = shortcut == "B"
        channels = self.widths[0]
        reduction = self._make_stem(channels, factory)
        self.steps = [("conv1", "bn1", "relu"), *(["maxpool"] if hasattr(self, "maxpool") else [])]
        maps = [dict(num_chs=channels, reduction=self.conv1.stride[0], module="relu")]
        strides = [1] + [2] * (len(self.widths) - 1)
        stages = strided_stages(strides, output_stride, reduction, self.output_strides)
        total, index = sum(depths), 0
        for n, (blocks, width, (stride, first, dilation)) in enumerate(
            zip(depths, self.widths, stages, strict=True), 1
        ):
            layer = nn.Sequential()
            reduction *= stride
            for _ in range(blocks):
                downsample = _shortcut(shortcut, channels, width * block.expansion, stride, **factory)
                options: dict[str, Any] = dict(skip=shortcut is not None, **factory)
                options.update(dilations=(first, dilation), drop_path=drop_path_rate * index / max(total - 1, 1))
                layer.append(block(channels, width, stride, downsample=downsample, **options))
                channels, stride, first = width * block.expansion, 1, dilation
                index += 1
            setattr(self, f"layer{n}", layer)
            self.steps.append(f"layer{n}")
            maps.append(dict(num_chs=channels, reduction=reduction, module=f"layer{n}"))
        self.feature_info = FeatureInfo(maps)
        self._make_head(channels, num_classes, drop_rate, global_pool, factory)
        self._init_weights(zero_init_last)

    def _make_stem(self, channels: int, factory: dict[str, Any]) -> int:
        """How many of the input's pixels one of the stem's output stands for, along each side."""
        self.conv1 = nn.Conv2d(self.in_chans, channels, 7, 2, 3, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(channels, **factory)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        return 4

    def _init_weights(self, zero_init_last: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, ResidualBlock) and zero_init_last:
                nn.init.zeros_(module.units()[-1][1].weight)

    def checkpoint_keys(self, source: str) -> dict[str, str]:
        """timm's keys are torchvision's."""
        return super().checkpoint_keys("torchvision" if source == "timm" else source)


def _shortcut(kind: str | None, in_channels: int, out_channels: int, stride: int, **factory: Any) -> nn.Module | None:
    if kind is None or (stride == 1 and in_channels == out_channels):
        return None
    if kind == "A":
        return PaddedShortcut(out_channels, stride)
    return projection(in_channels, out_channels, stride, **factory)


_PAPER: dict[str, Any] = dict(paper="https://arxiv.org/abs/1512.03385", year=2015, interpolation="bilinear")


@register_model("resnet18", timm="resnet18", torchvision="resnet18", **_PAPER)
def resnet18(**options: Any) -> ResNet:
    """ResNet-18 (2015): blocks of two 3x3 convolutions. 11,689,512 parameters, 1.8 GMACs at 224 x 224. See ResNet.
    https://arxiv.org/abs/1512.03385"""
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


@register_model("resnet34", timm="resnet34", torchvision="resnet34", **_PAPER)
def resnet34(**options: Any) -> ResNet:
    """ResNet-34 (2015), as resnet18: 21,797,672 parameters, 3.7 GMACs at 224 x 224. https://arxiv.org/abs/1512.03385"""
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)


@register_model("resnet50", timm="resnet50", torchvision="resnet50", **_PAPER)
def resnet50(**options: Any) -> ResNet:
    """ResNet-50 (2015): bottlenecks, strided in the 3x3 convolution. 25,557,032 parameters, 4.1 GMACs at 224 x 224. See
    ResNet. https://arxiv.org/abs/1512.03385"""
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


@register_model("resnet101", timm="resnet101", torchvision="resnet101", **_PAPER)
def resnet101(**options: Any) -> ResNet:
    """ResNet-101 (2015), as resnet50: 44,549,160 parameters, 7.8 GMACs at 224 x 224. https://arxiv.org/abs/1512.03385"""
    return ResNet(Bottleneck, (3, 4, 23, 3), **options)


@register_model("resnet152", timm="resnet152", torchvision="resnet152", **_PAPER)
def resnet152(**options: Any) -> ResNet:
    """ResNet-152 (2015), as resnet50: 60,192,808 parameters, 11.5 GMACs at 224 x 224. https://arxiv.org/abs/1512.03385"""
    return ResNet(Bottleneck, (3, 8, 36, 3), **options)


@register_model("plain18", **_PAPER)
def plain18(**options: Any) -> ResNet:
    """The paper's 18-layer plain network (2015): resnet18 without shortcuts. 11,515,688 parameters, 1.8 GMACs at 224 x
    224. See ResNet. https://arxiv.org/abs/1512.03385"""
    return ResNet(BasicBlock, (2, 2, 2, 2), shortcut=None, **options)


@register_model("plain34", **_PAPER)
def plain34(**options: Any) -> ResNet:
    """The paper's 34-layer plain network (2015): resnet34 without shortcuts, which the paper trains to a larger error
    than plain18. 21,623,848 parameters, 3.6 GMACs at 224 x 224. See ResNet. https://arxiv.org/abs/1512.03385"""
    return ResNet(BasicBlock, (3, 4, 6, 3), shortcut=None, **options)
