"""Calls of scale_shift_max_pool, and the bounds of its results and gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from numerics import LAYOUTS, activations_as_bounds, assert_gradients_by_policy, assert_within, draw, fresh_generator
from op_cases import Case
from torch import Tensor

import cnnfast.ops
import cnnfast.reference
from cnnfast.ops import activations

# size of x, (kernel, stride, padding): windows that overlap, meet, leave pixels out, are the image; whole and broken
# panels.
GEOMETRIES = (
    ((2, 19, 13, 11), (3, 2, 1)),
    ((1, 16, 9, 28), (2, 2, 0)),
    ((3, 33, 7, 8), (3, 1, 1)),
    ((2, 5, 8, 9), (1, 2, 0)),
    ((1, 48, 11, 5), (2, 3, 1)),
    ((1, 7, 15, 15), (15, 1, 7)),
    ((2, 3, 1, 1), (2, 1, 1)),
    ((0, 4, 6, 6), (3, 2, 1)),
)
# Of normal numbers: where a curve is flat, two may be equal in one dtype and not in another.
LARGE = (1, 160, 70, 40), (3, 2, 0)


def make(
    size: tuple[int, int, int, int] = (2, 19, 13, 11),
    pool: tuple[int, int, int] = (3, 2, 1),
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
    activation: str | None = "relu",
    seed: int | None = None,
) -> Case:
    """Of a small image all values are different, and results too, in any dtype, away from the kinks of ReLU6: so it is
    told which pixel of a window is the largest."""
    generator, wide = fresh_generator(seed), torch.promote_types(dtype, torch.float32)
    n, c, h, w = size
    order = torch.rand((n, c, h * w), generator=generator).argsort(-1).reshape(size)
    x = ((order + 0.5) / 128 - h * w / 256) if h * w <= 256 else draw(generator, size, torch.float32)
    largest = 1 if activation == "gelu" else 4  # far below 0 all of its results are alike
    scale = (
        2.0 ** torch.randint(-1, largest.bit_length(), (c,), generator=generator)
        * draw(generator, (c,), torch.float32).sign()
    )
    tensors = {
        "x": LAYOUTS[layout](x.to(dtype)),
        "scale": scale.to(wide),
        "shift": (scale / 512 * draw(generator, (c,), torch.float32).sign()).to(wide),
    }
    return Case("scale_shift_max_pool", tensors, {"max_pool": pool, "activation": activation})


def check_output(case: Case, y: Tensor) -> None:
    """By the policy; shape, strides and dtype as the fake's."""
    exact = case.reference(**{name: t.double() for name, t in case.tensors.items()}, **case.options)
    with activations_as_bounds():
        bound = case.reference(**{name: t.double().abs() for name, t in case.tensors.items()}, **case.options)
    assert_within(y, exact, bound, terms=3, name=f"{tuple(case.x.shape)} {case.options}")
    meta = case.to(lambda tensor: tensor.to("meta")).run()
    assert (y.shape, y.stride(), y.dtype) == (meta.shape, meta.stride(), meta.dtype)


def check_gradients(case: Case, grad: Tensor, ours: dict[str, Tensor]) -> None:
    """By the policy, and dtypes.

    S of a gradient by what its sums are made of: differentiating the reference on absolute values would move the
    largest of a window to another pixel.
    """
    assert all(ours[name].dtype is tensor.dtype for name, tensor in case.tensors.items())
    # The same pooling as a product with a tensor of ones and zeros, of which an absolute value can be taken.
    x, scale, shift = (t.double() for t in case.tensors.values())
    activation, pool = case.options["activation"], case.options["max_pool"]
    z = activations.FUNCTIONS[activation](x * scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1))
    if z.numel() == 0:
        assert all(not gradient.any() for gradient in ours.values())
        return
    pooled, at = F.max_pool2d(z, *pool, return_indices=True)

    def gathered(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        z = cnnfast.reference.scale_shift(x, scale, shift, activation=activation)
        return z.flatten(2).gather(2, at.flatten(2)).reshape(at.shape)

    assert torch.equal(gathered(x, scale, shift), pooled)
    assert_gradients_by_policy(
        {name: gradient.to(case.x.dtype) for name, gradient in ours.items()},
        gathered,
        grad,
        case.tensors,
        {},
        terms=dict.fromkeys(case.tensors, max(pooled.numel(), 4)),
    )
