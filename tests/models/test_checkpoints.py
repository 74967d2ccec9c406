"""load_weights: what it takes, what it refuses, and that a refusal leaves the network as it was.

Fails if a value lands in the wrong place, if a bad file is half-loaded, or if a mistake isn't one sentence.
"""

import copy
import re

import pytest
import torch
from torch import nn

import cnnfast
from cnnfast.pretrained import find_weights


@pytest.fixture(scope="module")
def lite0():
    return cnnfast.create_model("tf_efficientnet_lite0")


@pytest.fixture(scope="module")
def published():
    """The real ImageNet weights, with the keys of efficientnet_lite_pytorch."""
    return torch.load(find_weights("tf_efficientnet_lite0"), weights_only=True)


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


def wrapped(state):
    return {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}


@pytest.mark.parametrize("form", ["mapping", "wrapped", "pth", "wrapped_pth", "safetensors", "compiled"])
def test_own_keys(lite0, tmp_path, form):
    state = drawn_state(lite0)
    weights = state
    if form == "wrapped":
        weights = wrapped(state)
    elif form == "compiled":
        weights = {f"_orig_mod.{key}": value for key, value in state.items()}
    elif form == "safetensors":
        from safetensors.torch import save_file

        weights = tmp_path / "weights.safetensors"
        save_file(state, weights)
    elif form.endswith("pth"):
        weights = str(tmp_path / "weights.pth")
        torch.save(wrapped(state) if form == "wrapped_pth" else state, weights)
    cnnfast.load_weights(lite0, weights)
    assert_state(lite0, state)


def test_published_keys(lite0, published):
    """One by one: the same order in both packages, stem to classifier."""
    cnnfast.load_weights(lite0, find_weights("tf_efficientnet_lite0"))
    assert_state(lite0, dict(zip(lite0.state_dict(), published.values(), strict=True)))
    assert torch.equal(lite0.blocks[6][0].conv_pwl.weight, published["_blocks.15._project_conv.weight"])
    assert torch.equal(lite0.bn2.running_var, published["_bn1.running_var"])


def test_values_are_cast(lite0, published):
    network = copy.deepcopy(lite0).bfloat16()
    cnnfast.load_weights(network, published, source="efficientnet_lite_pytorch")
    assert torch.equal(network.conv_head.weight, published["_conv_head.weight"].bfloat16())


def test_old_checkpoints_without_counters(lite0, published):
    state = {key: value for key, value in published.items() if not key.endswith("num_batches_tracked")}
    cnnfast.load_weights(lite0, state)
    assert torch.equal(lite0.conv_head.weight, published["_conv_head.weight"])


def drop(state):
    del state["_conv_head.weight"]


def add(state):
    state["_extra.weight"] = torch.zeros(3)


def misshape(state):
    state["_fc.weight"] = state["_fc.weight"][:10]


def mistype(state):
    state["_fc.weight"] = state["_fc.weight"].int()


def last_missing(state):
    """Everything before it could be loaded."""
    del state["_fc.bias"]


def put_number(state):
    state["_fc.bias"] = 3.0


@pytest.mark.parametrize(
    "damage, says",
    [
        (drop, r"1 missing \(_conv_head.weight\)"),
        (last_missing, r"1 missing \(_fc.bias\)"),
        (add, r"1 not wanted \(_extra.weight\)"),
        (misshape, r"_fc.weight \(10, 1280\), not \(1000, 1280\)"),
        (mistype, r"_fc.weight torch.int32"),
        (put_number, r"float at '_fc.bias'"),
    ],
)
def test_damaged_states_leave_the_network_as_it_was(lite0, published, damage, says):
    before = copy.deepcopy(lite0.state_dict())
    state = dict(published)
    damage(state)
    for value in state.values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value = value + 1  # what would be seen if it were loaded
    assert_refused(lite0, state, says)
    assert_state(lite0, before)


def assert_refused(network, weights, says, **options):
    with pytest.raises(ValueError, match=says) as error:
        cnnfast.load_weights(network, weights, **options)
    message = str(error.value)
    assert re.match(r"(weights|source) must", message) and "\n" not in message and len(message) < 600


@pytest.fixture(scope="module")
def xception():
    return cnnfast.create_model("xception")


@pytest.mark.parametrize("source", [None, "timm"])
def test_weights_of_another_architecture(lite0, xception, published, source):
    for network, weights in ((xception, published), (xception, lite0.state_dict()), (lite0, xception.state_dict())):
        before = copy.deepcopy(network.state_dict())
        says = rf"those of this {type(network).__name__}, got {len(weights)} entries from .* missing .* not wanted"
        assert_refused(network, weights, says, source=source)
        assert_state(network, before)


def test_other_number_of_classes(published):
    network = cnnfast.create_model("tf_efficientnet_lite0", num_classes=10)
    assert_refused(network, published, r"2 of another shape \(_fc.weight \(1000, 1280\), not \(10, 1280\)")


def test_source_that_lacks_the_network(lite0, xception, published):
    assert_refused(xception, published, "source must be one that has", source="efficientnet_lite_pytorch")
    assert_refused(lite0, published, "source must be None or one of 'torchvision', 'timm'", source="keras")
    assert_refused(lite0, published, "missing", source="timm")


def truncated(path):
    data = find_weights("tf_efficientnet_lite0").read_bytes()
    path.write_bytes(data[: len(data) // 2])


class Malicious:
    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


FILES = {
    "truncated.pth": truncated,
    "empty.pth": lambda path: path.write_bytes(b""),
    "text.pth": lambda path: path.write_text("not a checkpoint\n" * 100),
    "code.pth": lambda path: torch.save({"state_dict": Malicious()}, path),
    "number.pth": lambda path: torch.save(3, path),
    "nothing.pth": lambda path: torch.save({}, path),
    "tensor.pth": lambda path: torch.save(torch.zeros(3), path),
    "module.pth": lambda path: torch.save(nn.Linear(2, 2), path),
    "foreign.pth": lambda path: torch.save({"optimizer": {"lr": 1}, "epoch": 3}, path),
    "text.safetensors": lambda path: path.write_text("not a checkpoint\n" * 100),
    "pickled.safetensors": lambda path: torch.save({"a": torch.zeros(3)}, path),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_checkpoints(lite0, tmp_path, name, capfd):
    FILES[name](tmp_path / name)
    before = copy.deepcopy(lite0.state_dict())
    assert_refused(lite0, tmp_path / name, "got")
    assert_state(lite0, before)
    assert "ran" not in capfd.readouterr().out


def test_no_such_file(lite0, tmp_path):
    with pytest.raises(FileNotFoundError):
        cnnfast.load_weights(lite0, tmp_path / "nothing.pth")
    with pytest.raises(FileNotFoundError):
        cnnfast.load_weights(lite0, tmp_path / "nothing.safetensors")


def test_mistaken_arguments(lite0):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        cnnfast.load_weights({}, lite0)
    assert_refused(lite0, 3, "got int")
    assert_refused(lite0, None, "got NoneType")
