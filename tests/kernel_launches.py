"""What kernel_cases.py is made of: an op's launchers, called for a shape on meta tensors, forward and all gradients."""

import importlib

import torch
from numerics import float32_by

BFLOAT16, FLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NHWC, NCHW = torch.channels_last, torch.contiguous_format


def empty(*shape: int, dtype: torch.dtype, memory_format: torch.memory_format = NCHW) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


def depthwise_conv2d(shape, k, stride, dtype, memory_format=NHWC, pre_activation=0, activation=0):
    kernels = importlib.import_module("cnnfast.kernels.depthwise_conv2d")
    x = empty(*shape, dtype=dtype, memory_format=memory_format)
    weight, bias = empty(shape[1], 1, k, k, dtype=dtype), empty(shape[1], dtype=dtype)
    args = (x, weight, bias, (stride, stride), (), (1, 1), pre_activation, activation)
    y = kernels.depthwise_conv2d(*args)
    kernels.depthwise_conv2d_backward(torch.empty_like(y), *args, 0b111)


def conv2d(shape, out, k, dtype, memory_format=NHWC, activation=1):
    kernels = importlib.import_module("cnnfast.kernels.conv2d")
    x = empty(*shape, dtype=dtype, memory_format=memory_format)
    weight, bias = empty(out, shape[1], k, k, dtype=dtype), empty(out, dtype=torch.promote_types(dtype, FLOAT32))
    residual = empty(shape[0], out, *shape[2:], dtype=dtype, memory_format=memory_format)
    args = (x, weight, bias, residual, (1, 1), (), (1, 1), activation)
    y = kernels.conv2d(*args)
    kernels.conv2d_backward(torch.empty_like(y), *args, 0b1111)


