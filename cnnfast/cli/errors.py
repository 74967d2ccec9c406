"""What ends a command with one sentence instead of a traceback."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator


class UsageError(Exception):
    """The user asked for something that can't be done; the message is one sentence for stderr, exit status 2."""


def require(module: str, extra: str) -> None:
    """Say which extra of cnnfast brings `module` where it isn't installed."""
    if importlib.util.find_spec(module) is None:
        raise UsageError(f'{module} is not installed: pip install "cnnfast[{extra}]"')


@contextlib.contextmanager
def users_network(name: str) -> Iterator[None]:
    """What the code of a network that isn't the package's raises is one sentence too."""
    from cnnfast.imports import in_words
    from cnnfast.models import list_models
    from cnnfast.models.figures import table

    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if name in table() or name not in list_models():
            raise
        raise UsageError(f"{name}, which isn't one of cnnfast's own, raised {in_words(error)}") from None
