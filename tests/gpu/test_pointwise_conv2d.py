"""pointwise_conv2d on a GPU against the reference on the same GPU in float64, float32 by IEEE multiplications.

Fails if an element is wrong or unwritten, a kernel runs on another stream or device than PyTorch's current one, can't
be captured, compiled or exported, addresses beyond 2^31 elements wrongly, takes TF32 unasked, or gives other bits the
second time.
"""

import functools

import pytest
import torch
from gpu import calls
from gpu.calls import DEVICE, require, run
from numerics import float32_by, fresh_generator
from op_cases import DTYPES, all_pairs, identifier

import cnnfast

pytestmark = pytest.mark.gpu
PAIRS = all_pairs(
    {
        "dtype": DTYPES,
        "layout": ("channels_last", "nchw"),
        "stride": (1, 2, (3, 1)),
        "activation": (None, "relu", "relu6", "sigmoid", "silu", "gelu", "tanh"),
        "c": (64, 1, 3, 17, 40, 131),
        "out": (128, 1, 5, 24, 200),
        "excite": (False, True),
        "bias": (True, False),
        "residual": (True, False),
        "size": ((19, 20), (37, 41)),
    }
)
NETWORKS = [  # (channels, out, size, stride, excite): MobileNetV2, EfficientNet-B0, ResNet-50's shortcut, Xception
    (32, 16, 112, 1, True),
    (96, 24, 56, 1, False),
    (144, 40, 28, 1, True),
    (672, 112, 14, 1, True),
    (320, 1280, 7, 1, False),
    (256, 512, 56, 2, False),
    (728, 728, 19, 1, False),
    (1536, 2048, 10, 1, False),
]
SMALL = {
    "1x1 image": dict(size=(1, 1), excite=True),
    "W=1": dict(size=(5, 1), stride=2),
    "C=1": dict(c=1, size=(5, 4)),
    "K=1": dict(out=1, size=(5, 4), excite=True),
    "batch 0": dict(n=0, size=(4, 4), excite=True),
    "stride > size": dict(size=(2, 3), stride=4),
}
on_gpu = functools.partial(calls.on_gpu, "pointwise_conv2d")
away_from_kinks = functools.partial(calls.away_from_kinks, "pointwise_conv2d")


@pytest.fixture(params=("triton", "cuda"))
def backend(request):
    require("pointwise_conv2d", request.param)
    with float32_by("ieee"):
        yield request.param


def check(case, backend):
    if not calls.refused(case, backend):
        case.check(run(case, backend))


def check_gradients(case, generator, backend):
    if calls.refused(case, backend):
        return

    def terms(case, shape):
        pixels = max(shape[2] * shape[3], 1)
        of_x = case.tensors["weight"].shape[0]
        of_weight = max(shape[0], 1) * pixels
        by_name = {"x": of_x, "weight": of_weight, "bias": of_weight, "gate": pixels * of_x, "residual": 1}
        return {name: count + case.terms for name, count in by_name.items()}

    calls.check_gradients(case, generator, backend, terms, rounded=int("gate" in case.tensors))


@pytest.mark.parametrize("row", PAIRS, ids=identifier)
def test_all_pairs(row, backend):
    case = on_gpu(fresh_generator(), decades=3.0, **row)
    check(case, backend)


@pytest.mark.parametrize("row", PAIRS, ids=identifier)
def test_gradients_of_all_pairs(row, backend):
    generator = fresh_generator()
    check_gradients(away_from_kinks(generator, **row), generator, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("c", "out", "size", "stride", "excite"), NETWORKS)
def test_networks(c, out, size, stride, excite, dtype, backend):
    generator = fresh_generator()
    row = dict(n=3, c=c, out=out, size=(size, size), stride=stride, excite=excite, dtype=dtype)
    case = on_gpu(generator, activation="relu6", decades=3.0, **row)
    check(case, backend)
    check_gradients(on_gpu(generator, activation=None, **row), generator, backend)


@pytest.mark.parametrize("layout", ("channels_last", "nchw"))
@pytest.mark.parametrize("row", SMALL.values(), ids=SMALL.keys())
def test_small_shapes(row, layout, backend):
    generator = fresh_generator()
    case = away_from_kinks(generator, **{"c": 5, "activation": "relu6", "layout": layout, **row})
    check(case, backend)
    check_gradients(case, generator, backend)


def test_tf32_where_allowed(backend):
    case = on_gpu(fresh_generator(), n=2, c=728, out=728, size=(19, 19), activation=None, residual=False)
    calls.check_tf32_where_allowed(case, backend)


def test_special_values(backend):
    case = on_gpu(fresh_generator(), c=8, size=(6, 6), activation="relu6", excite=True)
    for i, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        case.x[0, i, 2, i] = value
    case.check(run(case, backend))


