"""MobileNetV2, https://arxiv.org/abs/1801.04381: inverted residuals with linear bottlenecks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cnnfast.models.features import FeatureInfo, strided_stages
from cnnfast.models.mobilenet_v1 import check_positive
from cnnfast.models.network import Network, make_divisible, renamed
from cnnfast.models.registry import register_model
from cnnfast.nn import DepthwiseConv2d, DropPath, FusedModule, FusedSequential, PointwiseConv2d
from cnnfast.nn.fusable import activation_name
from cnnfast.nn.fused import NotFusable
from cnnfast.nn.fusion import fuse_inverted_residual, fuse_separable_conv2d
from cnnfast.nn.training import block

# expand ratio, channels, blocks, stride of the first of them
V2_SETTING = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _conv_bn_relu6(conv: nn.Conv2d, **factory: Any) -> nn.Sequential:
    """Keys `0`, `1`, as torchvision's Conv2dNormActivation."""
    return FusedSequential(conv, nn.BatchNorm2d(conv.out_channels, **factory), nn.ReLU6(inplace=True))


def _flat(module: nn.Module) -> list[nn.Module]:
    """The layers of nested Sequentials, in order."""
    return [layer for child in module for layer in _flat(child)] if isinstance(module, nn.Sequential) else [module]


class Bottleneck(FusedModule):
    """V2's inverted residual: expand (1x1), depthwise 3x3, project (1x1), each with BN, ReLU6 after the first two, plus
    x where the shapes allow; with `expand_ratio` 1 a separable convolution: no expansion.

    (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)). Keys `conv.0.0`, `conv.0.1`, ...,
    of torchvision's InvertedResidual; cnnfast.nn.InvertedResidual is the block of timm's keys. For inference one call.
    `drop_path`: probability, in training, of leaving out an image's block where x is added.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        expand_ratio: float,
        dilation: int = 1,
        drop_path: float = 0.0,
        **factory: Any,
    ):
        super().__init__()
        expanded = round(in_channels * expand_ratio)
        self.use_res_connect = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential()
        if expand_ratio != 1:
            expand = PointwiseConv2d(in_channels, expanded, bias=False, **factory)
            self.conv.append(_conv_bn_relu6(expand, **factory))
        depthwise = DepthwiseConv2d(expanded, 3, stride, dilation, dilation, bias=False, **factory)
        self.conv.append(_conv_bn_relu6(depthwise, **factory))
        self.conv.append(PointwiseConv2d(expanded, out_channels, bias=False, **factory))
        self.conv.append(nn.BatchNorm2d(out_channels, **factory))
        self.drop_path = DropPath(drop_path)

    def layers(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return x + self.drop_path(y) if self.use_res_connect else y

    def fuse(self) -> Any:
        layers = _flat(self.conv)
        if len(layers) == 5:
            dw, dw_bn, act, *project = layers
            call = fuse_separable_conv2d(
                dw, dw_bn, *project, mid_activation=activation_name(act), activation=None, backend=self.backend
            )
        elif len(layers) == 8:
            expand, expand_bn, act1, dw, dw_bn, act2, *project = layers
            activation = activation_name(act1)
            if activation_name(act2) != activation:
                raise NotFusable("its two activations differ")
            call = fuse_inverted_residual(
                expand, expand_bn, dw, dw_bn, *project, activation=activation, backend=self.backend
            )
        else:
            raise NotFusable("its layers aren't those of an inverted residual")
        return (lambda x: call(x, residual=x)) if self.use_res_connect else call

    def fuse_training(self) -> Any:
        layers = [*_flat(self.conv), None]  # no activation at the end
        if len(layers) % 3:
            raise NotFusable("its layers aren't those of an inverted residual")
        units: Any = [layers[i : i + 3] for i in range(0, len(layers), 3)]
        return block(units, None, self.drop_path if self.use_res_connect else None, self.backend)


_PAPER: dict[str, Any] = dict(paper="https://arxiv.org/abs/1801.04381", year=2018)


# torchvision's IMAGENET1K_V2: the short side is resized to 232
@register_model(
    "mobilenet_v2",
    timm="mobilenetv2_100",
    torchvision="mobilenet_v2",
    **_PAPER,
    crop_pct=224 / 232,
    interpolation="bilinear",
)
class MobileNetV2(Network):
    """MobileNetV2 (2018): 3,504,872 parameters, 0.30 GMACs at 224 x 224; input (x - mean) / std, RGB, with ImageNet's
    mean (123.675, 116.28, 103.53) and std (58.395, 57.12, 57.375) for torchvision's weights. 6.1 M parameters at
    `width_mult` 1.4.

    (N, in_chans, H, W) -> (N, num_classes). State-dict keys of torchvision's mobilenet_v2: `features.0.0.weight`, ...,
    `classifier.1.weight`; cnnfast.load_weights takes timm's too. 17 inverted residuals, whose last layer is linear,
    trained by fused blocks; in eval mode with grad disabled each is one fused call. The fastest input is channels_last;
    the network makes it so after the first layer in any case.

    The first block, whose expand ratio is 1, has no expansion layer, as in torchvision's and TensorFlow's
    implementations. Padding is symmetric and BN's eps 1e-5 where TensorFlow has 'same' and 1e-3, so its checkpoints
    give other results. The paper's classifier is a 1x1 convolution: the same arithmetic.

    Args:
        num_classes: outputs; 0 for none (forward returns pooled features).
        in_chans: channels of x.
        drop_rate: dropout before the linear layer, torchvision's `dropout`; `classifier`, which get_classifier returns,
            is both.
        drop_path_rate: stochastic depth, growing linearly from 0 at the first block to nearly this at the last.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "".
        output_stride: 32, 16 or 8: where the strides would exceed it, filters are dilated instead.
        width_mult: factor of all channels but those of x, each then rounded to a multiple of `round_nearest`; of the
            1280 only if above 1.
        inverted_residual_setting: rows of (expand ratio, channels, blocks, stride of the first of them); None for the
            paper's.
        round_nearest: what channels are a multiple of.

    MobileNetV2, https://arxiv.org/abs/1801.04381.
    """

    classifier_name = "classifier"
    key_source = "torchvision"

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.2,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        output_stride: int = 32,
        *,
        width_mult: float = 1.0,
        inverted_residual_setting: Sequence[Sequence[int]] | None = None,
        round_nearest: int = 8,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        check_positive(width_mult=width_mult, round_nearest=round_nearest)
        setting = V2_SETTING if inverted_residual_setting is None else inverted_residual_setting
        if not setting or any(len(row) != 4 for row in setting):
            raise ValueError(
                "inverted_residual_setting must be rows of (expand ratio, channels, blocks, stride), got"
                f" {inverted_residual_setting}"
            )
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans = in_chans
        self.depths = [blocks for _, _, blocks, _ in setting]  # by which timm counts
        channels = make_divisible(32 * width_mult, round_nearest)
        stem = nn.Conv2d(in_chans, channels, 3, 2, 1, bias=False, **factory)
        self.features = nn.Sequential(_conv_bn_relu6(stem, **factory))
        geometry = strided_stages([stride for _, _, _, stride in setting], output_stride, 2)
        maps, reduction, total = [], 2, sum(self.depths)
        for row, (expand_ratio, base, blocks, _) in enumerate(setting):
            stride, first_dilation, dilation = geometry[row]
            width = make_divisible(base * width_mult, round_nearest)
            for i in range(blocks):
                first, n = i == 0, len(self.features) - 1
                shape = (channels, width, stride if first else 1, expand_ratio, first_dilation if first else dilation)
                self.features.append(Bottleneck(*shape, drop_path=drop_path_rate * n / total, **factory))
                channels = width
            reduction *= stride
            if row + 1 == len(setting) or setting[row + 1][3] > 1:  # the last of each resolution at output stride 32
                maps.append(dict(num_chs=width, reduction=reduction, module=f"features.{len(self.features) - 1}"))
        num_features = make_divisible(1280 * max(1.0, width_mult), round_nearest)
        last = PointwiseConv2d(channels, num_features, bias=False, **factory)
        self.features.append(_conv_bn_relu6(last, **factory))
        self.steps = ["features"]
        self.feature_info = FeatureInfo(maps)
        self._make_head(num_features, num_classes, drop_rate, global_pool, factory)
        self._init_weights()

    def _make_classifier(self, num_classes: int, global_pool: str, factory: Any) -> None:
        super()._make_classifier(num_classes, global_pool, factory)
        self.classifier = nn.Sequential(nn.Dropout(self.drop_rate), self.get_classifier())

    def _init_weights(self) -> None:
        """As torchvision's."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def _head(self, x: Tensor, pre_logits: bool) -> Tensor:
        x = self.global_pool(x)
        return x if pre_logits else self.classifier(x)

    def _head_modules(self) -> list[nn.Module]:
        return [self.global_pool, self.classifier]

    def checkpoint_keys(self, source: str) -> dict[str, str]:
        """timm counts the blocks stage by stage."""
        if source != "timm":
            return super().checkpoint_keys(source)
        own, last = list(self.state_dict()), sum(self.depths) + 1
        modules = {"features.0.0": "conv_stem", "features.0.1": "bn1", "classifier.1": "classifier"}
        modules.update({f"features.{last}.0": "conv_head", f"features.{last}.1": "bn2"})
        separable = {"conv.0.0": "conv_dw", "conv.0.1": "bn1", "conv.1": "conv_pw", "conv.2": "bn2"}
        inverted = {"conv.0.0": "conv_pw", "conv.0.1": "bn1", "conv.1.0": "conv_dw", "conv.1.1": "bn2"}
        inverted.update({"conv.2": "conv_pwl", "conv.3": "bn3"})
        places = [f"blocks.{s}.{b}" for s, blocks in enumerate(self.depths) for b in range(blocks)]
        for n, place in enumerate(places, 1):
            names = inverted if f"features.{n}.conv.3.weight" in own else separable
            modules.update({f"features.{n}.{ours}": f"{place}.{theirs}" for ours, theirs in names.items()})
        return renamed(own, modules)


def _register(width_mult: float, parameters: int, gmacs: str) -> None:
    percent = f"{100 * width_mult:03.0f}"

    def factory(**options: Any) -> MobileNetV2:
        return MobileNetV2(width_mult=width_mult, **options)

    factory.__name__ = factory.__qualname__ = f"mobilenet_v2_{percent}"
    factory.__doc__ = f"""MobileNetV2 (2018) at {width_mult} times the width.

    {parameters:,} parameters, {gmacs} GMACs at 224 x 224; input normalised by ImageNet's mean and deviation, RGB.
    Arguments and keys of MobileNetV2. https://arxiv.org/abs/1801.04381.
    """
    register_model(factory.__name__, timm=f"mobilenetv2_{percent}", **_PAPER)(factory)


_register(0.35, 1_677_128, "0.059")
_register(0.5, 1_968_680, "0.097")
_register(0.75, 2_636_424, "0.21")
_register(1.4, 6_108_776, "0.58")
