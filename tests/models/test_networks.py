"""Our networks are timm's and torchvision's: keys, outputs, gradients, running statistics, arguments.

Statistics and affine parameters are drawn. By default values in one of the four combinations of dtype and layout, and
of networks whose values are slow in test_twins.py; the others are slow ones, and full resolutions are in
test_full_size.py. Fails if a layer, activation, padding, eps or residual differs, if a fused network is less exact than
the policy allows, or if a block isn't the calls that it should be.
"""

import pytest
import torch
from networks import (
    assert_as_exact_as,
    assert_same_gradients,
    draw_batch_norms,
    in_float64,
    networks_in_depth,
    ops_of,
    relative,
)
from torch import nn

import cnnfast
from cnnfast._peers import plain_network, plain_networks
from cnnfast.models.mobilenet_v2 import Bottleneck
from cnnfast.models.xception import Block
from cnnfast.nn import DepthwiseConv2d, FusedModule

CALLS = {
    "efficientnet_b0": {"inverted_residual_packed": 16, "pointwise_conv2d_packed": 1, "conv2d_packed": 1},
    "tf_efficientnet_b0": {"inverted_residual_packed": 16, "pointwise_conv2d_packed": 1, "conv2d_packed": 1},
    "tf_efficientnet_b1": {"inverted_residual_packed": 23, "pointwise_conv2d_packed": 1, "conv2d_packed": 1},
    "tf_efficientnet_b2": {"inverted_residual_packed": 23, "pointwise_conv2d_packed": 1, "conv2d_packed": 1},
    "tf_efficientnet_lite0": {
        "separable_conv2d_packed": 1,
        "inverted_residual_packed": 15,
        "pointwise_conv2d_packed": 1,
        "conv2d_packed": 1,
    },
    "mobilenet_v1": {"separable_conv2d_packed": 13, "conv2d_packed": 1},
    "mobilenet_v2": {
        "separable_conv2d_packed": 1,
        "inverted_residual_packed": 16,
        "pointwise_conv2d_packed": 1,
        "conv2d_packed": 1,
    },
    "se_resnet50": {"pointwise_conv2d_packed": 2 * 16 + 4, "squeeze_excite_packed": 16, "conv2d_packed": 16 + 1},
    "xception": {"separable_conv2d_packed": 4 * 2 + 8 * 3 + 2, "pointwise_conv2d_packed": 4, "conv2d_packed": 2},
}
EFFICIENTNETS = ("efficientnet_b0", "tf_efficientnet_lite0")  # of the four the two that test_twins.py has as slow ones
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def pairs(*names):
    """The fixture `pair` of these by default."""
    return pytest.mark.parametrize("pair", networks_in_depth(*names), indirect=True)


def features(network):
    """The part of a network that makes features; torchvision calls it `features`."""
    return getattr(network, "forward_features", None) or network.features


