"""scale_shift, scale_shift_excite and batch_norm_scale_shift on a GPU against the reference on the same GPU in float64.

Fails if an element is wrong or unwritten, a kernel runs on another stream or device than PyTorch's current one, can't
be captured or compiled, addresses beyond 2^31 elements wrongly, or an image's bits differ from run to run or with its
neighbours in the batch.
"""

import pytest
import torch
from gpu import calls
from gpu.calls import DEVICE, require, run
from numerics import LAYOUTS, draw, fresh_generator
from op_cases import DTYPES, NONCONTIGUOUS, Case, all_pairs, arguments_of, identifier
from scale_shift_cases import OPS, check_output, make, sums_of

import cnnfast
from cnnfast.ops import activations

pytestmark = pytest.mark.gpu
BATCH_NORM = "batch_norm_scale_shift"
PAIRS = all_pairs(
    {
        "dtype": DTYPES,
        "layout": tuple(LAYOUTS),
        "activation": tuple(activations.CODES),
        "residual": (True, False),
        "size": ((2, 72, 7, 8), (6, 17, 19, 15), (1, 1, 1, 1), (3, 3, 5, 1), (2, 40, 40, 33), (70, 16, 3, 2)),
    }
)
NETWORKS = [(24, 56), (160, 7), (728, 19), (2048, 10), (32, 112), (240, 28), (1152, 7)]  # (channels, size)
SMALL = {
    "1x1 image": (2, 24, 1, 1),
    "W=1": (2, 24, 5, 1),
    "C=1": (2, 1, 5, 4),
    "several tiles": (2, 24, 40, 33),
    "batch 0": (0, 24, 3, 3),
}


@pytest.fixture(params=("triton",))
def backend(request):
    require("scale_shift", request.param)
    return request.param


def on_gpu(op, *args, device=DEVICE, **row):
    return Case(op, *make(op, *args, **row)).to(lambda tensor: tensor.to(device))


