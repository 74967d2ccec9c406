"""csrc/cuda/depthwise_conv2d, device code and host side, run on host threads against the reference.

Fails when a kernel's arithmetic, indexing, tails, layouts or masks are wrong, an output stays unwritten (they begin as
NaN), the wrong kernel is chosen, or the order of a block's threads shows in the result.
"""

import contextlib

import numerics
import pytest
import torch
from cuda_host import harness
from numerics import LAYOUTS, assert_close_by_policy, assert_gradients_by_policy, draw, fresh_generator

from cnnfast import reference

pytestmark = [harness.needs_toolkit, pytest.mark.usefixtures("nan_outputs", "forward_order")]
nan_outputs = numerics.nan_outputs

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
CODES = {None: 0, "relu": 1, "relu6": 2}


@pytest.fixture
def host():
    return harness.library()


@pytest.fixture
def forward_order(host):
    host.kernels_run()
    yield
    host.order(harness.FORWARD)


def case(shape, k, s=1, p="same", d=1, m=1, pre=None, act=None, layout="channels_last"):
    pair = lambda v: (v, v) if isinstance(v, int) else v
    return dict(
        shape=shape, kernel=pair(k), stride=pair(s), padding=p, dilation=pair(d), m=m, pre=pre, act=act, layout=layout
    )


# Channels: 8 and 24 fill one block's lanes, 264 takes two; heights and widths: ends of strips and of rows.
VECTORIZED = [
    case((2, 8, 7, 7), 3, pre="relu"),
    case((1, 24, 13, 9), 3, p=(1, 2, 2, 1), act="relu6"),
    case((1, 264, 3, 6), 3, p=(0, 0, 0, 0), pre="relu6", act="relu"),
    case((1, 16, 2, 1), 3, p=(1, 1, 1, 1)),
    case((2, 8, 5, 1), 3, p=(3, 4, 5, 3), act="relu"),  # more padding than the kernel is wide
    case((1, 8, 19, 21), 3, pre="relu", act="relu6"),
    case((2, 8, 8, 8), 3, s=2, act="relu6"),
    case((1, 24, 9, 11), 3, s=2, p=(1, 1, 1, 1), pre="relu"),
    case((1, 8, 5, 7), 3, s=2, p=(2, 1, 2, 3), act="relu"),
    case((1, 264, 4, 5), 3, s=2, p=(0, 1, 0, 1)),
    case((1, 8, 2, 3), 3, s=2, p=(0, 1, 1, 0), pre="relu6"),
    case((2, 8, 7, 7), 5, act="relu6"),
    case((1, 24, 6, 13), 5, p=(1, 3, 2, 4), pre="relu", act="relu"),
    case((1, 8, 1, 9), 5, p=(2, 2, 2, 2)),
    case((1, 8, 14, 14), 5, s=2, act="relu6"),
    case((1, 24, 7, 10), 5, s=2, p=(2, 2, 1, 2), pre="relu"),
    case((1, 264, 3, 4), 5, s=2, p=(3, 3, 3, 3), act="relu"),
]
GENERIC = [
    case((2, 3, 7, 5), 3, act="relu6"),
    case((1, 1, 6, 6), 3, s=2, pre="relu"),
    case((1, 5, 4, 4), 1, act="relu"),
    case((1, 16, 1, 1), 3, p=(1, 1, 1, 1)),  # NCHW as well as NHWC: taken for NCHW
    case((1, 8, 9, 9), 3, d=2, pre="relu", act="relu6"),
    case((1, 8, 6, 7), 3, m=2, act="relu"),
    case((1, 3, 6, 7), (2, 3), s=(1, 2), p=(1, 0, 2, 1), m=3, d=(2, 1)),
    case((1, 8, 9, 4), 3, s=3, p=(2, 1, 0, 1)),
    case((1, 7, 11, 11), 7, s=2),
    case((1, 8, 4, 4), 3, s=7),  # stride > size
    case((2, 8, 7, 7), 3, layout="nchw", pre="relu", act="relu6"),
    case((1, 13, 8, 8), 5, s=2, layout="nchw", m=2),
    case((2, 6, 5, 1), 3, s=(2, 1), layout="nchw"),
]
EMPTY = [case((0, 8, 7, 7), 3), case((0, 3, 7, 7), 3, layout="nchw")]


