"""cnnfast._peers imports timm and torchvision beside any torch, and steps in only for the one known failure.

Fails if the helper hides another error, or declares schemas where torchvision loads by itself.
"""

import sys
import types

import pytest

from cnnfast import _peers


def test_import():
    timm = _peers.import_timm()
    assert _peers.import_timm() is timm
    assert _peers.import_torchvision().models.mobilenet_v2(weights=None, num_classes=3)


@pytest.fixture
def without_torchvision(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(_peers, "_declared", [])


def test_one_that_works_is_left_alone(without_torchvision, monkeypatch):
    working = types.ModuleType("torchvision")
    monkeypatch.setitem(sys.modules, "torchvision", working)
    assert _peers.import_torchvision() is working
    assert not _peers._declared


def test_another_failure_is_not_hidden(without_torchvision, monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "torchvision":
                raise RuntimeError("something else")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(RuntimeError, match="something else"):
        _peers.import_torchvision()
    assert not _peers._declared