def pointwise_conv2d(
    shape, out, stride=1, dtype=BFLOAT16, memory_format=NHWC, gate=False, residual=False, activation=0, tf32=False
):
    kernels = importlib.import_module("cnnfast.kernels.pointwise_conv2d")
    x = empty(*shape, dtype=dtype, memory_format=memory_format)
    weight, bias = empty(out, shape[1], 1, 1, dtype=dtype), empty(out, dtype=dtype)
    height, width = (-(-size // stride) for size in shape[2:])
    added = empty(shape[0], out, height, width, dtype=dtype, memory_format=memory_format) if residual else None
    gates = empty(*shape[:2], 1, 1, dtype=dtype) if gate else None
    args = (x, weight, bias, gates, added, (stride, stride), activation)
    with float32_by("tf32" if tf32 else "ieee"):
        y = kernels.pointwise_conv2d(*args)
        kernels.pointwise_conv2d_backward(torch.empty_like(y), *args, 0b11111)


def pointwise_conv2d_slope(shape, out, dtype, tf32=False, activation=4):
    """What the gradients of a curved activation start from: the forward kernel's other form."""
    kernels = importlib.import_module("cnnfast.kernels.pointwise_conv2d")
    x, y = (empty(shape[0], channels, *shape[2:], dtype=dtype, memory_format=NHWC) for channels in (shape[1], out))
    weight, bias = empty(out, shape[1], 1, 1, dtype=dtype), empty(out, dtype=dtype)
    with float32_by("tf32" if tf32 else "ieee"):
        kernels.forward(x, weight, bias, None, y, torch.empty_like(y), (1, 1), activation)


def pointwise_depthwise(
    shape, expanded, k, stride=1, dtype=BFLOAT16, memory_format=NHWC, tf32=False, residual=False, squeeze=False,
    activations=(0, 2, 2),
):  # fmt: skip
    kernels = importlib.import_module("cnnfast.kernels.pointwise_depthwise")
    x = empty(*shape, dtype=dtype, memory_format=memory_format)
    weights = empty(expanded, shape[1], 1, 1, dtype=dtype), empty(expanded, 1, k, k, dtype=dtype)
    bias = empty(expanded, dtype=dtype)
    height, width = (-(-size // stride) for size in shape[2:])
    added = empty(shape[0], expanded, height, width, dtype=dtype, memory_format=memory_format) if residual else None
    with float32_by("tf32" if tf32 else "ieee"):
        kernels.pointwise_depthwise(
            x, weights[0], bias, weights[1], bias, added, (stride, stride), (), (1, 1), *activations, squeeze
        )


def inverted_residual(
    shape, expanded, out, k, stride=1, dtype=BFLOAT16, memory_format=NHWC, tf32=False, squeezed=0, activation=2
):
    kernels = importlib.import_module("cnnfast.kernels.inverted_residual")
    x = empty(*shape, dtype=dtype, memory_format=memory_format)

    def layer(channels, *others):
        return empty(channels, *others, dtype=dtype), empty(channels, dtype=dtype)

    expand = layer(expanded, shape[1], 1, 1) if expanded != shape[1] else (None, None)
    excite = (None,) * 4
    if squeezed:
        excite = *layer(squeezed, expanded, 1, 1), *layer(expanded, squeezed, 1, 1)
    weights = *expand, *layer(expanded, 1, k, k), *excite, *layer(out, expanded, 1, 1)
    residual = x if stride == 1 and out == shape[1] else None
    args = (x, *weights, residual, (stride, stride), (), (1, 1), activation)
    with float32_by("tf32" if tf32 else "ieee"):
        if squeezed:
            y = kernels.inverted_residual(*args, activation, 3)
            kernels.inverted_residual_backward(torch.empty_like(y), *args, activation, 3, 0b111111111111)
        else:  # whatever fusion_pays says; apart and backward it is other ops' kernels
            kernels.fused(*args[:5], *args[9:])


def separable_conv2d(
    shape, out, k=3, stride=1, dtype=BFLOAT16, memory_format=NHWC, residual=False, activations=(1, 0, 0), tf32=False
):
    kernels = importlib.import_module("cnnfast.kernels.separable_conv2d")
    x, channels = empty(*shape, dtype=dtype, memory_format=memory_format), shape[1]
    height, width = (-(-size // stride) for size in shape[2:])
    added = empty(shape[0], out, height, width, dtype=dtype, memory_format=memory_format) if residual else None
    depthwise = empty(channels, 1, k, k, dtype=dtype), empty(channels, dtype=dtype)
    pointwise = empty(out, channels, 1, 1, dtype=dtype), empty(out, dtype=dtype)
    with float32_by("tf32" if tf32 else "ieee"):
        kernels.separable_conv2d(x, *depthwise, *pointwise, added, (stride, stride), (), (1, 1), False, *activations)


def local_response_norm(shape, size, dtype, memory_format=NHWC):
    kernels = importlib.import_module("cnnfast.kernels.local_response_norm")
    x = empty(*shape, dtype=dtype, memory_format=memory_format)
    options = (size, 1e-4, 0.75, 2.0)
    y = kernels.local_response_norm(x, *options)
    kernels.local_response_norm_backward(torch.empty_like(y), x, *options)


def squeeze_excite(shape, squeezed, dtype, memory_format=NHWC, residual=False, activation=1, post_activation=0):
    kernels = importlib.import_module("cnnfast.kernels.squeeze_excite")
    x, channels = empty(*shape, dtype=dtype, memory_format=memory_format), shape[1]
    reduce = empty(squeezed, channels, 1, 1, dtype=dtype), empty(squeezed, dtype=dtype)
    expand = empty(channels, squeezed, 1, 1, dtype=dtype), empty(channels, dtype=dtype)
    args = (x, *reduce, *expand, torch.empty_like(x) if residual else None, activation, 3, post_activation)
    y = kernels.squeeze_excite(*args)
    kernels.squeeze_excite_backward(torch.empty_like(y), *args, 0b111111)


def scale_shift(shape, dtype, memory_format=NHWC, residual=False, activation=2):
    kernels = importlib.import_module("cnnfast.kernels.scale_shift")
    x = empty(*shape, dtype=dtype, memory_format=memory_format)
    rows = [empty(shape[1], dtype=torch.promote_types(dtype, FLOAT32)) for _ in range(2)]
    args = (x, *rows, torch.empty_like(x) if residual else None, activation)
    y = kernels.scale_shift(*args)
    kernels.scale_shift_backward(torch.empty_like(y), *args, 0b1111)


def scale_shift_max_pool(shape, dtype, memory_format=NHWC, max_pool=(3, 2, 1), activation=1):
    kernels = importlib.import_module("cnnfast.kernels.scale_shift_max_pool")
    x = empty(*shape, dtype=dtype, memory_format=memory_format)
    rows = [empty(shape[1], dtype=torch.promote_types(dtype, FLOAT32)) for _ in range(2)]
    y, taps = kernels.scale_shift_max_pool(x, *rows, max_pool, activation)
    kernels.scale_shift_max_pool_backward(torch.empty_like(y), x, *rows, taps, max_pool, activation, 0b111)


def scale_shift_excite(shape, squeezed, dtype, memory_format=NHWC, activation=4):
    kernels = importlib.import_module("cnnfast.kernels.scale_shift_excite")
    x, channels = empty(*shape, dtype=dtype, memory_format=memory_format), shape[1]
    rows = [empty(channels, dtype=torch.promote_types(dtype, FLOAT32)) for _ in range(2)]
    reduce = empty(squeezed, channels, 1, 1, dtype=dtype), empty(squeezed, dtype=dtype)
    expand = empty(channels, squeezed, 1, 1, dtype=dtype), empty(channels, dtype=dtype)
    args = (x, *rows, *reduce, *expand, activation, activation, 3)
    y = kernels.scale_shift_excite(*args)
    kernels.scale_shift_excite_backward(torch.empty_like(y), *args, 0b1111111)


def batch_norm_scale_shift(shape, dtype):
    kernels = importlib.import_module("cnnfast.kernels.batch_norm_scale_shift")
    y, row = empty(*shape, dtype=dtype), empty(shape[1], dtype=torch.promote_types(dtype, FLOAT32))
    kernels.batch_norm_scale_shift(y, row, row, row, row, 1e-5)
    kernels.batch_norm_scale_shift_backward(row, row, y, row, row, row, 1e-5)


def squeeze(shape, k, stride, dtype, memory_format=NHWC, activation=4, backward=False):
    """depthwise_conv2d_squeeze, or its gradient."""
    kernels = importlib.import_module("cnnfast.kernels.stats")
    x = empty(*shape, dtype=dtype, memory_format=memory_format)
    weight, bias = empty(shape[1], 1, k, k, dtype=dtype), empty(shape[1], dtype=dtype)
    args = (x, weight, bias, (stride, stride), (), (1, 1), 0, activation)
    y, means = kernels.depthwise_conv2d_squeeze(*args) if not backward else squeezed_shapes(x, stride)
    if backward:
        kernels.depthwise_conv2d_squeeze_backward(y, means, *args, 0b111)


def squeezed_shapes(x, stride):
    size = [-(-side // stride) for side in x.shape[2:]]
    return x.new_empty((*x.shape[:2], *size)), x.new_empty((*x.shape[:2], 1, 1))


def stats(
    op, shape, out=0, k=1, stride=1, dtype=BFLOAT16, memory_format=NHWC, prologue=True, pre_activation=1, tf32=False
):
    """<op>_stats, between two batch normalisations; prologue=False: with neither scale nor pre_activation."""
    kernels = importlib.import_module("cnnfast.kernels.stats")
    channels, wide = shape[1], torch.promote_types(dtype, FLOAT32)
    x = empty(*shape, dtype=dtype, memory_format=memory_format)
    depthwise, pointwise = empty(channels, 1, k, k, dtype=dtype), empty(out, channels, 1, 1, dtype=dtype)
    weights = {
        "conv2d": (empty(out, channels, k, k, dtype=dtype), None),
        "depthwise_conv2d": (depthwise, None),
        "pointwise_conv2d": (pointwise, None),
        "separable_conv2d": (depthwise, None, pointwise, None),
    }[op]
    affine = (empty(channels, dtype=wide), empty(channels, dtype=wide)) if prologue else (None, None)
    geometry = ((stride, stride),) if op == "pointwise_conv2d" else ((stride, stride), (), (1, 1))
    activations = (pre_activation if prologue else 0, *([4] if op == "separable_conv2d" else []))
    tensors = (x, *weights, *affine)
    with float32_by("tf32" if tf32 else "ieee"):
        y, total, squares = getattr(kernels, f"{op}_stats")(*tensors, *geometry, *activations)
        grads = torch.empty_like(y), total, squares
        getattr(kernels, f"{op}_stats_backward")(*grads, *tensors, y, *geometry, *activations, 0b1111111)


def stats_gradients(shape, k, dtype, memory_format=NHWC):
    """What backward launches of kernels that forward launches, too: gradients before an activation."""
    kernels = importlib.import_module("cnnfast.kernels.stats")
    x = empty(*shape, dtype=dtype, memory_format=memory_format)
    weight, affine = empty(shape[1], 1, k, k, dtype=dtype), empty(shape[1], dtype=torch.promote_types(dtype, FLOAT32))
    kernels.entered(x, affine, affine, torch.empty_like(x), 4, affine.dtype)
    kernels.separable_intermediate(x, weight, None, affine, affine, ((1, 1), (), (1, 1), 1), 4, torch.empty_like(x))
