"""Problems for the host-run squeeze_excite, their tensors, and how the op is called."""

import torch
from numerics import LAYOUTS, channel_scales, draw

from cnnfast.ops.activations import CODES

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
SCHEMA = ("x", "reduce_weight", "reduce_bias", "expand_weight", "expand_bias", "residual")


def case(shape, squeezed, act="relu", gate="sigmoid", post=None, biases=True, residual=False, layout="channels_last"):
    return dict(
        shape=shape, squeezed=squeezed, act=act, gate=gate, post=post, biases=biases, residual=residual, layout=layout
    )


# Channels: whole vectors or not, one block's lanes or more; pixels: one chunk or several, its end within a round; the
# gates in one launch or two, weights' rows in vectors or not, R a part of a tile of shared memory or more.
CASES = [
    case((2, 64, 7, 7), 4, post="relu", residual=True),
    case((1, 24, 20, 13), 6, act="silu"),
    case((3, 264, 5, 6), 16, act="gelu", gate="tanh", residual=True),
    case((2, 64, 16, 18), 8, act="tanh", gate="silu", post="relu6", residual=True),  # several chunks
    case((2, 40, 1, 1), 10, gate="gelu", residual=True),
    case((1, 16, 9, 1), 3, act="relu6", gate="relu6", biases=False, post="silu"),
    case((2, 1, 6, 5), 1, act=None, gate=None, post="gelu"),
    case((2, 3, 4, 7), 2, act="sigmoid", post="tanh", residual=True),
    case((1, 37, 17, 19), 5, post="sigmoid", biases=False, residual=True),
    case((1, 7, 1, 1), 1, gate="relu"),
    case((2, 24, 8, 10), 6, post="relu", residual=True, layout="nchw"),
    case((1, 12, 50, 50), 3, act="silu", layout="nchw"),  # several chunks
    case((2, 9, 7, 7), 4, gate="tanh", post="relu6", residual=True, layout="nchw"),
    case((1, 2, 131, 131), 2, residual=True, layout="nchw"),  # chunks that end within a round
    case((3, 16, 6, 1), 4, biases=False, layout="nchw"),
    case((1, 31, 80, 55), 4, residual=True),  # chunks that end within a round of loads
]
TWO_LAUNCHES = [
    case((2, 2048, 3, 3), 128, post="relu", residual=True),  # SE-ResNet-50's last block
    case((5, 344, 2, 3), 100, act="silu"),  # more than IMAGES images; a part of a slice
    case((1, 1001, 2, 1), 37, act="gelu", residual=True),  # no vectors
    case((1, 32, 2, 2), 1100, post="relu"),  # more than one tile of R
]
EMPTY = [case((0, 8, 7, 7), 2), case((0, 3, 7, 7), 2, residual=True, layout="nchw")]


def tensors_of(case, dtype, generator, bias_dtype=None):
    """Channel scales spread over three decades."""
    n, c, h, w = case["shape"]
    r = case["squeezed"]
    scales = channel_scales(generator, c, 3.0).reshape(-1, 1, 1)

    def image():
        return LAYOUTS[case["layout"]](draw(generator, (n, c, h, w), dtype, scale=scales))

    tensors = {"x": image()}
    tensors["reduce_weight"] = draw(generator, (r, c, 1, 1), dtype)
    tensors["reduce_bias"] = draw(generator, (r,), bias_dtype or dtype) if case["biases"] else None
    tensors["expand_weight"] = draw(generator, (c, r, 1, 1), dtype, scale=r**-0.5)
    tensors["expand_bias"] = draw(generator, (c,), bias_dtype or dtype) if case["biases"] else None
    tensors["residual"] = image() if case["residual"] else None
    return tensors


def options_of(case):
    return dict(activation=case["act"], gate_activation=case["gate"], post_activation=case["post"])


def terms_of(case):
    _, c, h, w = case["shape"]
    return h * w + c + case["squeezed"]


def run(host, case, tensors):
    return host.ops.squeeze_excite(*tensors.values(), *(CODES[name] for name in options_of(case).values()))
