"""Sums over pixels: of each channel of each image, of a tensor or of the product of two, or of both, the first one as
it is or scaled, shifted and activated; and the second stage of all sums, of numbers that programs have stored.

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

from .activation import activate_loaded
from .configurations import configuration, launch
from .launch import cdiv, fitting_power, next_power_of_2, vector
from .packing import accumulator

__all__ = ["add_up", "channel_sums", "image_blocks", "load_channels", "store_sums", "tiles_of", "totals"]

MOST_TILES = 64  # of an image
MOST_ROWS = 1024  # that one program adds up; more are added up in MOST_TILES parts first


@triton.jit
def load_channels(p, o_c, m_c):
    """A row [1, BC] of numbers by channel, or None of None."""
    if p is None:
        return None
    else:
        return tl.load(p + o_c, m_c, 0.0)[None, :]


@triton.jit
def store_sums(partial, i_tile, channels, o_c, m_c, b_first, b_second):
    """partial[tile, 0 and 1, channel]: two blocks [BP, BC], or partial[tile, channel]: one, summed over the pixels."""
    n: tl.constexpr = 1 if b_second is None else 2
    p_sum = partial + i_tile.to(tl.int64) * n * channels + o_c
    tl.store(p_sum, tl.sum(b_first, 0), m_c)
    if b_second is not None:
        tl.store(p_sum + channels, tl.sum(b_second, 0), m_c)


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


# partial[image, tile, channel]: x (times other) summed over the tile's pixels; with BOTH [image, tile, 0 and 1,
# channel]: x, and x times other. With scale and shift, of activation(x * scale + shift) instead of x.
@triton.jit(do_not_specialize=["rows", "vectors", "tiles", "tile_pixels"])
def channel_sums_kernel(
    x, scale, shift, other, partial, rows, vectors, tiles, tile_pixels,
    VECTOR: tl.constexpr, ACTIVATION: tl.constexpr, BOTH: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns = vectors * VECTOR  # in two factors, so that the compiler knows how rows are aligned
    channels = columns if CHANNELS_LAST else rows
    n_c = tl.cdiv(channels, BLOCK_C)
    i_tile = tl.program_id(0) // n_c  # (image, tile)
    o_c = tl.program_id(0) % n_c * BLOCK_C + tl.arange(0, BLOCK_C)
    b_scale, b_shift = load_channels(scale, o_c, o_c < channels), load_channels(shift, o_c, o_c < channels)
    first = i_tile % tiles * tile_pixels
    acc = tl.zeros((BLOCK_P, BLOCK_C), partial.dtype.element_ty)
    acc_x = acc if BOTH else None
    for p in range(0, tile_pixels, BLOCK_P):
        o_p = p + tl.arange(0, BLOCK_P)
        offset, m_x = locate_image(rows, columns, (i_tile // tiles).to(tl.int64), first + o_p, o_c, CHANNELS_LAST)
        m_x &= (o_p < tile_pixels)[:, None]
        b_x = activate_loaded(tl.load(x + offset, m_x, 0.0).to(acc.dtype), m_x, ACTIVATION, b_scale, b_shift)
        if BOTH:
            acc_x += b_x
        if other is not None:
            b_x *= tl.load(other + offset, m_x, 0.0).to(acc.dtype)
        acc += b_x
    if BOTH:
        store_sums(partial, i_tile, channels, o_c, o_c < channels, acc_x, acc)
    else:
        store_sums(partial, i_tile, channels, o_c, o_c < channels, acc, None)


# Second stage: rows of `width` numbers (two totals: of 2 width), `stride` apart, added up in their order. Each of
# `outer` groups of `rows` is in `chunks` parts of `part` rows: total[outer, chunk, :width] (second: the next width).
# Tile BLOCK_S rows x BLOCK_C numbers;  grid (outer, chunk, block of numbers), the last fastest;  bytes partial once.
@triton.jit(do_not_specialize=["rows", "chunks", "part", "width", "divisor"])
def add_up_kernel(
    partial, total, second, rows, chunks, part, width, stride, divisor, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    row = width if second is None else 2 * width
    n_c = tl.cdiv(row, BLOCK_C)
    i_total = (tl.program_id(0) // n_c).to(tl.int64)  # (outer, chunk)
    o_c = tl.program_id(0) % n_c * BLOCK_C + tl.arange(0, BLOCK_C)
    first = i_total % chunks * part  # of its rows
    p_rows = partial + (i_total // chunks * rows + first) * stride
    count = tl.minimum(rows - first, part)
    o_s = tl.arange(0, BLOCK_S)
    acc = tl.zeros((BLOCK_S, BLOCK_C), partial.dtype.element_ty)
    for s in range(0, part, BLOCK_S):
        p_s = p_rows + ((s + o_s).to(tl.int64) * stride)[:, None] + o_c[None, :]
        acc += tl.load(p_s, (s + o_s < count)[:, None] & (o_c < row)[None, :], 0.0)
    b_total = tl.sum(acc, 0)
    if divisor is not None:
        b_total /= divisor
    b_total = b_total.to(total.dtype.element_ty)
    tl.store(total + i_total * width + o_c, b_total, o_c < width)
    if second is not None:
        tl.store(second + i_total * width + o_c - width, b_total, (o_c >= width) & (o_c < row))


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


def add_up(partial, *totals, divisor=None):
    """Each total = the sums of its part of partial [outer, rows, row] over the rows, in a fixed order (/ divisor).

    A row begins with the first total's numbers, then the second's, if there are two; it may be longer than that.
    """
    outer, rows, row = partial.shape
    if rows > MOST_ROWS:
        parts = partial.new_empty((outer, MOST_TILES, row))
        launch_add_up(partial, parts, None, MOST_TILES)
        partial = parts
    launch_add_up(partial, totals[0], totals[1] if len(totals) > 1 else None, 1, divisor)


def few_tiles(partial):
    """Partial sums [N, tiles, C], added up to [N, 1, C] where there are more tiles than channel_sums would make."""
    if partial.shape[1] <= MOST_TILES:
        return partial
    total = partial.new_empty((partial.shape[0], 1, partial.shape[2]))
    add_up(partial, total)
    return total


def launch_add_up(partial, total, second, chunks, divisor=None):
    outer, rows, _ = partial.shape
    width = total.numel() // (outer * chunks)
    numbers = width if second is None else 2 * width
    with torch.cuda.device_of(partial):
        add_up_kernel[(outer * chunks * cdiv(numbers, 32),)](
            partial, total, second, rows, chunks, cdiv(rows, chunks), width, partial.stride(1), divisor,
            BLOCK_S=16, BLOCK_C=32, num_warps=4,
        )  # fmt: skip


def totals(partial, like, channels):
    """Two tensors (channels) in the accumulator's dtype: the halves of partial's rows, added up over all rows."""
    first, second = (torch.empty((channels,), dtype=accumulator(like), device=like.device) for _ in range(2))
    add_up(partial.view(1, -1, 2 * channels), first, second)
    return first, second


def tiles_of(pixels):
    """(pixels of a tile, tiles of an image) of what sums an image's pixels."""
    tile_pixels = max(256, cdiv(pixels, MOST_TILES))
    return tile_pixels, cdiv(pixels, tile_pixels)


