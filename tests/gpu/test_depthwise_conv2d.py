"""depthwise_conv2d on a GPU, by both backends, against the reference on the same GPU in float64.

Fails if an element is wrong or unwritten, a kernel runs on another stream or device than PyTorch's current one, can't
be captured or compiled, addresses beyond 2^31 elements wrongly, or gives other bits the second time.
"""

import functools
import importlib

import pytest
import torch
from gpu import calls
from gpu.calls import DEVICE, require, run
from numerics import fresh_generator, nan_filled
from op_cases import DTYPES, all_pairs, identifier, make

import cnnfast

pytestmark = pytest.mark.gpu
PAIRS = all_pairs(
    {
        "dtype": DTYPES,
        "layout": ("channels_last", "nchw"),
        "k": ((3, 3), (5, 5), (7, 7), (2, 3), (1, 1)),
        "stride": (1, 2, (3, 1)),
        "dilation": (1, (2, 1)),
        "padding": ("same", 0, (1, 0, 2, 3)),
        "activation": (None, "relu", "relu6"),
        "c": (64, 1, 3, 17, 40, 31),
        "multiplier": (1, 2),
        "bias": (True, False),
        "size": ((19, 20), (37, 41)),
    }
)
NETWORKS = [  # (channels, size, k, stride): MobileNetV2, EfficientNet-Lite0 and -B0, Xception
    (32, 112, 3, 1),
    (96, 112, 3, 2),
    (144, 56, 5, 2),
    (240, 28, 5, 1),
    (672, 14, 5, 2),
    (728, 19, 3, 1),
    (1152, 7, 3, 1),
    (1536, 10, 3, 1),
]
SMALL = {
    "1x1 image": dict(size=(1, 1), k=(3, 3), padding=1),
    "W=1": dict(size=(5, 1), k=(3, 3), padding=1),
    "C=1": dict(c=1, size=(5, 4)),
    "batch 0": dict(n=0, size=(4, 4)),
    "stride > size": dict(size=(2, 3), stride=4, padding=1),
    "large filter": dict(size=(20, 21), k=(9, 7), activation=None),
}


on_gpu = functools.partial(calls.on_gpu, "depthwise_conv2d")
away_from_kinks = functools.partial(calls.away_from_kinks, "depthwise_conv2d")


@pytest.fixture(params=("triton", "cuda"))
def backend(request):
    require("depthwise_conv2d", request.param)
    return request.param


def terms(case, shape):
    pixels = max(shape[0] * shape[2] * shape[3], 1)
    multiplier = case.tensors["weight"].shape[0] // case.x.shape[1]
    return {"x": case.terms * multiplier, "weight": pixels, "bias": pixels}


check_gradients = functools.partial(calls.check_gradients, terms=terms)


@pytest.mark.parametrize("row", PAIRS, ids=identifier)
def test_all_pairs(row, backend):
    case = on_gpu(fresh_generator(), decades=3.0, **row)
    case.check(run(case, backend))


@pytest.mark.parametrize("row", PAIRS, ids=identifier)
def test_gradients_of_all_pairs(row, backend):
    generator = fresh_generator()
    check_gradients(away_from_kinks(generator, **row), generator, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("c", "size", "k", "stride"), NETWORKS)
def test_networks(c, size, k, stride, dtype, backend):
    generator = fresh_generator()
    row = dict(n=3, c=c, size=(size, size), k=(k, k), stride=stride, padding="same", dtype=dtype)
    case = on_gpu(generator, activation="relu6", decades=3.0, **row)
    case.check(run(case, backend))
    check_gradients(on_gpu(generator, activation=None, **row), generator, backend)


