"""Measurements -> rows with ratios and intervals -> JSON, and back."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cnnfast.files import whole_file

from .environment import commit
from .measure import OURS, Contender, Measurement, Settings
from .peers import TO_BEAT
from .timing import Quantiles, Ratio, mean_speedup, quantiles, speedup


@dataclass
class Timing:
    """One way to run a case, over all processes."""

    ms: Quantiles
    gflop_per_s: float
    gb_per_s: float
    percent_of_floor: float
    samples_ms: list[list[float]]  # a list of rounds for each process


@dataclass
class Row:
    """A case over all processes. A contender is in `timings` (of a run for memory: in `peak_growth_bytes`) or, if its
    output was wrong or it could not run, in `problems`; `ratios` are how many times faster cnnfast is than that peer,
    `ratio` than the fastest of those that are to be beaten."""

    group: str
    name: str
    flops: int
    nbytes: int
    floor_ms: float
    timings: dict[str, Timing] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    ratio: Ratio | None = None
    peak_growth_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def to_beat(self) -> list[str]:
        """The peers to be beaten that there is a ratio to."""
        return [name for name in TO_BEAT if name in self.ratios]

    @property
    def best_peer(self) -> str | None:
        """The fastest of the peers that are to be beaten."""
        return min(self.to_beat, key=lambda name: self.ratios[name].value, default=None)

    @property
    def leanest_peer(self) -> str | None:
        """The one of the peers to be beaten whose memory grows least."""
        there = [name for name in TO_BEAT if name in self.peak_growth_bytes]
        return min(there, key=lambda name: self.peak_growth_bytes[name], default=None)

    def samples(self, name: str) -> list[list[float]]:
        return self.timings[name].samples_ms


def make_row(measurements: Sequence[Measurement]) -> Row:
    """The row of one case from its measurement in each process; a problem in any of them counts."""
    complete = [m for m in measurements if m.flops]
    first = complete[0] if complete else measurements[0]
    floor = 0.0
    if rated := [m for m in complete if m.gemm_rate]:
        gemm = statistics.median(m.gemm_rate for m in rated)
        copy = statistics.median(m.copy_rate for m in rated)
        floor = max(first.flops / gemm, first.nbytes / copy)
    row = Row(first.group, first.name, first.flops, first.nbytes, floor * 1e3)
    for name in dict.fromkeys(name for m in measurements for name in m.contenders):
        runs = [m.contenders[name] for m in measurements if name in m.contenders]
        growth = [run.peak_growth for run in runs if run.peak_growth is not None]
        problem = next((run.problem for run in runs if run.problem), None)
        if problem or len(runs) < len(measurements):
            row.problems[name] = problem or "not run in every process"
            continue
        if growth:
            row.peak_growth_bytes[name] = max(growth)
        if any(run.seconds for run in runs):
            row.timings[name] = _timing(runs, row)
    if OURS in row.timings:
        ours = row.samples(OURS)
        row.ratios = {name: speedup(ours, t.samples_ms) for name, t in row.timings.items() if name != OURS}
        row.ratio = speedup(ours, *map(row.samples, row.to_beat)) if row.to_beat else None
    return row


def _timing(runs: list[Contender], row: Row) -> Timing:
    samples = [[float(f"{seconds * 1e3:.6g}") for seconds in run.seconds] for run in runs]
    ms = quantiles(samples)
    rates = row.flops / ms.p50 / 1e6, row.nbytes / ms.p50 / 1e6
    return Timing(ms, *rates, 100 * row.floor_ms / ms.p50, samples)


def make_rows(measurements: Iterable[Measurement]) -> list[Row]:
    """Rows in the order in which the cases were first measured."""
    by_case: dict[tuple[str, str], list[Measurement]] = {}
    for measurement in measurements:
        by_case.setdefault((measurement.group, measurement.name), []).append(measurement)
    return [make_row(group) for group in by_case.values()]


def geometric_mean(rows: Iterable[Row], peer: str | None = None) -> Ratio | None:
    """Of the ratios to the fastest of the peers to be beaten, or to `peer`; rows without one are left out. None: of no
    row."""
    compared = []
    for row in rows:
        names = row.to_beat if peer is None else [name for name in row.ratios if name == peer]
        if names:
            compared.append((row.samples(OURS), [row.samples(name) for name in names]))
    return mean_speedup(compared) if compared else None


def geometric_means(rows: Sequence[Row]) -> dict[str, Ratio]:
    """Ratio to the fastest of the peers to be beaten, by group."""
    by_group: dict[str, list[Row]] = {}
    for row in rows:
        by_group.setdefault(row.group, []).append(row)
    return {group: mean for group, found in by_group.items() if (mean := geometric_mean(found))}


def losses(rows: Sequence[Row]) -> list[Row]:
    """Rows in which a peer is faster, the worst first."""
    lost = [(row.ratio.value, i) for i, row in enumerate(rows) if row.ratio and row.ratio.value < 1]
    return [rows[i] for _, i in sorted(lost)]


# ---- JSON


def rows_to_json(rows: Sequence[Row]) -> dict[str, Any]:
    """The rows and what follows from them."""
    return {
        "geometric_means": {group: asdict(mean) for group, mean in geometric_means(rows).items()},
        "rows": [asdict(row) | {"best_peer": row.best_peer} for row in rows],
        "losses": [f"{row.group} {row.name}" for row in losses(rows)],
    }


def row_from_json(written: dict[str, Any]) -> Row:
    """A row of `rows_to_json`."""
    fields = {key: value for key, value in written.items() if key != "best_peer"}
    fields["timings"] = {
        name: Timing(**timing | {"ms": Quantiles(**timing["ms"])}) for name, timing in written["timings"].items()
    }
    fields["ratios"] = {name: Ratio(**ratio) for name, ratio in written["ratios"].items()}
    fields["ratio"] = written["ratio"] and Ratio(**written["ratio"])
    return Row(**fields)


def to_json(
    rows: Sequence[Row], measurements: Sequence[Measurement], settings: Settings, dram_rate: float
) -> dict[str, Any]:
    """Everything that the table of one run says and what it was made from."""
    rates = [m.gemm_rate for m in measurements if m.gemm_rate]
    ceilings = {
        "gemm_gflop_per_s": statistics.median(rates) / 1e9 if rates else None,
        "dram_copy_gb_per_s": dram_rate / 1e9,
    }
    return {
        "settings": asdict(settings) | {"dtype": str(settings.dtype).removeprefix("torch.")},
        "ceilings": ceilings,
        **rows_to_json(rows),
    }


def default_path(what: str) -> Path | None:
    """bench/results/<what>-<date>-<commit>.json of the source tree; None for an installed wheel, which has none."""
    results = Path(__file__).parent / "results"
    if not results.is_dir():
        return None
    return results / f"{what}-{datetime.now(timezone.utc):%Y%m%d-%H%M}-{commit() or 'unknown'}.json"


def write_json(report: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(json.dumps(report, indent=1) + "\n")
