"""What blocks' `fuse` is made of: for each op a function that takes the layers, folds and packs their weights, and
returns the call that replaces them, every option normalised beforehand. On a GPU, where kernels take plain weights, the
call holds the folded ones.

Each raises NotFusable where a layer isn't of the kind that the op computes (fusable.py).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnfast import _library, ops
from cnnfast.nn.folding import fold_apart
from cnnfast.nn.fusable import Layer, Stage, activation_name, check_depthwise, check_pointwise, check_stage, pooling
from cnnfast.nn.fused import NotFusable
from cnnfast.nn.layers import Conv2dSame
from cnnfast.nn.packed_call import Call, packed_call
from cnnfast.nn.recording import Value
from cnnfast.ops import activations, backends

_IN_PLACE: dict[str | None, Call] = {
    "relu": Tensor.relu_,
    "relu6": lambda y: y.clamp_(0, 6),
    "sigmoid": Tensor.sigmoid_,
    "silu": functools.partial(F.silu, inplace=True),
    "tanh": Tensor.tanh_,
}
# Up to which copying windows costs less than padding x for ATen and clamping what it returns.
_FEW_CHANNELS = 4
_TILE_CHANNELS = 32  # kPairDepth in csrc/packing.h
_WINOGRAD_CHANNELS = 16  # from which on transforming tiles costs less than the multiplications that it saves
_TAKES_SCALES = (
    "conv2d",
    "pointwise_conv2d",
    "separable_conv2d",
    "inverted_residual",
)  # whose bfloat16 is packed as such


def fuse_depthwise_conv2d(conv: Layer, bn: Layer | None = None, **options: Any) -> Call:
    """x -> activation(bn(conv(pre_activation(x))))"""
    stages = [check_depthwise(conv, bn)]
    shape = dict(kernel_size=conv.kernel_size)
    return _fuse("depthwise_conv2d", [conv], stages, shape, dict(**_geometry(conv), **options))


def fuse_pointwise_conv2d(conv: Layer, bn: Layer | None = None, *, scale: float = 1.0, **options: Any) -> Call:
    """x, residual=None -> activation(scale * bn(conv(x)) + residual)"""
    stage = check_pointwise(conv, bn, strided=True)._replace(factor=scale)
    return _fuse("pointwise_conv2d", [conv], [stage], {}, dict(stride=conv.stride, **options))


def fuse_separable_conv2d(
    dw: Layer,
    dw_bn: Layer | None,
    pw: Layer,
    pw_bn: Layer | None,
    max_pool: Layer | None = None,
    **options: Any,
) -> Call:
    """x, residual=None -> max_pool(activation(pw_bn(pw(mid_activation(dw_bn(dw(pre_activation(x)))))) + residual))

    With order="pointwise_first" pw and dw change places. Otherwise the pooling is part of the same pass where the
    packed form runs.
    """
    stages = [check_depthwise(dw, dw_bn), check_pointwise(pw, pw_bn)]
    shape: dict[str, Any] = dict(kernel_size=dw.kernel_size)
    convs = [dw, pw]
    if options.get("order") == "pointwise_first":
        convs = [pw, dw]
    elif max_pool is not None and _takes_packed("separable_conv2d", dw.weight.device, options["backend"]):
        shape["max_pool"], max_pool = pooling(max_pool), None
    call = _fuse("separable_conv2d", convs, stages, shape, dict(**_geometry(dw), **options))
    return call if max_pool is None else lambda x: max_pool(call(x))


def fuse_inverted_residual(
    expand: Layer | None,
    expand_bn: Layer | None,
    dw: Layer,
    dw_bn: Layer | None,
    project: Layer,
    project_bn: Layer | None,
    excite: Layer | None = None,
    **options: Any,
) -> Call:
    """x, residual=None -> project_bn(project(excite(act(dw_bn(dw(act(expand_bn(expand(x))))))))) + residual

    `expand` None: none; `excite`: a SqueezeExcite.
    """
    stages = [
        None if expand is None else check_pointwise(expand, expand_bn),
        check_depthwise(dw, dw_bn),
        check_pointwise(project, project_bn),
    ]
    shape = dict(expanded_channels=dw.out_channels, kernel_size=dw.kernel_size)
    more: dict[str, Tensor | None] = {}
    if excite is not None:
        options.update(se_activation=activation_name(excite.act1), gate_activation=activation_name(excite.gate))
        more["se_reduce_weight"], more["se_reduce_bias"] = check_pointwise(excite.conv_reduce).fold()
        more["se_expand_weight"], more["se_expand_bias"] = check_pointwise(excite.conv_expand).fold()
    convs = [dw, project] if expand is None else [expand, dw, project]
    return _fuse("inverted_residual", convs, stages, shape, dict(**_geometry(dw), **options), more)


def fuse_squeeze_excite(reduce: Layer, expand: Layer, **options: Any) -> Call:
    """x, residual=None -> post_activation(x * gate_activation(expand(activation(reduce(mean of x)))) + residual)"""
    stages = [check_pointwise(reduce), check_pointwise(expand)]
    return _fuse("squeeze_excite", [reduce, expand], stages, {}, options)


def fuse_pool_and_linear(linear: Layer, backend: str) -> Call:
    """(N, C, H, W) -> (N, out_features, 1, 1), linear(mean of x over its pixels)"""
    weight, bias = linear.weight.detach()[:, :, None, None], linear.bias
    if not _takes_packed("pointwise_conv2d", weight.device, backend):
        raise NotFusable("the packed form runs on a CPU only")
    packed = ops.pack_pointwise_conv2d(weight, None if bias is None else bias.detach())
    options = dict(out_channels=linear.out_features, stride=(1, 1), backend=backend)
    call = packed_call("pointwise_conv2d", packed, options, linear.in_features, weight.dtype)
    return lambda x: call(x.mean_of_pixels() if type(x) is Value else x.mean((2, 3), keepdim=True))


def fuse_conv2d(
    conv: Layer,
    bn: Layer | None = None,
    *,
    activation: str | None = None,
    channels_last: bool = False,
    backend: str = "auto",
) -> Call:
    """x, residual=None -> activation(bn(conv(x)) + residual), a dense convolution: ours in float32, in bfloat16 where
    our product takes it as such, and for 'same' padding of few channels; else ATen's, which in bfloat16 and float16 on
    a CPU leaves bn a pass of its own (in float32, rounding once more, as PyTorch's): see _fuse.

    `channels_last`: whatever x's layout, the result is channels_last (a network's first layer, whose x is small).
    """
    stage = check_stage(conv, bn)
    same = isinstance(conv, Conv2dSame)
    if (
        conv.groups == 1
        and (_multiplied_as_such(conv) or (same and conv.in_channels <= _FEW_CHANNELS))
        and not backends.can_run("conv2d_packed", backend, conv.weight.device)
    ):
        options = dict(_geometry(conv), activation=activation, backend=backend)
        if same:  # its `padding` is 0
            options["padding"] = "same"
        elif conv.padding == "valid":
            options["padding"] = 0
        packing = dict(winograd=_by_winograd(conv))
        call = _fuse("conv2d", [conv], [stage], dict(kernel_size=conv.kernel_size), options, packing=packing)
    else:
        low: Any
        dtype, apart = conv.weight.dtype, None
        if bn is not None and dtype.itemsize == 2 and backends.device_of(conv.weight) != "cuda":  # apart: see _fuse
            low, shift, scale = fold_apart(conv, bn)
            assert scale is not None
            low, bias = low.detach(), None  # a parameter may be given other data
            apart = torch.zeros_like(scale), torch.ones_like(scale), scale, shift
        else:
            low, bias = _low_precision(*stage.fold(), dtype)
        weight = low.contiguous(memory_format=torch.channels_last) if channels_last else low.contiguous()
        activate = _IN_PLACE.get(activation) or activations.FUNCTIONS[activation]

        def call(x: Tensor, residual: Tensor | None = None) -> Tensor:
            if same:
                x = conv.pad(x)
            y = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
            if apart is not None:
                y = F.batch_norm(y, *apart, eps=0.0)
            return activate(y if residual is None else y.add_(residual))

    if channels_last:
        return lambda x, **residual: call(x.contiguous(memory_format=torch.channels_last), **residual)
    return call


def _multiplied_as_such(conv: Layer) -> bool:
    """Whether conv2d_packed multiplies what conv's dtype stores: float32; bfloat16 on AMX, if a window's rows lie side
    by side or channels fill tiles."""
    if conv.weight.dtype == torch.bfloat16:
        whole = conv.dilation[1] == 1 or conv.in_channels % _TILE_CHANNELS == 0
        return whole and _library._C.isa == "amx"
    return conv.weight.dtype == torch.float32


def _by_winograd(conv: Layer) -> bool:
    """Whether Winograd's algorithm computes `conv`, and faster than a product of its windows."""
    return (
        conv.weight.dtype == torch.float32
        and (conv.kernel_size, conv.stride, conv.dilation) == ((3, 3), (1, 1), (1, 1))
        and min(conv.in_channels, conv.out_channels) >= _WINOGRAD_CHANNELS
    )


