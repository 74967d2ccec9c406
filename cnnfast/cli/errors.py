"""What ends a command with one sentence instead of a traceback."""

from __future__ import annotations

import importlib.util


class UsageError(Exception):
    """The user asked for something that can't be done; the message is one sentence for stderr, exit status 2."""


def require(module: str, extra: str) -> None:
    """Say which extra of cnnfast brings `module` where it isn't installed."""
    if importlib.util.find_spec(module) is None:
        raise UsageError(f'{module} is not installed: pip install "cnnfast[{extra}]"')
