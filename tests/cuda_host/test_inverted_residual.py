"""csrc/cuda/inverted_residual, device code and host side, run on host threads against the reference.

Fails when a kernel's arithmetic, indexing, halos, tails or layouts are wrong, an output stays unwritten (they begin as
NaN), or the order of a block's threads or an image's neighbours show in the result.
"""

import contextlib

import numerics
import pytest
import torch
from cuda_host import harness
from cuda_host.cases.inverted_residual import (
    DTYPES,
    EMPTY,
    EXCITED,
    NETWORKS,
    ODD,
    TIGHT,
    case,
    draw_case,
    positional,
    run,
)
from numerics import channels_last

from cnnfast.ops import cuda_kernels

pytestmark = [harness.needs_toolkit, pytest.mark.usefixtures("nan_outputs", "forward_order")]
ORDERS = (harness.FORWARD, harness.REVERSE, harness.WARPS)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def crossed(large, small):
    """Rows and dtypes: in float16, which differs from bfloat16 by its conversions alone, the small ones by default."""
    return [
        pytest.param(row, dtype, id=f"{row}-{name}", marks=[pytest.mark.slow] * (name == "float16" and row in large))
        for row in large + small
        for name, dtype in DTYPES.items()
    ]


@pytest.mark.proof("host-run", kernel="inverted_residual_kernel")
@pytest.mark.parametrize(("row", "dtype"), crossed(NETWORKS, ODD + EMPTY))
def test_forward(host, row, dtype):
    drawn = draw_case(row, dtype)
    y = run(host, drawn)
    assert host.kernels_run() == ([] if row in EMPTY else ["inverted_residual_kernel"])
    drawn.check(y)
    wanted = drawn.run(backend="cpu")
    assert y.stride() == wanted.stride()


def rounded(drawn):
    """e and d; with squeeze-excite the gates, and d times these."""
    return 4 if "se_reduce_weight" in drawn.tensors else 2


@pytest.mark.proof("host-run", kernel="inverted_residual_squeeze_kernel")
@pytest.mark.parametrize(("row", "dtype"), crossed(EXCITED[:5], EXCITED[5:]))
def test_forward_with_squeeze_excite(host, row, dtype):
    drawn = draw_case(row, dtype)
    y = run(host, drawn)
    squeeze, *gates, project = host.kernels_run()
    assert squeeze == "inverted_residual_squeeze_kernel" and project.startswith("pointwise_conv2d_forward")
    many = len(drawn.tensors["se_reduce_weight"]) * len(drawn.tensors["dw_weight"]) > 2**15
    assert gates == [f"squeeze_excite_{name}_kernel" for name in (("reduce", "expand") if many else ("gate",))]
    drawn.check(y, rounded=rounded(drawn))
    assert y.stride() == drawn.run(backend="cpu").stride()


TIGHTEST = [  # every tile in one dtype, the first in all; in the others they are of as many bytes
    pytest.param(dtype, *tight, marks=[pytest.mark.slow] * (dtype != torch.bfloat16 and tight != TIGHT[0]))
    for tight in TIGHT
    for dtype in DTYPES.values()
]


