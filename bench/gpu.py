"""`cnnfast bench gpu`: what a person with a GPU and ten minutes runs once for each part, and sends the files of.

tests   the suite of tests/gpu, a process a file;  ops  every op at the networks' shapes, forward and with gradients;
models  whole networks;  train  a step of training of whole networks (forward, backward, SGD). Each part writes
<part>.json into a folder, then merges what is there into gpu.json.
A part ends before its deadline: cases stand in the order of their worth, and those not reached are named.
A kernel of which a test is red gets no speed; one whose tests didn't run is marked.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cnnfast
from cnnfast._peers import checkpoint_source
from cnnfast.ops import can_run

from . import models as model_suite
from . import ops as op_suite
from . import report, train
from .device import Device
from .environment import environment
from .gpu_tests import BACKENDS, Deadline, find_sanitizer, run_tests, verdict
from .measure import ALLOWED, OURS, Contender, Measurement, Settings, WrongResult, mismatch
from .timing import Call, interleave

PARTS = ("tests", "ops", "models", "train")
PEERS = ("eager", "eager_channels_last", "inductor")
OP_RUNS = ((torch.bfloat16, 32), (torch.float32, 32), (torch.bfloat16, 256), (torch.float16, 32))  # (dtype, batch)
MODEL_RUNS = ((torch.bfloat16, 32), (torch.bfloat16, 1), (torch.float32, 32))
TRAIN_RUNS = ((torch.bfloat16, 32), (torch.float32, 32), (torch.float16, 32))
MODELS = tuple(map(model_suite.case, ("xception", "mobilenet_v2", "efficientnet_b0")))
TRAINED = tuple(train.select())


Way = Callable[[], list[torch.Tensor]]  # computes a result, and the gradients behind it

# ---- ops


@dataclass(frozen=True)
class Run:
    """An op's case on one backend, forward or with the gradients of everything."""

    case: Any
    backend: str
    gradients: bool

    @property
    def group(self) -> str:
        return f"{self.case.group} by {self.backend}" + (", with gradients" if self.gradients else "")


def op_runs(quick: bool = False) -> list[Run]:
    """Of every op that has kernels, what its first case gives first."""
    cases = [case for case in op_suite.select(quick=quick) if isinstance(case, op_suite.AnyCase)]
    runs = [
        Run(case, backend, gradients)
        for backend in BACKENDS
        for gradients in (False, True)
        for case in cases
        if not can_run(case.group, backend, torch.device("cuda"))
    ]
    place: dict[str, int] = {}
    order = [place.setdefault(run.group, 0) for run in runs]
    for i, run in enumerate(runs):
        order[i] = place[run.group]
        place[run.group] += 1
    return [run for _, run in sorted(zip(order, runs, strict=True), key=lambda pair: pair[0])]


def with_gradients(function: Callable, module: nn.Module, x: torch.Tensor) -> Way:
    """The result, then the gradients of x and of the module's parameters, as one call."""
    leaves = [x.detach().requires_grad_(), *(parameter.requires_grad_() for parameter in module.parameters())]
    with torch.enable_grad():
        grad = torch.randn(function(leaves[0]).shape, generator=torch.Generator().manual_seed(1)).to(x)

    def call() -> list[torch.Tensor]:
        with torch.enable_grad():
            y = function(leaves[0])
            return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y))]

    return call


def only_forward(function: Callable, module: nn.Module, x: torch.Tensor) -> Way:
    def call() -> list[torch.Tensor]:
        with torch.no_grad():
            return [function(x)]

    return call


