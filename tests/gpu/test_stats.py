"""<op>_stats and depthwise_conv2d_squeeze on a GPU against the reference on the same GPU in float64, float32 by IEEE
multiplications.

Fails if an element is wrong or unwritten, a sum isn't that of the y that is returned, a kernel runs on another stream
or device than PyTorch's current one, can't be captured, compiled or exported, addresses beyond 2^31 elements wrongly,
or gives other bits the second time.
"""

import pytest
import torch
from gpu import calls
from gpu.calls import DEVICE, require
from numerics import LAYOUTS, draw, float32_by, fresh_generator, nan_filled
from op_cases import DTYPES, Case, all_pairs, arguments_of, identifier
from stats_cases import OPS, PROLOGUES, STATS, check_gradients, check_outputs, make

import cnnfast

pytestmark = pytest.mark.gpu
SQUEEZE = "depthwise_conv2d_squeeze"
OURS = [op for op in OPS if op != "conv2d_stats"]  # cuDNN's convolution promises no bits
# Intermediates that the docstrings allow to be rounded, in backward: the product's input, y, its gradient, conv2d's
# gradient of the prologue, separable's intermediate and its gradient.
ROUNDED = dict(zip(OPS, (4, 2, 3, 4, 0), strict=True))
PAIRS = all_pairs(
    {
        "prologue": tuple(PROLOGUES),
        "dtype": DTYPES,
        "layout": tuple(LAYOUTS),
        "k": ((3, 3), (5, 5), (2, 3), (7, 7)),
        "stride": (1, 2, (3, 1)),
        "dilation": (1, (2, 1)),
        "padding": ("same", 0, (1, 0, 2, 3)),
        "bias": (True, False),
        "c": (64, 1, 3, 17, 40),
        "out": (96, 1, 5, 200),
        "size": ((19, 20), (37, 41)),
    }
)
NETWORKS = [  # (channels, out, size, k, stride): MobileNetV1 and V2, EfficientNet-B0, Xception
    (32, 64, 112, 3, 1),
    (96, 24, 112, 3, 2),
    (672, 112, 14, 5, 1),
    (728, 728, 19, 3, 1),
]
SMALL = {
    "1x1 image": dict(size=(1, 1)),
    "W=1": dict(size=(5, 1), padding=1),
    "C=1": dict(c=1, out=1, size=(5, 4)),
    "batch 0": dict(n=0, size=(4, 4)),
    "stride > size": dict(size=(2, 3), stride=4, padding=1),
}


@pytest.fixture(params=("triton",))
def backend(request):
    with float32_by("ieee"):
        yield request.param


def on_gpu(op, backend, device=DEVICE, **row):
    require(op, backend)
    return Case(op, *make(op, **row)).to(lambda tensor: tensor.to(device))


