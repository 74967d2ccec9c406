"""`cnnfast bench`: cnnfast against eager PyTorch, torch.compile, ONNX Runtime and OpenVINO, on this machine."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from cnnfast.cli.errors import UsageError, require
from cnnfast.cli.options import DTYPES, comma_list, dtype_name, positive_int, set_threads
from cnnfast.models import list_models


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    summary = "time cnnfast against PyTorch, torch.compile, ONNX Runtime and OpenVINO, after comparing outputs"
    example = "example: cnnfast bench models --model mobilenet_v2 --quick"
    parser = subparsers.add_parser("bench", help=summary, description=summary, epilog=example)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="ops|models|train|gpu")
    example = "example: cnnfast bench ops --op separable_conv2d --quick"
    ops = kinds.add_parser("ops", help="each op at the real networks' shapes", epilog=example)
    ops.add_argument("--op", action="append", dest="names", metavar="NAME", help="only this op (repeatable)")
    example = "example: cnnfast bench models --model mobilenet_v2 --dtype bfloat16"
    models = kinds.add_parser("models", help="whole networks, each in a fresh process", epilog=example)
    models.add_argument("--model", action="append", dest="names", metavar="NAME", help="only this one (repeatable)")
    memory = "growth of peak memory after loading instead of times, each contender in a process of its own"
    models.add_argument("--memory", action="store_true", help=memory)
    png = "bars of each network's time per image in each cell, with its floor"
    models.add_argument("--png", type=Path, metavar="FILE", help=png)
    example = "example: cnnfast bench train --model mobilenet_v2 --dtype float32,bfloat16"
    summary = "training steps (forward, backward, SGD) of whole networks, each in a fresh process; bfloat16: autocast"
    train = kinds.add_parser("train", help=summary, description=summary, epilog=example)
    train.add_argument("--model", action="append", dest="names", metavar="NAME", help="only this one (repeatable)")
    train.add_argument("--memory", action="store_true", help=memory)
    for kind in (ops, models, train):
        batch, rounds = (16, 7) if kind is train else (1, 15)
        kind.set_defaults(usual_rounds=rounds)
        kind.add_argument("--quick", action="store_true", help="few cases and rounds, under a minute")
        dtypes = f"of {','.join(DTYPES)} (default: float32)"
        kind.add_argument("--dtype", type=comma_list(dtype_name), default=("float32",), metavar="A,B", help=dtypes)
        numbers = comma_list(positive_int)
        kind.add_argument("--batch", type=numbers, default=(batch,), metavar="N,M", help=f"(default: {batch})")
        kind.add_argument("--threads", type=numbers, metavar="N,M", help="CPU threads (default: PyTorch's)")
        engines = "eager_channels_last,inductor" if kind is train else "all that are installed"
        known = "eager,eager_channels_last,inductor" + ("" if kind is train else ",onnxruntime,openvino")
        peers = f"of {known} (default: {engines})"
        kind.add_argument("--peers", metavar="A,B", help=peers)
        kind.add_argument(
            "--rounds", type=positive_int, metavar="N", help=f"of interleaved samples (default: {rounds})"
        )
        kind.add_argument("--processes", type=positive_int, default=1, metavar="N", help="repeat in N (default: 1)")
        kind.add_argument("--json", type=Path, metavar="FILE", help="(default: a new file in bench/results/)")
    gpu = kinds.add_parser(
        "gpu",
        help="on a GPU: its tests, every op, whole networks, each part in under ten minutes",
        epilog="example: cnnfast bench gpu --part tests --out gpu-results",
    )
    gpu.add_argument(
        "--part", choices=("tests", "ops", "models", "train"), required=True, help="in this order, in four calls"
    )
    gpu.add_argument("--out", type=Path, required=True, metavar="DIR", help="for <part>.json, gpu.json and the logs")
    gpu.add_argument("--minutes", type=positive_int, default=8, metavar="N", help="(default: 8)")
    gpu.add_argument("--rehearse", action="store_true", help="on the CPU, a few small cases: nothing is measured")
    return parser


def run(args: argparse.Namespace) -> int:
    """1 if an output was wrong or a contender could not run."""
    if args.kind == "gpu":
        return _run_gpu(args)
    from cnnfast.bench import report, tables
    from cnnfast.bench.environment import environment

    png = args.png if args.kind == "models" else None
    if png:
        require("matplotlib", "bench")
        if args.memory:
            raise UsageError("--png draws times, which --memory doesn't take")
    cases, grid = _cases(args), _grid(args)
    path = args.json or (None if args.quick else report.default_path(args.kind))
    written: dict = {"environment": environment(), "command": _command(args, grid), "cells": []}
    progress, console = Console(stderr=True, highlight=False), Console()
    failed = interrupted = False
    for settings in grid:
        measurements, dram_rate, interrupted = _measured(args, cases, settings, progress)
        rows = report.make_rows(measurements)
        failed |= any(row.problems for row in rows)
        if rows:
            written["cells"].append(report.to_json(rows, measurements, settings, dram_rate))
        if path and rows:  # after each cell: what ends a run of hours leaves what it has
            report.write_json(written, path)
        tables.print_report(rows, settings.peers, tables.title_of(settings), console)
        if interrupted:
            break
    if path and written["cells"]:
        progress.print(f"written: {path}", soft_wrap=True)
    if png and written["cells"]:
        from cnnfast.bench.plot import plot

        plot(written, png)
        progress.print(f"written: {png}", soft_wrap=True)
    return 130 if interrupted else int(failed)


def _grid(args: argparse.Namespace) -> list[Any]:
    """The settings of each cell."""
    from cnnfast.bench import peers
    from cnnfast.bench.measure import Settings

    missing = {name for name in peers.ENGINES if not find_spec(name)}
    training = args.kind == "train"
    known = tuple(peers.PEERS)
    if training:
        known = tuple(name for name in known if name not in peers.ENGINES)
        if unknown := set(args.dtype) - {"float32", "bfloat16"}:
            raise UsageError(f"--dtype: no training in {', '.join(sorted(unknown))}; there are float32, bfloat16")
    usual = tuple(name for name in known if name not in missing and not (training and name == "eager"))
    names = tuple(args.peers.split(",")) if args.peers else usual
    if unknown := set(names) - set(known):
        raise UsageError(f"--peers: no peer {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for name in missing.intersection(names):
        require(name, "bench")
    rounds, memory = args.rounds or (5 if args.quick else args.usual_rounds), args.kind != "ops" and args.memory
    return [
        Settings(threads, DTYPES[dtype], batch, rounds, peers=names, memory=memory)
        for dtype, threads, batch in product(args.dtype, args.threads or (set_threads(None),), args.batch)
    ]


def _measured(
    args: argparse.Namespace, cases: Sequence[Any], settings: Any, progress: Console
) -> tuple[list[Any], float, bool]:
    """The measurements of a cell, bytes/s of a copy in memory, and whether Ctrl-C came between."""
    from cnnfast.bench import ceilings
    from cnnfast.bench.measure import run_cases

    set_threads(settings.threads)
    measurements: list[Any] = []
    total = len(cases) * (1 if settings.memory else args.processes)
    cell = f"batch {settings.batch}, {str(settings.dtype).removeprefix('torch.')}, threads {settings.threads}"
    with progress.status(f"{cell}: starting") as status:
        dram_rate = 0.0
        try:
            dram_rate = ceilings.dram_rate(settings.threads)
            for measurement in run_cases(cases, settings, args.processes, isolate=args.kind != "ops"):
                measurements.append(measurement)
                status.update(f"{cell}: {len(measurements)}/{total} {measurement.group} {measurement.name}")
        except KeyboardInterrupt:
            progress.print(f"interrupted: reporting {len(measurements)} of {total} measurements of {cell}")
            return measurements, dram_rate, True
    return measurements, dram_rate, False


def _command(args: argparse.Namespace, grid: Sequence[Any]) -> str:
    """What repeats the run, files left out."""
    first = grid[0]
    option = "--op" if args.kind == "ops" else "--model"
    parts = ["cnnfast bench", args.kind, *(f"{option} {name}" for name in args.names or ())]
    parts += ["--quick"] if args.quick else []
    parts += [f"--batch {','.join(map(str, args.batch))} --dtype {','.join(args.dtype)}"]
    threads = dict.fromkeys(settings.threads for settings in grid)
    parts += [f"--threads {','.join(map(str, threads))} --peers {','.join(first.peers)}"]
    parts += ["--memory"] if first.memory else [f"--rounds {first.rounds} --processes {args.processes}"]
    return " ".join(parts)


def _run_gpu(args: argparse.Namespace) -> int:
    """1 if a test is red, an output was wrong or cnnfast could not run."""
    import torch

    from cnnfast.bench import gpu, tables
    from cnnfast.bench.device import Device
    from cnnfast.bench.measure import OURS

    if not args.rehearse and not torch.cuda.is_available():
        raise UsageError("torch sees no CUDA device; --rehearse goes through a part without one")
    tests = Path(gpu.__file__).parents[1] / "tests/gpu"
    if args.part == "tests" and not tests.is_dir():
        raise UsageError(f"--part tests needs the source tree, with {tests.name} in it, which an installed wheel lacks")
    if args.part in ("models", "train"):
        require("timm", "bench")
    device = Device("cpu" if args.rehearse else "cuda")
    result, rows = gpu.run_part(args.part, args.out, args.minutes, device, tests)
    console = Console(highlight=False)
    if args.part == "tests":
        for name, counts in result["counts"].items():
            console.print(
                f"{name}: {', '.join(f'{count} {outcome}' for outcome, count in counts.items()) or 'none ran'}"
            )
        console.print(*[f"{name}: cut off after {args.minutes} minutes" for name in result["unfinished"]], sep="\n")
        sanitized = result["compute_sanitizer"]
        console.print(*[f"compute-sanitizer {tool}: {found}" for tool, found in sanitized.items()], sep="\n")
        failed = any(counts.get("failed", 0) + counts.get("error", 0) for counts in result["counts"].values())
        failed |= any(found.startswith(("errors", "failed")) for found in sanitized.values())
    else:
        tables.print_report(
            rows, gpu.PEERS, f"{result['device']['name']}; ratios: cnnfast's speed to the peer's", console
        )
        for name in result["left_out"]:
            console.print(f"not reached in {args.minutes} minutes: {name}", markup=False)
        failed = any(OURS in row.problems for row in rows)
    Console(stderr=True, highlight=False).print(f"written: {args.out / args.part}.json, gpu.json", soft_wrap=True)
    return 1 if failed else 0


def _cases(args: argparse.Namespace):
    if args.kind == "ops":
        from cnnfast.bench import ops as suite

        known = suite.OPS
    else:
        require("timm", "bench")
        from cnnfast.bench import models, train

        suite, known = models if args.kind == "models" else train, list_models()
    if unknown := sorted(set(args.names or ()) - set(known)):
        close = difflib.get_close_matches(unknown[0], known, cutoff=0.4)
        shown = ", ".join(known) if len(known) < 20 else f"{len(known)}, such as {' and '.join(close or known[:3])}"
        raise UsageError(
            f"no {'op' if args.kind == 'ops' else 'model'} {', '.join(unknown)} to bench; there are {shown}"
        )
    return suite.select(args.names, args.quick)