@pytest.mark.parametrize("excite", (False, True))
def test_repeatable_and_independent_of_the_batch(excite, backend):
    row = dict(n=16, c=96, out=200, size=(28, 28), activation=None, excite=excite)
    calls.check_repeatable_and_independent_of_the_batch(
        on_gpu(fresh_generator(), **row), backend, per_image=("x", "gate", "residual")
    )


def test_side_stream(backend):
    calls.check_side_stream(on_gpu(fresh_generator(), n=4, c=64, size=(56, 56)), backend)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_the_current_one(backend):
    case = on_gpu(fresh_generator(), device="cuda:1", c=24, activation=None, excite=True)
    calls.check_device_that_is_not_the_current_one(case, backend)


def test_cuda_graph(backend):
    calls.check_cuda_graph(on_gpu(fresh_generator(), n=4, c=64, size=(28, 28), excite=True), backend)


@pytest.mark.parametrize("dynamic", (False, True))
def test_compile(dynamic, backend):
    case = on_gpu(fresh_generator(), c=24, out=40)
    parameters = tuple(case.tensors[name].requires_grad_() for name in ("weight", "bias"))

    def step(x, weight, bias):
        return cnnfast.pointwise_conv2d(x * 2, weight, bias, activation="silu", backend=backend) + 1

    calls.check_compile(step, parameters, [(n, 24, 14, 14) for n in (4, 6)], dynamic)


def test_export(backend):
    case = on_gpu(fresh_generator(), n=4, c=24, out=40, size=(14, 14), excite=True, residual=False)

    class Step(torch.nn.Module):
        def forward(self, x, weight, bias, gate):
            return cnnfast.pointwise_conv2d(x, weight, bias, gate=gate, activation="relu", backend=backend)

    args = tuple(case.tensors[name] for name in ("x", "weight", "bias", "gate"))
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = ({0: batch}, None, None, {0: batch})
    with torch.no_grad():
        program = torch.export.export(Step(), args, dynamic_shapes=shapes)
        assert torch.equal(program.module()(*args), run(case, backend))


@pytest.mark.parametrize("layout", ("channels_last", "nchw"))
def test_opcheck(layout, backend):
    case = away_from_kinks(fresh_generator(), c=5, size=(6, 7), activation="relu", layout=layout, excite=True, stride=2)
    names = ("x", "weight", "bias", "gate", "residual")
    code = cnnfast.ops.backends.CODES[backend]
    tensors = [case.tensors[name].requires_grad_() for name in names]
    torch.library.opcheck(torch.ops.cnnfast.pointwise_conv2d.default, (*tensors, [2, 2], 1, code))
    args = (torch.randn_like(tensors[-1]), *(tensor.detach() for tensor in tensors), [2, 2], 1, 0b11111, code)
    torch.library.opcheck(torch.ops.cnnfast.pointwise_conv2d_backward.default, args)


@pytest.mark.slow
@pytest.mark.parametrize("excite", (False, True))
@pytest.mark.parametrize("shape", ((34, 64, 1024, 1024), (1, 64, 5900, 5900)), ids=("in all", "in one image"))
def test_more_than_2_to_the_31_elements(shape, excite, backend):
    """The last image, or the last rows of the only one, are what the op makes of them alone."""
    assert torch.Size(shape).numel() > 2**31
    if torch.cuda.mem_get_info()[0] < 22 * 2**30:
        pytest.skip("needs 22 GiB of free GPU memory")
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, memory_format=torch.channels_last).normal_()
    weight = torch.randn(shape[1], shape[1], 1, 1, dtype=torch.bfloat16, device=DEVICE)
    gate = torch.randn(shape[0], shape[1], 1, 1, dtype=torch.bfloat16, device=DEVICE) if excite else None
    rows = 8 if shape[0] == 1 else shape[2]
    code = cnnfast.ops.backends.CODES[backend]

    def last(tensor):
        return tensor if tensor is None else tensor[-1:, :, -rows:].contiguous(memory_format=torch.channels_last)

    def input_gradient(grad, x, gate):
        return torch.ops.cnnfast.pointwise_conv2d_backward(grad, x, weight, None, gate, None, [1, 1], 0, 0b001, code)[0]

    with torch.no_grad():
        y = cnnfast.pointwise_conv2d(x, weight, gate=gate, backend=backend)
        last_gate = gate if gate is None else gate[-1:]
        assert torch.equal(last(y), cnnfast.pointwise_conv2d(last(x), weight, gate=last_gate, backend=backend))
        assert torch.equal(last(input_gradient(y, x, gate)), input_gradient(last(y), last(x), last_gate))
