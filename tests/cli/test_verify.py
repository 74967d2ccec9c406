"""`cnnfast verify` and cnnfast.verify: what agrees, what doesn't, and where it begins.

Fails if a channel of any layer that is 1 % off isn't found or is placed elsewhere, if networks that agree are said to
differ, if fresh statistics or a checkpoint don't reach both, or if a mistake ends in a traceback.
"""

import json

import pytest
import torch

import cnnfast
from cnnfast._peers import checkpoint_source, first_peer, import_torchvision, plain_network
from cnnfast.cli.main import main
from cnnfast.verify import LAST_MAP, LOGITS, compare, verify

SMALL = dict(size=64, inputs=2)
OPTIONS = ["--size", "64", "--inputs", "2"]


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def call(*args):
        status = main(["verify", *map(str, args)])
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.mark.parametrize(
    "name, against, dtype",
    [
        ("mobilenet_v2", "torchvision", torch.float32),
        ("mobilenet_v2", "timm", torch.float64),
        ("tf_efficientnet_lite0", None, torch.bfloat16),
        ("mobilenet_v1", "reference", torch.float32),
        pytest.param("xception", "reference", torch.float32, marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", "timm", torch.float32, marks=pytest.mark.slow),
        pytest.param("se_resnet50", "timm", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_networks_agree(name, against, dtype):
    report = verify(name, against, dtype=dtype, **SMALL)
    assert report.first_fault is None and report.layers is None
    names = [stage.name for stage in report.stages]
    assert names[-1] == LOGITS and len(names) >= 5 and all(stage.shape for stage in report.stages)
    for stage in report.stages:
        assert stage.error > 0 and stage.bound_part <= 1, stage
        assert (stage.theirs == 0) == (dtype == torch.float64)


def test_the_format_that_pytorch_runs_in(run):
    """Its default rounds otherwise, and ours agrees with it too."""
    reports = {}
    for name in ("channels_last", "contiguous"):
        status, out, _ = run("resnet18", *OPTIONS, "--memory-format", name, "--json")
        reports[name] = json.loads(out)
        assert status == 0 and reports[name]["memory_format"] == name
    ours, theirs = (
        {name: [stage[field] for stage in report["stages"]] for name, report in reports.items()}
        for field in ("shape", "theirs")
    )
    assert ours["channels_last"] == ours["contiguous"] and theirs["channels_last"] != theirs["contiguous"]


@pytest.fixture(scope="module")
def pair():
    """timm's EfficientNet-Lite0 and inputs."""
    import cnnfast.exactness

    torch.manual_seed(5)
    theirs = plain_network("tf_efficientnet_lite0").eval()
    cnnfast.exactness.draw_batch_norms(theirs, torch.randn(2, 3, 64, 64))
    return theirs, [torch.randn(2, 3, 64, 64)]


# our parameter -> the first stage that shows it, and the layers between which it is
FAULTS = {
    "conv_stem.weight": ("blocks.0", (None, "blocks.0.0")),
    "blocks.0.0.bn2.bias": ("blocks.0", (None, "blocks.0.0")),
    "blocks.2.0.conv_dw.weight": ("blocks.2", ("blocks.1.1", "blocks.2.0")),
    "blocks.3.1.conv_pw.weight": ("blocks.4", ("blocks.3.0", "blocks.3.1")),
    "blocks.4.2.bn3.weight": ("blocks.4", ("blocks.4.1", "blocks.4.2")),
    "blocks.6.0.bn1.running_var": ("blocks.6", ("blocks.5.3", "blocks.6.0")),
    "conv_head.weight": (LAST_MAP, None),
    "classifier.weight": (LOGITS, None),
}


# Slow: between the same two layers as another, or in the middle of the network as others.
REPEATED = ("blocks.0.0.bn2.bias", "blocks.3.1.conv_pw.weight", "blocks.4.2.bn3.weight")


@pytest.mark.parametrize("key", [pytest.param(k, marks=[pytest.mark.slow] * (k in REPEATED)) for k in FAULTS])
def test_one_channel_of_one_layer(pair, key):
    theirs, xs = pair
    ours = cnnfast.create_model("tf_efficientnet_lite0").eval()
    cnnfast.load_weights(ours, theirs.state_dict(), "timm:tf_efficientnet_lite0")
    with torch.no_grad():
        channel = ours.state_dict()[key][4]  # one that ReLU6 leaves alive
        channel *= 1.01
    stages, layers = compare(ours, theirs, xs, ours.checkpoint_keys("timm"))
    stage, between = FAULTS[key]
    assert next(one.name for one in stages if not one.agrees) == stage
    assert layers == between
    before = [one for one in stages if one.agrees]
    assert stages[: len(before)] == before and all(one.bound_part > 1 for one in stages[len(before) :])


DEEP = [
    ("resnet18", "bn1.weight", "relu", (None, "relu")),
    ("resnet18", "layer4.1.bn1.weight", "layer4", ("layer4.0", "layer4.1")),
    ("resnet50", "layer4.2.bn2.weight", "layer4", ("layer4.1", "layer4.2")),
    ("efficientnet_b0", "blocks.5.2.bn2.weight", "blocks.6", ("blocks.5.1", "blocks.5.2")),
    ("xception", "block11.rep.8.weight", "block12.rep.0", ("block10", "block11")),
    ("googlenet_bn", "inception5b.branch1.bn.weight", "inception5b", ("inception5a", "inception5b")),
    ("inception_v4", "features.14.branch0.bn.weight", "features.17", ("features.13", "features.14")),
]


@pytest.mark.parametrize(
    "name, key, stage, between", [pytest.param(*row, marks=[pytest.mark.slow] * (row[0] != "resnet18")) for row in DEEP]
)
def test_one_channel_deep_in_a_network(name, key, stage, between):
    """Of the largest bias, which is alive behind its ReLU."""
    from cnnfast.exactness import draw_batch_norms

    theirs, ours = plain_network(name).eval(), cnnfast.create_model(name).eval()
    draw_batch_norms(theirs, torch.randn(2, 3, 96, 96))
    cnnfast.load_weights(ours, theirs.state_dict(), checkpoint_source(name))
    with torch.no_grad():
        channel = ours.state_dict()[key][ours.state_dict()[key.replace("weight", "bias")].argmax()]
        channel *= 1.01
    names = ours.checkpoint_keys(first_peer(name))
    stages, layers = compare(ours, theirs, [torch.randn(2, 3, 96, 96) for _ in range(2)], names)
    assert next(one.name for one in stages if not one.agrees) == stage
    assert layers == between


def test_a_fault_of_another_package(run, tmp_path, monkeypatch):
    """A network of the user's own, one channel of a block off, under timm's names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    (tmp_path / "mine.py").write_text(
        "from cnnfast._peers import plain_network\n"
        "def good():\n    return plain_network('mobilenet_v2', 'timm')\n"
        "def off(module, args, y):\n    y[:, 3] *= 1.01\n"
        "def bad():\n    network = good()\n"
        "    network.blocks[2][1].bn3.register_forward_hook(off)\n    return network\n"
        "def other():\n    return plain_network('mobilenet_v1')\n"
    )
    status, out, err = run("mobilenet_v2", "--against", "mine:good", *OPTIONS)
    assert (status, err) == (0, "") and "all 7 agree" in out
    status, out, _ = run("mobilenet_v2", "--against", "mine:bad", *OPTIONS, "--json")
    report = json.loads(out)
    assert status == 1 and not report["agree"] and report["first_stage"] == "features.6"
    assert report["layers"] == ["features.4", "features.5"]
    status, out, _ = run("mobilenet_v2", "--against", "mine:bad", *OPTIONS)
    assert status == 1 and max(map(len, out.splitlines())) <= 80
    assert "the two disagree, first after features.6" in out
    assert "their layers agree up to features.4, and no longer after features.5" in out
    for factory, says in (("other", "must have the weights of mobilenet_v2, got 'mine:other'"), ("no", "has no attri")):
        status, out, err = run("mobilenet_v2", "--against", f"mine:{factory}", *OPTIONS)
        assert (status, out) == (2, "") and says in err


def test_weights_reach_both(run, tmp_path):
    """Of a checkpoint with a channel that a fresh network doesn't have."""
    network = cnnfast.create_model("mobilenet_v2")
    with torch.no_grad():
        network.classifier[1].bias[7] = 1000
    cnnfast.save_weights(network, tmp_path / "weights.safetensors", "timm")
    report = verify("mobilenet_v2", "torchvision", tmp_path / "weights.safetensors", **SMALL)
    assert report.first_fault is None and report.weights.endswith("weights.safetensors")
    status, out, _ = run("mobilenet_v2", "--weights", tmp_path / "weights.safetensors", *OPTIONS)
    assert status == 0 and "all 6 agree" in out
    assert verify("mobilenet_v2", "torchvision", **SMALL).stages != report.stages


def test_weights_of_other_classes(run, tmp_path):
    cnnfast.save_weights(cnnfast.create_model("mobilenet_v2", num_classes=7), tmp_path / "mine.pth")
    options = ["mobilenet_v2", "--weights", tmp_path / "mine.pth", *OPTIONS]
    status, _, err = run(*options)
    assert status == 2 and "2 of another shape" in err
    for against in ("torchvision", "timm", "reference"):
        status, out, _ = run(*options, "--num-classes", 7, "--against", against, "--json")
        report = json.loads(out)
        assert status == 0 and report["agree"] and report["stages"][-1]["shape"] == [7]


@pytest.mark.parametrize(
    "args, says",
    [
        (["nothing"], "name must be one of"),
        (["xception", "--against", "torchvision"], "against must be one of timm, reference, module:factory"),
        (["xception", "--against", "no_such_module:f"], "No module named 'no_such_module'"),
        (["mobilenet_v1", "--weights", "nowhere.pth"], "nowhere.pth"),
        (["xception", "--size", "3"], "size must be at least 7 for xception, got 3"),
        (["mobilenet_v2", "--dtype", "float16", "--weights", "huge.pth"], "one that holds the network's outputs"),
    ],
)
def test_mistakes(run, tmp_path, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    if "huge.pth" in args:
        network = cnnfast.create_model("mobilenet_v2")
        torch.nn.init.constant_(network.features[18][1].bias, 3.0)
        torch.nn.init.constant_(network.classifier[1].weight, 60000.0)
        cnnfast.save_weights(network, "huge.pth")
    status, out, err = run(*args, *([] if "--size" in args else OPTIONS))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("cnnfast verify: error") and says in err


def test_torchvision_is_the_default_where_its_keys_are_ours():
    import_torchvision()
    assert verify("mobilenet_v2", **SMALL).against == "torchvision:mobilenet_v2"
