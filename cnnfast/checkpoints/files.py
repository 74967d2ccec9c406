"""State dicts in files, and in what training scripts wrap them in."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnnfast.files import whole_file
from cnnfast.models.layouts import MARK

# Where training scripts put the state dict; moving averages first, which are what is evaluated (as in timm).
_WRAPPERS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model", "module")
# Of DistributedDataParallel and torch.optim.swa_utils.AveragedModel, torch.compile, Lightning.
_PREFIXES = ("module.", "_orig_mod.", "model.")
_COUNTERS = ("n_averaged",)  # what AveragedModel puts beside the module
_SUFFIXES = (".pth", ".pt")


def read(path: str | os.PathLike) -> Any:
    """What is in the file: a mapping, if it is a checkpoint.

    Raises:
        ValueError: a file that can't be read as tensors without running code.
        OSError: it isn't there, or may not be read.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"weights must be a file, got the folder {path}")
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)
    except (OSError, ImportError):
        raise
    except Exception as error:  # whatever a truncated or foreign file makes the readers raise
        raise ValueError(
            f"weights must be a file of tensors, whole, by torch.save or safetensors, got {path}: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """One phrase; torch's own goes on for lines and advises to run the code in the file."""
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it wants {found[1]}, and the code of a checkpoint isn't run"
    if isinstance(error, pickle.UnpicklingError):
        return "it is no pickle of tensors"
    return str(error).split("\n")[0].split(". ")[0].rstrip(". ") or "it is empty or cut off"


def _read_safetensors(path: Path) -> OrderedDict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        state = OrderedDict((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118 (no mapping)
        _mark(state, (file.metadata() or {}).get(MARK))
    return state


def _read_pickled(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise ValueError("it is compressed, as torch.save's files aren't: what comes out may be of any size")
    # timm's and torchvision's training scripts keep their arguments beside the weights
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of foreign pickles, which end in an error
        return torch.load(path, map_location="cpu", weights_only=True)


def write(path: str | os.PathLike, state: Mapping[str, Tensor], source: str) -> None:
    """Writes `state` by the suffix of `path`, marked as being of `source`; the file is there whole or not at all."""
    path = Path(path)
    save: Callable[[str], None]
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save = lambda name: save_file(dict(state), name, {"format": "pt", MARK: source})  # noqa: E731
    elif path.suffix in _SUFFIXES:
        marked = OrderedDict(state)
        _mark(marked, source)
        save = lambda name: torch.save(marked, name)  # noqa: E731
    else:
        raise ValueError(f"path must end in {', '.join(_SUFFIXES)} or .safetensors, got {path}")
    with whole_file(path) as partial:
        save(str(partial))


def _mark(state: Any, source: str | None) -> None:
    if source:
        state._metadata = OrderedDict({"": {"version": 1, MARK: source}})


def unwrap(weights: Any) -> tuple[dict[str, Tensor], str | None]:
    """The state dict that `weights` holds, its keys without the prefixes of wrappers, and what it is marked as."""
    state, names = weights, list(_WRAPPERS)
    while isinstance(state, Mapping) and (found := [n for n in names if isinstance(state.get(n), Mapping)]):
        state = state[found[0]]
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"weights must be a state dict or the file of one, got {describe(state)}")
    marks = [entry.get(MARK) for entry in getattr(state, "_metadata", {}).values() if isinstance(entry, Mapping)]
    odd = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"weights must map names to tensors, got {describe(state[odd[0]])} at {odd[0]!r}")
    state = dict(state)
    while prefix := next((p for p in _PREFIXES if _begin_with(state, p)), None):
        state = {key[len(prefix) :]: value for key, value in state.items() if key not in _COUNTERS}
    return state, next((mark for mark in marks if isinstance(mark, str)), None)


def _begin_with(state: Mapping[str, Tensor], prefix: str) -> bool:
    keys = [key for key in state if key not in _COUNTERS]
    return bool(keys) and all(key.startswith(prefix) for key in keys)


def describe(state: Any) -> str:
    if not isinstance(state, Mapping):
        return type(state).__name__
    keys = [str(key) for key in state]
    return f"{len(keys)} entries from {keys[0]} to {keys[-1]}" if keys else "nothing"