def measure_op(run: Run, settings: Settings, device: Device) -> Measurement:
    """Ours against the plain layers run in each peer's way; outputs and gradients compared before anything is timed."""
    torch.manual_seed(0)
    problem = run.case.build(settings)
    plain, x = problem.plain.to(device.name), problem.x.to(device.name)
    way = with_gradients if run.gradients else only_forward

    def contender(name: str) -> Way:
        layout = torch.contiguous_format if name == "eager" else torch.channels_last
        module = copy.deepcopy(plain).to(memory_format=layout)
        function = run.case.op(module, run.backend if device.is_gpu else "auto") if name == OURS else module
        if name == "inductor":
            torch._dynamo.reset()
            function = torch.compile(module, fullgraph=True, dynamic=False)
        return way(function, module, x.contiguous(memory_format=layout))

    with torch.no_grad():
        double = copy.deepcopy(plain).double()
    expected = way(double, double, x.double())()
    # A gradient costs twice the products of the result, and moves the result's gradient, x and its gradient besides.
    work = 3 if run.gradients else 1
    result = Measurement(
        run.group, name_of(run.case.name, settings), problem.flops * work, problem.nbytes * (5 if work == 3 else 2) // 2
    )
    return timed(result, contender, partial(wrong, expected=expected, dtype=settings.dtype), settings, device)


def timed(
    result: Measurement, contender: Callable[[str], Way], check: Callable[[list[torch.Tensor]], str | None],
    settings: Settings, device: Device,
) -> Measurement:  # fmt: skip
    """Ours and the peers; check: what is wrong with what one computes."""
    calls: dict[str, Call] = {}
    for name in (OURS, *settings.peers):
        result.contenders[name] = entry = Contender()
        try:
            call = contender(name)
            entry.problem = check(call())
            if entry.problem is None:
                calls[name] = device.capture(call)
        except WrongResult as error:
            entry.problem = f"wrong output: {error}"
        except Exception as error:  # one that can't run is a line of the report, never the end of the run
            entry.problem = (
                f"cannot run: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
            )
    for name, seconds in interleave(calls, settings.rounds, settings.sample_seconds, device.sample).items():
        result.contenders[name].seconds = seconds
    result.gemm_rate, result.copy_rate = device.gemm_rate(settings.dtype), device.copy_rate()
    return result


def wrong(ours: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype) -> str | None:
    """Why a result, or a gradient behind it, isn't the float64 one computed in `dtype`."""
    if problem := mismatch(ours[0], expected[0], dtype):
        return problem
    for i, (gradient, want) in enumerate(zip(ours[1:], expected[1:], strict=True)):
        error = ((gradient.double() - want).norm() / want.norm().clamp_min(1e-30)).item()
        if not error <= ALLOWED[dtype]:  # also where it is NaN
            return f"wrong gradient {i}: off by {error:.1e} of its norm, allowed {ALLOWED[dtype]:.0e}"
    return None


def name_of(case: str, settings: Settings) -> str:
    return f"{case} {str(settings.dtype).removeprefix('torch.')} x{settings.batch}"


# ---- models


def measure_model(case: model_suite.ModelCase, settings: Settings, device: Device) -> Measurement:
    """The network's forward pass in eval mode; peers as a user has them, and all in a CUDA graph."""
    torch.manual_seed(0)
    with torch.no_grad():
        problem = case.build(settings)
    plain, x = problem.plain.to(device.name), problem.x.to(device.name)

    def contender(name: str) -> Way:
        layout = torch.contiguous_format if name == "eager" else torch.channels_last
        if name == OURS:
            network = cnnfast.create_model(case.name)
            cnnfast.load_weights(network, plain.state_dict(), checkpoint_source(case.name))
            network = network.to(device.name, x.dtype).eval()
        else:
            network = copy.deepcopy(plain).to(memory_format=layout)  # type: ignore[call-overload]
        if name == "inductor":
            torch._dynamo.reset()
            options: dict[str, Any] = {"freezing": True, "max_autotune": device.is_gpu}
            function = torch.compile(network, fullgraph=True, dynamic=False, options=options)
            return only_forward(function, plain, x.contiguous(memory_format=layout))
        return only_forward(network, plain, x.contiguous(memory_format=layout))

    with torch.no_grad():
        expected = [copy.deepcopy(plain).double()(x.double())]
    result = Measurement("model", name_of(case.name, settings), problem.flops, problem.nbytes)
    return timed(result, contender, partial(wrong, expected=expected, dtype=settings.dtype), settings, device)


# ---- training


