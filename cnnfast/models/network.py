"""What the networks share: the check of their input, pooling, classifier, and calls past the blocks' `__call__`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnfast.nn import FusedModule, GlobalPool
from cnnfast.nn.fused import only_calls


class Network(FusedModule):
    """A classifier: forward_features, then forward_head. Where the names of the first and last layers' parameters lie
    on the network, as timm's do, it folds these itself; the blocks between fold themselves.

    A subclass calls `_make_head` and defines `classifier_name` and `forward_features`; one that folds layers itself
    also `layers` and `fuse`, which return the functions (stem, tail) that `_through` puts around the blocks.
    """

    classifier_name: str
    min_size = 1  # least height and width of x

    def _make_head(self, num_features: int, num_classes: int, drop_rate: float, global_pool: str, factory: Any) -> None:
        self.num_features = num_features
        self.drop_rate = drop_rate
        self._make_classifier(num_classes, global_pool, factory)

    def _make_classifier(self, num_classes: int, global_pool: str, factory: Any) -> None:
        self.num_classes = num_classes
        self.global_pool = GlobalPool(global_pool)
        features = self.num_features * self.global_pool.feat_mult()
        fc = nn.Linear(features, num_classes, **factory) if num_classes > 0 else nn.Identity()
        setattr(self, self.classifier_name, fc)

    def get_classifier(self) -> nn.Module:
        return getattr(self, self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a fresh one of `num_classes`, or by none (0); `global_pool` None keeps the
        pooling."""
        parameter = next(self.parameters())
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self._make_classifier(num_classes, pool_type, dict(device=parameter.device, dtype=parameter.dtype))
        self.get_classifier().train(self.training)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, num_features, H, W) -> (N, num_classes), or the pooled features with `pre_logits`."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.get_classifier()(x)

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def _through(self, x: Tensor, *blocks: nn.Module) -> Tensor:
        """x through stem, blocks and tail."""
        stem, tail = self.fused() or self.layers()
        calls = [*direct_calls(*blocks)]
        x = stem(x)
        for call in calls:
            x = call(x)
        return tail(x)

    def _check_input(self, x: Tensor, first: nn.Conv2d) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4 or x.shape[1] != first.in_channels:
            raise ValueError(f"x must have shape (N, {first.in_channels}, H, W), got {tuple(x.shape)}")
        if x.shape[2] < self.min_size or x.shape[3] < self.min_size:
            raise ValueError(f"x must be at least {self.min_size} x {self.min_size}, got shape {tuple(x.shape)}")
        if x.dtype != first.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x must have the parameters' dtype {first.weight.dtype}, got {x.dtype}")


def direct_calls(*modules: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """What calling the modules one after the other comes to. To be exhausted before the first call: see
    FusedModule.direct."""
    for module in modules:
        if isinstance(module, nn.Sequential) and only_calls(module, nn.Sequential.forward):
            yield from direct_calls(*module)
        else:
            yield module.direct() if isinstance(module, FusedModule) else module


def make_divisible(channels: float, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to `channels`, at least `divisor` and not below 0.9 * channels."""
    nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * channels else nearest


def init_by_fan_out(network: nn.Module) -> None:
    """As TensorFlow's implementations of MobileNet and EfficientNet, and timm's: convolutions normal by fan-out, the
    classifier uniform."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size) // module.groups
            nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.out_features)
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)
