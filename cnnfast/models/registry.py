"""The networks by name."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable
from typing import TypeVar

from torch import nn

_MODELS: dict[str, Callable[..., nn.Module]] = {}
Factory = TypeVar("Factory", bound=Callable[..., nn.Module])


def register_model(name: str) -> Callable[[Factory], Factory]:
    """Decorator: makes a function or class that returns a network known as `name`."""

    def register(factory: Factory) -> Factory:
        if name in _MODELS:
            raise ValueError(f"name must be new, got {name!r}, which is {_MODELS[name].__qualname__}")
        _MODELS[name] = factory
        return factory

    return register


def list_models(pattern: str = "*") -> list[str]:
    """Names of the networks, sorted; `pattern` may hold wildcards: list_models("*lite*")."""
    return fnmatch.filter(sorted(_MODELS), pattern)


def create_model(name: str, **options: object) -> nn.Module:
    """The network `name`, with fresh weights; see list_models. Weights come by cnnfast.load_weights.

    `options` go to the network: num_classes, in_chans, drop_rate, global_pool, device, dtype, ...
    """
    if name not in _MODELS:
        close = difflib.get_close_matches(str(name), _MODELS) or list_models()
        raise ValueError(f"name must be one of cnnfast.list_models(), such as {' or '.join(close)}, got {name!r}")
    return _MODELS[name](**options)
