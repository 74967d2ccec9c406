"""Checkpoints of every network of every package that load_weights knows, into ours and back.

Fails if a package's own keys and shapes aren't what we think its checkpoints have, if a value lands elsewhere or comes
back other than it was, if a layout isn't recognised and no source is asked for, or if `cnnfast list` names a package
that hasn't the network or leaves one out.
"""

import importlib

import pytest
import torch
from networks import without_weights

import cnnfast
from cnnfast._peers import import_torchvision, plain_network
from cnnfast.checkpoints.recognise import layout_of
from cnnfast.checkpoints.save import rename
from cnnfast.models.figures import table
from cnnfast.models.layouts import SOURCES
from cnnfast.models.registry import model_entry

# Ours -> its name there, where that is another one.
PRETRAINEDMODELS = {
    "bn_inception": "bninception",
    "inception_v3": "inceptionv3",
    "inception_v4": "inceptionv4",
    "inception_resnet_v2": "inceptionresnetv2",
}
WITH_AUXILIARY = {"googlenet_bn", "inception_v3"}  # as published
QUICK = {
    ("resnet18", "torchvision"),
    ("mobilenet_v2", "timm"),
    ("tf_efficientnet_b0", "efficientnet_pytorch"),
    ("tf_efficientnet_lite0", "efficientnet_lite_pytorch"),
    ("bn_inception", "pretrainedmodels"),
}


def packaged(source):
    """The module, where it is installed; torchvision, which some of them import, is made to load first."""
    import_torchvision()
    return pytest.importorskip(source)


def theirs(name, source):
    """The package's own network, on meta."""
    with torch.device("meta"):
        if source in ("timm", "torchvision"):
            aux = dict(aux_logits=True) if name in WITH_AUXILIARY and source == "torchvision" else {}
            return plain_network(name, source, **aux)
        package = packaged(source)
        if source == "pretrainedmodels":
            options = dict(num_classes=1000) if name in PRETRAINEDMODELS and name != "bn_inception" else {}
            return getattr(package, PRETRAINEDMODELS.get(name, name))(pretrained=None, **options)
        return package.EfficientNet.from_name("efficientnet-" + name.rpartition("_")[2])


CASES = [(name, source) for name in table() for source in table()[name]["checkpoints"]]


@pytest.mark.parametrize(
    "name, source", [pytest.param(*case, marks=[pytest.mark.slow] * (case not in QUICK)) for case in CASES]
)
def test_there_and_back(name, source):
    like = theirs(name, source).state_dict()
    options = dict(aux_logits=True) if name in WITH_AUXILIARY and source in ("torchvision", "pretrainedmodels") else {}
    ours = without_weights(name, **options)
    state = {
        key: torch.rand(value.shape) if value.is_floating_point() else torch.full(value.shape, 7)
        for key, value in like.items()
    }
    if source in ours.told_apart:
        first = next(iter(ours.state_dict().values())).fill_(0.5)
        with pytest.raises(ValueError, match=rf"^source must be '{source}:"):
            cnnfast.load_weights(ours, state)
        assert (first == 0.5).all()
        said = f"{source}:{model_entry(name).peers[source]}"
        cnnfast.load_weights(ours, state, said)
    else:
        said = source
        cnnfast.load_weights(ours, state)
    back = rename(ours, source, layout_of(ours, said).names)
    assert back.keys() == state.keys()
    for key, value in back.items():
        assert torch.equal(value, state[key]), key


@pytest.mark.slow
def test_list_names_the_packages_that_have_it():
    package = packaged("pretrainedmodels")
    named = {PRETRAINEDMODELS.get(name, name) for name, source in CASES if source == "pretrainedmodels"}
    ours = {PRETRAINEDMODELS.get(name, name) for name in table()}
    assert named == {*package.model_names} & ours
    packaged("efficientnet_pytorch")
    valid = importlib.import_module("efficientnet_pytorch.model").VALID_MODELS
    named = {f"efficientnet-{name.rpartition('_')[2]}" for name, source in CASES if source == "efficientnet_pytorch"}
    assert named == {*valid}
    lite = {name for name, source in CASES if source == "efficientnet_lite_pytorch"}
    assert lite == {f"tf_efficientnet_lite{n}" for n in range(5)}
    assert {source for _, source in CASES} == {*SOURCES} - {"cnnfast"}
    for name, source in CASES:
        if source in ("timm", "torchvision"):
            assert source in model_entry(name).peers
