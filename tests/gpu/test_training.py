"""Training of blocks and networks on a GPU, made of ops with statistics, beside the same layers of torch.nn there.

Fails if a block trains layer by layer, a gradient, parameter or running statistic is another, autocast breaks, or a
step can't be captured in a CUDA graph.
"""

import copy

import pytest
import torch
from blocks import BLOCKS, SHAPE, pair
from gpu.calls import DEVICE, require
from networks import assert_same_gradients, draw_batch_norms, relative
from numerics import LAYOUTS, float32_by
from torch import nn

import cnnfast
from cnnfast.nn import set_backend

pytestmark = pytest.mark.gpu
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
FUSED = [name for name in BLOCKS if name != "residual"]
NETWORKS = {"mobilenet_v2": dict(width_mult=0.35), "efficientnet_b0": {}, "xception": {}}


@pytest.fixture(autouse=True)
def triton():
    require("scale_shift", "triton")
    with float32_by("ieee"):
        yield


def nodes(y):
    """Names of the graph's nodes."""
    names, seen, found = set(), set(), [y.grad_fn]
    while found:
        node = found.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.add(node.name())
        found += [child for child, _ in node.next_functions]
    return " ".join(names)


def assert_fused(y):
    assert "batch_norm_scale_shift" in nodes(y) and "BatchNorm" not in nodes(y)


def network_of(name):
    network = cnnfast.create_model(name, num_classes=5, drop_rate=0.0, **NETWORKS[name])
    draw_batch_norms(network, torch.randn(2, 3, 65, 65))
    for module in network.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return network.to(DEVICE).train()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ("triton", "auto"))
@pytest.mark.parametrize("name", FUSED)
def test_blocks(name, backend, layout):
    """Some steps of SGD in float64; then inference."""
    plain, ours = (module.to(DEVICE) for module in pair(name))
    set_backend(ours, backend)
    x = LAYOUTS[layout](torch.randn(SHAPE, dtype=torch.float64, device=DEVICE))
    optimizers = [torch.optim.SGD(module.parameters(), 0.1, 0.9) for module in (ours, plain)]
    for step in range(3):
        inputs = [(x * (1 + step)).requires_grad_() for _ in range(2)]
        outputs = [module(i) for module, i in zip((ours, plain), inputs, strict=True)]
        assert_fused(outputs[0])
        assert relative(*outputs) <= 1e-9
        assert outputs[0].is_contiguous(memory_format=FORMATS[layout])
        grad = torch.randn_like(outputs[0])
        for optimizer, output in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            output.backward(grad)
        assert relative(inputs[0].grad, inputs[1].grad) <= 1e-9
        assert_same_gradients(ours, plain, 1e-9)
        for optimizer in optimizers:
            optimizer.step()
        theirs = plain.state_dict()
        for key, value in ours.state_dict().items():
            assert relative(value.double(), theirs[key].double()) <= 1e-9, key
    with torch.no_grad():
        assert relative(ours.eval()(x), plain.eval()(x)) <= 1e-9


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    """In float64, beside the network's own layers."""
    ours = network_of(name).double()
    plain = copy.deepcopy(ours)
    set_backend(plain, "reference")
    x = torch.randn(3, 3, 65, 65, dtype=torch.float64, device=DEVICE).to(memory_format=torch.channels_last)
    outputs = [module(x) for module in (ours, plain)]
    assert_fused(outputs[0])
    assert relative(*outputs) <= 1e-9
    for output in outputs:
        output.square().sum().backward()
    assert_same_gradients(ours, plain, 1e-7)
    theirs = plain.state_dict()
    for key, value in ours.state_dict().items():
        assert relative(value.double(), theirs[key].double()) <= 1e-9, key


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_autocast(name, dtype):
    """A loss near that in float64, no farther than twice the plain layers'; float16 by a step of GradScaler."""
    ours = network_of(name)
    plain, exact = copy.deepcopy(ours), copy.deepcopy(ours).double()
    set_backend(plain, "reference"), set_backend(exact, "reference")
    x, classes = torch.randn(8, 3, 65, 65, device=DEVICE), torch.arange(8, device=DEVICE) % 5
    expected = nn.functional.cross_entropy(exact(x.double()), classes).item()
    losses = []
    for network in (ours, plain):
        optimizer = torch.optim.SGD(network.parameters(), 0.01)
        scaler = torch.amp.GradScaler(DEVICE, enabled=dtype is torch.float16)
        with torch.autocast(DEVICE, dtype):
            y = network(x.to(memory_format=torch.channels_last))
        loss = nn.functional.cross_entropy(y.float(), classes)
        losses.append(loss.item())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert all(parameter.isfinite().all() for parameter in network.parameters())
        if network is ours:
            assert_fused(y)
    assert abs(losses[0] - expected) <= 2 * abs(losses[1] - expected) + 0.1 * expected


@pytest.mark.parametrize("name", ("inverted", "inverted_excite", "xception"))
def test_cuda_graph(name):
    """A step's gradients, replayed on other images, are those of a step that isn't captured."""
    _, ours = pair(name, torch.float32)
    ours = ours.to(DEVICE)
    x = torch.randn(SHAPE, device=DEVICE).to(memory_format=torch.channels_last)

    def step():
        y = ours(x)
        return torch.autograd.grad(y.square().sum(), list(ours.parameters()))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    for ours_, wanted in zip(captured, step(), strict=True):
        assert relative(ours_, wanted) <= 1e-5
