"""States that load_weights is given, and what it is held to."""

import re

import pytest
import torch

import cnnfast


def drawn_state(network):
    """Values that no initialisation gives, of every key."""
    return {
        key: torch.randn_like(value) if value.is_floating_point() else torch.full_like(value, 5)
        for key, value in network.state_dict().items()
    }


def assert_state(network, expected):
    state = network.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


def assert_refused(network, weights, says, **options):
    with pytest.raises(ValueError, match=says) as error:
        cnnfast.load_weights(network, weights, **options)
    message = str(error.value)
    assert re.match(r"(weights|source) must", message) and "\n" not in message and len(message) < 1500
