"""local_response_norm and its gradient against PyTorch's in float64, by the policy of numerics.py, outputs NaN-filled.

Fails if any element is wrong or unwritten (windows of even sizes and at the first and last channels; vectors that
aren't full; both memory formats), if special values differ from PyTorch's, or torch can't trace, export or cast the op.
"""

import io
import math
import re

import pytest
import torch
import torch.nn.functional as F
from numerics import LAYOUTS, assert_within, channel_scales, draw, fresh_generator, nan_filled
from op_cases import DTYPES, NONCONTIGUOUS, all_pairs, identifier

import cnnfast
from cnnfast.nn import LocalResponseNorm, set_backend
from cnnfast.ops import backends

pytestmark = pytest.mark.usefixtures("nan_outputs")

PAIRS = all_pairs(
    {
        "dtype": DTYPES,
        "layout": tuple(LAYOUTS),
        "c": (1, 3, 16, 17, 31, 96, 200),
        "size": (1, 2, 3, 4, 5, 6, 7, 40, 1000),
        "beta": (0.75, 0.5, 1, 0.6, 2),
        "alpha": (1e-4, 0.5, 30.0),
        "k": (1, 2, 0.1),
        "pixels": ((9, 8), (1, 1), (1, 37), (13, 7)),
    }
)
OPTIONS = {"size": 5, "alpha": 0.7, "beta": 0.75, "k": 1.5}


def drawn(shape, dtype=torch.float32, layout="channels_last", decades=0.0):
    generator = fresh_generator()
    scales = 2 * channel_scales(generator, shape[1], decades).reshape(-1, 1, 1)
    return LAYOUTS[layout](draw(generator, shape, dtype, scale=scales))


