"""`cnnfast info`: what was built, what this machine has, which backend each op takes."""

from __future__ import annotations

import argparse
import json

import cnnfast.info


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    summary = "what was built, what this machine has, which backend each op takes here and why not the others"
    parser = subparsers.add_parser("info", help=summary, description=summary, epilog="example: cnnfast info --json")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    print(json.dumps(cnnfast.info.collect(), indent=2) if args.json else cnnfast.info.render())
    return 0
