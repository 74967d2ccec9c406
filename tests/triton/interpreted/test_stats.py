"""The launchers of <op>_stats and depthwise_conv2d_squeeze: the plain ops' kernels with a prologue and with sums, run
by the interpreter on CPU tensors.

Fails if an element is wrong by the policy of numerics.py or unwritten (outputs and scratch are NaN-filled), a sum isn't
that of the y that is returned, or a memory format or dtype is not what the fakes promise. The tests of faults show that
they would: they break copies of the kernels, a line at a time, and want the same checks to fail.
"""

import importlib
from unittest import mock

import launchers
import pytest
import torch
from launchers import padded_by_nan, survivors
from numerics import LAYOUTS, channels_last, draw, fresh_generator, nan_filled
from op_cases import Case, all_pairs, identifier
from stats_cases import OPS, PROLOGUES, STATS, check_gradients, check_outputs, make

import cnnfast.kernels.channels as channels
import cnnfast.kernels.stats as kernels
from cnnfast.kernels.packing import pack_depthwise_conv2d
from cnnfast.ops import activations
from cnnfast.ops._registration import empty_image
from cnnfast.ops.arguments import edges, pair

PROOFS = [
    pytest.mark.proof("interpreted", kernel=f"{name}_kernel")
    for name in (
        *(f"depthwise_conv2d_{part}" for part in ("fwd", "bwd_input", "bwd_weight", "bwd_weight_sum")),
        *(f"pointwise_conv2d_{part}" for part in ("fwd", "bwd_input", "bwd_weight")),
        "add_up",
        "channel_sums",
        "squeeze_excite_scale",
    )
]
SQUEEZE = "depthwise_conv2d_squeeze"
# With y, and its gradient, which are multiplied by what comes from the sums; conv2d: and of the prologue's gradient;
# separable: of the intermediate's. The CPU's rounds its x, too.
ROUNDED = dict(zip(OPS, (4, 2, 3, 4, 0), strict=True))
FACTORS = {
    "prologue": tuple(PROLOGUES),
    "dtype": (torch.float32, torch.float16, torch.float64),
    "layout": ("channels_last", "nchw"),
    "k": ((3, 3), (2, 3), (5, 5)),
    "stride": (1, 2, (3, 1)),
    "dilation": (1, (2, 1)),
    "padding": ("same", 0, (1, 0, 2, 3)),
    "bias": (True, False),
    "c": (3, 17),
    "out": (12, 5),
    "size": ((5, 7), (6, 5)),
}
ROWS = (
    dict(prologue="all", dtype=torch.float16, layout="channels_last", stride=2, c=3, out=5, size=(5, 4)),
    dict(prologue="none", dtype=torch.float32, layout="nchw", stride=1, c=5, out=3, size=(3, 4)),
)
ALL = all_pairs(FACTORS | {"c": (16, 1, 3, 24, 40, 31), "out": (16, 1, 3, 70), "size": ((13, 9), (8, 17))})
SMALL = {
    "1x1 image": dict(size=(1, 1)),
    "W=1": dict(size=(5, 1), padding=1),
    "C=1": dict(c=1, out=1, size=(5, 4)),
    "batch 0": dict(n=0, size=(4, 4)),
    "stride > size": dict(size=(2, 3), stride=4, padding=1),
    "several tiles": dict(c=36, out=70, size=(19, 5), n=1),
}


def names_of(op):
    """Of the gradients that come in."""
    return ("grad", "grad_sum", "grad_squares") if op in STATS else ("grad", "grad_squeezed")


def gradients(case, outputs, grads, output_mask=-1, module=None):
    more = dict(zip(names_of(case.op), grads, strict=True)) | ({"y": outputs[0]} if case.op in STATS else {})
    return launchers.gradients(case, output_mask=output_mask, module=module, **more)


