"""Every network that timm or torchvision has too is theirs: keys, maps, logits, gradients, running statistics.

In the default run keys and shapes of all but the largest, and values of a few; the others are slow. What
test_networks.py does in depth to a few is done here to all, at small resolutions (at full ones: test_full_size.py).
Statistics and affine parameters are drawn. Fails if a layer, activation, padding, eps, shortcut or tap differs, or a
fused network is less exact than the policy allows.
"""

import copy

import pytest
import torch
from networks import (
    assert_as_exact_over,
    assert_same_gradients,
    draw_batch_norms,
    in_float64,
    relative,
    stages_of,
    without_weights,
)
from torch import nn

import cnnfast
from cnnfast._peers import checkpoint_source, first_peer, plain_network, plain_networks
from cnnfast.checkpoints import same_numbers
from cnnfast.models.registry import model_entry

# Small, of families whose maps differ in kind.
QUICK = ("googlenet_bn", "mobilenet_v2", "resnet18", "xception")
# Of x, by a part of the name: where 75 is too small, or less is enough for what a deeper network repeats.
SIZES = {
    "inception": 107,
    "alexnet": 95,
    "senet154": 43,
    "resnet101": 43,
    "resnet152": 43,
    "xception": 43,
    **{f"efficientnet_b{n}": 33 for n in range(4, 9)},
}
DEEP = tuple(f"efficientnet_b{n}" for n in range(5, 9))  # by the end of the name
ELSEWHERE = ("efficientnet_l2", "vgg1")  # values: test_efficientnet.py, test_vgg.py


def cases():
    for name in plain_networks():
        if not any(part in name for part in ELSEWHERE):
            yield pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK))


def size_of(name):
    return next((size for part, size in SIZES.items() if part in name), 75)


@pytest.fixture(scope="module", params=cases())
def drawn(request):
    """(name, their network with drawn statistics and ours with its weights, in eval mode)"""
    torch.manual_seed(7)
    name = request.param
    network = plain_network(name, **(dict(drop_rate=0.0) if first_peer(name) == "timm" else {}))
    size = size_of(name)
    draw_batch_norms(network, torch.randn(3 if size >= 75 else 8, 3, size, size))
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ours = without_weights(name, drop_rate=0.0)
    cnnfast.load_weights(ours, network.state_dict(), checkpoint_source(name))
    return name, network.eval(), ours.eval()


@pytest.fixture
def twins(drawn):
    """(name, theirs, ours, names of our keys in theirs) with one state, in eval mode."""
    name, theirs, ours = drawn
    return name, copy.deepcopy(theirs), copy.deepcopy(ours), ours.checkpoint_keys(first_peer(name))


def inputs(name, dtype):
    size = size_of(name)
    for shape in ((3, 3, size, size + 6), (1, 3, size + size // 8, size + 1)):
        yield torch.randn(shape).to(dtype)


def taps_of(ours):
    return [one["module"] for one in ours.feature_info]


def compare(ours, theirs, x):
    """(ours, theirs) of each stage, by name."""
    taps = taps_of(ours)
    expected, got = stages_of(theirs, x, taps), stages_of(ours, x, taps)
    assert {*taps, "logits"} <= expected.keys() <= got.keys()
    assert [got[stage].shape for stage in expected] == [y.shape for y in expected.values()]
    return {stage: (got[stage], y) for stage, y in expected.items()}


# The largest of those that the same lines make are slow.
KEYED = [pytest.param(name, marks=[pytest.mark.slow] * name.endswith((*DEEP, "_l2"))) for name in plain_networks()]


@pytest.mark.parametrize("name", KEYED)
def test_keys_and_shapes(name):
    with torch.device("meta"):
        ours = cnnfast.create_model(name)
        for package in model_entry(name).peers:
            keys, theirs = ours.checkpoint_keys(package), plain_network(name, package)
            expected = {key: value.shape for key, value in theirs.state_dict().items()}
            own = {keys[key]: value.shape for key, value in ours.state_dict().items()}
            assert own.keys() == expected.keys()
            assert [key for key in own if not same_numbers(expected[key], own[key])] == []
            info = getattr(theirs, "feature_info", None)
            if info is not None:
                for key in ("num_chs", "reduction"):
                    assert ours.feature_info.get(key) == [one[key] for one in info]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_eval(twins, dtype, nan_outputs):
    """Maps and logits as exact as the policy wants."""
    name, theirs, ours, _ = twins
    theirs.to(dtype), ours.to(dtype)
    exact, outputs = in_float64(theirs), {}
    draws = 3 if name.startswith("se") else 1  # of networks with gates one tells less: cnnfast.exactness.errors
    for x in (x for _ in range(draws) for x in inputs(name, dtype)):
        pairs = compare(ours, theirs, x)
        for stage, ref in stages_of(exact, x.double(), taps_of(ours)).items():
            outputs.setdefault(stage, []).append((*pairs[stage], ref))
    for stage, triples in outputs.items():
        assert_as_exact_over(triples, stage)


@torch.no_grad()
def test_eval_in_float64(twins, nan_outputs):
    """Where nothing hides behind rounding."""
    name, theirs, ours, _ = twins
    theirs.double(), ours.double()
    for x in inputs(name, torch.float64):
        for stage, (got, expected) in compare(ours, theirs, x).items():
            assert relative(got, expected) <= 1e-10, stage


OF_BOTH = [name for name in plain_networks() if len(model_entry(name).peers) > 1 and not name.startswith("vgg")]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in OF_BOTH])
@torch.no_grad()
def test_the_other_package(name):
    """Of a network that both packages have the second one is its twin too; in float64."""
    ours = cnnfast.create_model(name)
    draw_batch_norms(ours, torch.randn(3, 3, size_of(name), size_of(name)))
    (package,) = model_entry(name).peers.keys() - {first_peer(name)}
    theirs, keys = plain_network(name, package), ours.checkpoint_keys(package)
    theirs.load_state_dict({keys[key]: value for key, value in ours.state_dict().items()})
    ours.double().eval(), theirs.double().eval()
    for x in inputs(name, torch.float64):
        for stage, (got, expected) in compare(ours, theirs, x).items():
            assert relative(got, expected) <= 1e-10, stage


def test_training(twins):
    """Outputs, gradients and running statistics, in float64."""
    name, theirs, ours, keys = twins
    theirs.double().train(), ours.double().train()
    size = size_of(name)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [network(x) for network, x in zip((ours, theirs), xs, strict=True)]
    assert relative(*outputs) <= 1e-9
    grad = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(grad)
    assert relative(xs[0].grad, xs[1].grad) <= 1e-8
    assert_same_gradients(ours, theirs, 1e-8, keys)
    expected = dict(theirs.named_buffers())
    for key, buffer in ours.named_buffers():
        assert relative(buffer.double(), expected[keys[key]].double()) <= 1e-9, key
