"""Seconds of a call, ratios of two calls with their intervals, and the growth of peak memory."""

from __future__ import annotations

import ctypes
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")
Call = Callable[[], object]
Sampler = Callable[[Call, int], float]  # (call, how often in a row) -> seconds a call
Samples = Sequence[Sequence[float]]  # a list of rounds for each process


def sample(call: Call, count: int) -> float:
    """Seconds of one call, averaged over `count` in a row."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def calls_per_sample(call: Call, seconds: float, sample: Sampler = sample) -> int:
    """How many calls in a row take about `seconds`."""
    call()
    return max(1, round(seconds / max(sample(call, 2), 1e-7)))


def interleave(
    calls: Mapping[str, Call], rounds: int, seconds: float, sample: Sampler = sample
) -> dict[str, list[float]]:
    """Seconds a call, a number a round, of every contender.

    Each round times all of them for about `seconds` each (A B C, B C A, ...), so that a busy machine slows all alike
    and none always runs behind the same other one. `sample` is what times a call, on a GPU by its own clock.
    """
    counts = {name: calls_per_sample(call, seconds, sample) for name, call in calls.items()}
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds if names else 0):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(sample(calls[name], counts[name]))
    return samples


@dataclass(frozen=True)
class Quantiles:
    p20: float
    p50: float
    p80: float


def quantiles(samples: Samples) -> Quantiles:
    """Of all rounds of all processes."""
    values = sorted(value for rounds in samples for value in rounds)
    if len(values) == 1:
        return Quantiles(values[0], values[0], values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return Quantiles(cuts[1], statistics.median(values), cuts[7])


@dataclass(frozen=True)
class Ratio:
    """How many times faster, with its 95 % interval."""

    value: float
    low: float
    high: float


def speedup(ours: Samples, peer: Samples, resamples: int = 2000) -> Ratio:
    """The median over rounds of peer's time / our time in the same round, and its bootstrap interval.

    Processes are resampled, then the rounds within each: two processes differ by more than two rounds do (where memory
    came to lie, which threads share a core).
    """
    pairs = [[p / o for o, p in zip(*rounds, strict=True)] for rounds in zip(ours, peer, strict=True)]
    draw = random.Random(0)

    def resampled() -> float:
        processes = draw.choices(pairs, k=len(pairs))
        return statistics.median(ratio for rounds in processes for ratio in draw.choices(rounds, k=len(rounds)))

    medians = sorted(resampled() for _ in range(resamples))
    value = statistics.median(ratio for rounds in pairs for ratio in rounds)
    return Ratio(value, medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1])


def geometric_mean(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values)


def peak_growth(call: Callable[[], Result]) -> tuple[Result, int | None]:
    """What `call` returns, and by how many bytes the process's memory grew above what it was, at its highest.

    Linux only (None elsewhere, and where the kernel won't reset the peak). Memory that the allocator kept from earlier
    calls is given back first, so that it isn't reused unseen.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status("VmRSS")
    except (OSError, AttributeError):
        return call(), None
    result = call()
    return result, max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
