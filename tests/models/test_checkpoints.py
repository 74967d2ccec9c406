"""load_weights: what it takes, what it refuses, and that a refusal leaves the network as it was.

Fails if a value lands in the wrong place, if a bad file is half-loaded, or if a mistake isn't one sentence.
"""

import argparse
import copy
from collections import OrderedDict

import pytest
import safetensors.torch
import torch
from checkpoint_cases import assert_refused, assert_state, drawn_state
from torch import nn

import cnnfast
from cnnfast.checkpoints.recognise import layouts
from cnnfast.pretrained import find_weights


def wrapped(state):
    return {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}


def averaged(state):
    """As torch.optim.swa_utils.AveragedModel and torchvision's training script have it."""
    return {"n_averaged": torch.tensor(5), **{f"module.{key}": value for key, value in state.items()}}


def stale(state):
    return {key: value + 1 for key, value in state.items()}


FORMS = {
    "mapping": lambda state: state,
    "wrapped": wrapped,
    "compiled": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "both": lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    "lightning": lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}},
    "model": lambda state: {"model": state, "optimizer": {"lr": 1}, "args": argparse.Namespace(lr=1)},
    "state_dict_ema": lambda state: {"state_dict": stale(state), "state_dict_ema": state},
    "model_ema": lambda state: {"model": stale(state), "model_ema": averaged(state)},
    "ema": lambda state: {"model": stale(state), "ema": {"module": state, "updates": 7}},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("to_file", [False, True], ids=["mapping", "file"])
def test_wrappers(lite0, tmp_path, form, to_file):
    state = drawn_state(lite0)
    weights = FORMS[form](state)
    if to_file:
        torch.save(weights, tmp_path / "weights.pth")
        weights = str(tmp_path / "weights.pth")
    cnnfast.load_weights(lite0, weights, "cnnfast")
    assert_state(lite0, state)


def test_safetensors(lite0, tmp_path):
    state = drawn_state(lite0)
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    cnnfast.load_weights(lite0, tmp_path / "weights.safetensors", "timm:tf_efficientnet_lite0")
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


def put_nan(state):
    state["_blocks.3._bn1.running_var"] = state["_blocks.3._bn1.running_var"].index_fill(
        0, torch.tensor([7]), torch.nan
    )


def put_inf(state):
    state["_conv_stem.weight"] = state["_conv_stem.weight"] / 0


def make_sparse(state):
    state["_fc.weight"] = state["_fc.weight"].to_sparse()


def make_complex(state):
    state["_fc.weight"] = state["_fc.weight"].to(torch.complex64)


def quantise(state):
    state["_fc.weight"] = torch.quantize_per_tensor(state["_fc.weight"], 0.1, 0, torch.qint8)


def several(state):
    """In two modules, and a whole block that isn't there."""
    for key in [key for key in state if key.startswith("_blocks.15.") or key in ("_bn0.weight", "_bn0.bias")]:
        del state[key]
    state["_fc.bias"] = state["_fc.bias"][:10]


@pytest.mark.parametrize(
    "damage, says",
    [
        (drop, r"1 missing \(_conv_head.weight\)"),
        (last_missing, r"1 missing \(_fc.bias\)"),
        (add, r"1 not wanted \(_extra.weight\)"),
        (misshape, r"_fc.weight \(10, 1280\), not \(1000, 1280\)"),
        (mistype, r"_fc.weight torch.int32"),
        (put_number, r"float at '_fc.bias'"),
        (put_nan, r"1 not finite in torch.float32 \(_blocks.3._bn1.running_var\)$"),
        (put_inf, r"1 not finite in torch.float32 \(_conv_stem.weight\)$"),
        (make_sparse, r"_fc.weight torch.float32"),
        (make_complex, r"_fc.weight torch.complex64"),
        (quantise, r"_fc.weight torch.qint8"),
        (
            several,
            r"17 missing \(_bn0.\{weight, bias\}, _blocks.15.\*: 15\);"
            r" 1 of another shape \(_fc.bias \(10,\), not \(1000,\)\)$",
        ),
    ],
)
def test_damaged_states_leave_the_network_as_it_was(lite0, published, damage, says):
    before = copy.deepcopy(lite0.state_dict())
    state = {key: value + 1 for key, value in published.items()}  # would be seen if it were loaded
    damage(state)
    assert_refused(lite0, state, says)
    assert_state(lite0, before)


@pytest.fixture(scope="module")
def xception():
    return cnnfast.create_model("xception")


