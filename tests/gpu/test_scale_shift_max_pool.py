"""scale_shift_max_pool on a GPU against the reference on the same GPU in float64.

Fails if an element is wrong or unwritten, a gradient goes to another pixel of a window than PyTorch's, a kernel runs on
another stream or device than PyTorch's current one, can't be captured or compiled, addresses beyond 2^31 elements
wrongly, or an image's bits differ from run to run or with its neighbours in the batch.
"""

import pytest
import torch
from gpu import calls
from gpu.calls import DEVICE, require, run
from numerics import LAYOUTS, draw, fresh_generator
from op_cases import DTYPES, NONCONTIGUOUS, all_pairs, identifier
from scale_shift_max_pool_cases import GEOMETRIES, check_gradients, check_output, make

import cnnfast
from cnnfast.ops import activations

pytestmark = pytest.mark.gpu
OP = "scale_shift_max_pool"
PAIRS = all_pairs(
    {
        "dtype": DTYPES,
        "layout": tuple(LAYOUTS),
        "activation": tuple(activations.CODES),
        "geometry": GEOMETRIES,
    }
)
# (channels, size): Xception's, ResNet's
NETWORKS = [(128, 147), (256, 74), (728, 37), (1024, 19), (64, 112)]
SMALL = {
    "1x1 image": ((2, 24, 1, 1), (2, 1, 1)),
    "W=1": ((2, 24, 5, 1), (3, 2, 1)),
    "C=1": ((2, 1, 5, 4), (2, 2, 0)),
    "several tiles": ((2, 24, 40, 33), (3, 1, 1)),
    "batch 0": ((0, 24, 3, 3), (3, 2, 1)),
}


@pytest.fixture(params=("triton",))
def backend(request):
    require(OP, request.param)
    return request.param


def on_gpu(geometry=((2, 24, 13, 11), (3, 2, 1)), device=DEVICE, **row):
    return make(*geometry, **row).to(lambda tensor: tensor.to(device))


def check(case, backend):
    """Forward and gradients."""
    y = run(case, backend)
    check_output(case, y)
    grad = draw(fresh_generator(), y.shape, y.dtype).to(y.device)
    check_gradients(case, grad, calls.gradients(case, grad, backend))


@pytest.mark.parametrize("row", PAIRS, ids=identifier)
def test_all_pairs(row, backend):
    check(on_gpu(**row), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("c", "size"), NETWORKS)
def test_networks(c, size, layout, dtype, backend):
    check(on_gpu(((3, c, size, size), (3, 2, 1)), dtype=dtype, layout=layout), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", SMALL.values(), ids=SMALL.keys())
def test_small_shapes(geometry, layout, backend):
    check(on_gpu(geometry, layout=layout), backend)


@pytest.mark.parametrize("change", [change for change in NONCONTIGUOUS if change != "storage offset"])
def test_inputs_that_are_not_dense(change, backend):
    case = on_gpu(activation="silu")
    case.tensors["x"] = NONCONTIGUOUS[change](case.x.cpu()).to(DEVICE)
    check(case, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeatable_and_independent_of_the_batch(layout, backend):
    case = on_gpu(((18, 96, 28, 28), (3, 2, 1)), layout=layout, activation="silu")
    calls.check_repeatable_and_independent_of_the_batch(case, backend)


def test_side_stream(backend):
    calls.check_side_stream(on_gpu(((4, 64, 56, 56), (3, 2, 1))), backend)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_the_current_one(backend):
    case = on_gpu(device="cuda:1")
    calls.check_device_that_is_not_the_current_one(case, backend, lambda y: check_output(case, y))


def test_cuda_graph(backend):
    calls.check_step_in_cuda_graph(on_gpu(((4, 64, 28, 28), (3, 2, 1)), activation="silu"), backend)


@pytest.mark.parametrize("dynamic", (False, True))
def test_compile(dynamic, backend):
    case = on_gpu(((4, 24, 14, 14), (3, 2, 1)))

    def step(x, scale, shift):
        return case.run(x=x * 2, scale=scale, shift=shift, backend=backend) + 1

    parameters = tuple(case.tensors[name].requires_grad_() for name in ("scale", "shift"))
    calls.check_compile(step, parameters, [(n, 24, 14, 14) for n in (4, 6)], dynamic)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, backend):
    case = on_gpu(layout=layout)
    code, options = cnnfast.ops.backends.CODES[backend], ([3, 2, 1], activations.CODES["relu"])
    y, taps = getattr(torch.ops.cnnfast, OP)(*case.tensors.values(), *options, code)
    leaves = [tensor.clone().requires_grad_() for tensor in case.tensors.values()]
    torch.library.opcheck(getattr(torch.ops.cnnfast, OP).default, (*leaves, *options, code))
    backward = getattr(torch.ops.cnnfast, f"{OP}_backward").default
    torch.library.opcheck(backward, (torch.randn_like(y), *case.tensors.values(), taps, *options, 0b111, code))


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(backend):
    """The last image of a large batch is what the op makes of it alone; gradients, too."""
    if torch.cuda.mem_get_info()[0] < 26 * 2**30:
        pytest.skip("needs 26 GiB of free GPU memory")
    shape = (34, 64, 1024, 1024)
    assert torch.Size(shape).numel() > 2**31
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, memory_format=torch.channels_last).normal_()
    rows = on_gpu(((1, 64, 1, 1), (1, 1, 0))).tensors

    def call(x):
        x = x.detach().requires_grad_()
        y = cnnfast.ops.scale_shift_max_pool(x, rows["scale"], rows["shift"], (3, 1, 1), backend=backend)
        return y.detach(), torch.autograd.grad(y, x, x.detach())[0]

    calls.assert_equal([t[-1:] for t in call(x)], call(x[-1:]))
