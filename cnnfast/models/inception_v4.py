"""Inception v4, https://arxiv.org/abs/1602.07261: more, and more uniform, modules than v3."""

from __future__ import annotations

from typing import Any

from torch import nn

from cnnfast.models.branches import Branch, Branches, conv_bn, conv_chain
from cnnfast.models.features import FeatureInfo
from cnnfast.models.network import Network
from cnnfast.models.registry import INCEPTION_MEAN, INCEPTION_STD, register_model

ROW, COLUMN = (1, 7), (7, 1)


def pooled(channels: int, out_channels: int, **factory: Any) -> nn.Sequential:
    """Average of 3x3, at the edges of what lies inside, then 1x1."""
    pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    return nn.Sequential(pool, conv_bn(channels, out_channels, 1, **factory))


def mixed_3a(**factory: Any) -> Branches:
    """(N, 64, H, W) -> (N, 160, (H - 1) // 2, (W - 1) // 2)"""
    return Branches({"maxpool": nn.MaxPool2d(3, 2), "conv": conv_bn(64, 96, 3, 2, **factory)})


def mixed_4a(**factory: Any) -> Branches:
    """(N, 160, H, W) -> (N, 192, H - 2, W - 2)"""
    return Branches(
        {
            "branch0": conv_chain(160, (64, 1), (96, 3, 1, 0), **factory),
            "branch1": conv_chain(160, (64, 1), (64, ROW), (64, COLUMN), (96, 3, 1, 0), **factory),
        }
    )


def mixed_5a(**factory: Any) -> Branches:
    """(N, 192, H, W) -> (N, 384, (H - 1) // 2, (W - 1) // 2)"""
    return Branches({"conv": conv_bn(192, 192, 3, 2, **factory), "maxpool": nn.MaxPool2d(3, 2)})


def inception_a(**factory: Any) -> Branches:
    """(N, 384, H, W) -> (N, 384, H, W)"""
    return Branches(
        {
            "branch0": conv_bn(384, 96, 1, **factory),
            "branch1": conv_chain(384, (64, 1), (96, 3), **factory),
            "branch2": conv_chain(384, (64, 1), (96, 3), (96, 3), **factory),
            "branch3": pooled(384, 96, **factory),
        }
    )


def reduction_a(**factory: Any) -> Branches:
    """(N, 384, H, W) -> (N, 1024, (H - 1) // 2, (W - 1) // 2)"""
    return Branches(
        {
            "branch0": conv_bn(384, 384, 3, 2, **factory),
            "branch1": conv_chain(384, (192, 1), (224, 3), (256, 3, 2), **factory),
            "branch2": nn.MaxPool2d(3, 2),
        }
    )


def inception_b(**factory: Any) -> Branches:
    """(N, 1024, H, W) -> (N, 1024, H, W)"""
    return Branches(
        {
            "branch0": conv_bn(1024, 384, 1, **factory),
            "branch1": conv_chain(1024, (192, 1), (224, ROW), (256, COLUMN), **factory),
            "branch2": conv_chain(1024, (192, 1), (192, COLUMN), (224, ROW), (224, COLUMN), (256, ROW), **factory),
            "branch3": pooled(1024, 128, **factory),
        }
    )


def reduction_b(**factory: Any) -> Branches:
    """(N, 1024, H, W) -> (N, 1536, (H - 1) // 2, (W - 1) // 2)"""
    return Branches(
        {
            "branch0": conv_chain(1024, (192, 1), (192, 3, 2), **factory),
            "branch1": conv_chain(1024, (256, 1), (256, ROW), (320, COLUMN), (320, 3, 2), **factory),
            "branch2": nn.MaxPool2d(3, 2),
        }
    )


def inception_c(**factory: Any) -> Branches:
    """(N, 1536, H, W) -> (N, 1536, H, W)"""
    modules = {
        "branch0": conv_bn(1536, 256, 1, **factory),
        "branch1_0": conv_bn(1536, 384, 1, **factory),
        "branch1_1a": conv_bn(384, 256, (1, 3), **factory),
        "branch1_1b": conv_bn(384, 256, (3, 1), **factory),
        "branch2_0": conv_bn(1536, 384, 1, **factory),
        "branch2_1": conv_bn(384, 448, (3, 1), **factory),
        "branch2_2": conv_bn(448, 512, (1, 3), **factory),
        "branch2_3a": conv_bn(512, 256, (1, 3), **factory),
        "branch2_3b": conv_bn(512, 256, (3, 1), **factory),
        "branch3": pooled(1536, 256, **factory),
    }
    short: Branch = ["branch1_0", ("branch1_1a", "branch1_1b")]
    long: Branch = ["branch2_0", "branch2_1", "branch2_2", ("branch2_3a", "branch2_3b")]
    return Branches(modules, [["branch0"], short, long, ["branch3"]])


@register_model(
    "inception_v4",
    timm="inception_v4",
    paper="https://arxiv.org/abs/1602.07261",
    year=2016,
    input_size=(3, 299, 299),
    mean=INCEPTION_MEAN,
    std=INCEPTION_STD,
)
class InceptionV4(Network):
    """Inception v4 (2016): 42,679,816 parameters, 12.25 GMACs at 299 x 299; input (x - 127.5) / 127.5, RGB.

    (N, in_chans, H, W) -> (N, num_classes), H and W at least 75. State-dict keys of timm's
    inception_v4: `features.0.conv`, `features.3.conv.conv`, ..., `last_linear`. Trained layer by layer; in
    eval mode with grad disabled each convolution is one call with what follows it. The fastest input is channels_last;
    the network makes it so after the first layer in any case.

    Average pooling counts no padding, as TensorFlow's. BN's eps is 1e-3.

    Args:
        num_classes: outputs; 0 for none (forward returns pooled features).
        in_chans: channels of x.
        drop_rate: dropout before the classifier: the paper keeps 0.8; timm's default is 0.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "".

    Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning,
    https://arxiv.org/abs/1602.07261.
    """

    classifier_name = "last_linear"
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
        self.features = nn.Sequential(
            conv_bn(in_chans, 32, 3, 2, channels_last=True, **factory),
            conv_bn(32, 32, 3, padding=0, **factory),
            conv_bn(32, 64, 3, **factory),
            mixed_3a(**factory),
            mixed_4a(**factory),
            mixed_5a(**factory),
            *(inception_a(**factory) for _ in range(4)),
            reduction_a(**factory),
            *(inception_b(**factory) for _ in range(7)),
            reduction_b(**factory),
            *(inception_c(**factory) for _ in range(3)),
        )
        self.steps = ["features"]
        taps = {2: 64, 3: 160, 9: 384, 17: 1024, 21: 1536}
        self.feature_info = FeatureInfo.halving({f"features.{i}": width for i, width in taps.items()})
        self._make_head(1536, num_classes, drop_rate, global_pool, factory)
