"""--import: networks that a user registers, in every command that takes a name.

Fails if such a network isn't found, if a module or a network that can't be made ends in a traceback, or if what isn't a
cnnfast Network can't be compared.
"""

import itertools
import json
import sys

import pytest

import cnnfast
from cnnfast.cli.main import main
from cnnfast.imports import import_module
from cnnfast.models import registry

_MODULE = """
import torch
from torch import nn
import cnnfast
from cnnfast.models import register_model

@register_model("my_plain", input_size=(3, 64, 64), num_classes=10, year=2026)
class Plain(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Linear(8, num_classes)
    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))

@register_model("my_mobile", input_size=(3, 64, 64), num_classes=10)
def my_mobile(**options):
    return cnnfast.create_model("mobilenet_v1", **(dict(num_classes=10, width_mult=0.25) | options))

@register_model("my_broken")
def my_broken(**options):
    raise RuntimeError("first line\\nsecond")

@register_model("my_nothing")
def my_nothing(**options):
    pass

def off():
    network = Plain()
    network.register_forward_hook(lambda module, args, y: y * 1.01)
    return network

def raises():
    raise KeyError("no such thing")
"""
_names = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of a name of its own into the current folder; what it registers is forgotten after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    monkeypatch.setenv("COLUMNS", "80")
    written = []

    def write(text=_MODULE):
        written.append(f"a_users_module_{next(_names)}")
        (tmp_path / f"{written[-1]}.py").write_text(text)
        return written[-1]

    yield write
    for name in written:
        sys.modules.pop(name, None)


@pytest.fixture
def run(capsys):
    def call(*args):
        status = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_list(module, run):
    assert "no network is called my_*" in run("list", "my_*")[2]
    status, out, err = run("list", "my_[pm]*", "--import", module(), "--json")
    assert (status, err) == (0, "")
    assert [(row["name"], row["parameters"], row["year"]) for row in json.loads(out)] == [
        ("my_mobile", 215642, None),
        ("my_plain", 330, 2026),
    ]


def test_summary(module, run):
    status, out, _ = run("summary", "my_mobile", "--import", module())
    assert status == 0 and out.startswith("my_mobile, input 1×3×64×64, float32")


def test_verify(module, run):
    """Networks of ours stage by stage, others by their logits."""
    name = module()
    options = ["--import", name, "--inputs", "2"]
    status, out, err = run("verify", "my_mobile", *options)
    assert (status, err) == (0, "") and "all 7 agree" in out and "against reference" in out
    status, out, _ = run("verify", "my_plain", *options)
    assert status == 0 and "all 1 agree" in out
    status, out, _ = run("verify", "my_plain", *options, "--against", f"{name}:off")
    assert status == 1 and "the two disagree, first after logits" in out
    for factory, says in (("raises", "KeyError: 'no such thing'"), ("nobody", "has no attribute 'nobody'")):
        status, out, err = run("verify", "my_plain", *options, "--against", f"{name}:{factory}")
        assert (status, out, err.count("\n")) == (2, "", 1) and says in err


def test_classify_and_evaluate(module, run, tmp_path):
    image = pytest.importorskip("PIL.Image")
    name = module()
    import_module(name)
    cnnfast.save_weights(cnnfast.create_model("my_plain"), tmp_path / "plain.safetensors")
    for label in range(10):
        (tmp_path / f"images/{label}").mkdir(parents=True)
        image.new("RGB", (70, 80), (9 * label, 0, 0)).save(tmp_path / f"images/{label}/x.png")
    options = ["--import", name, "--model", "my_plain", "--weights", "plain.safetensors"]
    status, out, err = run("evaluate", *options, "--data", "images", "--json", "result.json")
    assert (status, err) == (0, "") and json.loads((tmp_path / "result.json").read_text())["images"] == 10
    status, out, _ = run("classify", *options, "images", "--json")
    assert status == 0 and len(json.loads(out)["images"]) == 10


@pytest.mark.parametrize(
    "text, says",
    [
        (None, "ModuleNotFoundError: No module named 'nowhere'"),
        ("import no_such_dependency", "ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise ValueError('one\\ntwo')", "ValueError: one"),
        (
            "from cnnfast.models import register_model\nregister_model('resnet50')(lambda: None)",
            "ValueError: name must be new, got 'resnet50'",
        ),
    ],
)
@pytest.mark.parametrize("command", [["list"], ["verify", "nin"], ["summary", "nin"], ["evaluate", "--data", "."]])
def test_modules_that_cant_be_imported(module, run, text, says, command):
    name = "nowhere" if text is None else module(text)
    status, out, err = run(*command, "--import", name)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"cnnfast {command[0]}: error: --import '{name}' must be a module that can be imported") and (
        says in err
    )


@pytest.mark.parametrize("name, says", [("my_broken", "first line"), ("my_nothing", "must be of a factory that makes")])
def test_networks_that_cant_be_made(module, run, name, says):
    imported = module()
    for command in (["list", name], ["summary", name], ["verify", name]):
        status, out, err = run(*command, "--import", imported)
        assert (status, out, err.count("\n")) == (2, "", 1), command
        assert says in err
