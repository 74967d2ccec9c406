"""Calls of the ops that return more than an image, <op>_stats and depthwise_conv2d_squeeze, and their bounds."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from numerics import LAYOUTS, activations_as_bounds, assert_gradients_by_policy, assert_within, draw, fresh_generator
from torch import Tensor

import cnnfast.ops
import cnnfast.reference

Tensors = dict[str, Tensor]
STATS = ("conv2d_stats", "depthwise_conv2d_stats", "pointwise_conv2d_stats", "separable_conv2d_stats")
OPS = (*STATS, "depthwise_conv2d_squeeze")
PROLOGUES = {"none": (False, False, None), "scaled": (True, False, None), "batch_norm": (True, True, "relu")} | {
    "activated": (False, False, "silu"),
    "all": (True, True, "silu"),
}
# of the input or an intermediate, to the dtype
ROUNDED = dict(zip(OPS, (1, 0, 1, 2, 0), strict=True))


def make(
    op: str,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
    prologue: str = "all",
    n: int = 2,
    c: int = 19,
    out: int = 33,
    size: Sequence[int] = (13, 11),
    k: Sequence[int] = (3, 3),
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = "same",
    dilation: int | Sequence[int] = 1,
    bias: bool = True,
    seed: int | None = None,
) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and options by name."""
    generator = fresh_generator(seed)
    wide = torch.promote_types(dtype, torch.float32)
    scaled, shifted, activation = PROLOGUES[prologue]
    shapes: dict[str, tuple[int, ...]] = {
        "conv2d": {"": (out, c, *k)},
        "depthwise_conv2d": {"": (2 * c, 1, *k)},
        "pointwise_conv2d": {"": (out, c, 1, 1)},
        "separable_conv2d": {"dw_": (c, 1, *k), "pw_": (out, c, 1, 1)},
    }[op.removesuffix("_stats").removesuffix("_squeeze")]
    x = draw(generator, (n, c, *size), dtype, away_from_kinks=True)
    tensors = {"x": LAYOUTS[layout](x)}
    for prefix, shape in shapes.items():
        tensors[f"{prefix}weight"] = draw(generator, shape, dtype, scale=1 / torch.Size(shape[1:]).numel() ** 0.5)
        if bias:
            tensors[f"{prefix}bias"] = draw(generator, shape[:1], dtype, scale=0.1)
    options: dict[str, Any] = {"stride": stride, "pre_activation": activation}
    if op.startswith("separable"):
        options["mid_activation"] = "tanh"
    if not op.startswith("pointwise"):
        options |= {"padding": padding, "dilation": dilation}
    if op in STATS:
        if scaled:
            tensors["scale"] = draw(generator, (c,), wide).abs() + 0.25
        if shifted:  # so that no product comes near relu's kink: x is away from 0 by a sixteenth
            tensors["shift"] = tensors["scale"] / 64 * draw(generator, (c,), wide).sign()
    else:
        options["activation"] = activation
    return tensors, options


def run(op: str, tensors: Tensors, options: dict[str, Any], where: ModuleType = cnnfast.ops) -> Sequence[Tensor]:
    return getattr(where, op)(**tensors, **options)


def terms_of(tensors: Tensors) -> int:
    return max(tensor[0].numel() for name, tensor in tensors.items() if name.endswith("weight"))


def check_outputs(op: str, tensors: Tensors, options: dict[str, Any], outputs: Sequence[Tensor]) -> None:
    """y by the policy; the sums by that of sums of the y that was returned; shapes, strides and dtypes as the fakes."""
    doubles, absolute = ({name: f(t.double()) for name, t in tensors.items()} for f in (lambda t: t, torch.abs))
    y, *sums = outputs
    exact = run(op, doubles, options, cnnfast.reference)[0]
    with activations_as_bounds():
        bound = run(op, absolute, options, cnnfast.reference)[0]
    low = y.element_size() == 2
    assert_within(y, exact, bound, terms=terms_of(tensors), rounded=ROUNDED[op] if low else 0, name="y")
    meta = run(op, {name: t.to("meta") for name, t in tensors.items()}, options)
    for ours, fake in zip(outputs, meta, strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (fake.shape, fake.stride(), fake.dtype)
    # Sums are those of what was returned, so that only their own rounding counts.
    stored = y.double()
    if op in STATS:
        expected = stored.sum((0, 2, 3)), stored.square().sum((0, 2, 3))
        size = stored.abs().sum((0, 2, 3)), expected[1]
    else:
        expected, size = (stored.mean((2, 3), True),), (stored.abs().mean((2, 3), True),)
    terms = stored[:, 0].numel()
    for name, ours, ref, scale in zip(("sum", "squares"), sums, expected, size, strict=False):
        assert_within(ours, ref, scale, terms=terms, rounded=0, name=name)


def check_gradients(
    op: str, tensors: Tensors, options: dict[str, Any], grads: Sequence[Tensor], computed: Tensors, rounded: int
) -> None:
    """computed: gradients by name, from grads, one for each output. rounded: intermediates where x is 16 bits wide."""

    def together(**arguments: Any) -> Tensor:
        return torch.cat([t.flatten() for t in run(op, arguments, {}, cnnfast.reference)])

    dtype, images = tensors["x"].dtype, (grads[0], tensors["x"])
    longest = max(t.numel() for t in images) // min(t.shape[1] for t in images)
    assert_gradients_by_policy(
        # scale and shift are float32, but what was rounded on the way was rounded to x's dtype
        {name: gradient.to(dtype) for name, gradient in computed.items()},
        together,
        torch.cat([grad.flatten().double() for grad in grads]),
        tensors,
        options,
        terms=dict.fromkeys(tensors, max(longest, 1)),
        rounded=rounded if dtype.itemsize == 2 else 0,
    )
    for name, gradient in computed.items():
        assert gradient.dtype is tensors[name].dtype, name
