"""EfficientNet, https://arxiv.org/abs/1905.11946: MBConv stages scaled in width, depth and resolution together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from cnnfast.models.features import FeatureInfo
from cnnfast.models.network import Network, init_by_fan_out, make_divisible, renamed
from cnnfast.models.registry import register_model
from cnnfast.nn import Conv2dSame, FusedModule, InvertedResidual, PointwiseConv2d, SeparableConv2d
from cnnfast.nn.layers import activation_module


@dataclass(frozen=True)
class Stage:
    """Blocks of one width; the first has the stride, the others 1."""

    blocks: int
    kernel_size: int
    stride: int
    expand_ratio: int  # 1: no expansion, a depthwise separable block
    channels: int


B0 = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


def scaled(stages: Sequence[Stage], width: float, depth: float) -> list[Stage]:
    """Compound scaling: `width` times the channels, `depth` times the blocks of each stage, rounded up."""
    return [
        replace(stage, blocks=math.ceil(stage.blocks * depth), channels=make_divisible(stage.channels * width))
        for stage in stages
    ]


class EfficientNet(Network):
    """(N, in_chans, H, W) -> (N, num_classes). State-dict keys are timm's: `conv_stem`, `bn1`, `blocks.S.B.conv_pw`,
    ..., `conv_head`, `bn2`, `classifier`.

    Trained layer by layer; in eval mode with grad disabled each block is one fused call. The fastest input is
    channels_last; the networks make it so after the first layer in any case.

    Args:
        stages: the blocks.
        num_classes: outputs; 0 for none (forward returns pooled features).
        in_chans: channels of x.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, growing linearly from 0 at the first block to nearly this at the last.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "".
        eps, momentum: of batch normalisation.
        activation: "silu", "relu6", ...
        se_ratio: channels between squeeze-excite's two products, as a part of a block's input channels; 0: none.
        padding: "same" (TensorFlow's) or "symmetric".
    """

    classifier_name = "classifier"

    def __init__(
        self,
        stages: Sequence[Stage],
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        *,
        stem_size: int = 32,
        num_features: int = 1280,
        eps: float = 1e-5,
        momentum: float = 0.1,
        activation: str = "silu",
        se_ratio: float = 0.25,
        padding: str = "symmetric",
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        norm = dict(eps=eps, momentum=momentum, **factory)
        self.in_chans = in_chans
        self.same, self.gated = padding == "same", se_ratio > 0
        if self.same:
            self.conv_stem: nn.Conv2d = Conv2dSame(in_chans, stem_size, 3, 2, bias=False, **factory)
        else:
            self.conv_stem = nn.Conv2d(in_chans, stem_size, 3, 2, 1, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(stem_size, **norm)
        self.act1 = activation_module(activation)
        self.blocks = nn.Sequential()
        channels, index, total = stem_size, 0, sum(stage.blocks for stage in stages)
        for stage in stages:
            blocks = nn.Sequential()
            for i in range(stage.blocks):
                options: dict[str, Any] = dict(
                    kernel_size=stage.kernel_size,
                    stride=stage.stride if i == 0 else 1,
                    padding="same" if self.same else stage.kernel_size // 2,
                    squeezed_channels=round(channels * se_ratio),
                    drop_path=drop_path_rate * index / total,
                    **norm,
                )
                block: FusedModule
                if stage.expand_ratio == 1:
                    block = SeparableConv2d(channels, stage.channels, mid_activation=activation, **options)
                else:
                    options.update(expand_ratio=stage.expand_ratio, activation=activation)
                    block = InvertedResidual(channels, stage.channels, **options)
                blocks.append(block)
                channels = stage.channels
                index += 1
            self.blocks.append(blocks)
        self.conv_head = PointwiseConv2d(channels, num_features, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(num_features, **norm)
        self.act2 = activation_module(activation)
        self.steps = [("conv_stem", "bn1", "act1"), "blocks", ("conv_head", "bn2", "act2")]
        self.feature_info = FeatureInfo(self._maps(stages))
        self.told_apart = dict.fromkeys(("cnnfast", "timm"), "tf_efficientnet_*" if self.same else "efficientnet_*")
        self._make_head(num_features, num_classes, drop_rate, global_pool, factory)
        init_by_fan_out(self)

    def checkpoint_keys(self, source: str) -> dict[str, str]:
        """efficientnet_pytorch and, for Lite forms, efficientnet_lite_pytorch have TensorFlow's padding. They count
        blocks through; batch normalisations are numbered from 0, from 1 where nothing is expanded."""
        if not source.endswith("_pytorch"):
            return super().checkpoint_keys(source)
        if not self.same or source != ("efficientnet_pytorch" if self.gated else "efficientnet_lite_pytorch"):
            return {}
        modules = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
        modules["classifier"] = "_fc"
        separable = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
        inverted = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
        inverted.update(conv_pwl="_project_conv", bn3="_bn2")
        stages: list[Any] = [*self.blocks]
        blocks = [(f"blocks.{s}.{b}", block) for s, stage in enumerate(stages) for b, block in enumerate(stage)]
        for n, (prefix, block) in enumerate(blocks):
            names = separable if isinstance(block, SeparableConv2d) else inverted
            names = names | {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
            modules.update({f"{prefix}.{ours}": f"_blocks.{n}.{theirs}" for ours, theirs in names.items()})
        return renamed(self.state_dict(), modules)

    @staticmethod
    def _maps(stages: Sequence[Stage]) -> Iterator[dict[str, Any]]:
        """The last stage of each resolution."""
        reduction = 2
        for index, stage in enumerate(stages):
            reduction *= stage.stride
            if index + 1 == len(stages) or stages[index + 1].stride > 1:
                yield dict(num_chs=stage.channels, reduction=reduction, module=f"blocks.{index}")


_PAPER: dict[str, Any] = dict(paper="https://arxiv.org/abs/1905.11946", year=2019)


# crop: size / (size + 32), as the authors evaluated it; mean and std of the Lite forms: 127 and 128
@register_model(
    "tf_efficientnet_lite0",
    timm="tf_efficientnet_lite0",
    paper="https://arxiv.org/abs/1905.11946",
    year=2020,
    mean=(127 / 255,) * 3,
    std=(128 / 255,) * 3,
)
def tf_efficientnet_lite0(**options: Any) -> EfficientNet:
    """EfficientNet-Lite0 (2020): B0 without squeeze-excite, ReLU6 for SiLU, fixed stem and head.

    4,652,008 parameters, 0.39 GMACs at 224 x 224; input (x - 127) / 128, RGB. TensorFlow's 'same' padding and BN eps
    1e-3, as the published weights want. EfficientNet, https://arxiv.org/abs/1905.11946.
    """
    return EfficientNet(B0, eps=1e-3, activation="relu6", se_ratio=0, padding="same", **options)


@register_model("efficientnet_b0", timm="efficientnet_b0", **_PAPER)
def efficientnet_b0(**options: Any) -> EfficientNet:
    """EfficientNet-B0 (2019), symmetric padding and BN eps 1e-5, as weights trained in PyTorch want.

    5,288,548 parameters, 0.39 GMACs at 224 x 224; input normalised by ImageNet's mean and deviation, RGB.
    EfficientNet, https://arxiv.org/abs/1905.11946.
    """
    return EfficientNet(B0, **options)


def _tf_efficientnet(width: float, depth: float, **options: Any) -> EfficientNet:
    sizes: dict[str, Any] = dict(stem_size=make_divisible(32 * width), num_features=make_divisible(1280 * width))
    return EfficientNet(scaled(B0, width, depth), eps=1e-3, padding="same", **sizes, **options)


@register_model("tf_efficientnet_b0", timm="tf_efficientnet_b0", **_PAPER)
def tf_efficientnet_b0(**options: Any) -> EfficientNet:
    """EfficientNet-B0 (2019) with TensorFlow's 'same' padding and BN eps 1e-3, as the authors' weights want.

    5,288,548 parameters, 0.39 GMACs at 224 x 224; input normalised by ImageNet's mean and deviation, RGB. Keys and
    shapes are efficientnet_b0's, outputs are not. EfficientNet, https://arxiv.org/abs/1905.11946.
    """
    return _tf_efficientnet(1.0, 1.0, **options)


@register_model("tf_efficientnet_b1", timm="tf_efficientnet_b1", **_PAPER, input_size=(3, 240, 240), crop_pct=0.882)
def tf_efficientnet_b1(**options: Any) -> EfficientNet:
    """EfficientNet-B1 (2019), as tf_efficientnet_b0: 1.1 times the depth, 7,794,184 parameters, 0.69 GMACs at 240 x
    240. https://arxiv.org/abs/1905.11946."""
    return _tf_efficientnet(1.0, 1.1, **options)


@register_model("tf_efficientnet_b2", timm="tf_efficientnet_b2", **_PAPER, input_size=(3, 260, 260), crop_pct=0.89)
def tf_efficientnet_b2(**options: Any) -> EfficientNet:
    """EfficientNet-B2 (2019), as tf_efficientnet_b0: 1.1 times the width, 1.2 times the depth, 9,109,994 parameters,
    1.0 GMACs at 260 x 260. https://arxiv.org/abs/1905.11946."""
    return _tf_efficientnet(1.1, 1.2, **options)
