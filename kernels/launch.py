"""What every launcher needs before a kernel runs: dense inputs, the output's size, blocks that fit."""

import torch
from triton import cdiv, next_power_of_2


def dense(x, like=None):
    """(x, whether it is channels_last), copied only if it is neither format.

    The rule of PyTorch's convolutions: x that is contiguous both ways counts as NCHW; one that is neither becomes
    channels_last if its channels lie side by side. `like`: take that tensor's answer instead of x's own.
    """
    source = x if like is None else like
    channels_last = not source.is_contiguous() and source.shape[1] > 1 and source.stride(1) == 1
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


def fitting_power(size, largest):
    """The largest power of two, 8 to `largest`, that leaves at most an eighth of its lanes idle on `size`.

    Else the one that leaves the fewest; smaller than 8 only where size or `largest` is.
    """
    block = min(largest, next_power_of_2(size))
    blocks = [block]
    while block > 8:
        block //= 2
        blocks.append(block)
    return next((block for block in blocks if waste(size, block) * 8 <= size), fitting(size, blocks))


def fitting(size, blocks):
    """The one of `blocks` that leaves the fewest lanes idle on `size`, the largest of equals."""
    return max(blocks, key=lambda block: (-waste(size, block), block))


def waste(size, block):
    return cdiv(size, block) * block - size
