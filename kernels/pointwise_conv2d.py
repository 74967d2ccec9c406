"""Pointwise convolution, forward and gradients: y = activation(conv1x1(x * gate, weight, stride) + bias + residual).

For stats.py the kernels take a scale, shift and pre_activation of x's channels and store sums over the pixels of each
tile, which add_up adds up; without those they are compiled as if there were none.

Layout    x (N, C, H, W) dense, channels_last (the fast path: a matrix of pixels x channels, 16-byte loads along C) or
          NCHW; y in x's format. weight [K, C] row by row; the input's gradient multiplies by the same rows, not by a
          transposed copy. gate [N, C].
Tile      BLOCK_P pixels of one image x BLOCK_K output channels, a loop over BLOCK_C input channels. A tensor in
          channels_last, without stride and gate, counts as one image of all the batch's pixels.
Grid      one axis: a tile a program, channel blocks fastest, so that programs in flight together share x in L2.
Bytes     ideally every tensor once; really x once more from L2 for each further block of BLOCK_K output channels.
Numbers   bfloat16 and float16 on tensor cores with float32 sums (before compute capability 8.0, where Triton has none,
          in float32); float32 by IEEE multiplications, by TF32 ones where torch.backends.cudnn.conv.fp32_precision
          says "tf32"; float64 in float64. x * gate and pre_activation(x * scale + shift) are rounded to x's dtype;
          nothing else is in between: gradients before a curved activation are float32, and so are their products.
Addresses Offsets of an image or pixel are int64, so tensors may exceed 2^31 elements; N H W, C K and the number of
          tiles stay below 2^31.
Repeats   No atomics: every sum has a fixed order, and that of a pixel depends on C, K, its image's size and stride
          and on the configuration (device class, or `cnnfast tune`), not on its neighbours in the batch.
Registers and shared memory per target: docs/kernels.md.
"""

import torch
import triton
import triton.language as tl

from .activation import RELU6, activate, scaled
from .activation import gate as gradient_through
from .channels import add_up, load_channels, store_sums
from .configurations import configuration, launch
from .launch import cdiv, fitting_power, residual_gradient, tensor_cores
from .packing import accumulator
from .pointwise_conv2d_weight import weight_gradient
from .products import SIZES, Geometry, elements, enter, locate, multiply_add, sampled, side, sums_in, times_gate

__all__ = ["pointwise_conv2d", "pointwise_conv2d_backward"]


@triton.jit
def product(
    x, weight, gate, i_n, o_p, m_p, o_k, m_k, pixels, C, K,
    TRANSPOSED: tl.constexpr, CHANNELS_LAST: tl.constexpr, TENSOR_CORES: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    scale=None, shift=None, PRE_ACTIVATION: tl.constexpr = 0,
):  # fmt: skip
    """pre_activation(x [pixel, c] * scale [c] + shift [c]) * gate [c] times weight: [k, c], or TRANSPOSED [c, k]."""
    o_c = tl.arange(0, BLOCK_C)
    p_x = x + elements(i_n, o_p, o_c, pixels, C, CHANNELS_LAST)  # [BP, BC]
    o_w = (o_c * K)[:, None] + o_k[None, :] if TRANSPOSED else o_c[:, None] + (o_k * C)[None, :]
    p_w = weight + o_w  # [BC, BK]
    acc = tl.zeros((BLOCK_P, BLOCK_K), sums_in(x.dtype.element_ty))
    for c in range(0, C, BLOCK_C):
        m_c = c + o_c < C  # both sides: 0 times a neighbour's NaN is NaN
        b_x = tl.load(p_x, m_p[:, None] & m_c[None, :], 0.0)
        b_w = tl.load(p_w, m_c[:, None] & m_k[None, :], 0.0)
        if gate is not None:
            b_x = times_gate(b_x, gate, i_n, c + o_c, m_c, C)
        if (scale is not None) | (PRE_ACTIVATION != 0):
            b_scale, b_shift = load_channels(scale, c + o_c, m_c), load_channels(shift, c + o_c, m_c)
            b_x = enter(b_x, b_scale, b_shift, PRE_ACTIVATION)
        acc = multiply_add(b_x, b_w, acc, TENSOR_CORES)
        p_x += BLOCK_C if CHANNELS_LAST else BLOCK_C * pixels.to(tl.int64)
        p_w += BLOCK_C * K if TRANSPOSED else BLOCK_C
    return acc


