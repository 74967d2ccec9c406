"""LeNets against plain builds, and the papers' counts of parameters and connections. Fails if a connection, a
subsampling or the squashing function differs."""

import pytest
import torch
import torch.nn.functional as F
from networks import ops_of, relative
from plain import assert_as_exact_as_plain, assert_same, drawn
from torch import nn

import cnnfast
from cnnfast.models.figures import count_macs
from cnnfast.models.lenet_layers import DIGITS, ScaledTanh

# The papers' tables, a row for each map that is seen.
H3 = (
    "x x x . x x . . . . . .",
    ". x x x x x . . . . . .",
    ". . . . . . x x x . x x",
    ". . . . . . . x x x x x",
)
C3 = (
    "x . . . x x x . . x x x x . x x",
    "x x . . . x x x . . x x x x . x",
    "x x x . . . x x x . . x . x x x",
    ". x x x . . x x x x . . x . x x",
    ". . x x x . . x x x x . x x . x",
    ". . . x x x . . x x x x . x x x",
)


def squashed(x):
    return 1.7159 * torch.tanh(2 / 3 * x)


def conv(p, name, x):
    return squashed(F.conv2d(x, p[f"features.{name}.layer.weight"], p[f"features.{name}.layer.bias"]))


def table_conv(p, name, table, x):
    """Map by map."""
    kernels, biases = iter(p[f"features.{name}.layer.weight"]), p[f"features.{name}.layer.bias"]
    rows = [row.split() for row in table]
    maps = []
    for k, bias in enumerate(biases):
        seen = [x[:, c : c + 1] for c, row in enumerate(rows) if row[k] == "x"]
        maps.append(sum(F.conv2d(one, next(kernels)[None, None]) for one in seen) + bias)
    assert next(kernels, None) is None
    return squashed(torch.cat(maps, 1))


def subsampled(p, name, x):
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    x = x[:, :, :height, :width]
    x = x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]
    weight, bias = (p[f"features.{name}.layer.{kind}"].view(-1, 1, 1) for kind in ("weight", "bias"))
    return squashed(x * weight + bias)


def linear(p, name, x):
    return F.linear(x, p[f"classifier.{name}.weight"], p[f"classifier.{name}.bias"])


def lenet1(p, x):
    h1 = conv(p, "h1", x)
    h3 = table_conv(p, "h3", H3, subsampled(p, "h2", h1))
    h4 = subsampled(p, "h4", h3)
    return [h1, h3, h4, linear(p, 1, F.adaptive_avg_pool2d(h4, 4).flatten(1))]


def lenet5(p, x):
    c1 = conv(p, "c1", x)
    c3 = table_conv(p, "c3", C3, subsampled(p, "s2", c1))
    c5 = conv(p, "c5", subsampled(p, "s4", c3))
    f6 = squashed(linear(p, 0, F.adaptive_avg_pool2d(c5, 1).flatten(1)))
    if "classifier.3.bias" in p:
        return [c1, c3, c5, linear(p, 3, f6)]
    pictures = p["classifier.3.weight"]
    return [c1, c3, c5, torch.stack([-(f6 - picture).square().sum(1) for picture in pictures], 1)]


def simple(activation, pool):
    def network(p, x):
        c1 = activation(F.conv2d(x, p["features.0.weight"], p["features.0.bias"]))
        c3 = activation(F.conv2d(pool(c1, 2), p["features.3.weight"], p["features.3.bias"]))
        s4 = pool(c3, 2)
        x = activation(linear(p, 0, F.adaptive_avg_pool2d(s4, 5).flatten(1)))
        return [c1, c3, s4, linear(p, 5, activation(linear(p, 2, x)))]

    return network


CASES = [
    ("lenet1", {}, lenet1, ((3, 1, 28, 28), (1, 1, 29, 43))),
    ("lenet5", {}, lenet5, ((3, 1, 32, 32), (1, 1, 47, 33))),
    ("lenet5", dict(output="linear"), lenet5, ((3, 1, 32, 32), (1, 1, 32, 39))),
    ("lenet5_simple", {}, simple(F.relu, F.max_pool2d), ((3, 1, 32, 32), (1, 1, 37, 16))),
    (
        "lenet5_simple",
        dict(activation="tanh", pooling="avg"),
        simple(torch.tanh, F.avg_pool2d),
        ((3, 1, 32, 32), (1, 1, 31, 19)),
    ),
]
cases = pytest.mark.parametrize("name, options, plain, shapes", CASES)


