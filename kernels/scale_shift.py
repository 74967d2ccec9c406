"""y = activation(x * scale + shift + residual) by channel, and its gradients: what batch normalisation leaves of itself
between convolutions that are trained.

Passes    Forward: squeeze_excite_scale_kernel, one row of factors for all images. Backward: one pass over the pixels,
          which computes again what the activation was of, writes the gradients of x and of the residual and sums those
          of scale and shift; then add_up over the sums of all tiles. scale_shift_excite.py and scale_shift_max_pool.py
          go by the same pass.
Layout    x, residual, grad, y (N, C, H, W) dense, channels_last (the fast path: 16-byte loads along C) or NCHW (threads
          along pixels), all in x's format; scale and shift (C) in the accumulator's dtype.
Tile      `tile_pixels` pixels of one image x BLOCK_C channels, BLOCK_P pixels at a time.
Grid      one axis: a tile a program, channel blocks fastest.
Bytes     forward x and residual once, y once. Backward grad, x and residual (where there is an activation) once, each
          gradient written once; besides a pair of sums for each tile and channel, written and read once.
Numbers   float32, bfloat16, float16 with float32 arithmetic, float64 in float64; nothing is rounded in between.
Repeats   No atomics: every sum has a fixed order, which depends on shape, dtype, format and the configuration alone.
Addresses Offsets of an image or pixel are int64, so tensors may exceed 2^31 elements; C, H * W and the number of tiles
          stay below 2^31.
Registers and shared memory per target: docs/kernels.md.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .activation import activate, scaled
from .activation import gate as gradient_through
from .channels import image_blocks, load_channels, locate_image, store_sums, tiles_of, totals
from .configurations import configuration, launch
from .launch import cdiv, dense, is_channels_last, memory_format, residual_gradient, vector
from .squeeze_excite import like
from .squeeze_excite import scale as scale_channels

__all__ = ["scale_shift", "scale_shift_backward"]


class Pool(NamedTuple):
    """The max pooling behind the activation; taps: of scale_shift_max_pool.py, dense in the gradient's format."""

    taps: torch.Tensor
    kernel: int
    stride: int
    padding: int


