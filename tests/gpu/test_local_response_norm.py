"""local_response_norm on a GPU, by Triton, against PyTorch's in float64 on the same GPU.

Fails if an element is wrong or unwritten, a kernel runs on another stream or device than PyTorch's current one, can't
be captured or compiled, addresses beyond 2^31 elements wrongly, or gives other bits the second time.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from gpu import calls
from gpu.calls import DEVICE, require
from numerics import LAYOUTS, assert_within, channel_scales, draw, fresh_generator, nan_filled
from op_cases import DTYPES, NONCONTIGUOUS, all_pairs, identifier

import cnnfast

BACKEND = "triton"
OPTIONS = {"size": 5, "alpha": 0.7, "beta": 0.75, "k": 1.5}
PAIRS = all_pairs(
    {
        "dtype": DTYPES,
        "layout": tuple(LAYOUTS),
        "c": (1, 3, 16, 17, 31, 96, 200),
        "size": (1, 2, 3, 4, 5, 6, 7, 17, 18, 40, 1000),
        "beta": (0.75, 0.5, 1.0, 0.6, 2.0, -0.5),
        "alpha": (1e-4, 0.5, 30.0),
        "k": (1.0, 2.0, 0.1),
        "pixels": ((9, 8), (1, 1), (1, 37), (13, 7)),
    }
)


@pytest.fixture(autouse=True)
def require_triton():
    require("local_response_norm", BACKEND)


pytestmark = pytest.mark.gpu


def drawn(generator, shape, dtype=torch.float32, layout="channels_last", decades=0.0):
    scales = 2 * channel_scales(generator, shape[1], decades).reshape(-1, 1, 1)
    return LAYOUTS[layout](draw(generator, shape, dtype, scale=scales)).to(DEVICE)


def run(x, grad, options):
    """(y, gradient of x)."""
    leaf = x.detach().requires_grad_()
    with nan_filled():
        y = cnnfast.local_response_norm(leaf, **options, backend=BACKEND)
        return y.detach(), torch.autograd.grad(y, leaf, grad)[0]


def theirs(x, grad, options):
    leaf = x.detach().clone().requires_grad_()
    y = F.local_response_norm(leaf, **options)
    return y.detach(), torch.autograd.grad(y, leaf, grad)[0]


def check(x, grad, options):
    """In the bound a relative error of d counts |beta| times in y, |beta| + 1 times in d^(-beta - 1)."""
    y, grad_x = run(x, grad, options)
    assert y.dtype is grad_x.dtype is x.dtype
    ref, ref_grad = theirs(x.double(), grad.double(), options)
    magnitude = x.detach().double().abs()
    size, both = theirs(magnitude, grad.double().abs(), options)
    direct = grad.double().abs() / (magnitude / size).nan_to_num(nan=1.0)
    factor = 1 + abs(options["beta"])
    assert_within(y, ref, max(1, abs(options["beta"])) * size, terms=options["size"], name="y")
    assert_within(grad_x, ref_grad, direct + factor * (direct - both).abs(), terms=options["size"], name="gradient")
    return y, grad_x


@pytest.mark.parametrize("row", PAIRS, ids=identifier)
def test_all_pairs(row):
    generator = fresh_generator()
    dtype, layout, channels, pixels = (row[name] for name in ("dtype", "layout", "c", "pixels"))
    x = drawn(generator, (2, channels, *pixels), dtype, layout, decades=channels % 2 * 3)
    y, grad_x = check(x, drawn(generator, x.shape, dtype, layout), {name: row[name] for name in OPTIONS})
    assert y.stride() == grad_x.stride() == x.stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "side"), [(96, 55), (256, 27), (64, 56), (192, 28), (480, 14)])
def test_networks(channels, side, layout, dtype):
    generator = fresh_generator()
    x = drawn(generator, (3, channels, side, side), dtype, layout, decades=3)
    check(x, drawn(generator, x.shape, dtype, layout), {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 2.0})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", NONCONTIGUOUS)
def test_inputs_that_are_not_dense(change, layout):
    generator = fresh_generator()
    x = NONCONTIGUOUS[change](drawn(generator, (3, 19, 6, 7), layout=layout).cpu()).to(DEVICE)
    check(x, drawn(generator, x.shape, layout="nchw"), OPTIONS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_of_none(layout):
    x = drawn(fresh_generator(), (0, 8, 5, 5), layout=layout)
    assert all(result.shape == x.shape for result in run(x, x, OPTIONS))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"k": 0.0}, {"beta": 0.5}, {"beta": 1.0}, {"beta": 0.6}, {"k": -1000.0}, {"k": -1000.0, "beta": 0.6},
     {"size": 18}],
    ids=str,
)  # fmt: skip
def test_special_values(changes, layout):
    """NaN, Inf, a sum that overflows float32, zeros, negative bases: as PyTorch computes them, and no further."""
    options = {**OPTIONS, **changes}
    generator = fresh_generator()
    x = drawn(generator, (5, 40, 3, 4), layout=layout)
    x[0, 20, 1, 1] = math.nan
    x[1, 20, 1, 1] = math.inf
    x[2, 20, 1, 1] = -math.inf
    x[3, 0:30, 1, 1] = 0
    x[4, 20, 1, 1] = 1e30
    grad = drawn(generator, x.shape, layout=layout)
    for ours, wanted in zip(run(x, grad, options), theirs(x, grad, options), strict=True):
        assert torch.equal(ours.isnan(), wanted.isnan()) and torch.equal(ours.isinf(), wanted.isinf())
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_repeatable_and_independent_of_the_batch(dtype, layout):
    generator = fresh_generator()
    x, grad = (drawn(generator, (16, 96, 27, 27), dtype, layout) for _ in range(2))
    first, second, alone = run(x, grad, OPTIONS), run(x, grad, OPTIONS), run(x[5:6], grad[5:6], OPTIONS)
    for a, b, c in zip(first, second, alone, strict=True):
        assert torch.equal(a, b) and torch.equal(a[5:6], c)


def call(x):
    return cnnfast.local_response_norm(x, **OPTIONS, backend=BACKEND)


def test_side_stream():
    calls.check_call_on_side_stream(call, drawn(fresh_generator(), (4, 64, 56, 56)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_the_current_one():
    x = drawn(fresh_generator(), (2, 24, 5, 6)).to("cuda:1")
    assert torch.cuda.current_device() == 0
    y, grad_x = check(x, torch.randn_like(x), OPTIONS)
    assert y.device == grad_x.device == x.device


def test_cuda_graph():
    """Forward and backward."""
    x, grad = (drawn(fresh_generator(), (4, 64, 28, 28)) for _ in range(2))

    def step(x):
        leaf = x.detach().requires_grad_()
        y = call(leaf)
        return y.detach(), torch.autograd.grad(y, leaf, grad)[0]

    calls.check_call_in_cuda_graph(step, x)


@pytest.mark.parametrize("dynamic", (False, True))
def test_compile(dynamic):
    calls.check_compile(lambda x: call(x * 2) + 1, (), [(n, 24, 14, 14) for n in (4, 6)], dynamic)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    generator = fresh_generator()
    x, grad = (drawn(generator, (2, 8, 5, 6), layout=layout) for _ in range(2))
    options = (*OPTIONS.values(), cnnfast.ops.backends.CODES[BACKEND])
    torch.library.opcheck(torch.ops.cnnfast.local_response_norm.default, (x.clone().requires_grad_(), *options))
    torch.library.opcheck(torch.ops.cnnfast.local_response_norm_backward.default, (grad, x, *options))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ((34, 64, 1024, 1024), (1, 64, 5900, 5900)), ids=("in all", "in one image"))
def test_more_than_2_to_the_31_elements(shape, layout):
    """The last image, or the last rows of the only one, are what the op makes of them alone."""
    assert torch.Size(shape).numel() > 2**31
    if torch.cuda.mem_get_info()[0] < 22 * 2**30:
        pytest.skip("needs 22 GiB of free GPU memory")
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, memory_format=memory_format).normal_()
    options = (*OPTIONS.values(), cnnfast.ops.backends.CODES[BACKEND])

    def last(tensor):
        return tensor[-1:, :, -8:].contiguous(memory_format=memory_format)

    y = call(x)
    assert torch.equal(last(y), call(last(x)))
    backward = torch.ops.cnnfast.local_response_norm_backward
    assert torch.equal(last(backward(y, x, *options)), backward(last(y), last(x), *options))
