"""The Triton kernels of depthwise_conv2d, run by the interpreter on CPU tensors through their launchers.

Fails if an element is wrong by the policy of numerics.py or unwritten (outputs and scratch are NaN-filled), or a memory
format or dtype is not what the fakes promise. test_faults shows that it would: it breaks a copy of the kernels, a line
at a time, and wants the same checks to fail.
"""

import functools

import launchers
import pytest
import torch
from launchers import check, gradients, padded_by_nan, run, survivors
from numerics import channels_last, draw, fresh_generator, nan_filled
from op_cases import all_pairs, identifier, make

import cnnfast.kernels.depthwise_conv2d as kernels
from cnnfast.ops import activations
from cnnfast.ops.arguments import edges, pair

FORWARD = pytest.mark.proof("interpreted", kernel="depthwise_conv2d_fwd_kernel")
INPUT = pytest.mark.proof("interpreted", kernel="depthwise_conv2d_bwd_input_kernel")
WEIGHT = pytest.mark.proof("interpreted", kernel="depthwise_conv2d_bwd_weight_kernel")
WEIGHT_SUM = pytest.mark.proof("interpreted", kernel="depthwise_conv2d_bwd_weight_sum_kernel")
FACTORS = {
    "dtype": (torch.float32, torch.float16, torch.float64),
    "layout": ("channels_last", "nchw"),
    "k": ((3, 3), (5, 5), (2, 3), (1, 1)),
    "stride": (1, 2, (3, 1)),
    "dilation": (1, (2, 1)),
    "padding": ("same", 0, (1, 0, 2, 3)),
    "activation": ("relu6", None, "relu", "silu", "gelu", "tanh", "sigmoid"),
    "c": (17, 3, 40),
    "multiplier": (1, 2),
    "bias": (True, False),
    "size": ((5, 7), (6, 5)),
}
FAST = all_pairs({**FACTORS, "k": ((3, 3), (2, 3)), "c": (17, 3), "activation": ("relu6", None, "relu")})
ALL = all_pairs(FACTORS | {"k": (*FACTORS["k"], (7, 7)), "c": (16, 1, 3, 17, 40, 31), "size": ((13, 9), (14, 17))})
SMALL = {  # what is left of the policy's shapes
    "1x1 image": dict(size=(1, 1), k=(3, 3), padding=1),
    "W=1": dict(size=(5, 1), k=(3, 3), padding=1),
    "C=1": dict(c=1, size=(5, 4)),
    "primes": dict(c=13, size=(7, 5), n=2),
    "batch 0": dict(n=0, size=(4, 4)),
    "stride > size": dict(size=(2, 3), stride=4, padding=1),
    "several tiles": dict(c=36, size=(13, 5), k=(1, 2), activation=None),
}


def terms(case, shape):
    pixels = max(shape[0] * shape[2] * shape[3], 1)
    multiplier = case.tensors["weight"].shape[0] // case.x.shape[1]
    return {"x": case.terms * multiplier, "weight": pixels, "bias": pixels}


check_gradients = functools.partial(launchers.check_gradients, terms=terms)
away_from_kinks = functools.partial(launchers.away_from_kinks, "depthwise_conv2d")


@FORWARD
@pytest.mark.parametrize("row", FAST, ids=identifier)
def test_forward(row):
    check(make("depthwise_conv2d", fresh_generator(), n=1, decades=3.0, **row))


@INPUT
@WEIGHT
@WEIGHT_SUM
@pytest.mark.parametrize("row", FAST, ids=identifier)
def test_gradients(row):
    generator = fresh_generator()
    check_gradients(away_from_kinks(generator, n=1, **row), generator)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float64))
@pytest.mark.parametrize("activation", ("sigmoid", "silu", "gelu", "tanh"))
def test_curved_activations(activation, dtype):
    """sigmoid, before the kernel, isn't 0 where the padding is."""
    generator = fresh_generator()
    case = make("depthwise_conv2d", generator, n=1, c=3, size=(4, 5), activation=activation, dtype=dtype)
    check(case)
    check_gradients(case, generator)


@pytest.mark.slow
@pytest.mark.parametrize("row", ALL, ids=identifier)
def test_all_pairs(row):
    generator = fresh_generator()
    check(make("depthwise_conv2d", generator, decades=3.0, **row))
    check_gradients(away_from_kinks(generator, **row), generator)


@FORWARD
@INPUT
@WEIGHT
@WEIGHT_SUM
@pytest.mark.parametrize("layout", ("channels_last", "nchw"))
@pytest.mark.parametrize("row", SMALL.values(), ids=SMALL.keys())
def test_small_shapes(row, layout):
    generator = fresh_generator()
    case = away_from_kinks(generator, **{"n": 1, "c": 5, "activation": "relu6", "layout": layout, **row})
    check(case)
    check_gradients(case, generator)


