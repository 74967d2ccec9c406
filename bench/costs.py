"""What a launch of each Triton kernel costs, by shapes and tiles: the model behind docs/predictions.md, to be proven
wrong by measurements.

A launch takes LAUNCH, plus the longest of its bytes at the rate of a copy, its multiplications at MATMUL of what the
unit that does them reaches in a large product, and its other instructions at ISSUE of what the schedulers could issue.
Bytes count every tensor once. Instructions of depthwise kernels are those of the code that Triton makes for sm_90,
counted by kind (load, conversion, multiply-add, the rest) in the disassembly; those of kernels without a loop are the
code's length (docs/kernels.md) by the numbers that a thread holds; of the others an estimate, since they hardly matter
beside bytes and products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .launches import Launch

COPY = 3.0e12  # bytes/s, read and written: measured on an H100 SXM
LANES = 132 * 128 * 1.755e9  # instructions/s of all threads: multiprocessors x lanes x boost clock
ISSUE = 0.7
# FLOP/s: 16 bits, measured in a large product on an H100 SXM; TF32, half of it; float32 and float64 without tensor
# cores, two a lane and instruction (half of the lanes for float64).
RATES = {"16 bits": 798e12, "TF32": 399e12, "float32": 2 * LANES, "float64": LANES}
MATMUL = 0.6
LAUNCH = 2e-6  # s, of each kernel behind another
PROGRAMS = 132  # that run at once, at least: fewer leave multiprocessors idle


@dataclass(frozen=True)
class Work:
    """bytes moved if every tensor moves once; flops as the op is defined; what the kernel executes: multiplied, FLOPs
    in tl.dot at `rate` (of RATES), and instructions of all threads; busy: the share of multiprocessors with work."""

    bytes: float
    flops: float
    instructions: float
    multiplied: float = 0
    rate: str = "float32"
    busy: float = 1

    @property
    def floor(self) -> float:
        """Seconds that no kernel of this work can go below."""
        return max(self.bytes / COPY, self.flops / RATES[self.rate])

    @property
    def seconds(self) -> float:
        computing = max(self.multiplied / (MATMUL * RATES[self.rate]), self.instructions / (ISSUE * LANES)) / self.busy
        return LAUNCH + max(self.bytes / COPY, computing)


def tensor_bytes(arguments: dict[str, Any]) -> float:
    """Of all tensors, each once."""
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def programs(launch: Launch) -> int:
    count = 1
    for size in launch.grid:
        count *= size
    return count


def busy(launch: Launch) -> float:
    """Whole rounds of PROGRAMS: of 133 programs the last one leaves the others idle."""
    count = programs(launch)
    return count / (-(-count // PROGRAMS) * PROGRAMS)


def converts(tensor: torch.Tensor) -> bool:
    return tensor.element_size() < 4


def depthwise_spatial(launch: Launch) -> Work:
    """The forward kernel, or the input gradient's: threads that hold 16 bytes of channels of BLOCK_H rows."""
    a = launch.arguments
    backward = "grad_x" in a
    image, result = (a["grad"], a["grad_x"]) if backward else (a["x"], a["y"])
    k, s, vector = a["KH"], a["STRIDE_H"], 16 // image.element_size()
    height = a["BLOCK_H"]
    loads = (
        (k - 1) * a["DILATION_H"] // s + height // s if backward else (height - 1) * s + (k - 1) * a["DILATION_H"] + 1
    )
    load = 11 + vector * (converts(image) + (a["PRE_ACTIVATION"] != 0 and not backward))
    adds = vector * k * height // (s if backward else 1)
    thread = 410 + a["KW"] * (20 + 11 * k + loads * load + adds)
    of_outputs = image if backward else result
    moved = tensor_bytes(a)
    if backward and a["PRE_ACTIVATION"] == 0:
        moved -= a["x"].numel() * a["x"].element_size()
    return Work(
        bytes=moved,
        flops=2 * of_outputs.numel() * k * a["KW"],
        instructions=programs(launch) * a["num_warps"] * 32 * thread,
    )


def depthwise_weight(launch: Launch) -> Work:
    a = launch.arguments
    k, s, height, threads = a["KH"], a["STRIDE_H"], a["BLOCK_H"], a["num_warps"] * 32
    held = a["BLOCK_W"] * a["BLOCK_C"] / threads  # numbers a thread
    conversions = converts(a["x"]) + (a["PRE_ACTIVATION"] != 0)
    rows, columns = a["TAP_ROWS"], a["KW"]
    tile = 100 + ((height - 1) * s + rows) * columns * (11 + held * conversions) + held * height * (rows * columns + 2)
    tiles = programs(launch) * a["tiles"]
    return Work(bytes=tensor_bytes(a), flops=2 * a["grad"].numel() * k * columns, instructions=tiles * threads * tile)