def check(case, module=None, seed=None):
    """Forward and, through all outputs at once, the gradients."""
    outputs = launchers.run(case, module)
    check_outputs(case.op, case.tensors, case.options, outputs)
    generator = fresh_generator(seed)
    grads = [draw(generator, output.shape, output.dtype) for output in outputs]
    computed = gradients(case, outputs, grads, module=module)
    check_gradients(case.op, case.tensors, case.options, grads, computed, ROUNDED[case.op])
    for name, gradient in computed.items():  # as the fakes promise
        wanted = empty_image(case.x, case.x.shape).stride() if name == "x" else gradient.contiguous().stride()
        assert gradient.stride() == wanted, name


def with_proofs(test):
    for proof in PROOFS:
        test = proof(test)
    return test


def case_of(op, **row):
    return Case(op, *make(op, **row))


@with_proofs
@pytest.mark.parametrize("row", (ROWS[0], pytest.param(ROWS[1], marks=pytest.mark.slow)), ids=identifier)
@pytest.mark.parametrize("op", OPS)
def test_rows(op, row):
    check(case_of(op, **row))


@pytest.mark.slow
@pytest.mark.parametrize("row", ALL, ids=identifier)
@pytest.mark.parametrize("op", OPS)
def test_all_pairs(op, row):
    check(case_of(op, **row))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row", SMALL.values(), ids=SMALL.keys())
@pytest.mark.parametrize("op", OPS)
def test_small_shapes(op, row, layout):
    check(case_of(op, **{"c": 5, "out": 7, "layout": layout, **row}))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_before_tensor_cores(op, monkeypatch):
    """Older GPUs multiply float16 as float32."""
    monkeypatch.setattr("cnnfast.kernels.launch.capability", lambda device: (7, 5))
    check(case_of(op, c=17, out=12, size=(4, 5), dtype=torch.float16))


@pytest.mark.parametrize("op", ("depthwise_conv2d_stats", "pointwise_conv2d_stats"))
def test_infinite_shift(op):
    """What lies in the padding, or beyond the last pixel or channel, is zero and not that."""
    case = case_of(op, prologue="batch_norm", c=3, out=5, size=(3, 4))
    case.tensors["shift"][1] = float("inf")
    check_outputs(op, case.tensors, case.options, launchers.run(case))


@pytest.mark.parametrize("op", [pytest.param(op, marks=[pytest.mark.slow] * (op != OPS[2])) for op in OPS])
def test_inputs_that_are_not_dense(op):
    """The same bits, whatever the strides of vectors and of the gradients that come in."""
    case = case_of(op, n=2, c=3, out=4, size=(3, 4))
    outputs = launchers.run(case)
    strided = Case(op, dict(case.tensors), case.options)
    for name in {"scale", "shift"} & set(strided.tensors):
        strided.tensors[name] = strided.tensors[name].repeat_interleave(2)[::2]
    strided.tensors["x"] = torch.cat([case.x, case.x], 1)[:, : case.x.shape[1]]
    assert all(map(torch.equal, launchers.run(strided), outputs))
    grads = [torch.ones(()).expand(output.shape) for output in outputs]
    dense = gradients(case, outputs, [channels_last(g) if g.dim() == 4 else g.contiguous() for g in grads])
    for name, gradient in gradients(strided, outputs, grads).items():
        assert torch.equal(gradient, dense[name]), name


@pytest.mark.parametrize("op", [pytest.param(op, marks=[pytest.mark.slow] * (op != OPS[3])) for op in OPS])
def test_output_mask(op):
    case = case_of(op, n=1, c=2, out=3, size=(2, 3))
    outputs = launchers.run(case)
    every = gradients(case, outputs, outputs)
    schema = getattr(torch.ops.cnnfast, op).default._schema.arguments
    for i, name in enumerate(argument.name for argument in schema if "Tensor" in str(argument.type)):
        some = gradients(case, outputs, outputs, 1 << i)
        assert torch.equal(some.pop(name), every[name]), name
        assert not any(gradient.numel() for gradient in some.values()), name


