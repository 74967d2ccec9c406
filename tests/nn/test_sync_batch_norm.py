"""Several processes, each with its part of a batch, have the outputs, gradients and running statistics of one process
with BatchNorm2d on the joined batch. Fails if statistics, or gradients through them, are those of a process's own part;
if parts of different sizes count alike; if a mode of BatchNorm2d is lost."""

import copy

import pytest
import torch
from joined import in_processes
from joined_cases import inputs, make_network, make_norm, normed, steps_of, sync_network, sync_norm
from networks import draw_batch_norms, ops_of, relative
from numerics import unit_roundoff
from torch import nn

import cnnfast
from cnnfast.nn import SyncBatchNorm2d, convert_sync_batchnorm
from cnnfast.nn.sync_batch_norm import track_statistics

NHWC, NCHW = torch.channels_last, torch.contiguous_format


@pytest.mark.parametrize(
    "sizes, shape, options, layout",
    [
        ([3, 5], (7, 5, 6), {}, NHWC),
        ([4, 1, 2], (3, 4, 4), dict(momentum=None), NCHW),
        ([0, 3], (4, 3, 5), dict(affine=False, momentum=0.3), NCHW),
        ([1, 1], (6, 1, 1), dict(track_running_stats=False, eps=1e-3), NCHW),
    ],
)
def test_as_one_process(sizes, shape, options, layout):
    seed = torch.seed() % 1000
    x, grad = (torch.cat(parts) for parts in inputs(seed, sizes, shape, torch.float64))
    expected = normed(make_norm(shape[0], torch.float64, options), x, grad)
    got = in_processes(sync_norm, len(sizes), seed, sizes, shape, torch.float64, options, layout)
    assert all(results.keys() == expected.keys() for results in got)
    for name, value in expected.items():
        if name.startswith(("y", "grad_x")):
            assert relative(torch.cat([results[name] for results in got]), value) <= 1e-12, name
        elif name.startswith("grad_"):
            assert relative(sum(results[name] for results in got), value) <= 1e-12, name
        else:
            for results in got:
                assert relative(results[name].double(), value.double()) <= 1e-12, name


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_statistics_are_moved_as_batch_norm_moves_them(dtype, momentum):
    """Means bitwise, variances but for the batch's, which ATen hasn't rounded; what is infinite stays infinite."""
    x = torch.randn(3, 500, 4, 5, dtype=dtype) * 3 + 1
    theirs = nn.BatchNorm2d(500, momentum=momentum, dtype=dtype)
    draw_batch_norms(theirs, x)
    theirs.running_var[0] = torch.inf
    theirs.num_batches_tracked.fill_(6)
    ours, of_batch = copy.deepcopy(theirs), nn.BatchNorm2d(500, momentum=1.0, dtype=dtype)
    theirs(x), of_batch(x)
    ours.num_batches_tracked.add_(1)
    track_statistics(ours, of_batch.running_mean, of_batch.running_var)
    assert theirs.running_var[0] == ours.running_var[0] == torch.inf
    assert torch.equal(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_one_process(dtype):
    """Errors no larger than twice BatchNorm2d's, or than the sums' and one rounding (numerics.py): in the mean of four
    draws, since a gradient of a weight owes its error to the one channel whose mean is farthest from zero."""
    errors = {}
    sizes, shape = [5, 2], (16, 9, 9)
    for seed in torch.randint(1000, (4,)).tolist():
        x, grad = (torch.cat(parts).contiguous(memory_format=NHWC) for parts in inputs(seed, sizes, shape, dtype))
        exact = normed(make_norm(shape[0], torch.float64, {}), x.double(), grad.double())
        theirs = normed(make_norm(shape[0], dtype, {}), x, grad)
        got = in_processes(sync_norm, 2, seed, sizes, shape, dtype, {}, NHWC)
        for name, value in exact.items():
            ours = torch.cat([results[name] for results in got]) if name.startswith(("y", "grad_x")) else got[0][name]
            if name.startswith(("grad_weight", "grad_bias")):
                ours = got[0][name] + got[1][name]
            assert ours.dtype == theirs[name].dtype, name
            pair = torch.tensor([relative(t.double(), value.double()) for t in (ours, theirs[name])])
            errors[name] = errors.get(name, 0) + pair / 4
    rounding = unit_roundoff(dtype) + (4 + (x.numel() / shape[0]) ** 0.5 / 2) * 2**-24
    for name, (error, bound) in errors.items():
        assert error <= max(2 * bound, rounding), name


def test_one_value_per_channel():
    got = in_processes(sync_norm, 2, 0, [1, 0], (4, 1, 1), torch.float64, {}, NCHW)
    assert all("more than 1 value per channel" in message for message in got)


@pytest.mark.parametrize(
    "name, options, sizes, checkpointing",
    [
        ("mobilenet_v2", dict(drop_rate=0.0, width_mult=0.35), [2, 4], False),
        ("mobilenet_v2", dict(drop_rate=0.0, width_mult=0.35), [0, 3], False),
        ("tf_efficientnet_lite0", dict(drop_rate=0.0), [2, 4], True),
    ],
)
def test_networks_under_ddp(name, options, sizes, checkpointing):
    """Fused. Losses, parameters and running statistics after steps of SGD, unequal parts; recomputation too."""
    seed = torch.seed() % 1000
    network = make_network(name, options)
    x, targets = inputs(seed, sizes, (3, 64, 64), torch.float64)[0], inputs(seed, sizes, (5, 1, 1), torch.float64)[1]
    expected = steps_of(network, network, (torch.cat(x), torch.cat(targets)[..., 0, 0]), sum(sizes), 1)
    got = in_processes(sync_network, 2, seed, sizes, name, options, checkpointing)
    assert relative(got[0]["losses"] + got[1]["losses"], expected["losses"]) <= 1e-9
    assert expected["losses"].max() < 1e3 and relative(got[0]["eval"], expected["eval"]) <= 1e-9
    for key in network.state_dict():
        assert torch.equal(got[0][key], got[1][key]), key
        assert relative(got[0][key].double(), expected[key].double()) <= 1e-9, key


def test_conversion():
    """Parameters, buffers and modes stay; a network is fused in eval mode as before, and by torch's kind too."""
    network = cnnfast.create_model("mobilenet_v2", num_classes=5).eval()
    draw_batch_norms(network, torch.randn(4, 3, 64, 64))
    network.features[2].conv[0][1].train()
    before, x = dict(network.state_dict(keep_vars=True)), torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        expected, calls = network(x), ops_of(network, x)
        torches = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
        converted = convert_sync_batchnorm(network)
        assert converted is network and ops_of(network, x) == ops_of(torches, x) == calls
        assert torch.equal(network(x), expected) and torch.equal(torches(x), expected)
    after = network.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[key] is before[key] for key in before)
    kinds = [type(module) for module in network.modules()]
    assert nn.BatchNorm2d not in kinds and kinds.count(SyncBatchNorm2d) == 52
    assert network.features[2].conv[0][1].training and not network.features[3].conv[0][1].training
    with torch.no_grad():
        assert relative(copy.deepcopy(network)(x), expected) == 0


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm])
def test_recomputed_blocks_move_statistics_once(convert):
    network = cnnfast.create_model("mobilenet_v2", num_classes=5, drop_rate=0.0, width_mult=0.35).train()
    network = convert(network)
    expected = copy.deepcopy(network)
    network.set_grad_checkpointing()
    x = torch.randn(4, 3, 40, 40)
    for module in (network, expected):
        module(x).sum().backward()
    for key, value in expected.state_dict().items():
        assert torch.equal(network.state_dict()[key], value), key


@pytest.mark.gpu
def test_conversion_on_a_gpu():
    network = convert_sync_batchnorm(cnnfast.create_model("mobilenet_v2", num_classes=5).cuda()).eval()
    kinds = [type(module) for module in network.modules()]
    assert kinds.count(nn.SyncBatchNorm) == 52 and SyncBatchNorm2d not in kinds
    with torch.no_grad():
        assert "inverted_residual" in " ".join(ops_of(network, torch.randn(1, 3, 40, 40, device="cuda")))


def test_without_other_processes():
    """In a single process it is BatchNorm2d."""
    layers, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 3, 8, 8)
    expected = copy.deepcopy(layers)
    assert torch.equal(convert_sync_batchnorm(layers)(x), expected(x))
    assert torch.equal(layers[1].running_var, expected[1].running_var)


def test_other_dimensions():
    with pytest.raises(TypeError, match="BatchNorm2d, got BatchNorm1d"):
        convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)))
