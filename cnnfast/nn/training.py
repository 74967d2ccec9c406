"""What blocks' `fuse_training` is made of: convolutions with the statistics of their outputs, batch normalisation as a
scale and a shift that the next op applies. Raw outputs of convolutions are all that is kept for backward.

These raise NotFusable where a layer isn't of the kind that the ops compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cnnfast import ops
from cnnfast.nn.fusable import Layer, activation_name, check_depthwise, check_pointwise, check_stage, pooling
from cnnfast.nn.fused import NotFusable, only_calls
from cnnfast.nn.layers import Conv2dSame, DropPath, PointwiseConv2d
from cnnfast.nn.sync_batch_norm import (
    BATCH_NORMS,
    SyncBatchNorm2d,
    is_joined,
    joined_scale_and_shift,
    track_statistics,
)
from cnnfast.ops import activations, backends


class Pending(NamedTuple):
    """activation(y * scale + shift), not computed yet: what batch normalisation makes of a convolution's output y."""

    y: Tensor
    scale: Tensor
    shift: Tensor
    activation: str | None
    backend: str

    def tensor(self, residual: Tensor | None = None) -> Tensor:
        """activation(y * scale + shift + residual)"""
        if residual is not None and residual.dtype is not self.y.dtype:  # autocast, and x from outside
            z = self._replace(activation=None).tensor() + residual
            return activations.FUNCTIONS[self.activation](z)
        return ops.scale_shift(*self[:3], residual, activation=self.activation, backend=self.backend)

    def max_pooled(self, pool: Layer) -> Tensor:
        """pool(activation(y * scale + shift)), a max pooling."""
        return ops.scale_shift_max_pool(*self[:3], pooling(pool), activation=self.activation, backend=self.backend)


Input = Tensor | Pending
Step = Callable[[Input], Pending]


def step(conv: Layer, bn: Layer, activation: nn.Module | None, backend: str) -> Step:
    """conv, bn, activation as one call, whose result is pending."""
    op, options = _stats_op(conv)
    return normalised(
        lambda x, **prologue: op(x, conv.weight, conv.bias, **options, **prologue, backend=backend),
        bn,
        activation,
        backend,
    )


def separable_step(
    dw: Layer, pw: Layer, bn: Layer, activation: nn.Module | None, backend: str, before: nn.Module | None = None
) -> Step:
    """dw, pw, bn, activation as one call, nothing between the convolutions; before: an activation of its input."""
    check_depthwise(dw)
    check_pointwise(pw)
    _check_plain(dw)
    geometry: dict[str, Any] = dict(stride=dw.stride, padding=dw.padding, dilation=dw.dilation)

    def op(x: Tensor, **prologue: Any) -> Any:
        weights: Any = (dw.weight, pw.weight, dw.bias, pw.bias)
        return ops.separable_conv2d_stats(x, *weights, backend=backend, **(geometry | prologue))

    return normalised(op, bn, activation, backend, None if before is None else activation_name(before))


def normalised(
    op: Callable[..., Any], bn: Layer, activation: nn.Module | None, backend: str, pre_activation: str | None = None
) -> Step:
    """`op`, which takes a prologue and returns sums, then bn and activation; pre_activation: of a plain input."""
    if not any(only_calls(bn, kind.forward) for kind in (*BATCH_NORMS, SyncBatchNorm2d)):
        raise NotFusable(f"{type(bn).__name__} isn't nn.BatchNorm2d")
    name = None if activation is None else activation_name(activation)

    def call(x: Input) -> Pending:
        if isinstance(x, Pending):
            y, *sums = op(x.y, scale=x.scale, shift=x.shift, pre_activation=x.activation)
        else:
            y, *sums = op(x, pre_activation=pre_activation)
        return Pending(y, *_scale_and_shift(bn, y, sums, backend), name, backend)

    return call


