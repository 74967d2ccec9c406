"""Inception-ResNet v2, https://arxiv.org/abs/1602.07261: Inception modules as residuals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cnnfast.models.branches import Branches, conv_bn, conv_chain
from cnnfast.models.features import FeatureInfo
from cnnfast.models.network import Network
from cnnfast.models.registry import INCEPTION_MEAN, INCEPTION_STD, register_model
from cnnfast.nn import PointwiseConv2d
from cnnfast.nn.fusable import activation_name
from cnnfast.nn.fusion import fuse_pointwise_conv2d


class ResidualBranches(Branches):
    """act(x + scale * conv2d(branches of x)): (N, channels, H, W) -> (N, channels, H, W).

    For inference the scale is part of the 1x1 convolution's weights, and x is added inside its call.

    Args:
        modules: the branches; `joined` channels in all.
        scale: of the residual, which keeps training stable.
        relu: whether a ReLU follows.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        joined: int,
        channels: int,
        scale: float,
        relu: bool = True,
        **factory: Any,
    ):
        super().__init__(modules)
        self.scale = scale
        self.conv2d = PointwiseConv2d(joined, channels, **factory)
        self.act: nn.Module = nn.ReLU(inplace=True) if relu else nn.Identity()

    def layers(self, x: Tensor) -> Tensor:
        return self.act(self.conv2d(super().layers(x)) * self.scale + x)

    def fuse(self) -> Any:
        join = super().fuse()
        activation = activation_name(self.act)
        project = fuse_pointwise_conv2d(self.conv2d, scale=self.scale, activation=activation, backend=self.backend)
        return lambda x: project(join(x), residual=x)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


def mixed_5b(**factory: Any) -> Branches:
    """(N, 192, H, W) -> (N, 320, H, W)"""
    pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    return Branches(
        {
            "branch0": conv_bn(192, 96, 1, **factory),
            "branch1": conv_chain(192, (48, 1), (64, 5), **factory),
            "branch2": conv_chain(192, (64, 1), (96, 3), (96, 3), **factory),
            "branch3": nn.Sequential(pool, conv_bn(192, 64, 1, **factory)),
        }
    )


def block35(**factory: Any) -> ResidualBranches:
    """Inception-ResNet-A, named by its maps' size."""
    branches = {
        "branch0": conv_bn(320, 32, 1, **factory),
        "branch1": conv_chain(320, (32, 1), (32, 3), **factory),
        "branch2": conv_chain(320, (32, 1), (48, 3), (64, 3), **factory),
    }
    return ResidualBranches(branches, 128, 320, 0.17, **factory)


def mixed_6a(**factory: Any) -> Branches:
    """(N, 320, H, W) -> (N, 1088, (H - 1) // 2, (W - 1) // 2)"""
    return Branches(
        {
            "branch0": conv_bn(320, 384, 3, 2, **factory),
            "branch1": conv_chain(320, (256, 1), (256, 3), (384, 3, 2), **factory),
            "branch2": nn.MaxPool2d(3, 2),
        }
    )


def block17(**factory: Any) -> ResidualBranches:
    """Inception-ResNet-B."""
    branches = {
        "branch0": conv_bn(1088, 192, 1, **factory),
        "branch1": conv_chain(1088, (128, 1), (160, (1, 7)), (192, (7, 1)), **factory),
    }
    return ResidualBranches(branches, 384, 1088, 0.1, **factory)


def mixed_7a(**factory: Any) -> Branches:
    """(N, 1088, H, W) -> (N, 2080, (H - 1) // 2, (W - 1) // 2)"""
    return Branches(
        {
            "branch0": conv_chain(1088, (256, 1), (384, 3, 2), **factory),
            "branch1": conv_chain(1088, (256, 1), (288, 3, 2), **factory),
            "branch2": conv_chain(1088, (256, 1), (288, 3), (320, 3, 2), **factory),
            "branch3": nn.MaxPool2d(3, 2),
        }
    )


