"""What a call of each op costs by its CUDA C++ kernels: costs.py's model, from the shapes and from the tiles that the
kernels' headers state. Beside Triton's figures in docs/predictions.md they say which of the two should win where.

What differs from Triton: products are mma.sync's, which reaches MMA of what wgmma does on an H100 (as fast elsewhere:
before compute capability 9.0 Triton multiplies by mma.sync, too).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .costs import Work, activation, converts, tensor_bytes

MMA = 0.62  # of wgmma's rate: what is published for large products in 16 bits on an H100


def product(pixels: int, sum_length: int, columns: int, x: torch.Tensor, moved: float, extra: float = 0) -> Work:
    """pixels x columns numbers, each a sum of sum_length; blocks of 128 x 64. extra: instructions beside it."""
    flops = 2.0 * pixels * sum_length * columns
    padded = 2.0 * -(-pixels // 128) * 128 * sum_length * -(-columns // 64) * 64
    blocks = -(-pixels // 128) * -(-columns // 64)
    return Work(
        bytes=moved,
        flops=flops,
        instructions=extra + pixels * columns * 8 + padded / 2 / 64,
        multiplied=padded / MMA,
        rate="16 bits" if converts(x) else "TF32",
        busy=min(1.0, blocks / 132) if blocks < 264 else 1.0,
    )


def pointwise(a: dict[str, Any]) -> list[Work]:
    x, weight = a["x"], a["weight"]
    N, C, H, W = x.shape
    K, (sh, sw) = weight.shape[0], a["stride"]
    pixels = N * -(-H // sh) * -(-W // sw)
    moved = tensor_bytes(a) - (N * H * W - pixels) * C * x.element_size() + pixels * K * x.element_size()
    gated = 2.0 * pixels * C if a["gate"] is not None else 0.0
    return [product(pixels, C, K, x, moved, gated + pixels * K * activation(a["activation"]))]


def strips(x: torch.Tensor, k: int, s: int) -> tuple[int, float]:
    """(outputs, instructions) of a strip: what csrc/cuda/depthwise_conv2d/forward.cuh does for 16 bytes of channels."""
    outputs, vector = (2 if (k, s) == (5, 2) else 4), 16 // x.element_size()
    columns = (outputs - 1) * s + k
    row = columns * (5 + vector * converts(x)) + k * vector // 4 + k * outputs * vector
    return outputs, 60 + k * (12 + row) + outputs * (6 + vector * converts(x) / 2)


def depthwise(a: dict[str, Any]) -> list[Work]:
    """The forward kernel, or the gradients': of the activation where there is one, of x, of the weight."""
    x, weight = a["x"], a["weight"]
    k, s, size, vector = weight.shape[2], a["stride"][0], x.element_size(), 16 // x.element_size()
    N, C, H, W = x.shape
    image = "grad" in a
    pixels = N * (a["grad"].shape[2] * a["grad"].shape[3] if image else -(-H // s) * -(-W // s))
    outputs, instructions = strips(x, k, s)
    count = pixels * C / vector / outputs
    of_x, of_y, flops = N * C * H * W * size, pixels * C * size, 2.0 * pixels * C * k * k
    pre, post = vector * (a["pre_activation"] != 0), vector * activation(a["activation"])
    forward = count * (instructions + k * ((outputs - 1) * s + k) * pre + outputs * post)
    if not image:
        return [Work(of_x + of_y + tensor_bytes({"weight": weight}), flops, forward)]
    works = []
    if a["activation"]:
        works.append(Work(of_x + 2 * of_y, flops, forward))
    if a["output_mask"] & 1:  # an output of it is a pixel of x, which takes k / s of the rows of the gradient
        works.append(Work(of_x * (2 if pre else 1) + of_y, flops, count * instructions * max(1, s)))
    if a["output_mask"] & 6:
        works.append(Work(of_x + of_y, flops, count * instructions * 1.3))
        works.append(Work(512 * (k * k + 1) * C * 4, 0, 512 * (k * k + 1) * C))
    return works


def squeeze_excite(a: dict[str, Any]) -> list[Work]:
    """Sums, both products, scaling: x twice, residual and y once."""
    x, R = a["x"], a["reduce_weight"].shape[0]
    N, C, H, W = x.shape
    image, vectors = N * C * H * W * x.element_size(), N * C * 4
    residual = 0 if a["residual"] is None else image
    scaled = N * C * H * W * (8 + activation(a["post_activation"])) / 2
    return [
        Work(image + vectors, 0, N * C * H * W * (1 + converts(x))),
        Work(2.0 * R * C * x.element_size() + 2 * vectors, 4.0 * N * R * C, 8.0 * N * R * C, busy=min(1.0, N / 132)),
        Work(2 * image + residual + vectors, 0, scaled),
    ]


WORKS: dict[str, Callable[[dict[str, Any]], list[Work]]] = {
    "depthwise_conv2d": depthwise,
    "depthwise_conv2d_backward": depthwise,
    "pointwise_conv2d": pointwise,
    "squeeze_excite": squeeze_excite,
}
