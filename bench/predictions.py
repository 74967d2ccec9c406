"""docs/predictions.md: what each GPU kernel should take on an H100, stated before the first measurement.

    python -m cnnfast.bench.predictions      from the repository's root; keeps what was measured for unchanged rows

The networks run on meta tensors, as on a GPU; each call of an op makes its launcher's launches, recorded for sm_90; the
model of their costs is in costs.py.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cnnfast.ops import backends, cuda_kernels

from . import cuda_costs
from .costs import COPY, ISSUE, LANES, LAUNCH, MATMUL, RATES, Work, work
from .launches import recording

FILE = Path("docs/predictions.md")
BATCHES = (32, 256)
DTYPES = (torch.bfloat16, torch.float32)
NETWORKS = {"mobilenet_v2": 224, "tf_efficientnet_b0": 224, "xception": 299, "se_resnet50": 224}  # to input's size
RESPONSE_NORMS = {"AlexNet": [(96, 55), (256, 27)], "GoogLeNet": [(64, 56), (192, 56)]}  # channels, size
# Heading of a column: dtype, batch, what of a Work, its unit.
_PREDICTED = {
    f"{name}, {batch}": (dtype, batch, "seconds", 1e-6)
    for name, dtype in zip(("bf16", "fp32"), DTYPES, strict=True)
    for batch in BATCHES
}
COLUMNS = {
    "MB": (torch.bfloat16, max(BATCHES), "bytes", 1e6),
    "GFLOP": (torch.bfloat16, max(BATCHES), "flops", 1e9),
    "floor bf16": (torch.bfloat16, max(BATCHES), "floor", 1e-6),
    "floor fp32": (torch.float32, max(BATCHES), "floor", 1e-6),
    **_PREDICTED,
}
IMAGES = ("grad", "x", "residual", "y")
BESIDE = "\n".join(
    "| " + " | ".join(row) + " |"
    for row in (
        ["call", "times", *(f"{by} {name}" for by in ("C++", "Triton") for name in _PREDICTED), "auto", "measured"],
        ["---", *["---:"] * (1 + 2 * len(_PREDICTED)), "---", "---"],
    )
)
Rows = dict[tuple[str, str], list[Work]]  # by (call, kernel): the works of all such launches


class Calls(TorchDispatchMode):
    """Meanwhile every call of a cnnfast op, on meta tensors, is made on its Triton launcher, too.

    `rows` holds what these launch, `times` how often there was each call; `cuda` what it costs by the CUDA C++ kernels,
    and `preferred` whether backend="auto" takes them, of those calls that they take.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: Rows = collections.defaultdict(list)
        self.times: dict[str, int] = collections.defaultdict(int)
        self.cuda: dict[str, list[Work]] = {}
        self.preferred: dict[str, bool] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "cnnfast":
            self.launch(function._schema, args)
        return function(*args, **(kwargs or {}))

    def launch(self, schema: Any, args: tuple[Any, ...]) -> None:
        name = schema.name.removeprefix("cnnfast::")
        op = name.removesuffix("_backward")
        launcher = getattr(importlib.import_module(backends.triton_module(op)), name)
        arguments = schema.arguments[:-1]  # less backend
        # PyTorch's own convolutions lose the memory format of bfloat16 meta tensors; a GPU's keep it.
        args = tuple(
            value.contiguous(memory_format=torch.channels_last)
            if argument.name in IMAGES and value is not None
            else value
            for argument, value in zip(arguments, args, strict=False)
        )
        with recording("sm_90") as launches:
            launcher(*args)
        named = dict(zip((argument.name for argument in arguments), args, strict=False))
        call = described(name, named)
        self.times[call] += 1
        if name in cuda_costs.WORKS and cuda_kernels.refusal(op, named) is None:
            self.cuda[call] = cuda_costs.WORKS[name](named)
            self.preferred[call] = cuda_kernels.preferred(op, named)
        for launch in launches:
            self.rows[call, launch.name].append(work(launch))

    def triton_seconds(self, call: str) -> float:
        """Of one such call."""
        works = itertools.chain.from_iterable(row for (of, _), row in self.rows.items() if of == call)
        return sum(work.seconds for work in works) / self.times[call]

    def cuda_seconds(self, call: str) -> float:
        return sum(work.seconds for work in self.cuda[call])


