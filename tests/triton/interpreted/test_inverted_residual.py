"""The Triton kernels of inverted_residual, run by the interpreter on CPU tensors through their launchers, each way.

Fails if an element is wrong by the policy of numerics.py or unwritten (outputs and scratch are NaN-filled), if an
image's result depends on its neighbours, if a memory format or dtype is not what the fakes promise, or if the way taken
is not the one that the rule says. test_faults shows that it would: it breaks a copy of the kernel, a line at a time,
and wants the same checks to fail.
"""

import contextlib
import functools
from unittest import mock

import launchers
import pytest
import torch
from launchers import gradients, padded_by_nan, run, survivors
from numerics import LAYOUTS, draw, float32_by, fresh_generator
from op_cases import ROUNDED, all_pairs, identifier, make

import cnnfast.kernels.inverted_residual as kernels
from cnnfast.kernels.launch import Kind

FORWARD = pytest.mark.proof("interpreted", kernel="inverted_residual_fwd_kernel")
WAYS = ("fused", "apart")
FACTORS = {
    "way": WAYS,
    "dtype": (torch.float32, torch.float16, torch.float64),
    "layout": ("channels_last", "nchw"),
    "k": ((3, 3), (5, 5), (1, 2)),
    "stride": (1, 2, (3, 1)),
    "dilation": (1, (2, 1)),
    "padding": ("same", (1, 0, 2, 3)),
    "activation": ("relu6", "silu", None, "sigmoid"),
    "c": (5, 3, 17),
    "out": (7, 12, 24),
    "expand": (True, False),
    "excite": (False, True),
    "bias": (True, False),
    "residual": (True, False),
    "size": ((5, 4), (9, 8)),
    "precision": ("tf32", "ieee"),
}
NAMES = ("way", "dtype", "layout", "stride", "activation", "expand", "excite", "precision")
FAST = all_pairs({name: FACTORS[name][:2] for name in NAMES})
ALL = all_pairs(FACTORS | {"c": (16, 1, 3, 24, 40), "out": (16, 1, 3, 70), "multiplier": (1, 3)})
SMALL = {
    "1x1 image": dict(size=(1, 1), excite=True),
    "W=1": dict(size=(5, 1), stride=2),
    "C=1": dict(c=1, size=(5, 4)),
    "several blocks of output channels": dict(size=(3, 3), out=40, residual=False),
    "batch of none": dict(n=0, size=(4, 4)),
    "batch of none, excite": dict(n=0, size=(4, 4), excite=True),
}


@contextlib.contextmanager
def forced(way, module=kernels):
    """Meanwhile the rules answer for `way`."""
    with (
        mock.patch.object(module, "fusion_pays", lambda *sizes: way == "fused"),
        mock.patch.object(module, "recompute_pays", lambda *sizes: way == "fused"),
    ):
        yield


def roundings(case, way):
    """e where it is in memory; d; d times its gates."""
    excite = "se_reduce_weight" in case.tensors
    return max(ROUNDED["inverted_residual"], (way == "apart" and "expand_weight" in case.tensors) + 1 + excite)


def check_way(case, way, module=None):
    with forced(way, module or kernels):
        ours = run(case, module)
    case.check(ours, rounded=roundings(case, way))
    nhwc = case.x.shape[1] > 1 and case.x.stride(1) == 1 and not case.x.is_contiguous()
    assert ours.is_contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)


def terms(case, shape):
    pixels = max(case.x.shape[2] * case.x.shape[3], shape[2] * shape[3])
    longest = max(case.x.shape[0] * pixels, case.terms, shape[1])
    return dict.fromkeys(case.tensors, longest)


# As in tests/ops/test_gradients.py: the two of the forward pass, and the gradient of an intermediate.
check_gradients = functools.partial(launchers.check_gradients, terms=terms, rounded=3)


def distance_from_kinks(case):
    """Of e's and d's pre-activations from 0 and 6, but for exact zeros."""
    x, distances = case.x.double(), [1.0]
    tensors = {name: tensor.double() for name, tensor in case.tensors.items()}
    reference = launchers.importlib.import_module("cnnfast.reference")
    name = case.options["activation"]
    if "expand_weight" in tensors:
        x = reference.pointwise_conv2d(x, tensors["expand_weight"], tensors.get("expand_bias"))
        distances += near(x, name)
        x = reference.pointwise_conv2d(
            case.x.double(), tensors["expand_weight"], tensors.get("expand_bias"), activation=name
        )
    geometry = {name: case.options[name] for name in ("stride", "padding", "dilation")}
    distances += near(reference.depthwise_conv2d(x, tensors["dw_weight"], tensors.get("dw_bias"), **geometry), name)
    return min(distances)


