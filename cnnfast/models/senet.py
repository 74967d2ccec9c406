"""SE-ResNet, https://arxiv.org/abs/1709.01507: residual networks whose blocks end in squeeze-and-excitation."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from cnnfast.models.features import FeatureInfo
from cnnfast.models.network import Network
from cnnfast.models.registry import register_model
from cnnfast.nn import FusedModule, FusedSequential, PointwiseConv2d
from cnnfast.nn.fused import NotFusable
from cnnfast.nn.fusion import activation_name, fuse_conv2d, fuse_pointwise_conv2d, fuse_squeeze_excite


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


class SEBottleneck(FusedModule):
    """1x1 (strided), 3x3 and 1x1 convolutions, each with BN, then squeeze-excite, plus x or its projection, ReLU.

    (N, in_channels, H, W) -> (N, 4 * channels, ceil(H / stride), ceil(W / stride)). For inference four or five calls:
    the last has squeeze-excite, residual and ReLU in one.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1, reduction: int = 16, **factory: Any):
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = PointwiseConv2d(in_channels, channels, stride, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(channels, **factory)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(channels, **factory)
        self.conv3 = PointwiseConv2d(channels, out_channels, bias=False, **factory)
        self.bn3 = nn.BatchNorm2d(out_channels, **factory)
        self.relu = nn.ReLU(inplace=True)
        self.se_module = SEModule(out_channels, reduction, **factory)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            projection = PointwiseConv2d(in_channels, out_channels, stride, bias=False, **factory)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(out_channels, **factory))

    def layers(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.se_module(y) + shortcut)

    def fuse(self) -> Any:
        se, activation = self.se_module, activation_name(self.relu)
        if type(se) is not SEModule:
            raise NotFusable(f"{type(se).__name__} isn't squeeze-excite")
        options: dict[str, Any] = dict(backend=self.backend)
        conv1 = fuse_pointwise_conv2d(self.conv1, self.bn1, activation=activation, **options)
        conv2 = fuse_conv2d(self.conv2, self.bn2, activation=activation, **options)
        conv3 = fuse_pointwise_conv2d(self.conv3, self.bn3, **options)
        gates = dict(activation=activation_name(se.relu), gate_activation=activation_name(se.sigmoid))
        excite = fuse_squeeze_excite(se.fc1, se.fc2, post_activation=activation, **gates, **options)
        projection = None
        if self.downsample is not None:
            projection = fuse_pointwise_conv2d(*self.downsample.children(), **options)

        def call(x: Tensor) -> Tensor:
            y = conv3(conv2(conv1(x)))
            return excite(y, residual=x if projection is None else projection(x))

        return call


@register_model("se_resnet50", timm="legacy_seresnet50", paper="https://arxiv.org/abs/1709.01507", year=2017)
class SEResNet50(Network):
    """SE-ResNet-50 (2017): 28,088,024 parameters, 3.9 GMACs at 224 x 224; input normalised by ImageNet's mean and
    deviation, RGB.

    (N, in_chans, H, W) -> (N, num_classes). State-dict keys of timm's legacy_seresnet50 (the authors' Caffe network):
    `layer0.conv1`, `layer1.0.conv1`, ..., `layer1.0.se_module.fc1`, `last_linear`. A strided block has its stride in
    the first 1x1 convolution and the pooling rounds up, as in Caffe; torchvision's ResNets stride the 3x3 one. Trained
    layer by layer; in eval mode with grad disabled squeeze-excite, residual and ReLU are one call. The fastest input is
    channels_last; the network makes it so after the first layer in any case.

    Args:
        num_classes: outputs; 0 for none (forward returns pooled features).
        in_chans: channels of x.
        drop_rate: dropout before the classifier.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "".

    Squeeze-and-Excitation Networks, https://arxiv.org/abs/1709.01507.
    """

    classifier_name = "last_linear"
    in_pretrainedmodels = True
    min_size = 3  # pooling without padding

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
        stem = OrderedDict(
            conv1=nn.Conv2d(in_chans, 64, 7, 2, 3, bias=False, **factory),
            bn1=nn.BatchNorm2d(64, **factory),
            relu1=nn.ReLU(inplace=True),
        )
        self.layer0 = FusedSequential(stem)
        self.pool0 = nn.MaxPool2d(3, 2, ceil_mode=True)
        in_channels = 64
        for i, (blocks, channels) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
            layer = nn.Sequential()
            for n in range(blocks):
                layer.append(SEBottleneck(in_channels, channels, 2 if i > 1 and n == 0 else 1, **factory))
                in_channels = channels * SEBottleneck.expansion
            setattr(self, f"layer{i}", layer)
        self.steps = ["layer0", "pool0", "layer1", "layer2", "layer3", "layer4"]
        maps = (("layer0", 64), ("layer1", 256), ("layer2", 512), ("layer3", 1024), ("layer4", 2048))
        self.feature_info = FeatureInfo(
            dict(num_chs=channels, reduction=2 << n, module=module) for n, (module, channels) in enumerate(maps)
        )
        self._make_head(in_channels, num_classes, drop_rate, global_pool, factory)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
