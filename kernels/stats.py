"""Ops that return more than an image: <op>_stats, y = op(pre_activation(x * scale + shift)) and the sums of y and y * y
by channel; depthwise_conv2d_squeeze, y and each image's means.

Passes    depthwise, pointwise: the plain op's kernels, which scale x as they load it and sum y before they store it;
          then add_up, over a pair of numbers for each tile and channel. conv2d: one pass that scales x into a tensor of
          its own, ATen's convolution, one pass that reads y for the sums. separable: the depthwise stage, its result in
          memory, then the pointwise one; it is not one kernel.
          Backward: one pass makes grad + grad_sum + 2 y grad_squares; then the plain op's gradients. That of x is times
          the prologue's derivative where it is stored; those of scale and shift are summed there (conv2d: by a pass).
Bytes     forward those of the plain op; conv2d x twice and y once more; separable its intermediate, written and read.
          Backward those of the plain op, besides grad and y read and their gradient written once.
Numbers   Rounded to x's dtype: what the prologue makes of x (pointwise, conv2d: the product's input) and, in conv2d,
          its gradient; separable's intermediate and its gradient; y's gradient. Sums are of y as it is stored, in
          float32 (float64 for float64).
Repeats   No atomics: the order of every sum depends on the shape, not on the device or on scheduling; that of the means
          not on the image's neighbours in the batch either. conv2d: as ATen does.
Layout, tiles, addresses: those of the plain ops' files.
"""

import torch

from . import depthwise_conv2d as depthwise
from . import pointwise_conv2d as pointwise
from .activation import RELU6
from .channels import add_up, channel_sums, totals
from .conv2d import conv2d, conv2d_backward
from .launch import dense, empty_image, is_channels_last
from .packing import accumulator, taps_major, unpack_depthwise
from .squeeze_excite import like
from .squeeze_excite import scale as scale_channels

__all__ = [
    "conv2d_stats",
    "conv2d_stats_backward",
    "depthwise_conv2d_squeeze",
    "depthwise_conv2d_squeeze_backward",
    "depthwise_conv2d_squeeze_packed",
    "depthwise_conv2d_stats",
    "depthwise_conv2d_stats_backward",
    "pointwise_conv2d_stats",
    "pointwise_conv2d_stats_backward",
    "separable_conv2d_stats",
    "separable_conv2d_stats_backward",
]


def gradient_of_y(grad, grad_sum, grad_squares, y):
    """grad + grad_sum + 2 y grad_squares, rounded once, in y's format."""
    y, channels_last = dense(y)
    twice, grad_sum = contiguous(2 * grad_squares, grad_sum)
    return scale_channels(y, twice, grad_sum, like(grad, y, channels_last), None, 0, 0, channels_last, y.dtype)


def contiguous(*tensors):
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]


def chosen(output_mask, tensors, gradients):
    """The gradients, with 0 elements for one that output_mask leaves out or whose tensor is None."""
    x = tensors[0]
    return tuple(
        gradient if tensor is not None and output_mask >> i & 1 else (x if tensor is None else tensor).new_empty(0)
        for i, (tensor, gradient) in enumerate(zip(tensors, gradients, strict=True))
    )


def scale_wanted(scale, output_mask):
    """Whether a gradient of scale or shift is, by the mask of (x, weight, bias, scale, shift)."""
    return scale is not None and output_mask & 0b11000 != 0


def depthwise_conv2d_squeeze(x, weight, bias, stride, padding, dilation, pre_activation, activation):
    K, _, *kernel = weight.shape
    rows = taps_major(weight, accumulator(x))
    return squeezed(x, rows, bias, K, kernel, stride, padding, dilation, pre_activation, activation)


def depthwise_conv2d_squeeze_packed(
    x, packed, out_channels, kernel_size, stride, padding, dilation, pre_activation, activation
):
    bias, rows = unpack_depthwise(packed, x, out_channels, kernel_size)
    return squeezed(x, rows, bias, out_channels, kernel_size, stride, padding, dilation, pre_activation, activation)


def squeezed(x, rows, bias, K, *options):
    """The op on taps-major weights."""
    y, partial = depthwise.forward_and_sums(x, rows, bias, None, K, *options, sums=1)
    means = x.new_empty((x.shape[0], K, 1, 1))
    if means.numel():
        add_up(partial, means, divisor=y.shape[2] * y.shape[3])
    return y, means


