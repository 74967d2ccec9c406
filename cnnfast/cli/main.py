"""`cnnfast classify | evaluate | verify | ...`."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence

from cnnfast.cli import bench, classify, completion, evaluate, info, listing, summary, tune, verify
from cnnfast.cli.errors import UsageError

SUBCOMMANDS = {
    "classify": classify,
    "evaluate": evaluate,
    "list": listing,
    "summary": summary,
    "verify": verify,
    "info": info,
    "bench": bench,
    "tune": tune,
    "completion": completion,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cnnfast",
        description="Fused kernels for convolutional networks in PyTorch.",
        epilog="`cnnfast COMMAND --help` has an example; `cnnfast completion --help` says how a shell completes all.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in SUBCOMMANDS.items():
        module.add_parser(subparsers).set_defaults(run=module.run, prog=f"cnnfast {name}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 all done, 1 some inputs failed, 2 nothing could be done."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no "×" gets "?" for it
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except UsageError as error:
        print(f"{args.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
