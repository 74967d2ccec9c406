"""Packed weights on the GPU: the layout of csrc/packing.h, byte for byte.

uint8: a 64-byte header, then for a depthwise stage bias[Kp] and weight[taps][Kp] in the accumulator's dtype, Kp = K
rounded up to PANEL, zero-filled.
"""

import struct

import torch

PANEL = 16
HEADER = struct.Struct("<IHHiiiiii32x")  # magic, version, op, itemsize, in, mid, out channels, kernel height, width
MAGIC, VERSION = 0x464E4E43, 2
DEPTHWISE_CONV2D = 1


def accumulator(tensor):
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def padded(channels):
    return -(-channels // PANEL) * PANEL


def taps_major(weight, dtype):
    """weight (K, 1, kh, kw) with any strides as [taps, Kp], one small copy; what lies beyond K is not written."""
    K, taps = weight.shape[0], weight.shape[2] * weight.shape[3]
    rows = torch.empty((taps, padded(K)), dtype=dtype, device=weight.device)
    rows[:, :K].copy_(weight.reshape(K, taps).t())
    return rows


def pack_depthwise_conv2d(weight, bias):
    K, _, kh, kw = weight.shape
    section = torch.zeros((1 + kh * kw, padded(K)), dtype=accumulator(weight), device=weight.device)
    if bias is not None:
        section[0, :K].copy_(bias)
    section[1:, :K].copy_(weight.reshape(K, kh * kw).t())
    # The input's channels aren't known from the weight alone; the op checks them against the output's.
    header = HEADER.pack(MAGIC, VERSION, DEPTHWISE_CONV2D, section.element_size(), K, K, K, kh, kw)
    header_bytes = torch.frombuffer(bytearray(header), dtype=torch.uint8).to(weight.device)
    return torch.cat([header_bytes, section.view(torch.uint8).flatten()])


def unpack_depthwise(packed, x, out_channels, kernel_size):
    """(bias [Kp], rows [taps, Kp]), views of `packed`.

    Its size is checked, its header isn't: reading that back would wait for the GPU, and not be capturable in a graph.
    """
    taps, dtype = kernel_size[0] * kernel_size[1], accumulator(x)
    wanted = HEADER.size + (1 + taps) * padded(out_channels) * dtype.itemsize
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != wanted or not packed.is_contiguous():
        raise ValueError(
            f"packed is {packed.dtype} of shape {tuple(packed.shape)}: want {wanted} contiguous bytes, what "
            f"pack_depthwise_conv2d makes of {out_channels} channels, a {tuple(kernel_size)} kernel and {dtype}"
        )
    section = packed[HEADER.size :].view(dtype).view(1 + taps, padded(out_channels))
    return section[0], section[1:]