def measure_training(case: train.TrainingCase, settings: Settings, device: Device) -> Measurement:
    """A step of training; 16 bits are autocast, and all in a CUDA graph. Peers train the plain network."""
    torch.manual_seed(0)
    with torch.no_grad():
        problem = dataclasses.replace(case, device=device.name).build(settings)
    assert problem.peers is not None and problem.check is not None
    ways: dict[str, Any] = {name: partial(peer, problem.plain, problem.x) for name, peer in problem.peers.items()}
    ways[OURS] = problem.ours
    check = problem.check

    def contender(name: str) -> Way:
        step = ways[name]()
        return lambda: [step()]

    result = Measurement(case.group, name_of(case.name, settings), problem.flops, problem.nbytes)
    return timed(result, contender, lambda losses: check(losses[0]), settings, device)


# ---- all


def measurements(part: str, device: Device, deadline: Deadline, left_out: list[str]) -> Iterator[Measurement]:
    """Of the cases of a part in the order of their worth; the names of those not reached end in `left_out`."""
    rehearsal = not device.is_gpu
    runs = {"ops": OP_RUNS, "models": MODEL_RUNS, "train": TRAIN_RUNS}[part]
    measure: Any = {"ops": measure_op, "models": measure_model, "train": measure_training}[part]
    cases: Sequence[Any] = {"ops": (), "models": MODELS, "train": TRAINED}[part][: 1 if rehearsal else None]
    if part == "ops":
        cases = op_runs(quick=rehearsal)
    peers = tuple(name for name in PEERS if part != "train" or name != "eager")
    slowest = 0.0
    for dtype, batch in runs[: 1 if rehearsal else None]:
        settings = Settings(torch.get_num_threads(), dtype, 1 if rehearsal else batch, 2 if rehearsal else 9, 0.01)
        settings = dataclasses.replace(settings, peers=peers)
        for case in cases:
            if deadline.left() < 1.5 * slowest:
                name = case.case.name if part == "ops" else case.name
                left_out.append(f"{case.group} {name_of(name, settings)}")
                continue
            start = time.monotonic()
            yield measure(case, settings, device)
            slowest = max(slowest, time.monotonic() - start)


def without_speed_where_red(measurement: Measurement, tests: dict[str, Any] | None) -> str:
    """The verdict on a measurement's kernels; a red one loses its times."""
    op, _, rest = measurement.group.partition(" by ")
    if not rest:
        return "not run"
    what = verdict(tests, op, rest.split(",")[0])
    if what == "red":
        measurement.contenders[OURS] = Contender(problem="a test of its kernels is red")
    return what


def run_part(
    part: str, out: Path, minutes: float, device: Device, tests_folder: Path | None = None
) -> tuple[dict[str, Any], list[report.Row]]:
    """Runs a part, writes its file and the merged one; returns what it wrote of the part, and the rows of a table."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = Deadline(60 * minutes)
    if device.is_gpu:
        torch.backends.cudnn.benchmark = True
    result: dict[str, Any] = {"part": part, "rehearsal": not device.is_gpu}
    result |= {"environment": environment(), "device": device.facts()}
    rows: list[report.Row] = []
    if part == "tests":
        if tests_folder is None:
            raise ValueError("tests_folder must be the folder of the GPU tests for part 'tests', got None")
        options, sanitizer = ((), find_sanitizer()) if device.is_gpu else (("--collect-only", "-qq"), None)
        result |= run_tests(tests_folder, out, deadline, options, sanitizer)
    else:
        tests = read(out / "tests.json")
        left_out: list[str] = []
        taken, verdicts = [], {}
        for measurement in measurements(part, device, deadline, left_out):
            verdicts[f"{measurement.group} {measurement.name}"] = without_speed_where_red(measurement, tests)
            taken.append(measurement)
        rows = report.make_rows(taken)
        result |= {"tests": verdicts, "left_out": left_out} | report.rows_to_json(rows)
        result |= {"ceilings": {"copy_gb_per_s": device.copy_rate() / 1e9}}
    report.write_json(result, out / f"{part}.json")
    merge(out)
    return result, rows


def merge(out: Path) -> None:
    """gpu.json of the parts that are in the folder."""
    report.write_json({part: found for part in PARTS if (found := read(out / f"{part}.json"))}, out / "gpu.json")


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None
