"""Classifiers of fully connected layers on a grid: arguments, reset_classifier, checkpoints of the same numbers in
another shape. Fails if a part is kept that was to be replaced, or replaced that was to be kept."""

import pytest
import torch
from networks import relative

import cnnfast
from cnnfast.checkpoints import same_numbers

SMALL = [("lenet1", {}), ("lenet5", dict(output="linear")), ("lenet5_simple", {})]
LARGE = ("alexnet", "alexnet_two_tower", "vgg11", "vgg16_c")


@pytest.mark.parametrize("name, options", SMALL)
def test_arguments(name, options):
    network = cnnfast.create_model(name, num_classes=7, in_chans=2, drop_rate=0.5, **options).eval()
    x = torch.randn(3, 2, 40, 32)
    with torch.no_grad():
        y = network(x)
        features = network.forward_features(x)
        assert features.shape[:2] == (3, network.num_features) and y.shape == (3, 7)
        assert torch.equal(network.forward_head(features), y)
        hidden = network.forward_head(features, pre_logits=True)
        assert hidden.shape == (3, network.head_hidden_size)
        assert torch.equal(network.get_classifier()(hidden), y)
        assert network.get_submodule(network.pretrained_cfg["classifier"]) is network.get_classifier()
        network.reset_classifier(0)
        assert torch.equal(network(x), hidden)
        network.reset_classifier(4)  # the hidden layers are those of before
        assert torch.equal(network.forward_head(features, pre_logits=True), hidden) and network(x).shape == (3, 4)
        network.reset_classifier(0, "")
        assert torch.equal(network(x), features)
        assert not list(network.classifier.parameters())
        network.double().reset_classifier(5, "avg")
        assert network(x.double()).shape == (3, 5) and network.num_classes == 5
    assert not any(module.training for module in network.classifier.modules())
    network.train()
    assert relative(network(x.double()), network(x.double())) > 1e-3  # dropout


@pytest.mark.parametrize("name", LARGE)
def test_arguments_of_large_networks(name):
    with torch.device("meta"):
        network = cnnfast.create_model(name, num_classes=7, in_chans=2)
        x = torch.empty(3, 2, 67, 90)
        assert network(x).shape == (3, 7)
        assert network.get_classifier().in_features == network.head_hidden_size == 4096
        assert network.pretrained_cfg["classifier"] == "classifier.6"
        dropouts = [module.p for module in network.modules() if isinstance(module, torch.nn.Dropout)]
        assert dropouts == [0.5, 0.5]
        network.reset_classifier(0)
        assert network(x).shape == (3, 4096)
        network.reset_classifier(0, "")
        assert network(x).shape == network.forward_features(x).shape
        network.reset_classifier(2, "avg")
        assert network(x).shape == (3, 2)


@pytest.mark.parametrize("name", ["lenet1", "lenet5", "alexnet", "alexnet_two_tower", "vgg11"])
def test_mistaken_arguments(name):
    with torch.device("meta"):
        for pooling in ("max", "avgmax", "catavgmax", "median"):
            with pytest.raises(ValueError, match=f"global_pool must be .*, got '{pooling}'"):
                cnnfast.create_model(name, global_pool=pooling)
        with pytest.raises(ValueError, match="num_classes must be 0 with global_pool '', got 10"):
            cnnfast.create_model(name, num_classes=10, global_pool="")


@pytest.mark.parametrize("name", ["lenet1", "lenet5", "lenet5_simple", "alexnet", "alexnet_two_tower", "vgg11"])
def test_smallest_images(name):
    """min_size is the smallest for which every layer has a pixel."""
    with torch.device("meta"):
        network = cnnfast.create_model(name)
        size = network.min_size
        assert network(torch.empty(1, network.in_chans, size, size)).shape == (1, network.num_classes)
        too_small = torch.empty(1, network.in_chans, size, size - 1)
        with pytest.raises(RuntimeError):
            network.features(too_small)
        with pytest.raises(ValueError, match=f"x must be at least {size} x {size}"):
            network(too_small)


def test_features_only():
    network = cnnfast.create_model("lenet5", features_only=True, out_indices=(0, 1)).eval()
    whole = cnnfast.create_model("lenet5").eval()
    network.load_state_dict({key: value for key, value in whole.state_dict().items() if key in network.state_dict()})
    assert sorted({key.split(".")[1] for key in network.state_dict()}) == ["c1", "c3", "s2"]
    x = torch.randn(2, 1, 32, 35)
    with torch.no_grad():
        maps = network(x)
        expected = whole.forward_intermediates(x)[1]
    assert len(maps) == 2 and all(torch.equal(ours, theirs) for ours, theirs in zip(maps, expected, strict=False))


def test_checkpoints_of_convolutions():
    """A linear layer's weights as those of a convolution that covers the grid, as in timm's VGG."""
    network = cnnfast.create_model("lenet5_simple")
    state = {key: torch.randn_like(value) for key, value in network.state_dict().items()}
    shapes = {"classifier.0.weight": (120, 16, 5, 5), "classifier.2.weight": (84, 120, 1, 1)}
    theirs = {key: value.reshape(shapes.get(key, value.shape)) for key, value in state.items()}
    cnnfast.load_weights(network, theirs)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    x = torch.randn(2, 16, 5, 5)
    as_conv = torch.nn.functional.conv2d(x, theirs["classifier.0.weight"], theirs["classifier.0.bias"]).flatten(1)
    torch.testing.assert_close(network.classifier[0](x.flatten(1)), as_conv, rtol=1e-4, atol=1e-4)
    theirs["classifier.0.weight"] = torch.randn(120, 25, 16)  # not a convolution
    with pytest.raises(ValueError, match=r"1 of another shape \(classifier.0.weight \(120, 25, 16\), not \(120, 400\)"):
        cnnfast.load_weights(network, theirs)


@pytest.mark.parametrize(
    "shape, own, same",
    [
        ((4, 18), (4, 18), True),
        ((4, 2, 3, 3), (4, 18), True),
        ((4, 18), (4, 2, 3, 3), True),
        ((4, 2, 3, 3), (4, 2, 3, 3), True),
        ((4, 3, 3, 2), (4, 2, 3, 3), False),
        ((4, 2, 9), (4, 18), False),
        ((2, 36), (4, 18), False),
        ((4, 2, 3, 2), (4, 18), False),
        ((18,), (18, 1), False),
    ],
)
def test_same_numbers(shape, own, same):
    assert same_numbers(shape, own) is same


def test_gradient_checkpointing():
    """LeNet-5's layers with their squashing are computed twice; gradients are the same. Networks of single layers, of
    which checkpointing would save nothing, refuse it, as timm's VGG."""
    network = cnnfast.create_model("lenet5", drop_rate=0.5).double()
    x, grads = torch.randn(2, 1, 32, 32, dtype=torch.float64), []
    for enable in (False, True):
        network.set_grad_checkpointing(enable)
        network.zero_grad()
        torch.manual_seed(3)
        network(x).square().sum().backward()
        grads.append([parameter.grad for parameter in network.parameters()])
    assert all(relative(*pair) <= 1e-12 for pair in zip(*grads, strict=True))
    seen = []
    network.features.c1.layer.register_forward_hook(lambda *_: seen.append(1))
    network(x).sum().backward()
    assert len(seen) == 2
    for name in ("lenet5_simple", "nin_cifar", "alexnet", "vgg11_bn"):
        with torch.device("meta"):
            network = cnnfast.create_model(name)
        network.set_grad_checkpointing(False)
        with pytest.raises(ValueError, match=f"enable must be False for {type(network).__name__}, which has no blocks"):
            network.set_grad_checkpointing()
