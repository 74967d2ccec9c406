"""Our networks' weights as checkpoints of the packages that have these networks."""

from __future__ import annotations

import os

from torch import Tensor, nn

from cnnfast.checkpoints.files import write
from cnnfast.checkpoints.recognise import layouts
from cnnfast.models.layouts import Layouts
from cnnfast.models.registry import model_entry


def save_weights(model: nn.Module, path: str | os.PathLike, layout: str | None = None) -> None:
    """Writes the state of `model` as a state dict, under the names that `layout` has for it.

    load_weights reads it back, bit for bit; the file says of what network and package it is. It is written whole or not
    at all.

    Args:
        model: a network of cnnfast.create_model.
        path: .safetensors, or .pth or .pt for torch.save's form.
        layout: "timm", "torchvision", ...: those of load_weights's sources that have this network; None for its own
            names.

    Raises:
        ValueError: a suffix or a layout that there isn't, or a model on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layout = layout or "cnnfast"
    known = {one.source: one.names for one in layouts(model)}
    if layout not in known:
        wanted = ", ".join(map(repr, known))
        raise ValueError(f"layout must be None or one of {wanted} for {type(model).__name__}, got {layout!r}")
    state = rename(model, layout, known[layout])
    if any(value.is_meta for value in state.values()):
        raise ValueError("model must have its tensors on a device that holds values, got meta")
    write(path, {name: value.detach().cpu().contiguous() for name, value in state.items()}, _mark(model, layout))


def rename(model: nn.Module, source: str, names: dict[str, str]) -> dict[str, Tensor]:
    """The state of `model` under its names in `source`, and in the shapes that it has there."""
    shapes = model.checkpoint_shapes(source) if isinstance(model, Layouts) else {}
    return {names[key]: value.reshape(shapes.get(key, value.shape)) for key, value in model.state_dict().items()}


def _mark(model: nn.Module, layout: str) -> str:
    own = model.architecture if isinstance(model, Layouts) else None
    name = own if own is None or layout == "cnnfast" else model_entry(own).peers.get(layout)
    return f"{layout}:{name}" if name else layout
