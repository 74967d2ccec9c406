"""Seconds of a call, ratios of two calls with their intervals, and the growth of peak memory."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

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


Compared = tuple[Samples, Sequence[Samples]]  # ours, and those of each peer in the same rounds


def speedup(ours: Samples, *peers: Samples) -> Ratio:
    """How many times faster than the fastest of `peers`: the median over rounds of the peer's time / our time in the
    same round."""
    return mean_speedup([(ours, peers)])


def mean_speedup(rows: Sequence[Compared], resamples: int = 2000) -> Ratio:
    """The geometric mean over `rows` of `speedup`, and its 95 % bootstrap interval.

    In each row processes are resampled, then the rounds within each, the medians taken over what was drawn: two
    processes differ by more than two rounds do (where memory came to lie, which threads share a core). A draw's fastest
    peer is that of the draw, so that the interval also tells how sure it is which one that is.
    """
    generator = np.random.default_rng(0)
    value, drawn = 0.0, np.zeros(resamples)
    for ours, peers in rows:
        ratios = np.array([peer for peer in peers]) / np.array(ours)  # [peers, processes, rounds]
        count, processes, rounds = ratios.shape
        of = generator.integers(processes, size=(resamples, processes, 1))
        at = generator.integers(rounds, size=(resamples, processes, rounds))
        medians = np.median(ratios[:, of, at].reshape(count, resamples, -1), axis=2)
        drawn += np.log(medians.min(axis=0)) / len(rows)
        value += np.log(np.median(ratios.reshape(count, -1), axis=1).min()) / len(rows)
    low, high = np.exp(np.quantile(drawn, (0.025, 0.975)))
    return Ratio(float(np.exp(value)), float(low), float(high))


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
