"""What MobileNets have besides the other networks: width multipliers, output strides, timm's and torchvision's names
for V2's weights.

Fails if a width is rounded otherwise than theirs, if a block of timm's lands in another place, or if what users do to
torchvision's network (a new classifier, another first layer) isn't seen. Widths above 1 are slow.
"""

import copy
import functools

import pytest
import torch
from networks import assert_same_gradients, draw_batch_norms, ops_of, relative
from torch import nn

import cnnfast
from cnnfast._peers import import_timm, plain_network
from cnnfast.models import figures
from cnnfast.models.figures import count_parameters
from cnnfast.models.registry import model_entry

count_macs = functools.cache(figures.count_macs)


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


# Of the papers and, for V2, TensorFlow's table: millions of parameters, millions of multiply-adds at 224.
FIGURES = {
    "mobilenet_v1_025": (0.5, 41),
    "mobilenet_v1_050": (1.3, 149),
    "mobilenet_v1_075": (2.6, 325),
    "mobilenet_v1": (4.2, 569),
    "mobilenet_v2_035": (1.66, 59),
    "mobilenet_v2_050": (1.95, 97),
    "mobilenet_v2_075": (2.61, 209),
    "mobilenet_v2": (3.47, 300),
    "mobilenet_v2_140": (6.06, 582),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_of_the_papers(name):
    """TensorFlow's tables leave out some 30,000 parameters of batch normalisation."""
    parameters, macs = FIGURES[name]
    with torch.device("meta"):
        counted = count_parameters(cnnfast.create_model(name)) / 1e6
    assert counted == pytest.approx(parameters, abs=0.05)
    assert count_macs(name) / 1e6 == pytest.approx(macs, abs=1)


@pytest.mark.parametrize("name", [*FIGURES, "mobilenet_v1_125"])
def test_names_are_widths(name):
    base, _, percent = name.partition("_v")[2].partition("_")
    with torch.device("meta"):
        network = cnnfast.create_model(name)
        same = cnnfast.create_model(f"mobilenet_v{base}", width_mult=int(percent or 100) / 100)
    assert {k: v.shape for k, v in network.state_dict().items()} == {k: v.shape for k, v in same.state_dict().items()}
    macs, doc = count_macs(name) / 1e9, model_entry(name).factory.__doc__
    assert f"{count_parameters(network):,} parameters" in doc
    assert (f"{macs:.3f}" if macs < 0.0995 else f"{macs:.2f}") + " GMACs" in doc


@pytest.mark.parametrize(
    "name, output_stride",
    [
        ("mobilenet_v1", 8),
        ("mobilenet_v2", 16),
        pytest.param("mobilenet_v1", 16, marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", 8, marks=pytest.mark.slow),
    ],
)
def test_output_stride(name, output_stride):
    """timm's maps and gradients; and the pixels of the network at 32, with the same weights."""
    theirs = drawn(plain_network(name, "timm", output_stride=output_stride))
    ours, strided = (
        cnnfast.create_model(name, output_stride=stride, drop_rate=0.0).double().eval()
        for stride in (output_stride, 32)
    )
    for network in (ours, strided):
        cnnfast.load_weights(network, theirs.state_dict(), "timm")
    assert_equal(ours, theirs)
    assert ours.feature_info.reduction() == [one["reduction"] for one in theirs.feature_info]
    x = torch.randn(2, 3, 57, 50, dtype=torch.float64)
    with torch.no_grad():
        maps = [network.forward_intermediates(x, intermediates_only=True) for network in (ours, theirs, strided)]
        for n, (got, expected, fewer) in enumerate(zip(*maps, strict=True)):
            times = (2 << n) // ours.feature_info.reduction(n)
            assert got.shape == expected.shape and relative(got, expected) <= 1e-12
            assert relative(got[:, :, ::times, ::times], fewer) <= 1e-12
    for network in (ours, theirs):
        network.train()(x).square().mean().backward()
    assert_same_gradients(ours, theirs, 1e-8, ours.checkpoint_keys("timm"))


def test_drop_path_of_v2():
    """timm's: the same random numbers leave out the same images' blocks."""
    theirs = plain_network("mobilenet_v2", "timm", drop_path_rate=0.5).double().train()
    ours = cnnfast.create_model("mobilenet_v2", drop_path_rate=0.5, drop_rate=0.0).double().train()
    cnnfast.load_weights(ours, theirs.state_dict(), "timm")
    x = torch.randn(4, 3, 33, 33, dtype=torch.float64)
    torch.manual_seed(3)
    expected = theirs(x)
    torch.manual_seed(3)
    assert relative(ours(x), expected) <= 1e-9
    assert relative(ours(x), expected) > 1e-3


@pytest.mark.parametrize(
    "name, options, says",
    [
        ("mobilenet_v1", dict(width_mult=0), "width_mult must be positive, got 0"),
        ("mobilenet_v2", dict(width_mult=float("nan")), "width_mult must be positive, got nan"),
        ("mobilenet_v2", dict(inverted_residual_setting=[(6, 24, 2)]), r"rows of \(expand ratio.*got \[\(6, 24, 2\)\]"),
        ("mobilenet_v2", dict(round_nearest=0), "round_nearest must be positive, got 0"),
        ("mobilenet_v2", dict(inverted_residual_setting=[]), r"rows of \(expand ratio.*got \[\]"),
        ("mobilenet_v1", dict(output_stride=4), "output_stride must be one of 8, 16, 32, got 4"),
        ("mobilenet_v2", dict(output_stride=64), "output_stride must be one of 8, 16, 32, got 64"),
        ("mobilenet_v2", dict(global_pool="median"), "global_pool must be one of"),
    ],
)
def test_mistaken_arguments(name, options, says):
    with pytest.raises(ValueError, match=says):
        cnnfast.create_model(name, **options)
