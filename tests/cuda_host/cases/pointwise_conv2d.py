"""Problems for the host-run pointwise_conv2d, their tensors, and how its op is called."""

import torch
from numerics import LAYOUTS, channel_scales, draw

from cnnfast.ops.activations import CODES

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def case(n, c, k, size, s=1, act=None, gate=False, bias=True, residual=False, layout="channels_last"):
    strides = (s, s) if isinstance(s, int) else s
    return dict(
        n=n, c=c, k=k, size=size, stride=strides, act=act, gate=gate, bias=bias, residual=residual, layout=layout
    )


# Channels: ends of slices (64 bytes); output channels: of blocks of 32, 64 and 128; pixels: of 64 and 128.
VECTORIZED = [
    case(2, 8, 8, (5, 7)),
    case(1, 16, 32, (8, 8), act="relu"),
    case(2, 40, 72, (5, 7), act="relu6", gate=True, residual=True),
    case(1, 24, 40, (13, 11), act="silu", bias=False),
    case(1, 104, 136, (3, 5), act="gelu", residual=True),
    case(3, 32, 24, (7, 7), act="sigmoid", gate=True),
    case(1, 8, 200, (2, 66), act="tanh", gate=True, residual=True, bias=False),
    case(2, 72, 16, (9, 8), s=2, residual=True),
    case(2, 16, 88, (8, 9), s=(3, 1), act="relu", gate=True),
    case(2, 264, 128, (1, 1), gate=True),
    case(1, 8, 64, (19, 1), residual=True),
    case(3, 8, 16, (2, 3), s=4, act="relu"),  # stride > size
    case(2, 24, 48, (6, 5), layout="nchw", act="relu6", gate=True, residual=True),
    case(1, 16, 8, (7, 8), s=2, layout="nchw"),
]
GENERIC = [
    case(2, 3, 7, (5, 4), act="relu", gate=True, residual=True),
    case(1, 1, 8, (6, 6), s=2),
    case(2, 8, 1, (4, 4), act="silu"),
    case(1, 17, 13, (1, 1), act="tanh", gate=True),
    case(1, 23, 24, (5, 1), act="gelu", bias=False),
    case(1, 16, 6, (3, 4), s=(2, 1), residual=True, layout="nchw"),
    case(2, 5, 16, (2, 3), s=5, layout="nchw"),
]
EMPTY = [case(0, 8, 8, (7, 7), gate=True), case(0, 3, 5, (4, 4), residual=True, layout="nchw")]


def y_shape(case):
    return (case["n"], case["k"], *(-(-size // s) for size, s in zip(case["size"], case["stride"], strict=True)))


def tensors_of(case, dtype, generator, bias_dtype=None):
    """Scales of the channels over three decades."""
    n, c, k = case["n"], case["c"], case["k"]
    scales = channel_scales(generator, c, 3.0).reshape(-1, 1, 1)
    out_scales = channel_scales(generator, k, 3.0)
    to_layout = LAYOUTS[case["layout"]]
    return {
        "x": to_layout(draw(generator, (n, c, *case["size"]), dtype, scale=scales)),
        "weight": draw(generator, (k, c, 1, 1), dtype, scale=out_scales.reshape(-1, 1, 1, 1)),
        "bias": draw(generator, (k,), bias_dtype or dtype, scale=out_scales) if case["bias"] else None,
        "gate": draw(generator, (n, c, 1, 1), dtype) if case["gate"] else None,
        "residual": to_layout(draw(generator, y_shape(case), dtype, scale=out_scales.reshape(-1, 1, 1)))
        if case["residual"]
        else None,
    }


def options_of(case):
    return {"stride": case["stride"], "activation": case["act"]}


def run(host, case, x, weight, bias, gate, residual, tf32=False):
    code = CODES[case["act"] or "identity"]
    return host.ops.pointwise_conv2d(x, weight, bias, gate, residual, list(case["stride"]), code, tf32)


def is_vectorized(case):
    return case in VECTORIZED
