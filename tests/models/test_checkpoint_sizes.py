"""load_weights into a network with another number of classes or channels than the weights', or with less of it.

Fails if something else is left as it was than what can't be loaded, or if a mistake isn't one sentence.
"""

import copy

import pytest
import torch
from checkpoint_cases import assert_refused, assert_state, drawn_state

import cnnfast
from cnnfast._peers import import_timm


def test_other_number_of_classes(published):
    network = cnnfast.create_model("tf_efficientnet_lite0", num_classes=10)
    before = copy.deepcopy(network.state_dict())
    says = r"2 of another shape \(_fc.weight \(1000, 1280\), not \(10, 1280\), _fc.bias .*; load_classifier=False loads"
    assert_refused(network, published, says)
    damaged = {**published, "_conv_stem.weight": published["_conv_stem.weight"][:2]}
    assert_refused(network, damaged, r"not \(10,\)\)$")  # which load_classifier=False would not mend
    cnnfast.load_weights(network, published, load_classifier=False)
    assert torch.equal(network.conv_head.weight, published["_conv_head.weight"])
    assert torch.equal(network.classifier.weight, before["classifier.weight"])
    assert torch.equal(network.classifier.bias, before["classifier.bias"])


@pytest.mark.parametrize("name", ["lenet5_simple", "mobilenet_v2", "nin_cifar", "se_resnet18"])
def test_other_number_of_classes_of_other_heads(name):
    """A classifier in a Sequential, a convolution, the last of several linear layers: that alone stays as it is."""
    network = cnnfast.create_model(name, num_classes=7)
    before, state = copy.deepcopy(network.state_dict()), drawn_state(cnnfast.create_model(name))
    own = {key for key, value in state.items() if value.shape != before[key].shape}
    assert own and len(own) <= 2
    assert_refused(network, state, "load_classifier=False loads all but")
    cnnfast.load_weights(network, state, load_classifier=False)
    assert_state(network, {key: before[key] if key in own else value for key, value in state.items()})


@pytest.mark.parametrize("name, auxiliary", [("googlenet_bn", "aux2.fc2"), ("inception_v3", "AuxLogits.fc")])
def test_other_number_of_classes_beside_auxiliary_classifiers(name, auxiliary):
    """These have one for each class too; what is before that is loaded, and left out where the network has none."""
    whole = cnnfast.create_model(name, aux_logits=True)
    state = drawn_state(whole)
    network = cnnfast.create_model(name, aux_logits=True, num_classes=10)
    before = copy.deepcopy(network.state_dict())
    classes = [key for key in before if key.rpartition(".")[0] in ("fc", auxiliary, "aux1.fc2")]
    assert len(classes) == (6 if name == "googlenet_bn" else 4)
    assert_refused(network, state, rf"{len(classes)} of another shape .* load_classifier=False loads all but")
    cnnfast.load_weights(network, state, load_classifier=False)
    assert_state(network, {**state, **{key: before[key] for key in classes}})
    network = cnnfast.create_model(name, num_classes=10)
    before = copy.deepcopy(network.state_dict())
    cnnfast.load_weights(network, state, load_classifier=False)
    assert_state(network, {key: before[key] if key.startswith("fc.") else state[key] for key in before})


@pytest.mark.parametrize("source", [None, "pretrainedmodels"])
def test_a_background_class(source):
    """pretrainedmodels publishes Inception-v4 and Inception-ResNet-v2 with 1001 classes; its own 1000 are the last."""
    network = cnnfast.create_model("inception_v4")
    own = drawn_state(network)
    state = {name: own[key] for key, name in network.checkpoint_keys("pretrainedmodels").items()}
    state["last_linear.weight"], state["last_linear.bias"] = torch.randn(1001, 1536), torch.randn(1001)
    cnnfast.load_weights(network, state, source)
    assert torch.equal(network.last_linear.weight, state["last_linear.weight"][1:])
    assert torch.equal(network.last_linear.bias, state["last_linear.bias"][1:])
    state["last_linear.bias"] = torch.randn(1000)
    assert_refused(network, state, r"last_linear.weight \(1001, 1536\), not", source="pretrainedmodels")


def test_no_classifier(published):
    network = cnnfast.create_model("tf_efficientnet_lite0", num_classes=0)
    cnnfast.load_weights(network, published)
    assert torch.equal(network.conv_head.weight, published["_conv_head.weight"])
    assert_refused(network, {**published, "_head.weight": torch.zeros(3)}, r"1 not wanted \(_head.weight\)")


@pytest.mark.parametrize("options", [{}, dict(out_indices=(1, 2)), dict(num_classes=0), dict(in_chans=1)], ids=str)
def test_feature_networks(published, options):
    """What they lack is left out, and nothing else."""
    network = cnnfast.create_model("tf_efficientnet_lite0", features_only=True, **options)
    cnnfast.load_weights(network, published)
    assert torch.equal(network.blocks[2][0].bn1.weight, published["_blocks.3._bn0.weight"])
    assert_refused(network, {**published, "_head.weight": torch.zeros(3)}, r"1 not wanted \(_head.weight\)")
    assert_refused(network, {k: v for k, v in published.items() if "_blocks.2." not in k}, r" missing \(_blocks.2.\*")


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_other_channels(published, channels):
    """As timm's adapt_input_conv."""
    import_timm()
    from timm.models import adapt_input_conv

    network = cnnfast.create_model("tf_efficientnet_lite0", in_chans=channels)
    cnnfast.load_weights(network, published)
    expected = adapt_input_conv(channels, published["_conv_stem.weight"])
    assert network.conv_stem.weight.shape[1] == channels
    torch.testing.assert_close(network.conv_stem.weight.detach(), expected, rtol=1e-6, atol=0)
    own = drawn_state(network)
    cnnfast.load_weights(network, own, "cnnfast")  # of as many channels: as they are
    assert_state(network, own)


def test_channels_that_are_no_images(published):
    state = {**published, "_conv_stem.weight": published["_conv_stem.weight"][:, :2]}
    assert_refused(
        cnnfast.create_model("tf_efficientnet_lite0", in_chans=4), state, r"_conv_stem.weight \(32, 2, 3, 3\)"
    )
