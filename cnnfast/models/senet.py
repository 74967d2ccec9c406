"""SENets, https://arxiv.org/abs/1709.01507: residual networks whose blocks end in squeeze-and-excitation."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cnnfast.models.features import FeatureInfo
from cnnfast.models.network import Network
from cnnfast.models.registry import register_model
from cnnfast.models.residual import ResidualBlock, conv3x3, projection
from cnnfast.nn import FusedSequential, PointwiseConv2d
from cnnfast.nn.fusable import activation_name
from cnnfast.nn.fused import NotFusable
from cnnfast.nn.fusion import fuse_squeeze_excite
from cnnfast.nn.sequential import fuse_run


class SEModule(nn.Module):
    """x times the gates of its channels: (N, C, H, W) -> (N, C, H, W). Keys `fc1`, `fc2`, as in timm's SENet."""

    def __init__(self, channels: int, reduction: int, **factory: Any):
        super().__init__()
        self.fc1 = PointwiseConv2d(channels, channels // reduction, **factory)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = PointwiseConv2d(channels // reduction, channels, **factory)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(self.fc2(self.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class SEBlock(ResidualBlock):
    """Convolutions, each with BN, ReLU between, then squeeze-excite, plus x or its projection, ReLU.

    (N, in_channels, H, W) -> (N, expansion * channels, ceil(H / stride), ceil(W / stride)). Keys as ResidualBlock's,
    and `se_module`. For inference a call a convolution, and one with squeeze-excite, shortcut and ReLU.

    Args:
        convs: the convolutions.
        downsample: None for x itself.
        reduction: channels over those between squeeze-excite's two products.
    """

    expansion: int
    activates_last = False  # whether ReLU also follows the last convolution's BN

    def __init__(self, convs: Sequence[nn.Conv2d], downsample: nn.Module | None, reduction: int, **factory: Any):
        super().__init__(convs, downsample, **factory)
        self.se_module = SEModule(convs[-1].out_channels, reduction, **factory)

    def layers(self, x: Tensor) -> Tensor:
        y = x
        for n, (conv, bn) in enumerate(self.units(), 1):
            y = bn(conv(y))
            if n < self.depth or self.activates_last:
                y = self.relu(y)
        return self.relu(self.se_module(y) + (x if self.downsample is None else self.downsample(x)))

    def fuse(self) -> Any:
        se = self.se_module
        if type(se) is not SEModule:
            raise NotFusable(f"{type(se).__name__} isn't squeeze-excite")
        acts = [[self.relu]] * (self.depth - 1) + [[self.relu] if self.activates_last else []]
        units = [fuse_run([*unit, *act], self.backend) for unit, act in zip(self.units(), acts, strict=True)]
        gates = dict(activation=activation_name(se.relu), gate_activation=activation_name(se.sigmoid))
        gates.update(post_activation=activation_name(self.relu))
        excite = fuse_squeeze_excite(se.fc1, se.fc2, **gates, backend=self.backend)
        shortcut = self.fuse_shortcut()

        def call(x: Tensor) -> Tensor:
            y = x
            for unit in units:
                y = unit(y)
            return excite(y, residual=shortcut(x))

        return call


class SEResNetBlock(SEBlock):
    """Two 3x3 convolutions, the first strided, both with ReLU."""

    expansion = 1
    activates_last = True

    def __init__(self, in_channels: int, channels: int, stride: int, *rest: Any, **factory: Any):
        conv1 = conv3x3(in_channels, channels, stride, **factory)
        super().__init__([conv1, conv3x3(channels, channels, **factory)], *rest, **factory)


class SEResNetBottleneck(SEBlock):
    """1x1 (strided), 3x3 and 1x1 convolutions, as in Caffe's and the paper's ResNets."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, *rest: Any, **factory: Any):
        conv1 = PointwiseConv2d(in_channels, channels, stride, bias=False, **factory)
        conv2 = conv3x3(channels, channels, **factory)
        conv3 = PointwiseConv2d(channels, channels * self.expansion, bias=False, **factory)
        super().__init__([conv1, conv2, conv3], *rest, **factory)


class SEBottleneck(SEBlock):
    """SENet-154's: 1x1 of twice the channels, 3x3 (strided) of four times the channels in 64 groups, 1x1."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, *rest: Any, **factory: Any):
        conv1 = PointwiseConv2d(in_channels, channels * 2, bias=False, **factory)
        conv2 = conv3x3(channels * 2, channels * 4, stride, groups=64, **factory)
        conv3 = PointwiseConv2d(channels * 4, channels * self.expansion, bias=False, **factory)
        super().__init__([conv1, conv2, conv3], *rest, **factory)


class SENet(Network):
    """(N, in_chans, H, W) -> (N, num_classes); input normalised by ImageNet's mean and deviation, RGB. State-dict keys
    of timm's legacy_seresnet50 and its like (the authors' Caffe networks): `layer0.conv1`, `layer1.0.conv1`, ...,
    `layer1.0.se_module.fc1`, `last_linear`.

    The pooling rounds up, as in Caffe. Trained layer by layer; in eval mode with grad disabled squeeze-excite, residual
    and ReLU are one call, and each convolution is one with its BN and ReLU. The fastest input is channels_last; the
    network makes it so after the first layer in any case.

    Args:
        block: SEResNetBlock, SEResNetBottleneck or SEBottleneck.
        depths: blocks of each stage.
        num_classes: outputs; 0 for none (forward returns pooled features).
        in_chans: channels of x.
        drop_rate: dropout before the classifier.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "".
        deep_stem: three 3x3 convolutions, of 64, 64 and 128 channels, in place of a 7x7 one of 64.
        projection_size: of the projections' filters behind the first stage.
        reduction: of squeeze-excite, the paper's r.

    Squeeze-and-Excitation Networks, https://arxiv.org/abs/1709.01507.
    """

    classifier_name = "last_linear"
    min_size = 3  # pooling without padding

    def __init__(
        self,
        block: type[SEResNetBlock] | type[SEResNetBottleneck] | type[SEBottleneck],
        depths: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.2,
        global_pool: str = "avg",
        *,
        deep_stem: bool = False,
        projection_size: int = 1,
        reduction: int = 16,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans = in_chans
        self.in_pretrainedmodels = block is not SEResNetBlock
        channels = 128 if deep_stem else 64
        if deep_stem:
            convs = [conv3x3(in_chans, 64, 2, **factory), conv3x3(64, 64, **factory), conv3x3(64, 128, **factory)]
        else:
            convs = [nn.Conv2d(in_chans, 64, 7, 2, 3, bias=False, **factory)]
        stem: OrderedDict[str, nn.Module] = OrderedDict()
        for n, conv in enumerate(convs, 1):
            stem.update({f"conv{n}": conv, f"bn{n}": nn.BatchNorm2d(conv.out_channels, **factory)})
            stem[f"relu{n}"] = nn.ReLU(inplace=True)
        self.layer0 = FusedSequential(stem)
        self.pool0 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.steps = ["layer0", "pool0"]
        maps = [dict(num_chs=channels, reduction=2, module="layer0")]
        for n, (blocks, width) in enumerate(zip(depths, (64, 128, 256, 512), strict=True), 1):
            layer, stride, out_channels = nn.Sequential(), 1 if n == 1 else 2, width * block.expansion
            for _ in range(blocks):
                downsample = None
                if stride != 1 or channels != out_channels:
                    size = 1 if n == 1 else projection_size
                    downsample = projection(channels, out_channels, stride, size, **factory)
                layer.append(block(channels, width, stride, downsample, reduction, **factory))
                channels, stride = out_channels, 1
            setattr(self, f"layer{n}", layer)
            self.steps.append(f"layer{n}")
            maps.append(dict(num_chs=channels, reduction=2 << n, module=f"layer{n}"))
        self.feature_info = FeatureInfo(maps)
        self._make_head(channels, num_classes, drop_rate, global_pool, factory)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


_PAPER: dict[str, Any] = dict(paper="https://arxiv.org/abs/1709.01507", year=2017)


@register_model("se_resnet18", timm="legacy_seresnet18", **_PAPER)
def se_resnet18(**options: Any) -> SENet:
    """SE-ResNet-18 (2017): 11,778,592 parameters, 1.8 GMACs at 224 x 224. As timm's, with a ReLU before squeeze-excite,
    which bottlenecks don't have. See SENet. https://arxiv.org/abs/1709.01507"""
    return SENet(SEResNetBlock, (2, 2, 2, 2), **options)


@register_model("se_resnet34", timm="legacy_seresnet34", **_PAPER, interpolation="bilinear")
def se_resnet34(**options: Any) -> SENet:
    """SE-ResNet-34 (2017), as se_resnet18: 21,958,868 parameters, 3.7 GMACs at 224 x 224.
    https://arxiv.org/abs/1709.01507"""
    return SENet(SEResNetBlock, (3, 4, 6, 3), **options)


@register_model("se_resnet50", timm="legacy_seresnet50", **_PAPER, interpolation="bilinear")
def se_resnet50(**options: Any) -> SENet:
    """SE-ResNet-50 (2017): 28,088,024 parameters, 3.9 GMACs at 224 x 224. A strided block has its stride in the first
    1x1 convolution, as in Caffe; resnet50, as torchvision's, in the 3x3 one. See SENet.
    https://arxiv.org/abs/1709.01507"""
    return SENet(SEResNetBottleneck, (3, 4, 6, 3), **options)


@register_model("se_resnet101", timm="legacy_seresnet101", **_PAPER, interpolation="bilinear")
def se_resnet101(**options: Any) -> SENet:
    """SE-ResNet-101 (2017), as se_resnet50: 49,326,872 parameters, 7.6 GMACs at 224 x 224.
    https://arxiv.org/abs/1709.01507"""
    return SENet(SEResNetBottleneck, (3, 4, 23, 3), **options)


@register_model("se_resnet152", timm="legacy_seresnet152", **_PAPER, interpolation="bilinear")
def se_resnet152(**options: Any) -> SENet:
    """SE-ResNet-152 (2017), as se_resnet50: 66,821,848 parameters, 11.3 GMACs at 224 x 224.
    https://arxiv.org/abs/1709.01507"""
    return SENet(SEResNetBottleneck, (3, 8, 36, 3), **options)


@register_model("senet154", timm="legacy_senet154", **_PAPER, interpolation="bilinear")
def senet154(**options: Any) -> SENet:
    """SENet-154 (2017), the authors' entry in ILSVRC 2017: a 64 x 4d ResNeXt-152 with squeeze-excite, half the channels
    in each block's first convolution, a stem of three 3x3 and projections by 3x3 convolutions. 115,088,984 parameters,
    20.7 GMACs at 224 x 224. See SENet. https://arxiv.org/abs/1709.01507, appendix"""
    return SENet(SEBottleneck, (3, 8, 36, 3), deep_stem=True, projection_size=3, **options)
