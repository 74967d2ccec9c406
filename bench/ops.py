"""The cases of `cnnfast bench ops`: each op at the real networks' shapes."""

from __future__ import annotations

from . import backward
from .channel_ops import SCALE_SHIFTS, LocalResponseNormCase, ScaleShiftCase, SqueezeExciteCase
from .conv_ops import ConvCase


def _separable(network: str, channels: tuple[int, int], size: int, **kw) -> ConvCase:
    return ConvCase("separable_conv2d", network, *channels, size, kernel=3, **kw)


def _mbconv(network: str, channels: tuple[int, int], size: int, kernel: int, stride: int, tf_same: bool) -> ConvCase:
    expanded = 6 * channels[0]
    return ConvCase(
        "inverted_residual", network, *channels, size, kernel, stride, expanded, tf_same, activation="relu6"
    )


def _depthwise(network: str, channels: int, size: int, kernel: int, stride: int = 1, **kw) -> ConvCase:
    return ConvCase("depthwise_conv2d", network, channels, channels, size, kernel, stride, **kw)


def _dense(network: str, channels: tuple[int, int], size: int, kernel: int, stride: int = 1, **kw) -> ConvCase:
    return ConvCase("conv2d", network, *channels, size, kernel, stride, **kw)


def _pointwise(network: str, channels: tuple[int, int], size: int, stride: int = 1, **kw) -> ConvCase:
    return ConvCase("pointwise_conv2d", network, *channels, size, stride=stride, **kw)


_LITE0, _V1, _V2, _XCEPTION = "lite0", "mobilenetv1", "mobilenetv2", "xception"
_ALEXNET, _GOOGLENET, _SERESNET = "alexnet", "googlenet", "seresnet50"

AnyCase = ConvCase | SqueezeExciteCase | LocalResponseNormCase | ScaleShiftCase
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
