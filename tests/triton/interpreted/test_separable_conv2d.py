"""The Triton kernel of separable_conv2d, run by the interpreter on CPU tensors through its launcher, and its gradients.

Fails if an element is wrong by the policy of numerics.py or unwritten (outputs and scratch are NaN-filled), a memory
format or dtype is not what the fakes promise, or a gradient is computed that isn't wanted. test_faults shows that it
would: it breaks a copy of the kernel and launchers, a line at a time, and wants the same checks to fail.
"""

import functools

import launchers
import pytest
import torch
from launchers import check, gradients, padded_by_nan, run, survivors
from numerics import channels_last, draw, float32_by, fresh_generator
from op_cases import all_pairs, identifier, make, moved_from_last_kinks

import cnnfast.kernels.separable_conv2d as kernels

FORWARD = pytest.mark.proof("interpreted", kernel="separable_conv2d_fwd_kernel")
FACTORS = {
    "dtype": (torch.float32, torch.float16, torch.float64),
    "layout": ("channels_last", "nchw"),
    "k": ((3, 3), (2, 3)),
    "stride": (1, 2, (3, 1)),
    "dilation": (1, (2, 1)),
    "padding": ("same", 0, (1, 0, 2, 3)),
    "activation": ("relu6", None, "silu"),
    "c": (20, 17),
    "out": (12, 5),
    "multiplier": (1, 2),
    "pointwise_first": (False, True),
    "bias": (True, False),
    "residual": (True, False),
    "size": ((5, 7), (6, 5)),
    "precision": ("ieee", "tf32"),
}
ALL = all_pairs(
    FACTORS
    | {
        "k": ((3, 3), (5, 5), (2, 3), (1, 1), (7, 7), (9, 3)),
        "activation": ("relu6", None, "relu", "silu", "gelu", "tanh", "sigmoid"),
        "c": (16, 1, 3, 24, 40, 31),
        "out": (16, 1, 3, 70, 150),
        "size": ((17, 9), (18, 11)),
    }
)
FAST = all_pairs(FACTORS | {"dtype": (torch.float16, torch.float32)})
SMALL = {  # what is left of the policy's shapes
    "1x1 image": dict(size=(1, 1), padding=1),
    "W=1": dict(size=(5, 1), padding=1),
    "C=1": dict(c=1, size=(5, 4)),
    "K=1": dict(out=1, size=(5, 4)),
    "C=1, K=1": dict(c=1, out=1, multiplier=2, size=(5, 4)),
    "primes": dict(c=13, out=7, size=(7, 5), n=2),
    "batch 0": dict(n=0, size=(4, 4)),
    "stride > size": dict(size=(2, 3), stride=4, padding=1),
    "several tiles": dict(n=3, c=35, out=130, size=(9, 9), k=(1, 2), activation=None),
}
SIZES = dict(n=2, c=12, activation="relu6")
ORDERS = (False, pytest.param(True, marks=pytest.mark.slow))


def terms(case, shape):
    images, pixels = shape[0], max(shape[2] * shape[3], case.x.shape[2] * case.x.shape[3])
    return dict.fromkeys(case.tensors, images * pixels + case.terms + shape[1])


# t is rounded, and so is its gradient.
check_gradients = functools.partial(launchers.check_gradients, terms=terms, rounded=2)


def away_from_kinks(generator, **row):
    return moved_from_last_kinks(launchers.away_from_kinks("separable_conv2d", generator, **row))


@pytest.fixture
def options(row):
    """A row without its precision: the interpreter multiplies alike; the blocks differ."""
    with float32_by(row["precision"]):
        yield {name: value for name, value in row.items() if name != "precision"}


@FORWARD
@pytest.mark.parametrize("row", FAST, ids=identifier)
def test_forward(options):
    check(make("separable_conv2d", fresh_generator(), n=2, decades=3.0, **options))


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=[pytest.mark.slow] * (i % 6 > 0)) for i, row in enumerate(FAST)], ids=identifier
)
def test_gradients(options):
    generator = fresh_generator()
    check_gradients(away_from_kinks(generator, n=2, **options), generator)


@FORWARD
@pytest.mark.parametrize("activation", ("sigmoid", "gelu", "tanh"))
def test_curved_activations(activation):
    """sigmoid isn't 0 where the padding is, nor in the channels of a block beyond the last."""
    row = dict(n=1, c=3, size=(4, 5), activation=activation, dtype=torch.float16)
    check(make("separable_conv2d", fresh_generator(), **row))


@pytest.mark.slow
@pytest.mark.parametrize("row", ALL, ids=identifier)
def test_all_pairs(options):
    generator = fresh_generator()
    check(make("separable_conv2d", generator, decades=3.0, **options))
    check_gradients(away_from_kinks(generator, **options), generator)


