"""What blocks' `fuse` is made of: for each op a function that takes the layers, folds and packs their weights, and
returns the call that replaces them, every option normalised beforehand. On a GPU, where kernels take plain weights, the
call holds the folded ones.

Each raises NotFusable where a layer isn't of the kind that the op computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnfast import ops
from cnnfast.nn.folding import fold
from cnnfast.nn.fused import FusedModule, NotFusable
from cnnfast.nn.layers import Conv2dSame, PointwiseConv2d
from cnnfast.ops import activations, arguments, backends

Call = Callable[..., Tensor]

_CONV_FORWARDS = (nn.Conv2d.forward, Conv2dSame.forward, PointwiseConv2d.forward, FusedModule.forward)
_ACTIVATIONS: dict[type[nn.Module], str | None] = {nn.Identity: None, nn.ReLU: "relu", nn.ReLU6: "relu6"}


def activation_name(module: nn.Module) -> str | None:
    """The ops' name of an activation module."""
    if type(module) not in _ACTIVATIONS:
        raise NotFusable(f"the kernels don't fuse {type(module).__name__}")
    return _ACTIVATIONS[type(module)]


def fuse_depthwise_conv2d(conv: nn.Module, bn: nn.Module | None = None, **options: Any) -> Call:
    """x -> activation(bn(conv(pre_activation(x))))"""
    weights = [_depthwise_weights(conv, bn)]
    shape = dict(kernel_size=conv.kernel_size)
    return _fuse("depthwise_conv2d", [conv], weights, shape, dict(**_geometry(conv), **options))


def fuse_pointwise_conv2d(conv: nn.Module, bn: nn.Module | None = None, **options: Any) -> Call:
    """x, residual=None -> activation(bn(conv(x)) + residual)"""
    weights = [_pointwise_weights(conv, bn, strided=True)]
    return _fuse("pointwise_conv2d", [conv], weights, {}, dict(stride=conv.stride, **options))


def fuse_separable_conv2d(
    dw: nn.Module, dw_bn: nn.Module | None, pw: nn.Module, pw_bn: nn.Module | None, **options: Any
) -> Call:
    """x, residual=None -> activation(pw_bn(pw(mid_activation(dw_bn(dw(pre_activation(x)))))) + residual)"""
    weights = [_depthwise_weights(dw, dw_bn), _pointwise_weights(pw, pw_bn)]
    shape = dict(kernel_size=dw.kernel_size)
    return _fuse("separable_conv2d", [dw, pw], weights, shape, dict(**_geometry(dw), **options))


def fuse_inverted_residual(
    expand: nn.Module,
    expand_bn: nn.Module | None,
    dw: nn.Module,
    dw_bn: nn.Module | None,
    project: nn.Module,
    project_bn: nn.Module | None,
    **options: Any,
) -> Call:
    """x, residual=None -> project_bn(project(activation(dw_bn(dw(activation(expand_bn(expand(x)))))))) + residual"""
    weights = [
        _pointwise_weights(expand, expand_bn),
        _depthwise_weights(dw, dw_bn),
        _pointwise_weights(project, project_bn),
    ]
    shape = dict(expanded_channels=dw.out_channels, kernel_size=dw.kernel_size)
    return _fuse("inverted_residual", [expand, dw, project], weights, shape, dict(**_geometry(dw), **options))


def fuse_conv2d(
    conv: nn.Conv2d, bn: nn.Module | None = None, *, activation: str | None = None, channels_last: bool = False
) -> Call:
    """x -> activation(bn(conv(x))), a dense convolution by ATen with its bias.

    `channels_last`: whatever x's layout, the result is channels_last (a network's first layer, whose x is small).
    """
    weight, bias = _low_precision(*_weights(conv, bn), conv.weight.dtype)
    weight = weight.contiguous(memory_format=torch.channels_last) if channels_last else weight.contiguous()
    same = isinstance(conv, Conv2dSame)
    relu, relu6 = activation == "relu", activation == "relu6"

    def call(x: Tensor) -> Tensor:
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if same:
            x = conv.pad(x)
        y = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        return y.relu_() if relu else y.clamp_(0, 6) if relu6 else y

    return call


