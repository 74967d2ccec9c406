"""The Triton kernels of squeeze_excite, run by the interpreter on CPU tensors through their launchers.

Fails if an element is wrong by the policy of numerics.py or unwritten (outputs and scratch are NaN-filled), if an
image's result depends on its neighbours, or a memory format or dtype is not what the fakes promise. test_faults shows
that it would: it breaks a copy of the kernels, a line at a time, and wants the same checks to fail.
"""

import functools
import importlib

import launchers
import pytest
import torch
from launchers import arguments, check, gradients, padded_by_nan, run, survivors
from numerics import LAYOUTS, draw, fresh_generator
from op_cases import NONCONTIGUOUS, all_pairs, identifier, make

KERNELS = ("product", "bwd_weight", "scale")
PROOF = [pytest.mark.proof("interpreted", kernel=f"squeeze_excite_{kernel}_kernel") for kernel in KERNELS]
pytestmark = [*PROOF, pytest.mark.proof("interpreted", kernel="channel_sums_kernel")]
FACTORS = {
    "dtype": (torch.float32, torch.float16, torch.float64),
    "layout": ("channels_last", "nchw"),
    "activation": ("relu", "silu", None),
    "gate_activation": ("sigmoid", "relu6"),
    "post_activation": ("relu", None, "gelu"),
    "c": (9, 3),
    "bias": (True, False),
    "residual": (True, False),
    "size": ((2, 3), (3, 1)),
}
FAST = all_pairs(
    {name: FACTORS[name][:2] for name in ("layout", "activation", "post_activation", "c", "bias", "residual")}
)
ACTIVATIONS = (None, "relu", "relu6", "sigmoid", "silu", "gelu", "tanh")
ALL = all_pairs(
    FACTORS
    | dict.fromkeys(("activation", "gate_activation", "post_activation"), ACTIVATIONS)
    | {"c": (1, 3, 16, 24, 40, 70), "n": (1, 2, 6), "size": ((1, 1), (9, 7), (5, 1), (19, 17))}
)
SMALL = {
    "two groups of images": dict(n=5, c=2, size=(1, 2)),
    "two tiles of pixels": dict(c=1, size=(19, 15)),
    "three blocks of channels": dict(c=70, size=(1, 1)),
    "1x1 image": dict(size=(1, 1)),
    "W=1": dict(size=(5, 1)),
    "C=1": dict(c=1, size=(2, 2)),
}


def terms(case, shape):
    squeezed, channels = case.tensors["reduce_weight"].shape[:2]
    return dict.fromkeys(case.tensors, max(shape[2] * shape[3], channels, squeezed, shape[0]))


check_gradients = functools.partial(launchers.check_gradients, terms=terms)


def drawn(generator, gate_activation="sigmoid", post_activation="relu", **row):
    def changed(case):
        case.options |= {"gate_activation": gate_activation, "post_activation": post_activation}
        return case

    return launchers.drawn_away_from_kinks(
        lambda: changed(make("squeeze_excite", generator, away_from_kinks=True, **row))
    )


def check_row(row):
    generator = fresh_generator()
    case = drawn(generator, **row)
    check(case)
    check_gradients(case, generator)


def mostly_slow(values, fast, names=None):
    """As parameters, of which the default run has the first few."""
    slow = pytest.mark.slow
    names = map(str, values) if names is None else names
    return [
        pytest.param(v, id=id, marks=[slow] * (i >= fast)) for i, (v, id) in enumerate(zip(values, names, strict=True))
    ]


@pytest.mark.parametrize("row", FAST, ids=identifier)
def test_pairs(row):
    check_row({"n": 1, "size": (2, 3), **row})


