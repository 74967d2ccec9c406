"""What the reference ops share: activations by name, padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Ints = int | Sequence[int]

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "identity": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,  # the exact one, by the error function
    "tanh": torch.tanh,
}


def activate(x: Tensor, activation: str | None) -> Tensor:
    return ACTIVATIONS[activation](x)


def pad(x: Tensor, padding: Ints | str, kernel_size: Sequence[int], stride: Ints, dilation: Ints) -> Tensor:
    """x with the zeros around it that `padding` asks for."""
    if isinstance(padding, str):  # "same"
        top, bottom = _same(x.shape[2], kernel_size[0], _pair(stride)[0], _pair(dilation)[0])
        left, right = _same(x.shape[3], kernel_size[1], _pair(stride)[1], _pair(dilation)[1])
    elif isinstance(padding, int) or len(padding) == 2:
        top, left = bottom, right = _pair(padding)
    else:
        top, bottom, left, right = padding
    return F.pad(x, (left, right, top, bottom)) if top or bottom or left or right else x


def bias_like(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """F.conv2d wants the bias in x's dtype; ours may be float32 beside a low-precision x."""
    return None if bias is None else bias.to(x.dtype)


def _pair(value: Ints) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _same(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Zeros before and after: output = ceil(size / stride), the odd zero after (TensorFlow's rule)."""
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2