@FORWARD
@pytest.mark.parametrize("row", SMALL.values(), ids=SMALL.keys())
def test_small_shapes(row):
    check(make("separable_conv2d", fresh_generator(), **SIZES | row))


@pytest.mark.slow
@pytest.mark.parametrize("pointwise_first", (False, True))
@pytest.mark.parametrize("layout", ("channels_last", "nchw"))
@pytest.mark.parametrize("row", SMALL.values(), ids=SMALL.keys())
def test_gradients_of_small_shapes(row, layout, pointwise_first):
    generator = fresh_generator()
    case = away_from_kinks(generator, **SIZES | {"layout": layout, "pointwise_first": pointwise_first} | row)
    check(case)
    check_gradients(case, generator)


@FORWARD
@pytest.mark.parametrize("layout", ("channels_last", "nchw"))
def test_several_blocks_of_channels(layout):
    """Of both stages; the output channels of the second block make t anew."""
    row = dict(n=1, c=41, out=260, size=(3, 3), dtype=torch.float16, layout=layout)
    check(make("separable_conv2d", fresh_generator(), activation="relu6", decades=3.0, **row))


@FORWARD
def test_before_tensor_cores(monkeypatch):
    """Older GPUs multiply float16 as float32, t unrounded."""
    monkeypatch.setattr("cnnfast.kernels.launch.capability", lambda device: (7, 5))
    case = make("separable_conv2d", fresh_generator(), c=17, size=(4, 5), dtype=torch.float16)
    case.check(run(case), rounded=0)


@FORWARD
@pytest.mark.parametrize("pointwise_first", (False, True))
def test_special_values(pointwise_first):
    row = dict(n=1, c=3, out=5, size=(6, 6), activation="relu6", pointwise_first=pointwise_first)
    case = make("separable_conv2d", fresh_generator(), **row)
    for i, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        case.x[0, i, 2, i] = value
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("pointwise_first", (False, True))
def test_inputs_that_are_not_dense(pointwise_first):
    generator = fresh_generator()
    row = dict(n=2, c=6, out=6, size=(4, 5), activation="silu", pointwise_first=pointwise_first)
    case = make("separable_conv2d", generator, **row)
    wide = draw(generator, (2, 4, 5, 12)).permute(0, 3, 1, 2)[:, ::2]  # neither format
    beside = draw(generator, (2, 4, 5, 12)).permute(0, 3, 1, 2)[:, :6]  # channels side by side
    case.tensors["residual"] = draw(generator, (2, 6, 4, 10))[..., ::2]
    for x in (wide, beside):
        case.tensors["x"] = x
        check(case)
    case.tensors["pw_weight"] = draw(generator, (6, 6, 1, 1)).transpose(0, 1)
    case.tensors["dw_weight"] = draw(generator, (3, 3, 1, 6)).permute(3, 2, 0, 1)
    check(case)
    grad = draw(generator, (2, 5, 4, 6)).permute(0, 3, 2, 1)
    dense = case.to(lambda tensor: tensor.contiguous())
    ours, wanted = gradients(case, grad), gradients(dense, grad.contiguous())
    for name in ours:
        torch.testing.assert_close(ours[name], wanted[name])


@pytest.mark.parametrize("pointwise_first", ORDERS)
def test_repeatable_and_independent_of_the_batch(pointwise_first):
    generator = fresh_generator()
    row = dict(n=3, c=4, size=(3, 5), activation="silu", pointwise_first=pointwise_first)
    case = make("separable_conv2d", generator, **row)
    y = run(case)
    grad = channels_last(draw(generator, y.shape))
    first, second = gradients(case, grad), gradients(case, grad)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    for name in ("x", "residual"):
        case.tensors[name] = channels_last(case.tensors[name][1:2])
    assert torch.equal(run(case), y[1:2])
    alone = gradients(case, channels_last(grad[1:2]))
    for name in ("x", "residual"):
        assert torch.equal(alone[name], first[name][1:2]), name


@pytest.mark.parametrize("pointwise_first", ORDERS)
@pytest.mark.parametrize("activation", (None, pytest.param("relu", marks=pytest.mark.slow)))
@pytest.mark.parametrize("output_mask", [1 << i for i in range(6)])
def test_output_mask(output_mask, activation, pointwise_first):
    generator = fresh_generator()
    row = dict(n=1, c=3, out=4, size=(3, 2), activation=activation, pointwise_first=pointwise_first)
    case = make("separable_conv2d", generator, **row)
    grad = draw(generator, run(case).shape)
    every, some = gradients(case, grad), gradients(case, grad, output_mask)
    names = ("x", "dw_weight", "dw_bias", "pw_weight", "pw_bias", "residual")
    for i, name in enumerate(names):
        assert torch.equal(some[name], every[name]) if output_mask >> i & 1 else some[name].numel() == 0, name
    assert every["residual"].data_ptr() != grad.data_ptr()  # an op's output isn't its input