def block(
    layers: Sequence[tuple[Layer, Layer, nn.Module | None]],
    excite: Layer | None,
    drop_path: Layer | None,
    backend: str,
) -> Callable[[Tensor], Tensor]:
    """(conv, bn, activation) one after the other, `excite`, a SqueezeExcite, before the last, plus x if there is a
    `drop_path`."""
    check_device(layers[0][0].weight.device, backend)
    *first, last = [step(*layer, backend) for layer in layers]
    if excite is not None:
        check_excite(excite)
    if drop_path is not None and type(drop_path) is not DropPath:
        raise NotFusable(f"{type(drop_path).__name__} isn't stochastic depth")

    def call(x: Tensor) -> Tensor:
        y: Any = x
        for one in first:
            y = one(y)
        z = last(y if excite is None else excited(y, excite))
        if drop_path is None:
            return z.tensor()
        if z.activation is None and not (drop_path.training and drop_path.drop_prob):
            return z.tensor(x)
        return drop_path(z.tensor()) + x

    return lambda x: in_layout_of(x, call)


def check_excite(excite: Layer) -> None:
    for conv in (excite.conv_reduce, excite.conv_expand):
        check_pointwise(conv)
    activation_name(excite.act1), activation_name(excite.gate)


def excited(pending: Pending, excite: Layer) -> Tensor:
    """A SqueezeExcite of a pending result."""
    weights = (
        excite.conv_reduce.weight,
        excite.conv_expand.weight,
        excite.conv_reduce.bias,
        excite.conv_expand.bias,
    )
    return ops.scale_shift_excite(
        *pending[:3],
        *weights,
        activation=pending.activation,
        se_activation=activation_name(excite.act1),
        gate_activation=activation_name(excite.gate),
        backend=pending.backend,
    )


def in_layout_of(x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """call(x), computed in channels_last, in which the kernels are fast, and returned in x's memory format."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return call(x)
    return call(x.contiguous(memory_format=torch.channels_last)).contiguous()


def check_device(device: torch.device, backend: str) -> None:
    """Raises NotFusable unless `backend` has the ops of a chain there."""
    if reasons := backends.can_run("scale_shift", backend, device):
        raise NotFusable("; ".join(reasons))


def _scale_and_shift(bn: Layer, y: Tensor, sums: Sequence[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    """Of nn.BatchNorm2d, with its running statistics moved."""
    tracked = bn.training and bn.track_running_stats
    if tracked and bn.num_batches_tracked is not None:
        with torch.no_grad():
            bn.num_batches_tracked.add_(1)
    if not bn.training and bn.running_mean is not None:
        return _frozen(bn, sums[0].dtype)
    if is_joined(bn):
        scale, shift, mean, var = joined_scale_and_shift(bn, y, *sums)
        if tracked and bn.running_mean is not None:
            track_statistics(bn, mean, var)
        return scale, shift
    if y.numel() == y.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {y.shape}")
    rows: Any = (*sums, bn.weight, bn.bias, bn.eps)
    scale, shift, mean, var = ops.batch_norm_scale_shift(y, *rows, backend=backend)
    if tracked and bn.running_mean is not None and y.numel() > 0:
        track_statistics(bn, mean, var)
    return scale, shift


def _frozen(bn: Layer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """By running statistics."""
    scale = torch.rsqrt(bn.running_var.to(dtype) + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight.to(dtype)
    shift = -bn.running_mean.to(dtype) * scale
    return scale, shift if bn.bias is None else shift + bn.bias.to(dtype)


def _stats_op(conv: Layer) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The op of a convolution, and its options."""
    check_stage(conv)
    _check_plain(conv)
    if isinstance(conv, PointwiseConv2d):
        return ops.pointwise_conv2d_stats, dict(stride=conv.stride)
    geometry = dict(stride=conv.stride, padding=conv.padding, dilation=conv.dilation)
    if isinstance(conv, Conv2dSame):
        geometry["padding"] = "same"
    if conv.groups == 1 and conv.padding != "valid":
        return ops.conv2d_stats, geometry
    check_depthwise(conv)
    return ops.depthwise_conv2d_stats, geometry


def _check_plain(conv: Layer) -> None:
    """Raises NotFusable for a DepthwiseConv2d with activations of its own."""
    if getattr(conv, "pre_activation", None) or getattr(conv, "activation", None):
        raise NotFusable(f"{type(conv).__name__} has an activation of its own")
