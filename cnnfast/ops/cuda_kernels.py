"""What the CUDA C++ kernels take, and where they are preferred to Triton's: the table that `backend="auto"` follows.

Until a measurement says otherwise the preferences are docs/predictions.md's. No rule looks at the batch, so that an
image's result does not depend on its neighbours.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cnnfast.ops import activations

TAKES_TF32 = ("pointwise_conv2d", "inverted_residual")  # whose schemas end in `bool tf32`
FLOPS_PER_BYTE = 99  # of mma.sync on an H100: what multiplies more for each byte is left to Triton's wgmma
OUTPUTS_OF_A_BLOCK = 64  # of inverted_residual
WITH_CLUSTERS = (9, 10)  # major compute capabilities that make its images with squeeze-excite in one pass
SHARED_MEMORY = 99 * 1024  # bytes, of its blocks at most


class Kernels(NamedTuple):
    """Of one op: why they don't take these arguments (by the schema's names), or None; whether they are preferred."""

    refuses: Callable[[dict[str, Any]], str | None]
    preferred: Callable[[dict[str, Any]], bool]


def refusal(op: str, arguments: dict[str, Any]) -> str | None:
    """One sentence: the argument, what came and what the op's CUDA C++ kernels want; None where they take it."""
    return KERNELS[op].refuses(arguments)


def preferred(op: str, arguments: dict[str, Any]) -> bool:
    """Whether they are predicted to be faster than Triton's; only where they take the arguments."""
    return KERNELS[op].preferred(arguments)


def tf32() -> bool:
    """Whether PyTorch's setting lets convolutions multiply float32 as TF32."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def _vectors(x: Tensor, *channels: int) -> bool:
    """Whether all these channels of a pixel are whole vectors of 16 bytes, side by side."""
    nhwc = x.stride(1) == 1 and not x.is_contiguous()
    return nhwc and all(count * x.element_size() % 16 == 0 for count in channels)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU; of tensors that are on none (predictions'), an H100's."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _only_relu(arguments: dict[str, Any]) -> str | None:
    for name in ("pre_activation", "activation"):
        code = arguments[name]
        if code > activations.CODES["relu6"]:
            names = {value: key for key, value in activations.CODES.items()}
            return f"{name} must be one of None, 'identity', 'relu', 'relu6' with backend 'cuda', got {names[code]!r}"
    return None


def _depthwise_preferred(a: dict[str, Any]) -> bool:
    """The vectorised kernels; of any other shape a thread makes one element, slower than Triton's tiles."""
    x = a["x"]
    kernel, channels = (
        (a["kernel_size"], a["out_channels"]) if "packed" in a else (a["weight"].shape[2:], a["weight"].shape[0])
    )
    (kh, kw), (sh, sw), (dh, dw) = kernel, a["stride"], a["dilation"]
    square = kh == kw and kh in (3, 5) and sh == sw and sh in (1, 2) and dh == dw == 1
    return square and x.dtype is not torch.float64 and channels == x.shape[1] and _vectors(x, channels)


def _not_float64(a: dict[str, Any]) -> str | None:
    if a["x"].dtype is torch.float64:
        return "x must be float32, bfloat16 or float16 with backend 'cuda', got torch.float64"
    return None


def _pointwise_preferred(a: dict[str, Any]) -> bool:
    """Where bytes decide, or both multiply alike; the rest is left to Triton's wgmma."""
    x, (out_channels, channels) = a["x"], a["weight"].shape[:2]
    if not _vectors(x, channels, out_channels):
        return False
    wgmma = _capability(x.device) >= (9, 0) and (x.dtype is not torch.float32 or tf32())
    return not wgmma or out_channels * channels <= FLOPS_PER_BYTE * (out_channels + channels)


def _smallest_block(a: dict[str, Any]) -> int:
    """Bytes of shared memory of csrc/cuda/inverted_residual's smallest block: 4 outputs, one stage of weights."""
    x, kernel, outs = a["x"], a["dw_weight"].shape[2:], a["project_weight"].shape[0]
    size, excites = x.element_size(), a["se_reduce_weight"] is not None
    inputs = math.prod(
        (outputs - 1) * stride + (k - 1) * dilation + 1
        for outputs, k, stride, dilation in zip((1, 4), kernel, a["stride"], a["dilation"], strict=True)
    )
    rows = -(-inputs // 16) * 16
    slabs = 0 if a["expand_weight"] is None else -(-x.shape[1] * size // 32)
    warps, most = (2, 64) if outs <= 64 else (4, 192)
    tiles = 0 if excites else -(-outs // -(-outs // most) // (8 * warps))
    columns = 8 * warps * tiles
    of_x = slabs * (rows * 32 + (64 if slabs == 2 else 32))
    weights = 64 * kernel.numel() + slabs * (64 // size + 1) * 32 + (columns + tiles % 2 * 8) * 64
    sums = 4096 // size if excites else 0
    return max(rows * (4 + 80) + of_x + 4096 + 1024 // size + sums + weights, 64 * (columns + 8) * size)


def _inverted_residual_refuses(a: dict[str, Any]) -> str | None:
    x = a["x"]
    if x.is_cuda and _capability(x.device) < (8, 0):
        return "x must be on a device of compute capability 8.0 or more with backend 'cuda'"
    reason = _not_float64(a)
    if reason is None and (needed := _smallest_block(a)) > SHARED_MEMORY:
        reason = (
            f"x's channels, kernel, stride and dilation must fit {SHARED_MEMORY} bytes of shared memory with backend"
            f" 'cuda', got {x.shape[1]} channels and a kernel, stride and dilation that need {needed}"
        )
    return reason


def _inverted_residual_preferred(a: dict[str, Any]) -> bool:
    """Without squeeze-excite where an image is more than one block's. With it where nothing is computed twice, or bytes
    weigh more than that: halos are expanded and activated by each block that reaches them, in Triton's stages once; and
    where an image is one block's, which clusters make in one pass if the batch is small."""
    x, dw_weight, project = a["x"], a["dw_weight"], a["project_weight"]
    (kh, kw), (sh, sw) = dw_weight.shape[2:], a["stride"]
    if kh != kw or kh not in (3, 5) or sh != sw or sh not in (1, 2) or max(a["dilation"]) > 1:
        return False
    if not _vectors(x, x.shape[1], dw_weight.shape[0], project.shape[0]):
        return False
    one_block = -(-x.shape[2] // sh) * -(-x.shape[3] // sw) <= OUTPUTS_OF_A_BLOCK
    if a["se_reduce_weight"] is None:
        return not one_block
    in_one_pass = one_block and _capability(x.device)[0] in WITH_CLUSTERS
    return in_one_pass or x.dtype is torch.float32 or a["expand_weight"] is None


def _squeeze_excite_preferred(a: dict[str, Any]) -> bool:
    return _vectors(a["x"], a["x"].shape[1])


KERNELS = {
    "depthwise_conv2d": Kernels(_only_relu, _depthwise_preferred),
    "inverted_residual": Kernels(_inverted_residual_refuses, _inverted_residual_preferred),
    "pointwise_conv2d": Kernels(_not_float64, _pointwise_preferred),
    "squeeze_excite": Kernels(_not_float64, _squeeze_excite_preferred),
}
