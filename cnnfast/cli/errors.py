"""What ends a command with one sentence instead of a traceback."""

from __future__ import annotations


class UsageError(Exception):
    """The user asked for something that can't be done; the message is one sentence for stderr, exit status 2."""


def require(module: str, extra: str) -> None:
    """Import `module`, or say which extra of cnnfast brings it."""
    try:
        __import__(module)
    except ImportError:
        raise UsageError(f'{module} is not installed: pip install "cnnfast[{extra}]"') from None
