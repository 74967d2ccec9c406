"""Gradients of pointwise convolution's weight and bias; layout, numbers and addresses: pointwise_conv2d.py."""

import torch
import triton
import triton.language as tl

from .channels import add_up, load_channels
from .configurations import configuration, launch
from .launch import cdiv, tensor_cores
from .packing import accumulator, padded
from .products import SIZES, Geometry, elements, enter, multiply_add, sampled, side, times_gate


# Gradients of weight and bias, first stage: BLOCK_K x BLOCK_C of the weight's, summed over `tiles` tiles of BLOCK_P
# pixels, which follow each other (and on into the next image).
# Grid  (block of C, block of K, chunk of tiles), the first fastest: programs in flight together share pixels in L2.
# Bytes ideally x and grad once; really besides the partial sums, and from L2 x (grad) once more per further block of
#       K (C).
# partial[chunk, k, c], partial_bias[chunk, k]: the second stage is add_up's.
@triton.jit(do_not_specialize=SIZES + ["tiles_total", "tiles"])
def pointwise_conv2d_bwd_weight_kernel(
    grad, x, gate, scale, shift, partial, partial_bias, H, W, OW, pixel_vectors, c_vectors, k_vectors,
    tiles_total, tiles, p_stride,
    PIXEL_VECTOR: tl.constexpr, C_VECTOR: tl.constexpr, K_VECTOR: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, PRE_ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, TENSOR_CORES: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pixels = pixel_vectors * PIXEL_VECTOR
    C = c_vectors * C_VECTOR
    K = k_vectors * K_VECTOR
    n_c = tl.cdiv(C, BLOCK_C)
    n_k = tl.cdiv(K, BLOCK_K)
    n_p = tl.cdiv(pixels, BLOCK_P)
    i_c = tl.program_id(0) % n_c
    i_sum = (tl.program_id(0) // (n_c * n_k)).to(tl.int64)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    o_k = tl.program_id(0) // n_c % n_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_c = o_c < C
    m_k = o_k < K
    x_pixels = pixels if STRIDE_H * STRIDE_W == 1 else H * W

    b_scale, b_shift = load_channels(scale, o_c, m_c), load_channels(shift, o_c, m_c)
    acc = tl.zeros((BLOCK_K, BLOCK_C), partial.dtype.element_ty)
    sum_g = tl.zeros((BLOCK_K,), partial.dtype.element_ty)
    first_tile = i_sum.to(tl.int32) * tiles
    for i_tile in range(first_tile, tl.minimum(first_tile + tiles, tiles_total)):
        i_n = (i_tile // n_p).to(tl.int64)
        o_p = i_tile % n_p * BLOCK_P + tl.arange(0, BLOCK_P)
        m_p = o_p < pixels
        m_x = m_p[:, None] & m_c[None, :]
        o_x = sampled(o_p, W, OW, STRIDE_H, STRIDE_W)
        b_g = tl.load(
            grad + elements(i_n, o_p, o_k, pixels, K, CHANNELS_LAST), m_p[:, None] & m_k[None, :], 0.0
        )  # [BP, BK]
        b_x = tl.load(x + elements(i_n, o_x, o_c, x_pixels, C, CHANNELS_LAST), m_x, 0.0)  # [BP, BC]
        if gate is not None:  # 0 times an infinite gate is NaN
            b_x = tl.where(m_x, times_gate(b_x, gate, i_n, o_c, m_c, C), 0.0)
        if (scale is not None) | (PRE_ACTIVATION != 0):
            b_x = tl.where(m_p[:, None], enter(b_x, b_scale, b_shift, PRE_ACTIVATION), 0.0)
        acc = multiply_add(tl.trans(b_g), b_x, acc, TENSOR_CORES)
        if partial_bias is not None:
            sum_g += tl.sum(b_g.to(acc.dtype), 0)

    p_out = partial + i_sum * p_stride + ((o_k * C)[:, None] + o_c[None, :])
    tl.store(p_out, acc, m_k[:, None] & m_c[None, :])
    if partial_bias is not None:
        tl.store(partial_bias + i_sum * K + o_k, sum_g, m_k & (i_c == 0))


def weight_blocks(C, K, dtype, on_tensor_cores, channels_last, gated):
    """Tile of the weight-gradient kernel, of the gradient's dtype.

    NCHW's loads of single numbers take registers, and so does what x goes through (`gated`: a gate, a scale and shift,
    an activation) where products are plain multiplications.
    """
    if dtype == torch.float64:
        return dict(BLOCK_P=16, BLOCK_K=32, BLOCK_C=32, num_warps=8, num_stages=2)
    if not on_tensor_cores:
        block_p, warps = (16, 8) if gated else (32, 4)
        return dict(BLOCK_P=block_p, BLOCK_K=side(K, 64), BLOCK_C=side(C, 64), num_warps=warps, num_stages=3)
    block_k, block_c = (side(size, 128 if channels_last else 64) for size in (K, C))
    block_p = (128 if channels_last else 64) // dtype.itemsize
    warps = 8 if block_k * block_c > 4096 else 4
    return dict(BLOCK_P=block_p, BLOCK_K=block_k, BLOCK_C=block_c, num_warps=warps, num_stages=3)


def weight_gradient(grad, x, weight, bias, gate, stride, scale=None, shift=None, pre_activation=0):
    """(gradient of weight, of bias or None), both from one pass over grad and x."""
    g = Geometry(x, weight, gate, stride)
    K, C = weight.shape[:2]
    on_tensor_cores = tensor_cores(x) and grad.dtype == x.dtype
    channels_last = g.constants["CHANNELS_LAST"]
    entering = gate is not None or scale is not None or pre_activation != 0
    blocks = configuration(
        pointwise_conv2d_bwd_weight_kernel, grad,
        lambda: weight_blocks(C, K, grad.dtype, on_tensor_cores, channels_last, entering),
        C=C, K=K, stride=tuple(stride), gate=entering,
        channels_last=channels_last, tensor_cores=on_tensor_cores,
    )  # fmt: skip
    vectors, constants = g.channels(C, K)
    programs = cdiv(K, blocks["BLOCK_K"]) * cdiv(C, blocks["BLOCK_C"])  # per chunk of tiles
    tiles_total = g.tiles(blocks)
    tiles = max(cdiv(tiles_total * programs, 512), 8)  # of a program: fills a large GPU, yet pays for the partial sums
    chunks = cdiv(tiles_total, tiles)
    partial = torch.empty((1, chunks, padded(K * C)), dtype=accumulator(x), device=x.device)
    partial_bias = None if bias is None else partial.new_empty((1, chunks, K))
    if gate is not None:
        gate = gate.to(torch.promote_types(gate.dtype, grad.dtype)).contiguous()
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    grad_bias = None if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=x.device)
    with torch.cuda.device_of(x):
        if chunks:
            launch(
                pointwise_conv2d_bwd_weight_kernel, blocks, lambda _: (chunks * programs,),
                grad.contiguous(memory_format=g.format), g.x.to(grad.dtype),  # see pointwise_conv2d.input_gradient
                gate, scale, shift, partial, partial_bias,
                *g.sizes, *vectors, tiles_total, tiles, partial.stride(1), PRE_ACTIVATION=pre_activation,
                TENSOR_CORES=on_tensor_cores, **constants, **g.constants,
            )  # fmt: skip
        add_up(partial, grad_weight)
        if bias is not None:
            add_up(partial_bias, grad_bias)
    return grad_weight, grad_bias
