"""The ResNets for CIFAR-10 of https://arxiv.org/abs/1512.03385, section 4.2: 32 x 32 pixels, three narrow stages."""

from __future__ import annotations

from typing import Any

from torch import nn

from cnnfast.models.registry import CIFAR10_MEAN, CIFAR10_STD, register_model
from cnnfast.models.resnet import BasicBlock, ResNet


class CifarResNet(ResNet):
    """6 n + 2 layers: (N, in_chans, H, W) -> (N, num_classes); n blocks of two 3x3 convolutions in each of three stages
    of 16, 32 and 64 channels, behind one 3x3 convolution. Keys as ResNet's: `conv1`, ..., `layer3.0.conv1`, `fc`.

    Input normalised by CIFAR-10's mean and deviation, RGB; the paper only subtracts the mean of each pixel. Shortcut
    A's zeros are behind x's channels; some popular implementations have half of them before.

    Args:
        blocks: n, of each stage.
        shortcut: as ResNet's; the paper's CIFAR ResNets have "A" everywhere.
        output_stride: 4, 2 or 1.
        num_classes, ...: as ResNet's.

    Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385.
    """

    widths = (16, 32, 64)
    output_strides = (1, 2, 4)

    def __init__(
        self,
        blocks: int,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        *,
        output_stride: int = 4,
        shortcut: str | None = "A",
        zero_init_last: bool = False,
        device: Any = None,
        dtype: Any = None,
    ):
        options: dict[str, Any] = dict(output_stride=output_stride, shortcut=shortcut, zero_init_last=zero_init_last)
        options.update(device=device, dtype=dtype)
        rates = drop_rate, drop_path_rate
        super().__init__(BasicBlock, (blocks,) * 3, num_classes, in_chans, *rates, global_pool, **options)

    def _make_stem(self, channels: int, factory: dict[str, Any]) -> int:
        self.conv1 = nn.Conv2d(self.in_chans, channels, 3, 1, 1, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(channels, **factory)
        self.relu = nn.ReLU(inplace=True)
        return 1


_CIFAR: dict[str, Any] = dict(
    paper="https://arxiv.org/abs/1512.03385",
    year=2015,
    input_size=(3, 32, 32),
    crop_pct=1.0,
    mean=CIFAR10_MEAN,
    std=CIFAR10_STD,
    num_classes=10,
    label_set="cifar10",
)


@register_model("cifar_resnet20", **_CIFAR)
def cifar_resnet20(**options: Any) -> CifarResNet:
    """ResNet-20 for CIFAR-10 (2015): 269,722 parameters, 0.041 GMACs at 32 x 32. See CifarResNet.
    https://arxiv.org/abs/1512.03385"""
    return CifarResNet(3, **options)


@register_model("cifar_resnet32", **_CIFAR)
def cifar_resnet32(**options: Any) -> CifarResNet:
    """ResNet-32 for CIFAR-10 (2015): 464,154 parameters, 0.069 GMACs at 32 x 32. See CifarResNet.
    https://arxiv.org/abs/1512.03385"""
    return CifarResNet(5, **options)


@register_model("cifar_resnet44", **_CIFAR)
def cifar_resnet44(**options: Any) -> CifarResNet:
    """ResNet-44 for CIFAR-10 (2015): 658,586 parameters, 0.097 GMACs at 32 x 32. See CifarResNet.
    https://arxiv.org/abs/1512.03385"""
    return CifarResNet(7, **options)


@register_model("cifar_resnet56", **_CIFAR)
def cifar_resnet56(**options: Any) -> CifarResNet:
    """ResNet-56 for CIFAR-10 (2015): 853,018 parameters, 0.13 GMACs at 32 x 32. See CifarResNet.
    https://arxiv.org/abs/1512.03385"""
    return CifarResNet(9, **options)


@register_model("cifar_resnet110", **_CIFAR)
def cifar_resnet110(**options: Any) -> CifarResNet:
    """ResNet-110 for CIFAR-10 (2015): 1,727,962 parameters, 0.25 GMACs at 32 x 32. See CifarResNet.
    https://arxiv.org/abs/1512.03385"""
    return CifarResNet(18, **options)


@register_model("cifar_resnet1202", **_CIFAR)
def cifar_resnet1202(**options: Any) -> CifarResNet:
    """ResNet-1202 for CIFAR-10 (2015): 19,421,274 parameters, 2.8 GMACs at 32 x 32. See CifarResNet.
    https://arxiv.org/abs/1512.03385"""
    return CifarResNet(200, **options)
