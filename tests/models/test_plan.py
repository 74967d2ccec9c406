"""A network's forward for inference, whole: one op for most.

Fails if it isn't what its blocks and its head compute one by one, lags behind a change of weights, modules, hooks or
modes, or hides single ops from those who look at them.
"""

import copy
import logging
import pickle

import pytest
import torch
from networks import draw_batch_norms, one_of_each_family, ops_of
from torch import nn
from torch.profiler import profile

import cnnfast
from cnnfast.models.plan import plan_of
from cnnfast.nn import fused


def network_and_input(name="mobilenet_v2", dtype=torch.float32, **options):
    network = cnnfast.create_model(name, **options).eval()
    size = max(network.min_size, 64)
    x = torch.randn(2, network.pretrained_cfg["input_size"][0], size, size)
    draw_batch_norms(network, x)
    return network.to(dtype), x.to(dtype).contiguous(memory_format=torch.channels_last)


def seen(network, x):
    """What a forward's calls are, after one."""
    network(x)
    plan = plan_of(network, "forward")
    return None if plan is None else [type(call).__name__ for call in plan.calls]


@pytest.fixture
def inference():
    with torch.no_grad():
        yield


pytestmark = pytest.mark.usefixtures("inference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*one_of_each_family(), "mobilenet_v2", "resnet18"])
def test_is_what_blocks_compute(name, dtype):
    network, x = network_and_input(name, dtype)
    whole = network(x)
    features = network.forward_features(x)
    assert torch.equal(network.forward_head(features), whole)
    one_by_one = []
    ops_of(lambda: one_by_one.append(network(x)))
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2  # of a head's sums: features have the same bits
    size = whole.abs().amax()
    assert (whole - one_by_one[0]).abs().amax() <= tolerance * size > 0


ONE_CALL = (
    *("mobilenet_v1", "mobilenet_v2", "efficientnet_b0", "xception", "resnet18", "se_resnet50"),
    *("inception_v3", "googlenet", "googlenet_bn", "inception_v4", "inception_resnet_v2"),
)


@pytest.mark.parametrize("name", ONE_CALL)
def test_is_one_call(name):
    assert seen(*network_and_input(name)) == ["Recorded"]


CHANGES = {
    "a weight in place": lambda n: n.features[2].conv[0][0].weight.mul_(2),
    "a weight's data": lambda n: setattr(n.features[3].conv[1][0].weight, "data", torch.randn(144, 1, 3, 3)),
    "a bias of the head": lambda n: n.classifier[1].bias.add_(1),
    "running statistics": lambda n: n.features[18][1].running_mean.add_(1),
    "another parameter": lambda n: setattr(n.classifier[1], "weight", nn.Parameter(torch.randn(1000, 1280))),
    "another block": lambda n: n.features.__setitem__(3, copy.deepcopy(n.features[3]).apply(_double)),
    "another classifier": lambda n: n.reset_classifier(7),
    "another pooling": lambda n: n.reset_classifier(1000, "max"),
    "a hook on a block": lambda n: n.features[5].register_forward_hook(lambda m, a, y: y * 2),
    "a hook within a block": lambda n: n.features[5].conv[0].register_forward_hook(lambda m, a, y: y * 2),
    "a hook on the pooling": lambda n: n.global_pool.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "a hook on the classifier": lambda n: n.classifier.register_forward_hook(lambda m, a, y: y * 2),
    "a hook on its linear layer": lambda n: n.classifier[1].register_forward_hook(lambda m, a, y: y * 2),
    "a forward on a block": lambda n: setattr(n.features[5], "forward", lambda x: x * 2),
    "loaded weights": lambda n: n.load_state_dict(network_and_input()[0].state_dict()),
    "a part in training": lambda n: n.features[1].train(),
}


def _double(module):
    for parameter in module.parameters(recurse=False):
        parameter.data.mul_(2)


@pytest.mark.parametrize("change", CHANGES)
def test_follows(change):
    network, x = network_and_input()
    before = network(x)
    CHANGES[change](network)
    after = network(x)
    fresh = copy.deepcopy(network)  # which has no packings
    for module in fresh.modules():
        assert vars(module).get("_packing") is None
    with torch.enable_grad():
        expected = fresh(x).detach()  # layer by layer
    assert after.shape != before.shape or (after - before).abs().amax() > 1e-3 * before.abs().amax()
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().amax()))


def test_hooks_see_every_call_and_go_as_they_came():
    network, x = network_and_input()
    plain, calls = network(x), []
    handle = network.features[4].register_forward_hook(lambda module, args, y: calls.append(y.shape))
    assert torch.equal(network(x), plain) and torch.equal(network(x), plain) and len(calls) == 2
    assert seen(network, x) == ["Recorded", "Bottleneck", "Recorded"] and len(calls) == 3
    handle.remove()
    assert seen(network, x) == ["Recorded"] and len(calls) == 3


