"""squeeze_excite on a GPU, by both backends, against the reference on the same GPU in float64.

Fails if an element is wrong or unwritten, a kernel runs on another stream or device than PyTorch's current one, can't
be captured or compiled, addresses beyond 2^31 elements wrongly, or an image's bits differ from run to run or with its
neighbours in the batch.
"""

import pytest
import torch
from gpu import calls
from gpu.calls import DEVICE, require, run
from numerics import LAYOUTS, fresh_generator
from op_cases import DTYPES, all_pairs, drawn_away_from_kinks, identifier

import cnnfast

ACTIVATIONS = ("relu", None, "silu", "relu6", "sigmoid", "gelu", "tanh")
PAIRS = all_pairs(
    {
        "dtype": DTYPES,
        "layout": tuple(LAYOUTS),
        "activation": ACTIVATIONS,
        "gate_activation": ("sigmoid", *ACTIVATIONS),
        "post_activation": ACTIVATIONS,
        "c": (72, 1, 3, 17, 40),
        "n": (1, 2, 6),
        "bias": (True, False),
        "residual": (True, False),
        "size": ((7, 8), (1, 1), (19, 15)),
    }
)
NETWORKS = [  # (channels, size, activation, post_activation, residual): SE-ResNet-50, EfficientNet-B0
    (256, 56, "relu", "relu", True),
    (512, 28, "relu", "relu", True),
    (1024, 14, "relu", "relu", True),
    (2048, 7, "relu", "relu", True),
    (32, 112, "silu", None, False),
    (672, 14, "silu", None, False),
    (1152, 7, "silu", None, False),
]


SMALL = {
    "1x1 image": dict(size=(1, 1)),
    "W=1": dict(size=(5, 1)),
    "C=1": dict(c=1, size=(5, 4)),
    "several chunks": dict(size=(40, 33)),
    "gates in two launches": dict(c=2048, size=(2, 2)),
}


@pytest.fixture(params=("triton", "cuda"))
def backend(request):
    """Gradients are Triton's in both cases."""
    require("squeeze_excite", request.param)
    return request.param


pytestmark = pytest.mark.gpu


def drawn(generator, gate_activation="sigmoid", post_activation="relu", **row):
    case = calls.on_gpu("squeeze_excite", generator, **row)
    case.options |= {"gate_activation": gate_activation, "post_activation": post_activation}
    return case


def on_gpu(generator, **row):
    """Away from kinks."""
    return drawn_away_from_kinks(lambda: drawn(generator, away_from_kinks=True, **row))


def terms(case, shape):
    squeezed, channels = case.tensors["reduce_weight"].shape[:2]
    return dict.fromkeys(case.tensors, max(case.x.shape[2:].numel(), channels, squeezed, len(case.x)))


def check(case, generator, backend):
    """Forward and gradients."""
    if calls.refused(case, backend):
        return
    y = run(case, backend)
    case.check(y)
    assert y.stride() == case.x.stride()
    calls.check_gradients(case, generator, backend, terms)


@pytest.mark.parametrize("row", PAIRS, ids=identifier)
def test_all_pairs(row, backend):
    generator = fresh_generator()
    check(on_gpu(generator, **row), generator, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("c", "size", "activation", "post_activation", "residual"), NETWORKS)
def test_networks(c, size, activation, post_activation, residual, layout, dtype, backend):
    """Forward only: of so many relus some are near their kinks, where a gradient has two values."""
    row = dict(n=3, c=c, size=(size, size), activation=activation, residual=residual, dtype=dtype, layout=layout)
    case = drawn(fresh_generator(), post_activation=post_activation, **row)
    if not calls.refused(case, backend):
        case.check(run(case, backend))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row", SMALL.values(), ids=SMALL.keys())
def test_small_shapes(row, layout, backend):
    case = drawn(fresh_generator(), **{"n": 2, "c": 24, "activation": "silu", "layout": layout, **row})
    case.check(run(case, backend))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_of_none(layout, backend):
    case = drawn(fresh_generator(), n=0, layout=layout)
    assert run(case, backend).shape == case.x.shape
    computed = calls.gradients(case, torch.empty_like(case.x), backend)
    assert not any(gradient.any() for gradient in computed.values())


