"""Times configurations of the launches that happen, by triton.autotune, and keeps the best of each kernel and shape.

Only `cnnfast tune` imports it: nothing is tuned at import or at a first call.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton.testing import do_bench

from . import configurations, tuned
from .configurations import Configuration

MARGIN = 0.98  # of the default's time: one that isn't faster than that is as fast, and the default stays
MOST = dict(num_warps=16, num_stages=6)


@dataclass(frozen=True)
class Outcome:
    """Of a kernel and shape: the configuration that was kept, beside the default; times in milliseconds."""

    key: tuned.Key
    default: dict[str, int]
    best: dict[str, int]
    default_ms: float
    best_ms: float
    tried: int


@contextlib.contextmanager
def tuning(report: Callable[[Outcome], None]) -> Iterator[None]:
    """Meanwhile every launch of a kernel and shape that has no entry yet tunes it first, on its own arguments.

    Every entry is written at once, so that an interruption loses none.
    """
    configurations.tuner = functools.partial(tune, report)
    try:
        yield
    finally:
        configurations.tuner = None


def tune(
    report: Callable[[Outcome], None], kernel: Any, blocks: Configuration, grid: Callable, args: tuple,
    constants: dict[str, Any], vary: tuple[str, ...], restore: tuple[str, ...],
) -> bool:  # fmt: skip
    """Tunes a launch, as configurations.launch was told it, and launches; False if it needs no tuning."""
    if tuned.identity(blocks.device) is None or blocks.key in tuned.entries(blocks.device):
        return False
    configs = [as_config(values) for values in candidates(blocks, vary)]
    autotuner = triton.autotune(configs, key=[], restore_value=list(restore), do_bench=milliseconds)(kernel)
    autotuner[grid](*args, **constants)  # the best runs last: the default, and raises, where none could be timed
    default, best = configs[0], autotuner.best_config
    (default_ms, *_), (best_ms, *_) = (autotuner.configs_timings[config] for config in (default, best))
    if best_ms > MARGIN * default_ms:
        best, best_ms = default, default_ms
    kept = {name: best.all_kwargs()[name] for name in blocks}
    tuned.keep(blocks.device, {blocks.key: kept})
    report(Outcome(blocks.key, dict(blocks), kept, default_ms, best_ms, len(configs)))
    return True


def milliseconds(call: Callable, quantiles: tuple[float, ...]) -> list[float]:
    """Those quantiles of a launch's times, the second-level cache emptied before each."""
    try:
        return do_bench(call, quantiles=quantiles)
    except Exception:  # doesn't compile or fit: triton.autotune itself passes over some of such errors only
        return [float("inf")] * len(quantiles)


def candidates(default: dict[str, int], vary: tuple[str, ...]) -> list[dict[str, int]]:
    """`default`, then those one step away from it.

    A step: a side of the tile half or twice as long, or twice with twice the warps; half or twice the warps; a stage
    less or more.
    """
    steps = [{name: default[name] // 2} for name in (*vary, "num_warps")]
    steps += [{name: 2 * default[name]} for name in (*vary, "num_warps")]
    steps += [{name: 2 * default[name], "num_warps": 2 * default["num_warps"]} for name in vary]
    if "num_stages" in default:
        steps += [{"num_stages": default["num_stages"] + more} for more in (-1, 1)]
    fit = [step for step in steps if all(1 <= value <= MOST.get(name, value) for name, value in step.items())]
    return [dict(default), *({**default, **step} for step in fit)]


def as_config(values: dict[str, int]) -> triton.Config:
    blocks = {name: value for name, value in values.items() if name not in MOST}
    return triton.Config(blocks, num_warps=values["num_warps"], num_stages=values.get("num_stages"))
