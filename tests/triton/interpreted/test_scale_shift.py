"""The Triton kernels of scale_shift, scale_shift_excite and batch_norm_scale_shift, run by the interpreter on CPU
tensors through their launchers.

Fails if an element is wrong by the policy of numerics.py or unwritten (outputs and scratch are NaN-filled), bits depend
on the run or an image's result on its neighbours, or a memory format or dtype is not what the fakes promise. The tests
of faults show that they would: they break copies of the kernels, a line at a time, and want the same checks to fail.
"""

import importlib

import launchers
import pytest
import torch
from launchers import padded_by_nan, survivors
from numerics import LAYOUTS, assert_gradients_by_policy, channels_last, draw, fresh_generator, nan_filled
from op_cases import NONCONTIGUOUS, Case, all_pairs, identifier
from scale_shift_cases import OPS, check_output, make, sums_of

import cnnfast.reference
from cnnfast.ops import activations
from cnnfast.ops._registration import empty_image

KERNELS = (
    "scale_shift_bwd",
    "squeeze_excite_scale",
    "squeeze_excite_product",
    "squeeze_excite_bwd_weight",
    "channel_sums",
    "add_up",
)
pytestmark = [pytest.mark.proof("interpreted", kernel=f"{name}_kernel") for name in KERNELS]
BATCH_NORM = "batch_norm_scale_shift"
FACTORS = {
    "dtype": (torch.float32, torch.float16, torch.float64),
    "layout": ("channels_last", "nchw"),
    "activation": ("silu", None, "relu6"),
    "residual": (True, False),
    "size": ((2, 5, 3, 4), (1, 3, 2, 1)),
}
FAST = all_pairs({name: values[:2] for name, values in FACTORS.items()})
ALL = all_pairs(
    FACTORS
    | {"activation": tuple(activations.CODES)}
    | {"size": ((2, 16, 9, 7), (1, 1, 1, 1), (3, 3, 5, 1), (2, 24, 8, 8), (1, 40, 19, 17), (1, 70, 3, 5))}
)
SMALL = {
    "two tiles of pixels": (1, 1, 19, 15),
    "17 tiles of pixels": (1, 2, 70, 60),
    "1x1 image": (3, 5, 1, 1),
    "three blocks of channels": (1, 70, 1, 1),
    "W=1": (1, 5, 7, 1),
    "C=1": (2, 1, 2, 2),
}


def case_of(op, *args, **row):
    return Case(op, *make(op, *args, **row))


