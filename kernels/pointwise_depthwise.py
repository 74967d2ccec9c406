"""A pointwise convolution and the depthwise one after it, in one pass:

    e = mid_activation(conv1x1(pre_activation(x), pw_weight) + pw_bias)
    y = activation(depthwise(e, dw_weight) + dw_bias + residual)

of which e is never in memory, and on request the sums of y over the pixels of each tile: squeeze-excite's squeeze.

Layout    x (N, C, H, W) dense, channels_last (the fast path) or NCHW; y in x's format. pw_weight [E, C] row by row;
          dw_weight taps-major, dw_weight[tap * w_stride + k]. Output channel k reads channel k // MULTIPLIER of e.
Tile      STRIPS strips, one below the other, of `rows` rows x BLOCK_W columns of one image, x BLOCK_E channels. A
          program goes down its strips, in registers the sums of the rows of y that e's present row goes into. Columns
          can't be shifted between threads: e is computed anew for each filter column, but once for all rows of the
          filter, so k (1 + (k - 1) / rows) times at stride 1, k the filter's extent.
Grid      one axis: a tile a program, channel blocks fastest, so that programs in flight together share x in L2.
Bytes     ideally every tensor once; really x as often from L1 or L2 as e is computed, for each block of channels.
Numbers   Products as pointwise_conv2d's: on tensor cores in x's dtype (float32 by TF32 where PyTorch's setting allows),
          else in float32, or float64; e and the sums are in the accumulator's dtype and never rounded. What a curved
          pre_activation makes of bfloat16 or float16 is rounded to it before the product on tensor cores.
Repeats   No atomics: every sum has a fixed order, which depends on an image's shape alone.
Addresses Offsets of an image, row or pixel are int64, so tensors may exceed 2^31 elements; each dimension, C E and the
          number of tiles stay below 2^31.
Registers and shared memory per target: docs/kernels.md.
"""

import functools

import torch
import triton
import triton.language as tl

from .activation import RELU6, activate, activate_loaded
from .channels import few_tiles
from .configurations import configuration, launch
from .launch import (
    cdiv,
    dense,
    fitting_power,
    kind_of,
    memory_format,
    next_power_of_2,
    output_size,
    vector,
)
from .packing import accumulator, taps_major
from .products import multiply_add, side, sums_in
from .spatial import geometry, hits, strides

__all__ = ["pointwise_depthwise", "recompute_pays"]

SIZES = ["H", "W", "OH", "OW", "pad_top", "pad_left", "columns", "rows", "c_vectors", "k_vectors"]
MOST_ROWS = 16  # of a strip: computes an eighth of e twice for a 3x3 filter


@triton.jit
def input_block(p_x, m_x, ACTIVATION: tl.constexpr):
    """What is at p_x, activated, in its own dtype; 0 where the mask isn't."""
    b_x = tl.load(p_x, m_x, 0.0)
    if ACTIVATION != 0:
        b_x = activate_loaded(b_x.to(sums_in(b_x.dtype)), m_x, ACTIVATION).to(b_x.dtype)
    return b_x


@triton.jit
def expanded(
    p_x, m_x, x_c, C, p_w, b_w, b_bias, m_e, PRE_ACTIVATION: tl.constexpr, MID_ACTIVATION: tl.constexpr,
    TENSOR_CORES: tl.constexpr, WHOLE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """e [BP, BE] of the pixels at p_x [BP], 0 where m_x isn't: padding is of e, not of x.

    p_w [BC, BE]: the weight's first BLOCK_C rows of channels; b_w: what is there, where those are the WHOLE of C.
    """
    o_c = tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_P, BLOCK_E), sums_in(p_x.dtype.element_ty))
    for c in range(0, 1 if WHOLE else C, BLOCK_C):
        m_c = c + o_c < C  # both sides: 0 times a neighbour's NaN is NaN
        b_x = input_block(p_x[:, None] + ((c + o_c) * x_c)[None, :], m_x[:, None] & m_c[None, :], PRE_ACTIVATION)
        b_c = b_w if WHOLE else tl.load(p_w + c, m_c[:, None] & m_e[None, :], 0.0)
        acc = multiply_add(b_x, b_c, acc, TENSOR_CORES)
    return tl.where(m_x[:, None], activate(acc + b_bias, MID_ACTIVATION), 0.0)