@pytest.mark.parametrize(
    "dtype, layout",
    [
        (torch.float32, "nhwc"),
        pytest.param(torch.bfloat16, "nchw", marks=pytest.mark.slow),
        pytest.param(torch.float32, "nchw", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, "nhwc", marks=pytest.mark.slow),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pairs(*EFFICIENTNETS)
def test_eval(pair, dtype, layout):
    layout = LAYOUTS[layout]
    theirs, ours = (network.to(dtype).to(memory_format=layout) for network in pair)
    exact = in_float64(theirs)
    for size in ((3, 3, 75, 97), (1, 3, 96, 96)):
        x = torch.randn(size).to(dtype).to(memory_format=layout)
        with torch.no_grad():
            assert_as_exact_as(features(ours)(x), features(theirs)(x), features(exact)(x.double()))
            assert_as_exact_as(ours(x), theirs(x), exact(x.double()))


@pairs(*EFFICIENTNETS)
def test_eval_in_float64(pair, nan_outputs):
    """Nothing hides behind rounding there; nor what nobody wrote, behind zeros."""
    theirs, ours = (network.double() for network in pair)
    for size in ((2, 3, 64, 50), (1, 3, 41, 33)):
        x = torch.randn(size, dtype=torch.float64)
        with torch.no_grad():
            assert relative(ours(x), theirs(x)) <= 1e-12
            assert relative(features(ours)(x), features(theirs)(x)) <= 1e-12


def test_calls(pair, request):
    """One packed call a block, of whatever layout x is; features come in channels_last; twice the same to the bit."""
    _, ours = pair
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        called = ops_of(ours, x)
        assert {name: called.count(name) for name in called} == CALLS[request.node.callspec.params["pair"]]
        assert ours.forward_features(x).is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(ours(x), ours(x))
        assert relative(ours(x), ours(x.to(memory_format=torch.channels_last))) <= 1e-6
    layers = sum(isinstance(module, DepthwiseConv2d) for module in ours.modules())
    assert ops_of(ours, x).count("depthwise_conv2d") == layers  # with gradients: layer by layer


@pairs("efficientnet_b0")
@pytest.mark.parametrize("mode", ["train", "frozen"])
def test_training(pair, mode):
    """In float64; `frozen` is eval mode with gradients, as in fine-tuning with frozen statistics."""
    theirs, ours = (network.double().train(mode == "train") for network in pair)
    x = torch.randn(3, 3, 75, 64, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = []
    for network, i in zip((ours, theirs), inputs, strict=True):
        torch.manual_seed(3)  # of dropout
        outputs.append(network(i))
    assert relative(*outputs) <= 1e-9
    grad = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(grad)
    assert relative(inputs[0].grad, inputs[1].grad) <= 1e-9
    assert_same_gradients(ours, theirs, 1e-9)
    expected = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        assert relative(buffer.double(), expected[name].double()) <= 1e-9, name


@pairs("efficientnet_b0", "mobilenet_v2")
def test_a_step_of_training_is_seen_by_the_fused_form(pair):
    _, ours = pair
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        before = ours(x)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.01)
    ours.train()(x).square().mean().backward()
    optimizer.step()
    ours.eval()
    with torch.no_grad():
        after = ours(x)
        expected = in_float64(ours).requires_grad_(False)
    with torch.enable_grad():
        expected = expected(x.double())
    assert relative(after.double(), expected) <= 1e-4 < relative(before.double(), expected)


def test_hooks_on_first_and_last_layers(pair):
    """Where the stem's and the head's parameters lie on the network hooks run too; blocks stay fused."""
    _, ours = pair
    x, places = torch.randn(1, 3, 40, 40), dict(ours.named_modules())
    with torch.no_grad():
        before = ours(x)
        for name in {"conv2", "conv_stem", "conv_head", "conv3.conv1", "bn4", "bn2", "features.18.1"} & places.keys():
            seen = []
            hook = places[name].register_forward_hook(lambda *_, seen=seen: seen.append(1))
            torch.testing.assert_close(ours(x), before, rtol=1e-4, atol=1e-4)
            called = [op for op in ops_of(ours, x) if op.startswith(("separable", "inverted"))]
            assert seen and len(called) >= 13, name
            hook.remove()
            assert torch.equal(ours(x), before)


# What may be put around a module's calls; each returns what takes it away again.


def hook(module, seen):
    return module.register_forward_hook(lambda *_: seen.append(1)).remove


def pre_hook(module, seen):
    return module.register_forward_pre_hook(lambda *_: seen.append(1)).remove


def hook_on_every_module(module, seen):
    register = torch.nn.modules.module.register_module_forward_hook
    return register(lambda which, *_: seen.append(1) if which is module else None).remove


def another_forward(module, seen):
    forward = module.forward
    module.forward = lambda x: seen.append(1) or forward(x)
    return lambda: delattr(module, "forward")


def another_class(module, seen):
    kind = type(module)
    forward = {"forward": lambda self, x: seen.append(1) or kind.forward(self, x)}
    module.__class__ = type(kind.__name__, (kind,), forward)
    return lambda: setattr(module, "__class__", kind)


def test_what_is_put_around_a_block_sees_its_calls(pair):
    """Blocks are called past nn.Module.__call__ only where that would do nothing else."""
    _, ours = pair
    x, places = torch.randn(1, 3, 40, 40), dict(ours.named_modules())
    with torch.no_grad():
        before = ours(x)
        for name in {
            "block3",
            "block7",
            "blocks",
            "blocks.0.0",
            "blocks.2",
            "blocks.2.1",
            "features",
            "features.0",
            "features.3",
        } & places.keys():
            for put in (hook, pre_hook, hook_on_every_module, another_forward, another_class):
                seen = []
                take_away = put(places[name], seen)
                assert torch.equal(ours(x), before)
                take_away()
                assert seen == [1], (name, put)
                assert torch.equal(ours(x), before) and seen == [1]


@pairs("mobilenet_v2")
def test_a_compiled_block_is_called(pair):
    _, ours = pair
    name, block = next((name, m) for name, m in ours.named_modules() if isinstance(m, FusedModule) and m is not ours)
    x, seen = torch.randn(1, 3, 40, 40), []

    def backend(graph, _):
        seen.append(name)
        return graph.forward

    with torch.no_grad():
        before = ours(x)
        block.compile(backend=backend)
        torch.testing.assert_close(ours(x), before)
    assert seen


def xception_block():
    return Block(8, 8, 2)


def bottleneck():
    return Bottleneck(8, 8, 1, 6)


def bottleneck_without_expansion():
    return Bottleneck(8, 8, 1, 1)


@pytest.mark.parametrize(
    "make, place, layer",
    [
        (xception_block, "rep.3", nn.Hardswish()),
        (xception_block, "rep.2", nn.Identity()),
        (xception_block, "rep.+", nn.Conv2d(8, 8, 1)),
        (bottleneck, "conv.0.2", nn.Hardswish()),
        (bottleneck, "conv.1.2", nn.Identity()),  # its two activations differ
        (bottleneck, "conv.3", nn.Identity()),
        (bottleneck, "conv.+", nn.Hardswish()),
        (bottleneck_without_expansion, "conv.0.1", nn.Identity()),
        (bottleneck_without_expansion, "conv.0.+", nn.Hardswish()),
    ],
)
def test_a_changed_block_runs_as_it_is(make, place, layer):
    """A layer that was exchanged or added (+) inside is not ignored: the block runs layer by layer."""
    block, x = make().eval(), torch.randn(1, 8, 6, 6)
    draw_batch_norms(block, 3 * torch.randn(4, 8, 6, 6))
    parent, _, index = place.rpartition(".")
    parent = block.get_submodule(parent)
    with torch.no_grad():
        before = block(x)
        if index == "+":
            parent.append(layer.eval())
        else:
            parent[int(index)] = layer.eval()
        after = block(x)
        called = ops_of(block, x)
    assert relative(after, before) > 1e-3
    assert relative(after.double(), in_float64(block)(x.double())) <= 1e-5
    assert not {"separable_conv2d_packed", "inverted_residual_packed"} & {*called}


@pytest.mark.parametrize(
    "name, options",
    [
        ("tf_efficientnet_lite0", dict(drop_rate=0.3, drop_path_rate=0.4)),
        ("mobilenet_v1", dict(drop_rate=0.3)),
        ("mobilenet_v2", {}),  # torchvision's default, 0.2
    ],
)
def test_drop_rates(name, options):
    """The same random numbers drop the same images and features."""
    theirs = plain_network(name, num_classes=5, **options).double().train()
    ours = cnnfast.create_model(name, num_classes=5, **options).double().train()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(3)
    expected = theirs(x)
    torch.manual_seed(3)
    assert relative(ours(x), expected) <= 1e-9
    assert relative(ours(x), expected) > 1e-3


def initialised():
    """Of those that the same lines initialise one; two large ones would fill the memory."""
    alike = ("mobilenet_v2_", "vgg13", "vgg16", "vgg19", "efficientnet_l2", "tf_efficientnet_l2")
    quick = CALLS.keys() - {"tf_efficientnet_b0", "tf_efficientnet_b1", "tf_efficientnet_b2"}
    for name in plain_networks():
        if not name.startswith(alike):
            yield pytest.param(name, marks=[pytest.mark.slow] * (name not in quick))


@pytest.mark.parametrize("name", list(initialised()))
def test_initialisation(name):
    """Standard deviations of the weights, layer by layer."""
    ours, theirs = cnnfast.create_model(name), plain_network(name)
    expected = dict(theirs.named_parameters())
    norms = [f"{name}.weight" for name, module in ours.named_modules() if isinstance(module, nn.BatchNorm2d)]
    for name, parameter in ours.named_parameters():
        if parameter.dim() > 1 and parameter.numel() > 1000:
            assert 0.8 < parameter.std() / expected[name].std() < 1.25, name
        elif name in norms or name.replace("bias", "weight") in norms:
            assert torch.equal(parameter, expected[name]), name


def test_smallest_images(pair):
    theirs, ours = (network.double() for network in pair)
    x = torch.randn(1, 3, ours.min_size, ours.min_size, dtype=torch.float64)
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) <= 1e-12


@pairs("efficientnet_b0", "mobilenet_v2")
def test_autocast(pair):
    """bfloat16 where autocast says so, as exact as timm's."""
    theirs, ours = pair
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = in_float64(theirs)(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            y = ours(x)
            assert_as_exact_as(y, theirs(x), exact)
    with torch.autocast("cpu", torch.bfloat16):
        ours.train()(x).float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in ours.parameters())
