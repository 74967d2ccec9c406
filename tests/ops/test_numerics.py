"""The checker itself: it has to fail where a kernel is wrong. Fails if the bound lets any of these mistakes pass."""

import pytest
import torch
from numerics import assert_gradients_by_policy, draw, fresh_generator, nan_filled
from op_cases import OPS, make

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture
def generator():
    return fresh_generator()


def rounded_reference(case):
    """What a perfect kernel returns: the float64 result, rounded once."""
    doubles = case.to(torch.Tensor.double)
    return doubles.reference(**doubles.tensors, **doubles.options).to(case.x.dtype)


def largest(x):
    return torch.unravel_index(x.abs().argmax(), x.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_passes_what_is_rounded_once(op, dtype, generator):
    case = make(op, generator, dtype=dtype, decades=3)
    case.check(rounded_reference(case), rounded=0)


@pytest.mark.parametrize("op", OPS)
def test_passes_torch_in_float32(op, generator):
    case = make(op, generator, decades=3, c=64)
    case.check(case.reference(**case.tensors, **case.options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_sees_a_zeroed_channel_of_small_scale(op, dtype, generator):
    case = make(op, generator, dtype=dtype, decades=3, activation=None)
    ours = rounded_reference(case)
    ours[:, ours.abs().amax((0, 2, 3)).argmin()] = 0
    with pytest.raises(AssertionError, match="elements are off"):
        case.check(ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_sees_one_element_off(op, dtype, generator):
    case = make(op, generator, dtype=dtype, activation=None)
    ours = rounded_reference(case)
    ours[largest(ours)] *= 1 + min(200 * torch.finfo(dtype).eps, 0.25)
    with pytest.raises(AssertionError, match="1 of"):
        case.check(ours)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_sees_special_values(wrong, generator):
    case = make("depthwise_conv2d", generator, activation=None)  # a ReLU would hide what is -Inf
    ours = rounded_reference(case)
    ours[1, 2, 3, 4] = wrong
    with pytest.raises(AssertionError, match=r"worst at \(1, 2, 3, 4\)"):
        case.check(ours)
    case.tensors["x"] = case.x.clone()
    case.x[0, 0, 0, 0] = wrong
    ours = case.reference(**case.tensors, **case.options)
    case.check(ours)
    with pytest.raises(AssertionError, match="elements are off"):
        case.check(ours.nan_to_num(0.0, 0.0, 0.0))


def test_sees_the_wrong_shape(generator):
    case = make("depthwise_conv2d", generator)
    with pytest.raises(AssertionError, match="shape"):
        case.check(rounded_reference(case)[:1])


@pytest.mark.parametrize("argument", ["x", "weight", "bias"])
def test_sees_a_wrong_gradient(argument, generator):
    case = make("depthwise_conv2d", generator, away_from_kinks=True)
    leaves = {name: t.double().requires_grad_() for name, t in case.tensors.items()}
    y = case.reference(**leaves, **case.options)
    grad = draw(generator, y.shape)
    y.backward(grad.double())
    ours = {name: leaf.grad.float() for name, leaf in leaves.items()}

    def check():
        terms = {name: 9 for name in ours}
        assert_gradients_by_policy(ours, case.reference, grad, case.tensors, case.options, terms=terms)

    check()
    ours[argument][largest(ours[argument])] *= 1.001
    with pytest.raises(AssertionError, match=f"gradient of {argument}: 1 of"):
        check()


def test_nan_filled():
    with nan_filled():
        assert torch.empty(1000).isnan().all()
        assert torch.empty(10, 7, 3, 3, memory_format=torch.channels_last).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_draws_differ_and_spread():
    a, b = (draw(fresh_generator(), (1, 64, 30, 30)) for _ in range(2))
    assert not torch.equal(a, b)
    spread = make("depthwise_conv2d", fresh_generator(), c=64, size=(30, 30), decades=3).x.abs().mean((0, 2, 3))
    assert spread.max() / spread.min() > 500
