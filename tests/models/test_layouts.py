"""Weights of the packages that have our networks, into ours and back: save_weights is load_weights's inverse.

Fails if a value lands in another place (outputs differ from the package's own network), if what is written isn't what
that package reads strictly, if a round trip changes a bit, or if a failed write leaves a file or spoils the one there.
"""

import contextlib
import copy
import importlib
import stat

import pytest
import torch
from networks import draw_batch_norms, relative, without_weights
from safetensors.torch import load_file

import cnnfast
from cnnfast._peers import import_torchvision, plain_network


def other_package(name):
    """The module, where it is installed; torchvision, which some of them import, is made to load first."""
    import_torchvision()
    return pytest.importorskip(name)


def efficientnet_pytorch():
    package = other_package("efficientnet_pytorch")
    return package.EfficientNet.from_name("efficientnet-b0", image_size=75)


def efficientnet_lite_pytorch():
    package = other_package("efficientnet_lite_pytorch")
    return package.EfficientNet.from_name("efficientnet-lite0", image_size=75)


def pretrainedmodels(module, name, **others):
    def build():
        other_package("pretrainedmodels")
        network = getattr(importlib.import_module(f"pretrainedmodels.models.{module}"), name)(**others)
        network.aux_logits = False  # which inceptionv3 would compute in training, from 299 x 299
        if module == "senet":
            network.avg_pool = torch.nn.AdaptiveAvgPool2d(1)  # theirs is 7 x 7, of images of 224
        return network

    return build


def timm(name):
    return lambda: plain_network(name, "timm")


# (our network, the other's layout, what source says of it, the other)
CASES = {
    "efficientnet_pytorch": ("tf_efficientnet_b0", "efficientnet_pytorch", None, efficientnet_pytorch),
    "efficientnet_lite_pytorch": (
        "tf_efficientnet_lite0",
        "efficientnet_lite_pytorch",
        None,
        efficientnet_lite_pytorch,
    ),
    "pretrainedmodels' xception": (
        "xception",
        "pretrainedmodels",
        None,
        pretrainedmodels("xception", "xception", pretrained=None),
    ),
    "pretrainedmodels' se_resnet50": (
        "se_resnet50",
        "pretrainedmodels",
        None,
        pretrainedmodels("senet", "se_resnet50", pretrained=None),
    ),
    **{
        f"pretrainedmodels' {name}": (ours, "pretrainedmodels", None, pretrainedmodels(module, name, pretrained=None))
        for ours, module, name in (
            ("resnet18", "torchvision_models", "resnet18"),
            ("alexnet", "torchvision_models", "alexnet"),
            ("vgg11_bn", "torchvision_models", "vgg11_bn"),
            ("inception_v3", "torchvision_models", "inceptionv3"),
            ("inception_v4", "inceptionv4", "inceptionv4"),
            ("inception_resnet_v2", "inceptionresnetv2", "inceptionresnetv2"),
            ("bn_inception", "bninception", "bninception"),
        )
    },
    "timm's vgg11": ("vgg11", "timm", None, timm("vgg11")),
    "torchvision's googlenet": (
        "googlenet_bn",
        "torchvision",
        None,
        lambda: plain_network("googlenet_bn", "torchvision"),
    ),
    "timm's tf_efficientnet_b0": ("tf_efficientnet_b0", "timm", "timm:tf_efficientnet_b0", timm("tf_efficientnet_b0")),
    "timm's efficientnet_b0": ("efficientnet_b0", "timm", "timm:efficientnet_b0", timm("efficientnet_b0")),
    "timm's mobilenetv2_100": ("mobilenet_v2", "timm", None, timm("mobilenet_v2")),
    "torchvision's mobilenet_v2": (
        "mobilenet_v2",
        "torchvision",
        None,
        lambda: plain_network("mobilenet_v2", "torchvision"),
    ),
}


QUICK = ("efficientnet_pytorch", "pretrainedmodels' resnet18", "timm's tf_efficientnet_b0")
# Else 75. Theirs pool by a fixed size.
SIZES = {"alexnet": 224, "vgg11_bn": 224, "bn_inception": 224}
SIZES.update(dict.fromkeys(("inception_v3", "inception_v4", "inception_resnet_v2"), 299))