@pytest.mark.parametrize("n", (3, 1))
def test_means_are_independent_of_the_batch(n):
    case = case_of(SQUEEZE, n=n, c=3, size=(9, 7), layout="nchw")
    outputs = launchers.run(case)
    case.tensors["x"] = case.x[n - 1 :].clone()
    for alone, together in zip(launchers.run(case), outputs, strict=True):
        assert torch.equal(alone, together[n - 1 :])


def test_squeeze_packed():
    case = case_of(SQUEEZE, n=1, c=3, size=(3, 4), stride=2)
    codes = [activations.code(name, case.options[name]) for name in ("pre_activation", "activation")]
    packed = pack_depthwise_conv2d(case.tensors["weight"], case.tensors["bias"])
    geometry = pair("stride", 2), edges("same"), pair("dilation", 1)
    with nan_filled():
        ours = kernels.depthwise_conv2d_squeeze_packed(case.x, packed, 6, (3, 3), *geometry, *codes)
    assert all(map(torch.equal, ours, launchers.run(case)))


def check_add_up(module):
    """More rows than one program adds up, in a number that no part divides; rows longer than what is wanted of them."""
    partial = draw(fresh_generator(), (2, 23, 9), torch.float64)
    with mock.patch.multiple(module, MOST_ROWS=20, MOST_TILES=4), nan_filled():
        for count in (2, 1):
            totals = [torch.empty((2, 4), dtype=torch.float64) for _ in range(count)]
            module.add_up(partial, *totals, divisor=3)
            for i, total in enumerate(totals):
                torch.testing.assert_close(total, partial[..., 4 * i : 4 * i + 4].sum(1) / 3)


@pytest.mark.proof("interpreted", kernel="add_up_kernel")
def test_add_up():
    check_add_up(channels)