def outputs_and_gradients(case, backend, grads=None):
    """(outputs, gradients that come in, gradients by name), from gradients drawn for each output."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in case.tensors.items()}
    with nan_filled():
        outputs = case.run(**leaves, backend=backend)
        if grads is None:
            generator = fresh_generator()
            grads = [draw(generator, output.shape, output.dtype).to(output.device) for output in outputs]
        torch.autograd.backward(outputs, grads)
    return [output.detach() for output in outputs], grads, {name: leaf.grad for name, leaf in leaves.items()}


def check(case, backend):
    outputs, grads, computed = outputs_and_gradients(case, backend)
    check_outputs(case.op, case.tensors, case.options, outputs)
    check_gradients(case.op, case.tensors, case.options, grads, computed, ROUNDED[case.op])


@pytest.mark.parametrize("row", PAIRS, ids=identifier)
@pytest.mark.parametrize("op", OPS)
def test_all_pairs(op, row, backend):
    check(on_gpu(op, backend, **row), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("c", "out", "size", "k", "stride"), NETWORKS)
@pytest.mark.parametrize("op", OPS)
def test_networks(op, c, out, size, k, stride, dtype, backend):
    row = dict(n=3, c=c, out=out, size=(size, size), k=(k, k), stride=stride, prologue="all", dtype=dtype)
    check(on_gpu(op, backend, **row), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row", SMALL.values(), ids=SMALL.keys())
@pytest.mark.parametrize("op", OPS)
def test_small_shapes(op, row, layout, backend):
    check(on_gpu(op, backend, **{"c": 5, "out": 7, "layout": layout, **row}), backend)


@pytest.mark.parametrize("op", STATS)
def test_infinite_shift(op, backend):
    """What lies in the padding, or beyond the last pixel or channel, is zero and not that."""
    case = on_gpu(op, backend, prologue="batch_norm", c=3, out=5)
    case.tensors["shift"][1] = float("inf")
    with nan_filled():
        check_outputs(op, case.tensors, case.options, case.run(backend=backend))


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_sums_alone(op, backend):
    """As a loss of means gives them: expanded numbers."""
    case = on_gpu(op, backend, c=24, out=40)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in case.tensors.items()}
    _, *sums = case.run(**leaves, backend=backend)
    ones = [torch.ones_like(total) for total in sums]
    ours = torch.autograd.grad(sum(total.sum() for total in sums), leaves.values(), retain_graph=True)
    calls.assert_equal(ours, torch.autograd.grad(sums, leaves.values(), ones))


@pytest.mark.parametrize("op", OURS)
def test_repeatable(op, backend):
    case = on_gpu(op, backend, n=16, c=96, out=200, size=(28, 28))
    outputs, grads, computed = outputs_and_gradients(case, backend)
    again, _, same = outputs_and_gradients(case, backend, grads)
    calls.assert_equal(again, outputs)
    calls.assert_equal(same.values(), computed.values())


@pytest.mark.parametrize("op", OURS)
def test_an_image_is_independent_of_the_batch(op, backend):
    case = on_gpu(op, backend, n=16, c=96, out=200, size=(28, 28))
    y, *sums = case.run(backend=backend)
    alone, *of_one = case.run(x=case.x[5:6], backend=backend)
    assert torch.equal(alone, y[5:6])
    if op == SQUEEZE:
        assert torch.equal(of_one[0], sums[0][5:6])


@pytest.mark.parametrize("op", OURS)
def test_side_stream(op, backend):
    case = on_gpu(op, backend, n=4, c=64, size=(56, 56))
    calls.check_call_on_side_stream(lambda x: case.run(x=x, backend=backend), case.x)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", OURS)
def test_device_that_is_not_the_current_one(op, backend):
    assert torch.cuda.current_device() == 0
    case = on_gpu(op, backend, device="cuda:1", c=24)
    outputs, _, computed = outputs_and_gradients(case, backend)
    assert all(tensor.device == torch.device("cuda:1") for tensor in (*outputs, *computed.values()))
    check_outputs(op, case.tensors, case.options, outputs)
    with torch.cuda.device(1):
        calls.assert_equal(case.run(backend=backend), outputs)


@pytest.mark.parametrize("op", OURS)
def test_cuda_graph(op, backend):
    """Forward and backward."""
    case = on_gpu(op, backend, n=4, c=64, size=(28, 28))
    grads = [torch.randn_like(output) for output in case.run(backend=backend)]

    def step(x):
        leaves = {name: t.detach().requires_grad_() for name, t in (case.tensors | {"x": x}).items()}
        outputs = case.run(**leaves, backend=backend)
        return *(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves.values(), grads)

    calls.check_call_in_cuda_graph(step, case.x.clone(memory_format=torch.preserve_format))


@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize("op", OPS)
def test_compile(op, dynamic, backend):
    case = on_gpu(op, backend, c=24, out=40)
    names = [name for name in case.tensors if name != "x"]

    def step(x, *parameters):
        y, *sums = case.run(x=x * 2, **dict(zip(names, parameters, strict=True)), backend=backend)
        return y + 1, *sums

    parameters = tuple(case.tensors[name].requires_grad_() for name in names)
    calls.check_compile(step, parameters, [(n, 24, 14, 14) for n in (4, 6)], dynamic)


@pytest.mark.parametrize("op", OPS)
def test_export(op, backend):
    case = on_gpu(op, backend, n=4, c=24, out=40, size=(14, 14))
    names = list(case.tensors)

    class Step(torch.nn.Module):
        def forward(self, *tensors):
            return case.run(**dict(zip(names, tensors, strict=True)), backend=backend)

    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = (tuple({0: batch} if name == "x" else None for name in names),)
    with torch.no_grad():
        program = torch.export.export(Step(), tuple(case.tensors.values()), dynamic_shapes=shapes)
        exported, expected = program.module()(*case.tensors.values()), case.run(backend=backend)
    for ours, wanted in zip(exported, expected, strict=True):
        torch.testing.assert_close(ours, wanted, **({} if op == "conv2d_stats" else dict(rtol=0, atol=0)))


@pytest.mark.parametrize("row", ({}, {"prologue": "none", "bias": False, "dtype": torch.bfloat16}), ids=identifier)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, row, backend):
    case = on_gpu(op, backend, c=5, out=7, size=(6, 7), stride=2, **row)
    code = cnnfast.ops.backends.CODES[backend]
    overload = getattr(torch.ops.cnnfast, op).default
    outputs = case.run(backend=backend)
    values = case.tensors | {"y": outputs[0], "grad_squeezed": torch.randn_like(outputs[1])}
    values |= dict(zip(("grad", "grad_sum", "grad_squares"), map(torch.randn_like, outputs), strict=False))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in case.tensors.items()}
    torch.library.opcheck(overload, (*arguments_of(overload, {**values, **leaves}, case.options), code))
    backward = getattr(torch.ops.cnnfast, f"{op}_backward").default
    torch.library.opcheck(backward, (*arguments_of(backward, values, case.options), code))


def test_squeeze_packed(backend):
    case = on_gpu(SQUEEZE, backend, stride=2)
    require(f"{SQUEEZE}_packed", backend)
    packed = cnnfast.ops.pack_depthwise_conv2d(case.tensors["weight"], case.tensors["bias"])
    ours = cnnfast.ops.depthwise_conv2d_squeeze_packed(
        case.x, packed, out_channels=38, kernel_size=3, **case.options, backend=backend
    )
    calls.assert_equal(ours, case.run(backend=backend))


@pytest.mark.slow
@pytest.mark.parametrize("op", ("depthwise_conv2d_stats", "pointwise_conv2d_stats", SQUEEZE))
def test_more_than_2_to_the_31_elements(op, backend):
    """The last image is what the op makes of it alone; sums are those of all images."""
    require(op, backend)
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    shape = (34, 64, 1024, 1024)
    assert torch.Size(shape).numel() > 2**31
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, memory_format=torch.channels_last).normal_()
    window = (64, 64, 1, 1) if op.startswith("pointwise") else (64, 1, 3, 3)
    weight = torch.randn(window, dtype=x.dtype, device=DEVICE)
    options = {} if op.startswith("pointwise") else {"padding": 1}
    if op in STATS:
        options |= {name: torch.rand(64, device=DEVICE) for name in ("scale", "shift")}

    def call(x):
        return getattr(cnnfast.ops, op)(x, weight, **options, pre_activation="relu", backend=backend)

    with torch.no_grad():
        y, *sums = call(x)
        assert torch.equal(y[-1:], call(x[-1:])[0])
        per_image = torch.stack([image.double().sum((1, 2)) for image in y])
        if op == SQUEEZE:
            torch.testing.assert_close(sums[0][:, :, 0, 0].double(), per_image / 2**20, rtol=2**-7, atol=1e-5)
        else:
            size = sum(image.double().abs().sum((1, 2)) for image in y)
            assert ((sums[0].double() - per_image.sum(0)).abs() <= 1e-5 * size).all()


@pytest.mark.slow
@pytest.mark.parametrize("op", ("depthwise_conv2d_stats", "pointwise_conv2d_stats"))
def test_gradient_of_more_than_2_to_the_31_elements(op, backend):
    require(op, backend)
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    code = cnnfast.ops.backends.CODES[backend]
    y = torch.empty((34, 64, 1024, 1024), dtype=torch.bfloat16, device=DEVICE, memory_format=torch.channels_last)
    x = torch.empty_like(y.normal_()).normal_()
    window = (64, 64, 1, 1) if op.startswith("pointwise") else (64, 1, 3, 3)
    weight = torch.randn(window, dtype=x.dtype, device=DEVICE)
    vectors = [torch.rand(64, device=DEVICE) for _ in range(4)]  # grad_sum, grad_squares, scale, shift
    geometry = ([1, 1],) if op.startswith("pointwise") else ([1, 1], [1, 1, 1, 1], [1, 1])

    def gradient(y, x):
        backward = getattr(torch.ops.cnnfast, f"{op}_backward")
        return backward(y, *vectors[:2], x, weight, None, *vectors[2:], y, *geometry, 1, 0b00001, code)[0]

    assert torch.equal(gradient(y, x)[-1:], gradient(y[-1:], x[-1:]))
