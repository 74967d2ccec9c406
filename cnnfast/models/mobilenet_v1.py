"""MobileNetV1, https://arxiv.org/abs/1704.04861: depthwise separable convolutions."""

from __future__ import annotations

from typing import Any

from torch import nn

from cnnfast.models.features import FeatureInfo, strided_stages
from cnnfast.models.network import Network, init_by_fan_out, make_divisible
from cnnfast.models.registry import INCEPTION_MEAN, INCEPTION_STD, register_model
from cnnfast.nn import PointwiseConv2d, SeparableConv2d

V1_STAGES = ((1, 64), (2, 128), (2, 256), (6, 512), (2, 1024))  # separable convolutions, channels
_CFG: dict[str, Any] = dict(paper="https://arxiv.org/abs/1704.04861", year=2017, mean=INCEPTION_MEAN, std=INCEPTION_STD)


def check_positive(**arguments: float) -> None:
    for name, value in arguments.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


@register_model("mobilenet_v1", timm="mobilenetv1_100", **_CFG)
class MobileNetV1(Network):
    """MobileNetV1 (2017): 4,231,976 parameters, 0.57 GMACs at 224 x 224; input (x - 127.5) / 127.5, RGB.

    (N, in_chans, H, W) -> (N, num_classes). State-dict keys of timm's mobilenetv1_100 (`width_mult` 1.25:
    mobilenetv1_125; `head_conv`: mobilenetv1_100h): `conv_stem`, `bn1`, `blocks.S.B.conv_dw`, ..., `classifier`. 13
    separable convolutions, trained by fused blocks; in eval mode with grad disabled each is one fused call. The fastest
    input is channels_last; the network makes it so after the first layer in any case.

    The activation is ReLU6 as in timm's and TensorFlow's implementations, where the paper has ReLU; V2's paper gives
    the reason, low precision. Padding is symmetric and BN's eps 1e-5 where TensorFlow has 'same' and 1e-3, so its
    checkpoints give other results.

    Args:
        num_classes: outputs; 0 for none (forward returns pooled features).
        in_chans: channels of x.
        drop_rate: dropout before the classifier.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "".
        output_stride: 32, 16 or 8: where the strides would exceed it, filters are dilated instead.
        width_mult: factor of all channels but those of x, each then rounded to a multiple of 8; the paper's alpha.
        head_conv: a pointwise convolution to 1024 * max(1, width_mult) channels before pooling, under the keys
            `conv_head`, `bn2`; not in the paper.

    MobileNets, https://arxiv.org/abs/1704.04861.
    """

    classifier_name = "classifier"

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        output_stride: int = 32,
        *,
        width_mult: float = 1.0,
        head_conv: bool = False,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        check_positive(width_mult=width_mult)
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans = in_chans
        channels = make_divisible(32 * width_mult)
        self.conv_stem = nn.Conv2d(in_chans, channels, 3, 2, 1, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(channels, **factory)
        self.act1 = nn.ReLU6(inplace=True)
        self.blocks = nn.Sequential()
        geometry = strided_stages((1, 2, 2, 2, 2), output_stride, 2)
        maps, reduction = [], 2
        for (units, base), (stride, first_dilation, dilation) in zip(V1_STAGES, geometry, strict=True):
            stage, width = nn.Sequential(), make_divisible(base * width_mult)
            for i in range(units):
                dilated = first_dilation if i == 0 else dilation
                options: dict[str, Any] = dict(padding=dilated, dilation=dilated, activation="relu6", **factory)
                step = stride if i == 0 else 1
                stage.append(SeparableConv2d(channels, width, 3, step, skip=False, **options))
                channels = width
            reduction *= stride
            maps.append(dict(num_chs=width, reduction=reduction, module=f"blocks.{len(self.blocks)}"))
            self.blocks.append(stage)
        self.steps = [("conv_stem", "bn1", "act1"), "blocks"]
        self.feature_info = FeatureInfo(maps)
        if head_conv:
            head = max(1024, make_divisible(1024 * width_mult))
            self.conv_head = PointwiseConv2d(channels, head, bias=False, **factory)
            self.bn2, self.act2 = nn.BatchNorm2d(head, **factory), nn.ReLU6(inplace=True)
            self.steps.append(("conv_head", "bn2", "act2"))
            channels = head
        self._make_head(channels, num_classes, drop_rate, global_pool, factory)
        init_by_fan_out(self)


def _register(width_mult: float, parameters: int, gmacs: str, timm: str | None, **cfg: Any) -> None:
    name = f"mobilenet_v1_{100 * width_mult:03.0f}"

    def factory(**options: Any) -> MobileNetV1:
        return MobileNetV1(width_mult=width_mult, **options)

    factory.__name__ = factory.__qualname__ = name
    factory.__doc__ = f"""MobileNetV1 (2017) at {width_mult} times the width.

    {parameters:,} parameters, {gmacs} GMACs at 224 x 224; input (x - 127.5) / 127.5, RGB. Arguments and keys of
    MobileNetV1. https://arxiv.org/abs/1704.04861.
    """
    register_model(name, timm=timm, **_CFG, **cfg)(factory)


_register(0.25, 470_072, "0.041", None)
_register(0.5, 1_331_592, "0.15", None)
_register(0.75, 2_585_560, "0.33", None)
_register(1.25, 6_270_840, "0.88", "mobilenetv1_125", crop_pct=0.9)