def tensors_of(case, dtype, generator, integers=False, bias_dtype=None, decades=3.0):
    """Small integers make every sum exact, and with a bias of an odd half no result lies at a kink."""
    n, c, h, w = case["shape"]
    shapes = {"x": (n, c, h, w), "weight": (c * case["m"], 1, *case["kernel"])}
    if integers:
        tensors = {name: torch.randint(-3, 4, s, generator=generator).to(dtype) for name, s in shapes.items()}
        tensors["bias"] = (torch.randint(-2, 8, (c * case["m"],), generator=generator) + 0.5).to(bias_dtype or dtype)
        if case["pre"]:
            tensors["x"] = tensors["x"] * 2 + 1
    else:
        tensors = {"x": draw(generator, shapes["x"], dtype, decades=decades)}
        tensors["weight"] = draw(generator, shapes["weight"], dtype)
        tensors["bias"] = draw(generator, (c * case["m"],), bias_dtype or dtype, scale=0.1)
    tensors["x"] = LAYOUTS[case["layout"]](tensors["x"])
    return tensors


def options_of(case):
    names = {
        "padding": "padding",
        "stride": "stride",
        "dilation": "dilation",
        "pre": "pre_activation",
        "act": "activation",
    }
    return {name: case[key] for key, name in names.items()}


def geometry(case):
    """The op's [stride, padding, dilation, pre_activation, activation]."""
    padding = [] if case["padding"] == "same" else list(case["padding"])
    return list(case["stride"]), padding, list(case["dilation"]), CODES[case["pre"]], CODES[case["act"]]


def run(host, case, x, weight, bias):
    return host.ops.depthwise_conv2d(x, weight, bias, *geometry(case))


def run_backward(host, case, grad, tensors, mask=7):
    return host.ops.depthwise_conv2d_backward(grad, *tensors.values(), *geometry(case), mask)


def same_bits(a, b):
    return a.equal(b) or torch.equal(a.isnan(), b.isnan()) and a.nan_to_num().equal(b.nan_to_num())


@contextlib.contextmanager
def unfilled():
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


def is_vectorized(case, dtype):
    return case in VECTORIZED and dtype is not torch.float64


def host_runs(*kernels):
    """Marks a test as the proof of these kernels."""

    def mark(function):
        for kernel in kernels:
            function = pytest.mark.proof("host-run", kernel=f"depthwise_conv2d_{kernel}_kernel")(function)
        return function

    return mark


@host_runs("forward", "forward_generic")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", VECTORIZED + GENERIC + EMPTY, ids=str)
def test_forward(host, case, dtype):
    tensors = tensors_of(case, dtype, fresh_generator())
    y = run(host, case, **tensors)
    ran = host.kernels_run()
    wanted = "depthwise_conv2d_forward" + ("_kernel" if is_vectorized(case, dtype) else "_generic_kernel")
    assert ran == ([] if case in EMPTY else [wanted])
    assert_close_by_policy(
        y, reference.depthwise_conv2d, *tensors.values(), **options_of(case), terms=tensors["weight"][0].numel() + 1
    )
    if case not in EMPTY and case["shape"][1] > 1 and case["shape"][2:] != (1, 1):  # these are in both formats
        assert y.is_contiguous(memory_format=FORMATS[case["layout"]])


@host_runs("input_gradient", "input_gradient_generic")
@host_runs("weight_gradient", "weight_gradient_generic", "weight_gradient_sum")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", VECTORIZED + GENERIC + EMPTY, ids=str)
def test_backward(host, case, dtype):
    generator = fresh_generator()
    tensors = tensors_of(case, dtype, generator, integers=True)
    y = run(host, case, **tensors)
    grad = LAYOUTS[case["layout"]](draw(generator, y.shape, dtype, decades=3.0))
    host.kernels_run()
    gradients = dict(zip(tensors, run_backward(host, case, grad, tensors), strict=True))
    generic = "" if is_vectorized(case, dtype) else "_generic"
    wanted = [f"depthwise_conv2d_{kernel}{generic}_kernel" for kernel in ("input_gradient", "weight_gradient")]
    wanted += ["depthwise_conv2d_weight_gradient_sum_kernel"]
    if case["act"]:
        wanted.insert(0, f"depthwise_conv2d_forward{generic}_kernel")
    assert host.kernels_run() == (wanted[-1:] if case in EMPTY else wanted)
    taps, pixels = tensors["weight"][0].numel(), grad.numel() // max(grad.shape[1], 1)
    terms = {"x": taps * case["m"], "weight": pixels, "bias": pixels}
    assert_gradients_by_policy(gradients, reference.depthwise_conv2d, grad, tensors, options_of(case), terms=terms)
    assert case in EMPTY or gradients["x"].stride() == tensors["x"].stride()


@pytest.mark.parametrize("mask", range(8))
def test_only_the_gradients_wanted(host, mask):
    case = VECTORIZED[1]
    generator = fresh_generator()
    tensors = tensors_of(case, torch.float32, generator)
    grad = draw(generator, run(host, case, **tensors).shape)
    every = run_backward(host, case, grad, tensors)
    for i, (got, wanted) in enumerate(zip(run_backward(host, case, grad, tensors, mask), every, strict=True)):
        assert got.equal(wanted) if mask >> i & 1 else got.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [VECTORIZED[1], GENERIC[4]], ids=str)
