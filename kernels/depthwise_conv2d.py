"""Depthwise convolution, forward and both gradients: y = activation(depthwise(pre_activation(x), weight) + bias).

For stats.py the kernels take a scale and shift of x's channels, before pre_activation, and store sums over the pixels
of each tile, which add_up adds up; without those they are compiled as if there were none.

Layout    x (N, C, H, W) dense, channels_last (the fast path: 16-byte loads along C) or NCHW; y in x's format.
          Output channel k reads input channel k // MULTIPLIER. Weights always arrive taps-major in the accumulator's
          dtype, weight[tap * w_stride + k]: the packed form holds them so; the plain form copies them once per call.
Tile      STRIPS strips, one below the other, of BLOCK_H rows x BLOCK_W columns of one image, x BLOCK_C channels. A
          thread holds a 16-byte vector of channels of one column of a strip, BLOCK_H rows of it in registers: a row of
          the input is loaded and converted once per filter column, for all the rows that it goes into.
Grid      one axis: a tile a program, channel blocks fastest, so that programs in flight together share rows in L2.
Bytes     ideally every tensor once. Really the input's halo once more from L2: times
          (1 + (k - s) / (s STRIPS BLOCK_H)) (1 + (k - s) / (s BLOCK_W)), k the filter's extent and s the stride.
Numbers   float32, bfloat16, float16 with float32 arithmetic, float64 in float64; nothing is rounded in between.
Addresses Offsets of an image, row or pixel are int64, so tensors may exceed 2^31 elements; each dimension, the number
          of tiles and w_stride * taps stay below 2^31.
Repeats   No atomics: every sum has a fixed order, which depends on shapes (the weight gradient's on the configuration,
          too), not on scheduling.
Registers and shared memory per target: docs/kernels.md.
"""

import torch
import triton
import triton.language as tl

from .activation import RELU6, activate, activate_loaded, gate, scaled
from .channels import load_channels, store_sums
from .configurations import configuration, launch
from .depthwise_conv2d_weight import weight_gradient
from .launch import dense, memory_format, output_size, vector
from .packing import accumulator, pack_depthwise_conv2d, taps_major, unpack_depthwise
from .spatial import SIZES, geometry, hits, locate, spatial_blocks, spatial_grid, strides, sums_of_tiles

__all__ = [
    "depthwise_conv2d",
    "depthwise_conv2d_backward",
    "depthwise_conv2d_backward_input",
    "depthwise_conv2d_backward_weight",
    "depthwise_conv2d_packed",
    "pack_depthwise_conv2d",
]


