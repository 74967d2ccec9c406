"""Configurations that `cnnfast tune` kept: a JSON file in the user's cache directory for each GPU, version of torch and
Triton, and state of the kernels' sources. Read once a process and GPU, at its first launch, and written by tune alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import triton

Key = tuple[Any, ...]  # (kernel's name, (name of a part of the shape, its value), ...)
Entries = dict[Key, dict[str, int]]

_entries: dict[torch.device, Entries] = {}


def folder() -> Path:
    """Where the files lie: CNNFAST_CACHE_DIR, else cnnfast/ in the system's directory for a user's caches."""
    if chosen := os.environ.get("CNNFAST_CACHE_DIR"):
        return Path(chosen)
    home = os.path.expanduser("~")
    if sys.platform == "win32":
        caches = os.environ.get("LOCALAPPDATA") or os.path.join(home, "AppData", "Local")
    elif sys.platform == "darwin":
        caches = os.path.join(home, "Library", "Caches")
    else:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    return Path(caches) / "cnnfast"


@functools.cache
def sources() -> str:
    """A digest of all kernels."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def identity(device: torch.device) -> dict[str, str] | None:
    """What entries are good for; None for tensors that are on no GPU."""
    if device.type != "cuda":
        return None
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return {
        "device": torch.cuda.get_device_name(device),
        "capability": capability,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": sources(),
    }


def path(of: dict[str, str]) -> Path:
    return folder() / ("tuned-" + re.sub(r"[^\w.+-]+", "_", "-".join(of.values())) + ".json")


def entries(device: torch.device) -> Entries:
    """Those of the device's GPU; none where there is no file, or one that can't be used, which a warning says once."""
    found = _entries.get(device)
    if found is None:
        of = identity(device)
        found = _entries[device] = {} if of is None else read(of)
    return found


def read(of: dict[str, str]) -> Entries:
    file = path(of)
    try:
        return decoded(json.loads(file.read_text(encoding="utf-8")), of)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(
            f"cnnfast doesn't use the tuned configurations in {file}: {error} (`cnnfast tune --clear` removes it)",
            stacklevel=2,
        )
        return {}


def decoded(content: Any, of: dict[str, str]) -> Entries:
    """The entries of a file's content; ValueError says why they can't be used."""
    if not isinstance(content, dict) or content.get("checksum") != checksum(content.get("entries")):
        raise ValueError("it is damaged")
    for name, value in of.items():
        if content.get(name) != value:
            raise ValueError(f"it is for {name} {content.get(name)!r}, here is {value!r}")
    return {key_of(entry): entry["configuration"] for entry in content["entries"]}


def key_of(entry: dict[str, Any]) -> Key:
    shape = ((name, tuple(part) if isinstance(part, list) else part) for name, part in entry["shape"].items())
    return (entry["kernel"], *shape)


def checksum(entries: Any) -> str:
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]


def keep(device: torch.device, new: Entries) -> None:
    """Adds to the GPU's file, in one step (another process sees it before or after), and to what launches here take."""
    of = identity(device)
    if of is None:
        raise ValueError(f"device must be a GPU, got {device}")
    file = path(of)
    known = _entries[device] = {**entries(device), **read(of), **new}
    rows = [{"kernel": k[0], "shape": dict(k[1:]), "configuration": values} for k, values in known.items()]
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False, encoding="utf-8") as written:
        try:
            json.dump({**of, "checksum": checksum(rows), "entries": rows}, written, indent=1)
            written.close()
            os.replace(written.name, file)
        except BaseException:
            written.close()
            os.unlink(written.name)
            raise


def clear() -> list[Path]:
    """Removes the files, of every GPU and version; which they were."""
    files = sorted(folder().glob("tuned-*.json"))
    for file in files:
        file.unlink()
    _entries.clear()
    return files
