"""Normalising and checking what users pass: one sentence that names the argument, what came and what is wanted.

Everything here runs on every call and is traced by torch.compile: plain comparisons, no deeper than one helper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Ints = int | Sequence[int]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SAME = (-1,)  # the schemas' code of padding 'same'
NO_POOL = (-1,)
HEADER_BYTES = 64  # of a packing; csrc/packing.h
LIMIT = 2**31  # of strides, paddings and the like, so that no kernel's arithmetic on them overflows


def pair(name: str, value: Ints) -> Sequence[int]:
    """(vertical, horizontal), each at least 1."""
    if isinstance(value, int):
        value = (value, value)
    elif not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be an int or two (vertical, horizontal), got {value!r}")
    if len(value) != 2:
        raise ValueError(f"{name} must be a positive int or two (vertical, horizontal), got {value!r}")
    vertical, horizontal = value
    if not (isinstance(vertical, int) and isinstance(horizontal, int)):
        raise TypeError(f"{name} must be an int or two (vertical, horizontal), got {value!r}")
    if vertical < 1 or horizontal < 1:
        raise ValueError(f"{name} must be a positive int or two (vertical, horizontal), got {value!r}")
    if vertical >= LIMIT or horizontal >= LIMIT:
        raise ValueError(f"{name} must be below 2**31, got {value!r}")
    return value


def edges(padding: Ints | str) -> Sequence[int]:
    """(top, bottom, left, right), or SAME."""
    if isinstance(padding, int):
        padding = (padding, padding, padding, padding)
    elif isinstance(padding, str):
        if padding != "same":
            raise ValueError(f"padding must be 'same' or ints, got {padding!r}")
        return SAME
    elif not isinstance(padding, (tuple, list)) or not all(isinstance(edge, int) for edge in padding):
        raise TypeError(
            f"padding must be an int, (vertical, horizontal), (top, bottom, left, right) or 'same', got {padding!r}"
        )
    elif len(padding) == 2:
        padding = (padding[0], padding[0], padding[1], padding[1])
    if len(padding) != 4 or min(padding) < 0:
        raise ValueError(f"padding must be one, two or four ints, none negative, got {padding!r}")
    if max(padding) >= LIMIT:
        raise ValueError(f"padding must be below 2**31, got {padding!r}")
    return padding


def output_size(
    shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """(height, width) of the output for an x of `shape`; raises where the kernel doesn't fit."""
    _, _, height, width = shape
    if len(padding) == 1:  # SAME
        return (height + stride[0] - 1) // stride[0], (width + stride[1] - 1) // stride[1]
    spare_h = height + padding[0] + padding[1] - dilation[0] * (kernel[0] - 1) - 1
    spare_w = width + padding[2] + padding[3] - dilation[1] * (kernel[1] - 1) - 1
    if spare_h < 0 or spare_w < 0:
        raise ValueError(
            f"x must be at least as large as the kernel once padded, got {height} x {width} with padding"
            f" {list(padding)} for a kernel of {kernel[0]} x {kernel[1]} with dilation {list(dilation)}"
        )
    return spare_h // stride[0] + 1, spare_w // stride[1] + 1


def pointwise_output_size(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, int]:
    """That of a 1x1 kernel without padding."""
    return output_size(shape, (1, 1), stride, (0, 0, 0, 0), (1, 1))


