"""docs/performance.md: what `cnnfast bench models` measured, cell by cell, and which cells are below their bar.

`python -m cnnfast.bench.performance bench/results/A.json bench/results/B.json`, from the repository's root. A cell that
several files have is that of the last measured one. Why cells fall short is for people to say: what is in
bench/results/shortfalls.md is taken over beneath their list.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .cells import DENSE, SEPARABLE, Cell, read
from .measure import OURS
from .peers import PEERS, TO_BEAT
from .report import geometric_mean
from .tables import LABELS, in_words

FILE = Path("docs/performance.md")
REASONS = Path("bench/results/shortfalls.md")
MEAN_BATCHES = (1, 8)  # those that the means over several batches take
LEAN = 1.1  # of the leanest peer's growth of memory


def text(files: Sequence[Path], reasons: str = "") -> str:
    documents, found = read(files)
    latest = {cell.key: cell for cell in sorted(found, key=lambda cell: cell.measured)}
    cells = list(latest.values())
    timed, grown = ([cell for cell in cells if cell.memory == memory] for memory in (False, True))
    sections = [_head(list(documents)), _runs(documents, found, cells), _below(timed, grown, reasons)]
    if timed:
        sections += [_means(timed), *_sections(timed), _scaling(timed)]
    if grown:
        sections.append(_memory(grown))
    return "\n".join(section for section in sections if section)


def _head(names: Sequence[str]) -> str:
    return f"""# Performance on a CPU

Made by `python -m cnnfast.bench.performance {" ".join(f"bench/results/{name}" for name in names)}`.

