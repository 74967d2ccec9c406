"""The Triton kernels of local_response_norm, run by the interpreter on CPU tensors through their launchers.

Fails if an element is wrong by the policy of numerics.py or unwritten (outputs and scratch are NaN-filled), a NaN or
Inf is not where PyTorch has it, or a memory format is not what the fakes promise. test_faults shows that it would: it
breaks a copy of the kernels, a line at a time, and wants the same checks to fail.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from launchers import padded_by_nan, survivors
from numerics import LAYOUTS, assert_within, channel_scales, draw, fresh_generator, nan_filled
from op_cases import NONCONTIGUOUS, all_pairs, identifier

import cnnfast.kernels.local_response_norm as kernels

FORWARD = pytest.mark.proof("interpreted", kernel="local_response_norm_fwd_kernel")
BACKWARD = pytest.mark.proof("interpreted", kernel="local_response_norm_bwd_kernel")
WIDE = pytest.mark.proof("interpreted", kernel="local_response_norm_wide_kernel")
FACTORS = {
    "dtype": (torch.float32, torch.float16, torch.float64),
    "layout": ("channels_last", "nchw"),
    "c": (24, 3, 17),
    "size": (5, 4, 1, 17, 40),
    "beta": (0.75, 0.6, 2.0),
    "alpha": (0.5, 1e-4, 30.0),
    "k": (1.0, 0.1),
    "pixels": ((3, 5), (1, 1)),
}
FAST = all_pairs(
    FACTORS | {"c": (5, 3), "size": (5, 4), "beta": (0.75, 0.6), "alpha": (0.5,), "k": (1.0,), "pixels": ((3, 4),)}
)
ALL = all_pairs(
    FACTORS
    | {"c": (1, 3, 16, 17, 40, 96), "size": (1, 2, 3, 4, 5, 6, 7, 9, 17, 18, 40, 1000)}
    | {"beta": (0.75, 0.5, 1.0, 0.6, 2.0, 0.0, -0.5), "pixels": ((9, 8), (1, 1), (1, 37))}
)
OPTIONS = {"size": 5, "alpha": 0.7, "beta": 0.75, "k": 1.5}


def drawn(generator, shape, dtype=torch.float32, layout="channels_last", decades=0.0):
    scales = 2 * channel_scales(generator, shape[1], decades).reshape(-1, 1, 1)
    return LAYOUTS[layout](draw(generator, shape, dtype, scale=scales))


def run(x, grad, options, module=kernels):
    """(y, gradient of x)."""
    values = [options[name] for name in ("size", "alpha", "beta", "k")]
    with nan_filled():
        return module.local_response_norm(x, *values), module.local_response_norm_backward(grad, x, *values)


def theirs(x, grad, options):
    leaf = x.detach().clone().requires_grad_()
    y = F.local_response_norm(leaf, **options)
    return y.detach(), torch.autograd.grad(y, leaf, grad)[0]


def check(x, grad, options, module=kernels):
    """Both within the bound, in the memory format that the fakes promise.

    A relative error of d counts |beta| times in y. Of the gradient's parts (through x and through d) the second holds
    d^(-beta - 1), in which it counts |beta| + 1 times; the parts may have opposite signs.
    """
    y, grad_x = run(x, grad, options, module)
    assert y.dtype is grad_x.dtype is x.dtype
    like = torch.ops.cnnfast.local_response_norm(torch.empty_strided(x.shape, x.stride(), device="meta"), 5, 1, 1, 1)
    assert y.stride() == grad_x.stride() == like.stride()
    ref, ref_grad = theirs(x.double(), grad.double(), options)
    magnitude = x.detach().double().abs()
    size, both = theirs(magnitude, grad.double().abs(), options)
    direct = grad.double().abs() / (magnitude / size).nan_to_num(nan=1.0)
    factor = 1 + abs(options["beta"])
    assert_within(y, ref, max(1, abs(options["beta"])) * size, terms=options["size"], name="y")
    assert_within(grad_x, ref_grad, direct + factor * (direct - both).abs(), terms=options["size"], name="gradient")


def check_row(row, n):
    generator = fresh_generator()
    dtype, layout, channels, pixels = (row[name] for name in ("dtype", "layout", "c", "pixels"))
    shape = (n, channels, *pixels)
    x = drawn(generator, shape, dtype, layout, decades=channels % 2 * 3)
    check(x, drawn(generator, shape, dtype, layout), {name: row[name] for name in OPTIONS})


@FORWARD
@BACKWARD
@pytest.mark.parametrize("row", FAST, ids=identifier)
def test_pairs(row):
    check_row(row, 1)


@WIDE
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "channels"), ((18, 3),))
def test_wide_windows(size, channels, layout):
    generator = fresh_generator()
    x = drawn(generator, (1, channels, 2, 1), layout=layout, decades=2)
    check(x, drawn(generator, x.shape, layout=layout), {**OPTIONS, "size": size})


@pytest.mark.slow
@pytest.mark.parametrize("row", ALL, ids=identifier)
def test_all_pairs(row):
    check_row(row, 2)


@FORWARD
@BACKWARD
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ((1, 1, 1, 1), (2, 4, 1, 1), (1, 5, 5, 1), (1, 13, 3, 2), (0, 4, 3, 3)), ids=str)
def test_small_shapes(shape, layout):
    generator = fresh_generator()
    check(drawn(generator, shape, layout=layout), drawn(generator, shape, layout=layout), OPTIONS)


SPECIAL = [{}, {"k": 0.0}, {"k": -1000.0, "beta": 0.6}]
MORE_SPECIAL = [
    {"k": 0.0, "beta": 0.6}, {"beta": 0.5}, {"beta": 1.0}, {"k": -1000.0}, {"k": -1000.0, "beta": 1.0},
    {"size": 18}, {"k": 0.0, "size": 18, "beta": 0.6},
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "changes", [*SPECIAL, *(pytest.param(changes, marks=pytest.mark.slow) for changes in MORE_SPECIAL)], ids=str
)
def test_special_values(changes, layout):
    """NaN, Inf, a sum that overflows float32, zeros, negative bases: as PyTorch computes them, and no further."""
    options = {**OPTIONS, **changes}
    generator = fresh_generator()
    x = drawn(generator, (1, 16, 1, 6), layout=layout)
    x[0, 8, 0, 0] = math.nan
    x[0, 0, 0, 1] = math.inf
    x[0, 15, 0, 2] = -math.inf
    x[0, 0:11, 0, 3] = 0
    x[0, 8, 0, 4] = 1e30
    grad = drawn(generator, x.shape, layout=layout)
    for ours, wanted in zip(run(x, grad, options), theirs(x, grad, options), strict=True):
        assert wanted.isnan().any() and torch.equal(ours.isnan(), wanted.isnan())
        assert torch.equal(ours.isinf(), wanted.isinf())
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("beta", (2.0, pytest.param(3.0, marks=pytest.mark.slow)))
def test_negative_sums(beta):
    """To a whole power they have a sign."""
    generator = fresh_generator()
    x, grad = (drawn(generator, (1, 5, 2, 2)) for _ in range(2))
    options = {**OPTIONS, "k": -40.0, "beta": beta}
    for ours, wanted in zip(run(x, grad, options), theirs(x, grad, options), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("beta", "dtype"), ((0.75, torch.float32), (0.6, torch.float32), (-1.3, torch.float32), (0.6, torch.float64))
)
def test_accuracy_of_the_power(beta, dtype):
    """x / d^beta of sums d from subnormal ones to 1e30, in units of roundoff, where d^beta is a normal number."""
    generator = fresh_generator()
    x = 10 ** (30 * torch.rand(1, 1, 32, 32, generator=generator, dtype=torch.float64) - 15)
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.1, x * 1e-6, x).to(dtype)
    y = kernels.local_response_norm(x, 1, 1.0, beta, 0.0)
    d = (x * x).double()  # rounded as the kernel rounds it
    wanted = x.double() / d**beta
    u, smallest, largest = torch.finfo(dtype).eps / 2, torch.finfo(dtype).tiny, torch.finfo(dtype).max
    fits = (wanted.abs() > smallest) & (wanted.abs() < largest) & (d**beta > 4 * smallest) & (d**-beta > 4 * smallest)
    units = (((y.double() - wanted) / wanted).abs() / u)[fits].max().item()
    assert units <= (5 if dtype is torch.float32 else 16), units  # float64's reference is no better itself


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "change",
    [name if i < 1 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(NONCONTIGUOUS)],
)
def test_inputs_that_are_not_dense(change, layout):
    generator = fresh_generator()
    x = NONCONTIGUOUS[change](drawn(generator, (2, 4, 3, 2), layout=layout))
    check(x, drawn(generator, x.shape, layout="nchw"), OPTIONS)
    check(x, torch.ones(()).expand(x.shape), OPTIONS)


@pytest.mark.parametrize(("size", "layout"), ((5, "channels_last"), (5, "nchw"), (20, "channels_last")))
def test_repeatable_and_independent_of_the_batch(size, layout):
    generator = fresh_generator()
    x, grad = (drawn(generator, (2, 3, 3, 5), layout=layout) for _ in range(2))
    options = {**OPTIONS, "size": size}
    first, second = run(x, grad, options), run(x, grad, options)
    alone = run(x[1:], grad[1:], options)
    for a, b, c in zip(first, second, alone, strict=True):
        assert torch.equal(a, b) and torch.equal(a[1:], c)


# (what breaks, the text to replace, its replacement); the first occurrence is taken.
FAULTS = {
    "a window off by one": ("BEFORE: tl.constexpr = SIZE // 2", "BEFORE: tl.constexpr = (SIZE - 1) // 2"),
    "a gradient's window off by one": ("AFTER: tl.constexpr = SIZE - 1 - BEFORE", "AFTER: tl.constexpr = SIZE // 2"),
    "no mask at the first channel": ("((o_c >= 0) & (o_c < rows))[None, :]\n", "(o_c < rows)[None, :]\n"),
    "no mask at the last channel": ("((o_c >= 0) & (o_c < rows))[None, :]\n", "(o_c >= 0)[None, :]\n"),
    "no mask at the first vector": ("(o_q + v >= 0) & ", ""),
    "the last pixel not stored": ("m_y = (o_p < rows)", "m_y = (o_p < rows - 1)"),
    "NaN beyond the first channel": ("m_t = ((o_c >= 0) &", "m_t = ((o_c >= -9) &"),
    "a vector's halves swapped": ("low, high = tl.split(halves)", "high, low = tl.split(halves)"),
    "alpha not divided": ("* (ALPHA / SIZE)", "* ALPHA"),
    "no root of the root": ("root = root * tl.sqrt", "root = root + tl.sqrt"),
    "another beta's gradient": ("(2.0 * ALPHA * BETA / SIZE)", "(2.0 * ALPHA / SIZE)"),
    "a wide window too short": ("for j in range(-before, after + 1)", "for j in range(-before, after)"),
    "a wide gradient's window the wrong way": ("o_p, o_c, after, before, DTYPE", "o_p, o_c, before, after, DTYPE"),
    "the exponent's sign": ("times_power_of_2(exp2_of_fraction(part - more), whole + more)",
                            "times_power_of_2(exp2_of_fraction(part - more), whole - more)"),
}  # fmt: skip


@pytest.mark.slow
def test_faults(tmp_path, monkeypatch):
    generator = fresh_generator(1)
    cases = []
    for layout, channels, changes in (
        ("channels_last", 8, {"size": 4}),
        ("nchw", 8, {"size": 4, "beta": 1.3}),
        ("channels_last", 11, {"size": 18}),
    ):
        x, grad = (drawn(generator, (1, channels, 3, 2), layout=layout) for _ in range(2))
        cases.append((padded_by_nan(x), padded_by_nan(grad), {**OPTIONS, **changes}))
    x, grad = (drawn(generator, (1, 4, 3, 2)) for _ in range(2))
    x[:, :2], grad[:, :2] = 0, 0
    zeros = padded_by_nan(x), padded_by_nan(grad), {**OPTIONS, "size": 5, "k": 0.0}

    def check_module(module):
        for case in cases:
            check(*case, module)
        ours, wanted = run(*zeros, module)[1], theirs(*zeros)[1]
        assert torch.equal(ours.isnan(), wanted.isnan())

    assert not survivors("local_response_norm", FAULTS, check_module, tmp_path, monkeypatch)
