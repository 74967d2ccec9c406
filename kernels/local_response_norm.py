"""Local response normalisation across channels and its gradient, each in one pass:
y[c] = x[c] d[c]^-beta, d[c] = k + alpha / size * sum of x[j]^2 over c - size // 2 <= j <= c + (size - 1) // 2.

Layout    x (N, C, H, W) dense, channels_last (the fast path: 16-byte loads along C) or NCHW (threads along pixels).
Tile      BLOCK_P pixels x BLOCK_C channels, in chunks of CHUNK neighbouring channels. A thread holds a chunk of a pixel
          and the neighbours that its windows reach, each channel a register: what moves over a window is the name of a
          register. The chunk of channels_last is a 16-byte vector, and the neighbours come as whole vectors.
Grid      one axis: a tile a program, channel blocks fastest, so that programs that share neighbours run together.
Bytes     ideally every tensor once. The vectors before and after a chunk come once more each, from L1; those beyond
          the tile's edges from L2.
Wide      windows of more than WIDEST channels don't fit a thread's registers: another kernel goes over them channel by
          channel, from L1 and L2; their gradient takes a second pass, over a scratch tensor in the accumulator's dtype.
Numbers   float32, bfloat16, float16 with float32 arithmetic, float64 in float64; nothing is rounded in between. Every
          window is summed anew, so a NaN or Inf reaches the windows that it is in and no other. float32's d^beta is
          by correctly rounded square roots for a beta of 1/2, 3/4 and 1; of others by polynomials, since the GPU's
          own log2 and exp2 lose digits where d is large.
Addresses Offsets are int64, so tensors may exceed 2^31 elements; C, H * W and the number of tiles stay below 2^31.
Registers and shared memory per target: docs/kernels.md.
"""

import torch
import triton
import triton.language as tl

from .configurations import configuration, launch
from .launch import cdiv, dense, fitting_power, memory_format, vector
from .packing import accumulator

__all__ = ["local_response_norm", "local_response_norm_backward"]

WIDEST = 17  # channels
SIZES = ["rows", "vectors"]  # one compiled kernel serves every size


@triton.constexpr_function
def few_bits(number):
    """`number` to twelve bits after the point: times an exponent of 2 it is exact in float32."""
    return round(number * 4096) / 4096