POOLING_CHANGES = {
    "a hook on pooling": lambda n: n.Pool2.register_forward_hook(lambda m, a, y: y * 2),
    "a hook on a branch's pooling": lambda n: n.Mixed_6a.pool.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "a forward on pooling": lambda n: setattr(n.Pool2, "forward", lambda x: x[:, :, ::2, ::2]),
    "a forward on a branch's pooling": lambda n: setattr(n.Mixed_6a.pool, "forward", lambda x: x[:, :, 1:-1:2, 1:-1:2]),
    "another pooling": lambda n: setattr(n, "Pool2", nn.AvgPool2d(3, 2)),
    "another pooling of a branch": lambda n: setattr(n.Mixed_6a, "pool", nn.AvgPool2d(3, 2)),
    "a pooling's kernel": lambda n: setattr(n.Pool2, "kernel_size", 2),
    "a branch's pooling's kernel": lambda n: setattr(n.Mixed_6a.pool, "kernel_size", (2, 3)),
    "what a branch's average is of": lambda n: setattr(n.Mixed_5b.pool, "count_include_pad", False),
    "branches' order": lambda n: (setattr(n.Mixed_5b, "branches", n.Mixed_5b.branches[::-1]), cnnfast.repack(n)),
}


@pytest.mark.parametrize("change", POOLING_CHANGES)
def test_follows_pooling(change):
    network, x = network_and_input("inception_v3")
    before = network(x)
    assert seen(network, x) == ["Recorded"]
    POOLING_CHANGES[change](network)
    after = network(x)
    with torch.enable_grad():
        expected = network(x).detach()  # layer by layer
    assert (after - before).abs().amax() > 1e-3 * before.abs().amax()
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().amax()))
    assert torch.equal(network(x), after)


@pytest.mark.parametrize(
    "change", [dict(size=3), dict(alpha=0.1), dict(beta=0.5), dict(k=2.0), dict(backend="reference")]
)
def test_follows_local_response_normalisation(change):
    network, x = network_and_input("googlenet")
    before, options = network(x), vars(network.lrn2) | change
    assert seen(network, x) == ["Recorded"]
    vars(network.lrn2).update(change)
    after = network(x)
    assert vars(network.lrn2) == options
    with torch.enable_grad():
        expected = network(x).detach()  # layer by layer
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().amax()))
    assert not torch.equal(after, before)
    assert (seen(network, x) == ["Recorded"]) == ("backend" not in change)


def test_pooling_and_branches_are_single_ops_for_those_who_look():
    network, x = network_and_input("inception_v3")
    plain, calls = network(x), []
    with profile() as profiled:
        network(x)
    names = [event.name for event in profiled.events()]
    counts = [names.count(f"aten::{op}") for op in ("max_pool2d", "avg_pool2d", "cat")]
    assert counts == [4, 9, 11] and "cnnfast::packed_sequence" not in names
    handle = network.Pool1.register_forward_hook(lambda module, args, y: calls.append(y.shape))
    assert torch.equal(network(x), plain) and torch.equal(network(x), plain) and len(calls) == 2
    assert seen(network, x) == ["Recorded", "MaxPool2d", "Recorded"]
    handle.remove()
    calls.clear()
    assert seen(network, x) == ["Recorded"] and calls == []


def test_looking_at_single_ops():
    network, x = network_and_input()
    network(x)
    assert ops_of(network, x).count("inverted_residual_packed") == 16
    with profile() as profiled:
        network(x)
    names = [event.name for event in profiled.events()]
    assert names.count("cnnfast::inverted_residual_packed") == 16 and "cnnfast::packed_sequence" not in names
    with torch.device("cpu"):
        assert plan_of(network, "forward") is None
    with torch.autocast("cpu", torch.bfloat16):
        assert plan_of(network, "forward") is None and network(x).dtype is torch.bfloat16
    assert plan_of(network, "forward") is not None


def test_no_part_of_copies():
    network, x = network_and_input()
    y = network(x)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(x), y)
        other.classifier[1].bias.add_(1)
        assert torch.equal(network(x), y) and not torch.equal(other(x), y)


def test_errors_name_x():
    network, x = network_and_input()
    network(x)
    for wrong, error, says in (
        (x[:, :1], ValueError, r"x must have shape \(N, 3, H, W\)"),
        (x.double(), TypeError, "x must have the parameters' dtype"),
        ("x", TypeError, "x must be a torch.Tensor, got str"),
    ):
        with pytest.raises(error, match=says):
            network(wrong)
    with pytest.raises(ValueError, match="x must have shape"):
        network.forward_head(torch.zeros(1, 4, 3, 3))


def test_batches_and_sizes():
    network, x = network_and_input()
    network(x)
    for n, size in ((0, (64, 64)), (1, (71, 39)), (3, (33, 64))):
        y = network(torch.randn(n, 3, *size))
        assert y.shape == (n, 1000) and y.is_contiguous()


def test_a_head_that_is_not_joined_is_not_told_of(inference, caplog):
    """A network's user didn't write the block that its pooling and its classifier are tried as."""
    network, x = network_and_input("vgg11")
    fused._log_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="cnnfast"):
        network(x)
    assert not caplog.records
