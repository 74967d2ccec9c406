"""`cnnfast bench train`, and the backward passes of `cnnfast bench ops`.

Fails if a contender whose loss or gradients are others is timed, if a peer doesn't train the same weights, or if a step
leaves gradients behind.
"""

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import nn

from cnnfast.bench import backward, train
from cnnfast.bench.measure import Settings, WrongResult, measure
from cnnfast.cli.main import main

SETTINGS = Settings(1, batch=5, rounds=1, sample_seconds=1e-4, gemm_size=128, peers=("eager", "eager_channels_last"))
NO_PROBLEM = dict.fromkeys(("cnnfast", *SETTINGS.peers))


def problems(found):
    return {name: contender.problem for name, contender in found.contenders.items()}


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_steps_equal_the_plain_networks(dtype):
    case = replace(train.select(["mobilenet_v2"])[0], size=64)
    found = measure(case, replace(SETTINGS, dtype=dtype))
    assert problems(found) == NO_PROBLEM and all(len(c.seconds) == 1 for c in found.contenders.values())


def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 1000))


@pytest.mark.parametrize(("change", "says"), [("0.weight", "gradients off by"), ("4.bias", "a loss of")])
def test_a_wrong_step_is_seen(change, says):
    """The last bias moves the loss by much and the gradients, all in all, by less than is allowed in bfloat16."""
    torch.manual_seed(0)
    network, x = small(), torch.randn(4, 3, 8, 8)
    expected = train._loss_and_gradients(small_copy(network).double(), x.double(), torch.float64)
    train._check(small_copy(network), x, torch.float32, expected)
    wrong = small_copy(network)
    with torch.no_grad():
        parameter = wrong.get_parameter(change)
        if change == "0.weight":
            parameter[:4] *= -1
        else:
            parameter[:4] += 1
    dtype = torch.float32 if change == "0.weight" else torch.bfloat16
    with pytest.raises(WrongResult, match=says):
        train._check(wrong, x, dtype, expected)


def small_copy(network):
    copied = small()
    copied.load_state_dict(network.state_dict())
    return copied


def test_a_step_trains():
    network, x = small(), torch.randn(4, 3, 8, 8)
    before = network[0].weight.clone()
    step = train._step(network, x, torch.float32, False)
    first = step()
    for _ in range(20):
        last = step()
    assert last < first and not torch.equal(before, network[0].weight)
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("case", [c for c in backward.CASES if c.network == "efficientnet_b0"], ids=lambda c: c.name)
def test_backward_equals_the_plain_layer(case):
    settings = replace(SETTINGS, peers=(*SETTINGS.peers, "inductor"), batch=2)
    found = measure(replace(case, size=9, channels=19), settings)
    assert problems(found) == NO_PROBLEM | {"inductor": None}


def test_unknown_dtypes_and_peers(capsys):
    for option, says in (
        ("--dtype float16", "--dtype: no training in float16; there are float32, bfloat16"),
        ("--peers openvino", "--peers: no peer openvino; there are eager, eager_channels_last, inductor"),
    ):
        assert main(["bench", "train", *option.split()]) == 2
        assert says in capsys.readouterr().err
