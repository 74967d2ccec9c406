"""csrc/cuda/pointwise_conv2d, device code and host side, run on host threads against the reference.

Fails when a kernel's arithmetic, indexing, tails or layouts are wrong, an output stays unwritten (they begin as NaN),
the wrong kernel is chosen, or the order of a block's threads, the tile or an image's neighbours show in the result.
"""

import pytest
import torch
from cuda_host import harness
from cuda_host.cases.pointwise_conv2d import (
    DTYPES,
    EMPTY,
    FORMATS,
    GENERIC,
    VECTORIZED,
    case,
    is_vectorized,
    options_of,
    run,
    tensors_of,
)
from numerics import assert_close_by_policy, channels_last, draw, fresh_generator

from cnnfast import reference

pytestmark = [harness.needs_toolkit, pytest.mark.usefixtures("nan_outputs", "forward_order")]
ORDERS = (harness.FORWARD, harness.REVERSE, harness.WARPS)
TILES = {0: (128, 256), 3: (64, 256), 132: (64, 128)}  # by multiprocessors: output channels, threads


@pytest.fixture
def multiprocessors(host):
    yield host.c.host_set_multiprocessors
    host.c.host_set_multiprocessors(132)


def proof(test):
    for kernel in ("forward", "forward_generic"):
        test = pytest.mark.proof("host-run", kernel=f"pointwise_conv2d_{kernel}_kernel")(test)
    return test


def check(y, case, tensors):
    assert_close_by_policy(
        y, reference.pointwise_conv2d, **tensors, **options_of(case), terms=case["c"] + 2, rounded=int(case["gate"])
    )


@proof
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", VECTORIZED + GENERIC + EMPTY, ids=str)
def test_forward(host, case, dtype):
    tensors = tensors_of(case, dtype, fresh_generator())
    y = run(host, case, **tensors)
    wanted = "pointwise_conv2d_forward_" + ("kernel" if is_vectorized(case) else "generic_kernel")
    assert host.kernels_run() == ([] if case in EMPTY else [wanted])
    check(y, case, tensors)
    if all(t.numel() and t.shape[1] > 1 and t.shape[2:] != (1, 1) for t in (tensors["x"], y)):  # not in both formats
        assert y.is_contiguous(memory_format=FORMATS[case["layout"]])


@pytest.mark.parametrize("case", [VECTORIZED[2], VECTORIZED[4], VECTORIZED[8]], ids=str)
def test_tf32(host, case):
    """What the product of the rounded operands is; and the option is for float32 alone."""
    tensors = tensors_of(case, torch.float32, fresh_generator())
    if case["gate"]:
        tensors |= {"x": tensors["x"] * tensors["gate"], "gate": None}
    y = run(host, case, **tensors, tf32=True)

    def rounded(t):  # to nearest, ties away from zero
        return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    operands = {name: rounded(tensors[name]) for name in ("x", "weight")}
    check(y, case | {"gate": False}, tensors | operands)
    assert not y.equal(run(host, case, **tensors))
    low = {name: t if t is None else t.half() for name, t in tensors.items()}
    assert run(host, case, **low, tf32=True).equal(run(host, case, **low))


def test_tf32_rounds_what_the_gate_gave(host):
    case_ = VECTORIZED[2]
    tensors = tensors_of(case_, torch.float32, fresh_generator())
    before = tensors | {"x": tensors["x"] * tensors["gate"], "gate": None}
    assert run(host, case_, **tensors, tf32=True).equal(run(host, case_, **before, tf32=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [VECTORIZED[2], GENERIC[0]], ids=str)
def test_float32_bias_beside_low_precision(host, case, dtype):
    tensors = tensors_of(case, dtype, fresh_generator(), bias_dtype=torch.float32)
    tensors["bias"] += 1000.0 + 2.0**-5 * torch.arange(case["k"])  # more than the low precision holds
    check(run(host, case, **tensors), case, tensors)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "gelu"])
