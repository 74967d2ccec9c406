"""conv2d on a GPU, cuDNN's convolution and one pass behind it, against the reference on the same GPU in float64.

Fails if an element is wrong or unwritten, padding goes to a wrong side, the pass runs on another stream or device than
PyTorch's current one, or can't be captured or compiled. float32 by IEEE multiplications.
"""

import functools

import pytest
import torch
from gpu import calls
from gpu.calls import require, run
from numerics import float32_by, fresh_generator
from op_cases import DTYPES, all_pairs, identifier, moved_from_last_kinks

import cnnfast

pytestmark = pytest.mark.gpu
PAIRS = all_pairs(
    {
        "dtype": DTYPES,
        "layout": ("channels_last", "nchw"),
        "k": ((3, 3), (5, 5), (2, 3), (1, 1)),
        "stride": (1, 2, (3, 1)),
        "dilation": (1, (2, 1)),
        "padding": ("same", 0, (1, 0, 2, 3)),
        "activation": (None, "relu", "relu6", "sigmoid", "silu", "gelu", "tanh"),
        "c": (64, 3, 17),
        "out": (32, 5, 24),
        "bias": (True, False),
        "residual": (True, False),
        "size": ((19, 20), (37, 41)),
    }
)
SMALL = {
    "1x1 image": dict(size=(1, 1), padding=1),
    "W=1": dict(size=(5, 1), padding=1),
    "C=1": dict(c=1, out=1, size=(5, 4)),
    "batch 0": dict(n=0, size=(4, 4)),
    "stride > size": dict(size=(2, 3), stride=4, padding=1),
    "rows that no window reaches": dict(size=(8, 9), stride=3, padding=(1, 0, 0, 0)),
}
on_gpu = functools.partial(calls.on_gpu, "conv2d")


def away_from_kinks(generator, **row):
    """ATen rounds what the pass behind it adds to and activates."""
    return moved_from_last_kinks(calls.away_from_kinks("conv2d", generator, **row))


@pytest.fixture(params=("triton",))
def backend(request):
    require("conv2d", request.param)
    with float32_by("ieee"):
        yield request.param


def check_gradients(case, generator, backend):
    def terms(case, shape):
        pixels = max(shape[0] * shape[2] * shape[3], 1)
        by_name = {"x": shape[1] * case.tensors["weight"].shape[2:].numel(), "weight": pixels, "bias": pixels}
        return {name: count + case.terms for name, count in (by_name | {"residual": 1}).items()}

    calls.check_gradients(case, generator, backend, terms, rounded=2)  # of the result, and of its gradient


@pytest.mark.parametrize("row", PAIRS, ids=identifier)
def test_all_pairs(row, backend):
    generator = fresh_generator()
    case = on_gpu(generator, decades=3.0, **row)
    case.check(run(case, backend))
    check_gradients(away_from_kinks(generator, **row), generator, backend)


@pytest.mark.parametrize("layout", ("channels_last", "nchw"))
@pytest.mark.parametrize("row", SMALL.values(), ids=SMALL.keys())
def test_small_shapes(row, layout, backend):
    generator = fresh_generator()
    case = away_from_kinks(generator, **{"c": 5, "activation": "relu6", "layout": layout, **row})
    case.check(run(case, backend))
    check_gradients(case, generator, backend)


def test_special_values(backend):
    case = on_gpu(fresh_generator(), n=1, c=8, size=(9, 9), activation="relu6")
    for i, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        case.x[0, i, 1 + 3 * i, 3] = value
    case.check(run(case, backend))


def test_side_stream(backend):
    calls.check_side_stream(on_gpu(fresh_generator(), n=4, c=64, out=64, size=(56, 56)), backend)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_the_current_one(backend):
    case = on_gpu(fresh_generator(), device="cuda:1", c=24, activation=None)
    calls.check_device_that_is_not_the_current_one(case, backend)


def test_cuda_graph(backend):
    calls.check_cuda_graph(on_gpu(fresh_generator(), n=4, c=64, size=(28, 28)), backend)


@pytest.mark.parametrize("dynamic", (False, True))
def test_compile(dynamic, backend):
    case = on_gpu(fresh_generator(), c=24, out=40)
    parameters = tuple(case.tensors[name].requires_grad_() for name in ("weight", "bias"))

    def step(x, weight, bias):
        return cnnfast.conv2d(x * 2, weight, bias, padding=1, activation="silu", backend=backend) + 1

    calls.check_compile(step, parameters, [(n, 24, 14, 14) for n in (4, 6)], dynamic)


@pytest.mark.parametrize("layout", ("channels_last", "nchw"))
def test_opcheck(layout, backend):
    case = away_from_kinks(fresh_generator(), c=5, size=(6, 7), activation="relu", layout=layout)
    code = cnnfast.ops.backends.CODES[backend]
    tensors = [case.tensors[name].requires_grad_() for name in ("x", "weight", "bias", "residual")]
    geometry = ([1, 1], [1, 1, 1, 1], [1, 1], 1)
    torch.library.opcheck(torch.ops.cnnfast.conv2d.default, (*tensors, *geometry, code))
    args = (torch.randn_like(tensors[-1]), *(tensor.detach() for tensor in tensors), *geometry, 0b1111, code)
    torch.library.opcheck(torch.ops.cnnfast.conv2d_backward.default, args)