def near(z, activation):
    kinks = {"relu": (0.0,), "relu6": (0.0, 6.0)}.get(activation, ())
    return [float((z[z != 0] - kink).abs().min()) for kink in kinks if z.any()]


def drawn(generator, way=None, precision=None, **row):
    for _ in range(100):
        case = make("inverted_residual", generator, away_from_kinks=True, **row)
        if distance_from_kinks(case) > 1e-5:
            return case
    raise AssertionError("no draw is away from the kinks")


def check_row(row):
    generator = fresh_generator()
    with float32_by(row["precision"]):
        case = drawn(generator, **row)
        check_way(case, row["way"])
        check_gradients(case, generator)


@FORWARD
@pytest.mark.parametrize("row", FAST, ids=identifier)
def test_pairs(row):
    check_row({"n": 1, "c": 3, "out": 4, "size": (4, 3), **row})


@pytest.mark.slow
@FORWARD
@pytest.mark.parametrize("row", ALL, ids=identifier)
def test_all_pairs(row):
    check_row(row)


@pytest.mark.slow
@FORWARD
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("row", SMALL.values(), ids=SMALL)
def test_small_shapes(row, way):
    generator = fresh_generator()
    case = drawn(generator, **{"n": 2, "c": 5, "activation": "relu6", **row})
    check_way(case, way)
    check_gradients(case, generator)


@pytest.mark.slow
@FORWARD
def test_before_tensor_cores(monkeypatch):
    """Older GPUs multiply float16 as float32."""
    monkeypatch.setattr("cnnfast.kernels.launch.capability", lambda device: (7, 5))
    case = make("inverted_residual", fresh_generator(), c=17, size=(4, 5), dtype=torch.float16, excite=False)
    check_way(case, "fused")


