"""Xception, https://arxiv.org/abs/1610.02357: depthwise separable convolutions with residual connections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cnnfast.models.features import FeatureInfo, strided_stages
from cnnfast.models.network import Network
from cnnfast.models.registry import INCEPTION_MEAN, INCEPTION_STD, register_model
from cnnfast.nn import DepthwiseConv2d, FusedModule, GlobalPool, PointwiseConv2d
from cnnfast.nn.fusable import activation_name
from cnnfast.nn.fused import NotFusable
from cnnfast.nn.fusion import fuse_pointwise_conv2d, fuse_separable_conv2d
from cnnfast.nn.training import Pending, check_device, in_layout_of, separable_step, step


class Separable(nn.Module):
    """Depthwise 3x3 `conv1`, then 1x1 `pointwise`, no activation between: (N, C, H, W) -> (N, K, H, W). With
    order="pointwise_first" `pointwise`, then `conv1`."""

    def __init__(
        self, in_channels: int, out_channels: int, dilation: int = 1, order: str = "depthwise_first", **factory: Any
    ):
        super().__init__()
        self.order = order
        channels = out_channels if order == "pointwise_first" else in_channels
        self.conv1 = DepthwiseConv2d(channels, 3, 1, dilation, dilation, bias=False, **factory)
        self.pointwise = PointwiseConv2d(in_channels, out_channels, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(self.pointwise(x)) if self.order == "pointwise_first" else self.pointwise(self.conv1(x))


class DilatedMaxPool2d(nn.MaxPool2d):
    """3x3 max pooling without stride, dilated and padded as much, which torch's allows only up to half the kernel:
    (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, dilation: int):
        super().__init__(3, 1, dilation, dilation)

    def forward(self, x: Tensor) -> Tensor:
        edge: Any = self.padding
        return F.max_pool2d(F.pad(x, (edge, edge, edge, edge), value=float("-inf")), 3, 1, 0, self.dilation)


