"""Xception, https://arxiv.org/abs/1610.02357: depthwise separable convolutions with residual connections."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cnnfast.models.features import FeatureInfo
from cnnfast.models.network import Network
from cnnfast.models.registry import INCEPTION_MEAN, INCEPTION_STD, register_model
from cnnfast.nn import DepthwiseConv2d, FusedModule, PointwiseConv2d
from cnnfast.nn.fused import NotFusable
from cnnfast.nn.fusion import activation_name, fuse_pointwise_conv2d, fuse_separable_conv2d


class Separable(nn.Module):
    """Depthwise 3x3 `conv1`, then 1x1 `pointwise`, no activation between: (N, C, H, W) -> (N, K, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, **factory: Any):
        super().__init__()
        self.conv1 = DepthwiseConv2d(in_channels, 3, padding=1, bias=False, **factory)
        self.pointwise = PointwiseConv2d(in_channels, out_channels, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.conv1(x))


class Block(FusedModule):
    """`reps` units of (ReLU, separable convolution, BN), max pooling if strided, plus x or its strided projection.

    (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)). For inference one call a unit: BN
    is folded, each ReLU works on registers, pooling on a tile, the block's input is added inside the last call.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        reps: int,
        stride: int = 1,
        start_with_relu: bool = True,
        grow_first: bool = True,
        **factory: Any,
    ):
        super().__init__()
        self.skip: nn.Module | None = None
        if out_channels != in_channels or stride != 1:
            self.skip = PointwiseConv2d(in_channels, out_channels, stride, bias=False, **factory)
            self.skipbn = nn.BatchNorm2d(out_channels, **factory)
        middle = out_channels if grow_first else in_channels
        widths = [in_channels, *[middle] * (reps - 1), out_channels]
        rep: list[nn.Module] = []
        for i in range(reps):
            rep.append(nn.ReLU(inplace=i > 0))  # the first one's input is also the skip's
            rep.append(Separable(widths[i], widths[i + 1], **factory))
            rep.append(nn.BatchNorm2d(widths[i + 1], **factory))
        if not start_with_relu:
            rep = rep[1:]
        if stride != 1:
            rep.append(nn.MaxPool2d(3, stride, 1))
        self.rep = nn.Sequential(*rep)

    def layers(self, x: Tensor) -> Tensor:
        y = self.rep(x)
        y += x if self.skip is None else self.skipbn(self.skip(x))
        return y

    def fuse(self) -> Any:
        *rep, pool = [*self.rep] if isinstance(self.rep[-1], nn.MaxPool2d) else [*self.rep, None]
        first = activation_name(rep.pop(0)) if len(rep) % 3 == 0 else None
        if len(rep) % 3 != 2:
            raise NotFusable("its layers aren't units of ReLU, separable convolution, BN")
        calls = []
        for i in range(0, len(rep), 3):  # each unit's ReLU works on the output of the unit before
            separable, bn = rep[i : i + 2]
            after = activation_name(rep[i + 2]) if i + 2 < len(rep) else None
            before, max_pool = first if i == 0 else None, pool if i + 3 > len(rep) else None
            calls.append(_fuse_separable(separable, bn, self.backend, before, after, max_pool))
        *units, last = calls
        skip = None
        if self.skip is not None:
            skip = fuse_pointwise_conv2d(self.skip, self.skipbn, backend=self.backend)

        def call(x: Tensor) -> Tensor:
            y = x
            for unit in units:
                y = unit(y)
            if pool is None:
                return last(y, residual=x if skip is None else skip(x))
            y = last(y)
            return y + x if skip is None else skip(x, residual=y)

        return call


def _fuse_separable(
    separable: nn.Module,
    bn: nn.Module,
    backend: str,
    before: str | None,
    after: str | None,
    max_pool: nn.Module | None = None,
) -> Any:
    if type(separable) is not Separable:
        raise NotFusable(f"{type(separable).__name__} isn't a separable convolution")
    activations = dict(pre_activation=before, mid_activation=None, activation=after)
    layers = separable.conv1, None, separable.pointwise, bn, max_pool
    return fuse_separable_conv2d(*layers, **activations, backend=backend)


@register_model(
    "xception",
    timm="legacy_xception",
    paper="https://arxiv.org/abs/1610.02357",
    year=2016,
    input_size=(3, 299, 299),
    crop_pct=0.8975,
    mean=INCEPTION_MEAN,
    std=INCEPTION_STD,
)
class XceptionFused(Network):
    """Xception (2016): 22,855,952 parameters, 8.4 GMACs at 299 x 299; input (x - 127.5) / 127.5, RGB.

    (N, in_chans, H, W) -> (N, num_classes). Arguments and state-dict keys of timm's legacy_xception. Trained layer by
    layer; in eval mode with grad disabled each separable convolution is one fused call. The fastest input is
    channels_last; the network makes it so after the first layer in any case.

    Args:
        num_classes: outputs; 0 for none (forward returns pooled features).
        in_chans: channels of x.
        drop_rate: dropout before the classifier.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "".
    """

    classifier_name = "fc"
    in_pretrainedmodels = True
    min_size = 7  # two convolutions without padding

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans = in_chans
        # entry flow
        self.conv1 = nn.Conv2d(in_chans, 32, 3, 2, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(32, **factory)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(32, 64, 3, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(64, **factory)
        self.act2 = nn.ReLU(inplace=True)
        self.block1 = Block(64, 128, 2, 2, start_with_relu=False, **factory)
        self.block2 = Block(128, 256, 2, 2, **factory)
        self.block3 = Block(256, 728, 2, 2, **factory)
        # middle flow
        for i in range(4, 12):
            setattr(self, f"block{i}", Block(728, 728, 3, **factory))
        # exit flow
        self.block12 = Block(728, 1024, 2, 2, grow_first=False, **factory)
        self.conv3 = Separable(1024, 1536, **factory)
        self.bn3 = nn.BatchNorm2d(1536, **factory)
        self.act3 = nn.ReLU(inplace=True)
        self.conv4 = Separable(1536, 2048, **factory)
        self.bn4 = nn.BatchNorm2d(2048, **factory)
        self.act4 = nn.ReLU(inplace=True)
        blocks = [f"block{i}" for i in range(1, 13)]
        self.steps = [("conv1", "bn1", "act1"), ("conv2", "bn2", "act2"), *blocks]
        self.steps += [("conv3", "bn3", "act3"), ("conv4", "bn4", "act4")]
        taps = ("act2", 64), ("block2.rep.0", 128), ("block3.rep.0", 256), ("block12.rep.0", 728), ("act4", 2048)
        self.feature_info = FeatureInfo(
            dict(num_chs=channels, reduction=2 << n, module=module) for n, (module, channels) in enumerate(taps)
        )
        self._make_head(2048, num_classes, drop_rate, global_pool, factory)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _tap(self, module: str) -> Any:
        """As timm's: a block's output after the ReLU that the next block begins with."""
        if module.endswith(".rep.0"):
            return f"block{int(module[len('block') :].partition('.')[0]) - 1}", F.relu
        return module, None

    def _fuse_step(self, modules: list[nn.Module], channels_last: bool) -> Any:
        if isinstance(modules[0], Separable):
            separable, bn, act = modules
            return _fuse_separable(separable, bn, self.backend, None, activation_name(act))
        return super()._fuse_step(modules, channels_last)
