"""What can be fused: layers of which kind the ops compute, convolutions with the batch normalisation after them,
activations, pooling. One of another kind is NotFusable."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from cnnfast.nn.folding import fold
from cnnfast.nn.fused import FusedModule, NotFusable
from cnnfast.nn.layers import Conv2dSame, PointwiseConv2d
from cnnfast.nn.sync_batch_norm import BATCH_NORMS, SyncBatchNorm2d

Layer = Any  # an nn.Module whose attributes are read by name; `check_stage` and `pooling` refuse what doesn't fit

_CONV_FORWARDS = (nn.Conv2d.forward, Conv2dSame.forward, PointwiseConv2d.forward, FusedModule.forward)
_ACTIVATIONS: dict[type[nn.Module], str | None] = {
    nn.Identity: None,
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Tanh: "tanh",
}


class Stage(NamedTuple):
    """A convolution, the batch normalisation after it and a factor: what is folded, as the op's form wants it."""

    conv: Layer
    bn: Layer | None = None
    factor: float = 1.0

    def fold(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = fold(self.conv, self.bn)
        if self.factor == 1:
            return weight, bias
        return weight * self.factor, None if bias is None else bias * self.factor


def check_stage(conv: Layer, bn: Layer | None = None) -> Stage:
    if getattr(type(conv), "forward", None) not in _CONV_FORWARDS or conv.padding_mode != "zeros":
        raise NotFusable(f"{type(conv).__name__} isn't a zero-padded nn.Conv2d")
    if bn is not None and type(bn) not in (*BATCH_NORMS, SyncBatchNorm2d):
        raise NotFusable(f"{type(bn).__name__} isn't batch normalisation")
    return Stage(conv, bn)


def check_depthwise(conv: Layer, bn: Layer | None = None) -> Stage:
    stage = check_stage(conv, bn)
    if conv.groups != conv.in_channels:
        raise NotFusable(f"{type(conv).__name__} isn't a depthwise convolution")
    return stage


def check_pointwise(conv: Layer, bn: Layer | None = None, strided: bool = False) -> Stage:
    stage = check_stage(conv, bn)
    if (conv.kernel_size, conv.padding, conv.groups) != ((1, 1), (0, 0), 1) or (conv.stride != (1, 1) and not strided):
        raise NotFusable(f"{type(conv).__name__} isn't a 1x1 convolution")
    return stage


def activation_name(module: nn.Module) -> str | None:
    """The ops' name of an activation module."""
    if type(module) not in _ACTIVATIONS:
        raise NotFusable(f"the kernels don't fuse {type(module).__name__}")
    if isinstance(module, nn.GELU) and module.approximate != "none":
        raise NotFusable(f"the kernels don't fuse GELU's approximation by {module.approximate}")
    return _ACTIVATIONS[type(module)]


def is_activation(module: nn.Module) -> bool:
    """Whether the kernels fuse `module` as an activation."""
    try:
        return activation_name(module) is not None
    except NotFusable:
        return False


def pooling(pool: Layer) -> tuple[int, int, int]:
    """(kernel, stride, padding)"""
    kernel, stride, padding = (getattr(pool, name, None) for name in ("kernel_size", "stride", "padding"))
    if not (isinstance(kernel, int) and isinstance(stride, int) and isinstance(padding, int)):
        raise NotFusable(f"{pool} isn't a square max pooling")
    if type(pool) is not nn.MaxPool2d or pool.dilation != 1 or pool.ceil_mode or pool.return_indices:
        raise NotFusable(f"{pool} isn't a plain max pooling")
    return kernel, stride, padding
