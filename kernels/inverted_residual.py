"""Inverted residual (MBConv): expand, depthwise, squeeze-excite where there is one, project; forward and gradients.

Ways      Without squeeze-excite, where `fusion_pays` (below) says so, one kernel: neither e nor d is in memory. Else
          pointwise_conv2d, depthwise_conv2d and pointwise_conv2d, e and d in memory. With squeeze-excite two passes and
          between them the gates, two small products: pointwise_depthwise, which sums d up on the way, or where
          `recompute_pays` says otherwise pointwise_conv2d and depthwise_conv2d, which then sums d up; at the end
          pointwise_conv2d with the gates on its input. Gradients: e and d anew, then each stage's own kernels.
Layout    x (N, C, H, W) dense, channels_last (the fast path) or NCHW; y in x's format. expand_weight [E, C] and
          project_weight [K, E] row by row; dw_weight taps-major, dw_weight[tap * w_stride + e].
Tile      STRIPS strips, one below the other, of BLOCK_H rows x BLOCK_W columns of one image, x BLOCK_K output channels
          (all of them up to 256; 64 beside plain multiplications). A program goes through BLOCK_E channels of e at a
          time, and with these down its strips as pointwise_depthwise does: e is computed anew for each filter column,
          here k (1 + (k - 1) / BLOCK_H) times at stride 1. Each row of d becomes a product's left side at once.
Grid      one axis: a tile a program, channel blocks fastest.
Bytes     ideally x, residual and y once; really x as often from L1 or L2 as e is computed, for each BLOCK_E channels.
Numbers   Products as pointwise_conv2d's. d is rounded to x's dtype where it is in memory or goes to tensor cores, and
          once more times its gates; e where it is in memory. Backward e is kept in the accumulator's dtype, so that no
          slope is taken on the wrong side of a kink; rounded are d, and the gradients of d and e.
Repeats   No atomics: every sum has a fixed order, which depends on an image's shape alone; so does the way taken, which
          besides depends on dtype, format and the device's kind.
Addresses Offsets of an image, row or pixel are int64, so tensors may exceed 2^31 elements; each dimension, C E, E K and
          the number of tiles stay below 2^31.
Registers and shared memory per target: docs/kernels.md.
"""

import functools

import torch
import triton
import triton.language as tl

from . import depthwise_conv2d as depthwise
from . import pointwise_conv2d as pointwise
from .activation import RELU6, activate
from .channels import channel_sums, few_tiles
from .configurations import configuration, launch
from .launch import (
    cdiv,
    dense,
    empty_image,
    fitting_power,
    kind_of,
    mask,
    memory_format,
    output_size,
    residual_gradient,
    vector,
)
from .packing import accumulator, taps_major
from .pointwise_depthwise import add_rows, input_channels, pointwise_depthwise, recompute_pays, times
from .products import multiply_add, side
from .spatial import geometry, locate, strides
from .squeeze_excite import product, squeeze_excite_backward

__all__ = ["inverted_residual", "inverted_residual_backward"]

SIZES = ["H", "W", "OH", "OW", "pad_top", "pad_left", "columns", "c_vectors", "e_vectors", "k_vectors"]


@triton.constexpr_function
def first_sum(t, rows):
    """Of the sums of which the one m is of row t - m: the first that is of a row there is."""
    return max(t - rows + 1, 0)


@triton.constexpr_function
def last_sum(t, window):
    return min(t, window - 1)