@pytest.mark.parametrize("layout", ("channels_last", "nchw"))
@pytest.mark.parametrize("row", SMALL.values(), ids=SMALL.keys())
def test_small_shapes(row, layout, backend):
    generator = fresh_generator()
    case = away_from_kinks(generator, **{"c": 5, "activation": "relu6", "layout": layout, **row})
    case.check(run(case, backend))
    check_gradients(case, generator, backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_by_the_launcher(dtype):
    """The bits of the plain form, and the packing that the CPU makes."""
    require("depthwise_conv2d", "triton")
    kernels = importlib.import_module("cnnfast.kernels.depthwise_conv2d")
    cpu = make("depthwise_conv2d", fresh_generator(), c=40, multiplier=2, dtype=dtype)
    case = cpu.to(lambda tensor: tensor.to(DEVICE))
    packed = kernels.pack_depthwise_conv2d(case.tensors["weight"], case.tensors["bias"])
    assert torch.equal(packed.cpu(), cpu.pack())
    with nan_filled():
        ours = kernels.depthwise_conv2d_packed(case.x, packed, 80, (3, 3), (1, 1), (), (1, 1), 1, 1)
    assert torch.equal(ours, run(case, "triton"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed(dtype, backend):
    require("depthwise_conv2d_packed", backend)
    case = on_gpu(fresh_generator(), c=40, multiplier=2, dtype=dtype)
    with nan_filled():
        case.check(case.run_packed(backend=backend))


def test_special_values(backend):
    case = on_gpu(fresh_generator(), c=8, size=(6, 6), activation="relu6")
    for i, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        case.x[0, i, 2, 3] = value
    case.check(run(case, backend))


def test_repeatable_and_independent_of_the_batch(backend):
    case = on_gpu(fresh_generator(), n=16, c=96, size=(28, 28), activation=None)
    calls.check_repeatable_and_independent_of_the_batch(case, backend)


def test_side_stream(backend):
    calls.check_side_stream(on_gpu(fresh_generator(), n=4, c=64, size=(56, 56)), backend)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_the_current_one(backend):
    case = on_gpu(fresh_generator(), device="cuda:1", c=24, activation=None)
    calls.check_device_that_is_not_the_current_one(case, backend)


def test_cuda_graph(backend):
    calls.check_cuda_graph(on_gpu(fresh_generator(), n=4, c=64, size=(28, 28)), backend)


@pytest.mark.parametrize("dynamic", (False, True))
def test_compile(dynamic, backend):
    weight = on_gpu(fresh_generator(), c=24).tensors["weight"].requires_grad_()

    def step(x, weight):
        return cnnfast.depthwise_conv2d(x * 2, weight, padding=1, activation="relu", backend=backend) + 1

    calls.check_compile(step, (weight,), [(n, 24, 14, 14) for n in (4, 6)], dynamic)


@pytest.mark.parametrize("layout", ("channels_last", "nchw"))
def test_opcheck(layout, backend):
    case = away_from_kinks(fresh_generator(), c=5, size=(6, 7), activation="relu", layout=layout)
    x, weight, bias = (case.tensors[name].requires_grad_() for name in ("x", "weight", "bias"))
    code = cnnfast.ops.backends.CODES[backend]
    torch.library.opcheck(
        torch.ops.cnnfast.depthwise_conv2d.default, (x, weight, bias, [1, 1], [1, 1, 1, 1], [1, 1], 1, 1, code)
    )
    grad = torch.randn_like(case.run(padding=1))
    args = (grad, x.detach(), weight.detach(), bias.detach(), [1, 1], [1, 1, 1, 1], [1, 1], 1, 1, 0b111, code)
    torch.library.opcheck(torch.ops.cnnfast.depthwise_conv2d_backward.default, args)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ((34, 64, 1024, 1024), (1, 64, 5900, 5900)), ids=("in all", "in one image"))
def test_more_than_2_to_the_31_elements(shape, backend):
    """The last image, or the last rows of the only one, are what the op makes of them alone."""
    assert torch.Size(shape).numel() > 2**31
    if torch.cuda.mem_get_info()[0] < 22 * 2**30:
        pytest.skip("needs 22 GiB of free GPU memory")
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, memory_format=torch.channels_last).normal_()
    weight = torch.randn(shape[1], 1, 3, 3, dtype=torch.bfloat16, device=DEVICE)
    part, rows = (x[-1:, :, -12:], 8) if shape[0] == 1 else (x[-1:], shape[2])

    def last(tensor):
        return tensor[-1:, :, -rows:]

    def call(x):
        return cnnfast.depthwise_conv2d(x, weight, padding=1, backend=backend)

    y = call(x)
    assert torch.equal(last(y), last(call(part.contiguous(memory_format=torch.channels_last))))
    alone = part.contiguous(memory_format=torch.channels_last).requires_grad_()
    call(alone).backward(y[-1:, :, -part.shape[2] :])
    with torch.no_grad():
        grad_x, *_ = torch.ops.cnnfast.depthwise_conv2d_backward(
            y, x, weight, None, [1, 1], [1, 1, 1, 1], [1, 1], 0, 0, 0b001, cnnfast.ops.backends.CODES[backend]
        )
    assert torch.equal(last(grad_x), last(alone.grad))
