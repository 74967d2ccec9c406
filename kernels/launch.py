"""What launchers share around their kernels: dense inputs, the output's size, blocks that fit, what gradients need."""

from typing import NamedTuple

import torch
from triton import cdiv, next_power_of_2


def dense(x, like=None):
    """(x, whether it is channels_last), copied only if it is neither format.

    `like`: take that tensor's answer instead of x's own.
    """
    channels_last = is_channels_last(x if like is None else like)
    return x.contiguous(memory_format=memory_format(channels_last)), channels_last


def is_channels_last(x):
    """The rule of PyTorch's convolutions: x that is contiguous both ways counts as NCHW; one that is neither counts as
    channels_last if its channels lie side by side."""
    return not x.is_contiguous() and x.shape[1] > 1 and x.stride(1) == 1


def memory_format(channels_last):
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_image(x, shape):
    """In x's format and dtype."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(is_channels_last(x)))


def mask(*wanted):
    """The output_mask that asks for those gradients."""
    return sum(1 << i for i, want in enumerate(wanted) if want)


def residual_gradient(grad, residual):
    """grad as a tensor of its own, in the residual's format and dtype."""
    return empty_image(residual, residual.shape).copy_(grad)


def output_size(size, kernel, stride, padding, dilation):
    """(OH, OW, top, left) of a convolution; padding [top, bottom, left, right] or [-1] for 'same'."""
    out, before = [], []
    for axis in (0, 1):
        extent = (kernel[axis] - 1) * dilation[axis] + 1
        if len(padding) == 4:
            first, last = padding[2 * axis : 2 * axis + 2]
            n = (size[axis] + first + last - extent) // stride[axis] + 1
        else:
            n = cdiv(size[axis], stride[axis])
            first = max((n - 1) * stride[axis] + extent - size[axis], 0) // 2
        if n < 1:
            raise ValueError(
                f"padding {list(padding)} leaves an input of {tuple(size)} smaller than the kernel of {tuple(kernel)} "
                f"with dilation {tuple(dilation)}: want an output of at least 1 x 1"
            )
        out.append(n)
        before.append(first)
    return *out, *before


def capability(device):
    """Compute capability of a GPU; a new one's for tensors that are on none (the interpreter's)."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def tensor_cores(x):
    """Whether tl.dot is to multiply x's dtype on tensor cores; else by float32 (float64) multiplications.

    float32, which is TF32 then, only where PyTorch's setting for convolutions allows it. Triton uses tensor cores from
    compute capability 8.0 on (triton-lang/triton#5066).
    """
    if x.dtype == torch.float32:
        setting = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        allowed = setting == "tf32" and torch.version.hip is None
    else:
        allowed = x.dtype != torch.float64
    return allowed and capability(x.device) >= (8, 0)


class Kind(NamedTuple):
    """Of a tensor, what a choice between kernels or tiles depends on besides sizes: hashable, so that it can be kept.

    All of it may change between two calls: the capability from device to device, tensor_cores by PyTorch's setting.
    """

    dtype: torch.dtype
    capability: tuple[int, int]
    tensor_cores: bool


def kind_of(x):
    return Kind(x.dtype, capability(x.device), tensor_cores(x))


def vector(channels, x):
    """Elements of one load: the widest power of two, up to 16 bytes, that divides the channels of every pixel."""
    return min(channels & -channels, 16 // x.element_size())


def fitting_power(size, smallest, largest):
    """The largest power of two, `smallest` to `largest`, that leaves at most an eighth of its lanes idle on `size`.

    Else the one that leaves the fewest; smaller than `smallest` only where size or `largest` is.
    """
    block = min(largest, next_power_of_2(size))
    blocks = [block]
    while block > smallest:
        block //= 2
        blocks.append(block)
    return next((block for block in blocks if waste(size, block) * 8 <= size), fitting(size, blocks))


def fitting(size, blocks):
    """The one of `blocks` that leaves the fewest lanes idle on `size`, the largest of equals."""
    return max(blocks, key=lambda block: (-waste(size, block), block))


def waste(size, block):
    return cdiv(size, block) * block - size
