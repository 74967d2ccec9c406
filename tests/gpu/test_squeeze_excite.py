"""squeeze_excite on a GPU, by Triton, against the reference on the same GPU in float64.

Fails if an element is wrong or unwritten, a kernel runs on another stream or device than PyTorch's current one, can't
be captured or compiled, addresses beyond 2^31 elements wrongly, or an image's bits differ from run to run or with its
neighbours in the batch.
"""

import pytest
import torch
from numerics import LAYOUTS, assert_gradients_by_policy, draw, fresh_generator, nan_filled
from op_cases import DTYPES, all_pairs, drawn_away_from_kinks, identifier, make

import cnnfast

DEVICE = "cuda"
BACKEND = "triton"
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


@pytest.fixture(autouse=True)
def require_triton():
    reasons = cnnfast.ops.can_run("squeeze_excite", BACKEND, torch.device(DEVICE))
    if reasons:
        pytest.skip("; ".join(reasons))


pytestmark = pytest.mark.gpu


def on_gpu(generator, device=DEVICE, gate_activation="sigmoid", post_activation="relu", **row):
    """Away from kinks."""

    def drawn():
        case = make("squeeze_excite", generator, away_from_kinks=True, **row).to(lambda tensor: tensor.to(device))
        case.options |= {"gate_activation": gate_activation, "post_activation": post_activation}
        return case

    return drawn_away_from_kinks(drawn)


def run(case, **changes):
    with nan_filled():
        return case.run(backend=BACKEND, **changes)


def gradients(case, grad):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in case.tensors.items()}
    with nan_filled():
        case.run(**leaves, backend=BACKEND).backward(grad)
    return {name: leaf.grad for name, leaf in leaves.items()}


def check(case, generator):
    """Forward and gradients."""
    y = run(case)
    case.check(y)
    assert y.stride() == case.x.stride()
    grad = draw(generator, case.x.shape, case.x.dtype).to(DEVICE)
    squeezed, channels = case.tensors["reduce_weight"].shape[:2]
    longest = max(case.x.shape[2:].numel(), channels, squeezed, len(case.x))
    terms = dict.fromkeys(case.tensors, longest)
    ours = gradients(case, grad)
    assert_gradients_by_policy(ours, case.reference, grad, case.tensors, case.options, terms=terms)


@pytest.mark.parametrize("row", PAIRS, ids=identifier)
def test_all_pairs(row):
    generator = fresh_generator()
    check(on_gpu(generator, **row), generator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("c", "size", "activation", "post_activation", "residual"), NETWORKS)
def test_networks(c, size, activation, post_activation, residual, layout, dtype):
    """Forward only: of so many relus some are near their kinks, where a gradient has two values."""
    row = dict(n=3, c=c, size=(size, size), activation=activation, residual=residual, dtype=dtype, layout=layout)
    case = make("squeeze_excite", fresh_generator(), **row).to(lambda tensor: tensor.to(DEVICE))
    case.options["post_activation"] = post_activation
    case.check(run(case))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_of_none(layout):
    case = make("squeeze_excite", fresh_generator(), n=0, layout=layout).to(lambda tensor: tensor.to(DEVICE))
    assert run(case).shape == case.x.shape
    computed = gradients(case, torch.empty_like(case.x))
    assert not any(gradient.any() for gradient in computed.values())


def test_special_values():
    case = make("squeeze_excite", fresh_generator(), n=4, c=8, size=(6, 6), activation="relu6")
    for i, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        case.x[i, i, 2, 3] = value
    case = case.to(lambda tensor: tensor.to(DEVICE))
    case.check(run(case))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("post_activation", (None, "relu", "silu"))
def test_repeatable_and_independent_of_the_batch(post_activation, layout):
    generator = fresh_generator()
    row = dict(n=18, c=96, size=(28, 28), activation="silu", layout=layout)
    case = make("squeeze_excite", generator, **row).to(lambda tensor: tensor.to(DEVICE))
    case.options["post_activation"] = post_activation
    grad = LAYOUTS[layout](draw(generator, case.x.shape).to(DEVICE))
    y, first, second = run(case), gradients(case, grad), gradients(case, grad)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    for name in ("x", "residual"):
        case.tensors[name] = case.tensors[name][5:6]
    assert torch.equal(run(case), y[5:6])
    assert torch.equal(gradients(case, grad[5:6])["x"], first["x"][5:6])


