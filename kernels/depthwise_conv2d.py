"""Depthwise convolution, forward and both gradients: y = activation(depthwise(pre_activation(x), weight) + bias).

Layout    x (N, C, H, W) dense, channels_last (the fast path: 16-byte loads along C) or NCHW; y in x's format.
          Output channel k reads input channel k // MULTIPLIER. Weights always arrive taps-major in the accumulator's
          dtype, weight[tap * w_stride + k]: the packed form holds them so; the plain form copies them once per call.
Numbers   float32, bfloat16, float16 with float32 arithmetic, float64 in float64; nothing is rounded in between.
Addresses Offsets of an image, row or pixel are int64, so tensors may exceed 2^31 elements; each dimension, N * OH and
          N * H stay below 2^31.
Repeats   No atomics: every sum has a fixed order, which depends on shapes, not on the device or on scheduling.
"""

import struct

import torch
import triton
import triton.language as tl

from .activation import activate, gate
from .launch import cdiv, channel_block, dense, memory_format, next_power_of_2, output_size, vector

SIZES = ["H", "W", "OH", "OW", "pad_top", "pad_left", "vectors"]  # one compiled kernel serves every size


@triton.jit
def pixel_strides(C, H, W, CHANNELS_LAST: tl.constexpr):
    """Strides of (channel, row, column) in elements, int64."""
    if CHANNELS_LAST:
        return 1, tl.cast(W, tl.int64) * C, tl.cast(C, tl.int64)
    else:
        return tl.cast(H, tl.int64) * W, tl.cast(W, tl.int64), 1