# (what breaks, the text to replace, its replacement); the first occurrence is taken.
DEPTHWISE_FAULTS = {
    "padding scaled": (
        "b_x = activate_loaded(b_x, m_x, PRE_ACTIVATION, b_scale, b_shift)",
        "b_x = activate(scaled(b_x, b_scale, b_shift), PRE_ACTIVATION)",
    ),
    "another channel's scale": ("load_channels(scale, o_k // MULTIPLIER, m_k)", "load_channels(scale, o_k, m_k)"),
    "y summed before it is rounded": ("b_y = tl.where(m_p, b_stored, 0.0)", "b_y = tl.where(m_p, b_y, 0.0)"),
    "pixels beyond the image summed": ("b_y = tl.where(m_p, b_stored, 0.0)", "b_y = b_stored"),
    "a row's squares left out": ("b_squares += b_y * b_y", "b_squares = b_y * b_y"),
    "the slope at x, not at x * scale + shift": ("gate(scaled(b_x, b_scale, b_shift), b_g", "gate(b_x, b_g"),
    "scale's gradient that of shift": ("b_of_scale += b_g * b_x", "b_of_scale += b_g"),
    "pixels beyond the image in shift's gradient": ("b_g = tl.where(m_p, b_g, 0.0)", "b_g = b_g"),
    "x's gradient not scaled": ("b_g *= b_scale", "b_g *= 1.0"),
    "x not scaled for the weight's gradient": ("activate_loaded(b_x, m_w[:, None], PRE_ACTIVATION, b_scale, b_shift)",
                                               "activate_loaded(b_x, m_w[:, None], PRE_ACTIVATION)"),
    "rows beyond the image in the weight's gradient": ("elif m_r:", "else:"),
}  # fmt: skip
SQUEEZE_FAULTS = {
    "a mean's gradient not divided": ("[None, :] / (OH * OW)", "[None, :]"),
    "a mean's gradient left out": ("b_g += b_share", "b_g += 0 * b_share"),
    "a row's sum left out": ("b_sum += b_y", "b_sum = b_y"),
}
POINTWISE_FAULTS = {
    "x not shifted": ("b_x = enter(b_x, b_scale, b_shift,", "b_x = enter(b_x, b_scale, None,"),
    "pixels beyond the image summed": ("b_y = tl.where(m_p[:, None], b_stored, 0.0)", "b_y = b_stored"),
    "sums and squares exchanged": ("m_k, b_y, b_y * b_y)", "m_k, b_y * b_y, b_y)"),
    "the slope at x, not at x * scale + shift": (
        "gradient_through(scaled(b_entered, b_scale, load_channels(shift, o_k, m_k)), b_x",
        "gradient_through(b_entered, b_x",
    ),
    "x's gradient not scaled": ("b_x *= b_scale", "b_x *= 1.0"),
    "x not scaled for the weight's gradient": (
        "tl.where(m_p[:, None], enter(b_x, b_scale, b_shift, PRE_ACTIVATION), 0.0)", "b_x",
    ),
    "scale's and shift's gradients exchanged": (
        "b_x * b_entered, None if scale is None else b_x)", "b_x, None if scale is None else b_x * b_entered)",
    ),
}  # fmt: skip
STATS_FAULTS = {
    "the square's gradient halved": ("2 * grad_squares", "grad_squares"),
    "scale's and shift's gradients exchanged": ("grads[4], grads[3] = sums", "grads[3], grads[4] = sums"),
    "x's gradient shifted": ("entered(grads[0], scale, None, None,", "entered(grads[0], scale, scale, None,"),
    "the convolution's input not scaled": ("y = conv2d(z,", "y = conv2d(x,"),
    "the prologue's slope forgotten": ("if of_z and pre_activation != 0:", "if False:"),
}
SEPARABLE_FAULTS = {
    "the intermediate not activated in backward": ("if mid_activation != 0:", "if False:"),
    "a stage's gradients in each other's place": ("[*of_depthwise[:3], *of", "[*of_depthwise[2::-1], *of"),
}  # fmt: skip
ADD_UP_FAULTS = {
    "a part beyond its group": ("count = tl.minimum(rows - first, part)", "count = part"),
    "a part's last row left out": ("(s + o_s < count)", "(s + o_s < count - 1)"),
    "a sum, not a mean": ("b_total /= divisor", "b_total /= 1"),
    "the first total's numbers off by one": ("width + o_c, b_total,", "width + o_c, b_total + 1,"),
    "the second total's numbers off by one": ("o_c - width, b_total", "o_c - width, b_total + 1"),
}  # fmt: skip
FAULTS = {  # by op: where they are, and what they are
    "depthwise_conv2d_stats": ("depthwise_conv2d", DEPTHWISE_FAULTS),
    SQUEEZE: ("depthwise_conv2d", SQUEEZE_FAULTS),
    "pointwise_conv2d_stats": ("pointwise_conv2d", POINTWISE_FAULTS),
    "conv2d_stats": ("stats", STATS_FAULTS),
    "separable_conv2d_stats": ("stats", SEPARABLE_FAULTS),
}


@pytest.mark.slow
@pytest.mark.parametrize("op", FAULTS)
def test_faults(op, tmp_path, monkeypatch):
    dtype = torch.float16 if op.startswith("depthwise_conv2d_stats") else torch.float32  # rounding is seen, or not
    case = case_of(op, seed=1, n=1, c=2, out=3, size=(3, 2), dtype=dtype).to(padded_by_nan)

    def check_module(module):
        check(case, importlib.import_module(f"{module.__package__}.stats"), seed=2)

    assert not survivors(*FAULTS[op], check_module, tmp_path, monkeypatch)


@pytest.mark.slow
def test_faults_of_sums(tmp_path, monkeypatch):
    assert not survivors("channels", ADD_UP_FAULTS, check_add_up, tmp_path, monkeypatch)
