"""How close an op has to be to its reference, and inputs that show mistakes.

The bound is elementwise, from the arithmetic: with ref the reference in float64 on the same inputs, u the unit
roundoff of the dtype, S the reference on absolute values with the activations as the bounds below (the size of what was
added up), K the terms of the longest sum and m the intermediates that the op's docstring allows to be rounded,

    |ours - ref| <= u |ref| + (4 + sqrt(K) / 2) 2^-24 S + m u S

A tolerance relative to the tensor's maximum would let whole channels of small scale be wrong. For float64 the sums'
own roundoff is 2^-53 and the reference makes the same error as ours, so that it counts twice. float16's subnormals are
as far apart as its smallest normal numbers: results and rounded intermediates below those count as large as they.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from cnnfast.reference.common import ACTIVATIONS


class _Bound(torch.autograd.Function):
    """What S has for an activation f: at least |f(s)|, and as steep as f can be, since an error before it comes out as
    much larger. In gradients an error before f changes its slope too, by as much as f bends, |f''|: the derivative is
    larger by that."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, steepest: float, bend: float, at_zero: float) -> Tensor:
        ctx.save_for_backward(s)
        ctx.slope = steepest, bend
        return at_zero + steepest * s

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (s,) = ctx.saved_tensors
        steepest, bend = ctx.slope
        return grad * (steepest + bend * s), None, None, None


def _bound(steepest: float, bend: float, at_zero: float = 0.0) -> Callable[[Tensor], Tensor]:
    return lambda s: _Bound.apply(s, steepest, bend, at_zero)


BOUNDS = dict.fromkeys(ACTIVATIONS, lambda s: s) | {  # clamps are below the identity
    "sigmoid": _bound(0.25, 0.1, 0.5),
    "silu": _bound(1.13, 0.5),
    "gelu": _bound(1.13, 0.8),
    "tanh": _bound(1.0, 0.77),
}


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def assert_within(ours: Tensor, ref: Tensor, scale: Tensor, *, terms: int, rounded: int = 0, name: str = "") -> None:
    """The bound above; ref and scale (S) are float64. NaN and Inf have to be where the reference has them."""
    assert ours.shape == ref.shape == scale.shape, f"{name}: shape {tuple(ours.shape)}, wanted {tuple(ref.shape)}"
    u = unit_roundoff(ours.dtype)
    accumulation = 2 * unit_roundoff(torch.float64) if ours.dtype is torch.float64 else 2.0**-24
    smallest = torch.finfo(ours.dtype).tiny
    bound = u * ref.abs().clamp_min(smallest) + (4 + math.sqrt(terms) / 2) * accumulation * scale
    if rounded:  # no 0 times infinity
        bound += rounded * u * scale.clamp_min(smallest)
    bound = torch.where(scale.isnan(), math.inf, bound)  # a NaN where ref has none: 0 times infinity
    ours = ours.double()
    finite = ref.abs() <= torch.finfo(torch.float64).max
    wrong = torch.where(finite, ~((ours - ref).abs() <= bound), ~((ours == ref) | (ours.isnan() & ref.isnan())))
    if not wrong.any():
        return
    excess = torch.where(wrong & finite, ((ours - ref).abs() / bound).nan_to_num(nan=math.inf), 0.0)
    at = tuple(
        int(i) for i in torch.unravel_index(excess.argmax() if excess.any() else wrong.int().argmax(), ref.shape)
    )
    raise AssertionError(
        f"{name or 'result'}: {int(wrong.sum())} of {wrong.numel()} elements are off; worst at {at}: got"
        f" {float(ours[at])!r}, wanted {float(ref[at])!r}, bound {float(bound[at]):.3g}"
    )


def assert_close_by_policy(
    ours: Tensor, reference: Callable[..., Tensor], *args: Any, terms: int, rounded: int = 0, **kwargs: Any
) -> None:
    """`ours` is within the bound of reference(*args, **kwargs)."""
    ref = reference(*_doubles(args), **_doubles(kwargs))
    with activations_as_bounds():
        scale = reference(*_absolute(args), **_absolute(kwargs))
    assert_within(ours.detach(), ref.detach(), scale.detach(), terms=terms, rounded=rounded)


def assert_gradients_by_policy(
    ours: dict[str, Tensor],
    reference: Callable[..., Tensor],
    grad: Tensor,
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    *,
    terms: dict[str, int],
    rounded: int = 0,
) -> None:
    """Each of `ours` (gradients by argument name) is within the bound of the reference's; S by differentiation too."""

    def gradients(tensors: dict[str, Tensor], grad: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
        reference(**leaves, **options).backward(grad)
        return {name: leaf.grad for name, leaf in leaves.items()}

    refs = gradients(_doubles(tensors), grad.double(), options)
    with activations_as_bounds():
        scales = gradients(_absolute(tensors), grad.double().abs(), options)
    for name, gradient in ours.items():
        assert_within(
            gradient, refs[name], scales[name], terms=terms[name], rounded=rounded, name=f"gradient of {name}"
        )


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, dict):
        return {key: _map(v, change) for key, v in value.items()}
    if isinstance(value, tuple) and any(isinstance(v, Tensor) for v in value):
        return tuple(_map(v, change) for v in value)
    return change(value.detach()) if isinstance(value, Tensor) else value


def _doubles(value: Any) -> Any:
    return _map(value, lambda t: t.double())


def _absolute(value: Any) -> Any:
    return _map(value, lambda t: t.double().abs())


def activations_as_bounds() -> contextlib.AbstractContextManager:
    """While in force the references compute S."""
    return mock.patch.dict(ACTIVATIONS, BOUNDS)


@contextlib.contextmanager
def nan_filled() -> Iterator[None]:
    """torch.empty gives NaN (and the largest integers), so that an element that no kernel wrote is seen."""
    deterministic, fill = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's kernels and ours on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def float32_by(precision: str) -> Iterator[None]:
    """torch's setting for convolutions meanwhile: "ieee" or "tf32"."""
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, precision
    try:
        yield
    finally:
        convolutions.fp32_precision = before


@pytest.fixture
def nan_outputs() -> Iterator[None]:
    with nan_filled():
        yield


def fresh_generator(seed: int | None = None) -> torch.Generator:
    """A generator with a new seed, printed so that a failure can be repeated."""
    generator = torch.Generator()
    seed = generator.seed() % 2**31 if seed is None else seed
    print(f"seed {seed}")
    return generator.manual_seed(seed)


def draw(
    generator: torch.Generator,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    scale: float | Tensor = 1.0,
    away_from_kinks: bool = False,
) -> Tensor:
    """Normal numbers times `scale`; `away_from_kinks` of relu and relu6 by at least 1/16."""
    x = torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * scale
    if away_from_kinks:
        for kink in (0.0, 6.0):
            near = (x - kink).abs() < 1 / 16
            x = torch.where(near, kink + torch.where(x < kink, -1 / 16, 1 / 16), x)
    return x.to(dtype)


def channel_scales(generator: torch.Generator, channels: int, decades: float) -> Tensor:
    """One scale a channel, spread evenly over `decades`, in random order."""
    exponents = torch.linspace(-decades, 0, channels, dtype=torch.float64)
    return 10.0 ** exponents[torch.randperm(channels, generator=generator)]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


LAYOUTS = {"nchw": torch.Tensor.contiguous, "channels_last": channels_last}
