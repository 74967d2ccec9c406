"""What MobileNets have besides the other networks: width multipliers, timm's and torchvision's names for V2's weights.

Fails if a width is rounded otherwise than theirs, if a block of timm's lands in another place, or if what users do to
torchvision's network (a new classifier, another first layer) isn't seen. Widths above 1 are slow.
"""

import copy

import pytest
import torch
from networks import draw_batch_norms, ops_of, relative
from torch import nn

import cnnfast
from cnnfast._peers import import_timm, plain_network


def drawn(network):
    torch.manual_seed(5)
    draw_batch_norms(network, torch.randn(4, 3, 33, 33))
    return network.double().eval()


def assert_equal(ours, theirs):
    x = torch.randn(2, 3, 45, 33, dtype=torch.float64)
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) <= 1e-12
        assert len(ops_of(ours, x)) in (13, 14, 18)  # a call a block and, if there is one, for the last convolution


@pytest.mark.parametrize(
    "options",
    [
        dict(width_mult=0.35),  # rounded up twice: 8 would be less than 0.9 * 11.2
        dict(width_mult=0.1),  # the first block's input is added, too
        dict(width_mult=0.5, round_nearest=3),  # 1281 features
        pytest.param(dict(width_mult=0.5), marks=pytest.mark.slow),
        pytest.param(dict(width_mult=1.4), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_widths_of_v2(options):
    theirs = drawn(plain_network("mobilenet_v2", **options))
    ours = cnnfast.create_model("mobilenet_v2", **options).double().eval()
    ours.load_state_dict(theirs.state_dict())
    assert_equal(ours, theirs)


@pytest.mark.parametrize(
    "timm_name, options",
    [
        ("mobilenetv1_100h", dict(head_conv=True)),
        pytest.param("mobilenetv1_125", dict(width_mult=1.25), marks=pytest.mark.slow),
    ],
)
def test_forms_of_v1(timm_name, options):
    theirs = drawn(import_timm().create_model(timm_name))
    ours = cnnfast.create_model("mobilenet_v1", **options).double().eval()
    ours.load_state_dict(theirs.state_dict())
    assert_equal(ours, theirs)


@pytest.mark.parametrize("source", [None, "timm"])
@pytest.mark.parametrize(
    "timm_name, width_mult",
    [
        ("mobilenetv2_050", 0.5),
        pytest.param("mobilenetv2_100", 1, marks=pytest.mark.slow),
        pytest.param("mobilenetv2_140", 1.4, marks=pytest.mark.slow),
    ],
)
def test_weights_of_v2_from_timm(timm_name, width_mult, source):
    theirs = drawn(import_timm().create_model(timm_name))
    ours = cnnfast.create_model("mobilenet_v2", width_mult=width_mult).double().eval()
    cnnfast.load_weights(ours, theirs.state_dict(), source)
    assert_equal(ours, theirs)


def test_sources_of_v2():
    """All or nothing, and by keys: a value of timm's beside torchvision's is refused."""
    ours = cnnfast.create_model("mobilenet_v2", width_mult=0.35)
    theirs = plain_network("mobilenet_v2", width_mult=0.35).state_dict()
    timm = import_timm().create_model("mobilenetv2_035").state_dict()
    before = copy.deepcopy(ours.state_dict())
    for weights, source, says in [
        (theirs, "timm", r"missing \(all, conv_stem.weight to"),
        (timm, "torchvision", r"missing \(all, features.0.0.weight to"),
        ({**theirs, "classifier.bias": timm["classifier.bias"]}, None, r"1 not wanted \(classifier.bias"),
        ({k: v for k, v in timm.items() if k != "blocks.5.2.bn3.bias"}, None, r"1 missing \(blocks.5.2.bn3.bias"),
    ]:
        with pytest.raises(ValueError, match=f"weights must be those of this MobileNetV2.*{says}"):
            cnnfast.load_weights(ours, weights, source)
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
    with pytest.raises(ValueError, match="source must be one that has the weights of MobileNetV1"):
        cnnfast.load_weights(cnnfast.create_model("mobilenet_v1"), theirs, "torchvision")
    cnnfast.load_weights(ours, theirs, "torchvision")
    assert all(torch.equal(value, theirs[key]) for key, value in ours.state_dict().items())


def test_what_users_do_to_v2():
    """As torchvision's tutorials have it: another classifier, a first layer for grey images, `features` as backbone."""
    network = cnnfast.create_model("mobilenet_v2", width_mult=0.35).eval()
    x = torch.randn(2, 1, 33, 33)
    with torch.no_grad():
        network(torch.randn(2, 3, 33, 33))
        network.classifier[1] = nn.Linear(1280, 5)
        network.features[0][0] = nn.Conv2d(1, 16, 3, 2, 1, bias=False)
        features = network.features(x)
        y = network(x)
        assert torch.equal(network.forward_features(x), features)
        torch.testing.assert_close(network.classifier[1](features.mean((2, 3))), y)
    with torch.enable_grad():
        torch.testing.assert_close(network(x).detach(), y, rtol=1e-4, atol=1e-5)
    assert "inverted_residual_packed" not in ops_of(network, x) and y.shape == (2, 5)


@pytest.mark.parametrize(
    "name, options, says",
    [
        ("mobilenet_v1", dict(width_mult=0), "width_mult must be positive, got 0"),
        ("mobilenet_v2", dict(width_mult=float("nan")), "width_mult must be positive, got nan"),
        ("mobilenet_v2", dict(inverted_residual_setting=[(6, 24, 2)]), r"rows of \(expand ratio.*got \[\(6, 24, 2\)\]"),
        ("mobilenet_v2", dict(round_nearest=0), "round_nearest must be positive, got 0"),
        ("mobilenet_v2", dict(inverted_residual_setting=[]), r"rows of \(expand ratio.*got \[\]"),
        ("mobilenet_v2", dict(global_pool="median"), "global_pool must be one of"),
    ],
)
def test_mistaken_arguments(name, options, says):
    with pytest.raises(ValueError, match=says):
        cnnfast.create_model(name, **options)
