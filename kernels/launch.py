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


def spatial_blocks(channels, height, width, x, channels_last, kernel_h, stride_h=1, row_multiple=1):
    """Tile of the forward and input-gradient kernels: 128 threads of 16 bytes of x, as many rows as registers allow.

    BLOCK_C < 32 * num_warps, or Triton sends the weights through shared memory to spread them over the threads.
    """
    per_thread = 16 // x.element_size()
    block_c = fitting_power(channels, 16, 64 if channels_last else 16)
    pixels = max(128 * per_thread // block_c, 1)
    block_w = fitting_power(width, 8, min(pixels, 32))
    strips = min(pixels // block_w, next_power_of_2(height))
    most = max(8 - kernel_h // 2 - stride_h, 2) // row_multiple or 1
    block_h = fitting(height, [strips * row_multiple * n for n in range(cdiv(most, 2), most + 1)]) // strips
    warps = min(max(strips * block_w * block_c // (32 * per_thread), 1), 4)
    return dict(STRIPS=strips, BLOCK_H=block_h, BLOCK_W=block_w, BLOCK_C=block_c, num_warps=warps)


def spatial_grid(images, rows, columns, channels, blocks):
    """One axis: (image, tile of rows, tile of columns, channel block), the last fastest."""
    tiles = cdiv(rows, blocks["STRIPS"] * blocks["BLOCK_H"]) * cdiv(columns, blocks["BLOCK_W"])
    return (images * tiles * cdiv(channels, blocks["BLOCK_C"]),)