def check_x(x: Tensor) -> torch.Size:
    """x: (N, C, H, W), any N, of a float dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    shape = x.shape
    if len(shape) != 4:
        raise ValueError(f"x must have 4 dimensions (N, C, H, W), got shape {tuple(shape)}")
    if shape[1] < 1 or shape[2] < 1 or shape[3] < 1:
        raise ValueError(f"x must have at least one channel, row and column, got shape {tuple(shape)}")
    return shape


def check_depthwise_weight(
    name: str, weight: Tensor, x: Tensor, channels: int, like: str = "x", multiplier: int | None = None
) -> torch.Size:
    """weight: (channels * multiplier, 1, kh, kw); any multiplier unless one is given."""
    _check_like(name, weight, x, like)
    shape = weight.shape
    if (
        len(shape) != 4
        or shape[1] != 1
        or shape[0] < 1
        or shape[2] < 1
        or shape[3] < 1
        or (shape[0] % channels if multiplier is None else shape[0] != channels * multiplier)
    ):
        wanted = f"a multiple of {channels}" if multiplier is None else f"{channels * multiplier}"
        raise ValueError(
            f"{name} must have shape (out, 1, kh, kw), out {wanted}, for the {channels} channels that come in,"
            f" got {tuple(shape)}"
        )
    return shape


def check_dense_weight(name: str, weight: Tensor, x: Tensor, channels: int, like: str = "x") -> torch.Size:
    """weight: (K, channels, kh, kw)."""
    _check_like(name, weight, x, like)
    shape = weight.shape
    if len(shape) != 4 or shape[0] < 1 or shape[1] != channels or shape[2] < 1 or shape[3] < 1:
        raise ValueError(
            f"{name} must have shape (K, {channels}, kh, kw) for the {channels} channels that come in,"
            f" got {tuple(shape)}"
        )
    return shape


def check_pointwise_weight(name: str, weight: Tensor, x: Tensor, channels: int, like: str = "x") -> torch.Size:
    """weight: (out_channels, channels, 1, 1)."""
    _check_like(name, weight, x, like)
    shape = weight.shape
    if len(shape) != 4 or shape[0] < 1 or shape[1] != channels or shape[2] != 1 or shape[3] != 1:
        raise ValueError(
            f"{name} must have shape (out_channels, {channels}, 1, 1) for the {channels} channels that come in,"
            f" got {tuple(shape)}"
        )
    return shape


def check_bias(name: str, bias: Tensor | None, x: Tensor, channels: int, like: str = "x") -> None:
    """bias: (channels), of x's dtype or float32 beside a low-precision x."""
    if bias is None:
        return
    if not isinstance(bias, Tensor) or bias.dtype is not torch.float32 or x.dtype is torch.float64:
        _check_like(name, bias, x, like)
    elif bias.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like {like}, got {bias.device}")
    if bias.dim() != 1 or bias.shape[0] != channels:
        raise ValueError(f"{name} must have shape ({channels},), got {tuple(bias.shape)}")


def check_scale(name: str, scale: Tensor | None, weight: Tensor, channels: int, like: str) -> None:
    """scale: (channels), of the arithmetic's dtype: float32, float64 beside float64 weights."""
    if scale is None:
        return
    dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
    if not isinstance(scale, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(scale).__name__}")
    if scale.device != weight.device:
        raise ValueError(f"{name} must be on {weight.device} like {like}, got {scale.device}")
    if scale.dtype is not dtype:
        raise TypeError(f"{name} must have dtype {dtype} beside a {like} of {weight.dtype}, got {scale.dtype}")
    if scale.dim() != 1 or scale.shape[0] != channels:
        raise ValueError(f"{name} must have shape ({channels},), got {tuple(scale.shape)}")


def check_excite(
    x: Tensor,
    channels: int,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_bias: Tensor | None,
    prefix: str = "",
    like: str = "x",
) -> int:
    """Squeeze-excite's weights for `channels`: reduce (R, channels, 1, 1), expand (channels, R, 1, 1). Returns R."""
    squeezed = check_pointwise_weight(f"{prefix}reduce_weight", reduce_weight, x, channels, like)[0]
    shape = check_pointwise_weight(f"{prefix}expand_weight", expand_weight, x, squeezed, like)
    if shape[0] != channels:
        raise ValueError(
            f"{prefix}expand_weight must have shape ({channels}, {squeezed}, 1, 1) for the {channels} channels that are"
            f" scaled, got {tuple(shape)}"
        )
    check_bias(f"{prefix}reduce_bias", reduce_bias, x, squeezed, like)
    check_bias(f"{prefix}expand_bias", expand_bias, x, channels, like)
    return squeezed


def check_together(**tensors: Tensor | None) -> bool:
    """The first two are given together or not at all, the others only with them. Returns whether they are."""
    (first, a), (second, b), *others = tensors.items()
    if (a is None) != (b is None):
        missing, given = (first, second) if a is None else (second, first)
        raise ValueError(f"{missing} must be given where {given} is, got None")
    for name, tensor in others:
        if tensor is not None and a is None:
            raise ValueError(f"{name} must be None where {first} is, got a {type(tensor).__name__}")
    return a is not None


def check_residual(residual: Tensor | None, x: Tensor, shape: Sequence[int]) -> None:
    """residual: like the output."""
    if residual is None:
        return
    _check_like("residual", residual, x)
    if residual.dim() != 4 or tuple(residual.shape) != tuple(shape):
        raise ValueError(f"residual must have the output's shape {tuple(shape)}, got {tuple(residual.shape)}")


