"""VGG's forms that neither timm nor torchvision has, A-LRN and C, against plain builds; the others against theirs,
without the classifier, which is nine tenths of the weights and of all the same; figures and arguments. Keys and shapes
of all are in test_twins.py. Fails if a layer or its place differs, or weights land in the wrong place."""

import pytest
import torch
import torch.nn.functional as F
from networks import draw_batch_norms, ops_of, relative
from plain import assert_as_exact_as_plain, assert_same, compare, drawn, response_normalised
from torch import nn

import cnnfast
from cnnfast._peers import plain_network
from cnnfast.models.figures import count_macs
from cnnfast.models.vgg import VGG

# The paper's table 1: the sides of the filters, stage by stage; A-LRN's normalisation is layer 2.
TABLE = {
    "vgg11_lrn": ((3,), (3,), (3, 3), (3, 3), (3, 3)),
    "vgg16_c": ((3, 3), (3, 3), (3, 3, 1), (3, 3, 1), (3, 3, 1)),
}
SHAPES = ((3, 3, 33, 50), (1, 3, 47, 32))


def plain(name):
    def network(p, x):
        maps, n = [], 0
        for stage in TABLE[name]:
            for side in stage:
                weight, bias = p[f"features.{n}.weight"], p[f"features.{n}.bias"]
                assert weight.shape[2:] == (side, side)
                x = F.relu(F.conv2d(x, weight, bias, padding=side // 2))
                n += 2
                if name == "vgg11_lrn" and n == 2:
                    x = response_normalised(x)
                    n += 1
            maps.append(x)
            x = F.max_pool2d(x, 2)
            n += 1
        maps.append(x)
        if "classifier.0.weight" not in p:
            return [*maps, x]
        x = F.adaptive_avg_pool2d(x, 7).flatten(1)
        x = F.relu(F.linear(x, p["classifier.0.weight"], p["classifier.0.bias"]))
        x = F.relu(F.linear(x, p["classifier.3.weight"], p["classifier.3.bias"]))
        return [*maps, F.linear(x, p["classifier.6.weight"], p["classifier.6.bias"])]

    return network


def without_classifier(name):
    return drawn(cnnfast.create_model(name, num_classes=0, global_pool=""))


@pytest.mark.parametrize("name", TABLE)
def test_plain(name):
    assert_same(without_classifier(name), plain(name), SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_plain_in_low_precision(name, dtype):
    assert_as_exact_as_plain(without_classifier(name), plain(name), SHAPES, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_plain_with_classifier(name):
    assert_same(drawn(cnnfast.create_model(name, drop_rate=0.0)), plain(name), ((1, 3, 96, 97), (2, 3, 32, 65)))


TWINS = [*(f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn"))]
twins = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "vgg11_bn")) for name in TWINS]
)


def features_of_twins(name):
    """timm's and ours, with one state; nothing of the classifier is in memory."""
    with torch.device("meta"):
        theirs = plain_network(name, "timm")
    theirs.features.to_empty(device="cpu")
    for module in theirs.features:
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    draw_batch_norms(drawn(theirs.features), torch.randn(4, 3, 40, 40))
    ours = cnnfast.create_model(name, num_classes=0, global_pool="")
    ours.features.load_state_dict(theirs.features.state_dict())
    return theirs, ours


def maps_of(network, x):
    last, maps = network.forward_intermediates(x)
    return [*maps, last]


@twins
def test_features(name):
    """Maps for inference and in training, gradients and running statistics, in float64."""
    theirs, ours = (network.double().eval() for network in features_of_twins(name))
    for shape in SHAPES:
        x = torch.randn(shape, dtype=torch.float64)
        with torch.no_grad():
            compare(maps_of(ours, x), maps_of(theirs, x))
    x = torch.randn(3, 3, 40, 33, dtype=torch.float64)
    got, expected = maps_of(ours.train(), x), maps_of(theirs.train(), x)
    compare(got, expected)
    grad = torch.randn_like(got[-1])
    got[-1].backward(grad), expected[-1].backward(grad)
    of_theirs = dict(theirs.features.named_parameters())
    sizes = torch.stack([parameter.grad.norm() for parameter in of_theirs.values()])
    for place, parameter in ours.features.named_parameters():
        distance, size = (parameter.grad - of_theirs[place].grad).norm(), of_theirs[place].grad.norm()
        assert distance <= 1e-9 * max(size, 1e-4 * sizes.norm()), place  # of biases before BN it is 0 but for rounding
    for place, buffer in theirs.features.named_buffers():
        assert relative(ours.features.get_buffer(place).double(), buffer.double()) <= 1e-9, place


@twins
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_features_in_low_precision(name, dtype):
    theirs, ours = (n.to(dtype).to(memory_format=torch.channels_last).eval() for n in features_of_twins(name))
    plain = lambda state, x: maps_of(theirs.to(x.dtype), x)  # noqa: E731
    assert_as_exact_as_plain(ours, plain, SHAPES, dtype)


@pytest.mark.parametrize(
    "name, calls",
    [
        ("vgg11_lrn", {"conv2d_packed": 8, "local_response_norm": 1}),
        ("vgg11_bn", {"conv2d_packed": 8}),
        ("vgg16_c", {"conv2d_packed": 10, "pointwise_conv2d_packed": 3}),
    ],
)
def test_calls(name, calls):
    network = without_classifier(name).eval()
    with torch.no_grad():
        called = ops_of(network, torch.randn(1, 3, 32, 32))
    assert {op: called.count(op) for op in called} == calls


@pytest.mark.parametrize(
    "name, macs",
    [
        ("vgg11_lrn", 7_609_090_048),
        ("vgg13", 11_308_466_176),
        ("vgg16", 15_470_264_320),
        ("vgg16_c", 11_770_888_192),
        ("vgg19_bn", 19_632_062_464),
    ],
)
def test_macs(name, macs):
    assert count_macs(name) == macs


def test_sizes():
    with torch.device("meta"):
        network = cnnfast.create_model("vgg16_c", features_only=True)
        maps = network(torch.empty(1, 3, 224, 224))
    shapes = [(64, 224, 224), (128, 112, 112), (256, 56, 56), (512, 28, 28), (512, 14, 14), (512, 7, 7)]
    assert [tuple(m.shape[1:]) for m in maps] == shapes
    assert network.feature_info.reduction() == [1, 2, 4, 8, 16, 32]


@pytest.mark.slow
@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_published_weights(package):
    """Of timm the first linear layer is a convolution; its logits are the same where the last map isn't larger than
    7 x 7."""
    theirs = plain_network("vgg11", package, num_classes=5).eval()
    ours = cnnfast.create_model("vgg11", num_classes=5).eval()
    cnnfast.load_weights(ours, theirs.state_dict())
    with torch.no_grad():
        for shape in ((2, 3, 250, 33), (1, 3, 224, 224)):
            x = torch.randn(shape)
            assert relative(ours(x), theirs(x)) <= 1e-5
        x = torch.randn(1, 3, 288, 288)
        assert relative(ours.features(x), theirs.features(x)) <= 1e-5
        assert (relative(ours(x), theirs(x)) <= 1e-5) is (package == "torchvision")


def test_forms_that_timm_lacks():
    with torch.device("meta"):
        for name in TABLE:
            assert cnnfast.create_model(name).checkpoint_keys("timm") == {}


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(depths=(1, 1, 1, 1, 1), norm="ln"), "norm must be None, 'bn' or 'lrn', got 'ln'"),
        (dict(depths=(1, 1, 1)), r"depths must be 5 positive numbers, got \(1, 1, 1\)"),
        (dict(depths=(1, 1, 0, 1, 1)), "depths must be 5 positive numbers"),
    ],
)
def test_mistaken_arguments(options, says):
    with pytest.raises(ValueError, match=says):
        VGG(**options)