def _fuse(
    op: str,
    convs: list[nn.Module],
    folded: list[tuple[Tensor, Tensor | None]],
    shape: dict[str, Any],
    options: dict[str, Any],
) -> Call:
    """The call of `op` with its weights inside; `shape` is what only the packed form has to be told."""
    if _takes_packed(op, convs[0].weight.device, options["backend"]):
        weights, biases = zip(*folded, strict=True)
        packed = getattr(ops, f"pack_{op}")(*weights, *biases)
        return _packed_call(op, packed, dict(shape, out_channels=convs[-1].out_channels, **options))
    low = [_low_precision(*pair, conv.weight.dtype) for conv, pair in zip(convs, folded, strict=True)]
    weights, biases = zip(*low, strict=True)
    plain = getattr(ops, op)
    return lambda x, **residual: plain(x, *weights, *biases, **residual, **options)


def _packed_call(op: str, packed: Tensor, options: dict[str, Any]) -> Call:
    """<op>_packed with its options converted and checked once, not at every call (half of the call's time).

    An x that doesn't fit is refused by the C++ op; the public function then says why, in one sentence.
    """
    checked = functools.partial(getattr(ops, f"{op}_packed"), packed=packed, **options)
    if torch.compiler.is_compiling():
        return checked
    overload = getattr(torch.ops.cnnfast, f"{op}_packed").default
    names = [argument.name for argument in overload._schema.arguments]
    converted = dict(
        options,
        padding=arguments.edges(options.get("padding", 0)),
        backend=backends.code(f"{op}_packed", options["backend"], packed.device.type),
        **{name: activations.code(name, options.get(name)) for name in names if name.endswith("activation")},
    )
    if "residual" not in names:
        tail = [converted[name] for name in names[2:]]

        def call(x: Tensor) -> Tensor:
            try:
                return overload(x, packed, *tail)
            except (RuntimeError, TypeError):
                return checked(x)
    else:
        tail = [converted[name] for name in names[3:]]

        def call(x: Tensor, residual: Tensor | None = None) -> Tensor:
            try:
                return overload(x, packed, residual, *tail)
            except (RuntimeError, TypeError):
                return checked(x, residual=residual)

    return call


def _takes_packed(op: str, device: torch.device, backend: str) -> bool:
    """Whether to call the op's packed form on `device`; raises NotFusable if "auto" has neither form there."""
    if not backends.can_run(f"{op}_packed", backend, device):
        return True
    reasons = backends.can_run(op, backend, device)
    if reasons and backend == "auto":
        raise NotFusable("; ".join(reasons))
    return False  # where a backend that the user named can't run, the op itself says why


def _geometry(conv: nn.Module) -> dict[str, Any]:
    return dict(stride=conv.stride, padding=conv.padding, dilation=conv.dilation)


def _weights(conv: nn.Module, bn: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    if getattr(type(conv), "forward", None) not in _CONV_FORWARDS or conv.padding_mode != "zeros":
        raise NotFusable(f"{type(conv).__name__} isn't a zero-padded nn.Conv2d")
    if bn is not None and type(bn) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
        raise NotFusable(f"{type(bn).__name__} isn't batch normalisation")
    return fold(conv, bn)


def _depthwise_weights(conv: nn.Module, bn: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    weights = _weights(conv, bn)
    if conv.groups != conv.in_channels:
        raise NotFusable(f"{type(conv).__name__} isn't a depthwise convolution")
    return weights


def _pointwise_weights(conv: nn.Module, bn: nn.Module | None, strided: bool = False) -> tuple[Tensor, Tensor | None]:
    weights = _weights(conv, bn)
    if (conv.kernel_size, conv.padding, conv.groups) != ((1, 1), (0, 0), 1) or (conv.stride != (1, 1) and not strided):
        raise NotFusable(f"{type(conv).__name__} isn't a 1x1 convolution")
    return weights


def _low_precision(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Folded weights in the parameters' dtype, for kernels that take x and weights of one dtype."""
    if dtype == torch.float16:
        if torch.compiler.is_compiling():
            raise NotFusable("whether its folded weights overflow float16 can't be known while compiling")
        for folded in (weight, bias):
            if folded is not None and not folded.to(dtype).isfinite().all():
                raise NotFusable("its folded weights overflow float16")
    return weight.to(dtype), None if bias is None else bias.to(dtype)
