"""Importing timm and torchvision, with which tests and benchmarks compare, also where torchvision's wheel is a CUDA
build and torch isn't: its operators don't load there, and it fails on two of their schemas."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import torch
from torch import nn

# our network -> (the package whose network of plain layers is the same, its name there)
PLAIN_NETWORKS = {
    "efficientnet_b0": ("timm", "efficientnet_b0"),
    "mobilenet_v1": ("timm", "mobilenetv1_100"),
    "mobilenet_v2": ("torchvision", "mobilenet_v2"),
    "se_resnet50": ("timm", "legacy_seresnet50"),
    "tf_efficientnet_b0": ("timm", "tf_efficientnet_b0"),
    "tf_efficientnet_b1": ("timm", "tf_efficientnet_b1"),
    "tf_efficientnet_b2": ("timm", "tf_efficientnet_b2"),
    "tf_efficientnet_lite0": ("timm", "tf_efficientnet_lite0"),
    "xception": ("timm", "legacy_xception"),
}
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


def plain_network(name: str, **options: Any) -> nn.Module:
    """The network by which our `name` is judged, with fresh weights; `options` are its package's."""
    package, theirs = PLAIN_NETWORKS[name]
    if package == "timm":
        return import_timm().create_model(theirs, **options)
    return getattr(import_torchvision().models, theirs)(**options)
