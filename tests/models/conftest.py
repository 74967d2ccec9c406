import copy
import functools

import pytest
import torch
from networks import draw_batch_norms
from numerics import nan_outputs

import cnnfast
from cnnfast._peers import plain_network

__all__ = ["nan_outputs"]


@functools.cache
def _plain_network(name):
    torch.manual_seed(7)
    network = plain_network(name)
    draw_batch_norms(network, torch.randn(4, 3, 75, 75))
    return network.eval()


# Of each family one or two; all others are in test_twins.py. Slow: those whose family or blocks another network has by
# default, and one of large layers.
QUICK = ("efficientnet_b0", "mobilenet_v2", "tf_efficientnet_lite0", "xception")
SLOW = ("mobilenet_v1", "se_resnet50", "tf_efficientnet_b0", "tf_efficientnet_b1", "tf_efficientnet_b2")


@pytest.fixture(params=[*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def pair(request):
    """timm's or torchvision's network with drawn statistics, and ours with its weights, in eval mode."""
    theirs = copy.deepcopy(_plain_network(request.param))
    ours = cnnfast.create_model(request.param).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.fixture(autouse=True)
def seed():
    """Ratios of two errors are compared with a bound: a new draw each run would pass it now and then."""
    torch.manual_seed(0)