@pytest.mark.parametrize("c", [24, 5])
def test_nan_and_inf(host, c, activation, dtype):
    """Where PyTorch has them, and in no pixel or channel beside: what lies beyond a row's end counts as zero."""
    case_ = case(2, c, c, (5, 6), act=activation, residual=True)
    tensors = tensors_of(case_, dtype, fresh_generator())
    for value, at in ((torch.nan, (0, 0, 2, 3)), (torch.inf, (0, 1, 3, 3)), (-torch.inf, (1, 0, 1, 1))):
        tensors["x"][at] = value
    tensors["weight"][1, 0] = torch.nan
    y = run(host, case_, **tensors)
    wanted = reference.pointwise_conv2d(**tensors, **options_of(case_))
    assert y.isnan().any() and y.isnan().equal(wanted.isnan())
    assert y.isinf().equal(wanted.isinf()) and y[y.isinf()].equal(wanted[wanted.isinf()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [VECTORIZED[2], VECTORIZED[4], VECTORIZED[8], GENERIC[0]], ids=str)
def test_order_of_threads_does_not_show(host, case, dtype):
    tensors = tensors_of(case, dtype, fresh_generator())
    results = []
    for order in ORDERS:
        host.order(order)
        results.append(run(host, case, **tensors))
    assert all(result.equal(results[0]) for result in results[1:])


@pytest.mark.parametrize(
    ("dtype", "tf32"),
    [
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, False),
        pytest.param(torch.float16, False, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("gate", [False, True])
def test_every_tile_gives_the_same_bits(host, multiprocessors, gate, dtype, tf32):
    case_ = case(2, 40, 120, (9, 15), act="silu", gate=gate, residual=True)
    tensors = tensors_of(case_, dtype, fresh_generator())
    results = []
    for count, (columns, threads) in TILES.items():
        multiprocessors(count)
        [launch] = host.count(lambda: results.append(run(host, case_, **tensors, tf32=tf32)))
        rows = 64 if threads == 128 else 128
        tiles = 2 * -(-135 // rows) if gate else -(-270 // rows)
        assert launch["grid"][0] == tiles * -(-120 // columns) and launch["block"][0] == threads
        assert results[-1].equal(results[0])


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("case", [case(5, 40, 72, (7, 9)), case(5, 3, 7, (4, 5))], ids=str)
def test_an_image_does_not_depend_on_its_neighbours(host, multiprocessors, case, gate):
    case = case | {"gate": gate, "residual": True}
    tensors = tensors_of(case, torch.bfloat16, fresh_generator())
    multiprocessors(2)
    whole = run(host, case, **tensors)
    alone = {name: tensors[name][3:4] for name in ("x", "gate", "residual") if tensors[name] is not None}
    assert whole[3:4].equal(run(host, case, **(tensors | alone)))


def test_misaligned_and_noncontiguous_inputs(host):
    case_ = VECTORIZED[2]
    tensors = tensors_of(case_, torch.float32, fresh_generator())
    wanted = run(host, case_, **tensors)
    for name in ("x", "weight", "gate", "residual", "bias"):
        t = tensors[name]
        storage = torch.empty(t.numel() + 1)
        shifted = storage[1:].as_strided(t.shape, t.stride())
        shifted.copy_(t)
        host.kernels_run()
        torch.testing.assert_close(run(host, case_, **(tensors | {name: shifted})), wanted)
        assert host.kernels_run() == ["pointwise_conv2d_forward_generic_kernel"]
    x = tensors["x"]
    wide = torch.cat([x, x], dim=3).contiguous(memory_format=torch.channels_last)[..., : x.shape[3]]
    assert run(host, case_, **(tensors | {"x": wide})).equal(wanted)
    nchw = tensors["residual"].contiguous()
    assert run(host, case_, **(tensors | {"residual": nchw})).equal(wanted)
    every_second = torch.stack([tensors["gate"]] * 2, 2).flatten(1, 2)[:, ::2]
    assert run(host, case_, **(tensors | {"gate": every_second})).equal(wanted)


@pytest.mark.parametrize("gate", [False, True])
def test_more_than_2_to_the_31_elements(host, gate):
    """Only the block of the last elements runs: of the 4.3 GB that x and y are each, few pages are ever touched."""
    height, width, channels = 16384, 16400, 8
    assert height * width * channels > 2**31
    torch.utils.deterministic.fill_uninitialized_memory = False  # nan_outputs restores it
    x = torch.empty((1, channels, height, width), dtype=torch.bfloat16, memory_format=torch.channels_last)
    generator = fresh_generator()
    x[..., -1:, :] = draw(generator, (1, channels, 1, width), torch.bfloat16)
    weight = draw(generator, (channels, channels, 1, 1), torch.bfloat16)
    by = draw(generator, (1, channels, 1, 1), torch.bfloat16) if gate else None
    host.c.host_only_block_from_end(0)
    try:
        y = host.ops.pointwise_conv2d(x, weight, None, by, None, [1, 1], 0, False)
    finally:
        host.c.host_only_block_from_end(-1)
    corner = channels_last(x[..., -1:, -32:])
    check(y[..., -1:, -32:], {**case(1, 8, 8, (1, 32)), "gate": gate}, dict(x=corner, weight=weight, gate=by))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(8, 7, 7)), r"x has 3 dimensions; \(N, C, H, W\) is wanted"),
        (dict(weight=torch.zeros(4, 9, 1, 1)), r"weight has to be \(out_channels, 8, 1, 1\)"),
        (dict(weight=torch.zeros(4, 8, 1, 1).half()), "weight's dtype has to be x's"),
        (dict(bias=torch.zeros(7)), r"bias has to be \(4\)"),
        (dict(bias=torch.zeros(4).half()), "bias's dtype has to be x's or float32"),
        (dict(gate=torch.zeros(1, 7, 1, 1)), r"gate has to be \(1, 8, 1, 1\)"),
        (dict(gate=torch.zeros(1, 8, 1, 1).half()), "gate's dtype has to be x's"),
        (dict(residual=torch.zeros(1, 4, 7, 6)), r"residual has to be \(1, 4, 7, 7\)"),
        (dict(stride=[0, 1]), r"stride\[0\] is 0; 1 to 2\^29 is wanted"),
        (dict(stride=[1]), r"stride has 1 numbers; \[vertical, horizontal\] is wanted"),
        (dict(activation=7), "activation is 7; a code from 0 to 6 is wanted"),
        (
            dict(x=torch.zeros(1, 8, 7, 7).double(), weight=torch.zeros(4, 8, 1, 1).double(), bias=None),
            "x's dtype has to be float32, bfloat16 or float16",
        ),
    ],
)
def test_bad_arguments(host, change, message):
    arguments = dict(x=torch.zeros(1, 8, 7, 7), weight=torch.zeros(4, 8, 1, 1), bias=torch.zeros(4), gate=None)
    arguments |= dict(residual=None, stride=[1, 1], activation=0, tf32=False) | change
    with pytest.raises(RuntimeError, match=message):
        host.ops.pointwise_conv2d(*arguments.values())
