"""A report as a picture: the machine's roofline with the layers on it, and the stages side by side."""

from __future__ import annotations

import os
from typing import Any

import matplotlib
from matplotlib import ticker
from matplotlib.figure import Figure

from cnnfast.summary.figures import Figures, Report

_UNFUSED, _FUSED = "#b8b8b8", "#1f77b4"
_NAMED = 12  # stages in the legend
_SHARES = {"MACs": "#ff7f0e", "parameters": "#2ca02c", "floor": "#9467bd"}


def plot(report: Report, path: str | os.PathLike[str]) -> None:
    """Writes the picture to `path`, in the format that its suffix names."""
    stages = list(report.stages.values())
    height = 6.5 + max(3.5, 0.45 * len(stages) + 1)
    figure = Figure(figsize=(12, height), dpi=120, layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[6, height - 6])
    top, below = halves
    _roofline(top.subplots(), report)
    left, right = below.subplots(1, 2, sharey=True)
    _bytes(left, stages)
    _shares(right, stages, report)
    figure.suptitle(_title(report), fontsize=13)
    figure.savefig(path)


def _title(report: Report) -> str:
    summary = report.summary
    dtype = str(summary.dtype).removeprefix("torch.")
    return f"{summary.name}, input {'×'.join(map(str, summary.shape))}, {dtype}\n{report.ceilings.machine}"


def _roofline(axes: Any, report: Report) -> None:
    """Each block at its intensity, on what its bytes and FLOPs allow; from the plain layers' bytes to the calls'."""
    ceilings = report.ceilings
    rows = [row for row in report.blocks if row.macs and row.fused and row.unfused]
    intensities = [row.unfused_intensity for row in rows] + [row.intensity for row in rows]
    low, high = min(intensities) / 2, max(*intensities, 2 * ceilings.flops / ceilings.dram) * 2
    best = max([ceilings.dram, *(row.fused / row.floor for row in rows if row.bound == "memory")])
    lines = [(ceilings.dram, "-", "memory")]
    if best > 1.01 * ceilings.dram:
        lines.append((best, ":", "the fastest cache"))
    limits: list[Any] = []
    for rate, style, label in lines:
        ridge = ceilings.flops / rate
        x, y = [low, max(low, ridge), high], [min(low * rate, ceilings.flops), ceilings.flops, ceilings.flops]
        y = [value / 1e9 for value in y]
        limits += axes.plot(x, y, style, color="black", lw=1.4, label=f"{label}, {rate / 1e9:.3g} GB/s")
    roof = f"{ceilings.flops / 1e9:.3g} GFLOP/s in a large product"
    axes.text(low, 1.12 * ceilings.flops / 1e9, f" {roof}", ha="left", va="bottom", fontsize=10)
    colors = matplotlib.colormaps["viridis"]
    largest = max(row.macs for row in rows)
    named: list[Any] = []
    stages = [stage for stage in report.stages if any(row.macs for row in report.figures_of(stage))]
    for n, stage in enumerate(stages):
        color = colors(0.92 * n / max(1, len(stages) - 1))
        shown = [row for row in report.figures_of(stage) if row in rows]
        for row in shown:
            ends = (
                (row.unfused_intensity, row.intensity),
                (_attained(row, row.unfused_floor), _attained(row, row.floor)),
            )
            axes.plot(*ends, color=color, lw=0.8, alpha=0.5)
            axes.scatter(ends[0][0], ends[1][0], s=26, facecolors="none", edgecolors=[color])
        sizes = [25 + 175 * row.macs / largest for row in shown]
        at = [row.intensity for row in shown], [_attained(row, row.floor) for row in shown]
        points = axes.scatter(*at, s=sizes, color=[color], alpha=0.85, edgecolors="black", linewidths=0.4)
        points.set_label(stage)
        named.append(points)
    for colour, label in (("0.5", "fused calls: the larger, the more MACs"), ("none", "their plain layers, unfused")):
        limits.append(axes.scatter([], [], s=40, facecolors=colour, edgecolors="black", label=label))
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_ylim(top=2.2 * ceilings.flops / 1e9)
    axes.set_xlabel("FLOP / byte", fontsize=11)
    axes.set_ylabel("GFLOP/s at most", fontsize=11)
    axes.grid(True, which="both", alpha=0.2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.add_artist(axes.legend(handles=limits, fontsize=9, loc="lower right"))  # where no circle can be
    shown = [named[round(n * (len(named) - 1) / (_NAMED - 1))] for n in range(_NAMED)] if len(named) > _NAMED else named
    title = "stage up to" if shown is named else f"stage up to, {_NAMED} of {len(named)}"
    axes.legend(handles=shown, fontsize=9, loc="upper left", bbox_to_anchor=(1.005, 1), title=title)


def _attained(row: Figures, seconds: float) -> float:
    """GFLOP/s."""
    return 2e-9 * row.macs / seconds


def _bytes(axes: Any, stages: list[Figures]) -> None:
    for shift, color, label, values in (
        (-0.2, _UNFUSED, "unfused: each plain layer", [row.unfused for row in stages]),
        (0.2, _FUSED, "fused: each call", [row.fused for row in stages]),
    ):
        axes.barh([n + shift for n in range(len(stages))], [v / 1e6 for v in values], 0.38, color=color, label=label)
    axes.set_yticks(range(len(stages)), [row.name for row in stages], fontsize=10)
    axes.invert_yaxis()
    axes.set_xlabel("MB read and written", fontsize=11)
    axes.set_ylabel("stage up to", fontsize=11)
    axes.legend(fontsize=9)
    axes.grid(True, axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _shares(axes: Any, stages: list[Figures], report: Report) -> None:
    total = report.total
    parts = {
        "MACs": [row.macs / max(1, total.macs) for row in stages],
        "parameters": [row.parameters / max(1, total.parameters) for row in stages],
        "floor": [row.share for row in stages],
    }
    for n, (label, values) in enumerate(parts.items()):
        at = [i + 0.27 * (n - 1) for i in range(len(stages))]
        axes.barh(at, values, 0.25, color=_SHARES[label], label=label)
    axes.xaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))
    axes.set_xlabel(f"share of the network's; its floor is {1e3 * total.floor:.3g} ms", fontsize=11)
    axes.legend(fontsize=9)
    axes.grid(True, axis="x", alpha=0.3)
    axes.set_axisbelow(True)