@FORWARD
@pytest.mark.parametrize("dtype", (torch.float16, torch.float64))
def test_packed(dtype):
    case = make("depthwise_conv2d", fresh_generator(), n=1, c=9, size=(4, 5), multiplier=2, dtype=dtype)
    codes = [activations.code(name, case.options[name]) for name in ("pre_activation", "activation")]
    geometry = pair("stride", 1), edges("same"), pair("dilation", 1)
    with nan_filled():
        packed = kernels.pack_depthwise_conv2d(case.tensors["weight"], case.tensors["bias"])
        ours = kernels.depthwise_conv2d_packed(case.x, packed, 18, (3, 3), *geometry, *codes)
    assert torch.equal(packed, case.pack()), "the C++ packer makes another packing"
    assert torch.equal(ours, run(case))
    with pytest.raises(ValueError, match="packed"):
        kernels.depthwise_conv2d_packed(case.x, packed, 36, (3, 3), *geometry, *codes)


@WEIGHT
def test_large_filter_in_groups_of_rows():
    """More than 49 taps don't fit a thread's registers: several programs share them."""
    generator = fresh_generator()
    row = dict(n=1, c=2, size=(3, 4), k=(9, 7), activation=None, layout="nchw")
    check_gradients(make("depthwise_conv2d", generator, **row), generator)


@FORWARD
def test_special_values():
    case = make("depthwise_conv2d", fresh_generator(), n=1, c=3, size=(6, 6), activation="relu6")
    for i, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        case.x[0, i, 2, 3] = value
    check(case)


def test_inputs_that_are_not_dense():
    generator = fresh_generator()
    case = make("depthwise_conv2d", generator, n=2, c=6, size=(4, 5), activation="relu")
    wide = draw(generator, (2, 4, 5, 12)).permute(0, 3, 1, 2)[:, ::2]  # neither format
    beside = draw(generator, (2, 4, 5, 12)).permute(0, 3, 1, 2)[:, :6]  # channels side by side
    for x in (wide, beside):
        case.tensors["x"] = x
        check(case)
    case.tensors["weight"] = draw(generator, (3, 3, 1, 6)).permute(3, 2, 0, 1)
    check(case)


def test_repeatable_and_independent_of_the_batch():
    generator = fresh_generator()
    case = make("depthwise_conv2d", generator, n=3, c=5, size=(6, 5), activation=None)
    y = run(case)
    grad = draw(generator, y.shape)
    first, second = gradients(case, grad), gradients(case, grad)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    case.tensors["x"] = channels_last(case.x[1:2])
    assert torch.equal(run(case), y[1:2])


@pytest.mark.parametrize("output_mask", (0b001, 0b010, 0b100))
def test_output_mask(output_mask):
    generator = fresh_generator()
    case = make("depthwise_conv2d", generator, n=1, c=3, size=(4, 4))
    grad = draw(generator, run(case).shape)
    every, some = gradients(case, grad), gradients(case, grad, output_mask)
    for i, name in enumerate(every):
        assert torch.equal(some[name], every[name]) if output_mask >> i & 1 else some[name].numel() == 0, name


# (what breaks, the text to replace, its replacement); the first occurrence is taken.
FAULTS = {
    "no mask at the right edge": ("& (left + j * DILATION_W < W)\n", "\n"),
    "no mask at the bottom": ("m_w & (top + r >= 0) & (top + r < H)", "m_w & (top + r >= 0)"),
    "the last column not stored": ("(o_h + o < OH) & (o_w < OW)", "(o_h + o < OH) & (o_w < OW - 1)"),
    "bias twice": ("accs[o] + b_bias", "accs[o] + b_bias + b_bias"),
    "last channels left out": ("m_k = o_k < K", "m_k = o_k < K - 1"),
    "a filter row too few": ("if hits(r - o * STRIDE_H, KH,", "if hits(r - o * STRIDE_H, KH - 1,"),
    "a gradient's column off by one": ("t_w = o_w + pad_left", "t_w = o_w + 1 + pad_left"),
    "gradients of odd columns too": ("& (t_w % STRIDE_W == 0)", ""),
    "a tile left out of the sum": ("tl.minimum(first_tile + tiles, tiles_total)", "first_tile + tiles - 1"),
    "a chunk left out of the sum": ("(s + o_s < chunks)", "(s + o_s < chunks - 1)"),
    "the last row of grad left out": ("m_g = ((i_h + o < OH) & (o_w < OW))", "m_g = ((i_h + o < OH - 1) & (o_w < OW))"),
    "padding through the sigmoid": (
        "b_x = activate_loaded(b_x, m_x, PRE_ACTIVATION, b_scale, b_shift)",
        "b_x = activate(b_x, PRE_ACTIVATION)",
    ),
    "the activation's gate forgotten": ("gate(b_y, b_g, ACTIVATION)", "b_g"),
}


@pytest.mark.slow
def test_faults(tmp_path, monkeypatch):
    generator = fresh_generator(1)
    row = dict(n=1, c=5, size=(5, 5), k=(3, 3), stride=2, padding=1, activation="relu")
    case = away_from_kinks(generator, **row).to(padded_by_nan)
    curved = make("depthwise_conv2d", generator, **row | {"activation": "sigmoid"})

    def check_module(module):
        check(curved, module)
        check(case, module)
        check_gradients(case, generator, module=module)

    assert not survivors("depthwise_conv2d", FAULTS, check_module, tmp_path, monkeypatch)
