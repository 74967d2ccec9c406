"""Problems for the host-run depthwise_conv2d, their tensors, and how its ops are called."""

import torch
from numerics import LAYOUTS, channel_scales, draw

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
CODES = {None: 0, "relu": 1, "relu6": 2}


def case(shape, k, s=1, p="same", d=1, m=1, pre=None, act=None, layout="channels_last"):
    def pair(v):
        return (v, v) if isinstance(v, int) else v

    return dict(
        shape=shape, kernel=pair(k), stride=pair(s), padding=p, dilation=pair(d), m=m, pre=pre, act=act, layout=layout
    )


# Channels: 8 and 24 fill one block's lanes, 264 takes two; heights and widths: ends of strips and of rows.
VECTORIZED = [
    case((2, 8, 7, 7), 3, pre="relu"),
    case((1, 24, 13, 9), 3, p=(1, 2, 2, 1), act="relu6"),
    case((1, 264, 3, 6), 3, p=(0, 0, 0, 0), pre="relu6", act="relu"),
    case((1, 16, 2, 1), 3, p=(1, 1, 1, 1)),
    case((2, 8, 5, 1), 3, p=(3, 4, 5, 3), act="relu"),  # more padding than the kernel is wide
    case((1, 8, 19, 21), 3, pre="relu", act="relu6"),
    case((2, 8, 8, 8), 3, s=2, act="relu6"),
    case((1, 24, 9, 11), 3, s=2, p=(1, 1, 1, 1), pre="relu"),
    case((1, 8, 5, 7), 3, s=2, p=(2, 1, 2, 3), act="relu"),
    case((1, 264, 4, 5), 3, s=2, p=(0, 1, 0, 1)),
    case((1, 8, 2, 3), 3, s=2, p=(0, 1, 1, 0), pre="relu6"),
    case((2, 8, 7, 7), 5, act="relu6"),
    case((1, 24, 6, 13), 5, p=(1, 3, 2, 4), pre="relu", act="relu"),
    case((1, 8, 1, 9), 5, p=(2, 2, 2, 2)),
    case((1, 8, 14, 14), 5, s=2, act="relu6"),
    case((1, 24, 7, 10), 5, s=2, p=(2, 2, 1, 2), pre="relu"),
    case((1, 264, 3, 4), 5, s=2, p=(3, 3, 3, 3), act="relu"),
]
GENERIC = [
    case((2, 3, 7, 5), 3, act="relu6"),
    case((1, 1, 6, 6), 3, s=2, pre="relu"),
    case((1, 5, 4, 4), 1, act="relu"),
    case((1, 16, 1, 1), 3, p=(1, 1, 1, 1)),  # NCHW as well as NHWC: taken for NCHW
    case((1, 8, 9, 9), 3, d=2, pre="relu", act="relu6"),
    case((1, 8, 6, 7), 3, m=2, act="relu"),
    case((1, 3, 6, 7), (2, 3), s=(1, 2), p=(1, 0, 2, 1), m=3, d=(2, 1)),
    case((1, 8, 9, 4), 3, s=3, p=(2, 1, 0, 1)),
    case((1, 7, 11, 11), 7, s=2),
    case((1, 8, 4, 4), 3, s=7),  # stride > size
    case((2, 8, 7, 7), 3, layout="nchw", pre="relu", act="relu6"),
    case((1, 13, 8, 8), 5, s=2, layout="nchw", m=2),
    case((2, 6, 5, 1), 3, s=(2, 1), layout="nchw"),
]
EMPTY = [case((0, 8, 7, 7), 3), case((0, 3, 7, 7), 3, layout="nchw")]


def tensors_of(case, dtype, generator, integers=False, bias_dtype=None):
    """Channel scales spread over three decades; or small integers: every sum is then exact, and with a bias of an odd
    half no result lies at a kink."""
    n, c, h, w = case["shape"]
    shapes = {"x": (n, c, h, w), "weight": (c * case["m"], 1, *case["kernel"])}
    if integers:
        tensors = {name: torch.randint(-3, 4, s, generator=generator).to(dtype) for name, s in shapes.items()}
        tensors["bias"] = (torch.randint(-2, 8, (c * case["m"],), generator=generator) + 0.5).to(bias_dtype or dtype)
        if case["pre"]:
            tensors["x"] = tensors["x"] * 2 + 1
    else:
        scales = channel_scales(generator, c, 3.0)
        tensors = {"x": draw(generator, shapes["x"], dtype, scale=scales.reshape(-1, 1, 1))}
        tensors["weight"] = draw(generator, shapes["weight"], dtype)
        bias_scales = scales.repeat_interleave(case["m"])
        tensors["bias"] = draw(generator, bias_scales.shape, bias_dtype or dtype, scale=bias_scales)
    tensors["x"] = LAYOUTS[case["layout"]](tensors["x"])
    return tensors


def options_of(case):
    same = {name: case[name] for name in ("stride", "padding", "dilation")}
    return {**same, "pre_activation": case["pre"], "activation": case["act"]}


def geometry(case):
    """The op's [stride, padding, dilation, pre_activation, activation]."""
    padding = [] if case["padding"] == "same" else list(case["padding"])
    return list(case["stride"]), padding, list(case["dilation"]), CODES[case["pre"]], CODES[case["act"]]


def run(host, case, x, weight, bias):
    return host.ops.depthwise_conv2d(x, weight, bias, *geometry(case))


def run_backward(host, case, grad, tensors, mask=7):
    return host.ops.depthwise_conv2d_backward(grad, *tensors.values(), *geometry(case), mask)


def is_vectorized(case, dtype):
    return case in VECTORIZED and dtype is not torch.float64