def _fuse(
    op: str,
    convs: list[Layer],
    stages: Sequence[Stage | None],
    shape: dict[str, Any],
    options: dict[str, Any],
    more: dict[str, Tensor | None] | None = None,
    packing: dict[str, Any] | None = None,
) -> Call:
    """The call of `op` with its weights inside; `shape` is what only the packed form has to be told, `packing` what
    only pack_<op> has, `more` are weights and biases that go by name.

    bfloat16 weights stay as they are, the scales of batch normalisation apart: folded ones, rounded to bfloat16, would
    err alike at every pixel, which a mean over pixels doesn't lessen.
    """
    first, named = convs[0], more or {}
    dtype = first.weight.dtype
    if _takes_packed(op, first.weight.device, options["backend"]):
        as_such = dtype == torch.bfloat16 and op in _TAKES_SCALES
        if as_such and (op != "conv2d" or _multiplied_as_such(first)):
            folded: Any = [(None, None, None) if stage is None else fold_apart(*stage) for stage in stages]
            named = {n: t if t is None or n.endswith("bias") else t.to(dtype) for n, t in named.items()}
        else:
            folded = [(None, None) if stage is None else stage.fold() for stage in stages]
        rows = [tensor for row in zip(*folded, strict=True) for tensor in row]  # weights, biases, scales
        order = {"order": options["order"]} if "order" in options else {}
        packed = getattr(ops, f"pack_{op}")(*rows, **named, **order, **(packing or {}))
        options = dict(shape, **options)
        if op != "squeeze_excite":
            options["out_channels"] = convs[-1].out_channels
        return packed_call(op, packed, options, first.in_channels, dtype)
    low = [(None, None) if stage is None else _low_precision(*stage.fold(), dtype) for stage in stages]
    weights, biases = zip(*low, strict=True)
    named = {name: _low_precision(tensor, None, dtype)[0] for name, tensor in named.items()}
    plain = getattr(ops, op)
    return lambda x, **residual: plain(x, *weights, *biases, **named, **residual, **options)


def _takes_packed(op: str, device: torch.device, backend: str) -> bool:
    """Whether to call the op's packed form on `device`; raises NotFusable if "auto" has neither form there."""
    if not backends.can_run(f"{op}_packed", backend, device):
        return True
    reasons = backends.can_run(op, backend, device)
    if reasons and backend == "auto":
        raise NotFusable("; ".join(reasons))
    return False  # where a backend that the user named can't run, the op itself says why


def _geometry(conv: Layer) -> dict[str, Any]:
    return dict(stride=conv.stride, padding=conv.padding, dilation=conv.dilation)


def _low_precision(
    weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Folded weights in the parameters' dtype, for kernels that take x and weights of one dtype."""
    if dtype == torch.float16:
        if torch.compiler.is_compiling():
            raise NotFusable("whether its folded weights overflow float16 can't be known while compiling")
        for folded in (weight, bias):
            if folded is not None and not folded.is_meta and not folded.to(dtype).isfinite().all():
                raise NotFusable("its folded weights overflow float16")
    return None if weight is None else weight.to(dtype), None if bias is None else bias.to(dtype)