@pytest.fixture(scope="module", params=[pytest.param(c, marks=[pytest.mark.slow] * (c not in QUICK)) for c in CASES])
def case(request):
    """(our name, layout, source, their network with drawn statistics)"""
    name, layout, source, build = CASES[request.param]
    torch.manual_seed(3)
    theirs = build()
    size = SIZES.get(name, 75)
    draw_batch_norms(theirs, torch.randn(2, 3, size, size))
    return name, layout, source, theirs.eval()


def assert_same_state(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


def test_same_outputs(case):
    """Recognised, or of the layout that source says."""
    name, layout, source, theirs = case
    ours, other = (without_weights(name) for _ in range(2))
    cnnfast.load_weights(ours, theirs.state_dict(), source)
    cnnfast.load_weights(other, theirs.state_dict(), source or layout)
    assert_same_state(other.state_dict(), ours.state_dict())
    ours, theirs = ours.double().eval(), copy.deepcopy(theirs).double()
    x = torch.randn(2, 3, SIZES.get(name, 75), SIZES.get(name, 75), dtype=torch.float64)
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) <= 1e-10


def test_round_trip(case, tmp_path):
    """Strictly into the package's own network, and back without a source: the file says what it is."""
    name, layout, source, theirs = case
    options = dict(aux_logits=True) if name == "inception_v3" else {}
    ours, again = (without_weights(name, **options) for _ in range(2))
    cnnfast.load_weights(ours, theirs.state_dict(), source)
    other = copy.deepcopy(theirs)
    for suffix, read in ((".pth", torch.load), (".safetensors", load_file)):
        path = tmp_path / f"weights{suffix}"
        cnnfast.save_weights(ours, path, layout)
        for network in (other, again):
            torch.nn.init.normal_(next(network.parameters()))
        other.load_state_dict(read(path), strict=True)
        assert_same_state(other.state_dict(), theirs.state_dict())
        cnnfast.load_weights(again, path)
        assert_same_state(again.state_dict(), ours.state_dict())


@pytest.mark.parametrize("name", ["tf_efficientnet_b0", "mobilenet_v2"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_names(name, suffix, dtype, tmp_path):
    ours, again = (cnnfast.create_model(name, dtype=dtype) for _ in range(2))
    cnnfast.save_weights(ours, tmp_path / f"weights{suffix}")
    cnnfast.load_weights(again, tmp_path / f"weights{suffix}")
    state = ours.state_dict()
    for key, value in again.state_dict().items():
        assert value.dtype == state[key].dtype and torch.equal(value, state[key]), key


def test_layouts_that_a_network_lacks(tmp_path):
    network = cnnfast.create_model("efficientnet_b0")
    with pytest.raises(
        ValueError, match=r"layout must be None or one of 'timm', 'cnnfast' for EfficientNet, got 'torch"
    ):
        cnnfast.save_weights(network, tmp_path / "weights.pth", "torchvision")
    with pytest.raises(ValueError, match=r"path must end in .pth, .pt or .safetensors, got .*weights.bin"):
        cnnfast.save_weights(network, tmp_path / "weights.bin")
    with pytest.raises(FileNotFoundError):
        cnnfast.save_weights(network, tmp_path / "nowhere" / "weights.pth")
    with torch.device("meta"), pytest.raises(ValueError, match="got meta"):
        cnnfast.save_weights(cnnfast.create_model("efficientnet_b0"), tmp_path / "weights.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_stops_a_write_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "weights.pth"
    network = cnnfast.create_model("mobilenet_v1", width_mult=0.25)
    cnnfast.save_weights(network, path)
    before = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) & stat.S_IRUSR

    def half(state, name):
        with open(name, "wb") as file:
            file.write(before[:1000])
        raise error

    monkeypatch.setattr(torch, "save", half)
    with contextlib.suppress(KeyboardInterrupt, OSError):
        cnnfast.save_weights(network, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
