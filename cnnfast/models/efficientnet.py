"""EfficientNet, https://arxiv.org/abs/1905.11946: MBConv stages scaled in width, depth and resolution together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from cnnfast.models.features import FeatureInfo, strided_stages
from cnnfast.models.network import Network, init_by_fan_out, make_divisible, renamed
from cnnfast.models.registry import INCEPTION_MEAN, INCEPTION_STD, register_model
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


def scaled(stages: Sequence[Stage], width: float, depth: float, fixed_ends: bool = False) -> list[Stage]:
    """Compound scaling: `width` times the channels, `depth` times the blocks of each stage, rounded up; with
    `fixed_ends` the first and the last stage keep their number of blocks."""
    last = len(stages) - 1
    depths = [1.0 if fixed_ends and n in (0, last) else depth for n in range(len(stages))]
    return [
        replace(stage, blocks=math.ceil(stage.blocks * times), channels=make_divisible(stage.channels * width))
        for stage, times in zip(stages, depths, strict=True)
    ]


class EfficientNet(Network):
    """(N, in_chans, H, W) -> (N, num_classes). State-dict keys are timm's: `conv_stem`, `bn1`, `blocks.S.B.conv_pw`,
    ..., `conv_head`, `bn2`, `classifier`.

    Trained by fused blocks; in eval mode with grad disabled each block is one fused call. The fastest input is
    channels_last; the networks make it so after the first layer in any case.

    Args:
        stages: the blocks.
        num_classes: outputs; 0 for none (forward returns pooled features).
        in_chans: channels of x.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, growing linearly from 0 at the first block to nearly this at the last.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "".
        output_stride: 32, 16 or 8: where the strides would exceed it, filters are dilated instead.
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
        output_stride: int = 32,
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
        geometry = strided_stages([stage.stride for stage in stages], output_stride, 2)
        for stage, (stride, first_dilation, dilation) in zip(stages, geometry, strict=True):
            blocks = nn.Sequential()
            for i in range(stage.blocks):
                dilated = first_dilation if i == 0 else dilation
                options: dict[str, Any] = dict(
                    kernel_size=stage.kernel_size,
                    stride=stride if i == 0 else 1,
                    padding="same" if self.same else dilated * (stage.kernel_size // 2),
                    dilation=dilated,
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
        self.feature_info = FeatureInfo(self._maps(stages, [stride for stride, _, _ in geometry]))
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
    def _maps(stages: Sequence[Stage], strides: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The last stage of each resolution, of those at an output stride of 32."""
        reduction = 2
        for index, stage in enumerate(stages):
            reduction *= strides[index]
            if index + 1 == len(stages) or stages[index + 1].stride > 1:
                yield dict(num_chs=stage.channels, reduction=reduction, module=f"blocks.{index}")


_PAPER = ("https://arxiv.org/abs/1905.11946", 2019)
_ADVPROP = ("https://arxiv.org/abs/1911.09665", 2019)
_NOISY_STUDENT = ("https://arxiv.org/abs/1911.04252", 2019)
_LITE = ("https://arxiv.org/abs/1905.11946", 2020)

# factors of width and depth, the authors' drop_rate, parameters, where it is from
_SCALES = {
    "b0": (1.0, 1.0, 0.2, 5_288_548, _PAPER),
    "b1": (1.0, 1.1, 0.2, 7_794_184, _PAPER),
    "b2": (1.1, 1.2, 0.3, 9_109_994, _PAPER),
    "b3": (1.2, 1.4, 0.3, 12_233_232, _PAPER),
    "b4": (1.4, 1.8, 0.4, 19_341_616, _PAPER),
    "b5": (1.6, 2.2, 0.4, 30_389_784, _PAPER),
    "b6": (1.8, 2.6, 0.5, 43_040_704, _PAPER),
    "b7": (2.0, 3.1, 0.5, 66_347_960, _PAPER),
    "b8": (2.2, 3.6, 0.5, 87_413_142, _ADVPROP),
    "l2": (4.3, 5.3, 0.5, 480_309_308, _NOISY_STUDENT),
    "lite0": (1.0, 1.0, 0.2, 4_652_008, _LITE),
    "lite1": (1.0, 1.1, 0.2, 5_416_680, _LITE),
    "lite2": (1.1, 1.2, 0.3, 6_092_072, _LITE),
    "lite3": (1.2, 1.4, 0.3, 8_197_096, _LITE),
    "lite4": (1.4, 1.8, 0.3, 13_006_568, _LITE),
}
_LITE_CFG = dict(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)  # the authors'; timm has 0.5 for both
_HALVES = dict(mean=INCEPTION_MEAN, std=INCEPTION_STD)

# What timm's weights of each name were trained for: size, crop_pct, what else of pretrained_cfg; GMACs at that size.
_INPUTS: dict[str, tuple[int, float, dict[str, Any], str]] = {
    "efficientnet_b0": (224, 0.875, {}, "0.39"),
    "efficientnet_b1": (240, 0.9, _HALVES, "0.69"),
    "efficientnet_b2": (256, 0.875, {}, "0.86"),
    "efficientnet_b3": (288, 0.875, {}, "1.6"),
    "efficientnet_b4": (320, 0.875, {}, "3.1"),
    "efficientnet_b5": (448, 1.0, dict(crop_mode="squash"), "9.4"),
    "efficientnet_b6": (528, 0.942, {}, "19"),
    "efficientnet_b7": (600, 0.949, {}, "38"),
    "efficientnet_b8": (672, 0.954, {}, "63"),
    "efficientnet_l2": (800, 0.961, {}, "476"),
    "efficientnet_lite0": (224, 0.875, {}, "0.39"),
    "efficientnet_lite1": (240, 0.882, {}, "0.60"),
    "efficientnet_lite2": (260, 0.89, {}, "0.86"),
    "efficientnet_lite3": (300, 0.904, {}, "1.6"),
    "efficientnet_lite4": (380, 0.922, {}, "3.9"),
    "tf_efficientnet_b0": (224, 0.875, {}, "0.39"),
    "tf_efficientnet_b1": (240, 0.882, {}, "0.69"),
    "tf_efficientnet_b2": (260, 0.89, {}, "0.99"),
    "tf_efficientnet_b3": (300, 0.904, {}, "1.8"),
    "tf_efficientnet_b4": (380, 0.922, {}, "4.4"),
    "tf_efficientnet_b5": (456, 0.934, {}, "10"),
    "tf_efficientnet_b6": (528, 0.942, {}, "19"),
    "tf_efficientnet_b7": (600, 0.949, {}, "38"),
    "tf_efficientnet_b8": (672, 0.954, _HALVES, "63"),
    "tf_efficientnet_l2": (475, 0.936, {}, "171"),
    "tf_efficientnet_lite0": (224, 0.875, _LITE_CFG, "0.39"),
    "tf_efficientnet_lite1": (240, 0.882, _LITE_CFG, "0.60"),
    "tf_efficientnet_lite2": (260, 0.89, _LITE_CFG, "0.86"),
    "tf_efficientnet_lite3": (300, 0.904, dict(_LITE_CFG, interpolation="bilinear"), "1.6"),
    "tf_efficientnet_lite4": (380, 0.92, dict(_LITE_CFG, interpolation="bilinear"), "3.9"),
}


def _register(name: str, size: int, crop_pct: float, cfg: dict[str, Any], gmacs: str) -> Callable[..., EfficientNet]:
    scale, same = name.rpartition("_")[2], name.startswith("tf_")
    width, depth, drop_rate, parameters, (paper, year) = _SCALES[scale]
    lite = scale.startswith("lite")
    options: dict[str, Any] = dict(eps=1e-3, padding="same") if same else {}
    if lite:
        options.update(activation="relu6", se_ratio=0)
    else:
        options.update(stem_size=make_divisible(32 * width), num_features=make_divisible(1280 * width))

    def factory(**given: Any) -> EfficientNet:
        return EfficientNet(scaled(B0, width, depth, fixed_ends=lite), **options, **given)

    form = (
        "TensorFlow's 'same' padding and BN eps 1e-3, as the authors' weights want."
        if same
        else "Symmetric padding and BN eps 1e-5, as weights trained in PyTorch want."
    )
    what = f"{width} times B0's width, {depth} times its depth"
    if same:
        cfg = dict(cfg, crop_mode="tensorflow")
    if lite:
        what += "; no squeeze-excite, ReLU6 for SiLU, stem, head and depth of the first and last stage as B0's"
    factory.__name__ = factory.__qualname__ = name
    factory.__doc__ = f"""EfficientNet-{scale.capitalize()} ({year}): {what}.

    {parameters:,} parameters, {gmacs} GMACs at {size} x {size}; input normalised by pretrained_cfg's mean and std, RGB.
    {form} Keys and shapes of the two forms are the same, outputs are not. Arguments of EfficientNet; the authors
    trained with drop_rate {drop_rate} and drop_path_rate 0.2. {paper}.
    """
    register_model(name, timm=name, paper=paper, year=year, input_size=(3, size, size), crop_pct=crop_pct, **cfg)(
        factory
    )
    return factory


_FACTORIES = {name: _register(name, *row) for name, row in _INPUTS.items()}
tf_efficientnet_lite0 = _FACTORIES["tf_efficientnet_lite0"]