def check(x: torch.Tensor, grad: torch.Tensor, options: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the gradient of x, both within the bound."""
    leaf = x.detach().requires_grad_()
    with nan_filled():
        y = cnnfast.local_response_norm(leaf, **options)
        (dx,) = torch.autograd.grad(y, leaf, grad)
    assert y.dtype is dx.dtype is x.dtype
    doubles = x.detach().double().requires_grad_()
    ref = F.local_response_norm(doubles, **options)
    (ref_dx,) = torch.autograd.grad(ref, doubles, grad.double())
    scale, scale_dx = sizes(x, grad, options)
    assert_within(y.detach(), ref.detach(), scale, terms=options["size"], name="y")
    assert_within(dx, ref_dx, scale_dx, terms=options["size"], name="gradient")
    return y, dx


def sizes(x: torch.Tensor, grad: torch.Tensor, options: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """S of numerics.py: of y, and of the gradient, whose two parts (through x and through d) have opposite signs.

    The second holds d^(-beta - 1), in which a relative error of d counts beta + 1 times.
    """
    magnitude = x.detach().double().abs().requires_grad_()
    y = F.local_response_norm(magnitude, **options)
    power = (magnitude / y).detach().nan_to_num(nan=1.0)  # d^beta
    (both,) = torch.autograd.grad(y, magnitude, grad.double().abs())
    direct = grad.double().abs() / power
    return y.detach(), direct + (1 + options["beta"]) * (direct - both).abs()


@pytest.mark.parametrize("row", PAIRS, ids=identifier)
def test_all_pairs(row):
    row = dict(row)
    dtype, layout, channels, pixels = (row.pop(name) for name in ("dtype", "layout", "c", "pixels"))
    x = drawn((2, channels, *pixels), dtype, layout, decades=channels % 2 * 3)
    y, dx = check(x, drawn(x.shape, dtype, layout), row)
    assert y.stride() == dx.stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "side"), [(96, 55), (256, 27), (64, 56), (192, 28), (480, 14)])
def test_shapes_of_networks(channels, side, layout):
    x = drawn((1, channels, side, side), layout=layout, decades=3)
    check(x, drawn(x.shape, layout=layout), {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 2.0})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", NONCONTIGUOUS)
def test_x_not_contiguous(change, layout):
    x = NONCONTIGUOUS[change](drawn((3, 19, 6, 7), layout=layout))
    y, _ = check(x, drawn(x.shape, layout=layout), OPTIONS)
    like = torch.empty_strided(x.shape, x.stride(), device="meta")
    assert y.stride() == cnnfast.local_response_norm(like, 5).stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grad_not_contiguous(layout):
    x = drawn((2, 19, 6, 7), layout=layout)
    for grad in (
        torch.ones(()).expand(x.shape),
        drawn(x.shape, layout="nchw"),
        drawn(x.shape, layout="channels_last"),
        drawn((2, 19, 7, 6)).transpose(2, 3),
    ):
        _, dx = check(x, grad, OPTIONS)
        assert dx.stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_of_none(layout):
    x = drawn((0, 8, 5, 5), layout=layout).requires_grad_()
    y = cnnfast.local_response_norm(x, 5)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options", [{}, {"k": 0.0}, {"beta": 0.5}, {"beta": 1.0}, {"beta": 0.6}, {"k": -1000.0}], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype, options, layout):
    """NaN, Inf, a sum that overflows float32, zeros and negative bases: as PyTorch computes them."""
    options = {**OPTIONS, **options}
    x = drawn((5, 40, 3, 4), dtype, layout)
    x[0, 20, 1, 1] = math.nan
    x[1, 20, 1, 1] = math.inf
    x[2, 20, 1, 1] = -math.inf
    x[3, 10:30, 1, 1] = 0
    if dtype in (torch.float32, torch.bfloat16):
        x[4, 20, 1, 1] = 1e30
    grad = drawn(x.shape, dtype, layout)
    results = []
    for function, wide in ((cnnfast.local_response_norm, x), (F.local_response_norm, x.to(_arithmetic(dtype)))):
        leaf = wide.clone().requires_grad_()
        y = function(leaf, **options)
        results += [y.detach(), torch.autograd.grad(y, leaf, grad.to(wide.dtype))[0]]
    assert results[2].isnan().any() and not results[2].isnan().all()
    for ours, theirs in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=2e-2, atol=2e-2, equal_nan=True)
        assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


@pytest.mark.parametrize("beta", (0.75, 0.5, 1.0, 0.6))
def test_error_that_the_kernel_promises(beta):
    """csrc/cpu/kernels/local_response_norm.h: units of 2^-24 |y|, in float32."""
    for size in (1, 5, 9, 31):
        x = drawn((4, 64, 64, 64), decades=2)
        ours = cnnfast.local_response_norm(x, size, 1.0, beta, 0.5)
        ref = F.local_response_norm(x.double(), size, 1.0, beta, 0.5)
        units = ((ours - ref) / ref).abs().max().item() * 2**24
        assert units <= 8, (size, units)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "beta"), [(5, 0.75), (4, 0.5), (3, 1.0), (2, 0.6), (9, 0.75)])
def test_gradcheck(size, beta, layout):
    """Finite differences in float64: the kernels' own generic path."""
    x = drawn((2, 7, 3, 2), torch.float64, layout).requires_grad_()
    torch.autograd.gradcheck(lambda x: cnnfast.local_response_norm(x, size, 0.9, beta, 0.7), x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_repeatable_and_independent(dtype, layout):
    """Bitwise: from call to call, of the neighbours in the batch, of the number of threads."""
    x, grad = drawn((5, 40, 23, 17), dtype, layout), drawn((5, 40, 23, 17), dtype, layout)
    options = tuple(OPTIONS.values())
    forward, backward = (
        torch.ops.cnnfast.local_response_norm,
        torch.ops.cnnfast.local_response_norm_backward,
    )
    y, dx = forward(x, *options), backward(grad, x, *options)
    assert torch.equal(forward(x[3:4], *options), y[3:4])
    assert torch.equal(backward(grad[3:4], x[3:4], *options), dx[3:4])
    threads = torch.get_num_threads()
    try:
        for other in (threads, 1, 2, 3):
            torch.set_num_threads(other)
            assert torch.equal(forward(x, *options), y) and torch.equal(backward(grad, x, *options), dx)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 8, 5, 6), (1, 1, 1, 7), (2, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)), ids=str)
