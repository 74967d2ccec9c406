"""Other people's checkpoints into our networks: recognised by their keys, checked whole, then loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnnfast.models.efficientnet import EfficientNet
from cnnfast.models.mobilenet import MobileNetV2
from cnnfast.nn import SeparableConv2d

_WRAPPERS = ("state_dict", "model")  # keys under which training scripts put the state dict
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_SHOWN = 3  # examples of each kind of mistake in an error


def load_weights(model: nn.Module, weights: Mapping[str, Any] | str | os.PathLike, source: str | None = None) -> None:
    """Loads a checkpoint strictly: every parameter and buffer of `model` gets its value, or nothing does.

    Args:
        model: a network of cnnfast.create_model.
        weights: a state dict, or a file of one: .safetensors, or what torch.save wrote (read with weights_only=True: no
            code runs). One wrapped as {"state_dict": ...} or {"model": ...}, or with keys that begin with "module.", is
            unwrapped.
        source: whose keys they are: "timm", "torchvision" (of mobilenet_v2), "efficientnet_lite_pytorch"; None to find
            out. This package's own are timm's, of mobilenet_v2 torchvision's.

    Raises:
        ValueError: a file that isn't a checkpoint, keys that are missing or not wanted, or shapes that differ; the
            model is then as it was.
        FileNotFoundError: no such file.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if source is not None and source not in _LAYOUTS:
        raise ValueError(f"source must be None or one of {', '.join(map(repr, _LAYOUTS))}, got {source!r}")
    state = _unwrap(_read(weights) if isinstance(weights, (str, os.PathLike)) else weights)
    own = model.state_dict()
    layouts = [names for name, layout in _LAYOUTS.items() if source in (None, name) and (names := layout(model, own))]
    if not layouts:
        raise ValueError(f"source must be one that has the weights of {type(model).__name__}, got {source!r}")
    theirs = max(layouts, key=lambda names: len(state.keys() & set(names.values())))
    _check(model, own, theirs, state)
    model.load_state_dict({key: state.get(name, own[key]) for key, name in theirs.items()})


def _read(path: str | os.PathLike) -> Any:
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ImportError):
        raise
    except Exception as error:  # whatever a truncated or foreign file makes the readers raise
        reason = str(error).split("\n")[0].rstrip(". ") or type(error).__name__
        raise ValueError(
            f"weights must be a file of tensors, whole, by torch.save or safetensors, got {path}: {reason}"
        ) from error


def _unwrap(state: Any) -> dict[str, Tensor]:
    for name in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"weights must be a state dict or the file of one, got {_describe(state)}")
    odd = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"weights must map names to tensors, got {_describe(state[odd[0]])} at {odd[0]!r}")
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items()}
    return dict(state)


def _check(model: nn.Module, own: Mapping[str, Tensor], theirs: dict[str, str], state: dict[str, Tensor]) -> None:
    """Raises unless each of the model's tensors, whose name in the checkpoint is theirs[key], can be loaded."""
    # Counters that PyTorch before 0.4.1 didn't have, and that inference doesn't read.
    missing = [n for key, n in theirs.items() if n not in state and not key.endswith("num_batches_tracked")]
    unwanted = sorted(state.keys() - set(theirs.values()))
    pairs = [(name, state[name], own[key]) for key, name in theirs.items() if name in state]
    misshapen = [f"{name} {tuple(t.shape)}, not {tuple(o.shape)}" for name, t, o in pairs if t.shape != o.shape]
    mistyped = [
        f"{name} {t.dtype}"
        for name, t, o in pairs
        if t.is_floating_point() != o.is_floating_point() or t.is_meta or t.layout != torch.strided
    ]
    groups = {"missing": missing, "not wanted": unwanted, "of another shape": misshapen, "not dense floats": mistyped}
    faults = [f"{len(found)} {fault} ({_examples(found)})" for fault, found in groups.items() if found]
    if faults:
        raise ValueError(
            f"weights must be those of this {type(model).__name__}, got {_describe(state)}: {'; '.join(faults)}"
        )


def _describe(state: Any) -> str:
    if not isinstance(state, Mapping):
        return type(state).__name__
    keys = [str(key) for key in state]
    return f"{len(keys)} entries from {keys[0]} to {keys[-1]}" if keys else "nothing"


def _examples(found: list[str]) -> str:
    return ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")


# A layout gives, for a model, the checkpoint's name of each of the model's own keys; empty if it has no such model.


def _torchvision(model: nn.Module, own: Mapping[str, Tensor]) -> dict[str, str]:
    return {key: key for key in own} if isinstance(model, MobileNetV2) else {}


def _timm(model: nn.Module, own: Mapping[str, Tensor]) -> dict[str, str]:
    """Our own keys, but for MobileNetV2, whose blocks timm counts stage by stage."""
    if not isinstance(model, MobileNetV2):
        return {key: key for key in own}
    last = sum(model.depths) + 1
    modules = {"features.0.0": "conv_stem", "features.0.1": "bn1", "classifier.1": "classifier"}
    modules.update({f"features.{last}.0": "conv_head", f"features.{last}.1": "bn2"})
    separable = {"conv.0.0": "conv_dw", "conv.0.1": "bn1", "conv.1": "conv_pw", "conv.2": "bn2"}
    inverted = {"conv.0.0": "conv_pw", "conv.0.1": "bn1", "conv.1.0": "conv_dw", "conv.1.1": "bn2"}
    inverted.update({"conv.2": "conv_pwl", "conv.3": "bn3"})
    places = [f"blocks.{s}.{b}" for s, blocks in enumerate(model.depths) for b in range(blocks)]
    for n, place in enumerate(places, 1):
        names = inverted if f"features.{n}.conv.3.weight" in own else separable
        modules.update({f"features.{n}.{ours}": f"{place}.{theirs}" for ours, theirs in names.items()})
    return _renamed(own, modules)


def _efficientnet_lite_pytorch(model: nn.Module, own: Mapping[str, Tensor]) -> dict[str, str]:
    """Blocks are counted through; batch normalisations are numbered from 0, from 1 where nothing is expanded."""
    if not isinstance(model, EfficientNet):
        return {}
    modules = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    separable = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    inverted = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    inverted.update(conv_pwl="_project_conv", bn3="_bn2")
    stages = [list(stage.children()) for stage in model.blocks]
    blocks = [(f"blocks.{s}.{b}", block) for s, stage in enumerate(stages) for b, block in enumerate(stage)]
    for n, (prefix, block) in enumerate(blocks):
        names = separable if isinstance(block, SeparableConv2d) else inverted
        modules.update({f"{prefix}.{ours}": f"_blocks.{n}.{theirs}" for ours, theirs in names.items()})
    return _renamed(own, modules)


def _renamed(own: Mapping[str, Tensor], modules: Mapping[str, str]) -> dict[str, str]:
    """Names of the keys in `own` once each module has the name that `modules` gives it."""
    parts = {key: key.rpartition(".") for key in own}
    return {key: f"{modules.get(module, module)}.{name}" for key, (module, _, name) in parts.items()}


_LAYOUTS: dict[str, Callable[[nn.Module, Mapping[str, Tensor]], dict[str, str]]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "efficientnet_lite_pytorch": _efficientnet_lite_pytorch,
}
