"""Layers without a packed form of their own: what blocks and networks are made of besides torch's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnfast import ops
from cnnfast.ops import backends

_ACTIVATIONS: dict[str | None, Callable[[], nn.Module]] = {
    None: nn.Identity,
    "relu": functools.partial(nn.ReLU, inplace=True),
    "relu6": functools.partial(nn.ReLU6, inplace=True),
    "sigmoid": nn.Sigmoid,
    "silu": functools.partial(nn.SiLU, inplace=True),
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
}
_POOLS = {
    "": lambda x: x,
    "avg": lambda x: x.mean((2, 3)),
    "max": lambda x: x.amax((2, 3)),
    "avgmax": lambda x: 0.5 * (x.mean((2, 3)) + x.amax((2, 3))),
    "catavgmax": lambda x: torch.cat((x.mean((2, 3)), x.amax((2, 3))), 1),
}


def activation_module(name: str | None) -> nn.Module:
    """A new module of the activation; in place where there is such a form, for use after batch normalisation, which
    doesn't need its output."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, _ACTIVATIONS))}, got {name!r}")
    return _ACTIVATIONS[name]()


class Conv2dSame(nn.Conv2d):
    """nn.Conv2d with TensorFlow's 'same' padding: output = ceil(input / stride), the odd zero at the bottom or right.

    PyTorch's padding="same" is this for stride 1 and refuses other strides.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, **options: Any):
        super().__init__(in_channels, out_channels, kernel_size, stride, 0, **options)

    def pad(self, x: Tensor) -> Tensor:
        edges = []
        for axis in (1, 0):  # F.pad wants the columns' first
            size, kernel, stride = x.shape[axis - 2], self.kernel_size[axis], self.stride[axis]
            outputs = (size + stride - 1) // stride
            zeros = max((outputs - 1) * stride + (kernel - 1) * self.dilation[axis] + 1 - size, 0)
            edges += [zeros // 2, zeros - zeros // 2]
        return F.pad(x, edges)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.pad(x))


class PointwiseConv2d(nn.Conv2d):
    """1x1 convolution: an nn.Conv2d (same keys, same initialisation) that runs cnnfast.pointwise_conv2d on the devices
    for which there is a kernel, and ATen's convolution on others."""

    backend: str = "auto"

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, bias: bool = True, **factory: Any):
        super().__init__(in_channels, out_channels, 1, stride, bias=bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        if self.backend == "auto" and not has_kernel("pointwise_conv2d", x.device.type):
            return super().forward(x)
        return ops.pointwise_conv2d(x, self.weight, self.bias, self.stride, backend=self.backend)


def has_kernel(op: str, device_type: str) -> bool:
    return not backends.can_run(op, "auto", device_type)


has_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]  # traced as the bool it returns


class DropPath(nn.Module):
    """Stochastic depth: in training each image of the batch is zeroed with probability `drop_prob`, the others are
    divided by 1 - drop_prob; the identity in eval mode. https://arxiv.org/abs/1603.09382"""

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(f"drop_prob must be at least 0 and less than 1, got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


class GlobalPool(nn.Module):
    """(N, C, H, W) -> (N, C), or (N, 2 C) for "catavgmax"; "" passes x on.

    Args:
        pool_type: "avg", "max", "avgmax" (their mean), "catavgmax" (side by side) or "" (none).
    """

    def __init__(self, pool_type: str = "avg"):
        super().__init__()
        if pool_type not in _POOLS:
            raise ValueError(f"global_pool must be one of {', '.join(map(repr, _POOLS))}, got {pool_type!r}")
        self.pool_type = pool_type

    def forward(self, x: Tensor) -> Tensor:
        return _POOLS[self.pool_type](x)

    def feat_mult(self) -> int:
        """Output features / C."""
        return 2 if self.pool_type == "catavgmax" else 1

    def extra_repr(self) -> str:
        return repr(self.pool_type)
