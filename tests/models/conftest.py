import copy
import functools

import pytest
import torch
from networks import draw_batch_norms
from numerics import nan_outputs

import cnnfast
from cnnfast._peers import import_timm

__all__ = ["nan_outputs"]

TIMM_NAMES = {"tf_efficientnet_lite0": "tf_efficientnet_lite0", "xception": "legacy_xception"}


@functools.cache
def _timm_network(name):
    torch.manual_seed(7)
    network = import_timm().create_model(TIMM_NAMES[name])
    draw_batch_norms(network, torch.randn(4, 3, 75, 75))
    return network.eval()


@pytest.fixture(params=TIMM_NAMES)
def pair(request):
    """timm's network with drawn statistics, and ours with its weights, in eval mode."""
    theirs = copy.deepcopy(_timm_network(request.param))
    ours = cnnfast.create_model(request.param).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.fixture(autouse=True)
def seed():
    """Ratios of two errors are compared with a bound: a new draw each run would pass it now and then."""
    torch.manual_seed(0)
