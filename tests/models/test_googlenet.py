"""GoogLeNet as published, BN-Inception and SE-BN-Inception, which neither timm nor torchvision has, against plain
builds written from the papers, and the figures of their tables.

Fails if a branch, its width, pooling, normalisation or padding differs, if a fused network is less exact than the
policy allows, or if a checkpoint's key lands in another place.
"""

import pytest
import torch
from networks import assert_as_exact_over, assert_same_gradients, draw_batch_norms, in_float64, relative
from plain_inception import FIGURE, TABLE, PlainBNInception, PlainGoogLeNet, caffe_name
from torch import nn

import cnnfast
from cnnfast.models.figures import count_parameters


def googlenet_pair(aux=False):
    torch.manual_seed(1)
    theirs = PlainGoogLeNet(13, aux)
    with torch.no_grad():
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, 0, 0.1) if parameter.dim() == 1 else nn.init.kaiming_normal_(parameter)
    options = dict(aux_logits=True, aux_drop_rate=0.0) if aux else {}
    ours = cnnfast.create_model("googlenet", num_classes=13, drop_rate=0.0, **options)
    weights = theirs.state_dict()
    ours.load_state_dict({key: weights.pop(caffe_name(key)) for key in ours.state_dict()})
    assert not weights
    return theirs.eval(), ours.eval()


def bn_inception_pair(se):
    torch.manual_seed(1)
    theirs = PlainBNInception(13, se, bias=not se)
    draw_batch_norms(theirs, torch.randn(3, 3, 71, 65))
    ours = cnnfast.create_model("se_bn_inception" if se else "bn_inception", num_classes=13)
    cnnfast.load_weights(ours, theirs.state_dict(), source="pretrainedmodels")
    return theirs.eval(), ours.eval()


PAIRS = {
    "googlenet": googlenet_pair,
    "bn_inception": lambda: bn_inception_pair(False),
    "se_bn_inception": lambda: bn_inception_pair(True),
}


@pytest.fixture(params=["googlenet", "bn_inception", pytest.param("se_bn_inception", marks=pytest.mark.slow)])
def pair(request):
    return PAIRS[request.param]()


def maps_and_logits(network, x):
    """Feature maps, pooled features, logits."""
    if isinstance(network, (PlainGoogLeNet, PlainBNInception)):
        maps = network.forward_intermediates(x)
        maps = maps[0] if isinstance(maps, tuple) else maps
        return [*maps, network(x)]
    last, maps = network.forward_intermediates(x)
    return [*maps, network.forward_head(last, pre_logits=True), network(x)]


SHAPES = ((3, 3, 65, 52), (1, 3, 91, 113), (2, 3, 31, 64))


@pytest.mark.parametrize(
    ("pair", "shape"),
    [  # of each network the smallest by default
        pytest.param(name, shape, id=f"{name}-{shape}", marks=[pytest.mark.slow] * (shape != SHAPES[-1]))
        for name in PAIRS
        for shape in SHAPES
    ],
    indirect=["pair"],
)
def test_eval_in_float64(pair, shape):
    theirs, ours = (network.double() for network in pair)
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        expected = maps_and_logits(theirs, x)
        for got, one in zip(maps_and_logits(ours, x), expected, strict=True):
            assert got.shape == one.shape and relative(got, one) <= 1e-11
        assert relative(expected[-1], expected[-1].roll(1, 1)) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_eval(pair, dtype):
    theirs, ours = (network.to(dtype) for network in pair)
    exact, outputs = in_float64(theirs), []
    for shape in ((3, 3, 65, 52), (1, 3, 91, 113)) * (3 if getattr(theirs, "se", False) else 1):
        x = torch.randn(shape).to(dtype)
        with torch.no_grad():
            stages = [maps_and_logits(network, x) for network in (ours, theirs)]
            stages.append(maps_and_logits(exact, x.double()))
        outputs.append(list(zip(*stages, strict=True)))
    for stage in zip(*outputs, strict=True):
        assert_as_exact_over(list(stage))


