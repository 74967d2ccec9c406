"""What blocks' `fuse` is made of: for each op a function that takes the layers, folds and packs their weights, and
returns the call that replaces them, every option normalised beforehand. On a GPU, where kernels take plain weights, the
call holds the folded ones.

Each raises NotFusable where a layer isn't of the kind that the op computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnfast import _library, ops
from cnnfast.nn.folding import fold, fold_apart
from cnnfast.nn.fused import FusedModule, NotFusable
from cnnfast.nn.layers import Conv2dSame, PointwiseConv2d
from cnnfast.nn.recording import Value
from cnnfast.nn.sync_batch_norm import BATCH_NORMS, SyncBatchNorm2d
from cnnfast.ops import _registration, activations, arguments, backends

Call = Callable[..., Tensor]
Layer = Any  # an nn.Module whose attributes are read by name; `_stage` and `_pooling` refuse what doesn't fit

_CONV_FORWARDS = (nn.Conv2d.forward, Conv2dSame.forward, PointwiseConv2d.forward, FusedModule.forward)
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
_ACTIVATIONS: dict[type[nn.Module], str | None] = {
    nn.Identity: None,
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Tanh: "tanh",
}


class _Stage(NamedTuple):
    """A convolution, the batch normalisation after it and a factor: what is folded, as the op's form wants it."""

    conv: Layer
    bn: Layer | None = None
    factor: float = 1.0

    def fold(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = fold(self.conv, self.bn)
        if self.factor == 1:
            return weight, bias
        return weight * self.factor, None if bias is None else bias * self.factor


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
    call = _packed_call("pointwise_conv2d", packed, options, linear.in_features, weight.dtype)
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
    stages: Sequence[_Stage | None],
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
        return _packed_call(op, packed, options, first.in_channels, dtype)
    low = [(None, None) if stage is None else _low_precision(*stage.fold(), dtype) for stage in stages]
    weights, biases = zip(*low, strict=True)
    named = {name: _low_precision(tensor, None, dtype)[0] for name, tensor in named.items()}
    plain = getattr(ops, op)
    return lambda x, **residual: plain(x, *weights, *biases, **named, **residual, **options)


def _packed_call(op: str, packed: Tensor, options: dict[str, Any], in_channels: int, dtype: torch.dtype) -> Call:
    """<op>_packed with its options converted and checked once, not at every call (half of the call's time).

    An x that doesn't fit is refused by the C++ op; only then is it looked at here, to say why in one sentence.
    """
    checked = functools.partial(getattr(ops, f"{op}_packed"), packed=packed, **options)
    if torch.compiler.is_compiling():
        return checked
    overload = getattr(torch.ops.cnnfast, f"{op}_packed").default
    names = [argument.name for argument in overload._schema.arguments]
    converted = dict(
        options,
        padding=arguments.edges(options.get("padding", 0)),
        max_pool=options.get("max_pool", arguments.NO_POOL),
        pointwise_first=options.get("order") == "pointwise_first",
        gate=None,
        backend=backends.code(f"{op}_packed", options["backend"], packed.device.type),
        **{name: activations.code(name, options.get(name)) for name in names if name.endswith("activation")},
    )
    takes_residual = "residual" in names
    residual_at = names.index("residual") if takes_residual else 1
    head = [converted[name] for name in names[2:residual_at]]
    tail = [converted[name] for name in names[residual_at + 1 :]]

    step = _registration.PACKED_OPS[op] if packed.device.type == "cpu" else None
    out_channels = options.get("out_channels", in_channels)

    def call(x: Tensor) -> Tensor:
        if type(x) is Value:
            return x.recorder.add(step, [x, *tail], packed, out_channels)
        try:
            return overload(x, packed, *tail)
        except (RuntimeError, TypeError):
            _check_fits(x, in_channels, dtype)
            return checked(x)

    def call_with_residual(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if type(x) is Value:
            return x.recorder.add(step, [x, *head, residual, *tail], packed, out_channels)
        try:
            return overload(x, packed, *head, residual, *tail)
        except (RuntimeError, TypeError):
            _check_fits(x, in_channels, dtype)
            return checked(x, residual=residual)

    return call_with_residual if takes_residual else call


def _check_fits(x: Tensor, in_channels: int, dtype: torch.dtype) -> None:
    """What <op>_packed can't say, because only the kernels read a packing's header."""
    arguments.check_x(x)
    if x.shape[1] != in_channels:
        raise ValueError(f"x must have shape (N, {in_channels}, H, W), got {tuple(x.shape)}")
    if (x.dtype == torch.float64) != (dtype == torch.float64):
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
        raise TypeError(f"x must have the dtype of the weights, {wanted} or lower, got {x.dtype}")


def _takes_packed(op: str, device: torch.device, backend: str) -> bool:
    """Whether to call the op's packed form on `device`; raises NotFusable if "auto" has neither form there."""
    if not backends.can_run(f"{op}_packed", backend, device):
        return True
    reasons = backends.can_run(op, backend, device)
    if reasons and backend == "auto":
        raise NotFusable("; ".join(reasons))
    return False  # where a backend that the user named can't run, the op itself says why


def pooling(pool: Layer) -> tuple[int, int, int]:
    """(kernel, stride, padding)"""
    kernel, stride, padding = (getattr(pool, name, None) for name in ("kernel_size", "stride", "padding"))
    if not (isinstance(kernel, int) and isinstance(stride, int) and isinstance(padding, int)):
        raise NotFusable(f"{pool} isn't a square max pooling")
    if type(pool) is not nn.MaxPool2d or pool.dilation != 1 or pool.ceil_mode or pool.return_indices:
        raise NotFusable(f"{pool} isn't a plain max pooling")
    return kernel, stride, padding


def _geometry(conv: Layer) -> dict[str, Any]:
    return dict(stride=conv.stride, padding=conv.padding, dilation=conv.dilation)


def check_stage(conv: Layer, bn: Layer | None = None) -> _Stage:
    if getattr(type(conv), "forward", None) not in _CONV_FORWARDS or conv.padding_mode != "zeros":
        raise NotFusable(f"{type(conv).__name__} isn't a zero-padded nn.Conv2d")
    if bn is not None and type(bn) not in (*BATCH_NORMS, SyncBatchNorm2d):
        raise NotFusable(f"{type(bn).__name__} isn't batch normalisation")
    return _Stage(conv, bn)


def check_depthwise(conv: Layer, bn: Layer | None = None) -> _Stage:
    stage = check_stage(conv, bn)
    if conv.groups != conv.in_channels:
        raise NotFusable(f"{type(conv).__name__} isn't a depthwise convolution")
    return stage


def check_pointwise(conv: Layer, bn: Layer | None = None, strided: bool = False) -> _Stage:
    stage = check_stage(conv, bn)
    if (conv.kernel_size, conv.padding, conv.groups) != ((1, 1), (0, 0), 1) or (conv.stride != (1, 1) and not strided):
        raise NotFusable(f"{type(conv).__name__} isn't a 1x1 convolution")
    return stage


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
