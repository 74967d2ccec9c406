"""What kernels that go over an image's rows and columns share: a program's pixels, and how large its tile is."""

import torch
import triton
import triton.language as tl

from .launch import cdiv, fitting, fitting_power, next_power_of_2
from .packing import accumulator

SIZES = ["H", "W", "OH", "OW", "pad_top", "pad_left", "vectors"]  # one compiled kernel serves every size


@triton.constexpr_function
def hits(distance, count, step):
    """Whether `distance` is one of 0, step, ..., (count - 1) * step."""
    return 0 <= distance < count * step and distance % step == 0


@triton.jit
def strides(C, H, W, CHANNELS_LAST: tl.constexpr):
    """Of (channel, row, column), in elements."""
    if CHANNELS_LAST:
        return 1, tl.cast(W, tl.int64) * C, tl.cast(C, tl.int64)
    else:
        return tl.cast(H, tl.int64) * W, tl.cast(W, tl.int64), 1


@triton.jit
def locate(
    channels, rows, columns,
    BLOCK_C: tl.constexpr, STRIPS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """This program's (image, index of the strip [BP], column [BP], channel [BC]), BP = STRIPS * BLOCK_W."""
    n_c = tl.cdiv(channels, BLOCK_C)
    n_w = tl.cdiv(columns, BLOCK_W)
    n_h = tl.cdiv(rows, STRIPS * BLOCK_H)
    i_tile = tl.program_id(0) // n_c  # (image, tile of rows, tile of columns)
    i_rows = i_tile // n_w  # (image, tile of rows)
    o_p = tl.arange(0, STRIPS * BLOCK_W)
    o_s = i_rows % n_h * STRIPS + o_p // BLOCK_W
    o_w = i_tile % n_w * BLOCK_W + o_p % BLOCK_W
    o_c = tl.program_id(0) % n_c * BLOCK_C + tl.arange(0, BLOCK_C)
    return (i_rows // n_h).to(tl.int64), o_s, o_w, o_c


def geometry(kernel, stride, dilation, multiplier):
    return dict(
        MULTIPLIER=multiplier, KH=kernel[0], KW=kernel[1], STRIDE_H=stride[0], STRIDE_W=stride[1],
        DILATION_H=dilation[0], DILATION_W=dilation[1],
    )  # fmt: skip


def spatial_blocks(channels, height, width, x, channels_last, kernel_h, stride_h=1, row_multiple=1):
    """Tile of the forward and input-gradient kernels: 128 threads of 16 bytes of x, as many rows as registers allow.

    BLOCK_C < 32 * num_warps, or Triton sends the weights through shared memory to spread them over the threads.
    """
    per_thread = 16 // x.element_size()
    block_c = fitting_power(channels, 16, 64 if channels_last else 16)
    pixels = max(128 * per_thread // block_c, 1)
    block_w = fitting_power(width, 8, min(pixels, 32))
    strips = min(pixels // block_w, next_power_of_2(height))
    most = max(8 - kernel_h // 2 - stride_h, 2) // row_multiple or 1
    block_h = fitting(height, [strips * row_multiple * n for n in range(cdiv(most, 2), most + 1)]) // strips
    warps = min(max(strips * block_w * block_c // (32 * per_thread), 1), 4)
    return dict(STRIPS=strips, BLOCK_H=block_h, BLOCK_W=block_w, BLOCK_C=block_c, num_warps=warps)


def spatial_grid(images, rows, columns, channels, blocks):
    """One axis: (image, tile of rows, tile of columns, channel block), the last fastest."""
    tiles = cdiv(rows, blocks["STRIPS"] * blocks["BLOCK_H"]) * cdiv(columns, blocks["BLOCK_W"])
    return (images * tiles * cdiv(channels, blocks["BLOCK_C"]),)


def sums_of_tiles(x, grid, channels, blocks, sums):
    """[N, tiles, sums * channels] for the kernels' `partial`; None for none."""
    if sums == 0:
        return None
    tiles = grid[0] // (x.shape[0] * cdiv(channels, blocks["BLOCK_C"]))
    return torch.empty((x.shape[0], tiles, sums * channels), dtype=accumulator(x), device=x.device)
