"""The Triton kernels of pointwise_conv2d, run by the interpreter on CPU tensors through their launchers.

Fails if an element is wrong by the policy of numerics.py or unwritten (outputs and scratch are NaN-filled), or a memory
format or dtype is not what the fakes promise. test_faults shows that it would: it breaks a copy of the kernels, a line
at a time, and wants the same checks to fail.
"""

import functools

import launchers
import pytest
import torch
from launchers import check, gradients, padded_by_nan, run, survivors
from numerics import channels_last, draw, float32_by, fresh_generator
from op_cases import all_pairs, identifier, make

import cnnfast.kernels.pointwise_conv2d as kernels

FORWARD = pytest.mark.proof("interpreted", kernel="pointwise_conv2d_fwd_kernel")
INPUT = pytest.mark.proof("interpreted", kernel="pointwise_conv2d_bwd_input_kernel")
WEIGHT = pytest.mark.proof("interpreted", kernel="pointwise_conv2d_bwd_weight_kernel")
SUM = pytest.mark.proof("interpreted", kernel="add_up_kernel")
FACTORS = {
    "dtype": (torch.float32, torch.float16, torch.float64),
    "layout": ("channels_last", "nchw"),
    "stride": (1, 2, (3, 1)),
    "activation": ("relu6", None, "relu", "silu", "gelu", "tanh", "sigmoid"),
    "c": (17, 3, 40),
    "out": (12, 5, 24),
    "excite": (True, False),
    "bias": (True, False),
    "residual": (True, False),
    "size": ((5, 7), (6, 5)),
    "precision": ("tf32", "ieee"),
}
FAST = all_pairs(FACTORS | {"c": (17, 3), "out": (12, 5), "activation": ("relu6", None, "silu")})
ALL = all_pairs(FACTORS | {"c": (16, 1, 3, 24, 40, 131, 31), "out": (16, 1, 3, 70, 200), "size": ((19, 17), (14, 20))})
SMALL = {  # what is left of the policy's shapes
    "1x1 image": dict(size=(1, 1), excite=True),
    "W=1": dict(size=(5, 1), stride=2),
    "C=1": dict(c=1, size=(5, 4)),
    "K=1": dict(out=1, size=(5, 4), excite=True),
    "primes": dict(c=13, out=7, size=(7, 5), n=2),
    "batch 0": dict(n=0, size=(4, 4), excite=True),
    "stride > size": dict(size=(2, 3), stride=4),
    "several tiles": dict(n=1, c=35, out=130, size=(9, 9), excite=True, activation=None),
}


def terms(case, shape):
    images = shape[0]
    pixels = max(shape[2] * shape[3], 1)
    of_x = case.tensors["weight"].shape[0]
    by_name = {"x": of_x, "weight": images * pixels, "bias": images * pixels, "gate": pixels * of_x, "residual": 1}
    return {name: max(count, 1) + case.terms for name, count in by_name.items()}


def check_gradients(case, generator, **options):
    launchers.check_gradients(case, generator, terms, rounded=int("gate" in case.tensors), **options)


away_from_kinks = functools.partial(launchers.away_from_kinks, "pointwise_conv2d")


@pytest.fixture
def options(row):
    """A row without its precision: the interpreter multiplies alike; the blocks differ."""
    with float32_by(row["precision"]):
        yield {name: value for name, value in row.items() if name != "precision"}


@FORWARD
@pytest.mark.parametrize("row", FAST, ids=identifier)
def test_forward(options):
    check(make("pointwise_conv2d", fresh_generator(), n=2, decades=3.0, **options))


@INPUT
@WEIGHT
@SUM
@pytest.mark.parametrize("row", FAST, ids=identifier)
def test_gradients(options):
    generator = fresh_generator()
    check_gradients(away_from_kinks(generator, n=2, **options), generator)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float64))
@pytest.mark.parametrize("activation", ("sigmoid", "silu", "gelu", "tanh"))
def test_curved_activations(activation, dtype):
    generator = fresh_generator()
    row = dict(n=1, c=3, size=(4, 5), activation=activation, dtype=dtype, excite=True)
    case = make("pointwise_conv2d", generator, **row)
    check(case)
    check_gradients(case, generator)


@pytest.mark.slow
@pytest.mark.parametrize("row", ALL, ids=identifier)
def test_all_pairs(options):
    generator = fresh_generator()
    check(make("pointwise_conv2d", generator, decades=3.0, **options))
    check_gradients(away_from_kinks(generator, **options), generator)


