"""cnnfast.exactness draws parameters with which a network can be judged.

Fails if activations grow or die out in a deep network, if it enlarges rounding until nothing is left to compare, or if
a batch normalisation is left as initialised.
"""

import pytest
import torch
from networks import draw_batch_norms, in_float64, relative, stages_of
from torch import nn

import cnnfast
from cnnfast._peers import plain_network


@pytest.mark.parametrize(
    "name, size", [("efficientnet_b5", 65), pytest.param("inception_v4", 299, marks=pytest.mark.slow)]
)
def test_drawn_statistics(name, size):
    torch.manual_seed(1)
    network = plain_network(name).eval()
    draw_batch_norms(network, torch.randn(2, 3, size, size))
    assert not network.training
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, initial in ((module.running_mean, 0), (module.weight, 1), (module.bias, 0)):
                assert (tensor - initial).abs().mean() > 1e-3 * module.running_var.mean().sqrt()
            assert not module.training and module.momentum == 0.1 and not module._forward_pre_hooks
    x = torch.randn(1, 3, size, size)
    taps = [one["module"] for one in network.feature_info]
    with torch.no_grad():
        exact = stages_of(in_float64(network), x.double(), taps)
        for stage, y in stages_of(network, x, taps).items():
            assert 0.1 < exact[stage].square().mean().sqrt() < 100, stage
            assert relative(y.double(), exact[stage]) < 5e-5, stage


def test_the_same_draw_again():
    x, states = torch.randn(2, 3, 33, 33), []
    network = cnnfast.create_model("cifar_resnet20")
    for seed in (0, 0, 1):
        draw_batch_norms(network.train(), x, seed)
        assert network.training
        states.append({key: value.clone() for key, value in network.state_dict().items()})
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert not torch.equal(states[0]["bn1.bias"], states[2]["bn1.bias"])