@triton.jit
def spatial_tile(OH, OW, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, i_tile):
    """(image, rows [BP], columns [BP]) of tile i_tile, BP = BLOCK_H * BLOCK_W pixels in row order."""
    n_h = tl.cdiv(OH, BLOCK_H)
    n_w = tl.cdiv(OW, BLOCK_W)
    o_p = tl.arange(0, BLOCK_H * BLOCK_W)
    o_h = (i_tile // n_w) % n_h * BLOCK_H + o_p // BLOCK_W
    o_w = i_tile % n_w * BLOCK_W + o_p % BLOCK_W
    return (i_tile // (n_w * n_h)).to(tl.int64), o_h, o_w


# Tile   BLOCK_H x BLOCK_W output pixels of one image, BLOCK_C output channels.
# Grid   one program a tile, channel blocks fastest, so that programs in flight together share rows of x in L2.
# Bytes  ideally x + y + weights once. Really x times (1 + (k - s) / (s BLOCK_H)) (1 + (k - s) / (s BLOCK_W)) from L2,
#        its halo twice from DRAM only where L2 has lost it, and x KH * KW / (SH * SW) times from L1.
# With `grad` it stores grad * activation'(...) instead of the activation: what the gradients start from.
@triton.jit(do_not_specialize=SIZES)
def depthwise_conv2d_fwd_kernel(
    x, weight, bias, grad, y, H, W, OH, OW, pad_top, pad_left, vectors, w_stride,
    VECTOR: tl.constexpr, MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    PRE_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    K = vectors * VECTOR  # in two factors, so that the compiler knows how the rows are aligned
    C = K // MULTIPLIER
    n_c = tl.cdiv(K, BLOCK_C)
    o_k = tl.program_id(0) % n_c * BLOCK_C + tl.arange(0, BLOCK_C)  # [BC]
    m_k = o_k < K
    i_n, o_h, o_w = spatial_tile(OH, OW, BLOCK_H, BLOCK_W, tl.program_id(0) // n_c)
    top = o_h * STRIDE_H - pad_top  # [BP]
    left = o_w * STRIDE_W - pad_left
    x_c, x_h, x_w = pixel_strides(C, H, W, CHANNELS_LAST)
    p_x = x + ((i_n * C * H * W + top * x_h + left * x_w)[:, None] + (o_k // MULTIPLIER * x_c)[None, :])  # [BP, BC]

    acc = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), weight.dtype.element_ty)
    for i in range(KH):
        m_h = (top + i * DILATION_H >= 0) & (top + i * DILATION_H < H)
        for j in tl.static_range(KW):
            m_x = m_h & (left + j * DILATION_W >= 0) & (left + j * DILATION_W < W)
            b_x = tl.load(p_x + i * DILATION_H * x_h + j * DILATION_W * x_w, m_x[:, None] & m_k[None, :], 0.0)
            b_w = tl.load(weight + (i * KW + j) * w_stride + o_k, m_k, 0.0)
            acc += activate(b_x.to(acc.dtype), PRE_ACTIVATION) * b_w[None, :]
    if bias is not None:
        acc += tl.load(bias + o_k, m_k, 0.0).to(acc.dtype)[None, :]

    y_c, y_h, y_w = pixel_strides(K, OH, OW, CHANNELS_LAST)
    o_y = (i_n * K * OH * OW + o_h * y_h + o_w * y_w)[:, None] + (o_k * y_c)[None, :]
    m_y = ((o_h < OH) & (o_w < OW))[:, None] & m_k[None, :]
    if grad is None:
        acc = activate(acc, ACTIVATION)
    else:
        acc = gate(acc, tl.load(grad + o_y, m_y, 0.0).to(acc.dtype), ACTIVATION)
    tl.store(y + o_y, acc.to(y.dtype.element_ty), m_y)


# Tile   BLOCK_H x BLOCK_W pixels of grad_x, BLOCK_C input channels; each gathers the outputs that it went into.
# Grid   as forward.
# Bytes  ideally grad + grad_x + weights once, and x where pre_activation needs it. With stride s only one tap in s * s
#        hits an output: the others cost an instruction, no byte.
@triton.jit(do_not_specialize=SIZES)
def depthwise_conv2d_bwd_input_kernel(
    grad, x, weight, grad_x, H, W, OH, OW, pad_top, pad_left, vectors, w_stride,
    VECTOR: tl.constexpr, MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    PRE_ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = vectors * VECTOR
    n_c = tl.cdiv(C, BLOCK_C)
    o_c = tl.program_id(0) % n_c * BLOCK_C + tl.arange(0, BLOCK_C)  # [BC]
    m_c = o_c < C
    i_n, o_h, o_w = spatial_tile(H, W, BLOCK_H, BLOCK_W, tl.program_id(0) // n_c)
    g_c, g_h, g_w = pixel_strides(C * MULTIPLIER, OH, OW, CHANNELS_LAST)
    p_g = grad + i_n * C * MULTIPLIER * OH * OW

    acc = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), weight.dtype.element_ty)
    for i in range(KH):
        t_h = o_h + pad_top - i * DILATION_H  # STRIDE_H * row of the output, if it is one
        m_h = (t_h >= 0) & (t_h % STRIDE_H == 0) & (t_h // STRIDE_H < OH)
        for j in tl.static_range(KW):
            t_w = o_w + pad_left - j * DILATION_W
            m_g = m_h & (t_w >= 0) & (t_w % STRIDE_W == 0) & (t_w // STRIDE_W < OW)
            o_g = t_h // STRIDE_H * g_h + t_w // STRIDE_W * g_w  # [BP]
            for m in tl.static_range(MULTIPLIER):
                o_k = o_c * MULTIPLIER + m
                b_g = tl.load(p_g + (o_g[:, None] + (o_k * g_c)[None, :]), m_g[:, None] & m_c[None, :], 0.0)
                b_w = tl.load(weight + (i * KW + j) * w_stride + o_k, m_c, 0.0)
                acc += b_g.to(acc.dtype) * b_w[None, :]

    x_c, x_h, x_w = pixel_strides(C, H, W, CHANNELS_LAST)
    o_x = (i_n * C * H * W + o_h * x_h + o_w * x_w)[:, None] + (o_c * x_c)[None, :]
    m_x = ((o_h < H) & (o_w < W))[:, None] & m_c[None, :]
    if PRE_ACTIVATION != 0:
        acc = gate(tl.load(x + o_x, m_x, 0.0).to(acc.dtype), acc, PRE_ACTIVATION)
    tl.store(grad_x + o_x, acc.to(grad_x.dtype.element_ty), m_x)


# Tile   TAP_ROWS rows of the filter times BLOCK_C output channels, summed over `rows` rows of outputs, BLOCK_W columns.
# Grid   (channel block, group of filter rows, column block, chunk of rows), the first fastest.
# Loop   down the rows: a row of grad once, its KH * KW windows of x from L1 but for the newest row. A running sum per
#        tap and element of the tile stays in registers: the tile is small so that TAP_ROWS * KW of them fit.
# Bytes  ideally x + grad once; really besides the partial sums, (TAP_ROWS * KW + 1) * BLOCK_C a program, and both once
#        more per group of filter rows (one group up to 7 x 7).
# partial[chunk, tap or (last) bias, k]: finished by the kernel below.
@triton.jit(do_not_specialize=SIZES + ["rows_total", "rows"])
def depthwise_conv2d_bwd_weight_kernel(
    grad, x, partial, H, W, OH, OW, pad_top, pad_left, rows_total, rows, vectors, w_stride,
    VECTOR: tl.constexpr, MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    PRE_ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    TAP_ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    K = vectors * VECTOR
    C = K // MULTIPLIER
    n_c = tl.cdiv(K, BLOCK_C)
    n_i: tl.constexpr = (KH + TAP_ROWS - 1) // TAP_ROWS
    n_w = tl.cdiv(OW, BLOCK_W)
    i_chunk = tl.program_id(0) // (n_c * n_i)  # counts (chunk of rows, column block)
    first_tap_row = tl.program_id(0) // n_c % n_i * TAP_ROWS
    o_k = tl.program_id(0) % n_c * BLOCK_C + tl.arange(0, BLOCK_C)  # [BC]
    m_k = o_k < K
    o_w = i_chunk % n_w * BLOCK_W + tl.arange(0, BLOCK_W)  # [BW]
    m_g = (o_w < OW)[:, None] & m_k[None, :]
    left = o_w * STRIDE_W - pad_left
    x_c, x_h, x_w = pixel_strides(C, H, W, CHANNELS_LAST)
    g_c, g_h, g_w = pixel_strides(K, OH, OW, CHANNELS_LAST)
    p_x = x + ((left * x_w)[:, None] + (o_k // MULTIPLIER * x_c)[None, :])  # [BW, BC]
    p_g = grad + ((o_w * g_w)[:, None] + (o_k * g_c)[None, :])

    zero = tl.zeros((BLOCK_W, BLOCK_C), partial.dtype.element_ty)
    sums = (zero,) * (TAP_ROWS * KW)
    sum_g = zero
    first_row = i_chunk // n_w * rows
    for row in range(first_row, tl.minimum(first_row + rows, rows_total)):
        i_n = (row // OH).to(tl.int64)
        i_h = row % OH
        b_g = tl.load(p_g + (i_n * K * OH * OW + i_h * g_h), m_g, 0.0).to(zero.dtype)
        sum_g += b_g
        new = ()
        for i in tl.static_range(TAP_ROWS):
            h = i_h * STRIDE_H - pad_top + (first_tap_row + i) * DILATION_H
            for j in tl.static_range(KW):
                m_w = (h >= 0) & (h < H) & (left + j * DILATION_W >= 0) & (left + j * DILATION_W < W)
                p_tap = p_x + (i_n * C * H * W + h * x_h + j * DILATION_W * x_w)
                b_x = tl.load(p_tap, m_w[:, None] & m_k[None, :], 0.0).to(zero.dtype)
                new = new + (sums[i * KW + j] + b_g * activate(b_x, PRE_ACTIVATION),)
        sums = new

    p_out = partial + i_chunk.to(tl.int64) * (KH * KW + 1) * w_stride + o_k
    for i in tl.static_range(TAP_ROWS):
        for j in tl.static_range(KW):
            tap = (first_tap_row + i) * KW + j
            tl.store(p_out + tap * w_stride, tl.sum(sums[i * KW + j], 0), m_k & (tap < KH * KW))
    tl.store(p_out + KH * KW * w_stride, tl.sum(sum_g, 0), m_k & (first_tap_row == 0))


# The second stage: partial sums added up in the order of their chunks, stored in the weight's layout and dtype.
# Tile   BLOCK channels of one tap (or of the bias);  grid (channel block, tap);  bytes  partial once.
@triton.jit(do_not_specialize=["chunks"])
def depthwise_conv2d_bwd_weight_sum_kernel(
    partial, grad_weight, grad_bias, chunks, K, w_stride,
    TAPS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tap = tl.program_id(1)
    o_k = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_k = o_k < K
    o_s = tl.arange(0, BLOCK_S)
    acc = tl.zeros((BLOCK_S, BLOCK_C), partial.dtype.element_ty)
    for s in range(0, chunks, BLOCK_S):
        p_s = partial + ((s + o_s).to(tl.int64) * (TAPS + 1) + tap)[:, None] * w_stride + o_k[None, :]
        acc += tl.load(p_s, (s + o_s < chunks)[:, None] & m_k[None, :], 0.0)
    total = tl.sum(acc, 0)
    tl.store(grad_weight + o_k * TAPS + tap, total.to(grad_weight.dtype.element_ty), m_k & (tap < TAPS))
    if grad_bias is not None:
        tl.store(grad_bias + o_k, total.to(grad_bias.dtype.element_ty), m_k & (tap == TAPS))


def taps_major(weight, x):
    """weight (K, 1, kh, kw) with any strides as [taps, K rounded up] in the accumulator's dtype, one small copy."""
    K, taps = weight.shape[0], weight.shape[2] * weight.shape[3]
    rows = torch.empty((taps, cdiv(K, PANEL) * PANEL), dtype=accumulator(x), device=x.device)
    rows[:, :K].copy_(weight.reshape(K, taps).t())
    return rows


def accumulator(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def spatial_blocks(channels, height, width, x, channels_last):
    """Tile of the forward and input-gradient kernels: up to 64 bytes of x a thread."""
    elements = 8192 // x.element_size()
    if channels_last:
        block_c = channel_block(channels, 64)
        block_w = min(8, next_power_of_2(width))
        block_h = min(max(elements // (block_c * block_w), 1), next_power_of_2(height))
    else:
        block_w = min(32, next_power_of_2(width))
        block_h = min(8, next_power_of_2(height))
        block_c = min(max(elements // 2 // (block_w * block_h), 1), next_power_of_2(channels))
    warps = min(max(block_h * block_w * block_c // (elements // 4), 1), 4)
    return dict(BLOCK_H=block_h, BLOCK_W=block_w, BLOCK_C=block_c, num_warps=warps)


def weight_blocks(channels, kernel, width, channels_last):
    """Tile of the weight-gradient kernel: a thread holds about 96 running sums, whatever the filter's size."""
    tap_rows = kernel[0] if kernel[0] * kernel[1] <= 49 else max(49 // kernel[1], 1)
    per_thread = min(max(next_power_of_2(104 // (tap_rows * kernel[1]) + 1) // 2, 1), 8)
    if channels_last:
        block_c = channel_block(channels, 64)
        block_w = min(max(128 * per_thread // block_c, 1), next_power_of_2(width))
    else:
        block_w = min(32, next_power_of_2(width))
        block_c = min(4 * per_thread, next_power_of_2(channels))
    warps = min(max(block_w * block_c // (32 * per_thread), 1), 4)
    return dict(TAP_ROWS=tap_rows, BLOCK_W=block_w, BLOCK_C=block_c, num_warps=warps)


def geometry(kernel, stride, dilation, multiplier):
    return dict(
        MULTIPLIER=multiplier, KH=kernel[0], KW=kernel[1], STRIDE_H=stride[0], STRIDE_W=stride[1],
        DILATION_H=dilation[0], DILATION_W=dilation[1],
    )  # fmt: skip


def forward(x, rows, bias, grad, K, kernel, stride, padding, dilation, pre_activation, activation):
    """The op on taps-major weights, or with `grad` the gradient before the activation."""
    x, channels_last = dense(x)
    N, C, H, W = x.shape
    OH, OW, top, left = output_size((H, W), kernel, stride, padding, dilation)
    y = torch.empty((N, K, OH, OW), dtype=x.dtype, device=x.device, memory_format=memory_format(channels_last))
    if y.numel() == 0:
        return y
    if grad is not None:
        grad, _ = dense(grad, like=x)
    blocks = spatial_blocks(K, OH, OW, x, channels_last)
    v = vector(K, x) if channels_last else 1
    grid = (N * cdiv(OH, blocks["BLOCK_H"]) * cdiv(OW, blocks["BLOCK_W"]) * cdiv(K, blocks["BLOCK_C"]),)
    with torch.cuda.device_of(x):
        depthwise_conv2d_fwd_kernel[grid](
            x, rows, bias, grad, y, H, W, OH, OW, top, left, K // v, rows.stride(0), VECTOR=v,
            PRE_ACTIVATION=pre_activation, ACTIVATION=activation, CHANNELS_LAST=channels_last,
            **geometry(kernel, stride, dilation, K // C), **blocks,
        )  # fmt: skip
    return y


def depthwise_conv2d(x, weight, bias, stride, padding, dilation, pre_activation, activation):
    K, _, *kernel = weight.shape
    rows = taps_major(weight, x)
    return forward(x, rows, bias, None, K, kernel, stride, padding, dilation, pre_activation, activation)


def before_activation(grad, x, rows, bias, K, kernel, stride, padding, dilation, pre_activation, activation):
    """grad * activation'(what entered it), recomputed; x's dtype holds it without rounding."""
    if activation == 0:
        return grad
    return forward(x, rows, bias, grad, K, kernel, stride, padding, dilation, pre_activation, activation)


def input_gradient(grad, x, rows, K, kernel, stride, padding, dilation, pre_activation):
    x, channels_last = dense(x)
    grad, _ = dense(grad, like=x)
    N, C, H, W = x.shape
    OH, OW, top, left = output_size((H, W), kernel, stride, padding, dilation)
    grad_x = torch.empty_like(x)
    if grad_x.numel() == 0:
        return grad_x
    blocks = spatial_blocks(C, H, W, x, channels_last)
    v = vector(C, x) if channels_last else 1
    grid = (N * cdiv(H, blocks["BLOCK_H"]) * cdiv(W, blocks["BLOCK_W"]) * cdiv(C, blocks["BLOCK_C"]),)
    with torch.cuda.device_of(x):
        depthwise_conv2d_bwd_input_kernel[grid](
            grad, x, rows, grad_x, H, W, OH, OW, top, left, C // v, rows.stride(0), VECTOR=v,
            PRE_ACTIVATION=pre_activation, CHANNELS_LAST=channels_last,
            **geometry(kernel, stride, dilation, K // C), **blocks,
        )  # fmt: skip
    return grad_x


def weight_gradient(grad, x, weight, bias, stride, padding, dilation, pre_activation):
    """(gradient of weight, of bias or None), both from one pass over grad and x."""
    x, channels_last = dense(x)
    grad, _ = dense(grad, like=x)
    K, _, *kernel = weight.shape
    N, C, H, W = x.shape
    OH, OW, top, left = output_size((H, W), kernel, stride, padding, dilation)
    taps = kernel[0] * kernel[1]
    blocks = weight_blocks(K, kernel, OW, channels_last)
    n_w = cdiv(OW, blocks["BLOCK_W"])
    programs = cdiv(K, blocks["BLOCK_C"]) * cdiv(kernel[0], blocks["TAP_ROWS"]) * n_w  # per chunk of rows
    chunks = min(max(2048 // programs, 1), cdiv(N * OH, 8))  # fills a large GPU, but at least 8 rows a program
    rows = cdiv(N * OH, chunks) if chunks else 0
    v = vector(K, x) if channels_last else 1
    partial = torch.empty((chunks * n_w, taps + 1, cdiv(K, PANEL) * PANEL), dtype=accumulator(x), device=x.device)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = None if bias is None else torch.empty_like(bias)
    with torch.cuda.device_of(x):
        if partial.numel():
            depthwise_conv2d_bwd_weight_kernel[(chunks * programs,)](
                grad, x, partial, H, W, OH, OW, top, left, N * OH, rows, K // v, partial.stride(1), VECTOR=v,
                PRE_ACTIVATION=pre_activation, CHANNELS_LAST=channels_last,
                **geometry(kernel, stride, dilation, K // C), **blocks,
            )  # fmt: skip
        depthwise_conv2d_bwd_weight_sum_kernel[(cdiv(K, 32), taps + 1)](
            partial, grad_weight, grad_bias, partial.shape[0], K, partial.stride(1),
            TAPS=taps, BLOCK_S=16, BLOCK_C=32, num_warps=4,
        )  # fmt: skip
    return grad_weight, grad_bias


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
    """Gradients of (x, weight, bias); one that output_mask leaves out, or of a bias that isn't there, has 0 elements."""
    K, _, *kernel = weight.shape
    rows = taps_major(weight, x)
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