@FORWARD
@pytest.mark.parametrize("way", WAYS)
def test_special_values(way):
    """Channels and pixels beyond the edge of a block get no part of them."""
    case = make("inverted_residual", fresh_generator(), n=1, c=3, out=5, size=(6, 6), activation="relu6")
    for i, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        case.x[0, i, 3, 2 * i] = value
    check_way(case, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("excite", (True, False))
def test_repeatable_and_independent_of_the_batch(excite, way):
    generator = fresh_generator()
    case = make("inverted_residual", generator, n=3, c=5, size=(6, 5), activation="silu", excite=excite)
    with forced(way):
        y = run(case)
        grad = LAYOUTS["channels_last"](draw(generator, y.shape))
        first, second = gradients(case, grad), gradients(case, grad)
        for name in first:
            assert torch.equal(first[name], second[name]), name
        for name in ("x", "residual"):
            case.tensors[name] = LAYOUTS["channels_last"](case.tensors[name][1:2])
        assert torch.equal(run(case), y[1:2])
        assert torch.equal(gradients(case, LAYOUTS["channels_last"](grad[1:2]))["x"], first["x"][1:2])


@pytest.mark.parametrize("excite", (False, pytest.param(True, marks=pytest.mark.slow)))
def test_output_mask(excite):
    """Each gradient alone is the one that comes among all; the others have no elements."""
    generator = fresh_generator()
    case = make("inverted_residual", generator, n=1, c=2, out=3, size=(3, 2), activation="silu", excite=excite)
    grad = draw(generator, run(case).shape)
    every = gradients(case, grad)
    assert every["residual"].data_ptr() != grad.data_ptr()
    schema = torch.ops.cnnfast.inverted_residual.default._schema.arguments
    for bit, name in enumerate(argument.name for argument in schema if "Tensor" in str(argument.type)):
        for other, gradient in gradients(case, grad, 1 << bit).items():
            assert torch.equal(gradient, every[other]) if other == name else gradient.numel() == 0, (name, other)


def test_rule():
    """Few input channels and a cheap activation: fused; many, or a filter of many columns: e in memory."""

    def pays(C, E, K, size, k, stride, activation):
        kind = Kind(torch.bfloat16, (9, 0), tensor_cores=True)
        sizes = ((k, k), (stride, stride), (1, 1), size, size, activation)
        assert kernels.recompute_pays(kind, C, E, *sizes) in (True, False)
        return kernels.fusion_pays(kind, C, *sizes, K, C == E)

    assert pays(16, 96, 24, 56, 3, 2, 2) and pays(24, 144, 24, 56, 3, 1, 2)
    assert not pays(160, 960, 320, 7, 3, 1, 2) and not pays(112, 672, 112, 14, 5, 1, 4)
    case = make("inverted_residual", fresh_generator(), n=1, c=3, size=(3, 3))
    for way in WAYS:
        with forced(way), mock.patch.object(kernels, way, side_effect=getattr(kernels, way)) as taken:
            run(case)
        assert taken.called, way


def test_rule_follows_the_setting_and_the_device(monkeypatch):
    """An answer that is kept doesn't outlive what it was for."""
    x, weight, dw_weight, project_weight = (
        torch.empty(shape, device="meta")
        for shape in ((1, 24, 56, 56), (144, 24, 1, 1), (144, 1, 3, 3), (24, 144, 1, 1))
    )
    tensors = (x, weight, None, dw_weight, *(None,) * 5, project_weight, None, None)

    def taken(precision):
        with (
            float32_by(precision),
            mock.patch.multiple(kernels, fused=lambda *_: "fused", apart=lambda *_: "apart"),
        ):
            return kernels.inverted_residual(*tensors, [1, 1], [1, 1, 1, 1], [1, 1], 2, 0, 0)

    assert [taken(precision) for precision in ("ieee", "tf32", "ieee")] == ["apart", "fused", "apart"]
    assert taken("tf32") == "fused"
    monkeypatch.setattr("cnnfast.kernels.launch.capability", lambda device: (7, 5))
    assert taken("tf32") == "apart"


@pytest.mark.parametrize("way", WAYS)
def test_more_tiles_than_the_gates_take(way, monkeypatch):
    monkeypatch.setattr("cnnfast.kernels.channels.MOST_TILES", 1)
    case = make("inverted_residual", fresh_generator(), n=2, c=3, out=5, size=(37, 5), excite=True)
    assert case.x.shape[2] == 37
    check_way(case, way)


# (what breaks, the text to replace, its replacement); the first occurrence is taken.
FAULTS = {
    "the last channel of e left out": ("m_e = o_e < E", "m_e = o_e < E - 1"),
    "d beyond the last channel": ("tl.where(m_e[None, :], activate(accs[WINDOW - 1] + b_bias, ACTIVATION), 0.0)",
                                  "activate(accs[WINDOW - 1] + b_bias, ACTIVATION)"),
    "project_weight beyond the last channel": ("m_e[:, None] & m_k[None, :], 0.0", "m_k[None, :], 0.0"),
    "d not activated": ("activate(accs[WINDOW - 1] + b_bias, ACTIVATION)", "(accs[WINDOW - 1] + b_bias)"),
    "sums not moved on": ("accs = (zero,) + accs[: WINDOW - 1]", "accs = (zero,) * WINDOW"),
    "the first row twice": ("max(t - rows + 1, 0)", "max(t - rows + 1, 1)"),
    "the last block of e left out": ("range(0, E, BLOCK_E)", "range(0, E - BLOCK_E, BLOCK_E)"),
    "expand_bias left out": ("if expand_bias is not None", "if expand_bias is False"),
    "dw_bias left out": ("if dw_bias is not None", "if dw_bias is False"),
    "project_bias left out": ("if project_bias is not None", "if project_bias is False"),
    "the residual left out": ("b_y += tl.load(residual", "b_y += 0 * tl.load(residual"),
    "the last row not stored": ("(o_h + o < OH)", "(o_h + o < OH - 1)"),
}  # fmt: skip
GRADIENT_FAULTS = {
    "the gates forgotten in project_weight's gradient": ("if excites and wanted[9]", "if False and wanted[9]"),
    "d's slope forgotten": ("grad = depthwise.before_activation(", "depthwise.before_activation("),
    "x's gradient without its slope": ("None, None, (1, 1), activation, mask", "None, None, (1, 1), 0, mask"),
}


@pytest.mark.slow
def test_faults(tmp_path, monkeypatch):
    case = drawn(fresh_generator(1), n=1, c=2, out=3, size=(3, 5), multiplier=8, activation="sigmoid")
    case.x[0, 0, 0, 0] = float("inf")  # of which the channels beyond the last must have no part: 0 times it is NaN
    case = case.to(padded_by_nan)
    check_module = functools.partial(check_way, case, "fused")
    assert not survivors("inverted_residual", FAULTS, check_module, tmp_path, monkeypatch)


@pytest.mark.slow
def test_faults_of_gradients(tmp_path, monkeypatch):
    generator = fresh_generator(1)
    # relu6 is straight: the bound for curved activations behind each other is wide.
    case = drawn(generator, n=1, c=3, out=3, size=(3, 3), activation="relu6", excite=True)

    def check_module(module):
        check_gradients(case, generator, module=module)

    assert not survivors("inverted_residual", GRADIENT_FAULTS, check_module, tmp_path, monkeypatch)
