"""separable_conv2d on a GPU against the reference on the same GPU in float64, float32 by IEEE multiplications.

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
from op_cases import DTYPES, all_pairs, identifier, moved_from_last_kinks

import cnnfast

pytestmark = pytest.mark.gpu
ORDERS = (False, True)  # pointwise_first
PAIRS = all_pairs(
    {
        "dtype": DTYPES,
        "layout": ("channels_last", "nchw"),
        "k": ((3, 3), (1, 1), (5, 5), (2, 3), (7, 7)),
        "stride": (1, 2, (3, 1)),
        "dilation": (1, (2, 1)),
        "padding": ("same", 0, (1, 0, 2, 3)),
        "activation": (None, "relu", "relu6", "sigmoid", "silu", "gelu", "tanh"),
        "c": (64, 1, 3, 17, 40, 131),
        "out": (128, 1, 5, 24, 300),
        "multiplier": (1, 2),
        "pointwise_first": ORDERS,
        "bias": (True, False),
        "residual": (True, False),
        "size": ((19, 20), (37, 41)),
    }
)
NETWORKS = [  # (channels, out, size, k, stride): Xception, MobileNetV1, Lite0
    (64, 128, 147, 3, 1),
    (728, 728, 19, 3, 1),
    (1536, 2048, 10, 3, 1),
    (32, 64, 112, 3, 1),
    (64, 128, 112, 3, 2),
    (512, 512, 14, 3, 1),
    (512, 1024, 14, 3, 2),
    (32, 16, 112, 3, 1),
    (240, 112, 14, 5, 1),
]
SMALL = {
    "1x1 image": dict(size=(1, 1), padding=1),
    "W=1": dict(size=(5, 1), padding=1),
    "C=1": dict(c=1, size=(5, 4)),
    "K=1": dict(out=1, size=(5, 4)),
    "C=1, K=1": dict(c=1, out=1, multiplier=2, size=(5, 4)),
    "batch 0": dict(n=0, size=(4, 4)),
    "stride > size": dict(size=(2, 3), stride=4, padding=1),
}
on_gpu = functools.partial(calls.on_gpu, "separable_conv2d")


def away_from_kinks(generator, **row):
    return moved_from_last_kinks(calls.away_from_kinks("separable_conv2d", generator, **row))


@pytest.fixture(params=("triton", "cuda"))
def backend(request):
    require("separable_conv2d", request.param)
    with float32_by("ieee"):
        yield request.param


def check_gradients(case, generator, backend):
    def terms(case, shape):
        images, pixels = max(shape[0], 1), max(shape[2] * shape[3], case.x.shape[2] * case.x.shape[3])
        return dict.fromkeys(case.tensors, images * pixels + case.terms + shape[1])

    calls.check_gradients(case, generator, backend, terms, rounded=2)  # t is rounded, and so is its gradient


@pytest.mark.parametrize("row", PAIRS, ids=identifier)
def test_all_pairs(row, backend):
    case = on_gpu(fresh_generator(), decades=3.0, **row)
    case.check(run(case, backend))


@pytest.mark.parametrize("row", PAIRS, ids=identifier)
def test_gradients_of_all_pairs(row, backend):
    generator = fresh_generator()
    check_gradients(away_from_kinks(generator, **row), generator, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pointwise_first", ORDERS)
@pytest.mark.parametrize(("c", "out", "size", "k", "stride"), NETWORKS)
def test_networks(c, out, size, k, stride, pointwise_first, dtype, backend):
    generator = fresh_generator()
    row = dict(n=3, c=c, out=out, size=(size, size), k=(k, k), stride=stride, dtype=dtype)
    case = on_gpu(generator, activation="relu6", decades=3.0, pointwise_first=pointwise_first, **row)
    case.check(run(case, backend))
    check_gradients(on_gpu(generator, activation=None, pointwise_first=pointwise_first, **row), generator, backend)


@pytest.mark.parametrize("pointwise_first", ORDERS)
@pytest.mark.parametrize("layout", ("channels_last", "nchw"))
@pytest.mark.parametrize("row", SMALL.values(), ids=SMALL.keys())
def test_small_shapes(row, layout, pointwise_first, backend):
    generator = fresh_generator()
    options = {"c": 5, "activation": "relu6", "layout": layout, "pointwise_first": pointwise_first}
    case = away_from_kinks(generator, **options | row)
    case.check(run(case, backend))
    check_gradients(case, generator, backend)


def test_tf32_where_allowed(backend):
    case = on_gpu(fresh_generator(), n=2, c=728, out=728, size=(19, 19), activation=None, residual=False)
    calls.check_tf32_where_allowed(case, backend)


@pytest.mark.parametrize("pointwise_first", ORDERS)
def test_special_values(pointwise_first, backend):
    row = dict(c=8, size=(6, 6), activation="relu6", pointwise_first=pointwise_first)
    case = on_gpu(fresh_generator(), **row)
    for i, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        case.x[0, i, 2, i] = value
    case.check(run(case, backend))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("layout", ("channels_last", "nchw"))
@pytest.mark.parametrize("c", (24, 40, 729))
def test_neighbours_of_the_last_channel(c, layout, dtype, backend):
    """NaN in the next pixel, image or row of weights than a block of channels ends with reaches nothing else."""
    case = on_gpu(fresh_generator(), n=2, c=c, out=70, size=(7, 9), layout=layout, dtype=dtype, activation=None)
    clean = run(case, backend)
    case.x[1] = float("nan")
    assert torch.equal(run(case, backend)[:1], clean[:1])
    case.x[0, :, 6, 8] = float("nan")
    assert torch.equal(run(case, backend)[0, :, :5], clean[0, :, :5])
    case.tensors["pw_weight"][35] = float("nan")
    assert torch.equal(run(case, backend)[0, :35, :5], clean[0, :35, :5])


@pytest.mark.parametrize("pointwise_first", ORDERS)
def test_repeatable_and_independent_of_the_batch(pointwise_first, backend):
    row = dict(n=16, c=96, out=200, size=(28, 28), activation=None, pointwise_first=pointwise_first)
    calls.check_repeatable_and_independent_of_the_batch(
        on_gpu(fresh_generator(), **row), backend, per_image=("x", "residual")
    )


@pytest.mark.parametrize("pointwise_first", ORDERS)
def test_side_stream(pointwise_first, backend):
    case = on_gpu(fresh_generator(), n=4, c=64, size=(56, 56), pointwise_first=pointwise_first)
    calls.check_side_stream(case, backend)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("pointwise_first", ORDERS)
def test_device_that_is_not_the_current_one(pointwise_first, backend):
    case = on_gpu(fresh_generator(), device="cuda:1", c=24, activation="silu", pointwise_first=pointwise_first)
    calls.check_device_that_is_not_the_current_one(case, backend)


@pytest.mark.parametrize("pointwise_first", ORDERS)
def test_cuda_graph(pointwise_first, backend):
    case = on_gpu(fresh_generator(), n=4, c=64, size=(28, 28), pointwise_first=pointwise_first)
    calls.check_cuda_graph(case, backend)


@pytest.mark.parametrize("order", ("depthwise_first", "pointwise_first"))
@pytest.mark.parametrize("dynamic", (False, True))
def test_compile(dynamic, order, backend):
    case = on_gpu(fresh_generator(), c=24, out=24)
    parameters = tuple(case.tensors[name].requires_grad_() for name in ("dw_weight", "pw_weight", "dw_bias", "pw_bias"))

    def step(x, *parameters):
        options = dict(padding="same", order=order, pre_activation="relu", mid_activation="silu", backend=backend)
        return cnnfast.separable_conv2d(x * 2, *parameters, **options) + 1

    calls.check_compile(step, parameters, [(n, 24, 14, 14) for n in (4, 6)], dynamic)


@pytest.mark.parametrize("pointwise_first", ORDERS)
def test_export(pointwise_first, backend):
    row = dict(n=4, c=24, out=40, size=(14, 14), residual=False, pointwise_first=pointwise_first)
    case = on_gpu(fresh_generator(), **row)

    class Step(torch.nn.Module):
        def forward(self, x, dw_weight, pw_weight, dw_bias, pw_bias):
            weights = dw_weight, pw_weight, dw_bias, pw_bias
            return cnnfast.separable_conv2d(x, *weights, **case.options, backend=backend)

    args = tuple(case.tensors[name] for name in ("x", "dw_weight", "pw_weight", "dw_bias", "pw_bias"))
    shapes = {0: torch.export.Dim("batch", min=2, max=64)}, None, None, None, None
    with torch.no_grad():
        program = torch.export.export(Step(), args, dynamic_shapes=shapes)
        assert torch.equal(program.module()(*args), run(case, backend))


@pytest.mark.parametrize("pointwise_first", ORDERS)
@pytest.mark.parametrize("layout", ("channels_last", "nchw"))
def test_opcheck(layout, pointwise_first, backend):
    row = dict(c=5, out=7, size=(6, 7), activation="relu", layout=layout, stride=2, pointwise_first=pointwise_first)
    case = away_from_kinks(fresh_generator(), **row)
    names = ("x", "dw_weight", "dw_bias", "pw_weight", "pw_bias", "residual")
    code = cnnfast.ops.backends.CODES[backend]
    tensors = [case.tensors[name].requires_grad_() for name in names]
    options = [[2, 2], [-1], [1, 1], pointwise_first, 1, 1, 1]
    torch.library.opcheck(torch.ops.cnnfast.separable_conv2d.default, (*tensors, *options, code))
    args = (torch.randn_like(tensors[-1]), *(tensor.detach() for tensor in tensors), *options, 0b111111, code)
    torch.library.opcheck(torch.ops.cnnfast.separable_conv2d_backward.default, args)


@pytest.mark.slow
@pytest.mark.parametrize("pointwise_first", ORDERS)
@pytest.mark.parametrize("shape", ((34, 64, 1024, 1024), (1, 64, 5900, 5900)), ids=("in all", "in one image"))
def test_more_than_2_to_the_31_elements(shape, pointwise_first, backend):
    """The last image, or the last rows of the only one, are what the op makes of them alone."""
    assert torch.Size(shape).numel() > 2**31
    if torch.cuda.mem_get_info()[0] < 28 * 2**30:
        pytest.skip("needs 28 GiB of free GPU memory")
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, memory_format=torch.channels_last).normal_()
    weights = [torch.randn(64, n, k, k, dtype=torch.bfloat16, device=DEVICE) for n, k in ((1, 3), (64, 1))]
    rows = 10 if shape[0] == 1 else shape[2]  # an even number of them lies above
    code = cnnfast.ops.backends.CODES[backend]
    options = [1, 1], [1, 1, 1, 1], [1, 1], pointwise_first, 1, 0, 0

    def last(tensor, rows):
        return tensor[-1:, :, -rows:].contiguous(memory_format=torch.channels_last)

    def forward(x):
        return torch.ops.cnnfast.separable_conv2d(x, weights[0], None, weights[1], None, None, *options, code)

    def input_gradient(grad, x):
        tensors = grad, x, weights[0], None, weights[1], None, None
        return torch.ops.cnnfast.separable_conv2d_backward(*tensors, *options, 0b1, code)[0]

    with torch.no_grad():
        y = forward(x)
        kept = rows - 2 if rows < shape[2] else rows  # what the rows above don't reach
        alone = forward(last(x, rows))
        assert torch.equal(last(y, kept), last(alone, kept))
        assert torch.equal(
            last(input_gradient(y, x), kept - 2), last(input_gradient(last(y, rows), last(x, rows)), kept - 2)
        )
