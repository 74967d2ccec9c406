"""csrc/cuda/squeeze_excite, device code and host side, run on host threads against the reference.

Fails when a kernel's arithmetic, indexing, tails or layouts are wrong, an output stays unwritten (they begin as NaN),
the wrong kernel is chosen, or the order of a block's threads or the other images of the batch show in the result.
"""

import pytest
import torch
from cuda_host import harness
from cuda_host.cases.squeeze_excite import (
    CASES,
    DTYPES,
    EMPTY,
    FORMATS,
    SCHEMA,
    TWO_LAUNCHES,
    case,
    options_of,
    run,
    tensors_of,
    terms_of,
)
from numerics import LAYOUTS, assert_close_by_policy, channels_last, fresh_generator

from cnnfast import reference
from cnnfast.ops.activations import FUNCTIONS

pytestmark = [harness.needs_toolkit, pytest.mark.usefixtures("nan_outputs", "forward_order")]


def host_runs(*kernels):
    """Marks a test as the proof of these kernels."""

    def mark(function):
        for kernel in kernels:
            function = pytest.mark.proof("host-run", kernel=f"squeeze_excite_{kernel}_kernel")(function)
        return function

    return mark


def check(case, y, tensors):
    assert_close_by_policy(y, reference.squeeze_excite, **tensors, **options_of(case), terms=terms_of(case))


@host_runs("pool", "pool_nchw", "gate", "reduce", "expand", "scale", "scale_nchw")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES + TWO_LAUNCHES + EMPTY, ids=str)
def test_forward(host, case, dtype):
    tensors = tensors_of(case, dtype, fresh_generator())
    y = run(host, case, tensors)
    x = tensors["x"]
    of_layout = "_nchw" if x.is_contiguous() and x.shape[2:].numel() > 1 else ""  # C = 1 is, too
    gates = ["reduce", "expand"] if case in TWO_LAUNCHES else ["gate"]
    wanted = [f"squeeze_excite_{kernel}_kernel" for kernel in (f"pool{of_layout}", *gates, f"scale{of_layout}")]
    assert host.kernels_run() == ([] if case in EMPTY else wanted)
    check(case, y, tensors)
    assert case in EMPTY or y.stride() == x.stride()  # batch 0 is in both formats


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [CASES[0], CASES[8], TWO_LAUNCHES[1]], ids=str)
def test_float32_biases_beside_low_precision(host, case, dtype):
    tensors = tensors_of({**case, "biases": True}, dtype, fresh_generator(), bias_dtype=torch.float32)
    check(case, run(host, case, tensors), tensors)


HARD = torch.tensor(
    [0.0, -0.0, 1e-40, 1e-30, 0.55, 2.9, 6.0, 9.0, 88.0, 88.8, 104.0, 1e5, 1e19, 1e38, 3.4e38, torch.inf, torch.nan]
)


def check_hard_values(host, activation):
    """Each of the three on numbers of every size: the inner two through biases, the last one through the residual."""
    values = torch.cat([HARD, -HARD, torch.linspace(-20, 20, 94)])
    count, x = len(values), torch.ones(1, len(values), 2, 1)
    zeros = torch.zeros(count, count, 1, 1)
    eye = torch.eye(count)[..., None, None]
    finite = values.nan_to_num(0, 0, 0)  # next to an Inf or NaN a zero weight is NaN

    def of(reduce_bias, expand_weight, expand_bias, residual, **activations):
        case_ = case(x.shape, count, **{"act": None, "gate": None, "post": None} | activations)
        tensors = dict(zip(SCHEMA, (x, zeros, reduce_bias, expand_weight, expand_bias, residual), strict=True))
        check(case_, run(host, case_, tensors), tensors)

    of(finite, eye, None, None, act=activation)
    of(None, zeros, values, None, gate=activation)
    of(None, zeros, None, values.reshape(1, -1, 1, 1).expand(x.shape).contiguous(), post=activation)


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_activations_of_hard_values(host, activation):
    check_hard_values(host, activation)


def check_nan_and_inf(host, case):
    """Three of five images have one."""
    case = {**case, "shape": (5, *case["shape"][1:]), "act": "relu", "gate": "relu6", "post": "relu"}
    tensors = tensors_of(case, torch.float32, fresh_generator())
    for image, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        tensors["x"][image, 1, -1, 0] = value
    y = run(host, case, tensors)
    assert y[0].isnan().all() and not y[3].isnan().any()
    check(case, y, tensors)