# The gradients of the windows whose largest pixel each of image i_n's pixels o_p is, added up: [BP, BC].
@triton.jit
def of_windows(
    grad, taps, m_x, i_n, o_p, o_c, channels, width, out_height, out_width,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    REACH: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE  # windows that a row may be in
    row, column = o_p // width + PADDING, o_p % width + PADDING
    b_g = tl.zeros(m_x.shape, dtype)
    for i in range(REACH):
        o_h = row // STRIDE - i
        r = row - o_h * STRIDE
        for j in tl.static_range(REACH):
            o_w = column // STRIDE - j
            s = column - o_w * STRIDE
            inside = (o_h >= 0) & (o_h < out_height) & (r < KERNEL) & (o_w >= 0) & (o_w < out_width) & (s < KERNEL)
            m_g = m_x & inside[:, None]
            if CHANNELS_LAST:
                offset = (((i_n * out_height + o_h) * out_width + o_w) * channels)[:, None] + o_c[None, :]
            else:
                offset = ((i_n * channels + o_c) * out_height * out_width)[None, :] + (o_h * out_width + o_w)[:, None]
            largest = m_g & (tl.load(taps + offset, m_g, 0).to(tl.int32) == (r * KERNEL + s)[:, None])
            b_g += tl.where(largest, tl.load(grad + offset, m_g, 0.0).to(dtype), 0.0)  # whole vectors are loaded
    return b_g


# With v = x * scale + shift + residual: g = grad * activation'(v) is the residual's gradient, g * scale that of x;
# partial[image, tile, 0 and 1, channel] get g * x and g summed over the tile's pixels, for scale and shift. With z, the
# gradient that comes in is grad * gate_activation(z) + share / pixels, of each image; with taps, grad is of what is
# pooled.
@triton.jit(do_not_specialize=["width", "out_height", "out_width", "rows", "vectors", "tiles", "tile_pixels"])
def scale_shift_bwd_kernel(
    grad, x, scale, shift, residual, z, share, taps, grad_x, grad_residual, partial,
    width, out_height, out_width, rows, vectors, tiles, tile_pixels,
    VECTOR: tl.constexpr, ACTIVATION: tl.constexpr, GATE_ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns = vectors * VECTOR  # in two factors, so that the compiler knows how rows are aligned
    channels = columns if CHANNELS_LAST else rows
    pixels = rows if CHANNELS_LAST else columns
    n_c = tl.cdiv(channels, BLOCK_C)
    i_tile = tl.program_id(0) // n_c  # (image, tile)
    i_n = (i_tile // tiles).to(tl.int64)
    first = i_tile % tiles * tile_pixels
    o_c = tl.program_id(0) % n_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    b_scale, b_shift = load_channels(scale, o_c, m_c), load_channels(shift, o_c, m_c)
    if z is not None:
        b_gate = activate(load_channels(z + i_n * channels, o_c, m_c), GATE_ACTIVATION)
        b_share = load_channels(share + i_n * channels, o_c, m_c) / pixels
    sum_gx = tl.zeros((BLOCK_P, BLOCK_C), scale.dtype.element_ty)
    sum_g = sum_gx
    for p in range(0, tile_pixels, BLOCK_P):
        o_p = p + tl.arange(0, BLOCK_P)
        offset, m_x = locate_image(rows, columns, i_n, first + o_p, o_c, CHANNELS_LAST)  # [BP, BC]
        m_x &= (o_p < tile_pixels)[:, None]
        b_x = tl.load(x + offset, m_x, 0.0).to(sum_g.dtype)
        if taps is None:
            b_g = tl.load(grad + offset, m_x, 0.0).to(sum_g.dtype)
        else:
            b_g = of_windows(
                grad, taps, m_x, i_n, first + o_p, o_c, channels, width, out_height, out_width, KERNEL, STRIDE, PADDING,
                CHANNELS_LAST, sum_g.dtype,
            )  # fmt: skip
        if z is not None:
            b_g = b_g * b_gate + b_share
        if ACTIVATION != 0:
            b_v = scaled(b_x, b_scale, b_shift)
            if residual is not None:
                b_v += tl.load(residual + offset, m_x, 0.0).to(b_v.dtype)
            b_g = gradient_through(b_v, b_g, ACTIVATION)
        if grad_residual is not None:
            tl.store(grad_residual + offset, b_g.to(grad_residual.dtype.element_ty), m_x)
        if grad_x is not None:
            tl.store(grad_x + offset, (b_g * b_scale).to(grad_x.dtype.element_ty), m_x)
        if partial is not None:
            b_g = tl.where(m_x, b_g, 0.0)  # beyond the image there are a share and the slope at shift
            sum_gx += b_g * b_x
            sum_g += b_g
    if partial is not None:
        store_sums(partial, i_tile, channels, o_c, m_c, sum_gx, sum_g)


def scale_shift(x, scale, shift, residual, activation):
    x, channels_last = dense(x)
    residual = like(residual, x, channels_last)
    return scale_channels(
        x, scale.contiguous(), shift.contiguous(), residual, None, 0, activation, channels_last, x.dtype
    )


def gradients(
    x, grad, residual, scale, shift, activation, channels_last, wanted, z=None, share=None, gate_activation=0, pool=None
):
    """Those of (x, scale, shift, residual), the first and last in x's format; None for one that isn't `wanted`.

    z, share: [N, 1, C], as the kernel has them. All tensors are dense, grad and residual in x's format; with a pool,
    grad is of what is pooled.
    """
    N, C, H, W = x.shape
    of_x, of_scale, of_shift, of_residual = wanted
    tile_pixels, tiles = tiles_of(H * W)
    grad_x, grad_residual = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(channels_last))
        if want else None for want in (of_x, of_residual)
    )  # fmt: skip
    partial = scale.new_empty((N, tiles, 2, C)) if of_scale or of_shift else None
    blocks = configuration(
        scale_shift_bwd_kernel, x, lambda: image_blocks(C, H * W, x, channels_last, vectors=1),
        C=C, pixels=H * W, channels_last=channels_last, residual=residual is not None, gates=z is not None,
        sums=partial is not None, **({} if pool is None else dict(kernel=pool.kernel, stride=pool.stride)),
    )  # fmt: skip
    rows, columns = (H * W, C) if channels_last else (C, H * W)
    v = vector(columns, x)
    taps, kernel, stride, padding = pool or (None, 1, 1, 0)
    if N > 0:
        with torch.cuda.device_of(x):
            launch(
                scale_shift_bwd_kernel, blocks, lambda b: (N * tiles * cdiv(C, b["BLOCK_C"]),),
                grad, x, scale.contiguous(), shift.contiguous(), residual, z, share, taps, grad_x, grad_residual,
                partial, W, *grad.shape[2:], rows, columns // v, tiles, tile_pixels, VECTOR=v, ACTIVATION=activation,
                GATE_ACTIVATION=gate_activation, CHANNELS_LAST=channels_last, KERNEL=kernel, STRIDE=stride,
                PADDING=padding, vary=("BLOCK_P", "BLOCK_C"),
            )  # fmt: skip
    sums = (None, None) if partial is None else totals(partial, x, C)
    return grad_x, *sums, grad_residual


def scale_shift_backward(grad, x, scale, shift, residual, activation, output_mask):
    """Gradients of (x, scale, shift, residual): 0 elements for one that output_mask leaves out or that is None."""
    tensors = (x, scale, shift, residual)
    wanted = [tensor is not None and output_mask >> i & 1 for i, tensor in enumerate(tensors)]
    x, channels_last = dense(x)
    images = x, like(grad, x, channels_last), like(residual, x, channels_last)
    grads = [*gradients(*images, scale, shift, activation, channels_last, wanted)]
    if wanted[3] and is_channels_last(residual) != channels_last:
        grads[3] = residual_gradient(grads[3], residual)
    return only(wanted, tensors, grads)


def only(wanted, tensors, grads):
    """The gradients, with 0 elements for one that isn't wanted."""
    return tuple(
        gradient if want else (tensors[0] if tensor is None else tensor).new_empty(0)
        for gradient, want, tensor in zip(grads, wanted, tensors, strict=True)
    )
