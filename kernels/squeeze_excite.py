"""Squeeze-and-excitation, forward and gradients: y = post_activation(x * gates + residual), gates from x's means.

Passes    Forward: the channels' sums (channels.py), two small products, and the pixels again, scaled. Backward: the
          gates anew; where there is a post_activation the gradient before it; the sums of gradient * x, which are the
          gates' gradients; the products' gradients; and grad_x = gradient * gates + the mean's share.
Layout    x, residual, y (N, C, H, W) dense, channels_last (the fast path) or NCHW, y in x's format; weights with any
          strides. Between kernels: vectors [image, channel] in the accumulator's dtype, before their activation: who
          reads them applies it.
Bytes     forward x twice, residual and y once. Backward without post_activation: x and grad twice, grad_x once; with
          one: x three times, grad and residual once, and what comes before the activation written once, read twice.
Numbers   float32, bfloat16, float16 with float32 arithmetic, float64 in float64; nothing is rounded in between, but
          that a gradient that only a clamp (relu, relu6) came over stays in x's dtype, in which it is exact.
Repeats   No atomics: every sum has a fixed order, and that of an image depends on C, H * W, dtype, format and the
          configuration alone, not on scheduling or on its neighbours in the batch.
Addresses Offsets of an image or pixel are int64, so tensors may exceed 2^31 elements; C, H * W, the weights' elements
          and the number of tiles stay below 2^31.
Registers and shared memory per target: docs/kernels.md.
"""

import torch
import triton
import triton.language as tl

from .activation import RELU6, activate
from .activation import gate as gradient_through
from .channels import channel_sums, image_blocks, locate_image
from .configurations import configuration, launch
from .launch import cdiv, dense, is_channels_last, memory_format, next_power_of_2, residual_gradient, vector
from .packing import accumulator

__all__ = ["squeeze_excite", "squeeze_excite_backward"]

TILES = 16  # that a product adds up at once: more of them spill its registers
IMAGES = 4  # that share a load of weights; always the same, since a sum's order must not depend on the batch


