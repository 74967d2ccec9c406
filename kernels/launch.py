"""What every launcher needs before a kernel runs: dense inputs, the output's size, blocks that fit."""

import torch
from triton import cdiv, next_power_of_2


def dense(x, like=None):
    """(x, whether it is channels_last), copied only if it is neither format.

    The rule of PyTorch's convolutions: x that is contiguous both ways counts as NCHW; one that is neither becomes
    channels_last if its channels lie side by side. `like`: take that tensor's answer instead of x's own.
    """
    source = x if like is None else like
    if source.is_contiguous():
        channels_last = False
    elif source.is_contiguous(memory_format=torch.channels_last):
        channels_last = True
    else:
        channels_last = source.shape[1] > 1 and source.stride(1) == 1
    return x.contiguous(memory_format=memory_format(channels_last)), channels_last


def memory_format(channels_last):
    return torch.channels_last if channels_last else torch.contiguous_format


def output_size(size, kernel, stride, padding, dilation):
    """(OH, OW, top, left) of a convolution; padding [top, bottom, left, right] or [] for 'same'."""
    out, before = [], []
    for axis in (0, 1):
        extent = (kernel[axis] - 1) * dilation[axis] + 1
        if padding:
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


def vector(channels, x):
    """Elements of one load: the widest power of two, up to 16 bytes, that divides the channels of every pixel."""
    return min(channels & -channels, 16 // x.element_size())


def channel_block(channels, largest):
    """The largest power of two <= `largest` that wastes at most an eighth of the lanes on channels that aren't there."""
    block = min(largest, next_power_of_2(channels))
    while block > 8 and cdiv(channels, block) * block * 8 > channels * 9:
        block //= 2
    return block
