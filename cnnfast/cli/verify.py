"""`cnnfast verify`: a network against timm's, torchvision's or your own, the same weights in both."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

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
from cnnfast.ops.backends import BACKENDS

if TYPE_CHECKING:
    from cnnfast.verify import Report

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
EXAMPLES = """\
examples:
  cnnfast verify mobilenet_v2 --against torchvision --weights mobilenet_v2.pth
  cnnfast verify my_network --import my_module --against my_module:plain"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    summary = "compare a network with the one that it takes the place of, stage by stage"
    parser = subparsers.add_parser(
        "verify",
        help=summary,
        description=f"{summary}: the same weights in both, errors against float64 beside PyTorch's own in the same"
        " dtype. Exit status 1 if they disagree, 2 if nothing could be compared.",
        epilog=EXAMPLES,
        formatter_class=Help,
    )
    parser.add_argument("name", metavar="NAME", help="of `cnnfast list`")
    parser.add_argument(
        "--against",
        metavar="PEER",
        help="timm, torchvision, module:factory, or reference: its own layers in PyTorch (default: whose keys it has)",
    )
    parser.add_argument("--weights", metavar="FILE", help="a checkpoint (default: fresh weights, drawn statistics)")
    parser.add_argument("--source", metavar="S", help="whose keys it has, as load_weights's (default: find out)")
    parser.add_argument("--num-classes", type=positive_int, metavar="N", help="of the weights (default: the network's)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="(default: float32; of 16 bits PyTorch's own error hides what is less than about 1 %%)",
    )
    parser.add_argument(
        "--backend", choices=["auto", *BACKENDS], default="auto", help="of every fused op (default: auto)"
    )
    parser.add_argument(
        "--memory-format",
        choices=FORMATS,
        default="channels_last",
        help="of PyTorch's network (default: channels_last, as ours is inside; in contiguous, PyTorch's default, its"
        " float32 errors in wide convolutions are smaller)",
    )
    parser.add_argument("--size", type=positive_int, metavar="N", help="of the images (default: the network's)")
    parser.add_argument("--batch", type=positive_int, default=2, metavar="N", help="(default: 2)")
    parser.add_argument("--inputs", type=positive_int, default=8, metavar="N", help="batches (default: 8)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_import(parser)
    add_threads(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """1 if a stage disagrees."""
    from rich.console import Console

    import_modules(args.imports)
    if args.against in ("timm", "torchvision"):
        require(args.against, "test")
    from cnnfast.verify import verify

    device = parse_device(args.device)
    set_threads(args.threads)
    with users_network(args.name), Console(stderr=True, highlight=False).status("starting") as status:
        try:
            report = verify(
                args.name,
                args.against,
                args.weights,
                args.source,
                device=device,
                dtype=DTYPES[args.dtype],
                backend=args.backend,
                size=args.size,
                batch=args.batch,
                inputs=args.inputs,
                seed=args.seed,
                num_classes=args.num_classes,
                memory_format=FORMATS[args.memory_format],
                progress=status.update,
            )
        except (ValueError, TypeError, OSError, RuntimeError) as error:  # the last: what PyTorch's layers can't run
            raise UsageError(str(error).split("\n")[0]) from None
    if args.json:
        print(json.dumps(to_json(report), indent=2))
    else:
        print_report(report, Console(highlight=False))
    return 1 if report.first_fault else 0


def to_json(report: Report) -> dict:
    first = report.first_fault
    found = {"agree": first is None, "first_stage": first and first.name, "layers": report.layers}
    facts = {"name": report.name, "against": report.against, "weights": report.weights, **report.settings}
    return facts | found | {"stages": [dataclasses.asdict(stage) for stage in report.stages]}


def print_report(report: Report, console) -> None:
    from rich.table import Table
    from rich.text import Text

    settings = report.settings
    against, form = report.against.replace(":", " "), f"{settings['dtype']}, {settings['memory_format']}"
    title = (
        f"{report.name} against {against}: {form}, on {settings['device']},"
        f" backend {settings['backend']}, {settings['inputs']} inputs of {settings['batch']} images of"
        f" {settings['size']} x {settings['size']}, weights {report.weights}"
    )
    console.print(Text(title))
    table = Table("after", "shape")
    for heading in ("error", "PyTorch's", "of the bound"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for stage in report.stages:
        shape = " x ".join(map(str, stage.shape))
        own = f"{stage.theirs:.1e}" if settings["dtype"] != "float64" else "-"
        part = stage.bound_part
        times = f"{part:.0%}" if part < 10 else f"{part:.2g} times"
        verdict = "" if stage.agrees else "disagrees"
        table.add_row(Text(stage.name), shape, f"{stage.error:.1e}", own, times, verdict)
    console.print(table)
    first = report.first_fault
    if first is None:
        console.print(f"all {len(report.stages)} agree; errors: RMS in the worst channel, against float64")
        return
    console.print(Text(f"the two disagree, first after {first.name}"))
    if report.layers:
        agree, fault = report.layers
        console.print(Text(f"their layers agree up to {agree or 'the input'}, and no longer after {fault}"))