def depthwise_conv2d_squeeze_backward(
    grad, grad_squeezed, x, weight, bias, stride, padding, dilation, pre_activation, activation, output_mask
):
    """Gradients of (x, weight, bias): 0 elements for one that output_mask leaves out or that has no bias to go to."""
    K, _, *kernel = weight.shape
    geometry = stride, padding, dilation, pre_activation
    if activation == 0:  # unrounded
        grad, channels_last = dense(grad)
        share = grad_squeezed.to(accumulator(x)).reshape(-1, K)
        grad = scale_channels(grad, torch.ones_like(share), share, None, None, 0, 0, channels_last, accumulator(x))
    else:
        rows, share = taps_major(weight, accumulator(x)), grad_squeezed.contiguous()
        grad, _ = depthwise.forward_and_sums(x, rows, bias, grad, K, kernel, *geometry, activation, share=share)
    return depthwise.depthwise_conv2d_backward(grad, x, weight, bias, *geometry, 0, output_mask)


def depthwise_conv2d_stats(x, weight, bias, scale, shift, stride, padding, dilation, pre_activation):
    K, _, *kernel = weight.shape
    scale, shift = contiguous(scale, shift)
    y, partial = depthwise.forward_and_sums(
        x, taps_major(weight, accumulator(x)), bias, None, K, kernel, stride, padding, dilation, pre_activation, 0,
        scale, shift, sums=2,
    )  # fmt: skip
    return y, *totals(partial, x, K)


def depthwise_conv2d_stats_backward(
    grad, grad_sum, grad_squares, x, weight, bias, scale, shift, y, stride, padding, dilation, pre_activation,
    output_mask,
):  # fmt: skip
    """Gradients of (x, weight, bias, scale, shift): 0 elements for one that output_mask leaves out or that is None."""
    grad = gradient_of_y(grad, grad_sum, grad_squares, y)
    geometry = stride, padding, dilation, pre_activation
    return depthwise_gradients(grad, x, weight, bias, scale, shift, geometry, output_mask)


def depthwise_gradients(grad, x, weight, bias, scale, shift, geometry, output_mask):
    """Those of (x, weight, bias, scale, shift), from the gradient of depthwise(pre_activation(x * scale + shift))."""
    K, _, *kernel = weight.shape
    scale, shift = contiguous(scale, shift)
    grads = [None] * 5
    of_scale = scale_wanted(scale, output_mask)
    if output_mask & 0b00001 or of_scale:
        rows = taps_major(weight, accumulator(x))
        grads[0], partial = depthwise.input_gradient_and_sums(
            grad, x, rows, K, kernel, *geometry, scale, shift, output_mask & 0b00001, of_scale
        )
        if of_scale:
            grads[3:] = totals(partial, x, x.shape[1])
    if output_mask & 0b00110:
        grads[1:3] = depthwise.weight_gradient(grad, x, weight, bias, *geometry, scale, shift)
    return chosen(output_mask, (x, weight, bias, scale, shift), grads)


def pointwise_conv2d_stats(x, weight, bias, scale, shift, stride, pre_activation):
    scale, shift = contiguous(scale, shift)
    y, partial = pointwise.forward_and_sums(
        x, weight, bias, None, None, None, stride, 0, scale, shift, pre_activation, sums=True
    )
    return y, *totals(partial, x, weight.shape[0])


def pointwise_conv2d_stats_backward(
    grad, grad_sum, grad_squares, x, weight, bias, scale, shift, y, stride, pre_activation, output_mask
):
    """Gradients of (x, weight, bias, scale, shift): 0 elements for one that output_mask leaves out or that is None."""
    scale, shift = contiguous(scale, shift)
    grad = gradient_of_y(grad, grad_sum, grad_squares, y)
    grads = [None] * 5
    of_scale = scale_wanted(scale, output_mask)
    if output_mask & 0b00001 or of_scale:
        grads[0], partial = pointwise.input_gradient_and_sums(
            grad, x, weight, None, stride, output_mask & 0b00001, of_scale, scale, shift, pre_activation
        )
        if of_scale:
            grads[3:] = totals(partial, x, x.shape[1])
    if output_mask & 0b00110:
        wanted_bias = bias if output_mask & 0b00100 else None
        grads[1:3] = pointwise.weight_gradient(grad, x, weight, wanted_bias, None, stride, scale, shift, pre_activation)
    return chosen(output_mask, (x, weight, bias, scale, shift), grads)


def entered(x, scale, shift, grad, pre_activation, dtype):
    """pre_activation(x * scale + shift), or grad * pre_activation'(x * scale + shift): a tensor of its own."""
    x, channels_last = dense(x)
    factor = x.new_ones(x.shape[1], dtype=accumulator(x)) if scale is None else scale
    grad = like(grad, x, channels_last)
    return scale_channels(x, factor, shift, None, grad, 0, pre_activation, channels_last, dtype)


def prologue(x, scale, shift, pre_activation):
    """What the product is of, in x's dtype: x itself where nothing comes before it."""
    if scale is None and pre_activation == 0:
        return x
    return entered(x, scale, shift, None, pre_activation, x.dtype)