@pytest.mark.parametrize("name", ["googlenet", "bn_inception", pytest.param("se_bn_inception", marks=pytest.mark.slow)])
def test_training(name):
    """Outputs, gradients and running statistics, in float64."""
    theirs, ours = (network.double().train() for network in PAIRS[name]())
    x = torch.randn(3, 3, 65, 52, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [network(i) for network, i in zip((ours, theirs), inputs, strict=True)]
    assert relative(*outputs) <= 1e-9
    grad = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(grad)
    assert relative(inputs[0].grad, inputs[1].grad) <= 1e-9
    names = {key: caffe_name(key) for key in ours.state_dict()} if name == "googlenet" else None
    names = names or ours.checkpoint_keys("pretrainedmodels")
    assert_same_gradients(ours, theirs, 1e-9, names)
    expected = dict(theirs.named_buffers())
    for key, buffer in ours.named_buffers():
        assert relative(buffer.double(), expected[names[key]].double()) <= 1e-9, key


@pytest.mark.slow
def test_auxiliary_classifiers():
    """Of the published form, pooling 5x5 of stride 3 to 4 x 4: outputs and gradients in float64."""
    theirs, ours = (network.double().train() for network in googlenet_pair(aux=True))
    x = torch.randn(1, 3, 223, 258, dtype=torch.float64)
    outputs = [network(x) for network in (ours, theirs)]
    assert outputs[0]._fields == ("logits", "aux_logits2", "aux_logits1")
    for got, expected in zip(*outputs, strict=True):
        assert relative(got, expected) <= 1e-10
    for output in outputs:
        sum((n + 1) * one.square().sum() for n, one in enumerate(output)).backward()
    assert_same_gradients(ours, theirs, 1e-9, {key: caffe_name(key) for key in ours.state_dict()})
    with torch.no_grad():
        assert relative(ours.eval()(x), theirs.eval()(x)) <= 1e-10


def test_table_of_googlenet():
    """Multiply-adds of each row within 2 % of the paper's; of 5a it has 6 % more than its columns give.

    Its first row is that of a separable convolution of 8 filters a channel: 2.7K parameters, 34M operations, where the
    dense one has 9.4K and 118M.
    """
    with torch.device("meta"):
        network = cnnfast.create_model("googlenet").eval()
    channels = 192
    for name, (one, reduce3, three, reduce5, five, proj, millions) in TABLE.items():
        module = network.get_submodule(f"inception{name}")
        convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
        side = {"3": 28, "4": 14, "5": 7}[name[0]]
        macs = sum(conv.weight.numel() for conv in convs) * side * side
        assert macs / 1e6 == pytest.approx(millions, rel=0.06 if name == "5a" else 0.02), name
        reduced = channels * (one + reduce3 + reduce5 + proj)
        assert macs == (reduced + 9 * reduce3 * three + 25 * reduce5 * five) * side * side
        channels = one + three + five + proj
    assert channels == 1024 and len(TABLE) == 9
    reduce, conv = network.conv2.conv.weight.numel(), network.conv3.conv.weight.numel()
    assert (reduce + conv) / 1024 == 112 and (reduce + conv) * 56 * 56 / 1e6 == pytest.approx(360, rel=0.02)
    separable = 7 * 7 * 3 * 8 + 3 * 8 * 64
    assert round(separable / 1e3, 1) == 2.7 and round(separable * 112 * 112 / 1e6) == 34
    assert network.conv1.conv.weight.numel() == 9408 and round(9408 * 112 * 112 / 1e6) == 118
    weights = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(weights) == 3 + 9 * 6 + 1
    assert 1 + 2 + 2 * len(TABLE) + 1 == 22  # the longest way: its depth


def test_figure_of_bn_inception():
    """4c and 4d have 608 channels by the columns, 4e 1056, where the figure says 576 and 1024; parameters of Caffe's
    model and pretrainedmodels'."""
    assert PlainBNInception(13, False, True).widths == [256, 320, 576, 576, 576, 608, 608, 1056, 1024, 1024]
    with torch.device("meta"):
        ours = cnnfast.create_model("bn_inception").eval()
        cnnfast.nn.set_backend(ours, "reference")
        names = [f"inception_{name}" for name in FIGURE]
        maps = ours._run(torch.empty(1, 3, 224, 224), names)[1]
        widths = [tuple(maps[name].shape[1:]) for name in names]
        plain, se_plain = PlainBNInception(1000, False, True), PlainBNInception(1000, True, False)
        se = cnnfast.create_model("se_bn_inception")
    assert [width[0] for width in widths] == plain.widths
    assert [width[1] for width in widths] == [28, 28, 14, 14, 14, 14, 14, 7, 7, 7]
    assert count_parameters(ours) == count_parameters(plain) == 11_295_240
    assert count_parameters(se) == count_parameters(se_plain) == 11_931_622


def test_initialisation():
    """Caffe's: uniform within sqrt(3 / fan-in); biases 0.2, of classifiers 0."""
    network = cnnfast.create_model("googlenet", aux_logits=True)
    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = (3 / module.weight[0].numel()) ** 0.5
            assert 0.95 * bound < module.weight.abs().max() <= bound, name
            assert 0.9 < module.weight.std() / (bound / 3**0.5) < 1.1, name
            assert (module.bias == (0 if name in ("fc", "aux1.fc2", "aux2.fc2") else 0.2)).all(), name


@pytest.mark.parametrize("name", PAIRS)
def test_own_keys(name):
    """What a network saved it loads, found out or named; of names that others use for nothing, none."""
    ours, other = (cnnfast.create_model(name, num_classes=3) for _ in range(2))
    for source in (None, "cnnfast"):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        cnnfast.load_weights(other, ours.state_dict(), source)
        loaded = other.state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in ours.state_dict().items())
    with pytest.raises(ValueError, match="source must be one that has the weights"):
        cnnfast.load_weights(other, ours.state_dict(), "timm")


def test_published_defaults():
    """Dropout of 40 %, and of 70 % in the auxiliary classifiers; none with batch normalisation's network."""
    network = cnnfast.create_model("googlenet", aux_logits=True)
    assert network.drop_rate == 0.4 and network.aux1.dropout.p == network.aux2.dropout.p == 0.7
    assert cnnfast.create_model("bn_inception").drop_rate == 0