@pytest.mark.parametrize("dtype", (torch.float16, torch.float64))
def test_dtypes(dtype):
    check_row(dict(n=1, c=5, size=(2, 1), activation="silu", post_activation="gelu", dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("row", ALL, ids=identifier)
def test_all_pairs(row):
    check_row(row)


@pytest.mark.parametrize("row", mostly_slow(SMALL.values(), 2, SMALL))
def test_small_shapes(row):
    check_row({"n": 1, "c": 5, "activation": "relu", **row})


def fakes(case, name, **more):
    meta = case.to(lambda tensor: torch.empty_strided(tensor.shape, tensor.stride(), device="meta"))
    return getattr(torch.ops.cnnfast, name)(*arguments(meta, name, **more))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_of_none(layout):
    """Gradients of the weights are zeros then."""
    case = make("squeeze_excite", fresh_generator(), n=0, c=4, size=(2, 3), layout=layout)
    assert run(case).stride() == fakes(case, "squeeze_excite").stride()
    computed = gradients(case, case.x)
    promised = fakes(case, "squeeze_excite_backward", grad=case.x.to("meta"), output_mask=0b111111)
    for (name, gradient), fake in zip(computed.items(), promised, strict=True):
        assert (gradient.shape, gradient.stride()) == (fake.shape, fake.stride()), name
        assert name in ("x", "residual") or not gradient.any()


@pytest.mark.parametrize("layout", mostly_slow(LAYOUTS, 1))
def test_special_values(layout):
    """They spread over all channels of their image, through the gates, and to no other image."""
    case = make("squeeze_excite", fresh_generator(), n=4, c=3, size=(2, 2), activation="relu6", layout=layout)
    for i, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        case.x[i, 1, 0, 1] = value
    check(case)
    assert run(case)[3].isfinite().all()


@pytest.mark.parametrize("change", mostly_slow(NONCONTIGUOUS, 1))
def test_inputs_that_are_not_dense(change):
    generator = fresh_generator()
    case = drawn(generator, n=2, c=4, size=(3, 2))
    residual = LAYOUTS["nchw"](case.tensors["residual"])  # not x's format
    case.tensors |= {"x": NONCONTIGUOUS[change](case.x), "residual": residual}
    case.tensors["expand_weight"] = draw(generator, (2, 4, 1, 1)).transpose(0, 1)
    check(case)
    grad = draw(generator, case.x.shape).transpose(2, 3).contiguous().transpose(2, 3)
    ours = gradients(case, grad)
    assert ours["residual"].stride() == residual.stride()
    dense = case.to(lambda tensor: tensor.clone(memory_format=torch.contiguous_format))
    for name, gradient in gradients(dense, grad.contiguous()).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", mostly_slow(LAYOUTS, 1))
def test_repeatable_and_independent_of_the_batch(layout):
    generator = fresh_generator()
    case = drawn(generator, n=6, c=5, size=(3, 3), post_activation="silu", layout=layout)
    grad = LAYOUTS[layout](draw(generator, case.x.shape))
    y, first, second = run(case), gradients(case, grad), gradients(case, grad)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    for name in ("x", "residual"):
        case.tensors[name] = case.tensors[name][5:]
    assert torch.equal(run(case), y[5:])
    alone = gradients(case, grad[5:])
    assert torch.equal(alone["x"], first["x"][5:]) and torch.equal(alone["residual"], first["residual"][5:])


@pytest.mark.parametrize("post_activation", mostly_slow(("gelu", "relu", None), 1))
def test_output_mask(post_activation):
    generator = fresh_generator()
    case = drawn(generator, n=1, c=3, size=(2, 2), post_activation=post_activation)
    grad = draw(generator, case.x.shape)
    every = gradients(case, grad)
    assert every["residual"].data_ptr() != grad.data_ptr()
    for bit, wanted in enumerate(every):
        some = gradients(case, grad, 1 << bit)
        for name, gradient in some.items():
            assert torch.equal(gradient, every[name]) if name == wanted else gradient.numel() == 0, (wanted, name)


# (what breaks, the text to replace, its replacement); the first occurrence is taken.
SLOPE = "gradient_through(tl.load(z + (i_n + n) * inputs + o_i, m_v, 0.0), b_v, ACTIVATION)"
FAULTS = {
    "a sum, not a mean": ("b_v /= divisor", "b_v /= 1"),
    "the last channel left out": ("m_v = (o_i < inputs)", "m_v = (o_i < inputs - 1)"),
    "the weight transposed": ("(o_j * w_j)[:, None] + (o_i * w_i)", "(o_j * w_i)[:, None] + (o_i * w_j)"),
    "no bias": ("b_y += tl.load(bias", "b_y += 0 * tl.load(bias"),
    "the hidden layer not activated": ("b_v = activate(b_v, ACTIVATION)", "b_v = b_v"),
    "the gates not activated": ("0.0), GATE_ACTIVATION)", "0.0), 0)"),
    "residual left out": ("if residual is not None", "if residual is False"),
    "the last pixel not stored": ("o_p = i_tile % n_p * BLOCK_P + ", "o_p = i_tile % n_p * BLOCK_P + 1 + "),
}
GRADIENT_FAULTS = {
    "an activation's slope forgotten": (SLOPE, "b_v"),
    "an image left out of a weight's gradient": ("m_g = (o_n < images)", "m_g = (o_n < images - 1)"),
    "the mean's share not divided": ("b_share /= pixels", "b_share /= 1"),
    "the mean's share left out": ("if share is not None", "if share is False"),
    "a weight's gradient twice": ("return grad_weight, grad_bias", "return grad_weight * 2, grad_bias"),
}
SUM_FAULTS = {
    "a tile left out": ("(i_tile // tiles).to(tl.int64), first", "(i_tile // tiles).to(tl.int64), 0"),
    "a tile's last pixel left out": ("(o_p < tile_pixels)", "(o_p < tile_pixels - 1)"),
    "a pixel in two tiles": ("tiles * tile_pixels\n", "tiles * (tile_pixels - 1)\n"),
    "a sum, not a product": ("b_x *= ", "b_x += "),
}


ROW = dict(n=2, c=3, size=(2, 3), activation="silu", gate_activation="sigmoid")


@pytest.mark.slow
def test_faults(tmp_path, monkeypatch):
    case = drawn(fresh_generator(1), **ROW).to(padded_by_nan)
    assert not survivors("squeeze_excite", FAULTS, functools.partial(check, case), tmp_path, monkeypatch)


@pytest.mark.slow
def test_faults_of_gradients(tmp_path, monkeypatch):
    generator = fresh_generator(1)
    case = drawn(generator, **ROW, post_activation=None, residual=False).to(padded_by_nan)
    check_module = functools.partial(check_gradients, case, generator)
    assert not survivors(
        "squeeze_excite", GRADIENT_FAULTS, lambda module: check_module(module=module), tmp_path, monkeypatch
    )


@pytest.mark.slow
def test_faults_of_sums(tmp_path, monkeypatch):
    generator = fresh_generator(1)
    case = drawn(generator, **ROW | dict(n=1, c=1, size=(19, 15), layout="nchw"), post_activation=None)

    def check_module(module):
        module = importlib.import_module(f"{module.__package__}.squeeze_excite")
        check(case, module)
        check_gradients(case, generator, module=module)

    assert not survivors("channels", SUM_FAULTS, check_module, tmp_path, monkeypatch)
