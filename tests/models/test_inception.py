"""What the Inception line has besides its twins in timm and torchvision: auxiliary classifiers, fused calls, figures of
the papers, smallest images. The networks that neither package has are in test_googlenet.py.

Fails if an auxiliary classifier differs from torchvision's or acts in inference, if a convolution isn't one call, or if
a factorised filter has other parameters than the paper says.
"""

import copy
import re

import pytest
import torch
from networks import (
    assert_same_gradients,
    draw_batch_norms,
    ops_of,
    relative,
)
from torch import nn

import cnnfast
from cnnfast._peers import plain_network
from cnnfast.models.branches import conv_bn, conv_chain
from cnnfast.models.figures import count_macs, count_parameters
from cnnfast.models.inception_resnet_v2 import ResidualBranches, block8

LINE = ("googlenet", "googlenet_bn", "bn_inception", "se_bn_inception", "inception_v3", "inception_v4")
LINE += ("inception_resnet_v2",)
SLOW = ("inception_v4", "inception_resnet_v2")
BY_DEFAULT_SMALL = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in LINE]


def auxiliary_pair(name):
    """torchvision's network with auxiliary classifiers and without dropout, and ours with its weights."""
    torch.manual_seed(3)
    theirs = plain_network(name, "torchvision", aux_logits=True, num_classes=11)
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    rates = dict(aux_drop_rate=0.0) if name == "googlenet_bn" else {}
    ours = cnnfast.create_model(name, aux_logits=True, num_classes=11, drop_rate=0.0, **rates)
    with torch.no_grad():  # at initialisation signals die out
        for parameter in theirs.parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_normal_(parameter)
    size = 299 if name == "inception_v3" else 65
    draw_batch_norms(theirs, torch.randn(2, 3, size, size))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.double(), ours.double(), size


@pytest.mark.parametrize("name", ["googlenet_bn", pytest.param("inception_v3", marks=pytest.mark.slow)])
def test_auxiliary_classifiers(name):
    """Outputs, gradients, statistics of training, in float64; in eval plain logits, without them."""
    theirs, ours, size = auxiliary_pair(name)
    x = torch.randn(2, 3, size, size + 4, dtype=torch.float64)
    seen = []
    hooks = [
        module.register_forward_hook(lambda *_: seen.append(1))
        for key, module in ours.named_modules()
        if key in ("aux1", "aux2", "AuxLogits")
    ]
    with torch.no_grad():
        small = x[..., :75, :75]
        logits = ours.eval()(small)
        assert isinstance(logits, torch.Tensor) and relative(logits, theirs.eval()(small)) <= 1e-10
    assert not seen
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [network.train()(i) for network, i in zip((ours, theirs), inputs, strict=True)]
    assert type(outputs[0]).__name__ == type(outputs[1]).__name__ and outputs[0]._fields == outputs[1]._fields
    assert len(seen) == len(hooks) == len(outputs[0]) - 1
    for got, expected in zip(*outputs, strict=True):
        assert got.shape == (2, 11) and relative(got, expected) <= 1e-9
    for output in outputs:
        (output[0].square().sum() + sum(0.3 * aux.square().sum() for aux in output[1:])).backward()
    assert relative(inputs[0].grad, inputs[1].grad) <= 1e-8
    assert_same_gradients(ours, theirs, 1e-8)
    expected = dict(theirs.named_buffers())
    for key, buffer in ours.named_buffers():
        assert relative(buffer.double(), expected[key].double()) <= 1e-9, key


@pytest.mark.parametrize("name", ["googlenet_bn", "inception_v3"])
def test_initialisation_of_auxiliary_classifiers(name):
    """Standard deviations as torchvision's, but for the 5x5 convolution's 0.01; the rest is in test_networks.py."""
    theirs, ours = plain_network(name, "torchvision", aux_logits=True), cnnfast.create_model(name, aux_logits=True)
    expected = dict(theirs.named_parameters())
    names = [key for key, weight in ours.named_parameters() if key.lower().startswith("aux") and weight.dim() > 1]
    assert len(names) == {"googlenet_bn": 6, "inception_v3": 3}[name]
    for key in names:
        deviation = 0.01 if key == "AuxLogits.conv1.conv.weight" else expected[key].std()
        assert 0.9 < ours.get_parameter(key).std() / deviation < 1.1, key