def block8(scale: float = 0.2, relu: bool = True, **factory: Any) -> ResidualBranches:
    """Inception-ResNet-C."""
    branches = {
        "branch0": conv_bn(2080, 192, 1, **factory),
        "branch1": conv_chain(2080, (192, 1), (224, (1, 3)), (256, (3, 1)), **factory),
    }
    return ResidualBranches(branches, 448, 2080, scale, relu, **factory)


@register_model(
    "inception_resnet_v2",
    timm="inception_resnet_v2",
    paper="https://arxiv.org/abs/1602.07261",
    year=2016,
    input_size=(3, 299, 299),
    crop_pct=0.8975,
    mean=INCEPTION_MEAN,
    std=INCEPTION_STD,
)
class InceptionResNetV2(Network):
    """Inception-ResNet v2 (2016): 55,843,464 parameters, 13.16 GMACs at 299 x 299; input (x - 127.5) / 127.5, RGB.

    (N, in_chans, H, W) -> (N, num_classes), H and W at least 75. State-dict keys of timm's
    inception_resnet_v2: `conv2d_1a.conv`, `repeat.0.branch0.conv`, ..., `classif`. Trained layer by layer; in
    eval mode with grad disabled each convolution is one call with what follows it, and a block's last one adds x. The
    fastest input is channels_last; the network makes it so after the first layer in any case.

    As the released TensorFlow network, which isn't what the paper draws: v3's stem instead of v4's, then one module
    of 320 channels (the paper: 384), 10, 20 and 10 residual blocks (5, 10 and 5), residuals of 320, 1088 and 2080
    channels (384, 1154 and 2048), the last of them without ReLU and scale, and a 1x1 convolution to 1536 channels.
    Residuals are scaled by 0.17, 0.1 and 0.2. BN's eps is 1e-3; the 1x1 convolutions of the residuals have biases
    instead.

    Args:
        num_classes: outputs; 0 for none (forward returns pooled features).
        in_chans: channels of x.
        drop_rate: dropout before the classifier: the paper keeps 0.8; timm's default is 0.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "".

    Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning,
    https://arxiv.org/abs/1602.07261.
    """

    classifier_name = "classif"
    in_pretrainedmodels = True
    min_size = 75  # convolutions and poolings without padding

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.2,
        global_pool: str = "avg",
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans = in_chans
        self.conv2d_1a = conv_bn(in_chans, 32, 3, 2, channels_last=True, **factory)
        self.conv2d_2a = conv_bn(32, 32, 3, padding=0, **factory)
        self.conv2d_2b = conv_bn(32, 64, 3, **factory)
        self.maxpool_3a = nn.MaxPool2d(3, 2)
        self.conv2d_3b = conv_bn(64, 80, 1, **factory)
        self.conv2d_4a = conv_bn(80, 192, 3, padding=0, **factory)
        self.maxpool_5a = nn.MaxPool2d(3, 2)
        self.mixed_5b = mixed_5b(**factory)
        self.repeat = nn.Sequential(*(block35(**factory) for _ in range(10)))
        self.mixed_6a = mixed_6a(**factory)
        self.repeat_1 = nn.Sequential(*(block17(**factory) for _ in range(20)))
        self.mixed_7a = mixed_7a(**factory)
        self.repeat_2 = nn.Sequential(*(block8(**factory) for _ in range(9)))
        self.block8 = block8(1.0, relu=False, **factory)
        self.conv2d_7b = conv_bn(2080, 1536, 1, **factory)
        self.steps = [name for name, _ in self.named_children()]
        taps = {"conv2d_2b": 64, "conv2d_4a": 192, "repeat": 320, "repeat_1": 1088, "conv2d_7b": 1536}
        self.feature_info = FeatureInfo.halving(taps)
        self._make_head(1536, num_classes, drop_rate, global_pool, factory)
