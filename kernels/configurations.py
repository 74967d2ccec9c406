"""Which tile, num_warps and num_stages a launch takes: what `cnnfast tune` kept for its shape (tuned.py), else what the
launcher's formula says, changed by the table below where one formula isn't right for every class of device.

A shape is what a result's bits may depend on: channels, an image's size, filter, stride, dtype, format; never the
batch, since an image's result doesn't depend on its neighbours. Nothing is timed here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import launch as gpu
from . import tuned


class Configuration(dict):
    """Tile, num_warps and other options of Triton's compiler, by name; `key` and `device`: what they are for."""

    def __init__(self, values: dict[str, int], key: tuned.Key, device: torch.device):
        super().__init__(values)
        self.key, self.device = key, device


def configuration(
    kernel: Any, x: torch.Tensor, formula: Callable[[], dict[str, int]], /, **shape: int | tuple[int, ...]
) -> Configuration:
    """That of a launch of `kernel` on x's device, for x's dtype and `shape`: numbers, flags, pairs of numbers.

    Whatever the formula's result depends on is in the shape. Each shape costs the formula once, then a look-up.
    """
    device = x.device
    key = (kernel.__name__, ("dtype", str(x.dtype).removeprefix("torch.")), *shape.items())
    kept = tuned.entries(device).get(key)
    if kept is not None:
        return Configuration(kept, key, device)
    known = _computed.get((device, key))
    if known is None:
        known = Configuration(from_table(kernel, x, formula(), dict(key[1:])), key, device)
        if device.type == "cuda":
            _computed[device, key] = known
    return known


_computed: dict[tuple[torch.device, tuned.Key], Configuration] = {}

# Takes launches while `cnnfast tune` runs: whether it launched (tuning.py).
tuner: Callable[..., bool] | None = None


def launch(
    kernel: Any, blocks: Configuration, grid: Callable, /, *args: Any,
    vary: tuple[str, ...] = (), restore: tuple[str, ...] = (), **constants: Any,
) -> None:  # fmt: skip
    """kernel[grid(blocks)](*args, **constants, **blocks).

    vary: names of blocks that may be others beside the same arguments: none that an argument was sized by, nor one
    that has to divide something; num_warps and num_stages always may. restore: names of arguments that the kernel
    reads and overwrites.
    """
    if tuner is None or not tuner(kernel, blocks, grid, args, constants, vary, restore):
        kernel[grid(blocks)](*args, **constants, **blocks)


def device_class(device: torch.device) -> str:
    """What its GPU has in common with others: the matrix instructions and the shared memory of a multiprocessor.

    "turing" (7.x: none that Triton uses; 64 KiB), "ampere" (8.0, 8.7; 164 KiB), "small" (8.6, 8.9, 12.x: consumers'
    and inference cards; 100 KiB), "hopper" (9.0: wgmma; 228 KiB), "blackwell" (10.x, 11.0: tcgen05; 228 KiB), "amd"
    (64 KiB of LDS).
    """
    if torch.version.hip is not None:
        return "amd"
    major, minor = gpu.capability(device)
    if major < 8:
        return "turing"
    if major == 8:
        return "ampere" if minor in (0, 7) else "small"
    return {9: "hopper", 10: "blackwell", 11: "blackwell"}.get(major, "small")


def from_table(kernel: Any, x: torch.Tensor, default: dict[str, int], shape: dict[str, Any]) -> dict[str, int]:
    rows = TABLE.get(kernel.__name__)
    if rows is not None:
        device = device_class(x.device)
        for row in rows:
            if device in row.devices and row.where(**shape):
                return {**default, **row.change}
    return default


class Row(NamedTuple):
    devices: tuple[str, ...]
    where: Callable[..., bool]  # of the parts of a shape
    change: dict[str, int]  # of what the formula says


def deep(dtype, tensor_cores, channels_last, C, K, image, gate, **_):
    """Products of images of several tiles that the tensor cores bound, not memory."""
    return tensor_cores and dtype != "float32" and channels_last and not gate and image > 256 and min(C, K) >= 512


def deep_and_plain(stride, curved=False, residual=False, grad=False, prologue=False, sums=False, **shape):
    """And what is around them takes few registers: at 256 channels, a residual, slope, curve or sum spills."""
    return max(stride) == 1 and not (curved or residual or grad or prologue or sums) and deep(**shape)


def curved_slope(tensor_cores, image, K, grad, curved, **_):
    """What the gradients of a curved activation start from, in the formula's largest tiles."""
    return tensor_cores and image > 256 and K > 64 and grad and curved


def on_tensor_cores(tensor_cores, **_):
    return tensor_cores


def small_filter(of_dtype):
    """A weight gradient of 3 rows of taps, x in channels_last."""

    def where(dtype, KH, STRIDE_H, channels_last, **_):
        return dtype == of_dtype and KH == 3 and STRIDE_H == 1 and channels_last

    return where


def large_filter_and_sums(dtype, KH, STRIDE_H, DILATION_H, squeeze, curved, **_):
    """Sums of at least 4 rows and of the result, beside exponentials."""
    return squeeze and curved and dtype != "float64" and (KH - 1) * DILATION_H // STRIDE_H >= 3


# One program has the multiprocessor: 192 of 228 KiB, and x is read half as often as by tiles of 128 channels.
WIDE = Row(("hopper", "blackwell"), deep_and_plain, dict(BLOCK_K=256, num_stages=4))
# 125 registers a thread instead of 176, and 48 KiB: two programs share a multiprocessor instead of one.
SHALLOW = Row(("ampere", "small"), deep, dict(BLOCK_C=32, num_stages=4))
# 128 registers a thread; in tiles of 128 channels silu and tanh spill up to 1,392 bytes.
NARROW = Row(("ampere", "small", "hopper", "blackwell"), curved_slope, dict(BLOCK_K=64))
# A row or two fewer of four: ptxas wants 128 registers (168), and spills the 8 bytes that are over.
THREE_ROWS = Row(("ampere",), small_filter("float32"), dict(BLOCK_H=3))
TWO_ROWS = Row(("blackwell",), small_filter("float16"), dict(BLOCK_H=2))
ONE_ROW = Row(("hopper",), small_filter("float64"), dict(BLOCK_H=1))
# 98-128 registers a thread; by four warps all 255, and 8 bytes spilled.
EIGHT_WARPS = Row(("ampere", "small", "hopper", "blackwell"), large_filter_and_sums, dict(num_warps=8))
# Half of the formula's three stages in LDS, 32 of 64 KiB: two programs share a compute unit.
TWO_STAGES = Row(("amd",), on_tensor_cores, dict(num_stages=2))
# 92-104 registers a lane; by Triton's choice, 32 x 32, four wavefronts hold the same numbers: 1,980 bytes spilled.
SMALL_PRODUCTS = Row(("amd",), on_tensor_cores, dict(matrix_instr_nonkdim=16))

# By kernel; the first row that fits. From resources (docs/kernels.md), not timed: `cnnfast tune` is what times.
TABLE = {
    "depthwise_conv2d_bwd_weight_kernel": (THREE_ROWS, TWO_ROWS, ONE_ROW),
    "pointwise_conv2d_fwd_kernel": (NARROW, WIDE, SHALLOW, TWO_STAGES),
    "pointwise_conv2d_bwd_input_kernel": (WIDE, TWO_STAGES),
    "pointwise_conv2d_bwd_weight_kernel": (TWO_STAGES,),
    "pointwise_depthwise_fwd_kernel": (EIGHT_WARPS, SMALL_PRODUCTS),
}
