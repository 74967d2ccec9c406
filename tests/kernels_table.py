"""docs/kernels.md: what every Triton kernel takes on every target, compiled ahead of time (no GPU needed).

    python tests/kernels_table.py            writes it
    python tests/kernels_table.py --check    compares; exit code 1 if the file is out of date

Registers may differ between versions of Triton: with another one than the file's, only spills and limits are checked.
"""

import argparse
import functools
import hashlib
import importlib
import re
import sys
from pathlib import Path

import torch
import triton
from ahead_of_time import SHARED_LIMIT, TARGETS, Compiled, Launch, compile_for, recording

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs/kernels.md"
BFLOAT16, FLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# name: (module, x's shape, kernel, stride, dtype, memory format, pre_activation, activation)
NHWC, NCHW = torch.channels_last, torch.contiguous_format
CASES = {
    "3x3, bf16": ("depthwise_conv2d", (32, 728, 19, 19), 3, 1, BFLOAT16, NHWC, 1, 0),
    "3x3 / 2, bf16": ("depthwise_conv2d", (32, 96, 112, 112), 3, 2, BFLOAT16, NHWC, 0, 2),
    "5x5, bf16": ("depthwise_conv2d", (32, 672, 14, 14), 5, 1, BFLOAT16, NHWC, 0, 2),
    "5x5 / 2, bf16": ("depthwise_conv2d", (32, 144, 56, 56), 5, 2, BFLOAT16, NHWC, 0, 2),
    "3x3, fp16": ("depthwise_conv2d", (32, 144, 56, 56), 3, 1, FLOAT16, NHWC, 0, 2),
    "3x3, fp32": ("depthwise_conv2d", (32, 728, 19, 19), 3, 1, FLOAT32, NHWC, 1, 0),
    "5x5, fp32": ("depthwise_conv2d", (32, 672, 14, 14), 5, 1, FLOAT32, NHWC, 0, 2),
    "5x5 / 2, fp32": ("depthwise_conv2d", (32, 144, 56, 56), 5, 2, FLOAT32, NHWC, 0, 2),
    "3x3, fp32, NCHW": ("depthwise_conv2d", (32, 728, 19, 19), 3, 1, FLOAT32, NCHW, 1, 0),
    "5x5, bf16, NCHW": ("depthwise_conv2d", (32, 672, 14, 14), 5, 1, BFLOAT16, NCHW, 0, 2),
    "7x7, fp32": ("depthwise_conv2d", (32, 384, 28, 28), 7, 1, FLOAT32, NHWC, 0, 0),
    "3x3, fp64": ("depthwise_conv2d", (4, 728, 19, 19), 3, 1, FLOAT64, NHWC, 1, 0),
}


@functools.cache
def launches(case: str) -> dict[str, Launch]:
    """By kernel name, those of the forward pass and of all gradients; of two launches of a kernel the last."""
    op, shape, k, stride, dtype, memory_format, *activations = CASES[case]
    module = importlib.import_module(f"cnnfast.kernels.{op}")
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
    weight = torch.empty(shape[1], 1, k, k, dtype=dtype, device="meta")
    bias = torch.empty(shape[1], dtype=dtype, device="meta")
    args = (x, weight, bias, (stride, stride), (), (1, 1), *activations)
    with recording(module) as recorded:
        y = module.depthwise_conv2d(*args)
        forward = len(recorded)
        module.depthwise_conv2d_backward(torch.empty_like(y), *args, 0b111)
    by_name = {launch.kernel.__name__: launch for launch in recorded[forward:]}
    return by_name | {launch.kernel.__name__: launch for launch in recorded[:forward]}


def compiled(case: str, kernel: str, target: str) -> Compiled:
    return compile_for(launches(case)[kernel], target)


def wanted_load(case: str, kernel: str, target: str) -> int:
    """Bytes that a thread should load at once: its share of a tile's row, 16 at most; for channels_last."""
    _, _, _, _, dtype, memory_format, *_ = CASES[case]
    if memory_format is not NHWC or kernel.endswith("sum_kernel"):
        return 1
    options = launches(case)[kernel].kwargs
    pixels = options.get("STRIPS", 1) * options["BLOCK_W"]
    threads = options["num_warps"] * TARGETS[target].warp_size
    return min(pixels * options["BLOCK_C"] // threads * dtype.itemsize, 16)


def objections(case: str, kernel: str, target: str, result: Compiled) -> list[str]:
    """What is wrong with it, whatever the version of Triton."""
    wrong = []
    if result.spilled:
        wrong.append(f"{result.spilled} bytes a thread are spilled")
    if result.shared > SHARED_LIMIT[target]:
        wrong.append(f"{result.shared} bytes of shared memory, the limit is {SHARED_LIMIT[target]}")
    wanted = wanted_load(case, kernel, target)
    if result.narrowest_load < wanted:
        wrong.append(f"a load is {result.narrowest_load} bytes wide, not {wanted}")
    return [f"{kernel}, {case}, {target}: {text}" for text in wrong]


def digest() -> str:
    """Of what the figures depend on: the kernels' sources and the cases."""
    sources = [*sorted((ROOT / "kernels").glob("*.py")), Path(__file__), Path(__file__).with_name("ahead_of_time.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def table() -> tuple[str, list[str]]:
    lines, wrong = [], []
    for case in CASES:
        for kernel in launches(case):
            results = {target: compiled(case, kernel, target) for target in TARGETS}
            for target, result in results.items():
                wrong += objections(case, kernel, target, result)
            registers = " | ".join(str(result.registers) for result in results.values())
            shared = max(result.shared for result in results.values())
            options = launches(case)[kernel].kwargs
            tile = " x ".join(
                str(options[name]) for name in ("STRIPS", "BLOCK_H", "BLOCK_W", "BLOCK_S", "BLOCK_C") if name in options
            )
            sm_90 = results["sm_90"]
            lines.append(
                f"| {kernel} | {case} | {tile} | {options['num_warps']} | {registers} | {shared} |"
                f" {sm_90.narrowest_load} | {sm_90.instructions} |"
            )
            print(lines[-1], file=sys.stderr)
    targets = " | ".join(TARGETS)
    return (
        f"""# Triton kernels, compiled ahead of time

Made by `python tests/kernels_table.py` with Triton {triton.__version__} (sources {digest()}); nothing here needed a
GPU. Registers are a thread's (gfx942: vector registers a lane), on every target; shared memory is the most of any
target, in bytes a program; load is the narrowest one, in bytes a thread, and instructions the code's length, both on
sm_90. Nothing spills. Tile: [STRIPS x] BLOCK_H x BLOCK_W x BLOCK_C of the launcher's choice for the case's shape (the
sums: BLOCK_S x BLOCK_C). Cases are filter / stride and dtype, channels_last unless they say NCHW.

| kernel | case | tile | warps | {targets} | shared | load | instructions |
|---|---|---|---|{"---|" * len(TARGETS)}---|---|---|
"""
        + "\n".join(lines)
        + "\n",
        wrong,
    )


def made_with() -> tuple[str, str]:
    """(version of Triton, digest of the sources) that the file states."""
    return re.search(r"with Triton (\S+) \(sources (\w+)\)", FILE.read_text(encoding="utf-8")).groups()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with docs/kernels.md instead of writing it")
    check = parser.parse_args().check
    text, wrong = table()
    if not check:
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(text, encoding="utf-8")
    elif made_with()[0] == triton.__version__ and text != FILE.read_text(encoding="utf-8"):
        wrong.append("docs/kernels.md is out of date: run python tests/kernels_table.py")
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