@cases
def test_plain(name, options, plain, shapes):
    assert_same(drawn(cnnfast.create_model(name, **options)), plain, shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@cases
def test_plain_in_low_precision(name, options, plain, shapes, dtype):
    network = drawn(cnnfast.create_model(name, **options))
    assert_as_exact_as_plain(network, plain, [(24, *shape[1:]) for shape in shapes], dtype)


def numbers(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_counts_of_lenet1():
    """The paper's 2,578 parameters, 98,442 connections, and 4,635 units, one of which gives the biases."""
    network = cnnfast.create_model("lenet1")
    x, connections, units = torch.randn(1, 1, 28, 28), 0, 28 * 28 + 1
    counts = [numbers(layer) for layer in network.features]
    assert counts == [104, 8, 512, 24]
    for layer, count in zip(network.features, counts, strict=True):
        x = layer(x)
        pixels = x.shape[2] * x.shape[3]
        subsamples = x.shape[1] * 2 == count
        connections += pixels * (x.shape[1] * 5 if subsamples else count)  # 2 x 2 and a bias; each weight once a pixel
        units += x.numel()
    assert sum(counts) + numbers(network.classifier) == 2_578
    assert connections + numbers(network.classifier) == 98_442
    assert units + 10 == 4_635


def test_counts_of_lenet5():
    network = cnnfast.create_model("lenet5")
    counts = [numbers(layer) for layer in network.features]
    assert [*counts, numbers(network.classifier)] == [156, 12, 1516, 32, 48120, 10164]


@pytest.mark.parametrize("name, macs", [("lenet1", 136_320), ("lenet5", 415_680), ("lenet5_simple", 416_520)])
def test_macs(name, macs):
    assert count_macs(name) == macs


def test_squashing_function():
    """f(1) = 1, f(-1) = -1, to the papers' digits."""
    torch.testing.assert_close(ScaledTanh()(torch.tensor([-1.0, 0, 1])), torch.tensor([-1.0, 0, 1]), rtol=0, atol=1e-4)


def test_pictures():
    """Ten different digits of 7 x 12; one that is drawn is recognised as itself."""
    output = cnnfast.create_model("lenet5").get_classifier()
    assert output.weight.shape == (10, 84) and output.weight.abs().eq(1).all()
    scores = output(output.weight)
    assert torch.equal(scores.argmax(1), torch.arange(10)) and torch.equal(scores.diag(), torch.zeros(10))
    assert (scores - 1000 * torch.eye(10)).max() <= -4 * 3  # three pixels
    one = output.weight[1].view(12, 7)
    assert (one[2:11, 2:4] == 1).all() and (one[2:11, 5:] == -1).all()
    assert len(DIGITS) == 10


@pytest.mark.parametrize(
    "name, calls",
    [
        ("lenet1", {"conv2d_packed": 2, "depthwise_conv2d_packed": 2}),
        ("lenet5", {"conv2d_packed": 3, "depthwise_conv2d_packed": 2}),
        ("lenet5_simple", {"conv2d_packed": 2}),
    ],
)
def test_calls(name, calls):
    network, x = cnnfast.create_model(name).eval(), torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        called = ops_of(network, x)
    assert {op: called.count(op) for op in called} == calls


def test_a_changed_layer_runs_as_it_is():
    network, x = cnnfast.create_model("lenet5").eval(), torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        before = network(x)
        network.features.c3.act = nn.Tanh()
        network.features.s4.layer = nn.AvgPool2d(2)
        after = network(x)
        called = ops_of(network, x)
    assert called.count("conv2d_packed") == 2 and called.count("depthwise_conv2d_packed") == 1
    assert relative(after, network(x)) <= 1e-5 < relative(before, after)


def test_initialisation():
    """Within 2.4 / fan-in."""
    features = cnnfast.create_model("lenet5").features
    for layer, fan_in in ((features.c1, 25), (features.s2, 4), (features.c5, 400)):
        weight = layer.layer.weight
        assert 0.5 * 2.4 / fan_in < weight.abs().max() <= 2.4 / fan_in
    kernels = features.c3.layer.weight
    assert 2.4 / 150 < kernels[:18].abs().max() <= 2.4 / 75 and kernels[-6:].abs().max() <= 2.4 / 150


@pytest.mark.parametrize(
    "name, options, says",
    [
        ("lenet5", dict(output="softmax"), "output must be 'rbf' or 'linear', got 'softmax'"),
        ("lenet5", dict(num_classes=5), "num_classes must be 10 or 0 with output 'rbf', got 5"),
        ("lenet5_simple", dict(activation="sigmoid"), "activation must be 'relu' or 'tanh', got 'sigmoid'"),
        ("lenet5_simple", dict(pooling="sum"), "pooling must be 'max' or 'avg', got 'sum'"),
    ],
)
def test_mistaken_arguments(name, options, says):
    with pytest.raises(ValueError, match=says):
        cnnfast.create_model(name, **options)
