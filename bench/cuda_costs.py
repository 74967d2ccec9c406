"""What a call of each op costs by its CUDA C++ kernels: costs.py's model, from the shapes and from the tiles that the
kernels' headers state. Beside Triton's figures in docs/predictions.md they say which of the two should win where.

What differs from Triton: products are mma.sync's, which reaches MMA of what wgmma does on an H100 (as fast elsewhere:
before compute capability 9.0 Triton multiplies by mma.sync, too).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .costs import PROGRAMS, Work, activation, converts, tensor_bytes

CLUSTER = 8  # blocks that make an image together
MMA = 0.62  # of wgmma's rate: what is published for large products in 16 bits on an H100


def product(pixels: int, sum_length: int, columns: int, x: torch.Tensor, moved: float, extra: float = 0) -> Work:
    """pixels x columns numbers, each a sum of sum_length, by csrc/cuda/pointwise_conv2d.cuh's choice of tiles. extra:
    instructions beside it."""
    sizes = [(64, 32)] if columns <= 32 else [(128, 128), (128, 64), (64, 64)]
    tiles = [(-(-pixels // rows) * -(-columns // wide), rows * wide) for rows, wide in sizes]
    blocks, tile = next((of for of in tiles if of[0] >= 2 * PROGRAMS), tiles[-1])
    multiplied = 2.0 * blocks * tile * sum_length
    return Work(
        bytes=moved,
        flops=2.0 * pixels * sum_length * columns,
        instructions=extra + pixels * columns * 8 + multiplied / 64,
        multiplied=multiplied / MMA,
        rate="16 bits" if converts(x) else "TF32",
        busy=min(1.0, blocks / PROGRAMS),
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


def gates(N: int, C: int, R: int, x: torch.Tensor) -> list[Work]:
    """As csrc/cuda/squeeze_excite/gate.cuh: one launch, a block an image, or two, a block 4 images x 256 channels."""
    flops = 4.0 * N * R * C
    if C * R <= 1 << 15 and C + R <= 1 << 13:
        read = 2.0 * N * R * C * x.element_size()  # from L2, as fast as DRAM at least
        return [Work(read + 8 * N * C, flops, 2 * flops, busy=min(1.0, N / PROGRAMS))]
    blocks = -(-N // 4) * -(-C // 256)
    return [Work(R * C * (x.element_size() + 0.0), flops / 2, flops, busy=min(1.0, blocks / PROGRAMS))] * 2


def squeeze_excite(a: dict[str, Any]) -> list[Work]:
    """Sums, gates, scaling: x twice, residual and y once."""
    x, R = a["x"], a["reduce_weight"].shape[0]
    N, C, H, W = x.shape
    image, vectors = N * C * H * W * x.element_size(), N * C * 4
    residual = 0 if a["residual"] is None else image
    scaled = N * C * H * W * (8 + activation(a["post_activation"])) / 2
    return [
        Work(image + vectors, 0, N * C * H * W * (1 + converts(x))),
        *gates(N, C, R, x),
        Work(2 * image + residual + vectors, 0, scaled),
    ]


def tile_of(a: dict[str, Any]) -> tuple[int, int, int]:
    """(tiles of an image, outputs and inputs of one): the shape that expands the fewest pixels."""
    x, (k, _), (s, _) = a["x"], a["dw_weight"].shape[2:], a["stride"]
    H, W = -(-x.shape[2] // s), -(-x.shape[3] // s)

    def of(h: int, w: int) -> tuple[int, int, int]:
        inputs = ((h - 1) * s + k) * ((w - 1) * s + k)
        return -(-H // h) * -(-W // w), h * w, -(-inputs // 16) * 16

    return min((of(8, 8), of(4, 16), of(16, 4)), key=lambda tile: tile[0] * (tile[1] + tile[2]))


def inverted_residual(a: dict[str, Any]) -> list[Work]:
    """One launch; with squeeze-excite expansion and depthwise, the gates, the projection, or all in one, with the same
    bits and no halos, where an image is one tile and all clusters run at once: in 16 bits two blocks a multiprocessor.
    """
    x, project = a["x"], a["project_weight"]
    (N, C, H, W), size, vector = x.shape, x.element_size(), 4 // x.element_size()
    (K, E), (k, _), (s, _) = project.shape[:2], a["dw_weight"].shape[2:], a["stride"]
    tiles, outputs, inputs = tile_of(a)
    expands, excites = a["expand_weight"] is not None, a["se_reduce_weight"] is not None
    together = 2 if converts(x) else 1
    in_one = excites and tiles == 1 and together * PROGRAMS >= N * CLUSTER
    if in_one:
        inputs = -(-H * W // 16) * 16
    curve = activation(a["activation"])
    columns = 8 * (2 if K <= 64 else 4)
    projected = outputs * -(-K // columns) * columns * (in_one or not excites)
    multiplied = 2.0 * N * tiles * E * (inputs * -(-C // 16) * 16 * expands + projected)
    row = (3 * s + k) * (1 + 2 * converts(x)) + k * vector + 4 * k * vector  # of the filter, of a strip of 4 outputs
    strip = 30 + k * row + 4 * (vector * (2 + curve) + 2)
    instructions = N * tiles * E * (inputs * (3 + curve) * expands + outputs / 4 / vector * strip) + multiplied / 64
    of_x, pixels = N * C * H * W * size, N * -(-H // s) * -(-W // s)
    flops = 2.0 * N * H * W * C * E * expands + 2.0 * pixels * E * k * k
    d, y = pixels * E * size, pixels * K * size * (1 if a["residual"] is None else 2)
    blocks = N * max(tiles, 8 if excites else 1)
    if in_one:  # each block loads all of d from the others, and a share of squeeze-excite's weights
        instructions += N * E * (CLUSTER * outputs * size / 2 + 8 * a["se_reduce_weight"].shape[0])
        blocks = N * CLUSTER / together
    first = Work(
        bytes=of_x + (d if excites and not in_one else y) + tensor_bytes({"w": project, "e": a["expand_weight"]}),
        flops=flops + 2.0 * pixels * E * K * (in_one or not excites),
        instructions=instructions,
        multiplied=multiplied / MMA,
        rate="16 bits" if converts(x) else "TF32",
        busy=min(1.0, blocks / PROGRAMS),
    )
    if in_one or not excites:
        return [first]
    projection = product(pixels, E, K, x, d + y, 2.0 * pixels * E)
    return [first, *gates(N, E, a["se_reduce_weight"].shape[0], x), projection]


WORKS: dict[str, Callable[[dict[str, Any]], list[Work]]] = {
    "depthwise_conv2d": depthwise,
    "depthwise_conv2d_backward": depthwise,
    "inverted_residual": inverted_residual,
    "pointwise_conv2d": pointwise,
    "squeeze_excite": squeeze_excite,
}
