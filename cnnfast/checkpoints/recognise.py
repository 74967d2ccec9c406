"""Whose keys a checkpoint has, and whether they say which network it is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from cnnfast.models.layouts import SOURCES, Layouts
from cnnfast.models.registry import model_entry

_WHY = "another network there has the same keys and shapes and other outputs"


@dataclass(frozen=True)
class Layout:
    """Of each of the model's own keys the name in checkpoints of `source`."""

    source: str
    names: dict[str, str]


def layouts(model: nn.Module) -> list[Layout]:
    """Those in which checkpoints of `model` come; a module that isn't one of our networks has its own only."""
    if not isinstance(model, Layouts):
        return [Layout("cnnfast", {key: key for key in model.state_dict()})]
    found = (Layout(source, model.checkpoint_keys(source)) for source in (model.key_source, *SOURCES))
    return list({layout.source: layout for layout in found if layout.names}.values())


def layout_of(model: nn.Module, source: str) -> Layout:
    """The layout that `source`, "timm" or "timm:tf_efficientnet_b0", means for `model`."""
    package, _, name = source.partition(":")
    known = {layout.source: layout for layout in layouts(model)}
    if package not in SOURCES:
        raise ValueError(f"source must be None or one of {', '.join(map(repr, SOURCES))}, got {source!r}")
    if package not in known:
        raise ValueError(
            f"source must be one that has the weights of {type(model).__name__}: {', '.join(map(repr, known))};"
            f" got {source!r}"
        )
    if isinstance(model, Layouts):
        if name and not model.is_called(name, package):
            raise ValueError(f"source must be {_named(model, package)} for {_title(model)}, got {source!r}")
        if not name and package != "cnnfast" and package in model.told_apart:
            raise ValueError(f"source must be {_named(model, package)} for {_title(model)}: {_WHY}")
    return known[package]


def recognise(model: nn.Module, state: Mapping[str, Tensor], mark: str | None) -> tuple[Layout, str | None]:
    """The layout of `state`: the one that `mark`, the checkpoint's own word, names, or whose names are most like its
    keys; and, where these are another network's, too, a sentence that asks for the source."""
    known = layouts(model)
    if mark is not None:
        package, _, name = mark.partition(":")
        found = next((layout for layout in known if layout.source == package), None)
        if found is None or (name and isinstance(model, Layouts) and not model.is_called(name, package)):
            raise ValueError(
                f"weights must be those of {_title(model)}, got a checkpoint marked as {mark!r}; a mark doesn't count"
                " where `source` is given"
            )
        return found, None
    best = max(known, key=lambda layout: len(state.keys() & set(layout.names.values())))
    if not isinstance(model, Layouts) or best.source not in model.told_apart:
        return best, None
    doubt = f"source must be {_named(model, best.source)}, or 'cnnfast' for weights saved from this network"
    return best, f"{doubt}, got None: {_WHY}"


def _named(model: Layouts, package: str) -> str:
    peers = model_entry(model.architecture).peers if model.architecture else {}
    name = model.architecture if package == "cnnfast" else peers.get(package, model.told_apart.get(package))
    return f"'{package}:{name}'" if package in model.told_apart or not name else f"'{package}' or '{package}:{name}'"


def _title(model: nn.Module) -> str:
    return getattr(model, "architecture", None) or type(model).__name__
