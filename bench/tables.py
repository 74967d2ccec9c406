"""Rows as text, in 80 columns, and a summary that says where cnnfast loses."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .measure import OURS, Settings
from .peers import TO_BEAT
from .report import Row, geometric_means, losses
from .timing import Ratio

LABELS = {OURS: "cnnfast", "eager": "eager", "eager_channels_last": "channels_last", "inductor": "Inductor"}
LABELS |= {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_HEADINGS = {"eager": "eager", "eager_channels_last": "chan.\nlast", "inductor": "In-\nduct."}
_HEADINGS |= {"onnxruntime": "ONNX\nRunt.", "openvino": "Open\nVINO"}


def print_report(rows: Sequence[Row], peers: Sequence[str], title: str, console: Console) -> None:
    to_beat = [name for name in TO_BEAT if name in peers]
    better = f"the fastest of {', '.join(to_beat)}" if len(to_beat) > 1 else "".join(to_beat)
    console.print(title, style="bold", highlight=False)
    in_memory = any(row.peak_growth_bytes for row in rows) and not any(row.timings for row in rows)
    console.print(_memory(rows, peers) if in_memory else _times(rows, peers))
    for row in rows:
        for name, problem in row.problems.items():
            text = textwrap.shorten(f"{row.group} {row.name}: {name}: {problem}", 300)
            console.print(text, style="red", markup=False, highlight=False)
    if in_memory:
        return
    for group, mean in geometric_means(rows).items():
        console.print(f"{group}: {in_words(mean)} x {better} (geometric mean)", highlight=False)
    lost = losses(rows)
    compared = sum(row.ratio is not None for row in rows)
    console.print(f"cnnfast loses in {len(lost)} of {compared} rows compared{':' if lost else '.'}", highlight=False)
    for row in lost:
        assert row.ratio
        text = f"  {row.group} {row.name}: {in_words(row.ratio)} {row.best_peer}"
        console.print(text, markup=False, highlight=False)


def title_of(settings: Settings) -> str:
    dtype = str(settings.dtype).removeprefix("torch.")
    threads = f"{settings.threads} thread{'s' if settings.threads > 1 else ''}"
    told = "peak memory's growth in MB" if settings.memory else "peers: cnnfast's speed to theirs"
    return f"batch {settings.batch}, {dtype}, {threads}; {told}"


def in_words(ratio: Ratio) -> str:
    return f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


def _times(rows: Sequence[Row], peers: Sequence[str]) -> Table:
    table = _table("ms", "% of\nfloor", *(_HEADINGS[name] for name in peers), "best (95 %)")
    for row, name in _named(table, rows):
        timing = row.timings.get(OURS)
        ours = (f"{timing.ms.p50:.4g}", f"{timing.percent_of_floor:.0f}") if timing else ("-", "-")
        ratios = (f"{row.ratios[name].value:.2f}" if name in row.ratios else "-" for name in peers)
        table.add_row(name, *ours, *ratios, in_words(row.ratio) if row.ratio else "-")
    return table


def _memory(rows: Sequence[Row], peers: Sequence[str]) -> Table:
    table = _table("cnnfast", *(_HEADINGS[name] for name in peers), "to the\nleanest")
    for row, name in _named(table, rows):
        growth = row.peak_growth_bytes
        cells = (f"{growth[name] / 1e6:.1f}" if name in growth else "-" for name in (OURS, *peers))
        known = OURS in growth and row.leanest_peer
        table.add_row(name, *cells, f"{growth[OURS] / max(1, growth[row.leanest_peer]):.2f}" if known else "-")
    return table


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _named(table: Table, rows: Sequence[Row]):
    """Each row with its name, a line with the group's name before the first of each group."""
    group = None
    for row in rows:
        if row.group != group:
            group = row.group
            table.add_section()
            table.add_row(group, style="bold")
        yield row, row.name
