"""Gradients of depthwise convolution's weight and bias; layout, numbers and addresses: depthwise_conv2d.py."""

import torch
import triton
import triton.language as tl

from .activation import activate_loaded
from .channels import load_channels
from .configurations import configuration, launch
from .launch import cdiv, dense, fitting_power, output_size, vector
from .packing import accumulator, padded
from .spatial import SIZES, geometry, hits, strides


@triton.jit
def add_row(
    sums, p_x, o_r, b_g, r, there, left, W, x_w, m_k, b_scale, b_shift,
    KW: tl.constexpr, STRIDE_H: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    PRE_ACTIVATION: tl.constexpr, TAP_ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The sums of all taps with what row r of x, counted from the first tap's first, adds to them."""
    for j in tl.static_range(KW):
        m_w = there & (left + j * DILATION_W >= 0) & (left + j * DILATION_W < W)
        b_x = tl.load(p_x + (o_r + j * DILATION_W * x_w), m_w[:, None] & m_k[None, :], 0.0).to(sums[0].dtype)
        b_x = activate_loaded(b_x, m_w[:, None], PRE_ACTIVATION, b_scale, b_shift)
        for i in tl.static_range(TAP_ROWS):
            if hits(r - i * DILATION_H, BLOCK_H, STRIDE_H):
                b_sum = sums[i * KW + j] + b_x * b_g[(r - i * DILATION_H) // STRIDE_H]
                sums = sums[: i * KW + j] + (b_sum,) + sums[i * KW + j + 1 :]
    return sums


# Gradients of weight and bias, first stage: TAP_ROWS rows of the filter, summed over `tiles` tiles of outputs that lie
# below each other (and on into the next image). A running sum per tap and element of a tile's row stays in registers;
# weight_blocks chooses the row so short that they fit.
# Grid  (channel block, group of filter rows, column block, chunk of tiles), the first fastest.
# Bytes ideally x and grad once; really besides the partial sums, (TAP_ROWS * KW + 1) * BLOCK_C a program, and x and
#       grad once more per further group of filter rows (one group up to 7 x 7).
# partial[(chunk, column block), tap or (last) bias, k]: the second stage is the kernel below.
# An Inf or NaN of x reaches all taps of its channel where a tile sticks out over the last row or column.
@triton.jit(do_not_specialize=SIZES + ["tiles_total", "tiles"])
def depthwise_conv2d_bwd_weight_kernel(
    grad, x, scale, shift, partial, H, W, OH, OW, pad_top, pad_left, tiles_total, tiles, vectors, w_stride,
    VECTOR: tl.constexpr, MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    PRE_ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    TAP_ROWS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    K = vectors * VECTOR
    C = K // MULTIPLIER
    n_c = tl.cdiv(K, BLOCK_C)
    n_i: tl.constexpr = (KH + TAP_ROWS - 1) // TAP_ROWS
    n_h = tl.cdiv(OH, BLOCK_H)
    n_w = tl.cdiv(OW, BLOCK_W)
    i_sum = tl.program_id(0) // (n_c * n_i)  # (chunk of tiles, column block)
    first_tap_row = tl.program_id(0) // n_c % n_i * TAP_ROWS
    o_k = tl.program_id(0) % n_c * BLOCK_C + tl.arange(0, BLOCK_C)  # [BC]
    m_k = o_k < K
    o_w = i_sum % n_w * BLOCK_W + tl.arange(0, BLOCK_W)  # [BW]
    left = o_w * STRIDE_W - pad_left
    x_c, x_h, x_w = strides(C, H, W, CHANNELS_LAST)
    g_c, g_h, g_w = strides(K, OH, OW, CHANNELS_LAST)
    p_x = x + ((left * x_w)[:, None] + (o_k // MULTIPLIER * x_c)[None, :])  # [BW, BC]
    p_g = grad + ((o_w * g_w)[:, None] + (o_k * g_c)[None, :])
    b_scale = load_channels(scale, o_k // MULTIPLIER, m_k)
    b_shift = load_channels(shift, o_k // MULTIPLIER, m_k)

    zero = tl.zeros((BLOCK_W, BLOCK_C), partial.dtype.element_ty)
    sums = (zero,) * (TAP_ROWS * KW)
    sum_g = zero
    first_tile = i_sum // n_w * tiles
    for i_tile in range(first_tile, tl.minimum(first_tile + tiles, tiles_total)):
        i_n = (i_tile // n_h).to(tl.int64)
        i_h = i_tile % n_h * BLOCK_H
        b_g = ()
        for o in tl.static_range(BLOCK_H):
            m_g = ((i_h + o < OH) & (o_w < OW))[:, None] & m_k[None, :]
            b_g = b_g + (tl.load(p_g + (i_n * K * OH * OW + (i_h + o) * g_h), m_g, 0.0).to(zero.dtype),)
            sum_g += b_g[o]
        top = i_h * STRIDE_H - pad_top + first_tap_row * DILATION_H
        for r in tl.static_range((BLOCK_H - 1) * STRIDE_H + (TAP_ROWS - 1) * DILATION_H + 1):
            o_r = i_n * C * H * W + (top + r) * x_h
            m_r = (top + r >= 0) & (top + r < H)
            if (scale is None) | (zero.dtype == tl.float64):
                sums = add_row(
                    sums, p_x, o_r, b_g, r, m_r, left, W, x_w, m_k, b_scale, b_shift, KW, STRIDE_H, DILATION_H,
                    DILATION_W, PRE_ACTIVATION, TAP_ROWS, BLOCK_H,
                )  # fmt: skip
            elif m_r:  # a branch: masks that are kept from load to product, of all rows, take too many registers
                sums = add_row(
                    sums, p_x, o_r, b_g, r, True, left, W, x_w, m_k, b_scale, b_shift, KW, STRIDE_H, DILATION_H,
                    DILATION_W, PRE_ACTIVATION, TAP_ROWS, BLOCK_H,
                )  # fmt: skip

    p_out = partial + i_sum.to(tl.int64) * (KH * KW + 1) * w_stride + o_k
    for i in tl.static_range(TAP_ROWS):
        for j in tl.static_range(KW):
            i_tap = (first_tap_row + i) * KW + j
            tl.store(p_out + i_tap * w_stride, tl.sum(sums[i * KW + j], 0), m_k & (i_tap < KH * KW))
    tl.store(p_out + KH * KW * w_stride, tl.sum(sum_g, 0), m_k & (first_tap_row == 0))


# Second stage: the partial sums added up in the order of their chunks, stored in the weight's layout and dtype.
# Tile BLOCK_C channels of one tap (or of the bias);  grid (channel block, tap);  bytes partial once.
@triton.jit(do_not_specialize=["chunks", "K"])
def depthwise_conv2d_bwd_weight_sum_kernel(
    partial, grad_weight, grad_bias, chunks, K, w_stride,
    TAPS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tap = tl.program_id(1)
    o_k = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_s = tl.arange(0, BLOCK_S)
    acc = tl.zeros((BLOCK_S, BLOCK_C), partial.dtype.element_ty)
    for s in range(0, chunks, BLOCK_S):
        p_s = partial + (((s + o_s).to(tl.int64) * (TAPS + 1) + tap) * w_stride)[:, None] + o_k[None, :]
        acc += tl.load(p_s, (s + o_s < chunks)[:, None] & (o_k < w_stride)[None, :], 0.0)
    total = tl.sum(acc, 0)
    tl.store(grad_weight + o_k * TAPS + tap, total.to(grad_weight.dtype.element_ty), (o_k < K) & (tap < TAPS))
    if grad_bias is not None:
        tl.store(grad_bias + o_k, total.to(grad_bias.dtype.element_ty), (o_k < K) & (tap == TAPS))


def weight_blocks(channels, kernel, height, width, x, channels_last, stride_h, grad=None):
    """Tile of the weight-gradient kernel: a thread holds about 100 registers of running sums, whatever the filter.

    Only 80, and one vector of x at most, unless x comes as 16-bit pairs: the compiler has many loads in flight, and
    those of wider elements, or of single ones (NCHW), take a register an element; with 100 sums beside them it spills.
    5x5 at stride 1 in float32 is an exception, which doesn't, and whose loads stay 16 bytes wide; not so beside a grad
    of another dtype (float32, behind a curved activation), of which the wider one counts.
    """
    mixed = grad is not None and grad.dtype != x.dtype
    x = max(x, grad, key=torch.Tensor.element_size) if mixed else x
    tap_rows = kernel[0] if kernel[0] * kernel[1] <= 49 else max(49 // kernel[1], 1)
    per_thread = 16 // x.element_size() if channels_last else 4
    registers = 2 if x.dtype == torch.float64 else 1
    fits = x.element_size() == 2 or (x.element_size() == 4 and stride_h == 1 and max(kernel) <= 5)
    most = 100 if channels_last and fits and not mixed else 80
    while per_thread > 1 and per_thread * tap_rows * kernel[1] * registers > most:
        per_thread //= 2
    block_c = fitting_power(channels, 16, 64 if channels_last else 16)
    block_w = fitting_power(width, 8, min(max(128 * per_thread // block_c, 1), 32))
    warps = min(max(block_w * block_c // (32 * per_thread), 1), 4)
    block_h = min(max(4 // (stride_h * registers), 1), height)
    return dict(TAP_ROWS=tap_rows, BLOCK_H=block_h, BLOCK_W=block_w, BLOCK_C=block_c, num_warps=warps)


def weight_gradient(grad, x, weight, bias, stride, padding, dilation, pre_activation, scale=None, shift=None):
    """(gradient of weight, of bias or None), both from one pass over grad and x."""
    x, channels_last = dense(x)
    grad, _ = dense(grad, like=x)
    K, _, *kernel = weight.shape
    N, C, H, W = x.shape
    OH, OW, top, left = output_size((H, W), kernel, stride, padding, dilation)
    taps = kernel[0] * kernel[1]
    blocks = configuration(
        depthwise_conv2d_bwd_weight_kernel, x,
        lambda: weight_blocks(K, kernel, OH, OW, x, channels_last, stride[0], grad),
        K=K, height=OH, width=OW, channels_last=channels_last, mixed=grad.dtype != x.dtype,
        prologue=scale is not None,
        **geometry(kernel, stride, dilation, K // C),
    )  # fmt: skip
    n_w = cdiv(OW, blocks["BLOCK_W"])
    programs = cdiv(K, blocks["BLOCK_C"]) * cdiv(kernel[0], blocks["TAP_ROWS"]) * n_w  # per chunk of tiles
    tiles_total = N * cdiv(OH, blocks["BLOCK_H"])
    tiles = max(cdiv(tiles_total * programs, 2048), 2)  # of a program: fills a large GPU, yet pays for the partial sums
    chunks = cdiv(tiles_total, tiles)
    v = vector(K, x) if channels_last else 1
    partial = torch.empty((chunks * n_w, taps + 1, padded(K)), dtype=accumulator(x), device=x.device)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = None if bias is None else torch.empty_like(bias)
    with torch.cuda.device_of(x):
        if partial.numel():
            launch(
                depthwise_conv2d_bwd_weight_kernel, blocks, lambda _: (chunks * programs,),
                grad, x, scale, shift, partial, H, W, OH, OW, top, left, tiles_total, tiles, K // v, partial.stride(1),
                VECTOR=v, PRE_ACTIVATION=pre_activation, CHANNELS_LAST=channels_last,
                **geometry(kernel, stride, dilation, K // C),
            )  # fmt: skip
        depthwise_conv2d_bwd_weight_sum_kernel[(cdiv(K, 32), taps + 1)](
            partial, grad_weight, grad_bias, partial.shape[0], K, partial.stride(1),
            TAPS=taps, BLOCK_S=16, BLOCK_C=32, num_warps=4,
        )  # fmt: skip
    return grad_weight, grad_bias
