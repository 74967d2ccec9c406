"""scale_shift_max_pool: the affine map of batch normalisation, an activation and a pooling in one pass.

Fails if a result or a gradient differs from the reference's by more than the policy allows, goes to another pixel of
the window than PyTorch's, is missing or unwritten, or if bits depend on the number of threads.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from numerics import LAYOUTS, draw, fresh_generator, threads
from op_cases import DTYPES
from scale_shift_max_pool_cases import GEOMETRIES, LARGE, check_gradients, check_output, make

from cnnfast.ops import scale_shift_max_pool

pytestmark = pytest.mark.usefixtures("nan_outputs")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", (None, "relu6", "silu"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_and_gradients(layout, activation, dtype):
    for size, pool in (*GEOMETRIES, LARGE):
        case = make(size, pool, dtype, layout, activation)
        leaves = {name: t.clone().requires_grad_() for name, t in case.tensors.items()}
        y = case.run(**leaves)
        check_output(case, y.detach())
        grad = draw(fresh_generator(), y.shape, dtype)
        y.backward(grad)
        check_gradients(case, grad, {name: leaf.grad for name, leaf in leaves.items()})
        assert all(leaf.grad.stride() == leaf.stride() for leaf in leaves.values())


def test_ties_and_special_values():
    """As F.max_pool2d's: the first of equal values, a NaN before all, windows of nothing but -Inf."""
    generator = fresh_generator()
    x = torch.randint(-2, 3, (2, 19, 9, 9), generator=generator).float()
    x[0, :, 2, 3] = math.nan
    x[1, :, :4, :4] = -math.inf
    x[1, :, 6, 6] = math.inf
    x = x.contiguous(memory_format=torch.channels_last)
    for pool in ((3, 2, 1), (2, 2, 0), (3, 1, 0)):
        ours, plain = (x.clone().requires_grad_() for _ in range(2))
        y, exact = scale_shift_max_pool(ours, torch.ones(19), torch.zeros(19), pool), F.max_pool2d(plain, *pool)
        torch.testing.assert_close(y, exact, rtol=0, atol=0, equal_nan=True)
        grad = draw(generator, y.shape, torch.float32)
        y.backward(grad)
        exact.backward(grad)
        torch.testing.assert_close(ours.grad, plain.grad)


def test_gradcheck():
    leaves = [t.requires_grad_() for t in make((2, 3, 5, 4), dtype=torch.float64).tensors.values()]
    torch.autograd.gradcheck(lambda *t: scale_shift_max_pool(*t, (3, 2, 1), activation="silu"), leaves)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_repeatable(dtype):
    """Bitwise, on any number of threads; only what is wanted is computed, to the same bits."""
    tensors = make((3, 40, 37, 23), dtype=dtype).tensors

    def everything(wanted=tuple(tensors)):
        leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in tensors.items()}
        y = scale_shift_max_pool(**leaves, max_pool=(3, 2, 1), activation="relu")
        y.backward(torch.ones_like(y))
        return [y, *(leaf.grad for leaf in leaves.values())]

    first = everything()
    for count in (1, 2, 3, 3):
        with threads(count):
            assert all(map(torch.equal, everything(), first))
    for i, name in enumerate(tensors):
        alone = everything((name,))
        assert [j for j in range(3) if alone[1 + j] is not None] == [i] and torch.equal(alone[1 + i], first[1 + i])


def test_compile_and_opcheck():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *t: scale_shift_max_pool(*t, (3, 2, 1), activation="relu"),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for size in ((2, 19, 13, 11), (4, 19, 9, 10)):
        eager, traced = ([t.clone().requires_grad_() for t in make(size).tensors.values()] for _ in range(2))
        traced = [t.detach().clone().requires_grad_() for t in eager]
        scale_shift_max_pool(*eager, (3, 2, 1), activation="relu").square().sum().backward()
        compiled(*traced).square().sum().backward()
        for a, b in zip(eager, traced, strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-6, atol=1e-6)
    leaves = [t.requires_grad_() for t in make().tensors.values()]
    torch.library.opcheck(torch.ops.cnnfast.scale_shift_max_pool.default, (*leaves, [3, 2, 1], 1, 0))
    with torch.no_grad():
        y, taps = torch.ops.cnnfast.scale_shift_max_pool(*leaves, [3, 2, 1], 1, 0)
    arguments = (torch.randn_like(y), *(t.detach() for t in leaves), taps, [3, 2, 1], 1, 7, 0)
    torch.library.opcheck(torch.ops.cnnfast.scale_shift_max_pool_backward.default, arguments)


def test_mistakes():
    tensors = make().tensors
    for pool, error, said in (
        (None, TypeError, "max_pool must be three ints"),
        ((3, 2), TypeError, "max_pool must be None or three ints"),
        ((3, 2, 2), ValueError, "padding of at most half"),
        ((16, 1, 0), ValueError, "kernel"),
        ((13, 1, 0), ValueError, "fit"),
    ):
        with pytest.raises(error, match=said):
            scale_shift_max_pool(**tensors, max_pool=pool)
    with pytest.raises(ValueError, match="activation"):
        scale_shift_max_pool(**tensors, max_pool=(3, 2, 1), activation="swish?")
    x = tensors["x"].requires_grad_()
    y = scale_shift_max_pool(x, tensors["scale"], tensors["shift"], (3, 2, 1))
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(torch.autograd.grad(y.sum(), x, create_graph=True)[0].sum(), x)