def test_side_stream():
    """On another stream, behind work that takes long: a kernel on the default stream would read x too early."""
    case = on_gpu(fresh_generator(), n=4, c=64, size=(56, 56))
    expected = run(case)
    x = torch.zeros_like(case.x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.copy_(case.x)
        y = case.run(x=x, backend=BACKEND)
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_the_current_one():
    case = on_gpu(fresh_generator(), "cuda:1", c=24)
    assert torch.cuda.current_device() == 0
    y = run(case)
    computed = gradients(case, torch.randn_like(y))
    assert all(tensor.device == torch.device("cuda:1") for tensor in (y, *computed.values()))
    case.check(y)
    with torch.cuda.device(1):
        assert torch.equal(run(case), y)


def test_cuda_graph():
    """Forward and backward."""
    case = on_gpu(fresh_generator(), n=4, c=64, size=(28, 28), post_activation="silu")
    x, grad = (torch.randn_like(case.x) for _ in range(2))

    def step():
        leaves = [tensor.detach().requires_grad_() for tensor in (x, case.tensors["reduce_weight"])]
        y = case.run(x=leaves[0], reduce_weight=leaves[1], backend=BACKEND)
        return y.detach(), *torch.autograd.grad(y, leaves, grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiled before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        for ours, expected in zip(captured, step(), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("dynamic", (False, True))
def test_compile(dynamic):
    case = on_gpu(fresh_generator(), n=4, c=24, size=(14, 14), activation="silu", residual=False)
    weight = case.tensors["expand_weight"].clone().requires_grad_()

    def step(x, weight):
        return case.run(x=x * 2, expand_weight=weight, residual=x, backend=BACKEND) + 1

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for n in (4, 6):
        x = torch.randn(n, 24, 14, 14, device=DEVICE).to(memory_format=torch.channels_last)
        ours, expected = compiled(x, weight), step(x, weight)
        torch.testing.assert_close(ours, expected)
        assert ours.stride() == expected.stride()
        (theirs,) = torch.autograd.grad(expected.sum(), weight)
        (grad,) = torch.autograd.grad(ours.sum(), weight)
        torch.testing.assert_close(grad, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    case = on_gpu(fresh_generator(), c=5, size=(6, 7), layout=layout)
    names = ("x", "reduce_weight", "reduce_bias", "expand_weight", "expand_bias", "residual")
    tensors = [case.tensors[name] for name in names]
    code = cnnfast.ops.backends.CODES[BACKEND]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    torch.library.opcheck(torch.ops.cnnfast.squeeze_excite.default, (*leaves, 1, 3, 1, code))
    args = (torch.randn_like(case.x), *tensors, 1, 3, 1, 0b111111, code)
    torch.library.opcheck(torch.ops.cnnfast.squeeze_excite_backward.default, args)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    """The last image of a large batch is what the op makes of it alone; gradients, too."""
    if torch.cuda.mem_get_info()[0] < 22 * 2**30:
        pytest.skip("needs 22 GiB of free GPU memory")
    shape = (34, 64, 1024, 1024)
    assert torch.Size(shape).numel() > 2**31
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, memory_format=torch.channels_last).normal_()
    weights = [torch.randn(*size, 1, 1, dtype=x.dtype, device=DEVICE) / 8 for size in ((16, 64), (64, 16))]
    code = cnnfast.ops.backends.CODES[BACKEND]

    def call(x):
        return cnnfast.squeeze_excite(x, *weights, backend=BACKEND)

    def gradient(grad, x):
        args = (grad, x, weights[0], None, weights[1], None, None, 1, 3, 0, 0b1, code)
        return torch.ops.cnnfast.squeeze_excite_backward(*args)[0]

    y = call(x)
    assert torch.equal(y[-1:], call(x[-1:]))
    assert torch.equal(gradient(y, x)[-1:], gradient(y[-1:], x[-1:]))
