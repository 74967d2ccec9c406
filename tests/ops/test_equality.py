"""Plain and packed ops against the reference, by the policy of numerics.py, with outputs NaN-filled.

Fails if any element is wrong or unwritten, or the output's memory format isn't what the fake promises, for any pair of
(dtype, layout, kernel, stride, dilation, padding, activation, channels mod 16, multiplier), shapes of real networks in
small, odd shapes, inputs that aren't contiguous, NaN and Inf.
"""

import math
from pathlib import Path

import pytest
import torch
from numerics import LAYOUTS, channels_last, fresh_generator
from op_cases import DTYPES, NONCONTIGUOUS, OPS, Case, all_pairs, identifier, make, padded_copy

from cnnfast.ops import activations

pytestmark = pytest.mark.usefixtures("nan_outputs")

PAIRS = all_pairs(
    {
        "dtype": DTYPES,
        "layout": tuple(LAYOUTS),
        "k": ((3, 3), (1, 1), (2, 2), (5, 5), (7, 7), (1, 3), (3, 2)),
        "stride": (1, 2, 3, (2, 1)),
        "dilation": (1, 2, (1, 3)),
        "padding": ("same", 0, 1, (1, 0, 2, 3), (0, 2)),
        "activation": tuple(activations.CODES),
        "c": (16, 1, 3, 17, 40, 31),
        "multiplier": (1, 2, 3),
        "expand": (True, False),
        "excite": (True, False),
        "pointwise_first": (True, False),
        "bias": (True, False),
        "residual": (True, False),
        "size": ((19, 20), (20, 31)),
    }
)

# (in, out, expanded / in, size, k, stride): out and expanded where the op has them
NETWORKS = {
    "depthwise_conv2d": [
        (32, 0, 1, 14, 3, 1),
        (64, 0, 1, 15, 3, 2),
        (144, 0, 1, 14, 5, 2),
        (240, 0, 1, 7, 5, 1),
        (672, 0, 1, 7, 5, 2),
        (728, 0, 1, 10, 3, 1),
        (1152, 0, 1, 7, 3, 1),
    ],
    "pointwise_conv2d": [
        (32, 16, 1, 14, 1, 1),
        (24, 144, 1, 9, 1, 1),
        (128, 256, 1, 9, 1, 2),
        (256, 728, 1, 5, 1, 2),
        (728, 728, 1, 5, 1, 1),
        (320, 1280, 1, 3, 1, 1),
    ],
    "separable_conv2d": [
        (64, 128, 1, 10, 3, 1),
        (32, 64, 1, 14, 3, 2),
        (256, 728, 1, 7, 3, 1),
        (728, 728, 1, 7, 3, 1),
        (728, 1024, 1, 5, 3, 1),
        (1024, 1536, 1, 4, 3, 1),
    ],
    "inverted_residual": [
        (16, 24, 6, 16, 3, 2),
        (24, 24, 6, 14, 3, 1),
        (24, 40, 6, 14, 5, 2),
        (80, 112, 6, 7, 5, 1),
        (112, 192, 6, 7, 5, 2),
        (192, 320, 6, 4, 3, 1),
    ],
    "conv2d": [(3, 32, 1, 35, 3, 2), (3, 64, 1, 21, 7, 2), (32, 64, 1, 14, 3, 1), (128, 128, 1, 7, 3, 1)],
    "squeeze_excite": [(96, 0, 1, 14, 1, 1), (480, 0, 1, 7, 1, 1), (672, 0, 1, 5, 1, 1), (256, 0, 1, 14, 1, 1)],
}

# one image row or column, one pixel, stride beyond the image, prime sizes, kernel as large as the padded image
ODD = [
    {"c": 1, "size": (1, 1), "k": (1, 1), "padding": 0, "out": 1, "n": 1},
    {"c": 17, "size": (1, 1), "k": (3, 3), "padding": 1, "out": 31},
    {"c": 3, "size": (7, 1), "k": (3, 1), "padding": (1, 0), "out": 17},
    {"c": 40, "size": (1, 37), "k": (3, 3), "padding": "same", "stride": 2, "out": 5},
    {"c": 16, "size": (2, 3), "k": (3, 3), "padding": 1, "stride": 5, "out": 33},
    {"c": 5, "size": (11, 13), "k": (7, 7), "padding": 3, "dilation": 2, "out": 7},
    {"c": 33, "size": (4, 5), "k": (4, 5), "padding": 0, "out": 16},
    {"c": 8, "size": (3, 2), "k": (3, 3), "padding": (4, 0, 0, 5), "out": 48},  # outputs that see padding only
    {"c": 13, "size": (53, 3), "k": (5, 2), "padding": "same", "stride": (1, 3), "out": 15},
    {"c": 2, "size": (19, 23), "k": (3, 3), "padding": "same", "stride": 2, "multiplier": 7, "out": 3},
    {"c": 64, "size": (2, 30), "k": (3, 3), "padding": (100, 100, 1, 1)},  # bands of rows that see padding only
]


def check_both_forms(case: Case) -> torch.Tensor:
    ours = case.run()
    case.check(ours)
    like = torch.empty_strided(case.x.shape, case.x.stride(), dtype=case.x.dtype, device="meta")
    meta = case.to(lambda t: t.to("meta"))
    assert ours.stride() == meta.run(x=like).stride()
    packed = case.run_packed()
    assert packed.stride() == ours.stride()
    case.check(packed, packed=True)
    return ours