def channel_sums(x, other, channels_last, both=False, scale=None, shift=None, activation=0):
    """Partial sums [N, tiles, C] in the accumulator's dtype, of x or of x * other; who reads them adds up the tiles.

    both: [N, tiles, 2, C], of x and of x * other. scale, shift, activation: what makes x of the tensor `x`, (C) in the
    accumulator's dtype, contiguous.

    x: (N, C, H, W), dense in the format that channels_last says, at least one element; so is `other`, or None. Their
    dtypes may differ.
    """
    N, C, H, W = x.shape
    tile_pixels, tiles = tiles_of(H * W)
    blocks = configuration(
        channel_sums_kernel, x, lambda: image_blocks(C, H * W, x, channels_last, vectors=2),
        C=C, pixels=H * W, channels_last=channels_last, product=other is not None, scaled=scale is not None,
    )  # fmt: skip
    rows, columns = (H * W, C) if channels_last else (C, H * W)
    v = vector(columns, x)
    shape = (N, tiles, 2, C) if both else (N, tiles, C)
    partial = torch.empty(shape, dtype=accumulator(x), device=x.device)
    with torch.cuda.device_of(x):
        launch(
            channel_sums_kernel, blocks, lambda b: (N * tiles * cdiv(C, b["BLOCK_C"]),),
            x, scale, shift, other, partial, rows, columns // v, tiles, tile_pixels, VECTOR=v, ACTIVATION=activation,
            BOTH=both, CHANNELS_LAST=channels_last, vary=("BLOCK_P", "BLOCK_C"),
        )  # fmt: skip
    return partial