def test_special_values(backend):
    case = drawn(fresh_generator(), n=4, c=8, size=(6, 6), activation="relu6", post_activation="relu6")
    for i, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        case.x[i, i, 2, 3] = value
    case.check(run(case, backend))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("post_activation", (None, "relu", "silu"))
def test_repeatable_and_independent_of_the_batch(post_activation, layout, backend):
    row = dict(n=18, c=96, size=(28, 28), activation="silu", layout=layout)
    case = drawn(fresh_generator(), post_activation=post_activation, **row)
    calls.check_repeatable_and_independent_of_the_batch(case, backend, per_image=("x", "residual"))


def test_side_stream(backend):
    calls.check_side_stream(on_gpu(fresh_generator(), n=4, c=64, size=(56, 56)), backend)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_the_current_one(backend):
    calls.check_device_that_is_not_the_current_one(on_gpu(fresh_generator(), device="cuda:1", c=24), backend)


def test_cuda_graph(backend):
    """Forward and backward."""
    case = on_gpu(fresh_generator(), n=4, c=64, size=(28, 28), post_activation="silu")
    grad = torch.randn_like(case.x)

    def step(x):
        leaves = [tensor.detach().requires_grad_() for tensor in (x, case.tensors["reduce_weight"])]
        y = case.run(x=leaves[0], reduce_weight=leaves[1], backend=backend)
        return y.detach(), *torch.autograd.grad(y, leaves, grad)

    calls.check_call_in_cuda_graph(step, torch.randn_like(case.x))


@pytest.mark.parametrize("dynamic", (False, True))
def test_compile(dynamic, backend):
    case = on_gpu(fresh_generator(), n=4, c=24, size=(14, 14), activation="silu", residual=False)

    def step(x, weight):
        return case.run(x=x * 2, expand_weight=weight, residual=x, backend=backend) + 1

    weight = case.tensors["expand_weight"].clone().requires_grad_()
    calls.check_compile(step, (weight,), [(n, 24, 14, 14) for n in (4, 6)], dynamic)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, backend):
    case = on_gpu(fresh_generator(), c=5, size=(6, 7), layout=layout)
    names = ("x", "reduce_weight", "reduce_bias", "expand_weight", "expand_bias", "residual")
    tensors = [case.tensors[name] for name in names]
    code = cnnfast.ops.backends.CODES[backend]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    torch.library.opcheck(torch.ops.cnnfast.squeeze_excite.default, (*leaves, 1, 3, 1, code))
    args = (torch.randn_like(case.x), *tensors, 1, 3, 1, 0b111111, code)
    torch.library.opcheck(torch.ops.cnnfast.squeeze_excite_backward.default, args)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(backend):
    """The last image of a large batch is what the op makes of it alone; gradients, too."""
    if torch.cuda.mem_get_info()[0] < 22 * 2**30:
        pytest.skip("needs 22 GiB of free GPU memory")
    shape = (34, 64, 1024, 1024)
    assert torch.Size(shape).numel() > 2**31
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, memory_format=torch.channels_last).normal_()
    weights = [torch.randn(*size, 1, 1, dtype=x.dtype, device=DEVICE) / 8 for size in ((16, 64), (64, 16))]
    code = cnnfast.ops.backends.CODES[backend]

    def call(x):
        return cnnfast.squeeze_excite(x, *weights, backend=backend)

    def gradient(grad, x):
        args = (grad, x, weights[0], None, weights[1], None, None, 1, 3, 0, 0b1, code)
        return torch.ops.cnnfast.squeeze_excite_backward(*args)[0]

    y = call(x)
    assert torch.equal(y[-1:], call(x[-1:]))
    assert torch.equal(gradient(y, x)[-1:], gradient(y[-1:], x[-1:]))