@FORWARD
@INPUT
@WEIGHT
@SUM
@pytest.mark.parametrize("layout", ("channels_last", "nchw"))
@pytest.mark.parametrize("row", SMALL.values(), ids=SMALL.keys())
def test_small_shapes(row, layout):
    generator = fresh_generator()
    case = away_from_kinks(generator, **{"n": 2, "c": 5, "activation": "relu6", "layout": layout, **row})
    check(case)
    check_gradients(case, generator)


@FORWARD
def test_before_tensor_cores(monkeypatch):
    """Older GPUs multiply float16 as float32."""
    monkeypatch.setattr("cnnfast.kernels.launch.capability", lambda device: (7, 5))
    generator = fresh_generator()
    case = away_from_kinks(generator, c=17, size=(4, 5), dtype=torch.float16, excite=True)
    assert not kernels.tensor_cores(case.x)
    check(case)
    check_gradients(case, generator)


def test_float32_by_tf32_only_where_allowed():
    x = torch.empty(1)
    with float32_by("tf32"):
        assert kernels.tensor_cores(x)
    with float32_by("ieee"):
        assert not kernels.tensor_cores(x)
        assert kernels.tensor_cores(x.half()) and kernels.tensor_cores(x.bfloat16())
    assert not kernels.tensor_cores(x.double())


@FORWARD
def test_special_values():
    case = make("pointwise_conv2d", fresh_generator(), n=1, c=3, out=5, size=(6, 6), activation="relu6", excite=True)
    for i, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        case.x[0, i, 2, i] = value
    case.tensors["gate"][0, 1] = 0.0
    check(case)


@INPUT
@WEIGHT
def test_special_values_in_gradients():
    """An infinite gate or weight reaches what it is a factor of; pixels of a tile beyond the image reach nothing."""
    generator = fresh_generator()
    case = make("pointwise_conv2d", generator, n=2, c=3, out=5, size=(3, 3), activation=None, excite=True, stride=2)
    case.tensors["x"].abs_()
    case.tensors["gate"][0, 0] = float("inf")
    case.tensors["weight"].abs_()[1, 1] = float("inf")
    grad = draw(generator, (2, 5, 2, 2)).abs()
    ours = gradients(case, grad)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in case.tensors.items()}
    case.reference(**leaves, **case.options).backward(grad)
    for name in ("x", "weight", "gate"):
        theirs = leaves[name].grad
        assert torch.equal(ours[name].isinf(), theirs.isinf()), name
        assert torch.equal(ours[name].isnan(), theirs.isnan()), name


def test_inputs_that_are_not_dense():
    generator = fresh_generator()
    case = make("pointwise_conv2d", generator, n=2, c=6, out=4, size=(4, 5), activation="silu", excite=True)
    wide = draw(generator, (2, 4, 5, 12)).permute(0, 3, 1, 2)[:, ::2]  # neither format
    beside = draw(generator, (2, 4, 5, 12)).permute(0, 3, 1, 2)[:, :6]  # channels side by side
    case.tensors["gate"] = draw(generator, (2, 12, 1, 1))[:, ::2]
    case.tensors["residual"] = draw(generator, (2, 4, 4, 10))[..., ::2]
    for x in (wide, beside):
        case.tensors["x"] = x
        check(case)
    case.tensors["weight"] = draw(generator, (6, 4, 1, 1)).transpose(0, 1)
    check(case)
    grad = draw(generator, (2, 5, 4, 4)).permute(0, 3, 2, 1)
    dense = case.to(lambda tensor: tensor.contiguous())
    ours, wanted = gradients(case, grad), gradients(dense, grad.contiguous())
    for name in ours:
        torch.testing.assert_close(ours[name], wanted[name])


@pytest.mark.parametrize("excite", (True, False))
def test_repeatable_and_independent_of_the_batch(excite):
    generator = fresh_generator()
    case = make("pointwise_conv2d", generator, n=3, c=5, size=(6, 5), activation="silu", excite=excite)
    y = run(case)
    grad = channels_last(draw(generator, y.shape))
    first, second = gradients(case, grad), gradients(case, grad)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    for name in {"x", "gate", "residual"} & set(case.tensors):
        case.tensors[name] = channels_last(case.tensors[name][1:2])
    assert torch.equal(run(case), y[1:2])
    alone = gradients(case, channels_last(grad[1:2]))
    for name in {"x", "gate", "residual"} & set(case.tensors):
        assert torch.equal(alone[name], first[name][1:2]), name


