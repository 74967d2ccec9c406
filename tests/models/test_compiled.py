"""torch.compile and torch.export record one packed op a block, and packing as ops on the parameters.

Fails on a graph break, if a compiled or exported network isn't the eager one, if it keeps weights from before a change,
or if it is recorded layer by layer. Small networks of the same blocks; the published ones are slow ones.
"""

import copy

import pytest
import torch
from networks import assert_same_gradients, draw_batch_norms, one_of_each_family, relative
from torch import nn

import cnnfast
from cnnfast.models.efficientnet import EfficientNet, Stage
from cnnfast.models.mobilenet_v2 import MobileNetV2
from cnnfast.models.registry import model_entry
from cnnfast.models.resnet_cifar import CifarResNet
from cnnfast.models.xception import Block

PACKED = {"separable_conv2d_packed", "inverted_residual_packed", "pointwise_conv2d_packed", "conv2d_packed"}


class SmallXception(nn.Module):
    def __init__(self):
        super().__init__()
        self.block1 = Block(3, 8, 2, 2, start_with_relu=False)
        self.block2 = Block(8, 8, 3)

    def forward(self, x):
        return self.block2(self.block1(x))


def small(name):
    torch.manual_seed(11)
    if name == "efficientnet":
        network = EfficientNet((Stage(1, 3, 1, 1, 8), Stage(2, 5, 2, 6, 8)), 5, stem_size=8, num_features=16, eps=1e-3)
    elif name == "mobilenet_v2":
        setting = ((1, 8, 1, 1), (6, 8, 2, 2))
        network = MobileNetV2(5, width_mult=0.1, inverted_residual_setting=setting, round_nearest=4)
    elif name == "resnet":
        network = CifarResNet(1, 5)
    else:
        network = SmallXception()
    draw_batch_norms(network, torch.randn(4, 3, 33, 33))
    return network.eval()


def exact(network, x):
    """Layer by layer, in float64."""
    return network.double()(x.double())


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


class Capture:
    """A torch.compile backend that keeps the ops of the graphs and runs them eagerly."""

    def __init__(self):
        self.ops = []

    def __call__(self, graph, inputs):
        self.ops.append({node.target._schema.name.partition("::")[2] for node in graph.graph.nodes if is_ours(node)})
        return graph


def is_ours(node):
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "cnnfast"


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["efficientnet", *(pytest.param(name, marks=slow) for name in ("mobilenet_v2", "resnet", "xception"))]
)
def test_compile_records_packed_ops(name):
    network, capture = small(name), Capture()
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend=capture)
    with torch.no_grad():
        network(torch.randn(1, 3, 20, 20))  # an eager packing, of which the graph must know nothing
        for size in ((2, 3, 33, 33), (3, 3, 40, 28)):
            x = torch.randn(size)
            assert relative(compiled(x), network(x)) <= 1e-6
        for parameter in network.parameters():
            parameter.mul_(1.1)
        y = compiled(x)
        assert relative(y, network(x)) <= 1e-6
    assert relative(y.double(), exact(network, x)) <= 1e-5
    recorded = set().union(*capture.ops)
    assert {op for op in recorded if op.endswith("_packed")} <= PACKED
    assert {f"pack_{op[:-7]}" for op in recorded & PACKED} == {op for op in recorded if op.startswith("pack_")} != set()
    assert not any(op in recorded for op in ("depthwise_conv2d", "pointwise_conv2d"))


def test_compile_in_training():
    """The graph of a training step is that of the layers; afterwards the eager network packs what was trained."""
    network = small("efficientnet")
    x = torch.randn(2, 3, 33, 33)
    with torch.no_grad():
        network(x)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    network.train()
    compiled(x).square().mean().backward()
    other = small("efficientnet").train()
    other(x).square().mean().backward()
    assert_same_gradients(network, other, 1e-4)


