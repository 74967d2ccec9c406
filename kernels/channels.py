"""Sums over pixels: of each channel of each image, of a tensor or of the product of two.

Layout    (N, C, H, W) dense, channels_last (16-byte loads along C) or NCHW (16-byte loads along pixels, where H * W
          lets them); the product's second tensor in the first one's format.
Tile      `tile_pixels` pixels of one image x BLOCK_C channels, BLOCK_P pixels at a time.
Grid      one axis: a tile a program, channel blocks fastest.
Bytes     ideally every tensor once; besides the partial sums, written once.
Repeats   No atomics: tiles and the order within them depend on C, H * W, dtype, format and the configuration alone, so
          that an image's sums don't depend on scheduling or on its neighbours in the batch.
Addresses Offsets of an image or pixel are int64; C, H * W and the number of tiles stay below 2^31.
Registers and shared memory per target: docs/kernels.md.
"""

import torch
import triton
import triton.language as tl

from .configurations import configuration, launch
from .launch import cdiv, fitting_power, next_power_of_2, vector
from .packing import accumulator

__all__ = ["channel_sums", "image_blocks"]

MOST_TILES = 64  # of an image


@triton.jit
def locate_image(rows, columns, i_n, o_p, o_c, CHANNELS_LAST: tl.constexpr):
    """(offset, whether it is there), both [BP, BC], of image i_n's pixels o_p and channels o_c.

    rows x columns are an image's pixels x channels in channels_last, else its channels x pixels.
    """
    if CHANNELS_LAST:
        offset = i_n * rows * columns + (o_p.to(tl.int64) * columns)[:, None] + o_c[None, :]
        return offset, (o_p < rows)[:, None] & (o_c < columns)[None, :]
    else:
        offset = i_n * rows * columns + (o_c.to(tl.int64) * columns)[None, :] + o_p[:, None]
        return offset, (o_p < columns)[:, None] & (o_c < rows)[None, :]


# partial[image, tile, channel]: x (times other) summed over the tile's pixels.
@triton.jit(do_not_specialize=["rows", "vectors", "tiles", "tile_pixels"])
def channel_sums_kernel(
    x, other, partial, rows, vectors, tiles, tile_pixels,
    VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns = vectors * VECTOR  # in two factors, so that the compiler knows how rows are aligned
    channels = columns if CHANNELS_LAST else rows
    n_c = tl.cdiv(channels, BLOCK_C)
    i_tile = tl.program_id(0) // n_c  # (image, tile)
    o_c = tl.program_id(0) % n_c * BLOCK_C + tl.arange(0, BLOCK_C)
    first = i_tile % tiles * tile_pixels
    acc = tl.zeros((BLOCK_P, BLOCK_C), partial.dtype.element_ty)
    for p in range(0, tile_pixels, BLOCK_P):
        o_p = p + tl.arange(0, BLOCK_P)
        offset, m_x = locate_image(rows, columns, (i_tile // tiles).to(tl.int64), first + o_p, o_c, CHANNELS_LAST)
        m_x &= (o_p < tile_pixels)[:, None]
        b_x = tl.load(x + offset, m_x, 0.0).to(acc.dtype)
        if other is not None:
            b_x *= tl.load(other + offset, m_x, 0.0).to(acc.dtype)
        acc += b_x
    tl.store(partial + i_tile.to(tl.int64) * channels + o_c, tl.sum(acc, 0), o_c < channels)


def image_blocks(channels, pixels, x, channels_last, vectors):
    """Tile of a kernel that goes once over the pixels of images: 128 threads of `vectors` times 16 bytes of x each."""
    elements = 128 * vectors * 16 // x.element_size()
    if channels_last:
        block_c = fitting_power(channels, 16, 64)
        block_p = min(max(elements // block_c, 1), max(next_power_of_2(pixels), 8))
    else:
        block_p = fitting_power(pixels, 64, elements)
        block_c = min(max(elements // block_p, 1), next_power_of_2(channels), 16)
    return dict(BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4)


def channel_sums(x, other, channels_last):
    """Partial sums [N, tiles, C] in the accumulator's dtype, of x or of x * other; who reads them adds up the tiles.

    x: (N, C, H, W), dense in the format that channels_last says, at least one element; so is `other`, or None. Their
    dtypes may differ.
    """
    N, C, H, W = x.shape
    tile_pixels = max(256, cdiv(H * W, MOST_TILES))
    tiles = cdiv(H * W, tile_pixels)
    blocks = configuration(
        channel_sums_kernel, x, lambda: image_blocks(C, H * W, x, channels_last, vectors=2),
        C=C, pixels=H * W, channels_last=channels_last, product=other is not None,
    )  # fmt: skip
    rows, columns = (H * W, C) if channels_last else (C, H * W)
    v = vector(columns, x)
    partial = torch.empty((N, tiles, C), dtype=accumulator(x), device=x.device)
    with torch.cuda.device_of(x):
        launch(
            channel_sums_kernel, blocks, lambda b: (N * tiles * cdiv(C, b["BLOCK_C"]),),
            x, other, partial, rows, columns // v, tiles, tile_pixels, VECTOR=v, CHANNELS_LAST=channels_last,
            vary=("BLOCK_P", "BLOCK_C"),
        )  # fmt: skip
    return partial