def sums(x, other):
    """Of x and of x * other by channel; other in x's format."""
    N, C = x.shape[:2]
    if N > 0:
        partial = channel_sums(x, other, is_channels_last(x), both=True)
    else:
        partial = x.new_empty((0, 2 * C), dtype=accumulator(x))
    return totals(partial, x, C)


def conv2d_stats(x, weight, bias, scale, shift, stride, padding, dilation, pre_activation):
    scale, shift = contiguous(scale, shift)
    z = prologue(x, scale, shift, pre_activation)
    y = conv2d(z, weight, bias, None, stride, padding, dilation, 0)
    return y, *sums(y, y)


def conv2d_stats_backward(
    grad, grad_sum, grad_squares, x, weight, bias, scale, shift, y, stride, padding, dilation, pre_activation,
    output_mask,
):  # fmt: skip
    """Gradients of (x, weight, bias, scale, shift): 0 elements for one that output_mask leaves out or that is None."""
    scale, shift = contiguous(scale, shift)
    grad = gradient_of_y(grad, grad_sum, grad_squares, y)
    z = prologue(x, scale, shift, pre_activation)
    of_scale = scale_wanted(scale, output_mask)
    of_z = output_mask & 0b00001 or of_scale
    mask = output_mask & 0b00110 | bool(of_z)
    grads = [*conv2d_backward(grad, z, weight, bias, None, stride, padding, dilation, 0, mask)[:3], None, None]
    if of_z and pre_activation != 0:
        # What a clamp lets through of a gradient fits its dtype; times another slope or the scale it doesn't.
        dtype = x.dtype if scale is None or pre_activation <= RELU6.value else accumulator(x)
        grads[0] = entered(x, scale, shift, grads[0], pre_activation, dtype)
    if of_scale:
        grads[4], grads[3] = sums(grads[0], like(x, grads[0], is_channels_last(grads[0])))
    if output_mask & 0b00001 and scale is not None:
        grads[0] = entered(grads[0], scale, None, None, 0, x.dtype)
    return chosen(output_mask, (x, weight, bias, scale, shift), grads)


def separable_conv2d_stats(
    x, dw_weight, dw_bias, pw_weight, pw_bias, scale, shift, stride, padding, dilation, pre_activation, mid_activation
):
    geometry = stride, padding, dilation, pre_activation
    t = separable_intermediate(x, dw_weight, dw_bias, scale, shift, geometry, mid_activation)
    y, *of_y = pointwise_conv2d_stats(t, pw_weight, pw_bias, None, None, (1, 1), 0)
    if t.shape[2] * t.shape[3] == 1:  # t is both formats, y of x's
        y = y.as_strided(y.shape, empty_image(x, y.shape).stride())
    return y, *of_y


def separable_intermediate(x, weight, bias, scale, shift, geometry, mid_activation, grad=None):
    """The depthwise stage's result, or with `grad` its gradient before mid_activation."""
    K, _, *kernel = weight.shape
    rows = taps_major(weight, accumulator(x))
    scale, shift = contiguous(scale, shift)
    return depthwise.forward_and_sums(x, rows, bias, grad, K, kernel, *geometry, mid_activation, scale, shift)[0]


def separable_conv2d_stats_backward(
    grad, grad_sum, grad_squares, x, dw_weight, dw_bias, pw_weight, pw_bias, scale, shift, y, stride, padding, dilation,
    pre_activation, mid_activation, output_mask,
):  # fmt: skip
    """Gradients of the tensors from x to shift: 0 elements for one that output_mask leaves out or that is None."""
    geometry = stride, padding, dilation, pre_activation
    depthwise_mask = output_mask & 0b111 | output_mask >> 2 & 0b11000
    pointwise_mask = output_mask >> 2 & 0b110 | (depthwise_mask != 0)
    t = separable_intermediate(x, dw_weight, dw_bias, scale, shift, geometry, mid_activation)
    of_t, *of_pointwise, _, _ = pointwise_conv2d_stats_backward(
        grad, grad_sum, grad_squares, t, pw_weight, pw_bias, None, None, y, (1, 1), 0, pointwise_mask
    )
    of_depthwise = [None] * 5
    if depthwise_mask:
        if mid_activation != 0:
            of_t = separable_intermediate(x, dw_weight, dw_bias, scale, shift, geometry, mid_activation, of_t)
        of_depthwise = depthwise_gradients(of_t, x, dw_weight, dw_bias, scale, shift, geometry, depthwise_mask)
    tensors = x, dw_weight, dw_bias, pw_weight, pw_bias, scale, shift
    return chosen(output_mask, tensors, [*of_depthwise[:3], *of_pointwise, *of_depthwise[3:]])
