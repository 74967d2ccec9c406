"""Dense convolution: y = activation(conv(x, weight) + bias + residual). The convolution and its gradients are ATen's
(cuDNN's); what comes after it is one pass over its result, in place, and none where nothing does.

Layout    x (N, C, H, W) dense, channels_last or NCHW; y in x's format; residual and grad in y's, so that all are flat.
Tile      BLOCK_C numbers of y as they lie in memory, 16 bytes a thread.
Grid      one axis: a tile a program.
Bytes     the pass reads y and residual once and writes y once.
Numbers   The convolution's result is rounded to x's dtype; then residual, a float32 bias and the activation, in float32
          (float64 for float64). Gradients are cuDNN's, from grad * activation'(...) rounded to x's dtype.
Addresses Offsets are int64.
Repeats   As cuDNN does; the pass always.
Registers and shared memory per target: docs/kernels.md.
"""

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

from .activation import activate, gate
from .configurations import configuration, launch
from .launch import cdiv, dense, memory_format, output_size, residual_gradient, vector
from .packing import accumulator

__all__ = ["conv2d", "conv2d_backward"]

SIZES = ["vectors", "k_vectors", "image"]
BLOCK = 1024


# y becomes activation(y + bias + residual), or with `grad` grad * activation'(y + bias + residual).
@triton.jit(do_not_specialize=SIZES)
def conv2d_epilogue_kernel(
    y, bias, residual, grad, vectors, k_vectors, image,
    VECTOR: tl.constexpr, K_VECTOR: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = o < vectors.to(tl.int64) * VECTOR
    dtype: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    b_y = tl.load(y + o, mask, 0.0).to(dtype)
    if bias is not None:
        K = k_vectors * K_VECTOR
        o_k = o % K if CHANNELS_LAST else o // image % K
        b_y += tl.load(bias + o_k, mask, 0.0).to(dtype)
    if residual is not None:
        b_y += tl.load(residual + o, mask, 0.0).to(dtype)
    if grad is None:
        b_y = activate(b_y, ACTIVATION)
    else:
        b_g = tl.load(grad + o, mask, 0.0).to(dtype)
        b_y = gate(b_y, b_g, ACTIVATION)
    tl.store(y + o, b_y.to(y.dtype.element_ty), mask)


def finish(y, bias, residual, grad, activation, channels_last):
    """The pass over y, in place."""
    if y.numel() == 0:
        return
    if residual is not None:
        residual = residual.contiguous(memory_format=memory_format(channels_last))
    blocks = configuration(
        conv2d_epilogue_kernel, y, lambda: dict(BLOCK_C=BLOCK, num_warps=4),
        bias=bias is not None, residual=residual is not None, grad=grad is not None, channels_last=channels_last,
    )  # fmt: skip
    v, k = vector(y.numel(), y), vector(y.shape[1], y)
    with torch.cuda.device_of(y):
        launch(
            conv2d_epilogue_kernel, blocks, lambda b: (cdiv(y.numel(), b["BLOCK_C"]),),
            y, bias, residual, grad, y.numel() // v, y.shape[1] // k, y.shape[2] * y.shape[3],
            VECTOR=v, K_VECTOR=k, ACTIVATION=activation, CHANNELS_LAST=channels_last,
            vary=("BLOCK_C",), restore=("y",),
        )  # fmt: skip


class Windows:
    """x and the padding that ATen's convolution takes, which is alike on both sides; else x with its zeros."""

    def __init__(self, x, kernel, stride, padding, dilation):
        self.x, self.channels_last = dense(x)
        H, W = x.shape[2:]
        OH, OW, top, left = output_size((H, W), kernel, stride, padding, dilation)
        extent = [(kernel[axis] - 1) * dilation[axis] + 1 for axis in (0, 1)]
        self.padding, self.zeros = (top, left), (0, 0, 0, 0)
        alike = [(size + 2 * pad - extent[i]) // stride[i] + 1 for i, (size, pad) in enumerate(((H, top), (W, left)))]
        if alike != [OH, OW]:
            bottom, right = (OH - 1) * stride[0] + extent[0] - top - H, (OW - 1) * stride[1] + extent[1] - left - W
            self.padding, self.zeros = (0, 0), (left, right, top, bottom)  # below 0: what no window reaches is cut off
            self.x = pad(self.x, self.zeros)

    def own(self, gradient):
        """Of a gradient what belongs to x itself."""
        if any(self.zeros):
            gradient = pad(gradient, [-n for n in self.zeros])
        if gradient.numel() == 0:  # contiguous in any format, whatever its strides
            return gradient.new_empty(gradient.shape)
        return gradient.contiguous(memory_format=memory_format(self.channels_last))


def before_finish(windows, weight, bias, stride, dilation):
    """ATen's result in x's format, and the bias that it left out: one of another dtype."""
    own_bias = bias is not None and bias.dtype == weight.dtype
    y = torch.conv2d(windows.x, weight, bias if own_bias else None, stride, windows.padding, dilation)
    return y.contiguous(memory_format=memory_format(windows.channels_last)), None if own_bias else bias


def conv2d(x, weight, bias, residual, stride, padding, dilation, activation):
    windows = Windows(x, weight.shape[2:], stride, padding, dilation)
    y, bias = before_finish(windows, weight, bias, stride, dilation)
    if bias is not None or residual is not None or activation != 0:
        finish(y, bias, residual, None, activation, windows.channels_last)
    return y


def conv2d_backward(grad, x, weight, bias, residual, stride, padding, dilation, activation, output_mask):
    """Gradients of (x, weight, bias, residual): 0 elements for one that output_mask leaves out or that is absent."""
    windows = Windows(x, weight.shape[2:], stride, padding, dilation)
    grad = grad.contiguous(memory_format=memory_format(windows.channels_last))
    if activation != 0:
        y, other_bias = before_finish(windows, weight, bias, stride, dilation)
        finish(y, other_bias, residual, grad, activation, windows.channels_last)
        grad = y
    grads = [t.new_empty(0) for t in (x, weight, x if bias is None else bias, x if residual is None else residual)]
    wanted = [bool(output_mask >> i & 1) for i in range(4)]
    if wanted[0] or wanted[1]:
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, windows.x, weight, None, stride, windows.padding, dilation, False, [0, 0], 1, [*wanted[:2], False]
        )
        if wanted[0]:
            grads[0] = windows.own(grad_x)
        if wanted[1]:
            grads[1] = grad_weight.contiguous()
    if wanted[2] and bias is not None:
        grads[2] = grad.sum((0, 2, 3), dtype=accumulator(x)).to(bias.dtype)
    if wanted[3] and residual is not None:
        grads[3] = residual_gradient(grad, residual)
    return tuple(grads)
