"""Packings with scales: batch normalisation beside bfloat16 weights, which stay what they are.

Fails if a scale is left out, is another channel's, or reaches the bias or the residual; if weights are rounded for it;
if the fake's size isn't the packing's; if an error of whole channels, which a mean over pixels keeps, comes back.
"""

import re

import pytest
import torch
from networks import draw_batch_norms, in_float64, ops_of
from numerics import LAYOUTS, fresh_generator
from op_cases import DTYPES, WITH_SCALES, Case, arguments_of, make

from cnnfast import _C
from cnnfast.nn import ConvBN, InvertedResidual, PointwiseConvBN, SeparableConv2d

pytestmark = pytest.mark.usefixtures("nan_outputs")

# Channels of whole and of broken panels and tiles, one panel alone, one pixel, a line cut into runs.
ROWS: list[dict] = [
    {"c": 32, "out": 33, "size": (5, 7)},
    {"c": 64, "out": 16, "size": (9, 17), "stride": 2, "activation": None, "pointwise_first": True},
    {"c": 401, "out": 7, "size": (4, 5), "activation": "silu", "residual": False},
    {"c": 17, "out": 48, "size": (1, 37), "excite": True, "k": (1, 5)},
    {"c": 96, "out": 161, "size": (3, 18), "bias": False, "activation": "relu6", "pointwise_first": True},
    {"c": 32, "out": 5, "size": (1, 1), "expand": False, "multiplier": 2, "n": 3},
]


def check_scaled(case: Case) -> None:
    scales = case.draw_scales(fresh_generator())
    for given in (scales, *({name: scale} for name, scale in scales.items())):  # all, and one alone: the others are 1
        one = case.with_biases_times(given)
        one.folded(given).check(one.run_packed(one.pack(**given)), packed=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("op", WITH_SCALES)
def test_by_the_policy(op, row, dtype, layout):
    check_scaled(make(op, fresh_generator(), **row, dtype=dtype, layout=layout, decades=3))


@pytest.mark.parametrize("op", ("pointwise_conv2d", "conv2d"))
def test_sees_folded_weights_that_were_rounded(op):
    """What scales are for; where an intermediate is rounded too, the next test sees it."""
    case = make(op, fresh_generator(), c=64, size=(9, 9), dtype=torch.bfloat16, residual=False, activation=None)
    scales = case.draw_scales(fresh_generator())
    exact = case.folded(scales)
    rounded = exact.to(torch.Tensor.bfloat16)
    with pytest.raises(AssertionError, match="elements are off"):
        exact.check(rounded.run_packed(), packed=True)


BLOCKS = {
    "pointwise": (48, lambda: PointwiseConvBN(48, 40, activation="relu"), "pointwise_conv2d_packed"),
    "separable": (48, lambda: SeparableConv2d(48, 40, padding=1, activation="relu"), "separable_conv2d_packed"),
    "inverted": (40, lambda: InvertedResidual(40, 48, padding=1), "inverted_residual_packed"),
    "conv": (64, lambda: ConvBN(64, 40, 3, padding=1), "conv2d_packed"),
    "conv_by_aten": (48, lambda: ConvBN(48, 40, 3, padding=2, dilation=2), None),
}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_channels_do_not_shift(name, dtype):
    """The error's mean over n pixels is that of n independent roundings, as a global pooling hopes: weights that were
    rounded made it 20 to 35 times as large, since they are the same at every pixel."""
    channels, make_block, op = BLOCKS[name]
    block = make_block()
    x = torch.randn(2, channels, 96, 96).relu()  # with a mean, as behind a ReLU
    draw_batch_norms(block, x)
    block, x = block.to(dtype).eval(), x.to(dtype)
    with torch.no_grad():
        error = (block(x).double() - in_float64(block).layers(x.double())).transpose(0, 1).flatten(1)
        if op == "conv2d_packed" and (dtype is torch.float16 or _C.isa != "amx"):
            op = None  # ATen's
        assert ops_of(block, x) == ([] if op is None else [op])
    shift, expected = error.mean(1).abs(), error.std(1) / error.shape[1] ** 0.5
    assert (shift / expected.clamp_min(1e-12)).median() <= 6  # neighbours share an inverted residual's roundings


@pytest.mark.parametrize("name", BLOCKS)
def test_exported_and_compiled(name):
    """The packing is made in the graph, scales and all."""
    channels, make_block, _ = BLOCKS[name]
    block = make_block()
    x = torch.randn(2, channels, 9, 10)
    draw_batch_norms(block, x)
    block, x = block.bfloat16().eval(), x.bfloat16()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = block(x)
        exported = torch.export.export(block, (x,)).module()
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        for y in (exported(x), compiled(x)):
            assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("op", WITH_SCALES)
def test_opcheck(op, dtype):
    for row in ({"c": 32, "pointwise_first": True, "excite": True}, {"c": 33, "out": 17, "expand": False}):
        case = make(op, fresh_generator(), **row, dtype=dtype)
        overload = getattr(torch.ops.cnnfast, f"pack_{op}").default
        tensors = {**case.tensors, **case.draw_scales(fresh_generator())}
        torch.library.opcheck(overload, arguments_of(overload, tensors, case.options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", WITH_SCALES)
def test_ones_are_none(op, dtype):
    case = make(op, fresh_generator(), c=32, dtype=dtype)
    ones = {name: torch.ones_like(scale) for name, scale in case.draw_scales(fresh_generator()).items()}
    assert torch.equal(case.pack(**ones), case.pack())


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("op", WITH_SCALES)
def test_mistakes(op, dtype):
    case = make(op, fresh_generator(), dtype=dtype)
    wanted = torch.float64 if dtype is torch.float64 else torch.float32
    for name, scale in case.draw_scales(fresh_generator()).items():
        for wrong, exception, message in [
            (scale[1:], ValueError, f"{name} must have shape ({len(scale)},), got ({len(scale) - 1},)"),
            (scale[None], ValueError, f"{name} must have shape ({len(scale)},), got (1, {len(scale)})"),
            (scale.half(), TypeError, f"{name} must have dtype {wanted} beside"),
            (scale.to("meta"), ValueError, f"{name} must be on cpu like"),
            (scale.numpy(), TypeError, f"{name} must be a torch.Tensor, got ndarray"),
            (scale.requires_grad_(), ValueError, f"{name} requires grad and pack_{op} is for inference only"),
        ]:
            with pytest.raises(exception, match=re.escape(message)):
                case.pack(**{name: wrong})


def test_scale_of_an_expansion_that_is_not_there():
    case = make("inverted_residual", fresh_generator(), expand=False)
    with pytest.raises(ValueError, match="expand_scale must be None where expand_weight is, got a Tensor"):
        case.pack(expand_scale=torch.ones(8))