def test_float32_bias_beside_low_precision(host, case, dtype):
    generator = fresh_generator()
    tensors = tensors_of(case, dtype, generator, integers=True, bias_dtype=torch.float32)
    tensors["bias"] += 2.0**-12 * torch.arange(len(tensors["bias"]))  # more than the low precision holds
    y = run(host, case, **tensors)
    assert_close_by_policy(y, reference.depthwise_conv2d, *tensors.values(), **options_of(case), terms=10)
    gradients = run_backward(host, case, torch.ones_like(y), tensors)
    assert gradients[2].dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_nan_and_inf(host, layout, activation):
    """As PyTorch's relu and relu6, before and after; backward relu's only: whether the gradient of PyTorch's relu6 at
    NaN is 1 or 0 depends on where in the tensor it lies. Ours passes it on, as its relu does."""
    case_ = case((1, 8, 6, 7), 3, pre=activation, act=activation, layout=layout)
    tensors = tensors_of(case_, torch.float32, fresh_generator(), integers=True)
    for value, at in ((torch.nan, (0, 1, 2, 3)), (torch.inf, (0, 2, 3, 3)), (-torch.inf, (0, 3, 1, 1))):
        tensors["x"][at] = value
    y = run(host, case_, **tensors)
    wanted = reference.depthwise_conv2d(*tensors.values(), **options_of(case_))
    assert y.isnan().any() and same_bits(y, wanted)
    if activation == "relu6":
        return
    leaves = [t.clone().requires_grad_() for t in tensors.values()]
    grad = torch.randint(-3, 4, y.shape).float()
    reference.depthwise_conv2d(*leaves, **options_of(case_)).backward(grad)
    for got, leaf in zip(run_backward(host, case_, grad, tensors), leaves, strict=True):
        assert same_bits(got, leaf.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [VECTORIZED[0], VECTORIZED[2], VECTORIZED[9], VECTORIZED[12], GENERIC[4]], ids=str)
def test_order_of_threads_does_not_show(host, case, dtype):
    generator = fresh_generator()
    tensors = tensors_of(case, dtype, generator)
    grad = draw(generator, run(host, case, **tensors).shape, dtype)
    results = []
    for order in (harness.FORWARD, harness.REVERSE):
        host.order(order)
        results.append([run(host, case, **tensors), *run_backward(host, case, grad, tensors)])
    for forward, reverse in zip(*results, strict=True):
        assert forward.equal(reverse)


def test_an_image_does_not_depend_on_its_neighbours(host):
    case_ = case((5, 264, 20, 20), 3, pre="relu", act="relu6")  # enough blocks to change how many rows each takes
    tensors = tensors_of(case_, torch.bfloat16, fresh_generator())
    whole = run(host, case_, **tensors)
    alone = run(
        host, case_, tensors["x"][3:4].contiguous(memory_format=torch.channels_last), *list(tensors.values())[1:]
    )
    assert whole[3:4].equal(alone)


