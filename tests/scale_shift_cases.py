"""Calls of scale_shift, scale_shift_excite and batch_norm_scale_shift, and the bounds of the first two."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from numerics import LAYOUTS, activations_as_bounds, assert_within, draw, fresh_generator
from torch import Tensor

import cnnfast.ops
import cnnfast.reference

Tensors = dict[str, Tensor]
OPS = ("scale_shift", "scale_shift_excite")


def make(
    op: str,
    size: Sequence[int] = (2, 19, 13, 11),
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
    residual: bool = True,
    activation: str | None = "relu6",
    seed: int | None = None,
) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and options by name; residual: of scale_shift_excite the biases."""
    generator, wide = fresh_generator(seed), torch.promote_types(dtype, torch.float32)
    channels = size[1]
    # z is away from the kinks at 0 and 6: x is, and scale and shift keep it so
    x = draw(generator, size, dtype).abs().clamp_min(0.25) * draw(generator, size, dtype).sign()
    tensors = {"x": LAYOUTS[layout](x)}
    tensors["scale"] = draw(generator, (channels,), wide).abs().clamp(0.25, 1.3)
    tensors["shift"] = tensors["scale"] / 64 * draw(generator, (channels,), wide).sign()
    if op == "scale_shift":
        if residual:
            tensors["residual"] = LAYOUTS[layout](x / 4)
        return tensors, {"activation": activation}
    for name, shape in (("reduce", (4, channels, 1, 1)), ("expand", (channels, 4, 1, 1))):
        tensors[f"{name}_weight"] = draw(generator, shape, dtype, scale=shape[1] ** -0.5)
        if residual:
            tensors[f"{name}_bias"] = draw(generator, shape[:1], dtype, scale=0.1)
    return tensors, {"activation": activation, "se_activation": "silu", "gate_activation": "sigmoid"}


def run(op: str, tensors: Tensors, options: dict[str, Any], where: ModuleType = cnnfast.ops) -> Any:
    return getattr(where, op)(**tensors, **options)


def check_output(op: str, tensors: Tensors, options: dict[str, Any], y: Tensor) -> None:
    """By the policy; shape, strides and dtype as the fake's."""
    exact = run(op, {name: t.double() for name, t in tensors.items()}, options, cnnfast.reference)
    with activations_as_bounds():
        bound = run(op, {name: t.double().abs() for name, t in tensors.items()}, options, cnnfast.reference)
    _, c, h, w = y.shape
    assert_within(y, exact, bound, terms=3 if op == "scale_shift" else max(h * w, c, 4), name="y")
    meta = run(op, {name: t.to("meta") for name, t in tensors.items()}, options)
    assert (y.shape, y.stride(), y.dtype) == (meta.shape, meta.stride(), meta.dtype)


def sums_of(y: Tensor, **options: Any) -> tuple[Tensors, dict[str, Any]]:
    """What batch_norm_scale_shift takes, of y."""
    wide = torch.promote_types(y.dtype, torch.float32)
    generator, channels = fresh_generator(), y.shape[1]
    stored = y.to(wide)
    rows = {"sum": stored.sum((0, 2, 3)), "squares": stored.square().sum((0, 2, 3))}
    rows |= {name: draw(generator, (channels,), wide).to(y.device) for name in ("weight", "bias")}
    return {"y": y, **rows}, {"eps": 1e-3, **options}
