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
LAST_IN_CUDA = 2  # the CUDA C++ kernels have no others yet; Triton's have all

__all__ = ["CODES", "FUNCTIONS", "check_in_cuda", "code"]


def code(name: str, activation: str | None) -> int:
    """The schema's code of an activation; `name` is the argument's, for the error."""
    try:
        return CODES[activation]
    except (KeyError, TypeError):  # TypeError: not hashable
        raise ValueError(f"{name} must be one of {', '.join(map(repr, CODES))}, got {activation!r}") from None


def check_in_cuda(name: str, code: int) -> None:
    """Raises for an activation that the CUDA C++ kernels lack."""
    if code > LAST_IN_CUDA:
        names = {value: key for key, value in CODES.items()}
        known = ", ".join(repr(key) for key, value in CODES.items() if value <= LAST_IN_CUDA)
        raise ValueError(f"{name} must be one of {known} with backend 'cuda', got {names[code]!r}")
