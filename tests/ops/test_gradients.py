"""Gradients of the kernels' own backward, against the reference's by the policy, and by finite differences in float64.

Fails if a gradient is wrong, unwritten, missing or of the wrong shape, dtype or memory format.
"""

import itertools
from unittest import mock

import pytest
import torch
from numerics import LAYOUTS, assert_gradients_by_policy, draw, fresh_generator, nan_filled
from op_cases import DTYPES, OPS, PACKED_ROUNDED, Case, all_pairs, identifier, make

import cnnfast.reference.common as reference_common
from cnnfast.ops import activations

PAIRS = all_pairs(
    {
        "dtype": DTYPES,
        "layout": tuple(LAYOUTS),
        "k": ((3, 3), (1, 1), (5, 5), (2, 3)),
        "stride": (1, 2, (3, 1)),
        "dilation": (1, (1, 2)),
        "padding": ("same", 0, (1, 0, 2, 3)),
        "activation": tuple(activations.CODES),
        "c": (16, 1, 3, 17, 40),
        "multiplier": (1, 2),
        "expand": (True, False),
        "excite": (True, False),
        "pointwise_first": (True, False),
        "bias": (True, False),
        "residual": (True, False),
        "size": ((9, 10), (7, 13)),
    }
)


def distance_from_kinks(case: Case) -> float:
    """The least distance of any pre-activation of the reference from a kink of its activation.

    An exact zero (a sum of zeros: padding, relu's output) doesn't count: it is exact in every order of summation, and
    the gradient there is 0 in PyTorch and has to be in the kernels.
    """
    distances = []

    def watched(activation, kinks):
        def watch(x):
            distances.extend(float((x[x != 0] - kink).abs().min()) for kink in kinks if x.any())
            return activation(x)

        return watch

    table = reference_common.ACTIVATIONS
    with mock.patch.dict(table, relu=watched(table["relu"], (0,)), relu6=watched(table["relu6"], (0, 6))):
        doubles = case.to(torch.Tensor.double)
        doubles.reference(**doubles.tensors, **doubles.options)
    return min(distances, default=1.0)


def make_away_from_kinks(op: str, generator: torch.Generator, **row) -> Case:
    for _ in range(100):
        case = make(op, generator, **row, away_from_kinks=True)
        if distance_from_kinks(case) > 1e-5:
            return case
    raise AssertionError("no draw is away from the kinks")


def gradients(case: Case, grad: torch.Tensor, wanted: set[str], **changes) -> dict[str, torch.Tensor]:
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in case.tensors.items()}
    with nan_filled():
        y = case.run(**leaves, **changes)
        y.backward(grad)
    return {name: leaf.grad for name, leaf in leaves.items()}