@pytest.mark.parametrize("activation", ("relu", None))
@pytest.mark.parametrize("output_mask", [1 << i for i in range(5)])
def test_output_mask(output_mask, activation):
    generator = fresh_generator()
    case = make("pointwise_conv2d", generator, n=1, c=3, size=(4, 4), excite=True, activation=activation)
    grad = draw(generator, run(case).shape)
    every, some = gradients(case, grad), gradients(case, grad, output_mask)
    for i, name in enumerate(every):
        assert torch.equal(some[name], every[name]) if output_mask >> i & 1 else some[name].numel() == 0, name
    assert every["residual"].data_ptr() != grad.data_ptr()  # an op's output isn't its input


# (what breaks, the text to replace, its replacement); the first occurrence is taken.
FAULTS = {
    "the last channel of the sum left out": ("m_c = c + o_c < C  #", "m_c = c + o_c < C - 1  #"),
    "x beyond the last channel": ("tl.load(p_x, m_p[:, None] & m_c[None, :], 0.0)", "tl.load(p_x, m_p[:, None], 0.0)"),
    "weight beyond the last channel": ("m_c[:, None] & m_k[None, :], 0.0)", "m_k[None, :], 0.0)"),
    "rows of weight mixed up": ("p_w += BLOCK_C * K if TRANSPOSED else BLOCK_C", "p_w += BLOCK_C"),
    "the gate of another image": ("tl.load(gate + i_n * C + o_c, m_c, 0.0)", "tl.load(gate + o_c, m_c, 0.0)"),
    "bias twice": ("b_y += tl.load(bias + o_k, m_k, 0.0)", "b_y += 2 * tl.load(bias + o_k, m_k, 0.0)"),
    "the last pixel not stored": (
        "m_y = m_p[:, None] & m_k[None, :]",
        "m_y = (m_p & (o_p < pixels - 1))[:, None] & m_k[None, :]",
    ),
    "the stride of rows forgotten": ("o_p // OW * STRIDE_H * W", "o_p // OW * W"),
    "the activation's slope forgotten": (
        "gradient_through(b_y, tl.load(grad + o_y, m_y, 0.0).to(b_y.dtype), ACTIVATION)",
        "tl.load(grad + o_y, m_y, 0.0).to(b_y.dtype)",
    ),
    "skipped pixels not written": ("for q in range(1, tl.minimum", "for q in range(2, tl.minimum"),
    "the last column's skipped pixels not written": ("& (o_w + i_w < W)", "& (o_w + i_w < W - 1)"),
    "the gate's gradient of gated values": (
        "m_k, b_x * b_entered, None if scale",
        "m_k, b_x * b_entered * tl.load(gate + i_n * K + o_k, m_k, 0.0)[None, :], None if scale",
    ),
    "x's gradient not gated": ("b_x *= b_gate\n", "\n"),
    "a tile left out of the sum": ("tl.minimum(first_tile + tiles, tiles_total)", "first_tile + tiles - 1"),
    "weight's gradient not gated": ("tl.where(m_x, times_gate(b_x, gate, i_n, o_c, m_c, C), 0.0)", "b_x"),
    "the last pixel of grad left out": (
        "+ tl.arange(0, BLOCK_P)\n        m_p = o_p < pixels",
        "+ tl.arange(0, BLOCK_P)\n        m_p = o_p < pixels - 1",
    ),
    "bias's gradient of a chunk left out": ("sum_g += tl.sum", "sum_g = tl.sum"),
    "the residual's gradient that of the result": (
        "residual_gradient(grad, residual)",
        "residual_gradient(torch.ones_like(grad), residual)",
    ),
}


@pytest.mark.slow
def test_faults(tmp_path, monkeypatch):
    generator = fresh_generator(1)
    row = dict(n=2, c=35, out=37, size=(27, 13), stride=2, activation="relu", excite=True)
    case = away_from_kinks(generator, **row).to(padded_by_nan)

    def check_module(module):
        check(case, module)
        check_gradients(case, generator, module=module)

    assert not survivors("pointwise_conv2d", FAULTS, check_module, tmp_path, monkeypatch)
