"""Modules of the user's, which register networks or make them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType


def import_module(name: str) -> ModuleType:
    """The module `name`, which may lie in the current folder, as for `python -m`.

    Raises:
        ValueError: it isn't there, or raises while it is imported.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    importlib.invalidate_caches()  # it may have been written just now
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name!r} must be a module that can be imported, got {in_words(error)}") from None


def in_words(error: BaseException) -> str:
    """One line, which says what kind of error it is."""
    return f"{type(error).__name__}: {str(error) or 'no reason given'}".splitlines()[0]