def test_options_of_auxiliary_classifiers():
    x = torch.randn(2, 3, 65, 65)
    network = cnnfast.create_model("googlenet_bn", aux_logits=True, num_classes=7)
    with torch.no_grad():
        assert [output.shape for output in network(x)] == [(2, 7)] * 3
        network.reset_classifier(5)
        assert [output.shape for output in network(x)] == [(2, 5)] * 3
        network.reset_classifier(0)
        assert [output.shape for output in network(x)] == [(2, 1024)] * 3
        assert network.forward_features(x).shape == (2, 1024, 2, 2)
    network = cnnfast.create_model("googlenet_bn", aux_logits=True, features_only=True)
    assert [map_.shape[1] for map_ in network.train()(x)] == [64, 192, 480, 832, 1024]
    assert not any("aux" in key for key in network.state_dict())
    torch.manual_seed(2)
    network = cnnfast.create_model("googlenet_bn", aux_logits=True, drop_rate=0.0, aux_drop_rate=0.7)
    plain, one, two = network(x)
    plain_again, one_again, two_again = network(x)
    assert relative(plain, plain_again) < 1e-5
    assert relative(one, one_again) > 1e-2 and relative(two, two_again) > 1e-2


@pytest.mark.parametrize(
    "name, size, says",
    [
        ("inception_v3", (2, 3, 298, 320), "299 to .* for the auxiliary classifiers, got shape (2, 3, 298, 320)"),
        ("googlenet", (2, 3, 222, 230), "223 to 270 high and wide for the auxiliary classifiers"),
        ("googlenet", (2, 3, 230, 271), "223 to 270 high and wide for the auxiliary classifiers"),
        ("googlenet", (2, 3, 30, 230), "x must be at least 31 x 31"),
    ],
)
def test_images_that_auxiliary_classifiers_do_not_take(name, size, says):
    with torch.device("meta"):
        network = cnnfast.create_model(name, aux_logits=True)
        with pytest.raises(ValueError, match=re.escape(says).replace(re.escape(".*"), ".*")):
            network(torch.empty(size))


@pytest.mark.parametrize(
    "name, sizes", [("inception_v3", (299, 301)), ("googlenet", (223, 270)), ("googlenet_bn", (15, 31))]
)
def test_images_that_auxiliary_classifiers_take(name, sizes):
    with torch.device("meta"):
        network = cnnfast.create_model(name, aux_logits=True, num_classes=3)
        for size in sizes:
            assert [output.shape for output in network(torch.empty(2, 3, size, size))][1:] == [(2, 3)] * (
                1 if name == "inception_v3" else 2
            )


@pytest.mark.parametrize("name", BY_DEFAULT_SMALL)
def test_calls(name):
    """A call for each convolution with what follows it, of whatever layout x is; maps are channels_last."""
    network = cnnfast.create_model(name, num_classes=3).eval()
    kernels = [m.kernel_size for m in network.modules() if isinstance(m, nn.Conv2d)]
    gates = 20 if name == "se_bn_inception" else 0
    expected = {
        "pointwise_conv2d_packed": kernels.count((1, 1)) - gates,
        "conv2d_packed": len(kernels) - kernels.count((1, 1)),
        "squeeze_excite_packed": gates // 2,
        "local_response_norm": 2 if name == "googlenet" else 0,
    }
    x = torch.randn(1, 3, 75, 75)
    with torch.no_grad():
        called = ops_of(network, x)
        assert {op: called.count(op) for op in called} == {op: count for op, count in expected.items() if count}
        assert network.forward_features(x).is_contiguous(memory_format=torch.channels_last)
        assert relative(network(x), network(x.to(memory_format=torch.channels_last))) <= 1e-5
        network.bfloat16()
        assert network.forward_features(x.bfloat16()).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", BY_DEFAULT_SMALL)