@pytest.mark.parametrize("source", [None, "cnnfast"])
def test_weights_of_another_architecture(lite0, xception, published, source):
    for network, weights in (
        (xception, published),
        (xception, dict(lite0.state_dict())),
        (lite0, drawn_state(xception)),
    ):
        before = copy.deepcopy(network.state_dict())
        says = rf"those of this {type(network).__name__}, got {len(weights)} entries from .* missing .* not wanted"
        assert_refused(network, weights, says, source=source)
        assert_state(network, before)


def test_more_than_the_dtype_holds(published):
    network = cnnfast.create_model("tf_efficientnet_lite0").half()
    state = {**published, "_bn1.running_var": published["_bn1.running_var"] + 1e6}
    assert_refused(network, state, r"1 not finite in torch.float16 \(_bn1.running_var\)")


def test_source_that_lacks_the_network(lite0, xception, published):
    has = "source must be one that has the weights of XceptionFused: 'timm', 'cnnfast', 'pretrainedmodels'; got"
    assert_refused(xception, published, has, source="efficientnet_lite_pytorch")
    assert_refused(lite0, published, "source must be None or one of 'cnnfast', 'torchvision', 'timm'", source="keras")
    assert_refused(lite0, published, "missing", source="timm:tf_efficientnet_lite0")


@pytest.mark.parametrize(
    "name, other", [("tf_efficientnet_b0", "efficientnet_b0"), ("efficientnet_b0", "tf_efficientnet_b0")]
)
def test_two_networks_of_the_same_keys(name, other, tmp_path):
    """Their keys and shapes are equal, their outputs aren't: the source says."""
    network = cnnfast.create_model(name)
    state, before = drawn_state(network), copy.deepcopy(network.state_dict())
    doubt = f"source must be 'timm:{name}', or 'cnnfast' for weights saved from this network, got None: another network"
    named = f"source must be 'timm:{name}' for {name}"
    for source, says in ((None, doubt), ("timm", named), (f"timm:{other}", named), (f"cnnfast:{other}", "cnnfast")):
        assert_refused(network, state, says, source=source)
    torch.save(cnnfast.create_model(other).state_dict(), tmp_path / "other.pth")
    marked = f"weights must be those of {name}, got a checkpoint marked as 'cnnfast:{other}'"
    assert_refused(network, tmp_path / "other.pth", marked)
    assert_state(network, before)
    for source in (f"timm:{name}", f"timm:{name}.in1k", "cnnfast", f"cnnfast:{name}"):
        cnnfast.load_weights(network, state, source)
        assert_state(network, state)
        state = drawn_state(network)


def test_own_states_say_what_they_are(lite0, tmp_path):
    """Out of memory, from torch.save and under DistributedDataParallel's prefix."""
    fresh = cnnfast.create_model("tf_efficientnet_lite0")
    torch.save({"state_dict": nn.Sequential(OrderedDict(module=fresh)).state_dict()}, tmp_path / "weights.pth")
    for weights in (fresh.state_dict(), tmp_path / "weights.pth"):
        lite0.load_state_dict(drawn_state(lite0))
        cnnfast.load_weights(lite0, weights)
        assert_state(lite0, fresh.state_dict())


@pytest.mark.slow
@pytest.mark.sample
def test_every_two_networks_of_the_same_keys_are_told_apart():
    """All networks by their names, shapes and layouts: where two agree both must ask for the source."""
    seen = {}
    for name in cnnfast.list_models():
        with torch.device("meta"):
            network = cnnfast.create_model(name)
        for layout in layouts(network):
            shapes = network.state_dict()
            signature = frozenset((theirs, shapes[key].shape) for key, theirs in layout.names.items())
            seen.setdefault(signature, {}).setdefault(name, (network, layout.source))
    twins = [group for group in seen.values() if len(group) > 1]
    assert twins
    for group in twins:
        for name, (network, source) in group.items():
            assert source in network.told_apart, (
                f"{name} has the keys of {', '.join(group.keys() - {name})} in {source}"
            )
            assert all(not network.is_called(other, source) for other in group.keys() - {name})


def test_meta_device(published):
    with torch.device("meta"):
        network = cnnfast.create_model("tf_efficientnet_lite0")
    with pytest.raises(ValueError, match="model must have its tensors on a device that holds values, got meta"):
        cnnfast.load_weights(network, published)


def test_meta_tensors(lite0):
    says = r"conv_stem.weight torch.float32 on meta"
    assert_refused(lite0, {key: value.to("meta") for key, value in lite0.state_dict().items()}, says)


def test_mistaken_arguments(lite0):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        cnnfast.load_weights({}, lite0)
    assert_refused(lite0, 3, "got int")
    assert_refused(lite0, None, "got NoneType")