@triton.jit
def windows(
    p_x, b_scale, b_shift, weight, top, left, o_k, m_k, H, W, x_h, x_w, w_stride,
    KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    PRE_ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_H rows of outputs, [BP, BC] each, whose windows begin at row `top` + 0, STRIDE_H, ... and column `left`.

    p_x [BP, BC]: where the first window begins, padding included. b_scale, b_shift: of x, [1, BC] or None.
    """
    accs = (tl.zeros((BLOCK_P, BLOCK_C), weight.dtype.element_ty),) * BLOCK_H
    for j in range(KW):
        m_w = (left + j * DILATION_W >= 0) & (left + j * DILATION_W < W)
        b_w = ()
        for i in tl.static_range(KH):
            b_w = b_w + (tl.load(weight + (i * KW + j) * w_stride + o_k, m_k, 0.0)[None, :],)
        for r in tl.static_range((BLOCK_H - 1) * STRIDE_H + (KH - 1) * DILATION_H + 1):
            m_x = (m_w & (top + r >= 0) & (top + r < H))[:, None]
            b_x = tl.load(p_x + (r * x_h + j * DILATION_W * x_w), m_x & m_k[None, :], 0.0).to(weight.dtype.element_ty)
            b_x = activate_loaded(b_x, m_x, PRE_ACTIVATION, b_scale, b_shift)
            for o in tl.static_range(BLOCK_H):
                if hits(r - o * STRIDE_H, KH, DILATION_H):
                    b_y = accs[o] + b_x * b_w[(r - o * STRIDE_H) // DILATION_H]
                    accs = accs[:o] + (b_y,) + accs[o + 1 :]
    return accs


# Forward. With `grad` it stores grad * activation'(...) instead of the activation: what the gradients start from; with
# `share` (grad + share[image, channel] / pixels) * activation'(...). With `partial` the sums over the tile's pixels of
# y as it is stored, partial[tile, k], or with SQUARES those and the sums of y * y, partial[tile, 0 and 1, k].
@triton.jit(do_not_specialize=SIZES)
def depthwise_conv2d_fwd_kernel(
    x, weight, bias, scale, shift, grad, share, y, partial, H, W, OH, OW, pad_top, pad_left, vectors, w_stride,
    VECTOR: tl.constexpr, MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    PRE_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr, SQUARES: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    STRIPS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    K = vectors * VECTOR  # in two factors, so that the compiler knows how rows are aligned
    C = K // MULTIPLIER
    i_n, o_s, o_w, o_k = locate(K, OH, OW, BLOCK_C, STRIPS, BLOCK_H, BLOCK_W)
    m_k = o_k < K
    top = o_s * BLOCK_H * STRIDE_H - pad_top  # [BP]
    left = o_w * STRIDE_W - pad_left
    x_c, x_h, x_w = strides(C, H, W, CHANNELS_LAST)
    p_x = x + ((i_n * C * H * W + top * x_h + left * x_w)[:, None] + (o_k // MULTIPLIER * x_c)[None, :])  # [BP, BC]
    b_scale = load_channels(scale, o_k // MULTIPLIER, m_k)
    b_shift = load_channels(shift, o_k // MULTIPLIER, m_k)

    accs = windows(
        p_x, b_scale, b_shift, weight, top, left, o_k, m_k, H, W, x_h, x_w, w_stride, KH, KW,
        STRIDE_H, DILATION_H, DILATION_W, PRE_ACTIVATION, STRIPS * BLOCK_W, BLOCK_H, BLOCK_C,
    )  # fmt: skip
    b_bias = 0.0
    if bias is not None:
        b_bias = tl.load(bias + o_k, m_k, 0.0).to(weight.dtype.element_ty)[None, :]
    if share is not None:
        b_share = tl.load(share + i_n * K + o_k, m_k, 0.0).to(weight.dtype.element_ty)[None, :] / (OH * OW)
    if partial is not None:
        b_sum = tl.zeros((STRIPS * BLOCK_W, BLOCK_C), weight.dtype.element_ty)
        b_squares = b_sum if SQUARES else None
    y_c, y_h, y_w = strides(K, OH, OW, CHANNELS_LAST)
    o_h = o_s * BLOCK_H
    o_y = (i_n * K * OH * OW + o_h * y_h + o_w * y_w)[:, None] + (o_k * y_c)[None, :]  # [BP, BC]
    for o in tl.static_range(BLOCK_H):
        m_p = ((o_h + o < OH) & (o_w < OW))[:, None]
        m_y = m_p & m_k[None, :]
        b_y = accs[o] + b_bias
        if grad is None:
            b_y = activate(b_y, ACTIVATION)
        else:
            b_g = tl.load(grad + (o_y + o * y_h), m_y, 0.0).to(b_y.dtype)
            if share is not None:
                b_g += b_share
            b_y = gate(b_y, b_g, ACTIVATION)
        b_stored = b_y.to(y.dtype.element_ty)
        tl.store(y + (o_y + o * y_h), b_stored, m_y)
        if partial is not None:
            b_y = tl.where(m_p, b_stored, 0.0).to(b_sum.dtype)
            b_sum += b_y
            if SQUARES:
                b_squares += b_y * b_y
    if partial is not None:
        store_sums(partial, tl.program_id(0) // tl.cdiv(K, BLOCK_C), K, o_k, m_k, b_sum, b_squares)


# Gradient of x: each of its pixels gathers the outputs that it went into. A strip starts at a row that, padding
# included, is a multiple of the stride, and BLOCK_H is one too: which rows of outputs hit which of its rows is then
# known at compile time. Of the columns a stride s leaves one in s; the others cost an instruction, no byte.
# With `partial` the gradients of scale and shift, summed over the tile's pixels: partial[tile, 0 and 1, c].
# Bytes ideally grad and grad_x once, and x where pre_activation or the gradient of scale needs it.
@triton.jit(do_not_specialize=SIZES)
def depthwise_conv2d_bwd_input_kernel(
    grad, x, weight, scale, shift, grad_x, partial, H, W, OH, OW, pad_top, pad_left, vectors, w_stride,
    VECTOR: tl.constexpr, MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    PRE_ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    STRIPS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = vectors * VECTOR
    above = pad_top % STRIDE_H  # rows of the first tile that lie in the padding
    i_n, o_s, o_w, o_c = locate(C, H + above, W, BLOCK_C, STRIPS, BLOCK_H, BLOCK_W)
    m_c = o_c < C
    FIRST: tl.constexpr = (KH - 1) * DILATION_H // STRIDE_H  # rows of outputs needed before the tile's own
    first_row = o_s * (BLOCK_H // STRIDE_H) + pad_top // STRIDE_H - FIRST  # [BP]
    g_c, g_h, g_w = strides(C * MULTIPLIER, OH, OW, CHANNELS_LAST)
    p_g = grad + (i_n * C * MULTIPLIER * OH * OW + first_row * g_h)  # [BP]

    accs = (tl.zeros((STRIPS * BLOCK_W, BLOCK_C), weight.dtype.element_ty),) * BLOCK_H
    for m in range(MULTIPLIER):
        o_k = o_c * MULTIPLIER + m
        for j in range(KW):
            t_w = o_w + pad_left - j * DILATION_W  # STRIDE_W * column of outputs, where it is one
            m_w = (t_w >= 0) & (t_w % STRIDE_W == 0) & (t_w // STRIDE_W < OW)
            p_j = (p_g + t_w // STRIDE_W * g_w)[:, None] + (o_k * g_c)[None, :]  # [BP, BC]
            b_w = ()
            for i in tl.static_range(KH):
                b_w = b_w + (tl.load(weight + (i * KW + j) * w_stride + o_k, m_c, 0.0)[None, :],)
            for r in tl.static_range(FIRST + BLOCK_H // STRIDE_H):
                m_g = (m_w & (first_row + r >= 0) & (first_row + r < OH))[:, None] & m_c[None, :]
                b_g = tl.load(p_j + r * g_h, m_g, 0.0).to(weight.dtype.element_ty)
                for o in tl.static_range(BLOCK_H):
                    if hits(o - (r - FIRST) * STRIDE_H, KH, DILATION_H):
                        b_x = accs[o] + b_g * b_w[(o - (r - FIRST) * STRIDE_H) // DILATION_H]
                        accs = accs[:o] + (b_x,) + accs[o + 1 :]

    x_c, x_h, x_w = strides(C, H, W, CHANNELS_LAST)
    o_h = o_s * BLOCK_H - above
    o_x = (i_n * C * H * W + o_h * x_h + o_w * x_w)[:, None] + (o_c * x_c)[None, :]  # [BP, BC]
    b_scale = load_channels(scale, o_c, m_c)
    b_shift = load_channels(shift, o_c, m_c)
    if partial is not None:
        b_of_scale = tl.zeros((STRIPS * BLOCK_W, BLOCK_C), weight.dtype.element_ty)
        b_of_shift = b_of_scale
    for o in tl.static_range(BLOCK_H):
        m_p = ((o_h + o >= 0) & (o_h + o < H) & (o_w < W))[:, None]
        m_x = m_p & m_c[None, :]
        b_g = accs[o]
        if (PRE_ACTIVATION != 0) | (partial is not None):
            b_x = tl.load(x + (o_x + o * x_h), m_x, 0.0).to(b_g.dtype)
        if PRE_ACTIVATION != 0:
            b_g = gate(scaled(b_x, b_scale, b_shift), b_g, PRE_ACTIVATION)
        if partial is not None:
            b_g = tl.where(m_p, b_g, 0.0)
            b_of_scale += b_g * b_x
            b_of_shift += b_g
        if grad_x is not None:
            if scale is not None:
                b_g *= b_scale
            tl.store(grad_x + (o_x + o * x_h), b_g.to(grad_x.dtype.element_ty), m_x)
    if partial is not None:
        store_sums(partial, tl.program_id(0) // tl.cdiv(C, BLOCK_C), C, o_c, m_c, b_of_scale, b_of_shift)


def forward(x, rows, bias, grad, K, kernel, stride, padding, dilation, pre_activation, activation, dtype=None):
    """The op on taps-major weights, of `dtype`, else x's; or with `grad` the gradient before the activation."""
    return forward_and_sums(
        x, rows, bias, grad, K, kernel, stride, padding, dilation, pre_activation, activation, dtype=dtype
    )[0]


def forward_and_sums(
    x, rows, bias, grad, K, kernel, stride, padding, dilation, pre_activation, activation,
    scale=None, shift=None, share=None, sums=0, dtype=None,
):  # fmt: skip
    """(what forward gives for x * scale + shift, partial sums [N, tiles, sums * K] or None).

    sums: 0, 1 (of y) or 2 (besides of y * y). share: the gradient of each image's means, [N, K].
    """
    x, channels_last = dense(x)
    N, C, H, W = x.shape
    OH, OW, top, left = output_size((H, W), kernel, stride, padding, dilation)
    # What a clamp lets through of a gradient fits grad's dtype; times another slope it doesn't.
    if dtype is None:
        dtype = x.dtype if grad is None or (activation <= RELU6.value and share is None) else accumulator(x)
    y = torch.empty((N, K, OH, OW), dtype=dtype, device=x.device, memory_format=memory_format(channels_last))
    if y.numel() == 0:
        return y, None if sums == 0 else rows.new_empty((N, 0, sums * K))
    if grad is not None:
        grad, _ = dense(grad, like=x)
    blocks = configuration(
        depthwise_conv2d_fwd_kernel, x,
        lambda: spatial_blocks(K, OH, OW, x, channels_last, kernel[0], stride_h=stride[0]),
        K=K, height=OH, width=OW, channels_last=channels_last, **geometry(kernel, stride, dilation, K // C),
        prologue=scale is not None, sums=sums,
    )  # fmt: skip
    v = vector(K, x) if channels_last else 1
    partial = sums_of_tiles(x, spatial_grid(N, OH, OW, K, blocks), K, blocks, sums)
    with torch.cuda.device_of(x):
        launch(
            depthwise_conv2d_fwd_kernel, blocks, lambda b: spatial_grid(N, OH, OW, K, b),
            x, rows, bias, scale, shift, grad, share, y, partial, H, W, OH, OW, top, left, K // v, rows.stride(0),
            VECTOR=v, PRE_ACTIVATION=pre_activation, ACTIVATION=activation, SQUARES=sums == 2,
            CHANNELS_LAST=channels_last, **geometry(kernel, stride, dilation, K // C),
            vary=("BLOCK_C",) if sums else ("STRIPS", "BLOCK_H", "BLOCK_W", "BLOCK_C"),
        )  # fmt: skip
    return y, partial


def depthwise_conv2d(x, weight, bias, stride, padding, dilation, pre_activation, activation):
    K, _, *kernel = weight.shape
    rows = taps_major(weight, accumulator(x))
    return forward(x, rows, bias, None, K, kernel, stride, padding, dilation, pre_activation, activation)


def depthwise_conv2d_packed(
    x, packed, out_channels, kernel_size, stride, padding, dilation, pre_activation, activation
):
    bias, rows = unpack_depthwise(packed, x, out_channels, kernel_size)
    return forward(
        x, rows, bias, None, out_channels, kernel_size, stride, padding, dilation, pre_activation, activation
    )


def before_activation(grad, x, rows, bias, K, kernel, stride, padding, dilation, pre_activation, activation):
    """grad * activation'(what entered it), recomputed, unrounded."""
    if activation == 0:
        return grad
    return forward(x, rows, bias, grad, K, kernel, stride, padding, dilation, pre_activation, activation)


def input_gradient(grad, x, rows, K, kernel, stride, padding, dilation, pre_activation, dtype=None):
    """Of `dtype`, else x's."""
    return input_gradient_and_sums(
        grad, x, rows, K, kernel, stride, padding, dilation, pre_activation, dtype=dtype
    )[0]  # fmt: skip


def input_gradient_and_sums(
    grad, x, rows, K, kernel, stride, padding, dilation, pre_activation,
    scale=None, shift=None, grad_x_wanted=True, sums_wanted=False, dtype=None,
):  # fmt: skip
    """(gradient of x, partial sums [N, tiles, 2 C] of those of scale and shift), None where not wanted."""
    x, channels_last = dense(x)
    grad, _ = dense(grad, like=x)
    N, C, H, W = x.shape
    OH, OW, top, left = output_size((H, W), kernel, stride, padding, dilation)
    grad_x = None
    if grad_x_wanted:
        shape, format_ = x.shape, memory_format(channels_last)
        grad_x = torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=format_)
    if x.numel() == 0:
        return grad_x, rows.new_empty((N, 0, 2 * C)) if sums_wanted else None
    blocks = configuration(
        depthwise_conv2d_bwd_input_kernel, x,
        lambda: spatial_blocks(C, H, W, x, channels_last, kernel[0], row_multiple=stride[0]),
        C=C, height=H, width=W, channels_last=channels_last, **geometry(kernel, stride, dilation, K // C),
        prologue=scale is not None, sums=sums_wanted,
    )  # fmt: skip
    v = vector(C, x) if channels_last else 1
    rows_of_x = H + top % stride[0]
    partial = sums_of_tiles(x, spatial_grid(N, rows_of_x, W, C, blocks), C, blocks, 2 if sums_wanted else 0)
    with torch.cuda.device_of(x):
        launch(
            depthwise_conv2d_bwd_input_kernel, blocks, lambda b: spatial_grid(N, rows_of_x, W, C, b),
            grad, x, rows, scale, shift, grad_x, partial, H, W, OH, OW, top, left, C // v, rows.stride(0), VECTOR=v,
            PRE_ACTIVATION=pre_activation, CHANNELS_LAST=channels_last,
            **geometry(kernel, stride, dilation, K // C),
            vary=("BLOCK_C",) if sums_wanted else ("STRIPS", "BLOCK_W", "BLOCK_C"),  # BLOCK_H: see there
        )  # fmt: skip
    return grad_x, partial


def depthwise_conv2d_backward_input(grad, x, weight, bias, stride, padding, dilation, pre_activation, activation):
    return depthwise_conv2d_backward(
        grad, x, weight, bias, stride, padding, dilation, pre_activation, activation, output_mask=0b001
    )[0]


def depthwise_conv2d_backward_weight(grad, x, weight, bias, stride, padding, dilation, pre_activation, activation):
    """(gradient of weight, of bias: 0 elements where there is none)."""
    return depthwise_conv2d_backward(
        grad, x, weight, bias, stride, padding, dilation, pre_activation, activation, output_mask=0b110
    )[1:]


def depthwise_conv2d_backward(
    grad, x, weight, bias, stride, padding, dilation, pre_activation, activation, output_mask
):
    """Gradients of (x, weight, bias): 0 elements for one that output_mask leaves out or that has no bias to go to."""
    K, _, *kernel = weight.shape
    rows = taps_major(weight, accumulator(x))
    grad = before_activation(grad, x, rows, bias, K, kernel, stride, padding, dilation, pre_activation, activation)
    grads = [x.new_empty(0), weight.new_empty(0), x.new_empty(0) if bias is None else bias.new_empty(0)]
    if output_mask & 0b001:
        grads[0] = input_gradient(grad, x, rows, K, kernel, stride, padding, dilation, pre_activation)
    if output_mask & 0b110:
        grad_weight, grad_bias = weight_gradient(grad, x, weight, bias, stride, padding, dilation, pre_activation)
        if output_mask & 0b010:
            grads[1] = grad_weight
        if output_mask & 0b100 and bias is not None:
            grads[2] = grad_bias
    return tuple(grads)
