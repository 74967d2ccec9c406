"""Depthwise-separable convolution: t = mid_activation(depthwise(pre_activation(x), dw_weight) + dw_bias), then
y = activation(conv1x1(t, pw_weight) + pw_bias + residual), t never in memory.

Layout    x (N, C, H, W) dense, channels_last (the fast path: 16-byte loads along C) or NCHW; y in x's format. Channel
          m of t is made from channel m // MULTIPLIER of x. dw_weight taps-major in the accumulator's dtype (one small
          copy a call), pw_weight [K, M] row by row.
Tile      BLOCK_P strips, BLOCK_H rows of one column of y each, counted on through all images, x BLOCK_K output channels
          (256 at most). A loop over BLOCK_C channels of t makes them in registers, a row of x loaded and converted once
          per filter column for all the rows that it goes into, and multiplies them: BLOCK_H products of BLOCK_P pixels.
Grid      one axis: a tile a program, channel blocks fastest, so that programs in flight together share x in L2.
Bytes     ideally x, y, residual and the weights once. Really x once more from L2 for each further block of BLOCK_K
          output channels, which also makes t again; and from L1 a strip's rows kernel_w times.
Staging   None by Triton's pipeliner, which would keep every tap of x in shared memory. The product's weights are loaded
          into registers before a step's windows, and go to shared memory after them; t goes through it to become the
          product's first operand, which is in registers.
Numbers   As pointwise_conv2d's: t is rounded to x's dtype for the tensor cores (to TF32 for float32), and not at all
          where products are plain multiplications. Sums and everything else are float32, float64 for float64.
Addresses Offsets of an image, row or pixel are int64, so tensors may exceed 2^31 elements; each dimension, N OH OW, M K
          and the number of tiles stay below 2^31.
Repeats   No atomics: every sum has a fixed order, and that of a pixel depends on shapes alone, not on the batch.
Registers and shared memory per target: docs/kernels.md.

Gradients are those of the two stages, one after the other: t is computed once more, and its gradient is in memory.
"""

import torch
import triton
import triton.language as tl

from .activation import RELU6, activate
from .configurations import configuration, launch
from .conv2d import finish
from .depthwise_conv2d import depthwise_conv2d, depthwise_conv2d_backward, windows
from .launch import (
    cdiv,
    dense,
    empty_image,
    fitting_power,
    is_channels_last,
    mask,
    memory_format,
    next_power_of_2,
    output_size,
    residual_gradient,
    tensor_cores,
    vector,
)
from .packing import accumulator, taps_major
from .pointwise_conv2d import pointwise_conv2d, pointwise_conv2d_backward
from .pointwise_depthwise import pointwise_depthwise
from .products import multiply_add
from .spatial import geometry, strides

__all__ = ["separable_conv2d", "separable_conv2d_backward"]

SIZES = ["N", "H", "W", "OH", "OW", "pad_top", "pad_left", "m_vectors", "k_vectors"]


