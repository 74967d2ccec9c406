"""What the tests of every op on a GPU share: cases of op_cases.py there, through the public function."""

import pytest
import torch
from numerics import assert_gradients_by_policy, draw, float32_by, nan_filled
from op_cases import Case, drawn_away_from_kinks, make, schema_arguments, with_exact_gate

import cnnfast
from cnnfast.ops import cuda_kernels

DEVICE = "cuda"


def require(op, backend):
    reasons = cnnfast.ops.can_run(op, backend, torch.device(DEVICE))
    if reasons:
        pytest.skip("; ".join(reasons))


def on_gpu(op, *args, device=DEVICE, **row):
    return make(op, *args, **row).to(lambda tensor: tensor.to(device))


def away_from_kinks(op, generator, **row):
    return drawn_away_from_kinks(lambda: with_exact_gate(on_gpu(op, generator, away_from_kinks=True, **row)))


def run(case, backend):
    with nan_filled():
        return case.run(backend=backend)


def refused(case, backend):
    """Whether the C++ kernels don't take the case, which they say in one sentence."""
    if backend != "cuda" or case.op not in cuda_kernels.KERNELS:
        return False
    names = [argument.name for argument in getattr(torch.ops.cnnfast, case.op).default._schema.arguments]
    refusal = cuda_kernels.refusal(case.op, dict(zip(names, schema_arguments(case, case.op), strict=False)))
    if refusal is not None:
        with pytest.raises(ValueError, match="with backend 'cuda'"):
            run(case, backend)
    return refusal is not None


def gradients(case, grad, backend):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in case.tensors.items()}
    with nan_filled():
        case.run(**leaves, backend=backend).backward(grad)
    return {name: leaf.grad for name, leaf in leaves.items()}


def check_gradients(case, generator, backend, terms, rounded=0):
    """terms: of the longest sum in each tensor's gradient, from the case and the result's shape."""
    shape = case.reference(**case.tensors, **case.options).shape
    grad = draw(generator, shape, case.x.dtype).to(case.x.device)
    ours = gradients(case, grad, backend)
    assert_gradients_by_policy(
        ours, case.reference, grad, case.tensors, case.options, terms=terms(case, shape), rounded=rounded
    )


def check_repeatable_and_independent_of_the_batch(case, backend, per_image=("x",)):
    """per_image: the tensors of which each image has its own part. case: of at least 6 images."""
    y = run(case, backend)
    grad = torch.randn_like(y)
    first, second = gradients(case, grad, backend), gradients(case, grad, backend)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    one = {name: case.tensors[name][5:6] for name in per_image if name in case.tensors}
    alone = Case(case.op, case.tensors | one, case.options)
    assert torch.equal(run(alone, backend), y[5:6])
    of_one = gradients(alone, grad[5:6], backend)
    for name in one:
        assert torch.equal(of_one[name], first[name][5:6]), name


def assert_equal(ours, expected):
    """Bits of a tensor, or of each of several."""
    for a, b in zip(tensors_of(ours), tensors_of(expected), strict=True):
        assert torch.equal(a, b)


def tensors_of(result):
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def check_tf32_where_allowed(case, backend):
    """Nearer to the reference than TF32's 2^-11 and farther than float32's 2^-24, and only with PyTorch's leave."""
    exact = run(case, backend).double()
    with float32_by("tf32"):
        allowed = run(case, backend).double()
    error = ((allowed - exact).norm() / exact.norm()).item()
    assert error < 2.0**-10
    if torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0):
        assert error > 2.0**-16, "TF32 is allowed, and not taken"


def check_side_stream(case, backend):
    check_call_on_side_stream(lambda x: case.run(x=x, backend=backend), case.x)


def check_call_on_side_stream(call, source):
    """On another stream, behind work that takes long: a kernel on the default stream would read x too early."""
    expected = call(source)
    x = torch.zeros_like(source)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.copy_(source)
        result = call(x)
    stream.synchronize()
    assert_equal(result, expected)


def check_device_that_is_not_the_current_one(case, backend, check=None):
    """case: on cuda:1. check: of its result, if not the case's own."""
    assert torch.cuda.current_device() == 0
    y = run(case, backend)
    computed = gradients(case, torch.randn_like(y), backend)
    assert all(tensor.device == torch.device("cuda:1") for tensor in (y, *computed.values()))
    (check or case.check)(y)
    with torch.cuda.device(1):
        assert torch.equal(run(case, backend), y)


def check_cuda_graph(case, backend):
    check_call_in_cuda_graph(
        lambda x: case.run(x=x, backend=backend), case.x.clone(memory_format=torch.preserve_format)
    )


def check_step_in_cuda_graph(case, backend):
    """Forward and backward."""
    grad = torch.randn_like(run(case, backend))

    def step(x):
        leaves = {name: t.detach().requires_grad_() for name, t in (case.tensors | {"x": x}).items()}
        y = case.run(**leaves, backend=backend)
        return y.detach(), *torch.autograd.grad(y, leaves.values(), grad)

    check_call_in_cuda_graph(step, case.x.clone(memory_format=torch.preserve_format))


def check_call_in_cuda_graph(call, x):
    """x is overwritten."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(x)  # compiled before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(x)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(captured, call(x))


def check_compile(step, parameters, shapes, dynamic):
    """Values, strides and gradients of step(x, *parameters), compiled once, for x of each shape."""
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for shape in shapes:
        x = torch.randn(shape, device=DEVICE).to(memory_format=torch.channels_last).requires_grad_()
        of_ours, of_expected = [], []
        for call, of in ((compiled, of_ours), (step, of_expected)):
            results = tensors_of(call(x, *parameters))
            grads = torch.autograd.grad(sum(result.sum() for result in results), (x, *parameters))
            of += [*results, *grads]
        for i, (ours, expected) in enumerate(zip(of_ours, of_expected, strict=True)):
            result = i < len(of_ours) - 1 - len(parameters)
            torch.testing.assert_close(ours, expected, **({} if result else dict(rtol=1e-4, atol=1e-3)))
            assert ours.stride() == expected.stride() or not result