@triton.jit(do_not_specialize=SIZES)
def inverted_residual_fwd_kernel(
    x, expand_weight, expand_bias, dw_weight, dw_bias, project_weight, project_bias, residual, y,
    H, W, OH, OW, pad_top, pad_left, columns, c_vectors, e_vectors, k_vectors, w_stride,
    C_VECTOR: tl.constexpr, E_VECTOR: tl.constexpr, K_VECTOR: tl.constexpr,
    MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, TENSOR_CORES: tl.constexpr, WHOLE: tl.constexpr,
    STRIPS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = c_vectors * C_VECTOR  # in two factors, so that the compiler knows how rows are aligned
    E = e_vectors * E_VECTOR
    K = k_vectors * K_VECTOR
    BLOCK_P: tl.constexpr = STRIPS * BLOCK_W
    i_n, o_s, o_w, o_k = locate(K, OH, OW, BLOCK_K, STRIPS, BLOCK_H, BLOCK_W)
    m_k = o_k < K
    top = o_s * BLOCK_H * STRIDE_H - pad_top  # [BP]
    left = o_w * STRIDE_W - pad_left
    x_c, x_h, x_w = strides(C, H, W, CHANNELS_LAST)
    p_x = x + (i_n * C * H * W + top * x_h + left * x_w)  # [BP]
    o_c = tl.arange(0, BLOCK_C)

    WINDOW: tl.constexpr = (KH - 1) * DILATION_H // STRIDE_H + 1
    zero = tl.zeros((BLOCK_P, BLOCK_E), dw_weight.dtype.element_ty)
    outs = (tl.zeros((BLOCK_P, BLOCK_K), dw_weight.dtype.element_ty),) * BLOCK_H
    for first in range(0, E, BLOCK_E):
        o_e = first + tl.arange(0, BLOCK_E)
        m_e = o_e < E
        p_e = None
        b_ew = 0.0
        b_mid = 0.0
        if expand_weight is not None:
            p_e = expand_weight + (o_c[:, None] + (o_e * C)[None, :])  # [BC, BE]
            if WHOLE:
                b_ew = tl.load(p_e, (o_c < C)[:, None] & m_e[None, :], 0.0)
            if expand_bias is not None:
                b_mid = tl.load(expand_bias + o_e, m_e, 0.0).to(zero.dtype)[None, :]
        b_bias = 0.0
        if dw_bias is not None:
            b_bias = tl.load(dw_bias + o_e, m_e, 0.0).to(zero.dtype)[None, :]
        b_pw = tl.load(
            project_weight + (o_e[:, None] + (o_k * E)[None, :]), m_e[:, None] & m_k[None, :], 0.0
        )  # [BE, BK]

        accs = (zero,) * WINDOW  # accs[m] is of row t - m of the outputs
        for t in tl.static_range(BLOCK_H + WINDOW - 1):
            accs = add_rows(
                accs, t, p_x, p_e, b_ew, b_mid, dw_weight, o_e, m_e, top, left, H, W, C, columns, w_stride,
                x_c, x_h, x_w, KH, KW, STRIDE_H, DILATION_H, DILATION_W, 0, ACTIVATION, TENSOR_CORES, WHOLE,
                first_sum(t, BLOCK_H), last_sum(t, WINDOW), BLOCK_P, BLOCK_E, BLOCK_C,
            )  # fmt: skip
            if t >= WINDOW - 1:
                b_d = tl.where(m_e[None, :], activate(accs[WINDOW - 1] + b_bias, ACTIVATION), 0.0)  # 0 times NaN is NaN
                if TENSOR_CORES:
                    b_d = b_d.to(b_pw.dtype)
                b_y = multiply_add(b_d, b_pw, outs[t + 1 - WINDOW], TENSOR_CORES)
                outs = outs[: t + 1 - WINDOW] + (b_y,) + outs[t + 2 - WINDOW :]
            accs = (zero,) + accs[: WINDOW - 1]

    b_bias = 0.0
    if project_bias is not None:
        b_bias = tl.load(project_bias + o_k, m_k, 0.0).to(dw_weight.dtype.element_ty)[None, :]
    y_c, y_h, y_w = strides(K, OH, OW, CHANNELS_LAST)
    o_h = o_s * BLOCK_H
    o_y = (i_n * K * OH * OW + o_h * y_h + o_w * y_w)[:, None] + (o_k * y_c)[None, :]  # [BP, BK]
    for o in tl.static_range(BLOCK_H):
        m_y = ((o_h + o < OH) & (o_w < OW))[:, None] & m_k[None, :]
        b_y = outs[o] + b_bias
        if residual is not None:
            b_y += tl.load(residual + (o_y + o * y_h), m_y, 0.0).to(b_y.dtype)
        tl.store(y + (o_y + o * y_h), b_y.to(y.dtype.element_ty), m_y)


def forward_blocks(kind, C, K, height, width, kernel, stride, dilation):
    """Tile of the kernel: 32 columns, of which a thread of 128 holds 32 numbers of y or, of more than 128 channels, 64.

    Beside plain multiplications' operands 64 channels at most, and half as many of e, as beside the sums of large
    filters.
    """
    block_k = side(K, 256 if kind.tensor_cores else 64)
    block_w = fitting_power(width, 8, 32)
    reach = (kernel[0] - 1) * dilation[0]
    large = reach >= 3 * stride[0]
    most = max(min((256 if large else 128) // block_k, 4), 1) if kind.tensor_cores else 2

    def computed(tile):
        count, block_h = tile
        rows = count * ((block_h - 1) * stride[0] + reach + 1)
        return cdiv(height, count * block_h) * rows * (32 / (count * block_w)) ** (1 / 3)

    counts = [n // block_w for n in (32, 16) if n >= block_w]
    count, block_h = min(((n, rows) for n in counts for rows in range(most, 0, -1)), key=computed)
    return dict(
        STRIPS=count, BLOCK_H=block_h, BLOCK_W=block_w, BLOCK_K=block_k,
        BLOCK_E=32 if kind.tensor_cores and not large else 16,
        BLOCK_C=input_channels(kind, C), num_warps=4, num_stages=1,
    )  # fmt: skip


@functools.cache
def fusion_pays(kind, C, kernel, stride, dilation, height, width, activation, K, no_expansion):
    """Whether one kernel is to be faster than e and d in memory; as pointwise_depthwise.recompute_pays, by the time of
    one number of d."""
    size = kind.dtype.itemsize
    byte, cached, each = times(kind, C, activation)
    blocks = forward_blocks(kind, C, K, height, width, kernel, stride, dilation)
    strip = blocks["BLOCK_H"]
    computed = kernel[1] * ((strip - 1) * stride[0] + (kernel[0] - 1) * dilation[0] + 1) / strip
    computed *= cdiv(width, blocks["BLOCK_W"]) * blocks["BLOCK_W"] / width * cdiv(K, blocks["BLOCK_K"])
    columns = blocks["STRIPS"] * blocks["BLOCK_W"]
    pixel = size * (1 if no_expansion else C / blocks["BLOCK_E"])
    weights = size * (K + C) / (columns * strip)  # of a number of d
    if blocks["BLOCK_C"] < C:
        weights += computed * size * C / columns
    _, _, projected = times(kind, K, 0)
    alone = 0.0 if no_expansion else stride[0] * stride[1] * max(2 * size * byte, each)
    alone += max(2 * size * byte, projected)
    if no_expansion:
        each = 0.0
    return computed * (each + pixel * cached) + weights * cached + projected < alone


def fused(
    x, expand_weight, expand_bias, dw_weight, dw_bias, project_weight, project_bias, residual,
    stride, padding, dilation, activation,
):  # fmt: skip
    """Without squeeze-excite, in one kernel."""
    x, channels_last = dense(x)
    N, C, H, W = x.shape
    E, _, *kernel = dw_weight.shape
    K = project_weight.shape[0]
    OH, OW, top, left = output_size((H, W), kernel, stride, padding, dilation)
    y = torch.empty((N, K, OH, OW), dtype=x.dtype, device=x.device, memory_format=memory_format(channels_last))
    if y.numel() == 0:
        return y
    if residual is not None:
        residual = residual.contiguous(memory_format=memory_format(channels_last))
    kind = kind_of(x)
    window = geometry(kernel, stride, dilation, 1)
    blocks = configuration(
        inverted_residual_fwd_kernel, x,
        lambda: forward_blocks(kind, C, K, OH, OW, kernel, stride, dilation),
        C=C, E=E, K=K, height=OH, width=OW, expansion=expand_weight is not None, residual=residual is not None,
        curved=activation > RELU6.value, channels_last=channels_last, tensor_cores=kind.tensor_cores, **window,
    )  # fmt: skip

    def tiles_of(b):
        return cdiv(OH, b["STRIPS"] * b["BLOCK_H"]) * cdiv(OW, b["BLOCK_W"])

    rows = taps_major(dw_weight, accumulator(x))
    c, e, k = (vector(channels, x) for channels in (C, E, K))
    with torch.cuda.device_of(x):
        launch(
            inverted_residual_fwd_kernel, blocks, lambda b: (N * tiles_of(b) * cdiv(K, b["BLOCK_K"]),),
            x, expand_weight if expand_weight is None else expand_weight.contiguous(), expand_bias, rows, dw_bias,
            project_weight.contiguous(), project_bias, residual, y,
            H, W, OH, OW, top, left, kernel[1], C // c, E // e, K // k, rows.stride(0),
            C_VECTOR=c, E_VECTOR=e, K_VECTOR=k,
            ACTIVATION=activation, CHANNELS_LAST=channels_last, TENSOR_CORES=kind.tensor_cores,
            WHOLE=blocks["BLOCK_C"] >= C, **window,
            vary=("STRIPS", "BLOCK_H", "BLOCK_W", "BLOCK_K", "BLOCK_E"),  # BLOCK_C: WHOLE says what it may be
        )  # fmt: skip
    return y


def apart(
    x, expand_weight, expand_bias, dw_weight, dw_bias, project_weight, project_bias, residual,
    stride, padding, dilation, activation,
):  # fmt: skip
    """Without squeeze-excite, a kernel a stage."""
    e = expansion(x, expand_weight, expand_bias, activation, x.dtype)
    d, _ = depthwise_stage(e, dw_weight, dw_bias, stride, padding, dilation, activation, x.dtype)
    return pointwise.forward(d, project_weight, project_bias, None, residual, None, (1, 1), 0)


def expansion(x, expand_weight, expand_bias, activation, dtype):
    """e in memory, of `dtype`; x itself where there is no expansion."""
    if expand_weight is None:
        return x
    return pointwise.forward(x, expand_weight, expand_bias, None, None, None, (1, 1), activation, dtype)


def depthwise_stage(e, dw_weight, dw_bias, stride, padding, dilation, activation, dtype, sums=0):
    """(d in memory, of `dtype`; with sums=1 its sums [N, tiles, E], else None)."""
    E, _, *kernel = dw_weight.shape
    rows = taps_major(dw_weight, accumulator(e))
    return depthwise.forward_and_sums(
        e, rows, dw_bias, None, E, kernel, stride, padding, dilation, 0, activation, sums=sums, dtype=dtype
    )


def gates(d, partial, excite, se_activation, gate_activation):
    """[N, E, 1, 1] in the accumulator's dtype, from d and its sums [N, tiles, E], or None where they are to be made."""
    if partial is None:
        d, channels_last = dense(d)
        partial = channel_sums(d, None, channels_last)
    partial = few_tiles(partial)
    pixels = d.shape[2] * d.shape[3]
    reduce_weight, reduce_bias, expand_weight, expand_bias = excite
    hidden, _ = product(partial, None, reduce_weight, reduce_bias, 0, divisor=pixels)
    out, _ = product(hidden, None, expand_weight, expand_bias, se_activation, out_activation=gate_activation)
    return out.view(out.shape[0], -1, 1, 1)


def excited(
    x, expand_weight, expand_bias, dw_weight, dw_bias, excite, project_weight, project_bias, residual,
    stride, padding, dilation, activation, se_activation, gate_activation, one_pass,
):  # fmt: skip
    """With squeeze-excite; one_pass: e, d and d's sums in one, else in two."""
    if one_pass:
        d, partial = pointwise_depthwise(
            x, expand_weight, expand_bias, dw_weight, dw_bias, None, stride, padding, dilation,
            0, activation, activation, squeeze=True,
        )  # fmt: skip
    else:
        e = expansion(x, expand_weight, expand_bias, activation, x.dtype)
        d, partial = depthwise_stage(e, dw_weight, dw_bias, stride, padding, dilation, activation, x.dtype, sums=1)
    gate = gates(d, partial, excite, se_activation, gate_activation) if d.numel() else None
    return pointwise.forward(d, project_weight, project_bias, gate, residual, None, (1, 1), 0)


def inverted_residual(
    x, expand_weight, expand_bias, dw_weight, dw_bias, se_reduce_weight, se_reduce_bias, se_expand_weight,
    se_expand_bias, project_weight, project_bias, residual, stride, padding, dilation, activation, se_activation,
    gate_activation,
):  # fmt: skip
    E, _, *kernel = dw_weight.shape
    height, width, _, _ = output_size(x.shape[2:], kernel, stride, padding, dilation)
    kind, C = kind_of(x), x.shape[1]
    sizes = (tuple(kernel), tuple(stride), tuple(dilation), height, width, activation)
    stages = (x, expand_weight, expand_bias, dw_weight, dw_bias)
    project = (project_weight, project_bias, residual)
    if se_reduce_weight is None:
        pays = fusion_pays(kind, C, *sizes, project_weight.shape[0], expand_weight is None)
        way = fused if pays else apart
        return way(*stages, *project, stride, padding, dilation, activation)
    excite = (se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias)
    one_pass = expand_weight is not None and recompute_pays(kind, C, E, *sizes)
    return excited(
        *stages, excite, *project, stride, padding, dilation, activation, se_activation, gate_activation, one_pass
    )


def inverted_residual_backward(
    grad, x, expand_weight, expand_bias, dw_weight, dw_bias, se_reduce_weight, se_reduce_bias, se_expand_weight,
    se_expand_bias, project_weight, project_bias, residual, stride, padding, dilation, activation, se_activation,
    gate_activation, output_mask,
):  # fmt: skip
    """Gradients of the tensors in that order: 0 elements for one that output_mask leaves out or that is None."""
    expand, dw = (expand_weight, expand_bias), (dw_weight, dw_bias)
    excite = (se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias)
    tensors = (x, *expand, *dw, *excite, project_weight, project_bias, residual)
    wanted = [tensor is not None and bool(output_mask >> i & 1) for i, tensor in enumerate(tensors)]
    grads = [(x if tensor is None else tensor).new_empty(0) for tensor in tensors]
    E, _, *kernel = dw_weight.shape
    excites = se_reduce_weight is not None

    below_project, below_d, below_e = any(wanted[:9]), any(wanted[:5]), any(wanted[:3])
    if below_d or any(wanted[5:10]):
        e = expansion(x, expand_weight, expand_bias, activation, accumulator(x))
    gate = None
    if wanted[9] or (excites and below_project):
        d, _ = depthwise_stage(e, dw_weight, dw_bias, stride, padding, dilation, activation, x.dtype)
        if excites and wanted[9] and d.numel():
            gate = gates(d, None, excite, se_activation, gate_activation)
    elif below_project or wanted[10]:  # of d only the shape and the format matter
        d = empty_image(x, (x.shape[0], E, *grad.shape[2:]))
    if wanted[11]:
        grads[11] = residual_gradient(grad, residual)
    if wanted[9] or wanted[10]:
        bias = project_bias if wanted[10] else None
        of = pointwise.weight_gradient(grad, d, project_weight, bias, gate, (1, 1))
        grads[9:11] = [of[i] if wanted[9 + i] else grads[9 + i] for i in (0, 1)]
    if not below_project:
        return tuple(grads)

    grad, _ = pointwise.input_gradient(grad, d, project_weight, None, (1, 1), True, False)
    if excites:
        grad, *grads[5:9] = squeeze_excite_backward(
            grad, d, *excite, None, se_activation, gate_activation, 0, mask(below_d, *wanted[5:9])
        )[:5]  # fmt: skip
    if not below_d:
        return tuple(grads)

    rows = taps_major(dw_weight, accumulator(x))
    grad = depthwise.before_activation(
        grad, e, rows, dw_bias, E, kernel, stride, padding, dilation, 0, activation
    )  # fmt: skip
    if wanted[3] or wanted[4]:
        bias = dw_bias if wanted[4] else None
        of = depthwise.weight_gradient(grad, e, dw_weight, bias, stride, padding, dilation, 0)
        grads[3:5] = [of[i] if wanted[3 + i] else grads[3 + i] for i in (0, 1)]
    if below_e:
        grad = depthwise.input_gradient(grad, e, rows, E, kernel, stride, padding, dilation, 0, x.dtype)
        if expand_weight is None:
            grads[0] = grad
        else:
            grads[:3] = pointwise.pointwise_conv2d_backward(
                grad, x, expand_weight, expand_bias, None, None, (1, 1), activation, mask(*wanted[:3])
            )[:3]
    return tuple(grads)
