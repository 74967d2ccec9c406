"""A report as tables for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cnnfast.summary.figures import Figures, Report
from cnnfast.summary.network import Block

_NUMBERS = ("output", "params", "MACs", "unfused", "fused", "FLOP/B", "floor")
_REST = 62  # columns of the terminal beside the names, at the widest
WIDE = 180


def print_report(report: Report, console: Console, wide: bool = False) -> None:
    """`wide`: with the plain layers, the names in full and what each block runs, for a console of WIDE columns."""
    for line in heading(report):
        console.print(line, markup=False, highlight=False)
    console.print()
    console.print(_wide_table(report) if wide else _table(report, max(80, console.width) - _REST))
    for line in _notes(report):
        console.print(line, markup=False, highlight=False)
    if report.summary.factorised:
        console.print()
        console.print(_factorised_table(report))
        console.print(
            "MACs: of one dense convolution's with the filter after 'for' and the first and last channels; formula: the"
            " same where all channels are as many (of separable ones, always).",
            highlight=False,
        )


def heading(report: Report) -> list[str]:
    summary, ceilings = report.summary, report.ceilings
    dtype = str(summary.dtype).removeprefix("torch.")
    return [
        f"{summary.name}, input {'×'.join(map(str, summary.shape))}, {dtype}",
        f"on {ceilings.machine}: {short(ceilings.flops, ' ')}FLOP/s in a large product,"
        f" {short(ceilings.dram, ' ')}B/s in a copy that no cache holds",
    ]


def _table(report: Report, width: int) -> Table:
    table = _empty_table()
    several = len(report.stages) < len(report.blocks)
    for stage, total in report.stages.items():
        rows = report.figures_of(stage)
        for row in rows:
            table.add_row(*_cells(row, _shortened(f" {row.name}" if several else row.name, width)))
        if several:
            table.add_row(*_cells(total, f"stage {_shortened(stage, width - 6)}")[:-1], style="bold")
            table.add_row()
    table.add_row(*_total_cells(report), style="bold")
    return table


def _wide_table(report: Report) -> Table:
    table = _empty_table()
    table.add_column("bound by")
    table.add_column("µs at least", justify="right")
    table.add_column("calls")
    for stage, total in report.stages.items():
        for row, block in zip(report.figures_of(stage), report.blocks_of(stage), strict=True):
            table.add_row(*_cells(row, row.name), row.bound, f"{row.floor * 1e6:.1f}", _calls(row), style="bold")
            for cells in _layer_rows(block):
                table.add_row(*cells)
        table.add_row(*_cells(total, f"stage {stage}"), total.bound, f"{total.floor * 1e6:.1f}", style="bold")
        table.add_row()
    table.add_row(*_total_cells(report), report.total.bound, f"{report.total.floor * 1e6:.1f}", style="bold")
    return table


def _empty_table() -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("layer", no_wrap=True)
    for name in _NUMBERS:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("backend", max_width=7)
    return table


def _cells(row: Figures, name: str) -> list[str | Text]:
    backends = [backend.removeprefix("cpu ") for backend in row.backends]
    return [
        Text(name),
        "×".join(map(str, row.shape[1:])),
        short(row.parameters),
        short(row.macs),
        short(row.unfused) + "B",
        short(row.fused) + "B",
        short(row.intensity),
        f"{100 * row.share:.1f}%",
        backends[0] if len(backends) == 1 else "mixed",
    ]


def _total_cells(report: Report) -> list[str | Text]:
    cells = _cells(report.total, "total")
    cells[2] = short(report.summary.parameters)
    return cells


def _layer_rows(block: Block) -> Iterable[list[str | Text]]:
    """The plain layers of a block that is more than one."""
    for layer in block.layers if len(block.layers) > 1 else ():
        name = Text(f"  {layer.path} {layer.kind}")
        shape = "×".join(map(str, layer.shape[1:]))
        yield [name, shape, short(layer.parameters), short(layer.macs), short(layer.bytes) + "B"]


def _calls(row: Figures) -> str:
    """By backend: what it runs, and how often."""
    texts = []
    for backend in row.backends:
        counts = Counter(op for op, whose in row.runs if whose == backend)
        texts.append(f"{backend}: " + ", ".join(op if n == 1 else f"{n} {op}" for op, n in counts.items()))
    return "; ".join(texts)


def _notes(report: Report) -> list[str]:
    fused, unfused = 1e3 * report.total.floor, 1e3 * report.total.unfused_floor
    of_their_size = " of their size" if report.ceilings.copy else ""
    lines = [
        "",
        "unfused, fused: bytes that the plain layers, and the calls of an eval forward, read and write. FLOP/B: two"
        f" FLOPs a MAC, a fused byte. floor: share of the {fused:.3g} ms that it takes at least, computing at the rate"
        f" of a product or moving the fused bytes at that of a copy{of_their_size}; the plain layers take"
        f" {unfused:.3g} ms. packed: cnnfast's kernels on weights laid out once; ATen: PyTorch's; mixed: some calls of"
        " each (--wide names them).",
    ]
    if report.summary.unread_parameters:
        lines.append(f"{report.summary.unread_parameters:,} parameters are of layers that an eval forward doesn't run.")
    return lines


def _factorised_table(report: Report) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("", justify="right")
    for name in ("convolutions", "channels", "output", "for"):
        table.add_column(name, no_wrap=True)
    table.add_column("MACs", justify="right")
    table.add_column("formula")
    rows = Counter(
        (
            one.kind,
            "→".join(map(str, (one.channels[0], one.channels[-1]) if one.kind[0] == "d" else one.channels)),
            "×".join(map(str, one.outputs)),
            "×".join(map(str, one.dense)),
            f"{one.ratio:.4f}",
            f"{one.formula} = {one.expected:.4f}",
        )
        for one in report.summary.factorised
    )
    for cells, count in rows.items():
        table.add_row(f"{count} of", *cells)
    return table


def _shortened(name: str, width: int) -> str:
    """Ends tell layers apart, not beginnings."""
    return name if len(name) <= width else f"…{name[1 - width :]}"


def short(number: float, space: str = "") -> str:
    """Three digits and k, M, G or T."""
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * factor:
            return f"{number / factor:.3g}{space}{suffix}"
    return f"{number:.3g}{space}"
