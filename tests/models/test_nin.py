"""Network in Network against plain builds of the authors' Caffe models, its classifier of 1 x 1 convolutions, figures.
Fails if a layer, pooling or dropout differs, or if the classifier isn't where timm's users look for it."""

import pytest
import torch
import torch.nn.functional as F
from networks import ops_of, relative
from plain import assert_as_exact_as_plain, assert_same, compare, drawn
from torch import nn

import cnnfast
from cnnfast.models.figures import count_macs

NAMES = ("nin", "nin_cifar")
SHAPES = {"nin": ((3, 3, 75, 61), (1, 3, 39, 82)), "nin_cifar": ((3, 3, 32, 32), (1, 3, 11, 24))}


def conv(p, name, x, **options):
    return F.relu(F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], **options))


def nin(p, x):
    x = conv(p, "features.conv1", x, stride=4)
    x = conv(p, "features.cccp2", conv(p, "features.cccp1", x))
    maps = [x]
    x = conv(p, "features.conv2", F.max_pool2d(x, 3, 2, ceil_mode=True), padding=2)
    x = conv(p, "features.cccp4", conv(p, "features.cccp3", x))
    maps.append(x)
    x = conv(p, "features.conv3", F.max_pool2d(x, 3, 2, ceil_mode=True), padding=1)
    x = conv(p, "features.cccp6", conv(p, "features.cccp5", x))
    maps.append(x)
    x = conv(p, "features.conv4", F.max_pool2d(x, 3, 2, ceil_mode=True), padding=1)
    maps.append(conv(p, "features.cccp7", x))
    return [*maps, conv(p, "classifier.0", maps[-1]).mean((2, 3))]


def nin_cifar(p, x):
    x = conv(p, "features.conv1", x, padding=2)
    x = conv(p, "features.cccp2", conv(p, "features.cccp1", x))
    maps = [x]
    x = conv(p, "features.conv2", F.max_pool2d(x, 3, 2, ceil_mode=True), padding=2)
    x = conv(p, "features.cccp4", conv(p, "features.cccp3", x))
    maps.append(x)
    x = conv(p, "features.conv3", F.avg_pool2d(x, 3, 2, ceil_mode=True), padding=1)
    maps.append(conv(p, "features.cccp5", x))
    return [*maps, conv(p, "classifier.0", maps[-1]).mean((2, 3))]


PLAIN = {"nin": nin, "nin_cifar": nin_cifar}


def network(name, **options):
    return drawn(cnnfast.create_model(name, **dict(drop_rate=0.0) | options))


@pytest.mark.parametrize("name", NAMES)
def test_plain(name):
    assert_same(network(name), PLAIN[name], SHAPES[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_plain_in_low_precision(name, dtype):
    assert_as_exact_as_plain(network(name), PLAIN[name], SHAPES[name], dtype)


@pytest.mark.parametrize("name", NAMES)
def test_smallest_images(name):
    ours = network(name).double().eval()
    x = torch.randn(1, 3, ours.min_size, ours.min_size, dtype=torch.float64)
    with torch.no_grad():
        compare([ours(x)], PLAIN[name](ours.state_dict(), x)[-1:])
        with pytest.raises(RuntimeError):  # so it is the smallest
            PLAIN[name](ours.state_dict(), x[:, :, 1:])
        with pytest.raises(ValueError, match="x must be at least"):
            ours(x[:, :, 1:])


@pytest.mark.parametrize(
    "name, sizes, macs",
    [("nin", [54, 27, 13, 6], 1_100_188_800), ("nin_cifar", [32, 16, 8], 222_486_528)],
)
def test_figures(name, sizes, macs):
    with torch.device("meta"):
        maps = cnnfast.create_model(name, features_only=True)
        size = 224 if name == "nin" else 32
        assert [m.shape[-1] for m in maps(torch.empty(1, 3, size, size))] == sizes
    assert count_macs(name) == macs


@pytest.mark.parametrize("name, convs, pointwise", [("nin", 4, 8), ("nin_cifar", 3, 6)])
def test_calls(name, convs, pointwise):
    ours, x = network(name).eval(), torch.randn(1, 3, 43, 39)
    with torch.no_grad():
        called = ops_of(ours, x)
        assert {op: called.count(op) for op in called} == dict(conv2d_packed=convs, pointwise_conv2d_packed=pointwise)
        ours.reset_classifier(3)
        assert ops_of(ours, x) == called


def test_classifier():
    """The last 1 x 1 convolution, on maps; num_classes 0 pools the features."""
    ours = network("nin_cifar", num_classes=7, in_chans=1).eval()
    x = torch.randn(2, 1, 21, 32)
    with torch.no_grad():
        assert ours(x).shape == (2, 7) and ours.num_classes == 7
        features = ours.forward_features(x)
        assert features.shape == (2, ours.num_features, 5, 8)
        classifier = ours.get_classifier()
        assert ours.get_submodule(ours.pretrained_cfg["classifier"]) is classifier
        assert relative(classifier(features).relu().mean((2, 3)), ours(x)) <= 1e-6
        pooled = ours.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pooled, features.mean((2, 3)))
        ours.reset_classifier(0)
        assert torch.equal(ours(x), pooled)
        ours.reset_classifier(0, "")
        assert torch.equal(ours(x), features)
        ours.double().reset_classifier(3, "max")
        maps = ours.get_classifier()(features.double()).relu()
        assert relative(ours(x.double()), maps.amax((2, 3))) <= 1e-6
        ours.reset_classifier(4, "")
        assert ours(x.double()).shape == (2, 4, 5, 8)
    assert not any(module.training for module in ours.classifier.modules())
    with pytest.raises(ValueError, match="global_pool must be one number a class, got 'catavgmax'"):
        ours.reset_classifier(3, "catavgmax")


@pytest.mark.parametrize("name, places", [("nin", ["drop3"]), ("nin_cifar", ["drop1", "drop2"])])
def test_dropout(name, places):
    ours = cnnfast.create_model(name)
    dropouts = {place: module.p for place, module in ours.features.named_children() if isinstance(module, nn.Dropout)}
    assert dropouts == dict.fromkeys(places, 0.5)
    pools = [place for place, _ in ours.features.named_children() if place.startswith(("pool", "drop"))]
    assert all(pools[pools.index(place) - 1] == place.replace("drop", "pool") for place in places)


@pytest.mark.parametrize(
    "name, narrow", [("nin", {"features.conv1", "features.conv3", "classifier.0"}), ("nin_cifar", ())]
)
def test_initialisation(name, narrow):
    for place, module in cnnfast.create_model(name).named_modules():
        if isinstance(module, nn.Conv2d):
            assert 0.9 < module.weight.std() / (0.01 if place in narrow else 0.05) < 1.1, place
            assert not module.bias.any()