def check_gate(gate: Tensor | None, x: Tensor) -> None:
    """gate: a number for each image and channel of x, as squeeze-excite's second product gives it."""
    if gate is None:
        return
    _check_like("gate", gate, x)
    wanted = (*x.shape[:2], 1, 1)
    if tuple(gate.shape) != wanted:
        raise ValueError(
            f"gate must have shape {wanted}, one number for each image and channel, got {tuple(gate.shape)}"
        )


def check_scale_shift(scale: Tensor | None, shift: Tensor | None, x: Tensor) -> None:
    """scale, shift: (C), of the arithmetic's dtype: float32, float64 beside a float64 x."""
    if scale is None and shift is not None:
        raise ValueError("scale must be given where shift is, got None")
    like = torch.float64 if x.dtype is torch.float64 else torch.float32
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {tensor.device}")
        if tensor.dtype is not like:
            raise TypeError(f"{name} must have dtype {like} beside an x of {x.dtype}, got {tensor.dtype}")
        if tuple(tensor.shape) != (x.shape[1],):
            raise ValueError(
                f"{name} must have shape ({x.shape[1]},), a number for each channel of x, got {tuple(tensor.shape)}"
            )


def check_max_pool(pool: Sequence[int] | None, size: Sequence[int], residual: Tensor | None) -> Sequence[int]:
    """(kernel, stride, padding) of a max pooling of a result of `size`, or NO_POOL."""
    if pool is None:
        return NO_POOL
    if not isinstance(pool, (tuple, list)) or len(pool) != 3 or not all(isinstance(value, int) for value in pool):
        raise TypeError(f"max_pool must be None or three ints (kernel, stride, padding), got {pool!r}")
    kernel, stride, padding = pool
    if kernel < 1 or stride < 1 or padding < 0 or 2 * padding > kernel:
        raise ValueError(
            f"max_pool must have a positive kernel and stride and a padding of at most half the kernel, got {pool!r}"
        )
    if min(size) + 2 * padding < kernel:
        raise ValueError(f"max_pool's kernel must fit the padded result of {size[0]} x {size[1]}, got {pool!r}")
    if residual is not None:
        raise ValueError("max_pool can't be combined with a residual: pool first, then add")
    return pool


def check_weight(name: str, weight: Tensor, dims: int = 4) -> None:
    """A weight that is about to be packed, before there is an x to compare it with."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(weight).__name__}")
    if weight.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {weight.dtype}")
    if weight.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(weight.shape)}")


def check_packed(packed: Tensor, x: Tensor, op: str) -> None:
    """packed: what pack_<op> returned; the C++ side reads its header."""
    if not isinstance(packed, Tensor):
        raise TypeError(f"packed must be the tensor that pack_{op} returned, got {type(packed).__name__}")
    if packed.dtype is not torch.uint8 or packed.dim() != 1 or packed.shape[0] < HEADER_BYTES or packed.stride(0) != 1:
        raise ValueError(
            f"packed must be the contiguous uint8 tensor that pack_{op} returned, got {packed.dtype} of shape"
            f" {tuple(packed.shape)} and stride {packed.stride()}"
        )
    if packed.device != x.device:
        raise ValueError(f"packed must be on {x.device} like x, got {packed.device}")


def check_inference(op: str, instead: str, **tensors: Tensor | None) -> None:
    """Packed forms have no gradient: refuse to drop one silently. To be asked under grad mode only."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad and {op} is for inference only: call it under torch.no_grad(), or {instead}"
            )


def positive(name: str, value: int) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if value >= LIMIT:
        raise ValueError(f"{name} must be below 2**31, got {value}")
    return value


def number(name: str, value: float) -> float:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return value


def _check_like(name: str, tensor: Tensor, x: Tensor, like: str = "x") -> None:
    """tensor: on x's device and of x's dtype; autocast brings mixed dtypes together itself (but leaves float64)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like {like}, got {tensor.device}")
    if tensor.dtype is not x.dtype and not (
        torch.is_autocast_enabled(x.device.type)
        and tensor.dtype in DTYPES
        and torch.float64 not in (tensor.dtype, x.dtype)
    ):
        raise TypeError(f"{name} must have dtype {x.dtype} like {like}, got {tensor.dtype}")