Whole networks, the same weights in all, each in a fresh process for each cell (network, batch, dtype, threads): outputs
are compared with the plain layers' in float64 first, then all contenders take turns, round by round. Ratios are how
many times faster cnnfast is: the median over rounds of the peer's time / ours in the same round, over all processes.
The ratio to the best is that to the fastest of {", ".join(LABELS[name] for name in TO_BEAT)}. Intervals hold 95 %
of 2,000 bootstrap draws, of processes and then of rounds in each; a mean's draws every row anew, and each draw takes
the peer that is fastest in it. The floor is the longer of FLOPs at the rate of a large product and bytes (input,
weights, output, once each) at the rate of a copy of that size, both measured in the same process. Times are
medians in ms.
"""


def _runs(documents: dict[str, dict[str, Any]], found: Sequence[Cell], kept: Sequence[Cell]) -> str:
    lines = ["## Runs", ""]
    for name, document in documents.items():
        environment = document["environment"]
        versions = ", ".join(f"{package} {version}" for package, version in environment["versions"].items() if version)
        count, used = (sum(cell.file == name for cell in cells) for cells in (found, kept))
        again = f", {count - used} of them measured again later" if used < count else ""
        restrictions = "".join(f", {key}={value}" for key, value in environment["restrictions"].items())
        rates = [run["ceilings"] for run in document["cells"] if run["ceilings"]["gemm_gflop_per_s"]]
        ceilings = "".join(
            f"; {what} at {min(rate[key] for rate in rates):.0f} to {max(rate[key] for rate in rates):.0f} {unit}"
            for what, key, unit in (
                ("products", "gemm_gflop_per_s", "GFLOP/s"),
                ("copies in memory", "dram_copy_gb_per_s", "GB/s"),
            )
            if rates
        )
        lines += [
            f"- `{name}`, {environment['date']}, commit {environment['commit']}: {count} cells{again}.",
            f"  {environment['cpu']}, {environment['cores']} cores, {environment['isa']['cnnfast']} (cnnfast),"
            f" {environment['isa']['torch']} (PyTorch's own){restrictions}{ceilings}.",
            f"  {versions}.",
            f"  `{document['command']}`",
        ]
    return "\n".join(lines) + "\n"


def _below(timed: Sequence[Cell], grown: Sequence[Cell], reasons: str) -> str:
    """Every cell below its bar; runs with a restricted instruction set are reported only."""
    held = [cell for cell in timed if not cell.restricted]
    lines = ["## Below the bar", ""]
    lines.append(
        "The bars: 0.9 of the best peer for dense networks in float32, 1.0 of Inductor for them in bfloat16, 1.0 of the"
        " best peer for all others; memory grows by no more than 1.1 times the leanest peer's."
    )
    rows = []
    for cell in held:
        against = cell.peer or cell.row.best_peer
        shown = [cell.row.name, str(cell.batch), cell.dtype, str(cell.threads)]
        if cell.held is None:
            why = cell.row.problems.get(OURS) or cell.row.problems.get(against or "", "no peer to compare with")
            rows.append([*shown, f"no ratio: {why}", f"{cell.bar}"])
        elif cell.held.value < cell.bar:
            rows.append([*shown, f"{in_words(cell.held)} x {LABELS[against or '']}", f"{cell.bar}"])
    for cell in (cell for cell in grown if not cell.restricted):
        lean, ours = cell.row.leanest_peer, cell.row.peak_growth_bytes.get(OURS)
        shown = [cell.row.name, str(cell.batch), cell.dtype, str(cell.threads)]
        if lean is None or ours is None:
            why = next(iter(cell.row.problems.values()), "not measured")
            rows.append([*shown, f"memory not compared: {why}", f"{LEAN}"])
        elif ours > LEAN * cell.row.peak_growth_bytes[lean]:
            ratio = ours / max(1, cell.row.peak_growth_bytes[lean])
            rows.append([*shown, f"memory {ratio:.2f} times {LABELS[lean]}'s", f"{LEAN}"])
    lines += ["", f"{len(rows)} of {len(held) + sum(not cell.restricted for cell in grown)} cells."]
    if rows:
        lines += ["", *_table(["network", "batch", "dtype", "threads", "cnnfast", "bar"], rows, left=1)]
    return "\n".join(lines) + "\n" + (f"\n{reasons.strip()}\n" if reasons.strip() else "")


def _means(timed: Sequence[Cell]) -> str:
    rows = []
    for isa, kind, threads in _distinct(timed, lambda c: (c.isa, c.kind, c.threads)):
        of = [c for c in timed if (c.isa, c.kind, c.threads) == (isa, kind, threads)]
        both = [c for c in of if c.batch in MEAN_BATCHES]
        parts = [[c for c in of if (c.dtype, c.batch) == part] for part in _distinct(of, lambda c: (c.dtype, c.batch))]
        for part in ([both] if len(_distinct(both, lambda c: (c.dtype, c.batch))) > 1 else []) + parts:
            dtypes, batches = _distinct(part, lambda c: c.dtype), _distinct(part, lambda c: c.batch)
            facts = [kind, isa, ", ".join(dtypes), str(threads), ", ".join(map(str, batches)), str(len(part))]
            means = [geometric_mean(c.row for c in part), *(geometric_mean((c.row for c in part), p) for p in TO_BEAT)]
            rows.append([*facts, *(in_words(mean) if mean else "-" for mean in means)])
    headings = ["networks", "ISA", "dtype", "threads", "batch", "cells", "the best", *(LABELS[p] for p in TO_BEAT)]
    intro = (
        f"Separable: {', '.join(SEPARABLE)}. Dense: {', '.join(DENSE)}. Geometric means of the ratios, over the cells"
        " that have one. Wanted: separable 1.25 of the best with the interval above 1.15; dense 1.0, in bfloat16 of"
        " Inductor."
    )
    return "\n".join(["## Means", "", intro, "", *_table(headings, rows, left=3)]) + "\n"


def _sections(timed: Sequence[Cell]) -> list[str]:
    sections = []
    for isa, dtype, threads in _distinct(timed, lambda c: (c.isa, c.dtype, c.threads)):
        of = [c for c in timed if (c.isa, c.dtype, c.threads) == (isa, dtype, threads)]
        peers = [name for name in PEERS if any(name in c.row.timings or name in c.row.problems for c in of)]
        rows = []
        for cell in of:
            row, ours = cell.row, cell.row.timings.get(OURS)
            times = [f"{row.timings[name].ms.p50:.4g}" if name in row.timings else "-" for name in (OURS, *peers)]
            floor = f"{ours.percent_of_floor:.0f}" if ours else "-"
            best = [in_words(row.ratio), LABELS[row.best_peer]] if row.ratio and row.best_peer else ["-", "-"]
            rows.append([row.name, str(cell.batch), *times, floor, *best])
        headings = [
            "network",
            "batch",
            OURS,
            *(LABELS[p] for p in peers),
            "% of floor",
            "ratio to the best",
            "the best",
        ]
        lines = [f"## {dtype}, {_threads(threads)}, {isa}", "", *_table(headings, rows, left=1)]
        sections.append("\n".join([*lines, *_problems(of, peers)]) + "\n")
    return sections


def _problems(cells: Sequence[Cell], peers: Sequence[str]) -> list[str]:
    """What has no figure and why, each sentence once."""
    said: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        there = cell.row.peak_growth_bytes if cell.memory else cell.row.timings
        for name in (OURS, *peers):
            if name not in there:
                problem = cell.row.problems.get(name, "not among the peers of that run")
                said.setdefault((name, problem), []).append(f"{cell.row.name} at batch {cell.batch}")
    return [
        f"\n{LABELS[name]}, {'all cells' if len(where) == len(cells) else ', '.join(where)}: {problem}."
        for (name, problem), where in said.items()
    ]


def _scaling(timed: Sequence[Cell]) -> str:
    """Times of different processes, and so without intervals."""
    ms = {cell.key: cell.row.timings[OURS].ms.p50 for cell in timed if OURS in cell.row.timings}
    rows = []
    for isa, dtype, threads, name in _distinct(timed, lambda c: (c.isa, c.dtype, c.threads, c.row.name)):
        small, large = (ms.get((isa, dtype, threads, batch, False, name)) for batch in (8, 32))
        if small and large:
            ratio = f"{large / 32 / (small / 8):.2f}"
            rows.append([name, dtype, isa, f"image at batch 32 / at batch 8, {_threads(threads)}", ratio])
    for isa, dtype, batch, name in _distinct(timed, lambda c: (c.isa, c.dtype, c.batch, c.row.name)):
        one, two = (ms.get((isa, dtype, threads, batch, False, name)) for threads in (1, 2))
        if one and two:
            rows.append([name, dtype, isa, f"1 thread / 2 threads, batch {batch}", f"{one / two:.2f}"])
    if not rows:
        return ""
    intro = "Of cnnfast's times in different processes, and so without intervals."
    table = _table(["network", "dtype", "ISA", "time of", "ratio"], rows, left=4)
    return "\n".join(["## Batches and threads", "", intro, "", *table]) + "\n"


def _memory(grown: Sequence[Cell]) -> str:
    peers = [name for name in PEERS if any(name in c.row.peak_growth_bytes or name in c.row.problems for c in grown)]
    rows = []
    for cell in grown:
        growth, lean = cell.row.peak_growth_bytes, cell.row.leanest_peer
        shown = [f"{growth[name] / 1e6:.1f}" if name in growth else "-" for name in (OURS, *peers)]
        known = OURS in growth and lean
        ratio = f"{growth[OURS] / max(1, growth[lean]):.2f} ({LABELS[lean]})" if known and lean else "-"
        rows.append([cell.row.name, str(cell.batch), cell.dtype, str(cell.threads), cell.isa, *shown, ratio])
    headings = ["network", "batch", "dtype", "threads", "ISA", OURS, *(LABELS[p] for p in peers), "to the leanest"]
    intro = (
        "MB by which a process that has one contender in it grows at most, in three calls, above what it had once that"
        " was loaded, packed and compiled; with what the C library's malloc keeps between them. The leanest is that of"
        " the peers that the ratios are to."
    )
    return "\n".join(["## Memory", "", intro, "", *_table(headings, rows, left=1), *_problems(grown, peers)]) + "\n"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> list[str]:
    """Lines of a table; the first `left` columns aligned to the left."""
    lines = [headings, ["---"] * left + ["---:"] * (len(headings) - left), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _distinct(cells: Iterable[Cell], key: Callable[[Cell], Any]) -> list[Any]:
    return list(dict.fromkeys(map(key, cells)))


def main() -> int:
    parser = argparse.ArgumentParser(description=f"writes {FILE}, from the repository's root")
    parser.add_argument("files", type=Path, nargs="+", metavar="RESULTS.json", help="in bench/results")
    files = parser.parse_args().files
    reasons = REASONS.read_text(encoding="utf-8") if REASONS.exists() else ""
    FILE.write_text(text(files, reasons), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