def check_gradients(case: Case, grad: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    shape = case.run().shape
    grad = draw(fresh_generator(), shape, case.x.dtype) if grad is None else grad
    ours = gradients(case, grad, set(case.tensors))
    images, pixels = shape[0], shape[2] * shape[3]
    longest = max(images * pixels, images * case.x.shape[2] * case.x.shape[3], case.terms, shape[1])
    assert_gradients_by_policy(
        ours,
        case.reference,
        grad,
        case.tensors,
        case.options,
        terms=dict.fromkeys(case.tensors, longest),
        rounded=PACKED_ROUNDED[case.op] and PACKED_ROUNDED[case.op] + 1,  # the gradient of an intermediate is one more
    )
    for name, gradient in ours.items():
        assert gradient.dtype is case.tensors[name].dtype, name
    return ours


@pytest.mark.parametrize("row", PAIRS, ids=identifier)
@pytest.mark.parametrize("op", OPS)
def test_all_pairs(op, row):
    check_gradients(make_away_from_kinks(op, fresh_generator(), **row))


@pytest.mark.parametrize(
    "row",
    [
        {"c": 728, "out": 728, "size": (5, 5), "n": 1},
        {"c": 96, "out": 24, "size": (11, 11), "k": (5, 5), "stride": 2, "activation": "relu6", "multiplier": 6},
        {"c": 17, "size": (1, 1), "padding": 1, "out": 31},
        {"c": 3, "size": (7, 1), "k": (3, 1), "padding": (1, 0), "out": 17},
        {"c": 16, "size": (2, 3), "padding": 1, "stride": 5, "out": 33},
        {"c": 8, "size": (3, 2), "padding": (4, 0, 0, 5), "out": 48},
        {"c": 3, "size": (6, 5), "k": (7, 7), "padding": 4, "dilation": 2, "out": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("op", OPS)
def test_shapes(op, row):
    row = {**row, "multiplier": row.get("multiplier", 1) if op == "inverted_residual" else 1}
    check_gradients(make_away_from_kinks(op, fresh_generator(), **row))


GRADCHECKED = (("relu", "nchw"), ("silu", "channels_last"))  # by default


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("activation", "layout"),
    [
        pytest.param(*pair, marks=[pytest.mark.slow] * (pair not in GRADCHECKED))
        for pair in itertools.product(activations.CODES, LAYOUTS)
    ],
)
def test_gradcheck(op, layout, activation):
    """Finite differences in float64: the kernels' own generic path, forward and backward."""
    case = make(
        op,
        fresh_generator(),
        n=2,
        c=3,
        out=4,
        size=(5, 4),
        stride=(2, 1),
        padding=(1, 0, 2, 1),
        multiplier=2,
        activation=activation,
        dtype=torch.float64,
        layout=layout,
        away_from_kinks=True,
    )
    names = list(case.tensors)
    leaves = [case.tensors[name].requires_grad_() for name in names]
    torch.autograd.gradcheck(lambda *tensors: case.run(**dict(zip(names, tensors, strict=True))), leaves)


@pytest.mark.parametrize("op", OPS)
def test_memory_formats(op):
    """grad_x follows x; parameters' gradients are contiguous; a gradient that isn't contiguous is accepted."""
    case = make_away_from_kinks(op, fresh_generator(), c=20, layout="channels_last")
    ours = check_gradients(case)
    assert ours["x"].is_contiguous(memory_format=torch.channels_last)
    assert all(ours[name].is_contiguous() for name in case.parameters)
    shape = case.run().shape
    check_gradients(case, torch.ones(()).expand(shape))  # what .sum().backward() passes
    check_gradients(case, draw(fresh_generator(), shape).contiguous())
    check_gradients(case, draw(fresh_generator(), shape).transpose(2, 3).contiguous().transpose(2, 3))
    nchw = case.to(torch.Tensor.contiguous)
    assert check_gradients(nchw)["x"].is_contiguous()


@pytest.mark.parametrize("op", OPS)
def test_x_not_contiguous(op):
    case = make_away_from_kinks(op, fresh_generator(), c=20)
    larger = draw(fresh_generator(), (2, 26, *case.x.shape[2:])).to(memory_format=torch.channels_last)
    larger[:, 3:23] = case.x
    x = larger.detach().requires_grad_()
    case.run(x=x[:, 3:23]).sum().backward()
    dense = case.x.detach().requires_grad_()
    case.run(x=dense).sum().backward()
    torch.testing.assert_close(x.grad[:, 3:23], dense.grad, rtol=1e-6, atol=1e-6)
    assert not x.grad[:, :3].any() and not x.grad[:, 23:].any()


@pytest.mark.parametrize("op", OPS)
def test_batch_of_none(op):
    case = make(op, fresh_generator(), n=0)
    ours = gradients(case, torch.empty(case.run().shape), set(case.tensors))
    for name, gradient in ours.items():
        assert gradient.shape == case.tensors[name].shape and not gradient.any(), name


@pytest.mark.parametrize("activation", (None, "relu"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("op", OPS)
def test_float32_bias_beside_low_precision(op, dtype, activation):
    """The bias's gradient is a float32 sum of what was never rounded to x's dtype."""
    for pointwise_first in (False, True)[: 1 + (op == "separable_conv2d")]:
        options = {"pointwise_first": pointwise_first} if op == "separable_conv2d" else {}
        case = make_away_from_kinks(op, fresh_generator(), dtype=dtype, activation=activation, **options)
        for name in case.parameters:
            if name.endswith("bias"):
                case.tensors[name] = case.tensors[name].float()
        check_gradients(case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_repeatable_and_independent_of_threads(op, layout):
    case = make(op, fresh_generator(), n=3, c=40, size=(17, 12), layout=layout)
    grad = draw(fresh_generator(), case.run().shape)
    first = gradients(case, grad, set(case.tensors))
    threads = torch.get_num_threads()
    try:
        for other in (threads,) if op == "conv2d" else (threads, 1, 2, 3):  # ATen's sums may depend on the threads
            torch.set_num_threads(other)
            again = gradients(case, grad, set(case.tensors))
            for name, gradient in again.items():
                assert torch.equal(gradient, first[name]), (name, other)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("op", OPS)
def test_residual_is_not_kept_without_an_activation_after_it(op):
    if op == "depthwise_conv2d":
        pytest.skip("takes no residual")
    case = make(op, fresh_generator(), activation=None)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        case.run(x=case.x.requires_grad_())
    assert case.x.data_ptr() in kept and case.tensors["residual"].data_ptr() not in kept


@pytest.mark.parametrize("op", OPS)
def test_twice(op):
    """Double backward raises one sentence; the reference gives it."""
    case = make(op, fresh_generator(), dtype=torch.float64)
    x = case.x.requires_grad_()
    (grad,) = torch.autograd.grad(case.run().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f'{op} can be differentiated once; backend="reference"'):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(case.run(backend="reference").square().sum(), x, create_graph=True)
    grad.sum().backward()
    assert x.grad.any()