@pytest.mark.parametrize("case", [CASES[0], CASES[8], CASES[10], TWO_LAUNCHES[1]], ids=str)
def test_nan_and_inf(host, case):
    check_nan_and_inf(host, case)


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[8], CASES[11], TWO_LAUNCHES[1], TWO_LAUNCHES[3]], ids=str)
def test_order_of_threads_does_not_show(host, case):
    tensors = tensors_of(case, torch.bfloat16, fresh_generator())
    results = []
    for order in (harness.FORWARD, harness.REVERSE):
        host.order(order)
        results.append(run(host, case, tensors))
    assert results[0].equal(results[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "squeezed"), [(40, 10), (264, 128)])
def test_an_image_does_not_depend_on_its_neighbours(host, channels, squeezed, layout):
    case_ = case((6, channels, 5, 4), squeezed, act="silu", residual=True, layout=layout)
    tensors = tensors_of(case_, torch.bfloat16, fresh_generator())
    whole = run(host, case_, tensors)
    for image in (0, 5):
        alone = {name: tensors[name][image : image + 1].clone() for name in ("x", "residual")}
        assert whole[image : image + 1].equal(run(host, case_, tensors | alone))


def test_misaligned_and_noncontiguous_inputs(host):
    case_ = CASES[0]
    tensors = tensors_of(case_, torch.float32, fresh_generator())
    wanted = run(host, case_, tensors)

    def shifted(tensor):
        return torch.empty(tensor.numel() + 1)[1:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    for name in ("x", "residual", "reduce_weight", "expand_weight"):
        check(case_, run(host, case_, tensors | {name: shifted(tensors[name])}), tensors)
    x, residual, weight = (tensors[name] for name in ("x", "residual", "reduce_weight"))
    wide = channels_last(torch.cat([x, x], dim=3))[..., : x.shape[3]]
    odd_weight = torch.cat([weight] * 2, dim=1)[:, : weight.shape[1]]
    other = {"x": wide, "residual": residual.contiguous(), "reduce_weight": odd_weight}
    assert run(host, case_, tensors | other).equal(wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_2_to_the_31_elements(host, layout):
    """Of the 8.6 GB that x and y are each, only the middle image's pages are touched. The block that runs is the k-th
    from the end: of sums and gates image N - 1 - k = k, and where images are taken from the last to the first, k."""
    k = 2**18 + 1
    shape = (2 * k + 1, 8, 32, 32)
    assert k * 8 * 32 * 32 > 2**31
    case_ = case(shape, 2, layout=layout)
    tensors = tensors_of({**case_, "shape": (1, *shape[1:])}, torch.bfloat16, fresh_generator())
    torch.utils.deterministic.fill_uninitialized_memory = False
    x = torch.empty(shape, dtype=torch.bfloat16, memory_format=FORMATS[layout])
    x[k : k + 1] = tensors["x"]
    host.c.host_only_block_from_end(k)
    try:
        y = run(host, case_, tensors | {"x": x})
    finally:
        host.c.host_only_block_from_end(-1)
    assert y[k : k + 1].equal(run(host, case_, tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(8, 7, 7)), r"x has 3 dimensions; \(N, C, H, W\) is wanted"),
        (dict(reduce_weight=torch.zeros(2, 9, 1, 1)), r"reduce_weight has to be \(R, C, 1, 1\) with x's 8 channels"),
        (dict(reduce_weight=torch.zeros(2, 8, 1, 1).half()), "reduce_weight's dtype has to be x's"),
        (dict(expand_weight=torch.zeros(8, 3, 1, 1)), r"expand_weight has to be \(C, R, 1, 1\), C = 8 and R = 2"),
        (dict(reduce_bias=torch.zeros(3)), "reduce_bias has to have 2 elements"),
        (dict(expand_bias=torch.zeros(8).half()), "expand_bias's dtype has to be x's or float32"),
        (dict(residual=torch.zeros(1, 8, 7, 6)), "residual has to be of x's shape"),
        (dict(gate_activation=7), "gate_activation is 7; 0 to 6 is wanted"),
    ],
)
def test_bad_arguments(host, change, message):
    arguments = dict.fromkeys(SCHEMA) | dict(activation=1, gate_activation=3, post_activation=0)
    arguments |= dict(x=torch.zeros(1, 8, 7, 7), reduce_weight=torch.zeros(2, 8, 1, 1))
    arguments |= dict(expand_weight=torch.zeros(8, 2, 1, 1)) | change
    with pytest.raises(RuntimeError, match=message):
        host.ops.squeeze_excite(*arguments.values())


def test_float64_is_refused(host):
    tensors = {name: tensor.double() for name, tensor in tensors_of(CASES[0], torch.float32, fresh_generator()).items()}
    with pytest.raises(RuntimeError, match="x's dtype has to be float32, bfloat16 or float16"):
        run(host, CASES[0], tensors)
