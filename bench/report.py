"""Measurements -> rows with ratios and intervals -> a table, a summary that says where cnnfast loses, JSON."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cnnfast import info
from cnnfast.files import whole_file

from .measure import OURS, Contender, Measurement, Settings
from .peers import TO_BEAT
from .timing import Quantiles, Ratio, geometric_mean, quantiles, speedup


@dataclass
class Timing:
    """One way to run a case, over all processes."""

    ms: Quantiles
    gflop_per_s: float
    gb_per_s: float
    percent_of_ceiling: float
    peak_growth_bytes: int | None
    samples_ms: list[list[float]]  # a list of rounds for each process


@dataclass
class Row:
    """A case over all processes. A contender is in `timings` or, if its output was wrong or it could not run, in
    `problems`; `ratios` are how many times faster cnnfast is than that peer."""

    group: str
    name: str
    flops: int
    nbytes: int
    floor_ms: float
    timings: dict[str, Timing] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)

    @property
    def best_peer(self) -> str | None:
        """The fastest of the peers that are to be beaten."""
        there = [name for name in TO_BEAT if name in self.ratios]
        return min(there, key=lambda name: self.ratios[name].value, default=None)

    @property
    def ratio(self) -> Ratio | None:
        return self.ratios[self.best_peer] if self.best_peer else None


def make_row(measurements: Sequence[Measurement]) -> Row:
    """The row of one case from its measurement in each process; a problem in any of them counts."""
    complete = [m for m in measurements if m.flops]
    first = complete[0] if complete else measurements[0]
    floor = 0.0
    if complete:
        gemm = statistics.median(m.gemm_rate for m in complete)
        copy = statistics.median(m.copy_rate for m in complete)
        floor = max(first.flops / gemm, first.nbytes / copy)
    row = Row(first.group, first.name, first.flops, first.nbytes, floor * 1e3)
    for name in dict.fromkeys(name for m in measurements for name in m.contenders):
        runs = [m.contenders[name] for m in measurements if name in m.contenders]
        problem = next((run.problem for run in runs if run.problem), None)
        if problem or len(runs) < len(measurements):
            row.problems[name] = problem or "not run in every process"
        else:
            row.timings[name] = _timing(runs, row)
    if OURS in row.timings:
        ours = row.timings[OURS].samples_ms
        row.ratios = {name: speedup(ours, t.samples_ms) for name, t in row.timings.items() if name != OURS}
    return row


def _timing(runs: list[Contender], row: Row) -> Timing:
    samples = [[seconds * 1e3 for seconds in run.seconds] for run in runs]
    ms = quantiles(samples)
    growth = [run.peak_growth for run in runs if run.peak_growth is not None]
    return Timing(
        ms,
        row.flops / ms.p50 / 1e6,
        row.nbytes / ms.p50 / 1e6,
        100 * row.floor_ms / ms.p50,
        max(growth, default=None),
        samples,
    )


def make_rows(measurements: Iterable[Measurement]) -> list[Row]:
    """Rows in the order in which the cases were first measured."""
    by_case: dict[tuple[str, str], list[Measurement]] = {}
    for measurement in measurements:
        by_case.setdefault((measurement.group, measurement.name), []).append(measurement)
    return [make_row(group) for group in by_case.values()]


def geometric_means(rows: Sequence[Row]) -> dict[str, float]:
    """Ratio to the fastest of the peers to be beaten, by group; rows without a ratio are left out."""
    by_group: dict[str, list[float]] = {}
    for row in rows:
        if row.ratio:
            by_group.setdefault(row.group, []).append(row.ratio.value)
    return {group: geometric_mean(ratios) for group, ratios in by_group.items()}


def losses(rows: Sequence[Row]) -> list[Row]:
    """Rows in which a peer is faster, the worst first."""
    lost = [(row.ratio.value, i) for i, row in enumerate(rows) if row.ratio and row.ratio.value < 1]
    return [rows[i] for _, i in sorted(lost)]


# ---- text


def print_report(rows: Sequence[Row], peers: Sequence[str], title: str, console: Console) -> None:
    if not console.is_terminal and console.width < 165:
        console = Console(file=console.file, width=165)  # a log has no width that a table must fit
    console.print(_table(rows, peers, title))
    for row in rows:
        for name, problem in row.problems.items():
            text = textwrap.shorten(f"{row.group} {row.name}: {name}: {problem}", 300)
            console.print(text, style="red", markup=False, highlight=False)
    to_beat = [name for name in TO_BEAT if name in peers]
    better = f"the fastest of {', '.join(to_beat)}" if len(to_beat) > 1 else "".join(to_beat)
    for group, mean in geometric_means(rows).items():
        console.print(f"{group}: {mean:.2f}x {better} (geometric mean)", highlight=False)
    lost = losses(rows)
    compared = sum(row.ratio is not None for row in rows)
    console.print(f"cnnfast loses in {len(lost)} of {compared} rows compared{':' if lost else '.'}", highlight=False)
    for row in lost:
        text = f"  {row.group} {row.name}: {_ratio(row, str(row.best_peer))} {row.best_peer}"
        console.print(text, markup=False, highlight=False)


def title_of(settings: Settings) -> str:
    dtype = str(settings.dtype).removeprefix("torch.")
    return f"batch {settings.batch}, {dtype}, {settings.threads} threads; ratios: cnnfast's speed to the peer's"


def _table(rows: Sequence[Row], peers: Sequence[str], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for heading in ("ms p50", "p20-p80", "GFLOP/s", "GB/s", "% ceiling", "peak MB"):
        table.add_column(heading, justify="right")
    for name in peers:
        table.add_column(f"vs {name.replace('_', ' ')}", justify="right")
    group = None
    for row in rows:
        if row.group != group:
            group = row.group
            table.add_section()
            table.add_row(group, style="bold")
        timing = row.timings.get(OURS)
        cells = _cells(timing) if timing else ["see below", *[""] * 5]
        table.add_row(row.name, *cells, *(_ratio(row, name) for name in peers))
    return table


def _cells(timing: Timing) -> list[str]:
    ms, growth = timing.ms, timing.peak_growth_bytes
    return [
        f"{ms.p50:.3f}",
        f"{ms.p20:.3f}-{ms.p80:.3f}",
        f"{timing.gflop_per_s:.1f}",
        f"{timing.gb_per_s:.1f}",
        f"{timing.percent_of_ceiling:.0f}",
        "-" if growth is None else f"{growth / 1e6:.1f}",
    ]


def _ratio(row: Row, name: str) -> str:
    if name not in row.ratios:
        return "-"
    ratio = row.ratios[name]
    return f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


# ---- JSON


def to_json(rows: Sequence[Row], measurements: Sequence[Measurement], settings: Settings, dram_rate: float) -> dict:
    """Everything that the table says and what it was made from."""
    rates = [m.gemm_rate for m in measurements if m.gemm_rate]
    ceilings = {
        "gemm_gflop_per_s": statistics.median(rates) / 1e9 if rates else None,
        "dram_copy_gb_per_s": dram_rate / 1e9,
    }
    return {
        "environment": environment(),
        "settings": asdict(settings) | {"dtype": str(settings.dtype).removeprefix("torch.")},
        "ceilings": ceilings,
        "geometric_means": geometric_means(rows),
        "rows": [asdict(row) | {"best_peer": row.best_peer} for row in rows],
        "losses": [f"{row.group} {row.name}" for row in losses(rows)],
    }


def environment() -> dict[str, object]:
    """Versions, machine, commit, date."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("cnnfast", "triton", "timm"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    machine = info.machine_facts()
    return {
        "versions": versions,
        "cpu": _cpu_info("model name") or platform.processor(),
        "cpu_mhz": _cpu_info("cpu MHz"),
        "isa": {"cnnfast": machine["isa_in_use"], "torch": torch.backends.cpu.get_cpu_capability()},
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_info(field: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), None)


def _commit() -> str | None:
    """Of the source tree that cnnfast was installed from, '-dirty' where it has changes; None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def default_path(what: str) -> Path | None:
    """bench/results/<what>-<date>-<commit>.json of the source tree; None for an installed wheel, which has none."""
    results = Path(__file__).parent / "results"
    if not results.is_dir():
        return None
    return results / f"{what}-{datetime.now(timezone.utc):%Y%m%d-%H%M}-{_commit() or 'unknown'}.json"


def write_json(report: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(json.dumps(report, indent=1) + "\n")
