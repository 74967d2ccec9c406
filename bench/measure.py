"""One case in one process, and many cases in fresh processes."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from . import ceilings
from .peers import PEERS, Peer
from .timing import Call, interleave, peak_growth

OURS = "cnnfast"


@dataclass(frozen=True)
class Settings:
    """What holds for every case of a run."""

    threads: int
    dtype: torch.dtype = torch.float32
    batch: int = 1
    rounds: int = 15
    sample_seconds: float = 0.02
    gemm_size: int = 2048
    peers: tuple[str, ...] = tuple(PEERS)
    memory: bool = False  # growth of peak memory instead of times, each contender in a process of its own


@dataclass(frozen=True)
class Problem:
    """A case made ready: our call, and the plain layers that the peers run.

    `ours` is a function that does the one-off work and returns the call, as a peer is. `nbytes` is what must be
    moved at least: input, weights, output (and residual), once each. `peers`: the ways to run what isn't inference.
    `check`: what is wrong with a call's result, where that isn't the output of `plain`.
    """

    ours: Callable[[], Call]
    plain: torch.nn.Module
    x: torch.Tensor
    flops: int
    nbytes: int
    peers: Mapping[str, Peer] | None = None
    check: Callable[[Any], str | None] | None = None


class WrongResult(Exception):
    """What a contender makes ready computes something else: raised by what does the one-off work."""


class Case(Protocol):
    """A line of a benchmark; picklable, for it travels to another process."""

    group: str
    name: str

    def build(self, settings: Settings) -> Problem: ...


@dataclass
class Contender:
    """What one way to run a case gave: either a problem in a sentence, or seconds a call for each round, or the bytes
    by which a few calls let the process grow once everything was loaded."""

    problem: str | None = None
    seconds: list[float] = field(default_factory=list)
    peak_growth: int | None = None


@dataclass
class Measurement:
    """A case in one process."""

    group: str
    name: str
    flops: int = 0
    nbytes: int = 0
    gemm_rate: float = 0.0
    copy_rate: float = 0.0
    contenders: dict[str, Contender] = field(default_factory=dict)


@torch.no_grad()
def measure(case: Case, settings: Settings, peers: Mapping[str, Peer] = PEERS, only: str | None = None) -> Measurement:
    """Check every contender's output against the plain layers in float64, then time those that are right.

    `only`: of this contender alone, in a process that has run nothing else, the growth of peak memory, no times.
    """
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    problem = case.build(settings)
    plain, x = problem.plain, problem.x
    check = problem.check or partial(mismatch, expected=_in_float64(plain, x), dtype=settings.dtype)
    ways = problem.peers or peers
    prepare = {OURS: problem.ours} | {name: partial(ways[name], plain, x) for name in settings.peers if name in ways}

    result = Measurement(case.group, case.name, problem.flops, problem.nbytes)
    calls: dict[str, Call] = {}
    for name in prepare if only is None else [only]:
        result.contenders[name] = contender = Contender()
        try:
            call = prepare[name]() if only is None else _loaded_elsewhere(prepare[name], settings.threads)
            output, growth = peak_growth(partial(_several, call))
        except WrongResult as error:
            contender.problem = f"wrong output: {error}"
            continue
        except Exception as error:  # a peer that can't run is a line of the report, never the end of the run
            lines = str(error).strip().splitlines() or [""]
            contender.problem = f"cannot run: {type(error).__name__}: {lines[0]}"
            continue
        contender.problem = check(output)
        if name == OURS or only:  # the others would use again what the contenders before them gave back
            contender.peak_growth = growth
        if contender.problem is None:
            if only and growth is None:
                contender.problem = "growth of memory not measured: only Linux resets the peak of a process's memory"
            calls[name] = call
    if only:
        return result
    for name, seconds in interleave(calls, settings.rounds, settings.sample_seconds).items():
        result.contenders[name].seconds = seconds
    result.gemm_rate = ceilings.gemm_rate(settings.dtype, settings.threads, settings.gemm_size)
    result.copy_rate = ceilings.copy_rate(problem.nbytes, settings.threads)
    return result


def _several(call: Call) -> Any:
    """The last output of three calls: arenas may still grow in the second, and malloc keeps what the first freed."""
    for _ in range(2):
        call()
    return call()


def _loaded_elsewhere(prepare: Callable[[], Call], threads: int) -> Call:
    """What `prepare` returns, run in a thread that ends then: what loading left in buffers of threads goes with it, and
    counts as growth once calls need it again."""
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        of_the_system = pool.submit(threading.get_native_id).result()
        call = pool.submit(torch.no_grad()(prepare)).result()
    # Python joins it before it has freed its buffers, and OpenMP's threads free theirs after it.
    while Path(f"/proc/self/task/{of_the_system}").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    return call


def _in_float64(plain: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    dtype = x.dtype
    expected = plain.double()(x.double())
    plain.to(dtype)  # exact: every value came from dtype
    return expected


# To catch wrong results, not to judge rounding: the tests do that, far more narrowly.
ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
NETWORK = 5  # times that for logits: the worst of 1,000 of PyTorch's in bfloat16 is 0.21 off (mobilenet_v2)


def mismatch(output: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why `output` isn't the float64 result `expected` computed in `dtype`; None if it is.

    Each element's error is held against the RMS of its own channel (of logits: of its image), so that a wrong small
    channel among larger ones is seen.
    """
    if output.shape != expected.shape:
        return f"wrong output: shape {tuple(output.shape)} instead of {tuple(expected.shape)}"
    if output.dtype != dtype:
        return f"wrong output: {output.dtype} instead of {dtype}"
    squares = expected.square()
    channels = squares.mean((0, 2, 3) if expected.dim() == 4 else (1,), keepdim=True).sqrt()
    scale = expected.abs() + channels + 0.05 * squares.mean().sqrt()  # the last: a ReLU may leave almost nothing
    worst = ((output.double() - expected).abs() / scale.clamp_min(1e-30)).max().item()
    allowed = ALLOWED[dtype] * (NETWORK if expected.dim() == 2 else 1)
    if not worst <= allowed:  # also where it is NaN
        return f"wrong output: off by {worst:.1e} of its channel's size, allowed {allowed:.0e}"
    return None


