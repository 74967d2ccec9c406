"""Importing timm and torchvision, with which tests and benchmarks compare, also where torchvision's wheel is a CUDA
build and torch isn't: its operators don't load there, and it fails on two of their schemas."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import torch
from torch import nn

from cnnfast.models.registry import create_model, list_models, model_entry

_declared: list[torch.library.Library] = []  # a schema lives as long as its Library


def import_torchvision() -> ModuleType:
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error) or _declared:
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # half-imported
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define(
        "qnms(Tensor dets, Tensor scores, float iou_threshold, float dets_scale, int dets_zero_point) -> Tensor"
    )
    _declared.append(library)
    return importlib.import_module("torchvision")


def import_timm() -> ModuleType:
    import_torchvision()
    return importlib.import_module("timm")


def plain_networks() -> list[str]:
    """Our networks that timm or torchvision has too."""
    return [name for name in list_models() if model_entry(name).peers]


def plain_network(name: str, package: str | None = None, **options: Any) -> nn.Module:
    """The network by which our `name` is judged, with fresh weights: that of `package`, "timm" or "torchvision", or the
    one whose state-dict keys ours has, or the only one. `options` are the package's."""
    package = package or first_peer(name)
    theirs = model_entry(name).peers[package or ""]
    if package == "timm":
        return import_timm().create_model(theirs, **options)
    if "inception" in theirs or "googlenet" in theirs:
        options = dict(init_weights=True, aux_logits=False) | options
    return getattr(import_torchvision().models, theirs)(**options)


def first_peer(name: str) -> str | None:
    """The package whose network is ours's first peer: whose state-dict keys ours has, or the only one."""
    peers, source = model_entry(name).peers, key_source(name)
    return source if source in peers else next(iter(peers), None)


def checkpoint_source(name: str, package: str | None = None) -> str | None:
    """load_weights's source for the state dict of plain_network; None if there is no such network."""
    package = package or first_peer(name)
    return f"{package}:{model_entry(name).peers[package]}" if package else None


def key_source(name: str) -> str:
    """The package whose state-dict keys our `name` has."""
    with torch.device("meta"):
        return getattr(create_model(name), "key_source", "cnnfast")
