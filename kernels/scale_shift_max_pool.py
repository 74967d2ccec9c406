"""y = max_pool2d(activation(x * scale + shift)) by channel: what batch normalisation leaves of itself before a pooling.

Passes    Forward: one, in which a window's pixels are scaled, shifted and activated as they are compared. Backward:
          scale_shift.py's, which gathers an x pixel's gradient from the windows whose largest it is.
Layout    x, y (N, C, H, W) dense, channels_last (the fast path: 16-byte loads along C) or NCHW (threads along pixels);
          taps, of y's shape and format, a byte: which of its window's pixels y is. scale and shift (C) in the
          accumulator's dtype.
Tile      BLOCK_P pixels of one image's y x BLOCK_C channels.
Grid      one axis: a tile a program, channel blocks fastest.
Bytes     ideally x, y and taps once. Windows that overlap read x's pixels again, from L1 and L2: K^2 / S^2 loads and
          activations of each.
Numbers   float32, bfloat16, float16 with float32 arithmetic, float64 in float64; compared before they are rounded.
Ties      the first of equal values, a NaN before all, as PyTorch's.
Addresses Offsets of an image or pixel are int64, so tensors may exceed 2^31 elements; C, H * W and the number of tiles
          of the batch stay below 2^31.
Registers and shared memory per target: docs/kernels.md.
"""

import torch
import triton
import triton.language as tl

from .activation import activate, scaled
from .channels import image_blocks, load_channels, locate_image
from .configurations import configuration, launch
from .launch import cdiv, dense, empty_image, vector
from .scale_shift import Pool, gradients, only
from .squeeze_excite import like

__all__ = ["scale_shift_max_pool", "scale_shift_max_pool_backward"]


@triton.jit(do_not_specialize=["height", "width", "out_width", "rows", "vectors"])
def scale_shift_max_pool_fwd_kernel(
    x, scale, shift, y, taps, height, width, out_width, rows, vectors,
    VECTOR: tl.constexpr, ACTIVATION: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns = vectors * VECTOR  # of y, in two factors, so that the compiler knows how rows are aligned
    channels = columns if CHANNELS_LAST else rows
    n_c, n_p = tl.cdiv(channels, BLOCK_C), tl.cdiv(rows if CHANNELS_LAST else columns, BLOCK_P)
    i_tile = tl.program_id(0) // n_c  # (image, tile)
    i_n = (i_tile // n_p).to(tl.int64)
    o_p = i_tile % n_p * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = tl.program_id(0) % n_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offset, m_y = locate_image(rows, columns, i_n, o_p, o_c, CHANNELS_LAST)  # [BP, BC]
    b_scale, b_shift = load_channels(scale, o_c, o_c < channels), load_channels(shift, o_c, o_c < channels)
    top, left = o_p // out_width * STRIDE - PADDING, o_p % out_width * STRIDE - PADDING
    b_y = tl.full((BLOCK_P, BLOCK_C), float("-inf"), scale.dtype.element_ty)
    b_tap = tl.zeros((BLOCK_P, BLOCK_C), tl.int32) + (tl.maximum(-top, 0) * KERNEL + tl.maximum(-left, 0))[:, None]
    for r in range(KERNEL):
        for s in tl.static_range(KERNEL):
            o_h, o_w = top + r, left + s
            m_x = m_y & ((o_h >= 0) & (o_h < height) & (o_w >= 0) & (o_w < width))[:, None]
            if CHANNELS_LAST:
                p_x = x + (((i_n * height + o_h) * width + o_w) * columns)[:, None] + o_c[None, :]
            else:
                p_x = x + ((i_n * rows + o_c) * height * width)[None, :] + (o_h * width + o_w)[:, None]
            b_v = activate(scaled(tl.load(p_x, m_x, 0.0).to(b_y.dtype), b_scale, b_shift), ACTIVATION)
            larger = m_x & ((b_v > b_y) | (b_v != b_v))
            b_y, b_tap = tl.where(larger, b_v, b_y), tl.where(larger, r * KERNEL + s, b_tap)
    tl.store(y + offset, b_y.to(y.dtype.element_ty), m_y)
    tl.store(taps + offset, b_tap.to(taps.dtype.element_ty), m_y)


def scale_shift_max_pool(x, scale, shift, max_pool, activation):
    """(y, taps)"""
    x, channels_last = dense(x)
    N, C, H, W = x.shape
    kernel, stride, padding = max_pool
    OH, OW = ((size + 2 * padding - kernel) // stride + 1 for size in (H, W))
    y = empty_image(x, (N, C, OH, OW))
    taps = torch.empty_like(y, dtype=torch.uint8)
    blocks = configuration(
        scale_shift_max_pool_fwd_kernel, x, lambda: image_blocks(C, OH * OW, x, channels_last, vectors=1),
        C=C, pixels=OH * OW, channels_last=channels_last, kernel=kernel, stride=stride,
    )  # fmt: skip
    rows, columns = (OH * OW, C) if channels_last else (C, OH * OW)
    v = vector(columns, x)
    if N > 0:
        with torch.cuda.device_of(x):
            launch(
                scale_shift_max_pool_fwd_kernel, blocks,
                lambda b: (N * cdiv(OH * OW, b["BLOCK_P"]) * cdiv(C, b["BLOCK_C"]),),
                x, scale.contiguous(), shift.contiguous(), y, taps, H, W, OW, rows, columns // v, VECTOR=v,
                ACTIVATION=activation, KERNEL=kernel, STRIDE=stride, PADDING=padding, CHANNELS_LAST=channels_last,
                vary=("BLOCK_P", "BLOCK_C"),
            )  # fmt: skip
    return y, taps


def scale_shift_max_pool_backward(grad, x, scale, shift, taps, max_pool, activation, output_mask):
    """Gradients of (x, scale, shift): 0 elements for one that output_mask leaves out."""
    wanted = [bool(output_mask >> i & 1) for i in range(3)]
    x, channels_last = dense(x)
    grad, taps = (like(tensor, x, channels_last) for tensor in (grad, taps))
    grads = gradients(
        x, grad, None, scale, shift, activation, channels_last, [*wanted, False], pool=Pool(taps, *max_pool)
    )
    return only(wanted, (x, scale, shift), grads[:3])