# Forward. With `grad` it stores grad * activation'(...) instead of the activation: what the gradients start from. With
# `partial` the sums over the tile's pixels of y as it is stored and of y * y, partial[tile, 0 and 1, k].
@triton.jit(do_not_specialize=SIZES)
def pointwise_conv2d_fwd_kernel(
    x, weight, bias, gate, scale, shift, residual, grad, y, partial, H, W, OW, pixel_vectors, c_vectors, k_vectors,
    PIXEL_VECTOR: tl.constexpr, C_VECTOR: tl.constexpr, K_VECTOR: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, PRE_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    TENSOR_CORES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pixels = pixel_vectors * PIXEL_VECTOR  # in two factors, so that the compiler knows how rows are aligned
    C = c_vectors * C_VECTOR
    K = k_vectors * K_VECTOR
    i_tile, i_n, o_p, o_k = locate(pixels, K, BLOCK_P, BLOCK_K)
    m_p = o_p < pixels
    m_k = o_k < K
    o_x = sampled(o_p, W, OW, STRIDE_H, STRIDE_W)
    x_pixels = pixels if STRIDE_H * STRIDE_W == 1 else H * W
    b_y = product(
        x, weight, gate, i_n, o_x, m_p, o_k, m_k, x_pixels, C, K, False, CHANNELS_LAST, TENSOR_CORES,
        BLOCK_P, BLOCK_K, BLOCK_C, scale, shift, PRE_ACTIVATION,
    )  # fmt: skip
    o_y = elements(i_n, o_p, o_k, pixels, K, CHANNELS_LAST)  # [BP, BK]
    m_y = m_p[:, None] & m_k[None, :]
    if bias is not None:
        b_y += tl.load(bias + o_k, m_k, 0.0).to(b_y.dtype)[None, :]
    if residual is not None:
        b_y += tl.load(residual + o_y, m_y, 0.0).to(b_y.dtype)
    if grad is None:
        b_y = activate(b_y, ACTIVATION)
    else:
        b_y = gradient_through(b_y, tl.load(grad + o_y, m_y, 0.0).to(b_y.dtype), ACTIVATION)
    b_stored = b_y.to(y.dtype.element_ty)
    tl.store(y + o_y, b_stored, m_y)
    if partial is not None:
        b_y = tl.where(m_p[:, None], b_stored, 0.0).to(b_y.dtype)
        store_sums(partial, i_tile, K, o_k, m_k, b_y, b_y * b_y)


# Gradient of x: each pixel of `grad` writes the STRIDE_H x STRIDE_W pixels of x that begin with its own, those but the
# first 0 (times the gate, as PyTorch's). With `partial` also the gate's gradient, summed over the tile's pixels:
# partial[image, tile, c], or with scale those of scale and shift, partial[tile, 0 and 1, c]; x's pixels that a stride
# skips aren't read for them. The roles of C and K are swapped.
# Bytes ideally grad and grad_x once, and x where pre_activation or the gradient of gate or scale needs it.
@triton.jit(do_not_specialize=SIZES)
def pointwise_conv2d_bwd_input_kernel(
    grad, x, weight, gate, scale, shift, grad_x, partial, H, W, OW, pixel_vectors, c_vectors, k_vectors,
    PIXEL_VECTOR: tl.constexpr, C_VECTOR: tl.constexpr, K_VECTOR: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, PRE_ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, TENSOR_CORES: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pixels = pixel_vectors * PIXEL_VECTOR
    C = c_vectors * C_VECTOR
    K = k_vectors * K_VECTOR
    i_tile, i_n, o_p, o_k = locate(pixels, K, BLOCK_P, BLOCK_K)
    m_p = o_p < pixels
    m_k = o_k < K
    b_x = product(
        grad, weight, None, i_n, o_p, m_p, o_k, m_k, pixels, C, K, True, CHANNELS_LAST, TENSOR_CORES,
        BLOCK_P, BLOCK_K, BLOCK_C,
    )  # fmt: skip
    x_pixels = pixels if STRIDE_H * STRIDE_W == 1 else H * W
    o_x = elements(i_n, sampled(o_p, W, OW, STRIDE_H, STRIDE_W), o_k, x_pixels, K, CHANNELS_LAST)  # [BP, BK]
    m_x = m_p[:, None] & m_k[None, :]
    b_scale = load_channels(scale, o_k, m_k)
    if (PRE_ACTIVATION != 0) | (partial is not None):
        b_entered = tl.load(x + o_x, m_x, 0.0).to(b_x.dtype)
    if PRE_ACTIVATION != 0:
        b_x = gradient_through(scaled(b_entered, b_scale, load_channels(shift, o_k, m_k)), b_x, PRE_ACTIVATION)
    if partial is not None:
        b_x = tl.where(m_p[:, None], b_x, 0.0)  # an infinite weight times nothing is NaN
        store_sums(partial, i_tile, K, o_k, m_k, b_x * b_entered, None if scale is None else b_x)
    if grad_x is not None:
        b_zero = tl.zeros((BLOCK_P, BLOCK_K), b_x.dtype)
        if scale is not None:
            b_x *= b_scale
            b_zero *= b_scale
        if gate is not None:
            b_gate = tl.load(gate + i_n * K + o_k, m_k, 0.0).to(b_x.dtype)[None, :]
            b_x *= b_gate
            b_zero *= b_gate
        tl.store(grad_x + o_x, b_x.to(grad_x.dtype.element_ty), m_x)
        if STRIDE_H * STRIDE_W > 1:
            o_h = o_p // OW * STRIDE_H
            o_w = o_p % OW * STRIDE_W
            x_p = tl.cast(K, tl.int64) if CHANNELS_LAST else 1  # from a pixel to the next
            columns = tl.minimum(STRIDE_W, W)
            for q in range(1, tl.minimum(STRIDE_H, H) * columns):
                i_h = q // columns
                i_w = q % columns
                m_q = m_x & ((o_h + i_h < H) & (o_w + i_w < W))[:, None]
                tl.store(grad_x + o_x + (i_h * W + i_w) * x_p, b_zero.to(grad_x.dtype.element_ty), m_q)


def product_blocks(C, K, image, dtype, on_tensor_cores, channels_last, entering=False):
    """Tile of the forward and input-gradient kernels, for C input and K output channels of the product.

    It depends on the size of an image, not on the batch: a pixel's sum has the same order beside any neighbours. Most
    of the networks' products are bound by memory: up to 128 output channels are one block, which reads x once. Three
    stages of 128 bytes of a row of x and of weight are at most 96 KiB, what the smallest GPUs with tensor cores have.
    Plain multiplications hold their operands in registers: fewer channels. So do tensor cores where x goes through a
    prologue (`entering`): half as many.
    """
    if dtype == torch.float64:
        return dict(BLOCK_P=16 if entering else 32, BLOCK_K=32, BLOCK_C=16, num_warps=4, num_stages=2)
    if not on_tensor_cores:
        block_p, warps = (128, 8) if channels_last else (64, 4)
        return dict(BLOCK_P=block_p, BLOCK_K=side(K, 64), BLOCK_C=16, num_warps=warps, num_stages=3)
    block_p = 128 if image > 256 else 64
    block_k = side(K, 128)
    block_c = max(fitting_power(C, 32, (64 if entering else 128) // dtype.itemsize), 16)
    warps = 8 if block_p * block_k >= 4096 else 4
    return dict(BLOCK_P=block_p, BLOCK_K=block_k, BLOCK_C=block_c, num_warps=warps, num_stages=3)


def forward(x, weight, bias, gate, residual, grad, stride, activation, dtype=None):
    """The op, of `dtype`, else x's; or with `grad` the gradient before the activation."""
    return forward_and_sums(x, weight, bias, gate, residual, grad, stride, activation, dtype=dtype)[0]


def forward_and_sums(
    x, weight, bias, gate, residual, grad, stride, activation, scale=None, shift=None, pre_activation=0, sums=False,
    dtype=None,
):  # fmt: skip
    """(what forward gives for pre_activation(x * scale + shift), partial sums [1, tiles, 2 K] of y and y * y)."""
    g = Geometry(x, weight, gate, stride)
    K, C = weight.shape[:2]
    # What a clamp lets through of a gradient fits grad's dtype; times another slope it doesn't.
    dtype = dtype or (x.dtype if grad is None or activation <= RELU6.value else accumulator(x))
    y = torch.empty(g.y_shape, dtype=dtype, device=x.device, memory_format=g.format)
    if y.numel() == 0:
        return y, torch.empty((1, 0, 2 * K), dtype=accumulator(x), device=x.device) if sums else None
    residual, grad = (t if t is None else t.contiguous(memory_format=g.format) for t in (residual, grad))
    on_tensor_cores = tensor_cores(x)
    channels_last, entering = g.constants["CHANNELS_LAST"], scale is not None or pre_activation != 0
    blocks = configuration(
        pointwise_conv2d_fwd_kernel, x,
        lambda: product_blocks(C, K, g.image, x.dtype, on_tensor_cores, channels_last, entering),
        C=C, K=K, image=g.image, stride=tuple(stride), gate=gate is not None, residual=residual is not None,
        grad=grad is not None, curved=activation > RELU6.value, prologue=entering, sums=sums,
        channels_last=channels_last, tensor_cores=on_tensor_cores,
    )  # fmt: skip
    vectors, constants = g.channels(C, K)
    partial = torch.empty((1, g.tiles(blocks), 2 * K), dtype=accumulator(x), device=x.device) if sums else None
    with torch.cuda.device_of(x):
        launch(
            pointwise_conv2d_fwd_kernel, blocks, lambda b: (g.tiles(b) * cdiv(K, b["BLOCK_K"]),),
            g.x, weight.contiguous(), bias, gate if gate is None else gate.contiguous(), scale, shift, residual, grad,
            y, partial, *g.sizes, *vectors, PRE_ACTIVATION=pre_activation, ACTIVATION=activation,
            TENSOR_CORES=on_tensor_cores, **constants, **g.constants,
            vary=("BLOCK_K", "BLOCK_C") if sums else ("BLOCK_P", "BLOCK_K", "BLOCK_C"),
        )  # fmt: skip
    return y, partial


# Where `grad` is float32 beside another dtype (after a curved activation), what it is multiplied with is converted
# before the launch: of what is converted inside, Triton 3.7 takes the product by TF32 on compute capability 10.0,
# whatever input_precision says.
def input_gradient(grad, x, weight, gate, stride, grad_x_wanted, gate_wanted):
    """(gradient of x, of gate), None where not wanted."""
    grad_x, partial = input_gradient_and_sums(grad, x, weight, gate, stride, grad_x_wanted, gate_wanted)
    if partial is None:
        return grad_x, None
    grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=x.device)
    if gate.numel():
        add_up(partial, grad_gate)
    return grad_x, grad_gate


def input_gradient_and_sums(
    grad, x, weight, gate, stride, grad_x_wanted, sums_wanted, scale=None, shift=None, pre_activation=0
):
    """(gradient of x, partial sums), None where not wanted: [N, tiles, C] of gate's gradient, or with scale
    [1, tiles, 2 C] of scale's and shift's."""
    g = Geometry(x, weight, gate, stride)
    K, C = weight.shape[:2]
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=g.format) if grad_x_wanted else None
    outer, width = (g.images, C) if scale is None else (1, 2 * C)
    if x.numel() == 0:
        return grad_x, torch.empty((outer, 0, width), dtype=accumulator(x), device=x.device) if sums_wanted else None
    on_tensor_cores = tensor_cores(x) and grad.dtype == x.dtype
    image = g.image if scale is None else min(g.image, 256)  # two sums besides: a large tile's registers spill
    channels_last = g.constants["CHANNELS_LAST"]
    blocks = configuration(
        pointwise_conv2d_bwd_input_kernel, grad,
        lambda: product_blocks(K, C, image, grad.dtype, on_tensor_cores, channels_last),
        C=K, K=C, image=g.image, stride=tuple(stride), gate=gate is not None,
        prologue=scale is not None, sums=sums_wanted,
        channels_last=channels_last, tensor_cores=on_tensor_cores,
    )  # fmt: skip
    vectors, constants = g.channels(K, C)
    partial = None
    if sums_wanted:
        partial = torch.empty((outer, g.tiles(blocks) // outer, width), dtype=accumulator(x), device=x.device)
    with torch.cuda.device_of(x):
        launch(
            pointwise_conv2d_bwd_input_kernel, blocks, lambda b: (g.tiles(b) * cdiv(C, b["BLOCK_K"]),),
            grad.contiguous(memory_format=g.format), g.x, weight.to(grad.dtype).contiguous(),
            gate if gate is None else gate.contiguous(), scale, shift, grad_x, partial,
            *g.sizes, *vectors, PRE_ACTIVATION=pre_activation, TENSOR_CORES=on_tensor_cores,
            **constants, **g.constants,
            vary=("BLOCK_K", "BLOCK_C") if sums_wanted else ("BLOCK_P", "BLOCK_K", "BLOCK_C"),
        )  # fmt: skip
    return grad_x, partial


def pointwise_conv2d(x, weight, bias, gate, residual, stride, activation):
    return forward(x, weight, bias, gate, residual, None, stride, activation)


def pointwise_conv2d_backward(grad, x, weight, bias, gate, residual, stride, activation, output_mask):
    """Gradients of (x, weight, bias, gate, residual): 0 elements for one that output_mask leaves out or None."""
    wanted = [bool(output_mask >> i & 1) and t is not None for i, t in enumerate((x, weight, bias, gate, residual))]
    grads = [(x if t is None else t).new_empty(0) for t in (x, weight, bias, gate, residual)]
    if activation != 0:
        grad = forward(x, weight, bias, gate, residual, grad, stride, activation)
    if wanted[0] or wanted[3]:
        of_x, of_gate = input_gradient(grad, x, weight, gate, stride, wanted[0], wanted[3])
        grads[0] = of_x if wanted[0] else grads[0]
        grads[3] = of_gate if wanted[3] else grads[3]
    if wanted[1] or wanted[2]:
        of_weight, of_bias = weight_gradient(grad, x, weight, bias if wanted[2] else None, gate, stride)
        grads[1] = of_weight if wanted[1] else grads[1]
        grads[2] = of_bias if wanted[2] else grads[2]
    if wanted[4]:
        grads[4] = residual_gradient(grad, residual)
    return tuple(grads)
