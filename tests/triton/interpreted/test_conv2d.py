"""conv2d's launchers with ATen's convolution of the CPU, and the pass behind it run by the interpreter.

Fails if an element is wrong by the policy of numerics.py or unwritten, a padding that ATen hasn't goes to a wrong side,
or a memory format or dtype is not what the fakes promise. test_faults shows that it would.
"""

import functools

import launchers
import pytest
import torch
from launchers import check, gradients, padded_by_nan, run, survivors
from numerics import assert_gradients_by_policy, draw, fresh_generator
from op_cases import all_pairs, identifier, make, moved_from_last_kinks

EPILOGUE = pytest.mark.proof("interpreted", kernel="conv2d_epilogue_kernel")
FACTORS = {
    "dtype": (torch.float32, torch.float64, torch.float16),
    "layout": ("channels_last", "nchw"),
    "k": ((3, 3), (2, 3), (1, 1)),
    "stride": (1, 2, (3, 1)),
    "dilation": (1, (2, 1)),
    "padding": ("same", 0, (1, 0, 2, 3), (0, 2, 1, 0), 1),
    "activation": ("relu6", None, "relu", "silu"),
    "bias": (True, False),
    "residual": (True, False),
    "size": ((5, 7), (6, 5)),
}
FAST = all_pairs(FACTORS)
ALL = all_pairs(FACTORS | {"c": (1, 3, 24), "out": (1, 5, 40), "size": ((13, 9), (14, 17))})
SMALL = {
    "1x1 image": dict(size=(1, 1), padding=1),
    "W=1": dict(size=(5, 1), padding=1),
    "C=1": dict(c=1, out=1, size=(5, 4)),
    "batch 0": dict(n=0, size=(4, 4)),
    "stride > size": dict(size=(2, 3), stride=4, padding=1),
    "rows that no window reaches": dict(size=(8, 9), stride=3, padding=(1, 0, 0, 0)),
}


def terms(case, shape):
    pixels = max(shape[0] * shape[2] * shape[3], 1)
    taps = case.tensors["weight"].shape[2:].numel()
    return {"x": taps * shape[1], "weight": pixels, "bias": pixels, "residual": 1}


check_gradients = functools.partial(launchers.check_gradients, terms=terms, rounded=2)  # of the result, of its gradient


def away_from_kinks(generator, **row):
    """ATen rounds what the pass behind it adds to and activates."""
    return moved_from_last_kinks(launchers.away_from_kinks("conv2d", generator, **row))


@EPILOGUE
@pytest.mark.parametrize("row", FAST, ids=identifier)
def test_forward(row):
    check(make("conv2d", fresh_generator(), n=1, decades=3.0, **row))


@EPILOGUE
@pytest.mark.parametrize("row", FAST, ids=identifier)
def test_gradients(row):
    generator = fresh_generator()
    check_gradients(away_from_kinks(generator, n=1, **row), generator)


@pytest.mark.slow
@pytest.mark.parametrize("row", ALL, ids=identifier)
def test_all_pairs(row):
    generator = fresh_generator()
    check(make("conv2d", generator, decades=3.0, **row))
    check_gradients(away_from_kinks(generator, **row), generator)


@EPILOGUE
@pytest.mark.parametrize("layout", ("channels_last", "nchw"))
@pytest.mark.parametrize("row", SMALL.values(), ids=SMALL.keys())
def test_small_shapes(row, layout):
    generator = fresh_generator()
    case = away_from_kinks(generator, **{"n": 1, "c": 5, "activation": "relu6", "layout": layout, **row})
    check(case)
    check_gradients(case, generator)


@EPILOGUE
@pytest.mark.parametrize("layout", ("channels_last", "nchw"))
def test_float32_bias(layout):
    """As autocast passes it: added after the rounding, in float32."""
    generator = fresh_generator()
    case = make("conv2d", generator, n=2, c=6, size=(5, 7), dtype=torch.float16, activation="gelu", layout=layout)
    case.tensors["bias"] = draw(generator, case.tensors["bias"].shape)
    check(case)
    grad = draw(generator, run(case).shape, torch.float16)
    ours = gradients(case, grad)
    assert ours["bias"].dtype is torch.float32
    ours["bias"] = ours["bias"].half()  # the bound counts roundings of its dtype, and those before it are x's
    assert_gradients_by_policy(
        ours, case.reference, grad, case.tensors, case.options, terms=terms(case, grad.shape), rounded=2
    )


def test_special_values():
    case = make("conv2d", fresh_generator(), n=1, c=3, size=(9, 9), activation="relu6")
    for i, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        case.x[0, i, 1 + 3 * i, 3] = value
    check(case)


def test_inputs_that_are_not_dense():
    generator = fresh_generator()
    case = make("conv2d", generator, n=2, c=6, size=(4, 5))
    for x in (
        draw(generator, (2, 4, 5, 12)).permute(0, 3, 1, 2)[:, ::2],
        draw(generator, (2, 4, 5, 12)).permute(0, 3, 1, 2)[:, :6],
    ):
        case.tensors["x"] = x
        check(case)


@pytest.mark.parametrize("output_mask", (0b0001, 0b0010, 0b0100, 0b1000))
def test_output_mask(output_mask):
    generator = fresh_generator()
    case = make("conv2d", generator, n=1, c=3, size=(4, 4))
    grad = draw(generator, run(case).shape)
    every, some = gradients(case, grad), gradients(case, grad, output_mask)
    for i, name in enumerate(every):
        assert torch.equal(some[name], every[name]) if output_mask >> i & 1 else some[name].numel() == 0, name


def test_gradients_are_new_tensors():
    """An op's outputs may not be views of its inputs."""
    generator = fresh_generator()
    case = make("conv2d", generator, n=1, c=3, size=(4, 4), activation=None)
    grad = draw(generator, run(case).shape)
    assert gradients(case, grad)["residual"].data_ptr() != grad.data_ptr()


# (what breaks, the text to replace, its replacement); the first occurrence is taken.
FAULTS = {
    "the last numbers left out": ("mask = o < vectors", "mask = o < -1 + vectors"),
    "bias of another channel": ("o % K if", "(o + 1) % K if"),
    "the residual forgotten": ("if residual is not None:\n        b_y +=", "if False:\n        b_y +="),
    "no activation": ("activate(b_y, ACTIVATION)", "b_y"),
    "the activation's gate forgotten": ("gate(b_y, b_g, ACTIVATION)", "b_g"),
    "zeros on the wrong sides": ("(left, right, top, bottom)  #", "(right, left, bottom, top)  #"),
    "a gradient's zeros left in place": ("[-n for n in self.zeros]", "[0, 0, 0, 0]"),
}


@pytest.mark.slow
def test_faults(tmp_path, monkeypatch):
    generator = fresh_generator(1)
    row = dict(n=1, c=5, size=(5, 5), padding=(0, 2, 1, 3), activation="relu")
    case = away_from_kinks(generator, **row).to(padded_by_nan)
    mixed = make("conv2d", generator, **row | {"dtype": torch.float16})
    mixed.tensors["bias"] = draw(generator, mixed.tensors["bias"].shape)

    def check_module(module):
        check(case, module)
        check(mixed, module)
        check_gradients(case, generator, module=module)

    assert not survivors("conv2d", FAULTS, check_module, tmp_path, monkeypatch)
