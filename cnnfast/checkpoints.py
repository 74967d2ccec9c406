"""Other people's checkpoints into our networks: recognised by their keys, checked whole, then loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnnfast.models.network import Network

_WRAPPERS = ("state_dict", "model")  # keys under which training scripts put the state dict
_SOURCES = ("torchvision", "timm", "efficientnet_lite_pytorch", "pretrainedmodels", "cnnfast")
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_SHOWN = 3  # examples of each kind of mistake in an error


def load_weights(model: nn.Module, weights: Mapping[str, Any] | str | os.PathLike, source: str | None = None) -> None:
    """Loads a checkpoint strictly: every parameter and buffer of `model` gets its value, or nothing does.

    Args:
        model: a network of cnnfast.create_model.
        weights: a state dict, or a file of one: .safetensors, or what torch.save wrote (read with weights_only=True: no
            code runs). One wrapped as {"state_dict": ...} or {"model": ...}, or with keys that begin with "module.", is
            unwrapped. A linear layer's weights may come as those of a convolution over all it sees, and the other way
            round.
        source: whose keys they are: "timm", "torchvision", "efficientnet_lite_pytorch", "pretrainedmodels" (of
            bn_inception) or "cnnfast"; None to find out. This package's own are timm's or torchvision's where they have
            the network, as its `key_source` says, and else "cnnfast".

    Raises:
        ValueError: a file that isn't a checkpoint, keys that are missing or not wanted, or shapes that differ; the
            model is then as it was.
        FileNotFoundError: no such file.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if source is not None and source not in _SOURCES:
        raise ValueError(f"source must be None or one of {', '.join(map(repr, _SOURCES))}, got {source!r}")
    state = _unwrap(_read(weights) if isinstance(weights, (str, os.PathLike)) else weights)
    own = model.state_dict()
    layouts = [names for name in _SOURCES if source in (None, name) and (names := _keys(model, name))]
    if not layouts:
        raise ValueError(f"source must be one that has the weights of {type(model).__name__}, got {source!r}")
    theirs = max(layouts, key=lambda names: len(state.keys() & set(names.values())))
    _check(model, own, theirs, state)
    model.load_state_dict({key: state.get(name, own[key]).reshape(own[key].shape) for key, name in theirs.items()})


def _keys(model: nn.Module, source: str) -> dict[str, str]:
    """Of each of the model's own keys the name in checkpoints of `source`; a module that isn't one of our networks has
    its own only."""
    return model.checkpoint_keys(source) if isinstance(model, Network) else {key: key for key in model.state_dict()}


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
    misshapen = [
        f"{name} {tuple(t.shape)}, not {tuple(o.shape)}" for name, t, o in pairs if not same_numbers(t.shape, o.shape)
    ]
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


def same_numbers(shape: Sequence[int], own: Sequence[int]) -> bool:
    """Whether weights of `shape` are those of `own`: of that shape, or of a linear layer (O, I * h * w) where the other
    is a convolution (O, I, h, w) of the same numbers in the same order."""
    linear, conv = sorted((tuple(shape), tuple(own)), key=len)
    return linear == conv or ((len(linear), len(conv)) == (2, 4) and linear == (conv[0], math.prod(conv[1:])))


def _describe(state: Any) -> str:
    if not isinstance(state, Mapping):
        return type(state).__name__
    keys = [str(key) for key in state]
    return f"{len(keys)} entries from {keys[0]} to {keys[-1]}" if keys else "nothing"


def _examples(found: list[str]) -> str:
    return ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