def terms(case, shape):
    return dict.fromkeys(case.tensors, max(shape.numel() // shape[1], shape[1], 4))


def check(case, backend):
    """Forward and gradients."""
    check_output(case.op, case.tensors, case.options, run(case, backend))
    calls.check_gradients(case, fresh_generator(), backend, terms)


@pytest.mark.parametrize("row", PAIRS, ids=identifier)
@pytest.mark.parametrize("op", OPS)
def test_all_pairs(op, row, backend):
    check(on_gpu(op, **row), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("c", "size"), NETWORKS)
@pytest.mark.parametrize("op", OPS)
def test_networks(op, c, size, layout, dtype, backend):
    check(on_gpu(op, (3, c, size, size), dtype, layout, activation="silu"), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SMALL.values(), ids=SMALL.keys())
@pytest.mark.parametrize("op", OPS)
def test_small_shapes(op, size, layout, backend):
    check(on_gpu(op, size, layout=layout), backend)


@pytest.mark.parametrize("change", NONCONTIGUOUS)
@pytest.mark.parametrize("op", OPS)
def test_inputs_that_are_not_dense(op, change, backend):
    """Unaligned ones, too; other formats of the residual and of the gradient that comes in."""
    case = on_gpu(op, (2, 24, 6, 5), activation="silu")
    case.tensors["x"] = (
        NONCONTIGUOUS[change](case.x.cpu()).to(DEVICE) if change != "storage offset" else shifted(case.x)
    )
    if "residual" in case.tensors:
        case.tensors["residual"] = case.tensors["residual"].contiguous()
    check(case, backend)


def shifted(x):
    """x, not aligned to its vectors."""
    flat = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype, device=x.device)
    return flat.as_strided(x.shape, x.stride(), 1).copy_(x)


@pytest.mark.parametrize("op", OPS)
def test_special_values(op, backend):
    case = on_gpu(op, (4, 8, 6, 6), residual=False)
    for i, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        case.x[i, i, 2, 3] = value
    check_output(op, case.tensors, case.options, run(case, backend))
    case = on_gpu(op, (2, 3, 3, 3), activation="sigmoid", residual=False)
    case.tensors["shift"][1] = float("inf")
    check_output(op, case.tensors, case.options, run(case, backend))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_repeatable_and_independent_of_the_batch(op, layout, backend):
    case = on_gpu(op, (18, 96, 28, 28), layout=layout, activation="silu")
    calls.check_repeatable_and_independent_of_the_batch(case, backend, per_image=("x", "residual"))


@pytest.mark.parametrize("op", OPS)
def test_side_stream(op, backend):
    calls.check_side_stream(on_gpu(op, (4, 64, 56, 56)), backend)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", OPS)
def test_device_that_is_not_the_current_one(op, backend):
    case = on_gpu(op, device="cuda:1")
    calls.check_device_that_is_not_the_current_one(
        case, backend, lambda y: check_output(op, case.tensors, case.options, y)
    )


@pytest.mark.parametrize("op", OPS)
def test_cuda_graph(op, backend):
    calls.check_step_in_cuda_graph(on_gpu(op, (4, 64, 28, 28), activation="silu"), backend)


@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize("op", OPS)
def test_compile(op, dynamic, backend):
    case = on_gpu(op, (4, 24, 14, 14), residual=False, activation="silu")
    names = [name for name in case.tensors if name != "x"]

    def step(x, *parameters):
        return case.run(x=x * 2, **dict(zip(names, parameters, strict=True)), backend=backend) + 1

    parameters = tuple(case.tensors[name].requires_grad_() for name in names)
    calls.check_compile(step, parameters, [(n, 24, 14, 14) for n in (4, 6)], dynamic)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", (*OPS, BATCH_NORM))
def test_opcheck(op, layout, backend):
    if op == BATCH_NORM:
        tensors, options = sums_of(torch.randn(2, 19, 5, 4, device=DEVICE))
    else:
        case = on_gpu(op, (2, 5, 6, 7), layout=layout)
        tensors, options = case.tensors, case.options
    code = cnnfast.ops.backends.CODES[backend]
    values = tensors | options | {"grad": torch.randn_like(tensors.get("x", tensors.get("y")))}
    if op == BATCH_NORM:
        values |= {name: torch.randn_like(tensors["sum"]) for name in ("grad_scale", "grad_shift")}
    codes = {name: value for name, value in options.items() if name.endswith("activation")}
    leaves = {name: t.clone().requires_grad_(name != "y") for name, t in tensors.items()}
    overload = getattr(torch.ops.cnnfast, op).default
    torch.library.opcheck(overload, (*arguments_of(overload, {**values, **leaves}, codes), code))
    backward = getattr(torch.ops.cnnfast, f"{op}_backward").default
    torch.library.opcheck(backward, (*arguments_of(backward, values, codes), code))


@pytest.mark.parametrize("affine", (True, False))
@pytest.mark.parametrize("c", (1, 17, 728, 2048))
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_norm(dtype, c, affine, backend):
    """Values, and gradients of what is differentiable, are the reference's in float64, rounded once."""
    tensors, options = sums_of(torch.randn(3, c, 5, 4).to(dtype).to(DEVICE))
    if not affine:
        tensors = {name: t for name, t in tensors.items() if name not in ("weight", "bias")}
    single, double = (
        {
            name: t.to(torch.float64 if wide else t.dtype, copy=True).requires_grad_(name != "y")
            for name, t in tensors.items()
        }
        for wide in (False, True)
    )
    got = Case(BATCH_NORM, single, options).run(backend=backend)
    expected = Case(BATCH_NORM, double, options).run(backend="reference")
    grads = [draw(fresh_generator(), (c,), got[0].dtype).to(DEVICE) for _ in range(2)]
    torch.autograd.backward(got[:2], grads)
    torch.autograd.backward(expected[:2], [grad.double() for grad in grads])
    eps = torch.finfo(got[0].dtype).eps
    pairs = [*zip(got, expected, strict=True), *((single[n].grad, double[n].grad) for n in tensors if n != "y")]
    for ours, wanted in pairs:
        torch.testing.assert_close(ours.double(), wanted, rtol=4 * eps, atol=eps)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_more_than_2_to_the_31_elements(op, backend):
    """The last image of a large batch is what the op makes of it alone; gradients, too."""
    if torch.cuda.mem_get_info()[0] < 26 * 2**30:
        pytest.skip("needs 26 GiB of free GPU memory")
    shape = (34, 64, 1024, 1024)
    assert torch.Size(shape).numel() > 2**31
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, memory_format=torch.channels_last).normal_()
    tensors = on_gpu(op, (1, 64, 1, 1), torch.bfloat16, residual=False).tensors

    def call(x):
        x = x.detach().requires_grad_()
        y = getattr(cnnfast.ops, op)(**tensors | {"x": x}, activation="relu", backend=backend)
        return y.detach(), torch.autograd.grad(y, x, x.detach())[0]

    calls.assert_equal([t[-1:] for t in call(x)], call(x[-1:]))
