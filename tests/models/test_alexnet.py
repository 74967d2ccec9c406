"""AlexNet's two-tower form against a build with two towers, and the paper's figures. The other form is torchvision's,
see test_twins.py. Fails if a layer, group, padding, normalisation or bias differs."""

import pytest
import torch
import torch.nn.functional as F
from networks import ops_of
from plain import assert_as_exact_as_plain, assert_same, drawn, response_normalised
from torch import nn

import cnnfast
from cnnfast.models.figures import count_macs


def both(towers, layer, p, **options):
    """A convolution on each GPU with half of the filters; each sees its own maps."""
    weights, biases = p[f"features.{layer}.weight"].chunk(2), p[f"features.{layer}.bias"].chunk(2)
    return [F.relu(F.conv2d(*operands, **options)) for operands in zip(towers, weights, biases, strict=True)]


def two_towers(p, x):
    maps = []
    towers = both([x, x], 0, p, stride=4)
    maps.append(response_normalised(torch.cat(towers, 1)))
    towers = both(F.max_pool2d(maps[-1], 3, 2).chunk(2, 1), 4, p, padding=2)
    maps.append(response_normalised(torch.cat(towers, 1)))
    x = F.max_pool2d(maps[-1], 3, 2)
    towers = both([x, x], 8, p, padding=1)  # the third sees both
    towers = both(towers, 10, p, padding=1)
    towers = both(towers, 12, p, padding=1)
    maps.append(torch.cat(towers, 1))
    maps.append(F.max_pool2d(maps[-1], 3, 2))
    if "classifier.0.weight" not in p:
        return [*maps, maps[-1]]
    x = F.adaptive_avg_pool2d(maps[-1], 6).flatten(1)
    x = F.relu(F.linear(x, p["classifier.0.weight"], p["classifier.0.bias"]))
    x = F.relu(F.linear(x, p["classifier.3.weight"], p["classifier.3.bias"]))
    return [*maps, F.linear(x, p["classifier.6.weight"], p["classifier.6.bias"])]


def without_classifier():
    """Its first maps are some 10 in size, so that the normalisation matters."""
    network = drawn(cnnfast.create_model("alexnet_two_tower", num_classes=0, global_pool=""))
    with torch.no_grad():
        for layer in (0, 4):
            network.features[layer].weight.mul_(10)
    return network


SHAPES = ((1, 3, 67, 80), (3, 3, 99, 75))


def test_two_towers():
    assert_same(without_classifier(), two_towers, SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_towers_in_low_precision(dtype):
    assert_as_exact_as_plain(without_classifier(), two_towers, SHAPES, dtype)


@pytest.mark.slow
def test_two_towers_with_classifier():
    network = drawn(cnnfast.create_model("alexnet_two_tower", drop_rate=0.0))
    assert_same(network, two_towers, ((1, 3, 227, 227), (2, 3, 67, 83)))


def test_two_towers_calls():
    """Convolutions in groups are ATen's."""
    x = torch.randn(1, 3, 67, 67)
    with torch.no_grad():
        called = ops_of(without_classifier().eval(), x)
    assert called == ["conv2d_packed", "local_response_norm", "local_response_norm", "conv2d_packed"]


def test_sizes():
    """227 -> 55; 224, of which the paper speaks, would make 54."""
    with torch.device("meta"):
        network = cnnfast.create_model("alexnet_two_tower", features_only=True)
        maps = network(torch.empty(1, 3, 227, 227))
        assert network(torch.empty(1, 3, 224, 224))[0].shape[-1] == 54
    assert [tuple(m.shape[1:]) for m in maps] == [(96, 55, 55), (256, 27, 27), (256, 13, 13), (256, 6, 6)]
    assert maps[0].numel() == 290_400
    assert sum(p.numel() for p in network.features[0].parameters()) == 34_944


@pytest.mark.parametrize("name, macs", [("alexnet", 714_188_480), ("alexnet_two_tower", 724_406_816)])
def test_macs(name, macs):
    assert count_macs(name) == macs


@pytest.mark.slow
def test_initialisation_of_two_towers():
    network = cnnfast.create_model("alexnet_two_tower")
    ones = {"features.4", "features.10", "features.12", "classifier.0", "classifier.3"}
    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert 0.0095 < module.weight.std() < 0.0105 and abs(module.weight.mean()) < 0.001
            assert torch.equal(module.bias, torch.full_like(module.bias, float(name in ones))), name