def check(case, module=None, seed=None):
    """Forward and gradients."""
    check_output(case.op, case.tensors, case.options, launchers.run(case, module))
    grad = draw(fresh_generator(seed), case.x.shape, case.x.dtype)
    ours = launchers.gradients(case, grad, module=module)
    for name, gradient in ours.items():
        tensor = case.tensors[name]
        assert gradient.dtype is tensor.dtype, name
        promised = empty_image(tensor, tensor.shape) if name in ("x", "residual") else tensor.contiguous()
        assert gradient.stride() == promised.stride(), name
    longest = max(case.x.numel() // case.x.shape[1], case.x.shape[1], 4)
    terms = dict.fromkeys(case.tensors, longest)
    assert_gradients_by_policy(ours, case.reference, grad, case.tensors, case.options, terms=terms)


@pytest.mark.parametrize("row", FAST, ids=identifier)
@pytest.mark.parametrize("op", OPS)
def test_pairs(op, row):
    check(case_of(op, **row))


@pytest.mark.slow
@pytest.mark.parametrize("row", ALL, ids=identifier)
@pytest.mark.parametrize("op", OPS)
def test_all_pairs(op, row):
    check(case_of(op, **row))


@pytest.mark.parametrize(
    "size",
    [pytest.param(size, id=name, marks=[pytest.mark.slow] * (i > 0)) for i, (name, size) in enumerate(SMALL.items())],
)
@pytest.mark.parametrize("op", OPS)
def test_small_shapes(op, size):
    check(case_of(op, size, activation="silu"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_batch_of_none(op, layout):
    """Gradients of all but the images are zeros then."""
    check(case_of(op, (0, 4, 2, 3), layout=layout))


@pytest.mark.parametrize("op", OPS)
def test_special_values(op):
    """NaN and infinity go where the reference's go; an infinite shift is not what lies beyond the last pixel."""
    case = case_of(op, (4, 3, 3, 3), activation="relu6", residual=False)
    for i, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        case.x[i, 1, 0, 1] = value
    check_output(op, case.tensors, case.options, launchers.run(case))
    case = case_of(op, (2, 3, 3, 3), activation="sigmoid", residual=False)
    case.tensors["shift"][1] = float("inf")
    check_output(op, case.tensors, case.options, launchers.run(case))
    assert launchers.gradients(case, torch.ones_like(case.x))["shift"].isfinite().all()


@pytest.mark.parametrize(
    "change", [pytest.param(name, marks=[pytest.mark.slow] * (i > 0)) for i, name in enumerate(NONCONTIGUOUS)]
)
@pytest.mark.parametrize("op", OPS)
def test_inputs_that_are_not_dense(op, change):
    """The same bits, whatever the strides of images, vectors and the gradient that comes in."""
    dense = case_of(op, (2, 4, 3, 2), activation="silu")
    strided = Case(op, dense.tensors | {"x": NONCONTIGUOUS[change](dense.x)}, dense.options)
    dense.tensors["x"] = channels_last(strided.x) if not strided.x.is_contiguous() else strided.x.clone()
    for name in {"scale", "shift"}:
        strided.tensors[name] = strided.tensors[name].repeat_interleave(2)[::2]
    other = LAYOUTS["nchw" if dense.x.stride(1) == 1 else "channels_last"]
    if "residual" in dense.tensors:
        strided.tensors["residual"] = other(dense.tensors["residual"])
    assert torch.equal(launchers.run(strided), launchers.run(dense))
    grad = draw(fresh_generator(), dense.x.shape)
    ours, expected = launchers.gradients(strided, other(grad)), launchers.gradients(dense, grad)
    for name, gradient in ours.items():
        assert torch.equal(gradient, expected[name]), name
        assert name != "residual" or gradient.stride() == strided.tensors[name].stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_repeatable_and_independent_of_the_batch(op, layout):
    case = case_of(op, (6, 5, 3, 3), layout=layout, activation="silu")
    grad = LAYOUTS[layout](draw(fresh_generator(), case.x.shape))
    y, first, second = launchers.run(case), launchers.gradients(case, grad), launchers.gradients(case, grad)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    images = {"x", "residual"} & set(case.tensors)
    for name in images:
        case.tensors[name] = case.tensors[name][5:]
    assert torch.equal(launchers.run(case), y[5:])
    alone = launchers.gradients(case, grad[5:])
    for name in images:
        assert torch.equal(alone[name], first[name][5:]), name


@pytest.mark.parametrize("op", OPS)
def test_output_mask(op):
    case = case_of(op, (1, 3, 2, 2), activation="silu")
    grad = draw(fresh_generator(), case.x.shape)
    every = launchers.gradients(case, grad)
    assert "residual" not in every or every["residual"].data_ptr() != grad.data_ptr()
    schema = getattr(torch.ops.cnnfast, op).default._schema.arguments
    for i, name in enumerate(argument.name for argument in schema if "Tensor" in str(argument.type)):
        some = launchers.gradients(case, grad, 1 << i)
        assert torch.equal(some.pop(name), every[name]), name
        assert not any(gradient.numel() for gradient in some.values()), name


# ---- batch_norm_scale_shift


def check_batch_norm(tensors, options, module=None, seed=None):
    """Values and gradients are the reference's in float64, rounded once."""
    case = Case(BATCH_NORM, tensors, options)
    doubles = {name: t.double().requires_grad_(name != "y") for name, t in tensors.items()}
    absent = dict.fromkeys({"weight", "bias"} - set(tensors))
    expected = cnnfast.reference.batch_norm_scale_shift(**doubles, **absent, **options)
    with nan_filled():
        got = launchers.run(case, module)
    dtype, generator = tensors["sum"].dtype, fresh_generator(seed)
    exactly = dict(rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    for ours, ref in zip(got, expected, strict=True):
        assert ours.dtype is dtype and ours.is_contiguous()
        torch.testing.assert_close(ours.double(), ref.detach(), equal_nan=True, **exactly)
    grads = [draw(generator, got[0].shape, dtype) for _ in range(2)]
    leaves = {name: t for name, t in doubles.items() if t.requires_grad}
    wanted = torch.autograd.grad(expected[:2], list(leaves.values()), [grad.double() for grad in grads])
    name = f"{BATCH_NORM}_backward"
    with nan_filled():
        computed = getattr(module or launchers.kernels_of(BATCH_NORM), name)(
            *launchers.arguments(case, name, grad_scale=grads[0], grad_shift=grads[1])
        )
    computed = dict(zip(("sum", "squares", "weight", "bias"), computed, strict=True))
    for name, ref in zip(leaves, wanted, strict=True):
        assert computed[name].dtype is dtype
        torch.testing.assert_close(computed[name].double(), ref, equal_nan=True, **exactly)


def with_proofs(test):
    for part in ("fwd", "bwd"):
        test = pytest.mark.proof("interpreted", kernel=f"{BATCH_NORM}_{part}_kernel")(test)
    return test


@with_proofs
@pytest.mark.parametrize("affine", ("weight bias", "weight", "bias", ""))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.float16), ids=str)
def test_batch_norm(dtype, affine):
    tensors, options = sums_of(torch.randn(3, 17, 5, 4).to(dtype))
    check_batch_norm({n: t for n, t in tensors.items() if n in ("y", "sum", "squares", *affine.split())}, options)


def test_batch_norm_of_many_channels():
    check_batch_norm(*sums_of(torch.randn(2, 129, 2, 3)))


def test_values_that_are_all_alike():
    """The variance is 0, never below, and its gradient finite."""
    tensors, options = sums_of(torch.full((2, 3, 5, 7), 1234.567), eps=1e-5)
    tensors["squares"] = tensors["squares"] * (1 - 2**-20)
    case, name = Case(BATCH_NORM, tensors, options), f"{BATCH_NORM}_backward"
    *_, var = launchers.run(case)
    assert torch.equal(var, torch.zeros(3))
    ones = dict(grad_scale=torch.ones(3), grad_shift=torch.ones(3))
    of_sum, of_squares, *_ = getattr(launchers.kernels_of(BATCH_NORM), name)(*launchers.arguments(case, name, **ones))
    assert torch.equal(of_squares, torch.zeros(3)) and of_sum.isfinite().all()


# (what breaks, the text to replace, its replacement); the first occurrence is taken.
SCALE_SHIFT_FAULTS = {
    "shift left out": ("scaled(b_x, b_scale, b_shift)", "scaled(b_x, b_scale, None)"),
    "the slope forgotten": ("if ACTIVATION != 0:", "if False:"),
    "residual left out of the slope": ("b_v += tl.load(residual", "b_v += 0 * tl.load(residual"),
    "x's gradient not scaled": ("(b_g * b_scale)", "(b_g)"),
    "a tile left out": ("i_n, first + o_p", "i_n, o_p"),
    "a tile's last pixel left out": ("(o_p < tile_pixels)", "(o_p < tile_pixels - 1)"),
    "scale's and shift's gradients exchanged": ("sum_gx, sum_g)", "sum_g, sum_gx)"),
    "a step's sums left out": ("sum_g += b_g", "sum_g = b_g"),
}
EXCITE_FAULTS = {
    "sums of x, not of z": ("True, scale, shift, activation)", "True, None, None, 0)"),
    "forward's sums not activated": ("shift=shift, activation=activation)", "shift=shift)"),
    "the gates not activated": ("out_activation=gate_activation", "out_activation=0"),
    "a mean's gradient of another image": ("z, share, gate_activation\n", "z, share.flip(0), gate_activation\n"),
    "the layers' gradients exchanged": ("3, grad_hidden_z, mean,", "3, grad_hidden_z, mean * 2,"),
}
GATE_FAULTS = {
    "the gates left out of backward": ("b_g * b_gate + b_share", "b_g + b_share"),
    "the means' share left out": ("b_g * b_gate + b_share", "b_g * b_gate"),
    "the share not divided": ("o_c, m_c) / pixels", "o_c, m_c) / 1"),
    "a share beyond the image": ("b_g = tl.where(m_x, b_g, 0.0)", "b_g = b_g"),
}
SUM_FAULTS = {
    "shift beyond the image": ("m_x, ACTIVATION, b_scale, b_shift)", "m_x | True, ACTIVATION, b_scale, b_shift)")
}
BATCH_NORM_FAULTS = {
    "eps left out": ("tl.sqrt(b_var + EPS)", "tl.sqrt(b_var)"),
    "the biased variance": ("b_var * (count / (count - 1.0))", "b_var * 1.0"),
    "shift without the mean": ("0.0) - b_mean * b_scale", "0.0) - b_scale"),
    "no weight": ("1.0) * b_rstd", "1.0) * 0 + b_rstd"),
    "the variance's slope": ("-0.5 * b_of_scale", "-1.0 * b_of_scale"),
    "the mean's share of the variance's slope": ("- 2.0 * b_mean * b_of_var", "- 0.0 * b_mean * b_of_var"),
    "shift's part of the weight's gradient": ("- b_of_shift * b_mean", "- 0.0 * b_mean"),
    "the last channel left out": ("m_c = o_c < channels", "m_c = o_c < channels - 1"),
}
FAULTS = {  # where they are: (op, what they are)
    "scale_shift": ("scale_shift", SCALE_SHIFT_FAULTS),
    "scale_shift_excite": ("scale_shift_excite", EXCITE_FAULTS),
    "scale_shift of excite": ("scale_shift_excite", GATE_FAULTS),
    "channels": ("scale_shift_excite", SUM_FAULTS),
}


@pytest.mark.slow
@pytest.mark.parametrize("where", FAULTS)
def test_faults(where, tmp_path, monkeypatch):
    op, faults = FAULTS[where]
    case = case_of(op, (2, 3, 19, 15), activation="silu", seed=1).to(padded_by_nan)

    def check_module(module):
        check(case, importlib.import_module(f"{module.__package__}.{op}"), seed=2)

    assert not survivors(where.split()[0], faults, check_module, tmp_path, monkeypatch)


@pytest.mark.slow
def test_faults_of_batch_norm(tmp_path, monkeypatch):
    tensors, options = sums_of(1 + torch.randn(2, 130, 2, 3), eps=0.5)
    assert not survivors(
        BATCH_NORM,
        BATCH_NORM_FAULTS,
        lambda module: check_batch_norm(tensors, options, module, 3),
        tmp_path,
        monkeypatch,
    )