def described(name: str, a: dict[str, Any]) -> str:
    """A call in a few words, the same in every dtype and for any batch."""
    weights = [value for key, value in a.items() if key.endswith("weight") and value is not None and value.dim() == 4]
    image = a["x" if "x" in a else "y"]
    channels = [str(image.shape[1]), *(str(weight.shape[0]) for weight in weights if weight.shape[1] > 1)]
    kernel = max(weight.shape[2] for weight in weights) if weights else 1
    words = [name, "-".join(channels), f"@{image.shape[2]}"]
    if kernel > 1:
        words.append(f"k{kernel}")
    if max(a.get("stride", (1,))) > 1:
        words.append(f"s{max(a['stride'])}")
    activations = [f"{value}" for key, value in a.items() if key.endswith("activation") and value]
    return " ".join(words) + (" act " + ",".join(activations) if activations else "")


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Blocks call the ops' plain forms: GPUs have no packed ones."""
    with mock.patch("cnnfast.nn.fusion._takes_packed", lambda op, device, backend: False), backends.meta_as("cuda"):
        yield


def calls_of(network: str, training: bool, batch: int, dtype: torch.dtype) -> Calls:
    """A forward pass of the network in eval mode, or with its backward pass in training mode."""
    from cnnfast import create_model

    with torch.device("meta"):
        model = create_model(network).to(dtype).train(training)
        x = torch.empty(batch, 3, NETWORKS[network], NETWORKS[network], dtype=dtype)
    x = x.to(memory_format=torch.channels_last)
    with Calls() as calls, as_on_a_gpu(), torch.set_grad_enabled(training):
        y = model(x)
        if training:
            y.sum().backward()
    return calls


def calls_of_response_norms(network: str, training: bool, batch: int, dtype: torch.dtype) -> Calls:
    with Calls() as calls:
        for channels, size in RESPONSE_NORMS[network]:
            x = torch.empty(batch, channels, size, size, dtype=dtype, device="meta")
            x = x.to(memory_format=torch.channels_last).requires_grad_(training)
            y = torch.ops.cnnfast.local_response_norm(x, 5, 1e-4, 0.75, 2.0)
            if training:
                y.sum().backward()
    return calls


Made = dict[tuple[torch.dtype, int], Calls]  # the calls of each dtype and batch


def sections() -> dict[str, Callable[[], Made]]:
    """By title."""

    def made(calls: Callable[..., Calls], network: str, training: bool) -> Callable[[], Made]:
        return lambda: {(dtype, batch): calls(network, training, batch, dtype) for dtype in DTYPES for batch in BATCHES}

    networks = {
        f"{network} at {size}, {what}": made(calls_of, network, what == "a training step")
        for network, size in NETWORKS.items()
        for what in ("inference", "a training step")
    }
    norms = {f"local_response_norm in {name}": made(calls_of_response_norms, name, True) for name in RESPONSE_NORMS}
    return networks | norms


def table(made: Made) -> list[str]:
    """Its rows, of one call each, and one of sums over all calls; a call's launches of one kernel are one row."""
    lines, totals = [], dict.fromkeys(COLUMNS, 0.0)
    for call, kernel in dict.fromkeys(key for calls in made.values() for key in calls.rows):
        times = max(calls.times[call] for calls in made.values())
        of_row = {
            name: sum(getattr(work, what) for work in made[dtype, batch].rows.get((call, kernel), [])) / unit / times
            for name, (dtype, batch, what, unit) in COLUMNS.items()
        }
        for name, value in of_row.items():
            totals[name] += value * times
        cells = [call, kernel.removesuffix("_kernel"), str(times), *(f"{value:.1f}" for value in of_row.values())]
        lines.append(f"| {' | '.join(cells)} | not yet |")
    return [*lines, f"| all | | | {' | '.join(f'{value:.0f}' for value in totals.values())} | not yet |"]