@triton.jit(do_not_specialize=SIZES)
def separable_conv2d_fwd_kernel(
    x, dw_weight, dw_bias, pw_weight, pw_bias, residual, y, N, H, W, OH, OW, pad_top, pad_left, m_vectors, k_vectors,
    w_stride,
    M_VECTOR: tl.constexpr, K_VECTOR: tl.constexpr, MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    PRE_ACTIVATION: tl.constexpr, MID_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, TENSOR_CORES: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    M = m_vectors * M_VECTOR  # in two factors, so that the compiler knows how rows are aligned
    K = k_vectors * K_VECTOR
    C = M // MULTIPLIER
    n_k = tl.cdiv(K, BLOCK_K)
    n_h = tl.cdiv(OH, BLOCK_H)
    o_p = tl.program_id(0) // n_k * BLOCK_P + tl.arange(0, BLOCK_P)  # (image, row of strips, column) [BP]
    o_k = tl.program_id(0) % n_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_p = o_p < N * n_h * OW
    m_k = o_k < K
    o_n = (o_p // (n_h * OW)).to(tl.int64)
    o_h = o_p // OW % n_h * BLOCK_H
    o_w = o_p % OW
    top = o_h * STRIDE_H - pad_top
    left = tl.where(m_p, o_w * STRIDE_W - pad_left, W)  # a strip beyond the last image reads nothing
    x_c, x_h, x_w = strides(C, H, W, CHANNELS_LAST)
    p_x = x + (o_n * C * H * W + top * x_h + left * x_w)[:, None]
    p_w = pw_weight + (o_k * M)[None, :]

    accs = (tl.zeros((BLOCK_P, BLOCK_K), dw_weight.dtype.element_ty),) * BLOCK_H
    for c in range(0, M, BLOCK_C):
        o_m = c + tl.arange(0, BLOCK_C)
        m_m = o_m < M
        b_w = tl.load(p_w + o_m[:, None], m_m[:, None] & m_k[None, :], 0.0)  # [BC, BK]
        b_ts = windows(
            p_x + (o_m // MULTIPLIER * x_c)[None, :], None, None, dw_weight, top, left, o_m, m_m, H, W, x_h, x_w,
            w_stride, KH, KW, STRIDE_H, DILATION_H, DILATION_W, PRE_ACTIVATION, BLOCK_P, BLOCK_H, BLOCK_C,
        )  # fmt: skip
        b_bias = 0.0
        if dw_bias is not None:
            b_bias = tl.load(dw_bias + o_m, m_m, 0.0).to(dw_weight.dtype.element_ty)[None, :]
        b_w = tl.where(m_m[:, None], b_w, 0.0)  # changes nothing: Triton waits here for a load, else right behind it
        for o in tl.static_range(BLOCK_H):
            b_t = activate(b_ts[o] + b_bias, MID_ACTIVATION)  # [BP, BC], finite beyond M, where weights are 0
            if TENSOR_CORES:
                b_t = b_t.to(pw_weight.dtype.element_ty)
            b_y = multiply_add(b_t, b_w, accs[o], TENSOR_CORES)
            accs = accs[:o] + (b_y,) + accs[o + 1 :]

    b_bias = 0.0
    if pw_bias is not None:
        b_bias = tl.load(pw_bias + o_k, m_k, 0.0).to(dw_weight.dtype.element_ty)[None, :]
    y_c, y_h, y_w = strides(K, OH, OW, CHANNELS_LAST)
    o_y = (o_n * K * OH * OW + o_h * y_h + o_w * y_w)[:, None] + (o_k * y_c)[None, :]  # [BP, BK]
    for o in tl.static_range(BLOCK_H):
        m_y = (m_p & (o_h + o < OH))[:, None] & m_k[None, :]
        b_y = accs[o] + b_bias
        if residual is not None:
            b_y += tl.load(residual + (o_y + o * y_h), m_y, 0.0).to(b_y.dtype)
        tl.store(y + (o_y + o * y_h), activate(b_y, ACTIVATION).to(y.dtype.element_ty), m_y)


def product_blocks(M, K, OH, windows_share_rows, kernel_h, curved, x, on_tensor_cores, wide):
    """Tile for M channels of t and K of y.

    `curved`: an activation before the product has an exponential; `wide`: x is loaded many channels at a time.

    It depends on the size of an image, not on the batch: a pixel's sum has the same order beside any neighbours. As
    many output channels as registers allow, since each further block of them makes t again; then two rows a strip,
    where there is room for the filter's weights and the rows of x beside the sums.
    """
    small = wide and kernel_h <= 3 and not curved
    block_p, block_h, block_c, warps = 64, 1, 16, 8
    if x.dtype == torch.float64:
        block_p, most = 32, 64
    elif not on_tensor_cores:  # both operands in registers, too
        most = 128 if small else 64
        if kernel_h > 5:
            most, warps = 32, 2 * x.element_size()  # a thread for each 16 bytes of a row of x
    else:
        most = 256 if wide and kernel_h <= (5 if curved else 7) else 64
        block_c = 64 // x.element_size()
    block_k = min(max(next_power_of_2(K), 16), most)
    if on_tensor_cores and x.element_size() == 2 and wide and kernel_h <= 5 and windows_share_rows:
        block_h = min(2, (512 if small else 256) // block_k, OH)
    block_c = max(fitting_power(M, 16, block_c), 16)
    return dict(BLOCK_P=block_p, BLOCK_H=block_h, BLOCK_K=block_k, BLOCK_C=block_c, num_warps=warps, num_stages=1)


def depthwise_pointwise(
    x, dw_weight, dw_bias, pw_weight, pw_bias, residual, stride, padding, dilation, pre_activation, mid_activation,
    activation,
):  # fmt: skip
    x, channels_last = dense(x)
    N, C, H, W = x.shape
    M, _, *kernel = dw_weight.shape
    K = pw_weight.shape[0]
    OH, OW, top, left = output_size((H, W), kernel, stride, padding, dilation)
    y = empty_image(x, (N, K, OH, OW))
    if y.numel() == 0:
        return y
    if residual is not None:
        residual, _ = dense(residual, like=x)
    on_tensor_cores = tensor_cores(x)
    curved = max(pre_activation, mid_activation) > RELU6.value
    share = stride[0] % dilation[0] == 0 and stride[0] < kernel[0] * dilation[0]
    m, k = vector(M, x), vector(K, x)
    wide = channels_last and M == C and m * x.element_size() >= 8
    window = geometry(kernel, stride, dilation, M // C)
    blocks = configuration(
        separable_conv2d_fwd_kernel, x,
        lambda: product_blocks(M, K, OH, share, kernel[0], curved, x, on_tensor_cores, wide),
        M=M, K=K, height=OH, residual=residual is not None, curved=curved,
        channels_last=channels_last, tensor_cores=on_tensor_cores, **window,
    )  # fmt: skip
    rows = taps_major(dw_weight, accumulator(x))
    with torch.cuda.device_of(x):
        launch(
            separable_conv2d_fwd_kernel, blocks,
            lambda b: (cdiv(N * cdiv(OH, b["BLOCK_H"]) * OW, b["BLOCK_P"]) * cdiv(K, b["BLOCK_K"]),),
            x, rows, dw_bias, pw_weight.contiguous(), pw_bias, residual, y,
            N, H, W, OH, OW, top, left, M // m, K // k, rows.stride(0), M_VECTOR=m, K_VECTOR=k,
            PRE_ACTIVATION=pre_activation, MID_ACTIVATION=mid_activation, ACTIVATION=activation,
            CHANNELS_LAST=channels_last, TENSOR_CORES=on_tensor_cores, **window,
            vary=("BLOCK_P", "BLOCK_H", "BLOCK_K", "BLOCK_C"),
        )  # fmt: skip
    return y


def separable_conv2d(
    x, dw_weight, dw_bias, pw_weight, pw_bias, residual, stride, padding, dilation, pointwise_first, pre_activation,
    mid_activation, activation,
):  # fmt: skip
    activations = pre_activation, mid_activation, activation
    if pointwise_first:
        return pointwise_depthwise(
            x, pw_weight, pw_bias, dw_weight, dw_bias, residual, stride, padding, dilation, *activations
        )[0]
    return depthwise_pointwise(
        x, dw_weight, dw_bias, pw_weight, pw_bias, residual, stride, padding, dilation, *activations
    )


def separable_conv2d_backward(
    grad, x, dw_weight, dw_bias, pw_weight, pw_bias, residual, stride, padding, dilation, pointwise_first,
    pre_activation, mid_activation, activation, output_mask,
):  # fmt: skip
    """Gradients of (x, dw_weight, dw_bias, pw_weight, pw_bias, residual).

    0 elements for one that output_mask leaves out or that is None.
    """
    tensors = dense(x)[0], dw_weight, dw_bias, pw_weight, pw_bias, residual
    wanted = [bool(output_mask >> i & 1) and t is not None for i, t in enumerate(tensors)]
    backward = pointwise_depthwise_backward if pointwise_first else depthwise_pointwise_backward
    activations = pre_activation, mid_activation, activation
    gradients = backward(grad, *tensors, stride, padding, dilation, *activations, wanted)
    nothing = [(x if t is None else t).new_empty(0) for t in tensors]
    return tuple(gradients[i] if want else nothing[i] for i, want in enumerate(wanted))


def depthwise_pointwise_backward(
    grad, x, dw_weight, dw_bias, pw_weight, pw_bias, residual, stride, padding, dilation, pre_activation,
    mid_activation, activation, wanted,
):  # fmt: skip
    """Gradients, undefined where not wanted."""
    first, second = wanted[:3], wanted[3:5]
    if activation != 0 or second[0]:
        t = depthwise_conv2d(x, dw_weight, dw_bias, stride, padding, dilation, pre_activation, mid_activation)
    else:  # only its shape counts
        t = empty_image(x, (x.shape[0], dw_weight.shape[0], *grad.shape[2:]))
    grad_t, grad_pw_weight, grad_pw_bias, _, grad_residual = pointwise_conv2d_backward(
        grad, t, pw_weight, pw_bias, None, residual, (1, 1), activation, mask(any(first), *second, False, wanted[5])
    )
    of_first = (None, None, None)
    if any(first):
        of_first = depthwise_conv2d_backward(
            grad_t, x, dw_weight, dw_bias, stride, padding, dilation, pre_activation, mid_activation, mask(*first)
        )
    return *of_first, grad_pw_weight, grad_pw_bias, grad_residual


def pointwise_depthwise_backward(
    grad, x, dw_weight, dw_bias, pw_weight, pw_bias, residual, stride, padding, dilation, pre_activation,
    mid_activation, activation, wanted,
):  # fmt: skip
    """Gradients, undefined where not wanted."""
    first, second = (wanted[0], *wanted[3:5]), wanted[1:3]
    t_counts = activation != 0 or second[0]
    z = x
    if t_counts or first[1] or (mid_activation != 0 and any(first)):
        z = activated(x, pre_activation)
    if t_counts:
        t = pointwise_conv2d(z, pw_weight, pw_bias, None, None, (1, 1), mid_activation)
    else:  # only its shape counts
        t = empty_image(x, (x.shape[0], pw_weight.shape[0], *x.shape[2:]))
    if residual is not None and activation != 0:
        grad = before_activation(grad, t, dw_weight, dw_bias, residual, stride, padding, dilation, activation)
        activation = 0
    grad_residual = residual_gradient(grad, residual) if wanted[5] else None
    grad_t, grad_dw_weight, grad_dw_bias = depthwise_conv2d_backward(
        grad, t, dw_weight, dw_bias, stride, padding, dilation, 0, activation, mask(any(first), *second)
    )
    grad_z, grad_pw_weight, grad_pw_bias = None, None, None
    if any(first):
        grad_z, grad_pw_weight, grad_pw_bias, _, _ = pointwise_conv2d_backward(
            grad_t, z, pw_weight, pw_bias, None, None, (1, 1), mid_activation, mask(*first)
        )
    grad_x = activated(x, pre_activation, grad_z) if wanted[0] else None
    return grad_x, grad_dw_weight, grad_dw_bias, grad_pw_weight, grad_pw_bias, grad_residual


def before_activation(grad, t, dw_weight, dw_bias, residual, stride, padding, dilation, activation):
    """grad * activation'(depthwise(t) + residual), where neither the sum nor its first part is rounded."""
    v = depthwise_conv2d(t.to(accumulator(t)), dw_weight, dw_bias, stride, padding, dilation, 0, 0)
    channels_last = is_channels_last(v)
    finish(v, None, residual, grad.contiguous(memory_format=memory_format(channels_last)), activation, channels_last)
    return v.to(grad.dtype) if activation <= RELU6.value else v  # what a clamp lets through is grad's


def activated(x, activation, grad=None):
    """activation(x), or grad * activation'(x)."""
    x, channels_last = dense(x)
    if activation == 0:
        return x if grad is None else grad
    y = x.clone(memory_format=memory_format(channels_last))
    finish(y, None, None, grad, activation, channels_last)
    return y