def test_smallest_images(name):
    with torch.device("meta"):
        network = cnnfast.create_model(name).eval()
        cnnfast.nn.set_backend(network, "reference")
        size = network.min_size
        assert network(torch.empty(1, 3, size, size)).shape == (1, 1000)
        with pytest.raises(ValueError, match=f"x must be at least {size} x {size}"):
            network(torch.empty(1, 3, size, size - 1))
        network.min_size = 1
        with pytest.raises(RuntimeError):  # not refused for nothing
            network(torch.empty(1, 3, size, size - 1))


@pytest.mark.parametrize(
    "name, macs, sizes",
    [
        ("googlenet", 1_582_671_872, [112, 56, 28, 14, 7]),
        ("googlenet_bn", 1_498_376_192, [112, 56, 28, 14, 7]),
        ("bn_inception", 2_032_600_064, [112, 56, 28, 14, 7]),
        ("se_bn_inception", 2_033_239_424, [112, 56, 28, 14, 7]),
        ("inception_v3", 5_713_216_096, [147, 71, 35, 17, 8]),
        pytest.param("inception_v4", 12_253_974_624, [147, 73, 35, 17, 8], marks=pytest.mark.slow),
        pytest.param("inception_resnet_v2", 13_155_794_016, [147, 71, 35, 17, 8], marks=pytest.mark.slow),
    ],
)
def test_figures_of_the_papers(name, macs, sizes):
    """Multiply-adds, and the sizes of the feature maps at the network's resolution."""
    assert count_macs(name) == macs
    with torch.device("meta"):
        network = cnnfast.create_model(name, features_only=True).eval()
        cnnfast.nn.set_backend(network, "reference")
        size = 224 if sizes[0] == 112 else 299
        maps = network(torch.empty(1, 3, size, size))
    assert [tuple(one.shape[1:]) for one in maps] == [
        (channels, side, side) for channels, side in zip(network.feature_info.channels(), sizes, strict=True)
    ]
    assert [round(size / side) for side in sizes] == pytest.approx(network.feature_info.reduction(), rel=0.17)


def filters(module):
    """Numbers in a convolution's filter of one input and one output channel."""
    rows, columns = module.conv.kernel_size
    return rows * columns


def test_factorisations():
    """5x5 as two 3x3: 25 -> 18; 7x7 as 1x7 and 7x1: 2/7; v3's stem, 7x7 as three 3x3: 49 -> 27."""
    with torch.device("meta"):
        five = cnnfast.create_model("googlenet").inception3a.branch3[1]
        module = cnnfast.create_model("bn_inception").inception_3a
        v3 = cnnfast.create_model("inception_v3")
        dense7 = cnnfast.create_model("googlenet_bn").conv1
    double = [getattr(module, f"double_3x3_{n}") for n in (1, 2)]
    assert (filters(five), sum(map(filters, double))) == (25, 18)
    row, column = v3.Mixed_6e.branch7x7_2, v3.Mixed_6e.branch7x7_3
    assert row.conv.weight.shape == (192, 192, 1, 7) and column.conv.weight.shape == (192, 192, 7, 1)
    dense = 192 * 192 * 7 * 7
    assert 7 * (row.conv.weight.numel() + column.conv.weight.numel()) == 2 * dense
    assert sum(map(filters, (v3.Mixed_7b.branch3x3_2a, v3.Mixed_7b.branch3x3_2b))) * 3 == 2 * 3 * 3
    stem = [v3.Conv2d_1a_3x3, v3.Conv2d_2a_3x3, v3.Conv2d_2b_3x3]
    assert (filters(dense7), sum(map(filters, stem))) == (49, 27)


