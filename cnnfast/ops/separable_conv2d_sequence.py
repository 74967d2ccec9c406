from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnnfast.ops import activations as activation_codes
from cnnfast.ops import backends
from cnnfast.ops._registration import empty_image, fake, register_autocast
from cnnfast.ops.arguments import (
    Ints,
    check_inference,
    check_max_pool,
    check_packed,
    check_x,
    edges,
    output_size,
    pair,
    positive,
)

_op = torch.ops.cnnfast.separable_conv2d_sequence.default


def separable_conv2d_sequence(
    x: Tensor,
    packed: Sequence[Tensor],
    *,
    out_channels: Sequence[int],
    kernel_size: Ints,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    pre_activation: str | None = None,
    mid_activation: str | None = None,
    activations: Sequence[str | None] | None = None,
    max_pool: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Separable convolutions of stride 1 one after another, then a max pooling: a few rows at a time through all of
    them, so that what lies between is never in memory. Inference only.

    What separable_conv2d_packed returns from one to the next, then F.max_pool2d; a bfloat16 or float16 x may be rounded
    fewer times on the way.

    Args:
        x: (N, C, H, W), as separable_conv2d takes it.
        packed: for each convolution what pack_separable_conv2d returned; at least one.
        out_channels: of each.
        kernel_size, padding, dilation: of every depthwise stage.
        pre_activation: before the first.
        mid_activation: within each.
        activations: after each; None: none.
        max_pool: (kernel, stride, padding), or None.
        backend: "auto" or "cpu".

    Returns:
        (N, out_channels[-1], Ho, Wo), of x's dtype.

    Raises:
        TypeError, ValueError: as separable_conv2d_packed.
    """
    shape = check_x(x)
    if not isinstance(packed, (tuple, list)) or not packed:
        raise TypeError(f"packed must be a list of what pack_separable_conv2d returned, got {type(packed).__name__}")
    for each in packed:
        check_packed(each, x, "separable_conv2d")
    activations = [None] * len(packed) if activations is None else activations
    for name, values in (("out_channels", out_channels), ("activations", activations)):
        if not isinstance(values, (tuple, list)) or len(values) != len(packed):
            raise ValueError(f"{name} must have {len(packed)} elements, as packed has, got {values!r}")
    for channels in out_channels:
        positive("out_channels", channels)
    kernel, pads, dilations = pair("kernel_size", kernel_size), edges(padding), pair("dilation", dilation)
    size: Sequence[int] = shape[2:]
    for _ in packed:
        size = output_size((*shape[:2], *size), kernel, (1, 1), pads, dilations)
    pool = check_max_pool(max_pool, size)
    pre = activation_codes.code("pre_activation", pre_activation)
    mid = activation_codes.code("mid_activation", mid_activation)
    post = [activation_codes.code("activations", name) for name in activations]
    if torch.is_grad_enabled():
        check_inference("separable_conv2d_sequence", "call separable_conv2d", x=x)
    code = backends.code("separable_conv2d_packed", backend, x.device.type)
    return _op(x, list(packed), list(out_channels), kernel, pads, dilations, pre, mid, post, pool, code)


@fake("separable_conv2d_sequence")
def _(
    x,
    packed,
    out_channels,
    kernel_size,
    padding,
    dilation,
    pre_activation,
    mid_activation,
    activations,
    max_pool,
    backend=0,
):
    size = x.shape[2:]
    for _ in packed:
        size = output_size((*x.shape[:2], *size), kernel_size, (1, 1), padding, dilation)
    if len(max_pool) == 3:
        kernel, stride, edge = max_pool
        size = output_size((*x.shape[:2], *size), (kernel,) * 2, (stride,) * 2, (edge,) * 4, (1, 1))
    return empty_image(x, (x.shape[0], out_channels[-1], *size))


register_autocast("separable_conv2d_sequence")