# A fully connected layer over the batch: out[n, j] = sum over i of weight[j, i] v[n, i] + bias[j], where
# v = activation(sum over tiles of partial[n, tile, i] / divisor), or with z that sum times activation'(z[n, i]); then
# OUT_ACTIVATION of it. partial's rows of inputs are `row` apart; with MORE_TILES there are more than BLOCK_T.
# Tile BLOCK_J outputs x BLOCK_I inputs of IMAGES images;  grid (images, block of outputs), the last fastest
# Bytes weight once per IMAGES images, from L2. `kept` gets v.
@triton.jit(do_not_specialize=["images", "inputs", "outputs", "tiles", "row"])
def squeeze_excite_product_kernel(
    partial, z, weight, bias, kept, out, images, inputs, outputs, tiles, row, divisor, w_j, w_i,
    ACTIVATION: tl.constexpr, OUT_ACTIVATION: tl.constexpr, IMAGES: tl.constexpr,
    MORE_TILES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    n_j = tl.cdiv(outputs, BLOCK_J)
    i_j = tl.program_id(0) % n_j
    i_n = (tl.program_id(0) // n_j * IMAGES).to(tl.int64)
    o_t = tl.arange(0, BLOCK_T)
    o_j = i_j * BLOCK_J + tl.arange(0, BLOCK_J)
    accs = (tl.zeros((BLOCK_J, BLOCK_I), out.dtype.element_ty),) * IMAGES
    for i in range(0, inputs, BLOCK_I):
        o_i = i + tl.arange(0, BLOCK_I)
        m_w = (o_j < outputs)[:, None] & (o_i < inputs)[None, :]
        b_w = tl.load(weight + (o_j * w_j)[:, None] + (o_i * w_i)[None, :], m_w, 0.0).to(out.dtype.element_ty)
        for n in tl.static_range(IMAGES):
            m_v = (o_i < inputs) & (i_n + n < images)
            p_v = partial + ((i_n + n) * tiles + o_t)[:, None] * row + o_i[None, :]
            b_v = tl.sum(tl.load(p_v, (o_t < tiles)[:, None] & m_v[None, :], 0.0), 0)
            if MORE_TILES:
                for t in range(BLOCK_T, tiles, BLOCK_T):
                    b_v += tl.sum(tl.load(p_v + t * row, (t + o_t < tiles)[:, None] & m_v[None, :], 0.0), 0)
            b_v /= divisor
            if z is None:
                b_v = activate(b_v, ACTIVATION)
            else:
                b_v = gradient_through(tl.load(z + (i_n + n) * inputs + o_i, m_v, 0.0), b_v, ACTIVATION)
            if kept is not None:
                tl.store(kept + (i_n + n) * inputs + o_i, b_v, m_v & (i_j == 0))
            accs = accs[:n] + (accs[n] + b_w * b_v[None, :],) + accs[n + 1 :]
    for n in tl.static_range(IMAGES):
        b_y = tl.sum(accs[n], 1)
        if bias is not None:
            b_y += tl.load(bias + o_j, o_j < outputs, 0.0).to(b_y.dtype)
        b_y = activate(b_y, OUT_ACTIVATION)
        tl.store(out + (i_n + n) * outputs + o_j, b_y, (o_j < outputs) & (i_n + n < images))


# Gradients of a layer's weight and bias: sums over the batch of grad[n, j] v[n, i] and of grad[n, j].
# Tile BLOCK_J x BLOCK_I of the weight, BLOCK_N images at a time;  grid (block of outputs, block of inputs)
@triton.jit(do_not_specialize=["images", "inputs", "outputs"])
def squeeze_excite_bwd_weight_kernel(
    grad, v, grad_weight, grad_bias, images, inputs, outputs,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    o_j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    o_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    acc = tl.zeros((BLOCK_J, BLOCK_I), grad.dtype.element_ty)
    sum_g = tl.zeros((BLOCK_J,), acc.dtype)
    for n in range(0, images, BLOCK_N):
        o_n = (n + tl.arange(0, BLOCK_N)).to(tl.int64)
        m_g = (o_n < images)[:, None] & (o_j < outputs)[None, :]
        b_g = tl.load(grad + (o_n * outputs)[:, None] + o_j[None, :], m_g, 0.0)  # [BN, BJ]
        m_v = (o_n < images)[:, None] & (o_i < inputs)[None, :]
        b_v = tl.load(v + (o_n * inputs)[:, None] + o_i[None, :], m_v, 0.0)  # [BN, BI]
        acc += tl.sum(b_g[:, :, None] * b_v[:, None, :], 0)
        sum_g += tl.sum(b_g, 0)
    m_w = (o_j < outputs)[:, None] & (o_i < inputs)[None, :]
    p_w = grad_weight + (o_j * inputs)[:, None] + o_i[None, :]
    tl.store(p_w, acc.to(grad_weight.dtype.element_ty), m_w)
    if grad_bias is not None:
        tl.store(grad_bias + o_j, sum_g.to(grad_bias.dtype.element_ty), (o_j < outputs) & (tl.program_id(1) == 0))


# y = activation(x * gate_activation(z) + share / pixels + residual), or with `grad` grad * activation'(...) instead; z
# and share are PER_IMAGE, or one row for all images, of which share is not divided; then times gates, of each image.
# Tile BLOCK_P pixels of one image x BLOCK_C channels;  grid one axis, a tile a program, channel blocks fastest
@triton.jit(do_not_specialize=["rows", "vectors"])
def squeeze_excite_scale_kernel(
    x, z, share, residual, grad, gates, y, rows, vectors,
    VECTOR: tl.constexpr, PER_IMAGE: tl.constexpr, GATE_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns = vectors * VECTOR  # in two factors, so that the compiler knows how rows are aligned
    channels = columns if CHANNELS_LAST else rows
    pixels = rows if CHANNELS_LAST else columns
    n_c = tl.cdiv(channels, BLOCK_C)
    n_p = tl.cdiv(pixels, BLOCK_P)
    i_tile = tl.program_id(0) // n_c  # (image, tile)
    i_n = (i_tile // n_p).to(tl.int64)
    o_p = i_tile % n_p * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = tl.program_id(0) % n_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offset, m_x = locate_image(rows, columns, i_n, o_p, o_c, CHANNELS_LAST)  # [BP, BC]
    row = i_n * channels if PER_IMAGE else 0
    b_z = activate(tl.load(z + row + o_c, o_c < channels, 0.0), GATE_ACTIVATION)
    b_y = tl.load(x + offset, m_x, 0.0).to(b_z.dtype) * b_z[None, :]
    if share is not None:
        b_share = tl.load(share + row + o_c, o_c < channels, 0.0)
        if PER_IMAGE:
            b_share /= pixels
        b_y += b_share[None, :]
    if residual is not None:
        b_y += tl.load(residual + offset, m_x, 0.0).to(b_z.dtype)
    if grad is None:
        b_y = activate(b_y, ACTIVATION)
    else:
        b_y = gradient_through(b_y, tl.load(grad + offset, m_x, 0.0).to(b_z.dtype), ACTIVATION)
    if gates is not None:
        b_y *= tl.load(gates + i_n * channels + o_c, o_c < channels, 0.0)[None, :]
    tl.store(y + offset, b_y.to(y.dtype.element_ty), m_x)


def product(partial, z, weight, bias, activation, divisor=1, transposed=False, keep=False, out_activation=0):
    """(out [N, 1, outputs], v [N, inputs] or None) of squeeze_excite_product_kernel for weight (outputs, inputs, 1, 1).

    partial: [N, tiles, inputs], numbers of a row side by side. transposed: weight (inputs, outputs, 1, 1).
    """
    N, tiles, inputs = partial.shape
    w_j, w_i = (weight.stride(1), weight.stride(0)) if transposed else (weight.stride(0), weight.stride(1))
    outputs = weight.shape[1 if transposed else 0]
    out = partial.new_empty((N, 1, outputs))
    kept = partial.new_empty((N, inputs)) if keep else None
    block_j, block_i = (16, 64) if w_i == 1 else (64, 16)
    with torch.cuda.device_of(partial):
        squeeze_excite_product_kernel[(cdiv(N, IMAGES) * cdiv(outputs, block_j),)](
            partial, z, weight, bias, kept, out, N, inputs, outputs, tiles, partial.stride(1), divisor, w_j, w_i,
            ACTIVATION=activation, OUT_ACTIVATION=out_activation, IMAGES=IMAGES, MORE_TILES=tiles > TILES,
            BLOCK_T=min(next_power_of_2(tiles), TILES), BLOCK_J=block_j, BLOCK_I=block_i, num_warps=4,
        )  # fmt: skip
    return out, kept


def layer_gradient(grad, v, weight, bias):
    """(gradient of weight, of bias or None) from grad [N, outputs] and v [N, inputs]."""
    (N, outputs), inputs = grad.shape, v.shape[1]
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    grad_bias = None if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    with torch.cuda.device_of(grad):
        squeeze_excite_bwd_weight_kernel[(cdiv(outputs, 32), cdiv(inputs, 32))](
            grad, v, grad_weight, grad_bias, N, inputs, outputs, BLOCK_N=8, BLOCK_J=32, BLOCK_I=32, num_warps=4
        )
    return grad_weight, grad_bias


def put_layer_gradients(grads, wanted, i, *layer):
    """Into grads[i] and grads[i + 1], those that are wanted."""
    if wanted[i] or wanted[i + 1]:
        of_layer = layer_gradient(*layer)
        grads[i : i + 2] = [of_layer[j] if wanted[i + j] else grads[i + j] for j in (0, 1)]


def scale(x, z, share, residual, grad, gate_activation, activation, channels_last, dtype, gates=None):
    """squeeze_excite_scale_kernel's y, of `dtype` and in x's format; z and share [N, .., C], or [C] for all images.

    gates: [N, .., C].
    """
    N, C, H, W = x.shape
    y = torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=memory_format(channels_last))
    if y.numel() == 0:
        return y
    rows, columns = (H * W, C) if channels_last else (C, H * W)
    v = vector(columns, x)
    blocks = configuration(
        squeeze_excite_scale_kernel, x, lambda: image_blocks(C, H * W, x, channels_last, vectors=1),
        C=C, pixels=H * W, channels_last=channels_last, residual=residual is not None, grad=grad is not None,
        gates=gates is not None,
    )  # fmt: skip
    with torch.cuda.device_of(x):
        launch(
            squeeze_excite_scale_kernel, blocks,
            lambda b: (N * cdiv(H * W, b["BLOCK_P"]) * cdiv(C, b["BLOCK_C"]),),
            x, z, share, residual, grad, gates, y, rows, columns // v, VECTOR=v, PER_IMAGE=z.dim() > 1,
            GATE_ACTIVATION=gate_activation, ACTIVATION=activation, CHANNELS_LAST=channels_last,
            vary=("BLOCK_P", "BLOCK_C"),
        )  # fmt: skip
    return y


def like(tensor, x, channels_last):
    """`tensor` (or None) dense in x's format."""
    return None if tensor is None else tensor.contiguous(memory_format=memory_format(channels_last))


def squeeze_excite(
    x, reduce_weight, reduce_bias, expand_weight, expand_bias, residual, activation, gate_activation, post_activation
):
    x, channels_last = dense(x)
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual = like(residual, x, channels_last)
    hidden, _ = product(
        channel_sums(x, None, channels_last), None, reduce_weight, reduce_bias, 0, x.shape[2] * x.shape[3]
    )
    z, _ = product(hidden, None, expand_weight, expand_bias, activation)
    return scale(x, z, None, residual, None, gate_activation, post_activation, channels_last, x.dtype)


def squeeze_excite_backward(
    grad, x, reduce_weight, reduce_bias, expand_weight, expand_bias, residual, activation, gate_activation,
    post_activation, output_mask,
):  # fmt: skip
    """Gradients of the tensors in that order: 0 elements for one that output_mask leaves out or that is None."""
    tensors = (x, reduce_weight, reduce_bias, expand_weight, expand_bias, residual)
    grads = [(x if tensor is None else tensor).new_empty(0) for tensor in tensors]
    wanted = [tensor is not None and output_mask >> i & 1 for i, tensor in enumerate(tensors)]
    x, channels_last = dense(x)
    N, C, H, W = x.shape
    mean = grad_z = torch.empty((N, C), dtype=accumulator(x), device=x.device)
    hidden = grad_hidden_z = mean.new_empty((N, reduce_weight.shape[0]))
    if N > 0:
        sums = channel_sums(x, None, channels_last)
        hidden_z, mean = product(sums, None, reduce_weight, reduce_bias, 0, divisor=H * W, keep=True)
        z, hidden = product(hidden_z, None, expand_weight, expand_bias, activation, keep=True)
        grad, residual = like(grad, x, channels_last), like(residual, x, channels_last)
        if post_activation != 0:
            # What a clamp lets through of a gradient fits grad's dtype; times another slope it doesn't.
            dtype = x.dtype if post_activation <= RELU6.value else accumulator(x)
            grad = scale(x, z, None, residual, grad, gate_activation, post_activation, channels_last, dtype)
    if N > 0 and any(wanted[:5]):
        sums = channel_sums(x, grad, channels_last)
        grad_hidden, grad_z = product(sums, z, expand_weight, None, gate_activation, transposed=True, keep=True)
        share, grad_hidden_z = product(
            grad_hidden, hidden_z, reduce_weight, None, activation, transposed=True, keep=True
        )
    if wanted[0]:
        grads[0] = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if N > 0:
            grads[0] = scale(grad, z, share, None, None, gate_activation, 0, channels_last, x.dtype)
    put_layer_gradients(grads, wanted, 1, grad_hidden_z, mean, reduce_weight, reduce_bias)
    put_layer_gradients(grads, wanted, 3, grad_z, hidden, expand_weight, expand_bias)
    if wanted[5]:
        own = N > 0 and post_activation != 0  # else grad is the caller's
        if own and grad.dtype == x.dtype and is_channels_last(tensors[5]) == channels_last:
            grads[5] = grad
        else:
            grads[5] = residual_gradient(grad, tensors[5])
    return tuple(grads)
