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
LAST_ON_GPU = 2  # the GPU kernels have no others yet

__all__ = ["CODES", "FUNCTIONS", "check_on_gpu", "code"]


def code(name: str, activation: str | None) -> int:
    """The schema's code of an activation; `name` is the argument's, for the error."""
    try:
        return CODES[activation]
    except (KeyError, TypeError):  # TypeError: not hashable
        raise ValueError(f"{name} must be one of {', '.join(map(repr, CODES))}, got {activation!r}") from None


def check_on_gpu(name: str, code: int) -> None:
    """Raises for an activation that only the CPU's kernels and the reference have."""
    if code > LAST_ON_GPU:
        names = {value: key for key, value in CODES.items()}
        known = ", ".join(repr(key) for key, value in CODES.items() if value <= LAST_ON_GPU)
        raise ValueError(
            f"{name} must be one of {known} on a GPU, where no kernel has another yet, got {names[code]!r}"
        )