def test_auxiliary_parameters():
    """Of v3 3,326,696; of GoogLeNet 6,379,728, nearly as many as the network's."""
    with torch.device("meta"):
        for name, extra in (("inception_v3", 3_326_696), ("googlenet", 6_379_728), ("googlenet_bn", 6_379_984)):
            with_them, without = (cnnfast.create_model(name, aux_logits=aux) for aux in (True, False))
            assert count_parameters(with_them) - count_parameters(without) == extra


def test_gradient_checkpointing():
    """The same gradients and statistics, auxiliary classifiers included, and modules that are computed twice."""
    torch.manual_seed(4)
    options = dict(num_classes=5, aux_logits=True, drop_rate=0.0, aux_drop_rate=0.0)
    network = cnnfast.create_model("googlenet_bn", **options).double()
    other = copy.deepcopy(network)
    other.set_grad_checkpointing()
    counts = []
    x = torch.randn(2, 3, 65, 65, dtype=torch.float64)
    for one in (network, other):
        one.inception4c.register_forward_pre_hook(lambda *_: counts.append(1))
        sum(output.square().sum() for output in one(x)).backward()
        counts.append(0)
    assert counts == [1, 0, 1, 1, 0]
    assert_same_gradients(other, network, 1e-10)
    expected = dict(network.named_buffers())
    assert all(torch.equal(buffer, expected[key]) for key, buffer in other.named_buffers())


def test_residual_scale_is_part_of_the_weights():
    """Of a block with another scale than the published, in float64."""
    torch.manual_seed(5)
    block = block8(0.7).double().eval()
    draw_batch_norms(block, torch.randn(2, 2080, 3, 5, dtype=torch.float64))
    x = torch.randn(3, 2080, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        y = block(x)
        assert ops_of(block, x).count("pointwise_conv2d_packed") == 3
        joined = torch.cat([block.branch0(x), block.branch1(x)], 1)
        residual = torch.nn.functional.conv2d(joined, block.conv2d.weight, block.conv2d.bias)
        assert relative(y, torch.relu(x + 0.7 * residual)) <= 1e-12


def test_compiled_block():
    """torch.compile records each convolution of the branches as one op, in one graph."""
    torch.manual_seed(6)
    torch._dynamo.reset()
    modules = {"branch0": conv_bn(8, 3, 1), "branch1": conv_chain(8, (5, 1), (4, (1, 7)))}
    block = ResidualBranches(modules, 7, 8, 0.3).eval()
    draw_batch_norms(block, torch.randn(4, 8, 9, 9))
    recorded = []

    def backend(graph, _):
        recorded.extend(node.target._schema.name for node in graph.graph.nodes if hasattr(node.target, "_schema"))
        return graph.forward

    x = torch.randn(2, 8, 9, 7)
    with torch.no_grad():
        assert relative(torch.compile(block, backend=backend, fullgraph=True)(x), block(x)) <= 1e-6
    packed = [name for name in recorded if name.endswith("packed")]
    assert packed == ["cnnfast::pointwise_conv2d_packed"] * 2 + [
        "cnnfast::conv2d_packed",
        "cnnfast::pointwise_conv2d_packed",
    ]


@pytest.mark.parametrize("name", BY_DEFAULT_SMALL)
def test_features_only(name):
    """The asked maps, of a network without what lies behind them."""
    network = cnnfast.create_model(name, num_classes=3).eval()
    part = cnnfast.create_model(name, features_only=True, out_indices=(1, 3)).eval()
    state = network.state_dict()
    part.load_state_dict({key: state.pop(key) for key in part.state_dict()})
    assert {key.partition(".")[0] for key in state} >= {network.classifier_name}
    assert count_parameters(part) < count_parameters(network) - network.get_classifier().weight.numel()
    x = torch.randn(1, 3, 83, 75)
    with torch.no_grad():
        maps = part(x)
        assert all(map(torch.equal, maps, network.forward_intermediates(x, (1, 3), intermediates_only=True)))
    assert [one.shape[1] for one in maps] == part.feature_info.channels() == network.feature_info.channels((1, 3))
