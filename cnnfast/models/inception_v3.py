"""Inception v3, https://arxiv.org/abs/1512.00567: large filters factorised into small and one-dimensional ones."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cnnfast.models.branches import AuxiliaryNetwork, Branch, Branches, conv_bn
from cnnfast.models.features import FeatureInfo
from cnnfast.models.registry import INCEPTION_MEAN, INCEPTION_STD, register_model

InceptionOutputs = namedtuple("InceptionOutputs", ["logits", "aux_logits"])


def inception_a(channels: int, pool_features: int, **factory: Any) -> Branches:
    """1x1, 5x5, two 3x3 and average pooling: (N, channels, H, W) -> (N, 224 + pool_features, H, W)."""
    modules = {
        "branch1x1": conv_bn(channels, 64, 1, **factory),
        "branch5x5_1": conv_bn(channels, 48, 1, **factory),
        "branch5x5_2": conv_bn(48, 64, 5, **factory),
        "branch3x3dbl_1": conv_bn(channels, 64, 1, **factory),
        "branch3x3dbl_2": conv_bn(64, 96, 3, **factory),
        "branch3x3dbl_3": conv_bn(96, 96, 3, **factory),
        "pool": nn.AvgPool2d(3, 1, 1),
        "branch_pool": conv_bn(channels, pool_features, 1, **factory),
    }
    double = ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]
    return Branches(modules, [["branch1x1"], ["branch5x5_1", "branch5x5_2"], double, ["pool", "branch_pool"]])


def inception_b(channels: int, **factory: Any) -> Branches:
    """Halves the resolution: (N, channels, H, W) -> (N, channels + 480, (H - 1) // 2, (W - 1) // 2)."""
    modules = {
        "branch3x3": conv_bn(channels, 384, 3, 2, **factory),
        "branch3x3dbl_1": conv_bn(channels, 64, 1, **factory),
        "branch3x3dbl_2": conv_bn(64, 96, 3, **factory),
        "branch3x3dbl_3": conv_bn(96, 96, 3, 2, **factory),
        "pool": nn.MaxPool2d(3, 2),
    }
    return Branches(modules, [["branch3x3"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"], ["pool"]])


def inception_c(channels: int, c7: int, **factory: Any) -> Branches:
    """7x7 as 1x7 and 7x1, once and twice: (N, channels, H, W) -> (N, 768, H, W); `c7` channels inside."""
    row, column = (1, 7), (7, 1)
    modules = {
        "branch1x1": conv_bn(channels, 192, 1, **factory),
        "branch7x7_1": conv_bn(channels, c7, 1, **factory),
        "branch7x7_2": conv_bn(c7, c7, row, **factory),
        "branch7x7_3": conv_bn(c7, 192, column, **factory),
        "branch7x7dbl_1": conv_bn(channels, c7, 1, **factory),
        "branch7x7dbl_2": conv_bn(c7, c7, column, **factory),
        "branch7x7dbl_3": conv_bn(c7, c7, row, **factory),
        "branch7x7dbl_4": conv_bn(c7, c7, column, **factory),
        "branch7x7dbl_5": conv_bn(c7, 192, row, **factory),
        "pool": nn.AvgPool2d(3, 1, 1),
        "branch_pool": conv_bn(channels, 192, 1, **factory),
    }
    once, twice = ([f"branch7x7{kind}_{n}" for n in range(1, last)] for kind, last in (("", 4), ("dbl", 6)))
    return Branches(modules, [["branch1x1"], once, twice, ["pool", "branch_pool"]])


def inception_d(channels: int, **factory: Any) -> Branches:
    """Halves the resolution: (N, channels, H, W) -> (N, channels + 512, (H - 1) // 2, (W - 1) // 2)."""
    modules = {
        "branch3x3_1": conv_bn(channels, 192, 1, **factory),
        "branch3x3_2": conv_bn(192, 320, 3, 2, **factory),
        "branch7x7x3_1": conv_bn(channels, 192, 1, **factory),
        "branch7x7x3_2": conv_bn(192, 192, (1, 7), **factory),
        "branch7x7x3_3": conv_bn(192, 192, (7, 1), **factory),
        "branch7x7x3_4": conv_bn(192, 192, 3, 2, **factory),
        "pool": nn.MaxPool2d(3, 2),
    }
    long = [f"branch7x7x3_{n}" for n in range(1, 5)]
    return Branches(modules, [["branch3x3_1", "branch3x3_2"], long, ["pool"]])


def inception_e(channels: int, **factory: Any) -> Branches:
    """1x3 and 3x1 side by side instead of 3x3: (N, channels, H, W) -> (N, 2048, H, W)."""
    modules = {
        "branch1x1": conv_bn(channels, 320, 1, **factory),
        "branch3x3_1": conv_bn(channels, 384, 1, **factory),
        "branch3x3_2a": conv_bn(384, 384, (1, 3), **factory),
        "branch3x3_2b": conv_bn(384, 384, (3, 1), **factory),
        "branch3x3dbl_1": conv_bn(channels, 448, 1, **factory),
        "branch3x3dbl_2": conv_bn(448, 384, 3, **factory),
        "branch3x3dbl_3a": conv_bn(384, 384, (1, 3), **factory),
        "branch3x3dbl_3b": conv_bn(384, 384, (3, 1), **factory),
        "pool": nn.AvgPool2d(3, 1, 1),
        "branch_pool": conv_bn(channels, 192, 1, **factory),
    }
    single: Branch = ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")]
    double: Branch = ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")]
    return Branches(modules, [["branch1x1"], single, double, ["pool", "branch_pool"]])


class AuxiliaryClassifier(nn.Module):
    """(N, channels, H, W) -> (N, num_classes): average pooling, 1x1 and 5x5 convolution, linear layer. Maps of at least
    17 x 17."""

    classifier_name = "fc"

    def __init__(self, channels: int, num_classes: int, **factory: Any):
        super().__init__()
        self.conv0 = conv_bn(channels, 128, 1, **factory)
        self.conv1 = conv_bn(128, 768, 5, padding=0, **factory)
        self.fc: nn.Module = nn.Linear(768, num_classes, **factory) if num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.conv0(F.avg_pool2d(x, 5, 3)))
        return self.fc(x.mean((2, 3)))

    def reset_classifier(self, num_classes: int) -> None:
        weight = self.conv0.conv.weight
        factory: dict[str, Any] = dict(device=weight.device, dtype=weight.dtype)
        self.fc = nn.Linear(768, num_classes, **factory) if num_classes > 0 else nn.Identity()


@register_model(
    "inception_v3",
    timm="inception_v3",
    torchvision="inception_v3",
    paper="https://arxiv.org/abs/1512.00567",
    year=2015,
    input_size=(3, 299, 299),
    mean=INCEPTION_MEAN,
    std=INCEPTION_STD,
)
class InceptionV3(AuxiliaryNetwork):
    """Inception v3 (2015): 23,834,568 parameters, 5.71 GMACs at 299 x 299; input (x - 127.5) / 127.5, RGB.

    (N, in_chans, H, W) -> (N, num_classes), H and W at least 75. State-dict keys of timm's and
    torchvision's inception_v3: `Conv2d_1a_3x3.conv`, `Mixed_5b.branch1x1.conv`, ..., `fc`, `AuxLogits`. Trained layer
    by layer; in eval mode with grad disabled each convolution is one call with what follows it. The fastest input is
    channels_last; the network makes it so after the first layer in any case.

    As the released TensorFlow network: behind the first pooling a 1x1, a 3x3 and a pooling, where the paper's table has
    3x3 convolutions of stride 1, 2 and 1; the first three modules keep a 5x5, for which the paper has two 3x3. BN's eps
    is 1e-3. torchvision's weights are the same network's; it turns images normalised by ImageNet's mean and deviation
    into this range inside the network (transform_input).

    Args:
        num_classes: outputs; 0 for none (forward returns pooled features).
        in_chans: channels of x.
        drop_rate: dropout before the classifier; torchvision's default is 0.5, the paper names none.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "".
        aux_logits: a classifier on Mixed_6e, 3,326,696 parameters: in training forward returns InceptionOutputs(logits,
            aux_logits). Images must then be at least 299 high and wide.

    Rethinking the Inception Architecture for Computer Vision, https://arxiv.org/abs/1512.00567.
    """

    classifier_name = "fc"
    in_pretrainedmodels = True
    min_size = 75  # convolutions and poolings without padding
    auxiliary = (("Mixed_6e", "AuxLogits", "aux_logits"),)
    outputs = InceptionOutputs
    aux_sizes = (299, 1 << 30)

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        *,
        aux_logits: bool = False,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans = in_chans
        self.aux_logits = aux_logits
        self.Conv2d_1a_3x3 = conv_bn(in_chans, 32, 3, 2, channels_last=True, **factory)
        self.Conv2d_2a_3x3 = conv_bn(32, 32, 3, padding=0, **factory)
        self.Conv2d_2b_3x3 = conv_bn(32, 64, 3, **factory)
        self.Pool1 = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = conv_bn(64, 80, 1, **factory)
        self.Conv2d_4a_3x3 = conv_bn(80, 192, 3, padding=0, **factory)
        self.Pool2 = nn.MaxPool2d(3, 2)
        self.Mixed_5b = inception_a(192, 32, **factory)
        self.Mixed_5c = inception_a(256, 64, **factory)
        self.Mixed_5d = inception_a(288, 64, **factory)
        self.Mixed_6a = inception_b(288, **factory)
        self.Mixed_6b = inception_c(768, 128, **factory)
        self.Mixed_6c = inception_c(768, 160, **factory)
        self.Mixed_6d = inception_c(768, 160, **factory)
        self.Mixed_6e = inception_c(768, 192, **factory)
        self.Mixed_7a = inception_d(768, **factory)
        self.Mixed_7b = inception_e(1280, **factory)
        self.Mixed_7c = inception_e(2048, **factory)
        self.steps = [name for name, _ in self.named_children()]
        taps = {"Conv2d_2b_3x3": 64, "Conv2d_4a_3x3": 192, "Mixed_5d": 288, "Mixed_6e": 768, "Mixed_7c": 2048}
        self.feature_info = FeatureInfo.halving(taps)
        self._make_head(2048, num_classes, drop_rate, global_pool, factory)
        self.AuxLogits = AuxiliaryClassifier(768, num_classes, **factory) if aux_logits else None
        self._init_weights()

    def _init_weights(self) -> None:
        """As TensorFlow's. torchvision and timm mean to, but give AuxLogits.conv1 0.1: their 0.01 is on the block."""
        deviations = {"AuxLogits.conv1.conv": 0.01, "AuxLogits.fc": 0.001}
        for name, module in self.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=deviations.get(name, 0.1))

    def checkpoint_keys(self, source: str) -> dict[str, str]:
        """torchvision's are timm's."""
        return super().checkpoint_keys("timm" if source == "torchvision" else source)