def product(
    launch: Launch, rows: int, sum_length: int, columns: int, per_step: float = 0, moved: float | None = None
) -> Work:
    """`rows` x `columns` numbers, each a sum of `sum_length`: programs hold BLOCK_P x BLOCK_K of them."""
    a = launch.arguments
    held = a["BLOCK_P"] * a["BLOCK_K"]
    steps = -(-sum_length // a["BLOCK_C"])
    loaded = (a["BLOCK_P"] + a["BLOCK_K"]) * a["BLOCK_C"]
    multiplied = 2.0 * programs(launch) * held * steps * a["BLOCK_C"]
    return Work(
        bytes=tensor_bytes(a) if moved is None else moved,
        flops=2.0 * rows * sum_length * columns,
        instructions=programs(launch) * (held * 8 + steps * (loaded + per_step)) + multiplied * per_flop(a),
        multiplied=multiplied,
        rate=rate_of(a),
        busy=busy(launch),
    )


def per_flop(a: dict[str, Any]) -> float:
    """Instructions of a product beside its FLOPs: none on tensor cores; else each multiply-add is one, and each operand
    comes from shared memory once per four of them."""
    return 0.0 if a["TENSOR_CORES"] else 0.75


def rate_of(a: dict[str, Any]) -> str:
    dtype = next(value.dtype for value in a.values() if isinstance(value, torch.Tensor))
    if dtype == torch.float64:
        return "float64"
    if not a["TENSOR_CORES"]:
        return "float32"
    return "TF32" if dtype == torch.float32 else "16 bits"


def pointwise_forward(launch: Launch) -> Work:
    a = launch.arguments
    moved, x, y = tensor_bytes(a), a["x"], a["y"]
    skipped = 1 - y.shape[2] * y.shape[3] / (x.shape[2] * x.shape[3])  # pixels that a stride leaves out
    moved -= skipped * x.numel() * x.element_size()
    return product(launch, y.numel() // y.shape[1], x.shape[1], y.shape[1], moved=moved)


def pointwise_input(launch: Launch) -> Work:
    a = launch.arguments
    grad, moved = a["grad"], tensor_bytes(a)
    if a["partial"] is None:
        moved -= a["x"].numel() * a["x"].element_size()
    return product(launch, grad.numel() // grad.shape[1], grad.shape[1], a["x"].shape[1], moved=moved)


def pointwise_weight(launch: Launch) -> Work:
    a = launch.arguments
    grad, x = a["grad"], a["x"]
    pixels = grad.numel() // grad.shape[1]
    held = a["BLOCK_K"] * a["BLOCK_C"]
    steps = programs(launch) * a["tiles"]
    multiplied = 2.0 * steps * held * a["BLOCK_P"]
    return Work(
        bytes=tensor_bytes(a),
        flops=2.0 * pixels * grad.shape[1] * x.shape[1],
        instructions=steps * (a["BLOCK_K"] + a["BLOCK_C"]) * a["BLOCK_P"] + multiplied * per_flop(a),
        multiplied=multiplied,
        rate=rate_of(a),
        busy=busy(launch),
    )


def activation(code: int) -> int:
    """Instructions a number: none, relu, relu6; what has an exponential, about 14."""
    return code if code <= 2 else 14


def separable(launch: Launch) -> Work:
    """Depthwise rows in registers, then their product with BLOCK_K output channels, BLOCK_C channels a step."""
    a = launch.arguments
    x, y = a["x"], a["y"]
    M, K, height, vector = a["m_vectors"] * a["M_VECTOR"], y.shape[1], a["BLOCK_H"], 16 // x.element_size()
    steps = programs(launch) * -(-M // a["BLOCK_C"])
    rows = (height - 1) * a["STRIDE_H"] + (a["KH"] - 1) * a["DILATION_H"] + 1  # loaded for each of the filter's columns
    load = 11 / vector + converts(x) + activation(a["PRE_ACTIVATION"])
    number = a["KW"] * (rows * load + a["KH"] * height) + height * (3 + activation(a["MID_ACTIVATION"]))
    multiplied = 2.0 * steps * height * a["BLOCK_P"] * a["BLOCK_K"] * a["BLOCK_C"]
    pixels = y.numel() // K
    return Work(
        bytes=tensor_bytes(a),
        flops=2.0 * pixels * M * (a["KH"] * a["KW"] + K),
        instructions=steps * a["BLOCK_P"] * a["BLOCK_C"] * number
        + steps * a["BLOCK_K"] * a["BLOCK_C"] / 4
        + multiplied * per_flop(a),
        multiplied=multiplied,
        rate=rate_of(a),
        busy=busy(launch),
    )


def expansion(a: dict[str, Any], rows: int, channels: int, activated: int) -> tuple[float, float]:
    """(FLOPs, instructions) of a tile's BLOCK_E channels of the expansion and of its depthwise sums over so many rows
    of outputs: computed anew for each of the filter's columns, and for rows that the next strip takes, too."""
    pixels = a["STRIPS"] * a["BLOCK_W"]
    taken = {i * a["DILATION_H"] % a["STRIDE_H"] for i in range(a["KH"])}
    window = (a["KH"] - 1) * a["DILATION_H"] // a["STRIDE_H"] + 1
    times = (rows + window - 1) * len(taken) * a["KW"]
    numbers = times * pixels * a["BLOCK_E"]
    sums = 2 + activation(activated) + a["KH"] / len(taken)
    loads = times * pixels * channels * 2
    return 2.0 * numbers * channels, numbers * sums + loads


def pointwise_depthwise(launch: Launch) -> Work:
    a = launch.arguments
    x, y = a["x"], a["y"]
    N, C, H, W = x.shape
    K, taps = y.shape[1], a["KH"] * a["KW"]
    padded = -(-C // a["BLOCK_C"]) * a["BLOCK_C"]
    multiplied, instructions = expansion(a, a["rows"], padded, a["MID_ACTIVATION"])
    return of_expansion(
        launch, 2.0 * N * H * W * C * K / a["MULTIPLIER"] + 2.0 * y.numel() * taps, multiplied, instructions
    )


def inverted_residual(launch: Launch) -> Work:
    a = launch.arguments
    x, y = a["x"], a["y"]
    N, C, H, W = x.shape
    K, E, taps = y.shape[1], a["e_vectors"] * a["E_VECTOR"], a["KH"] * a["KW"]
    steps, padded = -(-E // a["BLOCK_E"]), -(-C // a["BLOCK_C"]) * a["BLOCK_C"]
    multiplied, instructions = expansion(a, a["BLOCK_H"], padded, a["ACTIVATION"])
    flops = 2.0 * N * H * W * C * E
    if a["expand_weight"] is None:
        multiplied = flops = 0.0
    outputs = a["STRIPS"] * a["BLOCK_W"] * a["BLOCK_H"]
    multiplied += 2.0 * outputs * a["BLOCK_E"] * a["BLOCK_K"]
    instructions += outputs * a["BLOCK_E"] * (3 + activation(a["ACTIVATION"]))
    return of_expansion(launch, flops + 2.0 * y.numel() // K * E * (taps + K), multiplied * steps, instructions * steps)


def of_expansion(launch: Launch, flops: float, multiplied: float, instructions: float) -> Work:
    """From what one program does."""
    a, count = launch.arguments, programs(launch)
    return Work(
        bytes=tensor_bytes(a),
        flops=flops,
        instructions=count * (instructions + multiplied * per_flop(a)),
        multiplied=count * multiplied,
        rate=rate_of(a),
        busy=busy(launch),
    )


def each_number(of_16_bits: float, of_32_bits: float | None = None) -> Callable[[Launch], Work]:
    """A kernel that goes once over its tensors: so many instructions a number of the largest one."""

    def work(launch: Launch) -> Work:
        a = launch.arguments
        largest = max((value for value in a.values() if isinstance(value, torch.Tensor)), key=torch.Tensor.numel)
        instructions = of_16_bits if of_32_bits is None or converts(largest) else of_32_bits
        return Work(tensor_bytes(a), flops=0, instructions=largest.numel() * instructions)

    return work


def squeeze_product(launch: Launch) -> Work:
    a = launch.arguments
    flops = 2.0 * a["images"] * a["inputs"] * a["outputs"]
    return Work(bytes=tensor_bytes(a), flops=flops, instructions=4 * flops, busy=busy(launch))


def scale_shift_gradient(launch: Launch) -> Work:
    pooled = launch.arguments["taps"] is not None  # of each number four windows
    return each_number(125, 175)(launch) if pooled else each_number(60, 100)(launch)


WORK: dict[str, Callable[[Launch], Work]] = {
    "add_up_kernel": each_number(3),
    "batch_norm_scale_shift_bwd_kernel": each_number(370),
    "batch_norm_scale_shift_fwd_kernel": each_number(340),
    "channel_sums_kernel": each_number(6, 10),
    "conv2d_epilogue_kernel": each_number(29, 46),
    "depthwise_conv2d_bwd_input_kernel": depthwise_spatial,
    "depthwise_conv2d_bwd_weight_kernel": depthwise_weight,
    "depthwise_conv2d_bwd_weight_sum_kernel": each_number(3),
    "depthwise_conv2d_fwd_kernel": depthwise_spatial,
    "inverted_residual_fwd_kernel": inverted_residual,
    "local_response_norm_bwd_kernel": each_number(140, 196),
    "local_response_norm_fwd_kernel": each_number(84, 112),
    "local_response_norm_wide_kernel": each_number(200),
    "pointwise_conv2d_bwd_input_kernel": pointwise_input,
    "pointwise_conv2d_bwd_weight_kernel": pointwise_weight,
    "pointwise_conv2d_fwd_kernel": pointwise_forward,
    "pointwise_depthwise_fwd_kernel": pointwise_depthwise,
    "scale_shift_bwd_kernel": scale_shift_gradient,
    "scale_shift_max_pool_fwd_kernel": each_number(34, 44),  # of x: three steps of three pixels for a quarter as many
    "separable_conv2d_fwd_kernel": separable,
    "squeeze_excite_bwd_weight_kernel": squeeze_product,
    "squeeze_excite_product_kernel": squeeze_product,
    "squeeze_excite_scale_kernel": each_number(36, 50),
}


def work(launch: Launch) -> Work:
    return WORK[launch.name](launch)
