"""The call of an op's packed form, its options converted beforehand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cnnfast import ops
from cnnfast.nn.recording import Value
from cnnfast.ops import _registration, activations, arguments, backends

Call = Callable[..., Tensor]


def packed_call(op: str, packed: Tensor, options: dict[str, Any], in_channels: int, dtype: torch.dtype) -> Call:
    """<op>_packed with its weights, its options converted and checked once, not at every call (half of its time).

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