@pytest.mark.parametrize(
    "name, backend",
    [
        ("mobilenet_v2", "aot_eager"),
        pytest.param("resnet", "aot_eager", marks=slow),
        pytest.param("xception", "aot_eager", marks=slow),
        pytest.param("mobilenet_v2", "inductor", marks=slow),
    ],
)
def test_compiled_steps_of_training(name, backend):
    """Parameters and running statistics are those of eager steps, batches of other sizes too, frozen statistics, and
    inference between them."""
    eager = small(name).double().train()
    for module in eager.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    network = copy.deepcopy(eager)
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend=backend)
    optimizers = [torch.optim.SGD(n.parameters(), 0.01, momentum=0.9) for n in (eager, network)]
    for step, images in enumerate((3, 4, 2)):
        x = torch.randn(images, 3, 33, 33, dtype=torch.float64)
        for n, call, optimizer in zip((eager, network), (eager, compiled), optimizers, strict=True):
            n.train(step != 1)
            optimizer.zero_grad()
            call(x).square().mean().backward()
            optimizer.step()
        expected = eager.state_dict()
        for key, value in network.state_dict().items():
            assert relative(value.double(), expected[key].double()) <= 1e-9, key
        with torch.no_grad():
            assert relative(network.eval()(x), eager.eval()(x)) <= 1e-9


@slow
@pytest.mark.parametrize("freezing", [False, True])
@pytest.mark.parametrize("name", ["efficientnet", "mobilenet_v2", "xception"])
def test_inductor(name, freezing):
    network = small(name)
    x = torch.randn(2, 3, 33, 33)
    with torch.no_grad(), torch._inductor.config.patch(freezing=freezing):
        expected = network(x)
        assert relative(torch.compile(network, fullgraph=True)(x), expected) <= 1e-5


@slow
def test_float16_compiles():
    network = small("efficientnet").half()
    x = torch.randn(2, 3, 33, 33).half()
    with torch.no_grad():
        y = torch.compile(network, fullgraph=True, backend="eager")(x)
        assert relative(y.double(), network(x).double()) <= 2e-2


@pytest.mark.parametrize(
    "name, strict",
    [
        ("efficientnet", False),
        ("xception", True),
        ("mobilenet_v2", False),
        pytest.param("mobilenet_v2", True, marks=slow),
        pytest.param("resnet", False, marks=slow),
        pytest.param("efficientnet", True, marks=slow),
        pytest.param("xception", False, marks=slow),
    ],
)
def test_export(name, strict):
    network = small(name)
    x = torch.randn(2, 3, 33, 33)
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(network, (x,), dynamic_shapes=({0: batch},), strict=strict)
        names = {node.target._schema.name.partition("::")[2] for node in program.graph.nodes if is_ours(node)}
        assert {op for op in names if not op.startswith("pack_")} <= PACKED and names & PACKED
        for size in (2, 5):
            x = torch.randn(size, 3, 33, 33)
            assert relative(program.module()(x), network(x)) <= 1e-6


def shortened(network):
    """Without the third and later of equal blocks in a row, which would be recorded as the second is."""
    for chain in [module for module in network.modules() if isinstance(module, nn.Sequential)]:
        shapes = [(type(m), [tuple(t.shape) for t in m.state_dict().values()]) for m in chain]
        for n in reversed(range(2, len(chain))):
            if shapes[n] == shapes[n - 1] == shapes[n - 2] and shapes[n][1]:
                del chain[n]
    return network


@slow
@pytest.mark.parametrize("name", one_of_each_family())
def test_published_networks_compile_and_export(name):
    network = shortened(cnnfast.create_model(name)).eval()
    x = torch.randn(2, model_entry(name).pretrained_cfg["input_size"][0], 75, 75)
    with torch.no_grad():
        expected = network(x)
        assert relative(torch.compile(network, fullgraph=True, backend="aot_eager")(x), expected) <= 1e-5
        assert relative(torch.export.export(network, (x,)).module()(x), expected) <= 1e-5
