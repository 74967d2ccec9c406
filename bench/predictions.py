"""docs/predictions.md: what each GPU kernel should take on an H100, stated before the first measurement.

    python -m cnnfast.bench.predictions      from the repository's root; keeps what was measured for unchanged rows

The model, to be proven wrong: a launch takes LAUNCH, plus the longer of its bytes at the rate of a copy and its
instructions at ISSUE of what the schedulers could issue. Instructions are those of the code that Triton makes for
sm_90, counted by kind (load, conversion, multiply-add, the rest) in the disassembly; tiles are the launchers' own.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

FILE = Path("docs/predictions.md")
COPY = 3.0e12  # bytes/s, read and written: measured on an H100 SXM
LANES = 132 * 128 * 1.755e9  # instructions/s of all threads: multiprocessors x lanes x boost clock
ISSUE = 0.7
LAUNCH = 2e-6  # s, of each kernel behind another
DTYPES = (torch.bfloat16, torch.float32)
BATCHES = (32, 256)


@dataclass(frozen=True)
class Layer:
    """A depthwise convolution with padding 'same', and how often a forward pass of its network runs it."""

    channels: int
    size: int
    kernel: int
    stride: int
    times: int
    pre_activation: bool = False

    @property
    def out(self) -> int:
        return -(-self.size // self.stride)


LITE0 = [Layer(32, 112, 3, 1, 1), Layer(96, 112, 3, 2, 1), Layer(144, 56, 3, 1, 1), Layer(144, 56, 5, 2, 1)]
LITE0 += [Layer(240, 28, 5, 1, 1), Layer(240, 28, 3, 2, 1), Layer(480, 14, 3, 1, 2), Layer(480, 14, 5, 1, 1)]
LITE0 += [Layer(672, 14, 5, 1, 2), Layer(672, 14, 5, 2, 1), Layer(1152, 7, 5, 1, 3), Layer(1152, 7, 3, 1, 1)]
V2 = [Layer(32, 112, 3, 1, 1), Layer(96, 112, 3, 2, 1), Layer(144, 56, 3, 1, 1), Layer(144, 56, 3, 2, 1)]
V2 += [Layer(192, 28, 3, 1, 2), Layer(192, 28, 3, 2, 1), Layer(384, 14, 3, 1, 4), Layer(576, 14, 3, 1, 2)]
V2 += [Layer(576, 14, 3, 2, 1), Layer(960, 7, 3, 1, 3)]
XCEPTION = [Layer(64, 147, 3, 1, 1), Layer(128, 147, 3, 1, 1, True), Layer(128, 74, 3, 1, 1, True)]
XCEPTION += [Layer(256, 74, 3, 1, 1, True), Layer(256, 37, 3, 1, 1, True), Layer(728, 37, 3, 1, 1, True)]
XCEPTION += [Layer(728, 19, 3, 1, 26, True), Layer(1024, 10, 3, 1, 1), Layer(1536, 10, 3, 1, 1)]
NETWORKS = {"MobileNetV2": V2, "EfficientNet-B0 and -Lite0": LITE0, "Xception": XCEPTION}


def seconds(bytes_moved: float, instructions: float) -> float:
    return LAUNCH + max(bytes_moved / COPY, instructions / (ISSUE * LANES))


def load_cost(layer: Layer, dtype: torch.dtype) -> int:
    """Instructions of a 16-byte load of x: address, mask, conversions, the activation before."""
    vector = 16 // dtype.itemsize
    return 11 + vector * ((dtype is not torch.float32) + layer.pre_activation)


def spatial(layer: Layer, batch: int, dtype: torch.dtype, backward: bool) -> float:
    """Seconds of the forward kernel, or of the input gradient's."""
    from cnnfast.kernels.launch import spatial_blocks, spatial_grid

    x = torch.empty(0, dtype=dtype, device="meta")
    k, s, vector = layer.kernel, layer.stride, 16 // dtype.itemsize
    if backward:
        size, rows = layer.size, dict(row_multiple=s)
    else:
        size, rows = layer.out, dict(stride_h=s)
    blocks = spatial_blocks(layer.channels, size, size, x, True, k, **rows)
    (programs,) = spatial_grid(batch, size, size, layer.channels, blocks)
    height = blocks["BLOCK_H"]
    loads = (k - 1) // s + height // s if backward else (height - 1) * s + k
    adds = vector * k * height // (s if backward else 1)
    thread = 410 + k * (20 + 11 * k + loads * load_cost(layer, dtype) + adds)
    images = batch * layer.channels * (layer.size**2 + layer.out**2) * dtype.itemsize
    if backward and layer.pre_activation:
        images += batch * layer.channels * layer.size**2 * dtype.itemsize
    return seconds(images, programs * blocks["num_warps"] * 32 * thread)