def run_cases(cases: Sequence[Case], settings: Settings, processes: int, isolate: bool) -> Iterator[Measurement]:
    """Measure every case in each of `processes` processes, one after the other; memory (`settings.memory`) once, each
    contender in a fresh one.

    `isolate`: a fresh process for each case as well, for cases so large that one would change the next one's memory.
    """
    if settings.memory:
        for case in cases:
            found = [next(_in_processes([case], settings, True, name)) for name in (OURS, *settings.peers)]
            found[0].contenders = {name: c for one in found for name, c in one.contenders.items()}
            yield found[0]
        return
    for _ in range(processes):
        yield from _in_processes(cases, settings, isolate)


def _in_processes(
    cases: Sequence[Case], settings: Settings, isolate: bool, only: str | None = None
) -> Iterator[Measurement]:
    """What `measure` returns of each case. A process that dies (of memory that isn't there, of a peer's fault) is a
    problem of all contenders that it would have measured."""
    pool = _pool()
    try:
        for case in cases:
            try:
                yield pool.submit(measure, case, settings, only=only).result()
                fresh = isolate
            except BrokenProcessPool:
                names = (only,) if only else (OURS, *settings.peers)
                died = {name: Contender(problem="the process died") for name in names}
                yield Measurement(case.group, case.name, contenders=died)
                fresh = True
            if fresh:
                pool.shutdown()
                pool = _pool()
    finally:
        pool.shutdown()


def _pool() -> ProcessPoolExecutor:
    """Of one process, which Ctrl-C ends without a traceback."""
    quiet = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=quiet)
