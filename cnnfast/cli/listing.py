"""`cnnfast list`: the networks, what they cost and whose checkpoints they load."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from cnnfast.cli.errors import UsageError, users_network
from cnnfast.cli.options import Help, add_import, import_modules
from cnnfast.models import list_models
from cnnfast.models.figures import figures
from cnnfast.models.registry import model_entry

EXAMPLES = "examples:\n  cnnfast list '*efficientnet*'\n  cnnfast list 'my_*' --import my_module"


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    summary = "the networks: parameters, multiply-adds, input, year, whose checkpoints they load"
    parser = subparsers.add_parser("list", help=summary, description=summary, epilog=EXAMPLES, formatter_class=Help)
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="names, with wildcards (default: *)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_import(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    import_modules(args.imports)
    names = list_models(args.pattern)
    if not names:
        raise UsageError(f"no network is called {args.pattern}; `cnnfast list` has all, '*{args.pattern}*' is a part")
    rows = [facts(name) for name in names]
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        print_table(rows)
    return 0


def facts(name: str) -> dict[str, Any]:
    """Of one network; `checkpoints` maps a source of load_weights to the network's name there, None if that isn't
    known."""
    entry = model_entry(name)
    with users_network(name):
        known = figures(name)
    return {
        "name": name,
        "parameters": known["parameters"],
        "macs": known["macs"],
        "input_size": list(entry.pretrained_cfg["input_size"]),
        "year": entry.year,
        "paper": entry.paper,
        "checkpoints": {source: entry.peers.get(source) for source in known["checkpoints"]},
    }


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("network", no_wrap=True)
    for heading in ("params", "MACs", "input", "year"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("checkpoints of")
    for row in rows:
        channels, height, width = row["input_size"]
        size = str(height) if height == width else f"{height} x {width}"
        size = size if channels == 3 else f"{channels} x {size}"  # digits are grey
        table.add_row(
            row["name"],
            short(row["parameters"]),
            short(row["macs"]),
            size,
            str(row["year"] or ""),
            ", ".join(row["checkpoints"]),
        )
    Console(highlight=False).print(table)


def short(number: int) -> str:
    """Three digits: 5290000 as 5.29M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * unit:
            value = number / unit
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{letter}"
    return str(number)