@triton.jit
def times_power_of_2(v, n):
    """v * 2^n, n a whole number in v's dtype; in two steps, since 2^n alone may be no number."""
    if v.dtype == tl.float64:
        n = tl.minimum(tl.maximum(n, -2044.0), 2046.0).to(tl.int64)
        low, high = n >> 1, n - (n >> 1)
        return (
            v * ((low + 1023) << 52).to(tl.float64, bitcast=True) * ((high + 1023) << 52).to(tl.float64, bitcast=True)
        )
    else:
        n = tl.minimum(tl.maximum(n, -252.0), 254.0).to(tl.int32)
        low, high = n >> 1, n - (n >> 1)
        v = v * ((low + 127) << 23).to(tl.float32, bitcast=True)
        return v * ((high + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_and_log2(v):
    """(e, log2(m)) of v = m 2^e > 0, m from sqrt(1/2) to sqrt(2)."""
    if v.dtype == tl.float64:
        tiny = v < 2.0**-1022  # below the normal numbers
        bits = tl.where(tiny, v * 2.0**54, v).to(tl.int64, bitcast=True)
        e = (bits - 0x3FE6A09E667F3BCD) >> 52
        log = tl.log2((bits - (e << 52)).to(tl.float64, bitcast=True))
        return e.to(tl.float64) - tl.where(tiny, 54.0, 0.0), log
    else:
        tiny = v < 2.0**-126
        bits = tl.where(tiny, v * 2.0**24, v).to(tl.int32, bitcast=True)
        e = (bits - 0x3F3504F3) >> 23
        m = (bits - (e << 23)).to(tl.float32, bitcast=True)
        s = (m - 1.0) / (m + 1.0)  # log2(m) = 2 / ln 2 atanh(s), by its series
        z = s * s
        log = 0.412198583111132 + z * 0.320598897975325
        log = s * (2.88539008177792681 + z * (0.961796693925975604 + z * (0.577078016355585362 + z * log)))
        return e.to(tl.float32) - tl.where(tiny, 24.0, 0.0), log


@triton.jit
def exp2_of_fraction(v):
    """2^v of v from -1/2 to 1/2."""
    if v.dtype == tl.float64:
        return tl.exp2(v)
    else:
        y = 0.00133335581464284434 + v * (0.000154035303933816099 + v * 0.0000152527338040598403)
        y = 0.240226506959100712 + v * (0.0555041086648215800 + v * (0.00961812910762847716 + v * y))
        return 1.0 + v * (0.693147180559945309 + v * y)


@triton.jit
def power(d, EXPONENT: tl.constexpr):
    """d^EXPONENT with torch.pow's special values: NaN of a negative d, unless EXPONENT is whole."""
    if EXPONENT == 0:
        return tl.full(d.shape, 1.0, d.dtype)
    else:
        e, log = exponent_and_log2(tl.abs(d))
        HIGH: tl.constexpr = few_bits(EXPONENT)
        whole = tl.floor(e * HIGH + 0.5)
        part = (e * HIGH - whole) + (e * (EXPONENT - HIGH) + log * EXPONENT)
        more = tl.floor(part + 0.5)
        result = times_power_of_2(exp2_of_fraction(part - more), whole + more)
        result = tl.where(d == 0.0, 0.0 if EXPONENT > 0 else float("inf"), result)
        result = tl.where(tl.abs(d) == float("inf"), float("inf") if EXPONENT > 0 else 0.0, result)
        if EXPONENT % 2 == 1:
            result = tl.where(d < 0.0, -result, result)
        if EXPONENT % 1 == 0:
            return tl.where(d != d, d, result)
        else:
            return tl.where(d >= 0.0, result, float("nan"))


@triton.jit
def over_power(v, d, BETA: tl.constexpr):
    """v / d^BETA; in float32 by square roots where they do, all rounded correctly, which float32's `/` is not."""
    if (d.dtype == tl.float32) & ((BETA == 0.5) | (BETA == 0.75) | (BETA == 1.0)):
        root = d
        if BETA != 1.0:
            root = tl.sqrt_rn(d)
        if BETA == 0.75:
            root = root * tl.sqrt_rn(root)
        return tl.div_rn(v, root)
    else:
        return v * power(d, -BETA)


@triton.jit
def split_vector(b, VECTOR: tl.constexpr):
    """b [BP, BQ, VECTOR] as VECTOR blocks [BP, BQ]."""
    if VECTOR == 1:
        return (tl.reshape(b, (b.shape[0], b.shape[1])),)
    else:
        halves = tl.permute(tl.reshape(b, (b.shape[0], b.shape[1], 2, VECTOR // 2)), (0, 1, 3, 2))
        low, high = tl.split(halves)
        return split_vector(low, VECTOR // 2) + split_vector(high, VECTOR // 2)


@triton.jit
def join_vector(blocks, VECTOR: tl.constexpr):
    """The inverse of split_vector."""
    if VECTOR == 1:
        return tl.reshape(blocks[0], (blocks[0].shape[0], blocks[0].shape[1], 1))
    else:
        low = join_vector(blocks[: VECTOR // 2], VECTOR // 2)
        high = join_vector(blocks[VECTOR // 2 :], VECTOR // 2)
        return tl.reshape(tl.permute(tl.join(low, high), (0, 1, 3, 2)), (low.shape[0], low.shape[1], VECTOR))


@triton.jit
def locate(
    rows, columns,
    CHUNK: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """This program's (image, pixel [BP], chunk [BQ]) of rows x columns: pixels x channels or channels x pixels."""
    n_c = tl.cdiv(columns if CHANNELS_LAST else rows, BLOCK_C)
    n_p = tl.cdiv(rows if CHANNELS_LAST else columns, BLOCK_P)
    i_tile = tl.program_id(0) // n_c
    o_p = (i_tile % n_p).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_q = tl.program_id(0) % n_c * (BLOCK_C // CHUNK) + tl.arange(0, BLOCK_C // CHUNK)
    return (i_tile // n_p).to(tl.int64), o_p, o_q


@triton.jit
def load_channels(
    x, rows, columns, i_n, o_p, o_q, dtype: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    CHUNK: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Channels FIRST to LAST - 1, counted from a chunk's own first, each [BP, BQ]; 0 where there are none."""
    blocks = ()
    if CHANNELS_LAST:
        LOW: tl.constexpr = FIRST // CHUNK
        o_e = tl.arange(0, CHUNK)
        for v in tl.static_range(LOW, (LAST + CHUNK - 1) // CHUNK):
            p_x = x + (o_p * columns)[:, None, None] + ((o_q + v) * CHUNK)[None, :, None] + o_e[None, None, :]
            m_x = (o_p < rows)[:, None] & ((o_q + v >= 0) & ((o_q + v) * CHUNK < columns))[None, :]
            blocks = blocks + split_vector(tl.load(p_x, m_x[:, :, None], 0.0).to(dtype), CHUNK)
        return blocks[FIRST - LOW * CHUNK : LAST - LOW * CHUNK]
    else:
        for c in tl.static_range(FIRST, LAST):
            o_c = o_q * CHUNK + c
            p_x = x + ((i_n * rows + o_c) * columns)[None, :] + o_p[:, None]
            m_x = (o_p < columns)[:, None] & ((o_c >= 0) & (o_c < rows))[None, :]
            blocks = blocks + (tl.load(p_x, m_x, 0.0).to(dtype),)
        return blocks


@triton.jit
def store_channels(
    y, blocks, rows, columns, i_n, o_p, o_q, CHUNK: tl.constexpr, CHANNELS_LAST: tl.constexpr
):  # fmt: skip
    if CHANNELS_LAST:
        p_y = y + (o_p * columns)[:, None, None] + (o_q * CHUNK)[None, :, None] + tl.arange(0, CHUNK)[None, None, :]
        m_y = (o_p < rows)[:, None] & (o_q * CHUNK < columns)[None, :]
        tl.store(p_y, join_vector(blocks, CHUNK).to(y.dtype.element_ty), m_y[:, :, None])
    else:
        for c in tl.static_range(CHUNK):
            o_c = o_q * CHUNK + c
            p_y = y + ((i_n * rows + o_c) * columns)[None, :] + o_p[:, None]
            m_y = (o_p < columns)[:, None] & (o_c < rows)[None, :]
            tl.store(p_y, blocks[c].to(y.dtype.element_ty), m_y)


@triton.jit
def total(blocks, FIRST: tl.constexpr, COUNT: tl.constexpr):
    result = blocks[FIRST]
    for i in tl.static_range(FIRST + 1, FIRST + COUNT):
        result += blocks[i]
    return result


@triton.jit
def squares(blocks, COUNT: tl.constexpr):
    result = ()
    for i in tl.static_range(COUNT):
        result = result + (blocks[i] * blocks[i],)
    return result


@triton.jit(do_not_specialize=SIZES)
def local_response_norm_fwd_kernel(
    x, y, rows, vectors,
    VECTOR: tl.constexpr, SIZE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, K: tl.constexpr,
    DTYPE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns = vectors * VECTOR  # in two factors, so that the compiler knows how rows are aligned
    i_n, o_p, o_q = locate(rows, columns, CHUNK, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    BEFORE: tl.constexpr = SIZE // 2
    b_x = load_channels(
        x, rows, columns, i_n, o_p, o_q, DTYPE, -BEFORE, CHUNK + SIZE - 1 - BEFORE, CHUNK, CHANNELS_LAST
    )
    b_s = squares(b_x, CHUNK + SIZE - 1)
    b_y = ()
    for c in tl.static_range(CHUNK):
        b_d = K + total(b_s, c, SIZE) * (ALPHA / SIZE)
        b_y = b_y + (over_power(b_x[BEFORE + c], b_d, BETA),)
    store_channels(y, b_y, rows, columns, i_n, o_p, o_q, CHUNK, CHANNELS_LAST)


# grad_x[i] = grad[i] d[i]^-beta - 2 alpha beta / size x[i] * sum of t[c] over the windows c that i is in,
# t = grad x d^(-beta - 1): i - (size - 1) // 2 <= c <= i + size // 2. d is recomputed, also for neighbours.
@triton.jit(do_not_specialize=SIZES)
def local_response_norm_bwd_kernel(
    grad, x, grad_x, rows, vectors,
    VECTOR: tl.constexpr, SIZE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, K: tl.constexpr,
    DTYPE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns = vectors * VECTOR
    i_n, o_p, o_q = locate(rows, columns, CHUNK, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    channels = columns if CHANNELS_LAST else rows
    BEFORE: tl.constexpr = SIZE // 2
    AFTER: tl.constexpr = SIZE - 1 - BEFORE
    b_x = load_channels(x, rows, columns, i_n, o_p, o_q, DTYPE, 1 - SIZE, CHUNK + SIZE - 1, CHUNK, CHANNELS_LAST)
    b_g = load_channels(grad, rows, columns, i_n, o_p, o_q, DTYPE, -AFTER, CHUNK + BEFORE, CHUNK, CHANNELS_LAST)
    b_s = squares(b_x, CHUNK + 2 * (SIZE - 1))
    b_direct = ()
    b_t = ()
    for i in tl.static_range(CHUNK + SIZE - 1):  # channel i - AFTER of the chunk
        b_d = K + total(b_s, i, SIZE) * (ALPHA / SIZE)
        b_gp = over_power(b_g[i], b_d, BETA)
        o_c = o_q * CHUNK + (i - AFTER)
        m_t = ((o_c >= 0) & (o_c < channels))[None, :]  # beyond, 0 times what d^-beta is there may be NaN
        b_t = b_t + (tl.where(m_t, b_gp * b_x[BEFORE + i] / b_d, 0.0),)
        b_direct = b_direct + (b_gp,)
    b_y = ()
    for c in tl.static_range(CHUNK):
        b_sum = total(b_t, c, SIZE) * (2.0 * ALPHA * BETA / SIZE)
        b_y = b_y + (b_direct[AFTER + c] - b_x[SIZE - 1 + c] * b_sum,)
    store_channels(grad_x, b_y, rows, columns, i_n, o_p, o_q, CHUNK, CHANNELS_LAST)


@triton.jit
def window_total(x, rows, columns, i_n, o_p, o_c, before, after, DTYPE: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(sum, sum of squares) of x over channels o_c - before to o_c + after, those that there are."""
    b_sum = tl.zeros((o_p.shape[0], o_c.shape[0]), DTYPE)
    b_squares = b_sum
    for j in range(-before, after + 1):
        (b_x,) = load_channels(x, rows, columns, i_n, o_p, o_c + j, DTYPE, 0, 1, 1, CHANNELS_LAST)
        b_sum += b_x
        b_squares += b_x * b_x
    return b_sum, b_squares


# The same of a window too wide for registers: y without a grad; with one t, which it stores; with that, too, grad_x.
@triton.jit(do_not_specialize=["rows", "columns", "before", "after"])
def local_response_norm_wide_kernel(
    x, grad, t, y, rows, columns, before, after,
    SCALE: tl.constexpr, BETA: tl.constexpr, K: tl.constexpr, DTYPE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_n, o_p, o_c = locate(rows, columns, 1, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    _, b_squares = window_total(x, rows, columns, i_n, o_p, o_c, before, after, DTYPE, CHANNELS_LAST)
    (b_x,) = load_channels(x, rows, columns, i_n, o_p, o_c, DTYPE, 0, 1, 1, CHANNELS_LAST)
    b_d = K + b_squares * SCALE
    if grad is None:
        b_y = over_power(b_x, b_d, BETA)
    else:
        (b_g,) = load_channels(grad, rows, columns, i_n, o_p, o_c, DTYPE, 0, 1, 1, CHANNELS_LAST)
        b_gp = over_power(b_g, b_d, BETA)
        if t is None:
            b_y = b_gp * b_x / b_d
        else:
            b_sum, _ = window_total(t, rows, columns, i_n, o_p, o_c, after, before, DTYPE, CHANNELS_LAST)
            b_y = b_gp - b_x * (b_sum * (2.0 * SCALE * BETA))
    store_channels(y, (b_y,), rows, columns, i_n, o_p, o_c, 1, CHANNELS_LAST)


TRITON = {torch.float32: tl.float32, torch.float64: tl.float64}


def blocks_of(channels, pixels, x, channels_last, wide):
    """Tile: 128 threads of 16 bytes of x, of one channel (wide) or of a chunk of channels of a pixel (NCHW)."""
    if wide:
        chunk, elements = 1, 256
    elif channels_last:
        chunk, elements = vector(channels, x), 128 * 16 // x.element_size()
    else:
        chunk = min(8, 1 << (channels - 1).bit_length())
        return dict(CHUNK=chunk, BLOCK_P=128, BLOCK_C=chunk, num_warps=4)
    block_c = fitting_power(channels, 16, 64) if channels_last else 1
    block_c = max(block_c, chunk)
    blocks = dict(BLOCK_P=max(elements // block_c, 1), BLOCK_C=block_c, num_warps=4)
    return blocks if wide else blocks | dict(CHUNK=chunk)


def run(x, grad, size, alpha, beta, k):
    """y, or with `grad` the gradient of x."""
    x, channels_last = dense(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(channels_last))
    if y.numel() == 0:
        return y
    if grad is not None:
        grad, _ = dense(grad, like=x)
    N, C, H, W = x.shape
    channels_last = channels_last or H * W == 1  # one and the same then
    rows, columns, images = (N * H * W, C, 1) if channels_last else (C, H * W, N)
    pixels = rows if channels_last else columns
    kernel = local_response_norm_fwd_kernel if grad is None else local_response_norm_bwd_kernel
    kernel = local_response_norm_wide_kernel if size > WIDEST else kernel
    blocks = configuration(
        kernel, x, blocks_of(C, pixels, x, channels_last, size > WIDEST),
        C=C, size=size, channels_last=channels_last, grad=grad is not None,
    )  # fmt: skip
    grid = lambda b: (images * cdiv(pixels, b["BLOCK_P"]) * cdiv(C, b["BLOCK_C"]),)  # noqa: E731
    options = dict(BETA=beta, K=k, DTYPE=TRITON[accumulator(x)], CHANNELS_LAST=channels_last, vary=("BLOCK_P",))
    with torch.cuda.device_of(x):
        if size > WIDEST:
            # Beyond the first and last channel are zeros, however many.
            window = min(size // 2, C - 1), min((size - 1) // 2, C - 1)
            t = None
            if grad is not None:
                t = torch.empty_like(x, dtype=accumulator(x))
                launch(kernel, blocks, grid, x, grad, None, t, rows, columns, *window, SCALE=alpha / size, **options)
            launch(kernel, blocks, grid, x, grad, t, y, rows, columns, *window, SCALE=alpha / size, **options)
            return y
        v = vector(columns, x)
        options |= dict(VECTOR=v, SIZE=size, ALPHA=alpha)
        if grad is None:
            launch(kernel, blocks, grid, x, y, rows, columns // v, **options)
        else:
            launch(kernel, blocks, grid, grad, x, y, rows, columns // v, **options)
    return y


def local_response_norm(x, size, alpha, beta, k):
    return run(x, None, size, alpha, beta, k)


def local_response_norm_backward(grad, x, size, alpha, beta, k):
    return run(x, grad, size, alpha, beta, k)