def weight_gradient(layer: Layer, batch: int, dtype: torch.dtype) -> float:
    """Seconds of both stages."""
    from cnnfast.kernels.depthwise_conv2d import weight_blocks
    from cnnfast.kernels.launch import cdiv

    x = torch.empty(0, dtype=dtype, device="meta")
    k, s = layer.kernel, layer.stride
    blocks = weight_blocks(layer.channels, (k, k), layer.out, layer.out, x, True, s)
    height, threads = blocks["BLOCK_H"], blocks["num_warps"] * 32
    held = blocks["BLOCK_W"] * blocks["BLOCK_C"] / threads  # elements a thread
    columns = cdiv(layer.out, blocks["BLOCK_W"]) * cdiv(layer.channels, blocks["BLOCK_C"])
    tiles = batch * cdiv(layer.out, height)
    conversions = (dtype is not torch.float32) + layer.pre_activation
    tile = 100 + ((height - 1) * s + k) * k * (11 + held * conversions) + held * height * (k * k + 2)
    programs = columns * cdiv(tiles, max(cdiv(tiles * columns, 2048), 2))
    images = batch * layer.channels * (layer.size**2 + layer.out**2) * dtype.itemsize
    partial = programs * blocks["BLOCK_C"] * (k * k + 1) * 4
    return seconds(images + partial, columns * tiles * threads * tile) + seconds(partial, 0)


def row(layer: Layer, batch: int, dtype: torch.dtype) -> str:
    images = batch * layer.channels * (layer.size**2 + layer.out**2) * dtype.itemsize
    flops = 2 * batch * layer.channels * layer.out**2 * layer.kernel**2
    times = [spatial(layer, batch, dtype, backward) for backward in (False, True)]
    times.append(weight_gradient(layer, batch, dtype))
    shape = f"{layer.channels} x {layer.size}^2, {layer.kernel}x{layer.kernel} / {layer.stride}"
    cells = [shape, f"{layer.times}", f"{batch}", "bf16" if dtype is torch.bfloat16 else "fp32"]
    cells += [f"{images / 1e6:.1f}", f"{flops / 1e9:.2f}", f"{images / COPY * 1e6:.1f}"]
    cells += [f"{time * 1e6:.1f}" for time in times]
    return f"| {' | '.join(cells)} | not yet |"


def text() -> str:
    lines = [
        f"""# Predictions

Made by `python -m cnnfast.bench.predictions` before any of these kernels ran on a GPU; the model is in
bench/predictions.py. H100 SXM: copy {COPY / 1e12:.1f} TB/s (read and written; measured), {LANES / 1e12:.1f} T thread
instructions/s of which {ISSUE:.0%} are counted on, {LAUNCH * 1e6:.0f} us a launch. A weight gradient is two launches.
Times are of the Triton kernels, channels_last, in microseconds; the floor is (x + y) / copy, also for other kernels of
the same op. 'Measured' becomes date, commit, device, time and error, and is stale once the kernel has changed.
"""
    ]
    for network, layers in NETWORKS.items():
        lines.append(f"\n## depthwise_conv2d in {network}\n")
        lines.append(
            "| layer | times | batch | dtype | MB | GFLOP | floor | forward | gradient of x | of weight | measured |"
        )
        lines.append("|---|" + "---:|" * 9 + "---|")
        lines += [row(layer, batch, dtype) for layer in layers for dtype in DTYPES for batch in BATCHES]
    return "\n".join(lines) + "\n"


def keep_measured(made: str, written: str) -> str:
    """`made` with the last cell of those rows of `written` that predict the same."""
    cells = dict(line[:-2].rsplit("| ", 1) for line in written.splitlines() if line.startswith("| "))
    lines = []
    for line in made.splitlines():
        prediction, _, _ = line.rpartition("| not yet |")
        lines.append(f"{prediction}| {cells[prediction]} |" if cells.get(prediction) else line)
    return "\n".join(lines) + "\n"


def main() -> int:
    argparse.ArgumentParser(description="writes docs/predictions.md, from the repository's root").parse_args()
    written = FILE.read_text(encoding="utf-8") if FILE.exists() else ""
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(keep_measured(text(), written), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
