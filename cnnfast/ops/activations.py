"""The activations that ops fuse: name, code in the schemas, torch's function."""

from __future__ import annotations

from cnnfast.reference.common import ACTIVATIONS as FUNCTIONS

CODES: dict[str | None, int] = {
    None: 0,
    "identity": 0,
    "relu": 1,
    "relu6": 2,
    "sigmoid": 3,
    "silu": 4,
    "gelu": 5,
    "tanh": 6,
}

__all__ = ["CODES", "FUNCTIONS", "code"]


def code(name: str, activation: str | None) -> int:
    """The schema's code of an activation; `name` is the argument's, for the error."""
    try:
        return CODES[activation]
    except (KeyError, TypeError):  # TypeError: not hashable
        raise ValueError(f"{name} must be one of {', '.join(map(repr, CODES))}, got {activation!r}") from None