def test_opcheck(dtype, shape, layout):
    x, grad = drawn(shape, dtype, layout), drawn(shape, dtype, layout)
    options = tuple(OPTIONS.values())
    torch.library.opcheck(torch.ops.cnnfast.local_response_norm.default, (x.requires_grad_(), *options))
    torch.library.opcheck(torch.ops.cnnfast.local_response_norm_backward.default, (grad, x.detach(), *options))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compile_dynamic(layout):
    """Forward and backward in one graph, no break, no recompilation for other sizes and batches."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()

    def call(x):
        return cnnfast.local_response_norm(x, **OPTIONS) * 2

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counting)
    graphs_at_first = 0
    for shape in ((4, 20, 9, 10), (3, 33, 11, 17), (6, 7, 23, 8)):
        x = drawn(shape, layout=layout).requires_grad_()
        expected, got = call(x), compiled(x)
        assert torch.equal(got, expected) and got.stride() == expected.stride()
        assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected)))
        graphs_at_first = graphs_at_first or len(graphs)  # dynamo starts anew to make constants of alpha, beta and k
    assert len(graphs) == graphs_at_first


def test_inductor_and_export():
    module, x = LocalResponseNorm(**OPTIONS), drawn((2, 20, 9, 8))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(module, fullgraph=True)(x), module(x))
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(module, (x,), dynamic_shapes={"x": dynamic})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for shape in ((2, 20, 9, 8), (3, 20, 12, 5)):
        x = drawn(shape)
        assert torch.equal(loaded(x), module(x))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("region", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_is_pytorchs(dtype, region):
    """float32 whatever the region asks for, but float64 stays."""
    x = drawn((2, 8, 5, 6), dtype).requires_grad_()
    with torch.autocast("cpu", region):
        y, theirs = cnnfast.local_response_norm(x, **OPTIONS), F.local_response_norm(x, **OPTIONS)
    assert y.dtype is theirs.dtype is _arithmetic(dtype)
    assert torch.equal(y, cnnfast.local_response_norm(x.to(y.dtype), **OPTIONS))
    y.sum().backward()
    assert x.grad.dtype is dtype


def test_twice():
    x = drawn((2, 8, 5, 6), torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(cnnfast.local_response_norm(x, 5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='local_response_norm can be differentiated once; backend="reference"'):
        grad.sum().backward()


def test_backends():
    x = drawn((2, 8, 5, 6))
    reference = cnnfast.reference.local_response_norm(x, **OPTIONS)
    assert torch.equal(cnnfast.local_response_norm(x, **OPTIONS, backend="reference"), reference)
    ours = cnnfast.local_response_norm(x, **OPTIONS)
    assert torch.equal(cnnfast.local_response_norm(x, **OPTIONS, backend="cpu"), ours)
    assert cnnfast.can_run("local_response_norm", "auto", "cpu") == []
    assert cnnfast.can_run("local_response_norm", "triton", "cuda") == []
    assert "no weights to pack" in cnnfast.can_run("local_response_norm_packed")[0]
    assert cnnfast.can_run("local_response_norm", "cuda", "cuda") != []
    assert backends.choose("local_response_norm", "auto", "cuda") == "triton"


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"x": torch.zeros(3, 8, 8)}, ValueError, "x must have 4 dimensions (N, C, H, W), got shape (3, 8, 8)"),
        ({"x": torch.zeros(1, 3, 8, 8).int()}, TypeError, "x must be float32, float64, bfloat16 or float16, got"),
        ({"x": torch.zeros(1, 0, 8, 8)}, ValueError, "x must have at least one channel, row and column"),
        ({"x": None}, TypeError, "x must be a torch.Tensor, got NoneType"),
        ({"size": 0}, ValueError, "size must be at least 1, got 0"),
        ({"size": 5.0}, TypeError, "size must be an int, got 5.0"),
        ({"alpha": "1e-4"}, TypeError, "alpha must be a number, got '1e-4'"),
        ({"beta": None}, TypeError, "beta must be a number, got None"),
        ({"k": (1,)}, TypeError, "k must be a number, got (1,)"),
        ({"backend": "triton"}, ValueError, "run local_response_norm on cpu, got 'triton': triton takes tensors on"),
        ({"backend": "fast"}, ValueError, "backend must be one of 'auto', 'cpu', 'cuda', 'triton', 'reference'"),
    ],
    ids=str,
)
def test_mistake(changes, error, says):
    with pytest.raises(error, match=re.escape(says)) as raised:
        cnnfast.local_response_norm(**{"x": torch.zeros(1, 3, 8, 8), "size": 5, **changes})
    assert "\n" not in str(raised.value)


def test_the_kernel_checks_too():
    x, forward = torch.zeros(1, 3, 8, 8), torch.ops.cnnfast.local_response_norm
    backward = torch.ops.cnnfast.local_response_norm_backward
    with pytest.raises(RuntimeError, match="size must be at least 1, got 0"):
        forward(x, 0, 1.0, 0.75, 1.0)
    with pytest.raises(RuntimeError, match="x must have 4 dimensions"):
        forward(x[0], 5, 1.0, 0.75, 1.0)
    with pytest.raises(RuntimeError, match="grad must have x's shape"):
        backward(x[:, :2], x, 5, 1.0, 0.75, 1.0)
    with pytest.raises(RuntimeError, match="grad must have x's dtype"):
        backward(x.double(), x, 5, 1.0, 0.75, 1.0)


def test_module():
    ours, theirs = LocalResponseNorm(**OPTIONS), torch.nn.LocalResponseNorm(**OPTIONS)
    assert repr(ours) == repr(theirs) and not ours.state_dict()
    x = drawn((2, 8, 5, 6))
    with torch.profiler.profile() as profile:
        y = ours(x)
    assert "cnnfast::local_response_norm" in {event.name for event in profile.events()}
    torch.testing.assert_close(y, theirs(x))
    assert torch.equal(ours(x[0]), theirs(x[0]))  # three dimensions: torch's own
    meta = x.to("meta")
    assert ours(meta).shape == x.shape
    set_backend(ours, "reference")
    assert torch.equal(ours(x), theirs(x))
    with pytest.raises(ValueError, match="x must have 4 dimensions"):
        ours(x[0])