STAGES = ("depthwise_conv2d", "pointwise_conv2d", "depthwise_conv2d_backward", "pointwise_conv2d_backward")
ONLY = [  # (order, activations, gradient wanted, the stages that it takes)
    (False, None, 0b100000, ["pointwise_conv2d_backward"]),
    (False, None, 0b010000, ["pointwise_conv2d_backward"]),
    (False, None, 0b001000, ["depthwise_conv2d", "pointwise_conv2d_backward"]),
    (False, None, 0b000001, ["pointwise_conv2d_backward", "depthwise_conv2d_backward"]),
    (False, "relu", 0b010000, ["depthwise_conv2d", "pointwise_conv2d_backward"]),
    (True, None, 0b000010, ["pointwise_conv2d", "depthwise_conv2d_backward"]),
    (True, None, 0b000100, ["depthwise_conv2d_backward"]),
    (True, None, 0b001000, ["depthwise_conv2d_backward", "pointwise_conv2d_backward"]),
]


@pytest.mark.parametrize(("pointwise_first", "activation", "output_mask", "wanted"), ONLY)
def test_nothing_is_computed_that_is_not_wanted(pointwise_first, activation, output_mask, wanted, monkeypatch):
    generator, called = fresh_generator(), []

    def noted(name, launch):
        return lambda *args: called.append(name) or launch(*args)

    for name in STAGES:
        monkeypatch.setattr(kernels, name, noted(name, getattr(kernels, name)))
    row = dict(n=1, c=3, size=(4, 4), activation=activation, pointwise_first=pointwise_first)
    case = make("separable_conv2d", generator, **row)
    grad = draw(generator, case.reference(**case.tensors, **case.options).shape)
    gradients(case, grad, output_mask)
    assert called == wanted


# (what breaks, the text to replace, its replacement); the first occurrence is taken.
FAULTS = {
    "the last channel of t left out": ("m_m = o_m < M", "m_m = o_m < M - 1"),
    "a neighbour's channel counted": ("m_m = o_m < M", "m_m = o_m < M + 1"),
    "the activation between forgotten": ("b_ts[o] + b_bias, MID_ACTIVATION)", "b_ts[o] + b_bias, 0)"),
    "the bias between twice": ("b_ts[o] + b_bias", "b_ts[o] + b_bias + b_bias"),
    "every row of a strip the first": ("activate(b_ts[o]", "activate(b_ts[0]"),
    "the last bias forgotten": ("b_y = accs[o] + b_bias", "b_y = accs[o]"),
    "the residual of a strip's first row": ("residual + (o_y + o * y_h)", "residual + o_y"),
    "the last row not stored": ("(o_h + o < OH)", "(o_h + o < OH - 1)"),
    "the last pixel not stored": ("m_p = o_p < N * n_h * OW", "m_p = o_p < N * n_h * OW - 1"),
    "rows between strips left out": ("o_p // OW % n_h * BLOCK_H", "o_p // OW % n_h * (BLOCK_H + 1)"),
    "the stride of columns forgotten": ("o_w * STRIDE_W - pad_left", "o_w - pad_left"),
}
GRADIENT_FAULTS = {
    "t's shape only, where its values count": ("if activation != 0 or second[0]:", "if activation != 0:"),
    "the slope of the activation before forgotten": ("activated(x, pre_activation, grad_z)", "grad_z"),
    "the input of the product not activated": ("z = activated(x, pre_activation)", "z = x"),
    "the residual not counted before the slope": ("finish(v, None, residual, grad", "finish(v, None, None, grad"),
    "a clamp's slope taken twice": ("        activation = 0\n", ""),
}


@pytest.mark.slow
def test_faults(tmp_path, monkeypatch):
    row = dict(n=2, c=20, out=5, size=(5, 5), stride=2, padding=1, dtype=torch.float16)
    case = make("separable_conv2d", fresh_generator(1), activation="relu6", **row).to(padded_by_nan)
    check_module = functools.partial(check, case)
    assert not survivors("separable_conv2d", FAULTS, check_module, tmp_path, monkeypatch)


@pytest.mark.slow
def test_faults_of_gradients(tmp_path, monkeypatch):
    generator = fresh_generator(1)
    row = dict(n=2, c=3, out=5, size=(5, 5), stride=2, padding=1, dtype=torch.float16)
    linear = make("separable_conv2d", generator, activation=None, **row)
    first = away_from_kinks(generator, activation="relu6", pointwise_first=True, **row)

    def check_module(module):
        check_gradients(linear, generator, module=module)
        check_gradients(first, generator, module=module)

    assert not survivors("separable_conv2d", GRADIENT_FAULTS, check_module, tmp_path, monkeypatch)