@pytest.mark.parametrize(("dtype", "row_bytes", "out"), TIGHTEST)
def test_where_shared_memory_is_short(host, dtype, row_bytes, out):
    drawn = draw_case(case(row_bytes // dtype.itemsize, 40, out, (6, 6), n=1), dtype)
    results = []
    for order in ORDERS:
        host.order(order)
        results.append(run(host, drawn))
    drawn.check(results[0])
    assert results[0].equal(results[1]) and results[0].equal(results[2])


@pytest.mark.parametrize("row", NETWORKS[:3] + ODD[4:6], ids=str)
def test_tf32(host, row):
    """Each operand of both products is off by 2^-11 at most."""
    drawn = draw_case(row, torch.float32)
    y = run(host, drawn, tf32=True)
    doubles = drawn.to(lambda t: t.double())
    with numerics.activations_as_bounds():
        scale = doubles.to(torch.abs).reference(**doubles.to(torch.abs).tensors, **drawn.options)
    ref = doubles.reference(**doubles.tensors, **drawn.options)
    assert ((y - ref).abs() <= (4 * 2.0**-11 + 2.0**-20) * scale).all()
    with pytest.raises(AssertionError, match="elements are off"):
        drawn.check(y, rounded=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_biases_beside_low_precision(host, dtype):
    drawn = draw_case(NETWORKS[2], dtype, decades=0.0)
    for name in drawn.tensors:
        if name.endswith("_bias"):
            drawn.tensors[name] = drawn.tensors[name].float() + 2.0**-12
    drawn.check(run(host, drawn))


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu"])
def test_nan_and_inf(host, activation):
    drawn = draw_case(case(8, 16, 8, (7, 9), activation=activation), torch.float32, decades=0.0)
    for value, at in ((torch.nan, (0, 1, 2, 3)), (torch.inf, (1, 2, 6, 3))):
        drawn.tensors["x"][at] = value
    y = run(host, drawn)
    assert y.isnan().any()
    drawn.check(y)


def test_padding_is_of_the_expanded_tensor(host):
    """Outside of the image it is 0, not activation(bias)."""
    drawn = draw_case(case(8, 16, 8, (3, 3), activation="sigmoid"), torch.float32, decades=0.0)
    drawn.tensors["expand_bias"] += 8
    drawn.check(run(host, drawn))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "row", [NETWORKS[0], NETWORKS[1], NETWORKS[4], ODD[4], ODD[13], EXCITED[1], EXCITED[9]], ids=str
)
def test_order_of_threads_does_not_show(host, row, dtype):
    drawn = draw_case(row, dtype)
    results = []
    for order in ORDERS:
        host.order(order)
        results.append(run(host, drawn))
    assert results[0].equal(results[1]) and results[0].equal(results[2])


@pytest.mark.parametrize("row", [NETWORKS[2], EXCITED[1]], ids=str)
def test_an_image_does_not_depend_on_its_neighbours(host, row):
    drawn = draw_case(row, torch.bfloat16, n=5)
    tensors = drawn.tensors
    alone = {name: channels_last(tensors[name][3:4].clone()) for name in ("x", "residual")}
    assert run(host, drawn)[3:4].equal(run(host, drawn, **alone))


@pytest.mark.parametrize("row", [NETWORKS[2], EXCITED[1]], ids=str)
def test_misaligned_and_noncontiguous_inputs(host, row):
    """Squeeze-excite's weights are then read element by element, and so summed up in another order."""
    drawn = draw_case(row, torch.float32, n=1)
    wanted = run(host, drawn)
    for name, tensor in drawn.tensors.items():
        storage = torch.empty(tensor.numel() + 1)
        shifted = storage[1:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)
        y = run(host, drawn, **{name: shifted})
        drawn.check(y, rounded=rounded(drawn))
        assert y.equal(wanted) or name in ("se_reduce_weight", "se_expand_weight"), name
        spread = torch.stack([tensor, tensor], dim=-1)[..., 0]
        assert run(host, drawn, **{name: spread}).equal(wanted), name


@pytest.mark.parametrize("excite", [False, True])
@dtypes
def test_python_refuses_what_the_plan_cannot_place(host, excite, dtype):
    """On both sides of the limit, for every stage that takes shared memory."""
    for row in (
        case(8, 40, 16, (5, 5), excite=excite),
        case(8, 40, 300, (5, 5), k=5, excite=excite),
        case(8, None, 65, (9, 9), k=(2, 7), dilation=3, excite=excite),
        case(8, None, 16, (70, 70), k=(1, 3), s=(3, 50), excite=excite),
    ):
        drawn = draw_case(row, torch.float32, n=0).to(lambda t: t.to(dtype))
        names = [argument.name for argument in host.ops.inverted_residual.default._schema.arguments]

        def fits(change, drawn=drawn, names=names):
            tensors = {name: torch.empty(change(name, list(t.shape)), dtype=dtype) for name, t in drawn.tensors.items()}
            arguments = dict(zip(names, positional(host, drawn, **tensors), strict=True))
            refusal = cuda_kernels.refusal("inverted_residual", arguments)
            with contextlib.nullcontext() if refusal is None else pytest.raises(RuntimeError, match="don't fit"):
                host.ops.inverted_residual(*arguments.values())
            return refusal is None

        def channels(count):
            def change(name, shape):
                if name in ("x", "expand_weight"):
                    shape[1] = count
                return shape

            return change

        def taps(count):
            return lambda name, shape: [*shape[:2], shape[2], count] if name == "dw_weight" else shape

        grows = channels if row["e"] else taps
        few, many = 1, 4000
        assert fits(grows(few)) and not fits(grows(many))
        while many - few > 1:  # where it changes, both have to change
            middle = (few + many) // 2
            few, many = (middle, many) if fits(grows(middle)) else (few, middle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dtype=torch.float64), "x's dtype has to be float32, bfloat16 or float16"),
        (dict(c=4096), "don't fit the 101376 bytes of shared memory"),
        (dict(size=(3, 1), stride=(1, 2**28)), "don't fit the 101376 bytes of shared memory"),
    ],
)
def test_what_it_can_not_take(host, change, message):
    drawn = draw_case(case(8, 8, 8, (3, 3)), **{"dtype": torch.float16} | change)
    with pytest.raises(RuntimeError, match=message):
        run(host, drawn)