def test_misaligned_and_noncontiguous_inputs(host):
    case_ = VECTORIZED[1]
    tensors = tensors_of(case_, torch.float32, fresh_generator())
    x = tensors["x"]
    wanted = run(host, case_, **tensors)
    host.kernels_run()
    storage = torch.empty(x.numel() + 1)
    shifted = storage[1:].as_strided(x.shape, x.stride())
    shifted.copy_(x)
    torch.testing.assert_close(run(host, case_, **{**tensors, "x": shifted}), wanted)
    assert host.kernels_run() == ["depthwise_conv2d_forward_generic_kernel"]
    wide = torch.cat([x, x], dim=3).contiguous(memory_format=torch.channels_last)[..., : x.shape[3]]
    assert run(host, case_, **{**tensors, "x": wide}).equal(wanted)
    odd_weight = torch.cat([tensors["weight"]] * 2, dim=3)[..., :3]
    assert run(host, case_, **{**tensors, "weight": odd_weight}).equal(wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_2_to_the_31_elements(host, layout):
    """Only the block of the last elements runs: of the 4.3 GB that x, y and dx are each, few pages are ever touched."""
    height, width, channels = 16384, 16400, 8
    assert height * width * channels > 2**31
    with unfilled():
        x = torch.empty((1, channels, height, width), dtype=torch.bfloat16, memory_format=FORMATS[layout])
        x[..., -16:, :] = torch.randn(16, width).bfloat16()
        weight = torch.randn(channels, 1, 3, 3).bfloat16()
        last_block = -(-x.numel() // 256) - 1  # NCHW: 65,535 blocks, striding on from there
        host.c.host_only_block_from_end(0 if layout == "channels_last" else 65534 - last_block % 65535)
        try:
            y = host.ops.depthwise_conv2d(x, weight, None, [1, 1], [1, 1, 1, 1], [1, 1], 0, 0)
            dx, *_ = host.ops.depthwise_conv2d_backward(x, x, weight, None, [1, 1], [1, 1, 1, 1], [1, 1], 0, 0, 1)
        finally:
            host.c.host_only_block_from_end(-1)
        corner = x[..., -4:, -64:].float()
        wanted = torch.nn.functional.conv2d(corner, weight.float(), padding=1, groups=channels)
        wanted_dx = torch.nn.functional.conv_transpose2d(corner, weight.float(), padding=1, groups=channels)
        # NHWC: the last tile of all channels; NCHW: the last row's end of the last channel
        last = (0, slice(None), -1, slice(-8, None)) if layout == "channels_last" else (0, -1, -1, slice(-8, None))
        torch.testing.assert_close(y[last].float(), wanted[last], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(dx[last].float(), wanted_dx[last], rtol=1e-2, atol=1e-2)


def pack(weight, bias, op=1, magic=0x464E4E43):
    """csrc/packing.h, written down a second time."""
    scalar = torch.float64 if weight.dtype is torch.float64 else torch.float32
    channels, _, kh, kw = weight.shape
    rows = torch.cat([bias.to(scalar)[None], weight.to(scalar).reshape(channels, -1).t()])
    rows = torch.nn.functional.pad(rows, (0, -channels % 16))
    header = torch.tensor([magic, 1 | op << 16, scalar.itemsize, *[channels] * 3, kh, kw, *[0] * 8], dtype=torch.int32)
    return torch.cat([header.view(torch.uint8), rows.contiguous().view(torch.uint8).flatten()])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", [VECTORIZED[1], VECTORIZED[2], VECTORIZED[15], GENERIC[4], GENERIC[9]], ids=str)
def test_packed(host, case, dtype):
    tensors = tensors_of(case, dtype, fresh_generator())
    packed = pack(tensors["weight"], tensors["bias"])
    channels, kernel = len(tensors["bias"]), list(case["kernel"])
    y = host.ops.depthwise_conv2d_packed(tensors["x"], packed, channels, kernel, *geometry(case))
    assert not host.trapped()
    assert y.equal(run(host, case, **tensors))


def test_foreign_packing_is_refused(host):
    case_ = VECTORIZED[0]
    tensors = tensors_of(case_, torch.float32, fresh_generator())
    x, weight, bias = tensors.values()

    def packed_run(packed, channels=8, kernel=(3, 3)):
        return host.ops.depthwise_conv2d_packed(x, packed, channels, list(kernel), *geometry(case_))

    for foreign in (pack(weight, bias, op=2), pack(weight, bias, magic=1), torch.zeros_like(pack(weight, bias))):
        packed_run(foreign)
        assert host.trapped()
    with pytest.raises(RuntimeError, match="packed has 704 bytes; weights of 24 channels and 9 taps take 1344"):
        packed_run(pack(weight, bias), channels=24)
    packed_run(pack(weight, bias), channels=16)  # as many bytes
    assert host.trapped()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(8, 7, 7)), r"x has 3 dimensions; \(N, C, H, W\) is wanted"),
        (dict(weight=torch.zeros(9, 1, 3, 3), bias=None), "weight has 9 output channels; a multiple of x's 8"),
        (dict(weight=torch.zeros(8, 1, 3, 3).double()), "weight's dtype has to be x's"),
        (dict(bias=torch.zeros(7)), "bias has to be"),
        (dict(bias=torch.zeros(8).half()), "bias's dtype has to be x's or float32"),
        (dict(stride=[0, 1]), "1 or more, got 0"),
        (dict(padding=[1, -1, 0, 0]), "padding can't be negative, got -1"),
        (dict(padding=[0, 0, 0, 0], dilation=[9, 1]), "the kernel reaches over 19 pixels, the padded input has 7"),
        (dict(activation=3), "activation is 3; 0 identity, 1 relu or 2 relu6"),
    ],
)
def test_bad_arguments(host, change, message):
    arguments = dict(x=torch.zeros(1, 8, 7, 7), weight=torch.zeros(8, 1, 3, 3), bias=torch.zeros(8), stride=[1, 1])
    arguments |= dict(padding=[], dilation=[1, 1], pre_activation=0, activation=0) | change
    with pytest.raises(RuntimeError, match=message):
        host.ops.depthwise_conv2d(*arguments.values())
