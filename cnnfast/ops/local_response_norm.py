from __future__ import annotations

import torch
from torch import Tensor

from cnnfast import reference
from cnnfast.ops import backends
from cnnfast.ops._registration import empty_image, fake, register_autocast, register_cuda, register_gradients
from cnnfast.ops.arguments import check_x, number, positive

_op = torch.ops.cnnfast.local_response_norm.default


def local_response_norm(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, *, backend: str = "auto"
) -> Tensor:
    """Local response normalisation across channels, as torch.nn.functional.local_response_norm, in one pass.

    y[c] = x[c] / (k + alpha / size * sum of x[j]^2)^beta over the channels c - size // 2 <= j <= c + (size - 1) // 2
    that there are; differentiable once. No intermediate is rounded to x's dtype: bfloat16 and float16 are storage, the
    arithmetic is float32 (float64 for float64). beta of 0.5, 0.75 and 1 is fast; any other is computed by pow, element
    by element.

    The paper's alpha isn't divided by size: its 1e-4 for five channels is 5e-4 here.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16; channels_last or NCHW, the output's memory format
            follows it.
        size: channels of the window, at least 1; may be larger than C.
        alpha, beta, k: numbers.
        backend: "auto", "cpu", "triton" or "reference" (plain torch).

    Returns:
        (N, C, H, W), of x's dtype; under autocast float32, as torch's.

    Raises:
        TypeError: a dtype that doesn't fit, or something that isn't a tensor, an int or a number where one is wanted.
        ValueError: a shape, size, name or device that doesn't fit, or a backend that can't run here.

    ImageNet Classification with Deep Convolutional Neural Networks (AlexNet), section 3.3; Going Deeper with
    Convolutions (GoogLeNet), https://arxiv.org/abs/1409.4842.
    """
    check_x(x)
    positive("size", size)
    alpha, beta, k = number("alpha", alpha), number("beta", beta), number("k", k)
    code = backends.code("local_response_norm", backend, x.device.type)
    if code == backends.REFERENCE:
        return reference.local_response_norm(x, size, alpha, beta, k)
    return _op(x, size, alpha, beta, k, code)


@fake("local_response_norm")
def _(x, size, alpha, beta, k, backend=0):
    return empty_image(x, x.shape)


@fake("local_response_norm_backward")
def _(grad, x, size, alpha, beta, k, backend=0):
    return empty_image(x, x.shape)


register_gradients("local_response_norm")
register_cuda("local_response_norm")
register_autocast("local_response_norm", to=torch.float32)