@triton.constexpr_function
def in_filter(row, count, step, stride):
    """Whether a filter of `count` rows, `step` apart, has one this far below a multiple of the stride."""
    return any(i * step % stride == row for i in range(count))


@triton.jit
def add_rows(
    accs, t, p_x, p_w, b_w, b_bias, taps, o_e, m_e, top, left, H, W, C, columns, w_stride, x_c, x_h, x_w,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    PRE_ACTIVATION: tl.constexpr, MID_ACTIVATION: tl.constexpr, TENSOR_CORES: tl.constexpr, WHOLE: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """accs with what rows t * STRIDE_H and following, STRIDE_H in all, of e below `top` [BP] give to them.

    accs[m] is of the output row t - m below the first; FIRST and LAST: those that are wanted. p_w None: of x, not e.
    """
    for q in tl.static_range(STRIDE_H):
        if in_filter(q, KH, DILATION_H, STRIDE_H):
            i_h = t * STRIDE_H + q
            for j in range(columns):  # KW: known at compile time LLVM would unroll it
                m_w = (left + j * DILATION_W >= 0) & (left + j * DILATION_W < W)
                m_x = m_w & (top + i_h >= 0) & (top + i_h < H)
                p_row = p_x + (i_h * x_h + j * DILATION_W * x_w)
                if p_w is None:
                    b_e = tl.load(p_row[:, None] + (o_e * x_c)[None, :], m_x[:, None] & m_e[None, :], 0.0)
                    b_e = b_e.to(accs[0].dtype)
                else:
                    b_e = expanded(
                        p_row, m_x, x_c, C, p_w, b_w, b_bias, m_e, PRE_ACTIVATION, MID_ACTIVATION, TENSOR_CORES, WHOLE,
                        BLOCK_P, BLOCK_E, BLOCK_C,
                    )  # fmt: skip
                for m in tl.static_range(FIRST, LAST + 1):
                    if hits(m * STRIDE_H + q, KH, DILATION_H):
                        i_tap = (m * STRIDE_H + q) // DILATION_H * KW + j
                        b_tap = tl.load(taps + i_tap * w_stride + o_e, m_e, 0.0)[None, :]
                        accs = accs[:m] + (accs[m] + b_e * b_tap,) + accs[m + 1 :]
    return accs


@triton.jit(do_not_specialize=SIZES)
def pointwise_depthwise_fwd_kernel(
    x, pw_weight, pw_bias, dw_weight, dw_bias, residual, y, partial,
    H, W, OH, OW, pad_top, pad_left, columns, rows, c_vectors, k_vectors, w_stride,
    C_VECTOR: tl.constexpr, K_VECTOR: tl.constexpr, MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    PRE_ACTIVATION: tl.constexpr, MID_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, TENSOR_CORES: tl.constexpr, WHOLE: tl.constexpr,
    STRIPS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = c_vectors * C_VECTOR  # in two factors, so that the compiler knows how rows are aligned
    K = k_vectors * K_VECTOR
    BLOCK_P: tl.constexpr = STRIPS * BLOCK_W
    n_k = tl.cdiv(K, BLOCK_E)
    n_w = tl.cdiv(OW, BLOCK_W)
    n_h = tl.cdiv(OH, STRIPS * rows)
    i_tile = tl.program_id(0) // n_k  # (image, tile of rows, tile of columns)
    i_n = (i_tile // (n_w * n_h)).to(tl.int64)
    o_p = tl.arange(0, BLOCK_P)
    o_h = (i_tile // n_w % n_h * STRIPS + o_p // BLOCK_W) * rows  # [BP], a strip's first row
    o_w = i_tile % n_w * BLOCK_W + o_p % BLOCK_W
    o_k = tl.program_id(0) % n_k * BLOCK_E + tl.arange(0, BLOCK_E)
    m_k = o_k < K
    top = o_h * STRIDE_H - pad_top
    left = o_w * STRIDE_W - pad_left

    x_c, x_h, x_w = strides(C, H, W, CHANNELS_LAST)
    y_c, y_h, y_w = strides(K, OH, OW, CHANNELS_LAST)
    p_x = x + (i_n * C * H * W + top * x_h + left * x_w)  # [BP]
    o_y = i_n * K * OH * OW + o_h * y_h + o_w * y_w  # [BP]
    o_c = tl.arange(0, BLOCK_C)
    p_pw = pw_weight + (o_c[:, None] + (o_k // MULTIPLIER * C)[None, :])  # [BC, BE]
    b_pw = tl.load(p_pw, (o_c < C)[:, None] & m_k[None, :], 0.0) if WHOLE else 0.0
    b_mid = 0.0
    b_bias = 0.0
    if pw_bias is not None:
        b_mid = tl.load(pw_bias + o_k // MULTIPLIER, m_k, 0.0).to(dw_weight.dtype.element_ty)[None, :]
    if dw_bias is not None:
        b_bias = tl.load(dw_bias + o_k, m_k, 0.0).to(dw_weight.dtype.element_ty)[None, :]

    # accs[m] is of row t - m of the outputs; with the rows of e at t the last one is complete.
    WINDOW: tl.constexpr = (KH - 1) * DILATION_H // STRIDE_H + 1
    zero = tl.zeros((BLOCK_P, BLOCK_E), dw_weight.dtype.element_ty)
    accs = (zero,) * WINDOW
    sums = zero
    for t in range(rows + WINDOW - 1):
        accs = add_rows(
            accs, t, p_x, p_pw, b_pw, b_mid, dw_weight, o_k, m_k, top, left, H, W, C, columns, w_stride, x_c, x_h, x_w,
            KH, KW, STRIDE_H, DILATION_H, DILATION_W, PRE_ACTIVATION, MID_ACTIVATION, TENSOR_CORES, WHOLE,
            0, WINDOW - 1, BLOCK_P, BLOCK_E, BLOCK_C,
        )  # fmt: skip
        o = t - (WINDOW - 1)
        m_p = (o >= 0) & (o_h + o < OH) & (o_w < OW)
        m_y = m_p[:, None] & m_k[None, :]
        p_o = (o_y + o * y_h)[:, None] + (o_k * y_c)[None, :]
        b_y = accs[WINDOW - 1] + b_bias
        if residual is not None:
            b_y += tl.load(residual + p_o, m_y, 0.0).to(b_y.dtype)
        b_y = activate(b_y, ACTIVATION)
        if partial is not None:
            sums += tl.where(m_p[:, None], b_y, 0.0)
        tl.store(y + p_o, b_y.to(y.dtype.element_ty), m_y)
        accs = (zero,) + accs[: WINDOW - 1]
    if partial is not None:
        tl.store(partial + i_tile.to(tl.int64) * K + o_k, tl.sum(sums, 0), m_k)


# What a device does in 1e-12 s, in round numbers: bytes from DRAM; bytes from L1 through registers and shared memory to
# tensor cores (a third of L1's rate); operations on those in 16-bit numbers; instructions (a float32 multiply-add is
# one). By compute capability, each up to the next.
DEVICES = {
    (7, 5): (0.3, 1.3, 0.0, 4.0),  # T4
    (8, 0): (1.7, 6.0, 220.0, 9.0),  # A100
    (8, 6): (0.9, 6.0, 70.0, 17.0),  # RTX 3090
    (8, 9): (0.9, 14.0, 150.0, 40.0),  # RTX 4090
    (9, 0): (3.0, 10.0, 500.0, 30.0),  # H100
    (10, 0): (6.5, 12.0, 1000.0, 35.0),  # B200
    (12, 0): (1.7, 17.0, 200.0, 50.0),  # RTX 5090
}
INSTRUCTIONS = (0, 1, 2, 22, 22, 30, 40)  # of an activation, by its code; exponential and quotient take those of 8 each


def times(kind, C, activation):
    """(of a byte of DRAM, of a byte of L1, of one number of e: its product and activation), in 1e-12 s."""
    present = max(kind.capability, (7, 5))
    memory, cache, products, instructions = DEVICES[max(known for known in DEVICES if known <= present)]
    each = (4 + INSTRUCTIONS[activation]) / instructions
    if kind.tensor_cores:
        each += 2 * C / (products * 2 / kind.dtype.itemsize)
    else:
        each += C / (0.5 * instructions) * (kind.dtype.itemsize // 8 * 15 + 1)  # a load beside each; float64 at a 16th
    return 1 / memory, 1 / cache, each


@functools.cache
def recompute_pays(kind, C, E, kernel, stride, dilation, height, width, activation):
    """Whether pointwise_depthwise, which computes e several times, is to be faster than e in memory.

    By the time of one number of y: in memory e is written and read once, stride^2 numbers of it; else it is computed
    for each filter column, which takes x and the weights from L1 or L2 as often. It depends on an image's shape, dtype
    and the kind of device, not on the batch; on the formula's tile, not on one that `cnnfast tune` kept.
    """
    byte, cached, each = times(kind, C, activation)
    blocks, rows = forward_blocks(kind, C, E, height, width, kernel, stride, dilation)
    columns = blocks["STRIPS"] * blocks["BLOCK_W"]
    computed = kernel[1] * (((rows - 1) * stride[0] + (kernel[0] - 1) * dilation[0] + 1) / rows)
    computed *= cdiv(width, blocks["BLOCK_W"]) * blocks["BLOCK_W"] / width
    operands = kind.dtype.itemsize * C * (1 / blocks["BLOCK_E"] + (0 if blocks["BLOCK_C"] >= C else 1 / columns))
    e = stride[0] * stride[1]
    return computed * (each + operands * cached) < e * max(2 * kind.dtype.itemsize * byte, each)


def strips(height, width, kernel, stride, dilation, most):
    """(STRIPS and BLOCK_W, rows of a strip): a tile of 16 to `most` columns that computes the fewest rows of e.

    Half as many columns count as a quarter slower: 64 are the rows of the largest instruction, and share its weights.
    """
    block_w = fitting_power(width, 8, most)
    window = (kernel[0] - 1) * dilation[0] // stride[0] + 1

    def rows(count):
        return cdiv(height, count * cdiv(height, count * MOST_ROWS))

    def computed(count):
        tiles = cdiv(height, count * rows(count))
        return tiles * count * (rows(count) + window - 1) * (64 / (count * block_w)) ** (1 / 3)

    count = min((n // block_w for n in (64, 32, 16) if block_w <= n <= most), key=computed)
    return dict(STRIPS=count, BLOCK_W=block_w), rows(count)


def input_channels(kind, C):
    """BLOCK_C: all of them up to 128, else a block that divides them well; few where operands are held in registers."""
    if not kind.tensor_cores:
        return 16
    most = 256 // kind.dtype.itemsize
    return max(next_power_of_2(C), 16) if most >= C else fitting_power(C, 32, most // 2)


@functools.cache
def forward_blocks(kind, C, K, height, width, kernel, stride, dilation):
    """(tile of the kernel, rows of a strip): of each sum a thread holds at most 8 numbers, 16 of a small filter's."""
    double = kind.dtype == torch.float64
    small = (kernel[0] - 1) * dilation[0] // stride[0] < 3 and not double
    tile, rows = strips(height, width, kernel, stride, dilation, most=64 if small else 32)
    block_e = side(K, 64 if kind.tensor_cores and small else 16 if double else 32)
    block_c = input_channels(kind, C)
    numbers = tile["STRIPS"] * tile["BLOCK_W"] * block_e * (2 if double else 1)
    stages = 3 if kind.tensor_cores and block_c < C else 2
    return dict(**tile, BLOCK_E=block_e, BLOCK_C=block_c, num_warps=min(numbers // 256, 8), num_stages=stages), rows


def pointwise_depthwise(
    x, pw_weight, pw_bias, dw_weight, dw_bias, residual, stride, padding, dilation,
    pre_activation, mid_activation, activation, squeeze=False,
):  # fmt: skip
    """(y, partial): y (N, K, OH, OW) in x's format and dtype, and None or with `squeeze` sums over its pixels.

    x (N, C, H, W); pw_weight (E, C, 1, 1); dw_weight (K, 1, kh, kw), K a multiple of E; pw_bias (E), dw_bias (K) and
    residual (N, K, OH, OW) or None; stride, dilation (vertical, horizontal), padding [top, bottom, left, right] or [-1]
    for 'same'; activations by their codes. partial: [N, tiles, K] in the accumulator's dtype, of y before it is
    rounded, at most channels.MOST_TILES tiles, as channels.channel_sums returns them.
    """
    x, channels_last = dense(x)
    N, C, H, W = x.shape
    K, _, *kernel = dw_weight.shape
    OH, OW, top, left = output_size((H, W), kernel, stride, padding, dilation)
    y = torch.empty((N, K, OH, OW), dtype=x.dtype, device=x.device, memory_format=memory_format(channels_last))
    kind = kind_of(x)
    default, strip = forward_blocks(kind, C, K, OH, OW, tuple(kernel), tuple(stride), tuple(dilation))
    window = geometry(kernel, stride, dilation, K // pw_weight.shape[0])
    blocks = configuration(
        pointwise_depthwise_fwd_kernel, x, lambda: default,
        C=C, K=K, height=OH, width=OW, residual=residual is not None, squeeze=squeeze,
        curved=max(mid_activation, activation) > RELU6.value,
        channels_last=channels_last, tensor_cores=kind.tensor_cores, **window,
    )  # fmt: skip

    def tiles_of(b):
        return cdiv(OH, b["STRIPS"] * strip) * cdiv(OW, b["BLOCK_W"])

    tiles = tiles_of(blocks)
    partial = torch.empty((N, tiles, K), dtype=accumulator(x), device=x.device) if squeeze else None
    if y.numel() == 0:
        return y, partial
    if residual is not None:
        residual = residual.contiguous(memory_format=memory_format(channels_last))
    rows = taps_major(dw_weight, accumulator(x))
    c, k = vector(C, x), vector(K, x)
    with torch.cuda.device_of(x):
        launch(
            pointwise_depthwise_fwd_kernel, blocks, lambda b: (N * tiles_of(b) * cdiv(K, b["BLOCK_E"]),),
            x, pw_weight.contiguous(), pw_bias, rows, dw_bias, residual, y, partial,
            H, W, OH, OW, top, left, kernel[1], strip, C // c, K // k, rows.stride(0), C_VECTOR=c, K_VECTOR=k,
            PRE_ACTIVATION=pre_activation, MID_ACTIVATION=mid_activation, ACTIVATION=activation,
            CHANNELS_LAST=channels_last, TENSOR_CORES=kind.tensor_cores, WHOLE=blocks["BLOCK_C"] >= C, **window,
            vary=("BLOCK_E",) if squeeze else ("STRIPS", "BLOCK_W", "BLOCK_E"),  # BLOCK_C: WHOLE says what it may be
        )  # fmt: skip
    return y, partial if partial is None else few_tiles(partial)