class Block(FusedModule):
    """`reps` units of (ReLU, separable convolution, BN), max pooling if it has a stride, plus x or its strided
    projection.

    (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)). For inference one call a unit: BN
    is folded, each ReLU works on registers, pooling on a tile, the block's input is added inside the last call.

    Args:
        stride: of pooling and projection; None for no pooling, 1 for one that a dilated network keeps.
        residual: whether x is added.
        dilation: of depthwise convolutions and pooling.
        order: of the separable convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        reps: int,
        stride: int | None = None,
        start_with_relu: bool = True,
        grow_first: bool = True,
        *,
        residual: bool = True,
        dilation: int = 1,
        order: str = "depthwise_first",
        **factory: Any,
    ):
        super().__init__()
        self.residual = residual
        self.skip: nn.Module | None = None
        if residual and (out_channels != in_channels or stride is not None):
            self.skip = PointwiseConv2d(in_channels, out_channels, stride or 1, bias=False, **factory)
            self.skipbn = nn.BatchNorm2d(out_channels, **factory)
        middle = out_channels if grow_first else in_channels
        widths = [in_channels, *[middle] * (reps - 1), out_channels]
        rep: list[nn.Module] = []
        for i in range(reps):
            rep.append(nn.ReLU(inplace=i > 0))  # the first one's input is also the skip's
            rep.append(Separable(widths[i], widths[i + 1], dilation, order, **factory))
            rep.append(nn.BatchNorm2d(widths[i + 1], **factory))
        if not start_with_relu:
            rep = rep[1:]
        if stride is not None:
            rep.append(nn.MaxPool2d(3, stride, 1) if dilation == 1 else DilatedMaxPool2d(dilation))
        self.rep = nn.Sequential(*rep)

    def layers(self, x: Tensor) -> Tensor:
        y = self.rep(x)
        if self.residual:
            y = y + (x if self.skip is None else self.skipbn(self.skip(x)))  # a hook may have kept y
        return y

    def fuse(self) -> Any:
        *rep, pool = [*self.rep] if isinstance(self.rep[-1], nn.MaxPool2d) else [*self.rep, None]
        first = activation_name(rep.pop(0)) if len(rep) % 3 == 0 else None
        if len(rep) % 3 != 2:
            raise NotFusable("its layers aren't units of ReLU, separable convolution, BN")
        inside = None if isinstance(pool, DilatedMaxPool2d) else pool  # the op's pooling has no dilation
        calls: list[Any] = []
        for i in range(0, len(rep), 3):  # each unit's ReLU works on the output of the unit before
            separable, bn = rep[i : i + 2]
            after = activation_name(rep[i + 2]) if i + 2 < len(rep) else None
            before, max_pool = first if i == 0 else None, inside if i + 3 > len(rep) else None
            calls.append(_fuse_separable(separable, bn, self.backend, before, after, max_pool))
        if pool is not inside:
            calls.append(pool)
        *units, last = calls
        skip = None
        if self.skip is not None:
            skip = fuse_pointwise_conv2d(self.skip, self.skipbn, backend=self.backend)

        def call(x: Tensor) -> Tensor:
            y = x
            for unit in units:
                y = unit(y)
            if not self.residual:
                return last(y)
            if pool is None:
                return last(y, residual=x if skip is None else skip(x))
            y = last(y)
            return y + x if skip is None else skip(x, residual=y)

        return call

    def fuse_training(self) -> Any:
        *rep, pool = [*self.rep] if isinstance(self.rep[-1], nn.MaxPool2d) else [*self.rep, None]
        first = rep.pop(0) if len(rep) % 3 == 0 else None
        if len(rep) % 3 != 2:
            raise NotFusable("its layers aren't units of ReLU, separable convolution, BN")
        units = [[*rep[i : i + 3], None][:3] for i in range(0, len(rep), 3)]
        steps = [_train_separable(unit, self.backend, first if n == 0 else None) for n, unit in enumerate(units)]
        skip = None if self.skip is None else step(self.skip, self.skipbn, None, self.backend)
        check_device(rep[0].pointwise.weight.device, self.backend)

        def pooled(y: Pending) -> Tensor:  # the op's pooling has no dilation
            return pool(y.tensor()) if isinstance(pool, DilatedMaxPool2d) else y.max_pooled(pool)

        def call(x: Tensor) -> Tensor:
            y: Any = x
            for unit in steps:
                y = unit(y)
            if not self.residual:
                return y.tensor() if pool is None else pooled(y)
            if pool is None:
                return y.tensor(x if skip is None else skip(x).tensor())
            y = pooled(y)
            return y + x if skip is None else skip(x).tensor(y)

        return lambda x: in_layout_of(x, call)


def _train_separable(unit: Sequence[Any], backend: str, before: nn.Module | None = None) -> Any:
    separable, bn, after = unit
    if type(separable) is not Separable or separable.order == "pointwise_first":
        raise NotFusable(f"{type(separable).__name__} isn't a depthwise, then a pointwise convolution")
    return separable_step(separable.conv1, separable.pointwise, bn, after, backend, before)


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
    norms = (bn, None) if separable.order == "pointwise_first" else (None, bn)
    layers = separable.conv1, norms[0], separable.pointwise, norms[1], max_pool
    return fuse_separable_conv2d(*layers, **activations, order=separable.order, backend=backend)


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

    (N, in_chans, H, W) -> (N, num_classes). Arguments and state-dict keys of timm's legacy_xception. Trained by fused
    blocks; in eval mode with grad disabled each separable convolution is one fused call. The fastest input is
    channels_last; the network makes it so after the first layer in any case.

    `output_stride` 16 takes the stride from block12's pooling and projection, 8 from block3's too. The pooling stays,
    and every depthwise convolution and pooling behind it is dilated by 2 (by 4 behind both), so that the pixels of the
    network at 32 are among this one's: every second or fourth, with the same weights. (DeepLab's Xceptions are other
    networks, with strided convolutions for pooling and more blocks.)

    Args:
        num_classes: outputs; 0 for none (forward returns pooled features).
        in_chans: channels of x.
        drop_rate: dropout before the classifier.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "".
        output_stride: 32, 16 or 8.
        order: of each separable convolution: "depthwise_first", or "pointwise_first", that of Inception's towers, from
            which the paper derives it; the keys are the same, the depthwise convolutions' channels aren't.
        residual: False for the paper's network without residual connections, for comparison; it lacks `skip`, `skipbn`.
        hidden_features: widths of fully connected layers with ReLU between pooling and dropout, keys `hidden.0`,
            `hidden.2`, ...; the paper's optional ones, for JFT, are (4096, 4096).

    Xception, https://arxiv.org/abs/1610.02357; dilation: DeepLab, https://arxiv.org/abs/1606.00915.
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
        output_stride: int = 32,
        *,
        order: str = "depthwise_first",
        residual: bool = True,
        hidden_features: Sequence[int] = (),
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        if order not in ("depthwise_first", "pointwise_first"):
            raise ValueError(f"order must be 'depthwise_first' or 'pointwise_first', got {order!r}")
        if any(not isinstance(width, int) or width < 1 for width in hidden_features):
            raise ValueError(f"hidden_features must be positive ints, got {hidden_features!r}")
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        separable: dict[str, Any] = dict(order=order, **factory)
        block: dict[str, Any] = dict(residual=residual, **separable)
        self.hidden_features = tuple(hidden_features)
        entry1, entry2, entry3, exit12 = strided_stages((2, 2, 2, 2), output_stride, 2)
        self.in_chans = in_chans
        # entry flow
        self.conv1 = nn.Conv2d(in_chans, 32, 3, 2, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(32, **factory)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(32, 64, 3, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(64, **factory)
        self.act2 = nn.ReLU(inplace=True)
        # entry1 and so on: stride, dilation in the block, dilation behind it
        self.block1 = Block(64, 128, 2, entry1[0], start_with_relu=False, dilation=entry1[1], **block)
        self.block2 = Block(128, 256, 2, entry2[0], dilation=entry2[1], **block)
        self.block3 = Block(256, 728, 2, entry3[0], dilation=entry3[1], **block)
        # middle flow
        for i in range(4, 12):
            setattr(self, f"block{i}", Block(728, 728, 3, dilation=entry3[2], **block))
        # exit flow
        self.block12 = Block(728, 1024, 2, exit12[0], grow_first=False, dilation=exit12[1], **block)
        self.conv3 = Separable(1024, 1536, exit12[2], **separable)
        self.bn3 = nn.BatchNorm2d(1536, **factory)
        self.act3 = nn.ReLU(inplace=True)
        self.conv4 = Separable(1536, 2048, exit12[2], **separable)
        self.bn4 = nn.BatchNorm2d(2048, **factory)
        self.act4 = nn.ReLU(inplace=True)
        blocks = [f"block{i}" for i in range(1, 13)]
        self.steps = [("conv1", "bn1", "act1"), ("conv2", "bn2", "act2"), *blocks]
        self.steps += [("conv3", "bn3", "act3"), ("conv4", "bn4", "act4")]
        taps = ("act2", 64), ("block2.rep.0", 128), ("block3.rep.0", 256), ("block12.rep.0", 728), ("act4", 2048)
        self.feature_info = FeatureInfo(
            dict(num_chs=channels, reduction=min(2 << n, output_stride), module=module)
            for n, (module, channels) in enumerate(taps)
        )
        self._make_head(2048, num_classes, drop_rate, global_pool, factory)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _make_classifier(self, num_classes: int, global_pool: str, factory: Any) -> None:
        """The fully connected layers stay where the pooled features still fit, and go where there are none."""
        if self.hidden_features:
            features = self.num_features * GlobalPool(global_pool).feat_mult()
            if not global_pool:
                self.hidden = nn.Sequential()
            elif not hasattr(self, "hidden") or not self.hidden or self.hidden[0].in_features != features:
                self.hidden = nn.Sequential()
                for width in self.hidden_features:
                    self.hidden.extend([nn.Linear(features, width, **factory), nn.ReLU(inplace=True)])
                    features = width
        super()._make_classifier(num_classes, global_pool, factory)
        if self.hidden_features and global_pool and num_classes > 0:
            self.fc = nn.Linear(self.hidden_features[-1], num_classes, **factory)

    def _head(self, x: Tensor, pre_logits: bool) -> Tensor:
        x = self.global_pool(x)
        if self.hidden_features:
            x = self.hidden(x)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def _head_modules(self) -> list[nn.Module]:
        return [self.global_pool, *([self.hidden] if self.hidden_features else []), self.fc]

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

    def _train_step(self, modules: list[nn.Module]) -> Any:
        if isinstance(modules[0], Separable):
            pending = _train_separable(modules, self.backend)
            return lambda x: in_layout_of(x, lambda x: pending(x).tensor())
        return super()._train_step(modules)