def text(titles: Sequence[str] | None = None) -> str:
    """The file; titles: only these of its sections."""
    lines = [
        f"""# Predictions

Made by `python -m cnnfast.bench.predictions` before any of these kernels ran on a GPU, from the launches that the
networks' ops make (channels_last, tiles as launched); the model is in bench/costs.py. H100 SXM: copy
{COPY / 1e12:.1f} TB/s (read and written; measured), matrix products in 16 bits {RATES["16 bits"] / 1e12:.0f} TFLOP/s
(measured in a large product; {MATMUL:.0%} of it are counted on), {LANES / 1e12:.1f} T thread instructions/s
({ISSUE:.0%}), {LAUNCH * 1e6:.0f} us a launch. float32 is multiplied as TF32, PyTorch's default for convolutions.

A row is what one call launches of a kernel (a gradient's second stages are rows of their own), and how often there is
such a call; the last row sums up all of them. MB and GFLOP are of batch {max(BATCHES)} in bfloat16, bytes with every
tensor once, FLOPs as the op is defined; floor is the longer of the two at their ceilings, for batch {max(BATCHES)}.
Times in microseconds; 0 where the call launches no such kernel in that dtype. PyTorch's own convolutions and other ops
are not in here.

"CUDA C++ beside Triton" holds the calls that csrc/cuda's kernels take, too, a row for all launches of a call, and whose
kernels backend="auto" takes until a measurement says otherwise (cnnfast/ops/cuda_kernels.py; the batch has no say, so
that an image's result doesn't depend on its neighbours). The model of theirs is in bench/cuda_costs.py. Where bytes
decide, both are as fast, and C++ is taken: its launch costs the processor less. depthwise_conv2d: C++, whose threads
load and widen each column once for all outputs that it reaches. pointwise_conv2d: Triton where products decide, since
wgmma multiplies faster than mma.sync ({cuda_costs.MMA:.0%} of it counted on). squeeze_excite: C++, a launch less.
inverted_residual: C++ where an image is cut into many blocks, whose halos cost less than a kernel a stage; with
squeeze-excite in 16 bits Triton, which activates nothing twice, but for 7 x 7, which clusters make in one pass.

'Measured' becomes date, commit, device, time and error, and is stale once the kernel has changed.
"""
    ]
    for title, make in sections().items():
        if titles is not None and title not in titles:
            continue
        lines.append(f"\n## {title}\n\n| call | kernel | times | {' | '.join(COLUMNS)} | measured |")
        lines.append("|---|---|" + "---:|" * (len(COLUMNS) + 1) + "---|")
        made = make()
        lines += table(made)
        if rows := beside_triton(made):
            lines.append(f"\n### CUDA C++ beside Triton\n\n{BESIDE}")
            lines += rows
    return "\n".join(lines) + "\n"


def beside_triton(made: Made) -> list[str]:
    """Rows of the calls that CUDA C++ kernels take: microseconds by them, by Triton, and whose are taken."""
    lines = []
    for call in dict.fromkeys(call for calls in made.values() for call in calls.cuda):
        cells = [str(max(calls.times[call] for calls in made.values()))]
        for seconds in (Calls.cuda_seconds, Calls.triton_seconds):
            for dtype, batch, _, unit in _PREDICTED.values():
                cells.append(f"{seconds(made[dtype, batch], call) / unit:.1f}")
        taken = {dtype: "C++" if calls.preferred[call] else "Triton" for (dtype, _), calls in made.items()}
        cells.append(" / ".join(dict.fromkeys(taken.values())))
        lines.append(f"| {call} | {' | '.join(cells)} | not yet |")
    return lines


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
