"""Every network that timm or torchvision has too is theirs: keys, maps, logits, gradients, running statistics.

In the default run keys and shapes of all but the largest, and values of a few; the others are slow. What
test_networks.py does in depth to a few is done here to all, at small resolutions. Statistics and affine parameters are
drawn. Fails if a layer, activation, padding, eps, shortcut or tap differs, or a fused network is less exact than the
policy allows.
"""

import copy
import functools

import pytest
import torch
from networks import assert_as_exact_over, assert_same_gradients, draw_batch_norms, in_float64, relative
from torch import nn

import cnnfast
from cnnfast._peers import checkpoint_source, plain_network, plain_networks
from cnnfast.checkpoints import same_numbers
from cnnfast.models.registry import model_entry

# Small, of families whose maps differ in kind; of mobilenet_v2 test_networks.py has torchvision's.
QUICK = {"googlenet_bn": "torchvision", "mobilenet_v2": "timm", "resnet18": "timm", "xception": "timm"}
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
DEEP = tuple(f"efficientnet_b{n}" for n in range(5, 9))  # by the end of the name: inference only, without bfloat16
ELSEWHERE = ("efficientnet_l2", "vgg1")  # values: test_efficientnet.py, test_vgg.py


def cases():
    """(our name, package)"""
    for name in plain_networks():
        if any(part in name for part in ELSEWHERE):
            continue
        for package in model_entry(name).peers:
            marks = [pytest.mark.slow] * (QUICK.get(name) != package)
            yield pytest.param((name, package), marks=marks, id=f"{name}-{package}")


def size_of(name):
    return next((size for part, size in SIZES.items() if part in name), 75)


@functools.cache
def _drawn(name, package):
    torch.manual_seed(7)
    network = plain_network(name, package, **(dict(drop_rate=0.0) if package == "timm" else {}))
    size = size_of(name)
    # statistics of few values are far from those of another x, and in deep networks the distance grows block by block
    draw_batch_norms(network, torch.randn(3 if size >= 75 else 32, 3, size, size))
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network.eval()


@pytest.fixture(params=cases())
def twins(request):
    """(name, theirs, ours, names of our keys in theirs) with one state, in eval mode."""
    name, package = request.param
    if name.endswith(DEEP) and (request.node.originalname == "test_training" or "bfloat16" in request.node.name):
        pytest.skip("too large for every test")
    if _drawn.cache_info().currsize > 1:
        _drawn.cache_clear()  # large ones fill the memory
    theirs = copy.deepcopy(_drawn(name, package))
    ours = cnnfast.create_model(name, drop_rate=0.0).eval()
    cnnfast.load_weights(ours, theirs.state_dict(), checkpoint_source(name, package))
    return name, theirs, ours, ours.checkpoint_keys(package)


def maps_and_logits(network, x):
    """Feature maps where the package has them, the last map and the logits."""
    if hasattr(network, "forward_intermediates"):
        last, maps = network.forward_intermediates(x)
        return [*maps, last, network.forward_head(last)]
    return [network(x)]


def pairs(ours, theirs, x):
    expected = maps_and_logits(theirs, x)
    got = maps_and_logits(ours, x)[-len(expected) :]
    assert len(got) == len(expected) and [g.shape for g in got] == [e.shape for e in expected]
    return list(zip(got, expected, strict=True))


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


def test_in_float64(twins, nan_outputs):
    """Nothing hides behind rounding there; nor what nobody wrote, behind zeros."""
    name, theirs, ours, _ = twins
    theirs.double(), ours.double()
    size = size_of(name)
    for shape in ((3, 3, size, size + 6), (1, 3, size + size // 8, size + 1)):
        x = torch.randn(shape, dtype=torch.float64)
        with torch.no_grad():
            for got, expected in pairs(ours, theirs, x):
                assert relative(got, expected) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_low_precision(twins, dtype):
    name, theirs, ours, _ = twins
    theirs.to(dtype), ours.to(dtype)
    exact = in_float64(theirs)
    size, outputs = size_of(name), []
    gated = any("reduce" in key or "fc1" in key for key in theirs.state_dict())
    for shape in ((3, 3, size, size + 6), (1, 3, size + size // 8, size + 1)) * (4 if gated else 1):
        x = torch.randn(shape).to(dtype)
        with torch.no_grad():
            both, expected = pairs(ours, theirs, x), maps_and_logits(exact, x.double())
            outputs.append([(*pair, ref) for pair, ref in zip(both, expected, strict=True)])
    for stage in zip(*outputs, strict=True):
        assert_as_exact_over(list(stage))


def test_training(twins):
    """Outputs, gradients and running statistics, in float64."""
    name, theirs, ours, keys = twins
    theirs.double().train(), ours.double().train()
    size = size_of(name)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [network(i) for network, i in zip((ours, theirs), inputs, strict=True)]
    assert relative(*outputs) <= 1e-9
    grad = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(grad)
    assert relative(inputs[0].grad, inputs[1].grad) <= 1e-8
    assert_same_gradients(ours, theirs, 1e-8, keys)
    expected = dict(theirs.named_buffers())
    for key, buffer in ours.named_buffers():
        assert relative(buffer.double(), expected[keys[key]].double()) <= 1e-9, key
