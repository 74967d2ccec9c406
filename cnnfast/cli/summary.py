"""`cnnfast summary`: what a network computes and moves, layer by layer, beside what this machine can do."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cnnfast.cli.errors import UsageError, require, users_network
from cnnfast.cli.options import (
    DTYPES,
    Help,
    add_import,
    add_threads,
    import_modules,
    parse_device,
    positive_int,
    set_threads,
)
from cnnfast.files import whole_file

if TYPE_CHECKING:
    from cnnfast.summary import Ceilings

EXAMPLES = """\
examples:
  cnnfast summary mobilenet_v2 --size 192 --csv mobilenet.csv --plot mobile.png
  cnnfast summary my_network --import my_module --wide"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    summary = "what a network computes and moves, layer by layer and stage by stage, beside this machine's ceilings"
    parser = subparsers.add_parser(
        "summary",
        help=summary,
        description=f"{summary}. MACs, shapes and bytes are found without running the network; measuring the machine "
        "(the rate of a large matrix product, and of copies) takes a few seconds.",
        epilog=EXAMPLES,
        formatter_class=Help,
    )
    parser.add_argument("network", metavar="NAME", help="a network of cnnfast.list_models()")
    parser.add_argument("--size", type=positive_int, metavar="N", help="height and width (default: the network's own)")
    parser.add_argument("--batch", type=positive_int, default=1, metavar="N", help="images (default: 1)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... that it is to run on (default: cpu)")
    parser.add_argument("--num-classes", type=positive_int, metavar="N", help="outputs (default: the network's own)")
    parser.add_argument("--wide", action="store_true", help="with every plain layer; wider than 80 columns")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the numbers as CSV, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a roofline with the layers, and the stages")
    add_import(parser)
    add_threads(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    import_modules(args.imports)
    if args.plot:
        require("matplotlib", "bench")
        if args.plot.suffix.lower() not in (".png", ".pdf", ".svg"):
            raise UsageError(f"--plot {args.plot}: want a name that ends in .png, .pdf or .svg")
    for path in filter(None, (args.csv, args.json, args.plot)):
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: no such directory")
        if path.is_dir():
            raise UsageError(f"{path}: is a directory")
    from rich.console import Console

    from cnnfast.summary import Report, summarize, to_csv, to_json
    from cnnfast.summary.tables import WIDE, print_report

    device = parse_device(args.device)
    options = {} if args.num_classes is None else {"num_classes": args.num_classes}
    try:
        with users_network(args.network):
            summary = summarize(args.network, args.size, args.batch, DTYPES[args.dtype], device.type, **options)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None
    if args.plot and not any(block.macs for block in summary.blocks):
        raise UsageError(f"--plot {args.plot}: {args.network} has no convolution or matrix product to draw")
    threads = set_threads(args.threads)
    progress = Console(stderr=True, highlight=False)
    with progress.status("measuring this machine's ceilings"):
        report = Report(summary, measured_ceilings(DTYPES[args.dtype], threads, device))
    console = Console(highlight=False)
    if args.wide and console.width < WIDE:
        console.width = WIDE
    print_report(report, console, args.wide)
    writers: list[tuple[Path | None, Callable[[Path], Any]]] = [
        (args.csv, lambda path: path.write_text(to_csv(report), encoding="utf-8")),
        (args.json, lambda path: path.write_text(to_json(report), encoding="utf-8")),
        (args.plot, lambda path: _plot(report, path)),
    ]
    for path, write in writers:
        if path is not None:
            write_whole(path, write)
            progress.print(f"written: {path}", markup=False, soft_wrap=True)
    return 0


def measured_ceilings(dtype: torch.dtype, threads: int, device: torch.device) -> Ceilings:
    """This CPU's or GPU's. In 16 bits the product that our CPU kernels may take is the faster one of that and
    float32's."""
    from cnnfast.bench import ceilings
    from cnnfast.bench.device import Device
    from cnnfast.bench.environment import environment
    from cnnfast.summary import Ceilings

    if device.type == "cuda":
        with torch.cuda.device(device):
            gpu = Device("cuda")
            return Ceilings(torch.cuda.get_device_name(device), gpu.gemm_rate(dtype), None, gpu.copy_rate())
    dtypes = {dtype} if dtype.itemsize > 2 else {dtype, torch.float32}
    flops = max(ceilings.gemm_rate(one, threads, 1024) for one in dtypes)
    cpu = str(environment()["cpu"])
    machine = f"{cpu}, {threads} thread{'s' if threads > 1 else ''}"
    return Ceilings(machine, flops, lambda nbytes: ceilings.copy_rate(nbytes, threads), ceilings.dram_rate(threads))


def _plot(report: Any, path: Path) -> None:
    from cnnfast.summary.plots import plot

    plot(report, path)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Has `write` fill a file that is `path` only once it is complete."""
    try:
        with whole_file(path) as partial:
            write(partial)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