@pytest.mark.parametrize("row", PAIRS, ids=identifier)
@pytest.mark.parametrize("op", OPS)
def test_all_pairs(op, row):
    check_both_forms(make(op, fresh_generator(), **row, decades=row["c"] % 2 * 3))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "row"), [(op, row) for op in OPS for row in NETWORKS[op]], ids=str)
def test_shapes_of_networks(op, row, layout):
    c, out, expand, size, k, stride = row
    case = make(
        op,
        fresh_generator(),
        n=1,
        c=c,
        out=out,
        size=(size, size),
        k=(k, k),
        stride=stride,
        multiplier=expand,
        activation="relu6" if op == "inverted_residual" else "relu",
        layout=layout,
        decades=3,
    )
    check_both_forms(case)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("row", ODD, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_odd_shapes(op, row, dtype):
    check_both_forms(make(op, fresh_generator(), **row, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_batch_of_none(op, layout):
    case = make(op, fresh_generator(), n=0, layout=layout)
    expected = case.reference(**case.tensors, **case.options).shape
    assert case.run().shape == case.run_packed().shape == expected and expected[0] == 0


@pytest.mark.parametrize("op", OPS)
def test_memory_format_follows_x(op):
    case = make(op, fresh_generator(), layout="channels_last")
    assert case.run().is_contiguous(memory_format=torch.channels_last)
    assert case.run(x=case.x.contiguous()).is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", NONCONTIGUOUS)
@pytest.mark.parametrize("op", OPS)
def test_x_not_contiguous(op, change, layout):
    case = make(op, fresh_generator(), c=19, layout=layout)
    case.tensors["x"] = NONCONTIGUOUS[change](case.x)
    if "expanded" not in change and change != "transposed":
        check_both_forms(case)
    else:
        case.check(case.run())
        case.check(case.run_packed(), packed=True)


@pytest.mark.parametrize("op", OPS)
def test_parameters_and_residual_not_contiguous(op):
    case = make(op, fresh_generator(), c=19)
    for name, tensor in case.tensors.items():
        if name == "residual":
            case.tensors[name] = tensor.contiguous()  # beside a channels_last x
        elif name.endswith("bias"):
            case.tensors[name] = torch.stack((tensor, tensor * math.nan), dim=1)[:, 0]
        elif name != "x":
            case.tensors[name] = padded_copy(tensor.contiguous(), 0)
    check_both_forms(case)
    for name, tensor in case.tensors.items():
        if tensor.dim() == 4 and name not in ("x", "residual"):
            case.tensors[name] = channels_last(tensor)  # as model.to(memory_format=channels_last) leaves it
    check_both_forms(case)


@pytest.mark.parametrize("activation", activations.CODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_nan_and_inf(op, dtype, activation):
    """As PyTorch's: NaN passes through relu and relu6, Inf through relu; neither reaches elements that don't see it
    (conv2d's in bfloat16: where a window's rows are whole tiles of AMX)."""
    case = make(op, fresh_generator(), activation=activation, dtype=dtype, n=4, size=(9, 9), c=32)
    if activation == "relu6":  # so that Inf is not clamped before it counts
        case.options.pop("pre_activation", None)
    case.x[0, 1, 4, 4] = math.nan
    case.x[1, 2, 4, 4] = math.inf
    case.x[2, 3, 0, 0] = -math.inf
    ours = check_both_forms(case)
    assert ours.isnan().any() and not ours.isnan().all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("op", OPS)
def test_float32_bias_beside_low_precision(op, dtype):
    """What autocast passes. Fails if the bias is rounded: it is drawn with more bits than the dtype has."""
    case = make(op, fresh_generator(), dtype=dtype, activation=None)
    for name, tensor in case.tensors.items():
        if name.endswith("bias"):
            case.tensors[name] = torch.full_like(tensor, 1 + 2**-12, dtype=torch.float32)
        elif name.endswith("weight"):
            tensor.mul_(2**-6)
    check_both_forms(case)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_repeatable_and_independent(op, layout, dtype):
    """Bitwise: from call to call, of neighbours in the batch, of the number of threads (ATen: from call to call)."""
    case = make(op, fresh_generator(), n=5, c=40, out=72, size=(23, 17), layout=layout, dtype=dtype)
    for run in (case.run, case.run_packed):
        first = run()
        assert torch.equal(run(), first)
        if op == "conv2d" and run == case.run:
            continue
        image = {name: tensor[3:4] for name, tensor in case.tensors.items() if name in ("x", "residual")}
        assert torch.equal(run(**image), first[3:4])
        threads = torch.get_num_threads()
        try:
            for other in (1, 2, 3):
                torch.set_num_threads(other)
                assert torch.equal(run(), first)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_more_elements_than_32_bits_count(op):
    """Fails if an offset is computed in 32 bits: only the last image's last rows are compared."""
    n, c, size = 3, 64, (3600, 3600)  # 2.5e9 elements of bfloat16, 5 GB, and as much again for the output
    meminfo = Path("/proc/meminfo").read_text()
    available = int(meminfo.split("MemAvailable:")[1].split()[0]) << 10
    if available < 24 << 30:
        pytest.skip(f"needs 24 GB of free memory, there are {available >> 30}")
    case = make(op, fresh_generator(), n=1, c=c, size=(16, size[1]), out=c, dtype=torch.bfloat16, residual=False)
    x = torch.zeros((n, c, *size), dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    x[-1, :, -16:] = case.x[0]
    ours = case.run(x=x)
    expected = case.reference(**{**case.tensors, "x": case.x}, **case.options)
    torch.testing.assert_close(ours[-1:, :, -8:], expected[:, :, -8:], rtol=0.05, atol=0.05)
