"""`cnnfast bench`: cnnfast against eager PyTorch, torch.compile, ONNX Runtime and OpenVINO, on this machine."""

from __future__ import annotations

import argparse
import difflib
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from cnnfast.cli.errors import UsageError, require
from cnnfast.cli.options import DTYPES, add_threads, positive_int, set_threads
from cnnfast.models import list_models


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    summary = "time cnnfast against PyTorch, torch.compile, ONNX Runtime and OpenVINO, after comparing outputs"
    example = "example: cnnfast bench models --model mobilenet_v2 --quick"
    parser = subparsers.add_parser("bench", help=summary, description=summary, epilog=example)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="ops|models|gpu")
    example = "example: cnnfast bench ops --op separable_conv2d --quick"
    ops = kinds.add_parser("ops", help="each op at the real networks' shapes", epilog=example)
    ops.add_argument("--op", action="append", dest="names", metavar="NAME", help="only this op (repeatable)")
    example = "example: cnnfast bench models --model mobilenet_v2 --dtype bfloat16"
    models = kinds.add_parser("models", help="whole networks, each in a fresh process", epilog=example)
    models.add_argument("--model", action="append", dest="names", metavar="NAME", help="only this one (repeatable)")
    for kind in (ops, models):
        kind.add_argument("--quick", action="store_true", help="few cases and rounds, under a minute")
        kind.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: %(default)s)")
        kind.add_argument("--batch", type=positive_int, default=1, metavar="N", help="(default: 1)")
        peers = "of eager,eager_channels_last,inductor,onnxruntime,openvino (default: all that are installed)"
        kind.add_argument("--peers", metavar="A,B", help=peers)
        kind.add_argument("--rounds", type=positive_int, metavar="N", help="of interleaved samples (default: 15)")
        kind.add_argument("--processes", type=positive_int, default=1, metavar="N", help="repeat in N (default: 1)")
        kind.add_argument("--json", type=Path, metavar="FILE", help="(default: a new file in bench/results/)")
        add_threads(kind)
    gpu = kinds.add_parser(
        "gpu",
        help="on a GPU: its tests, every op, whole networks, each part in under ten minutes",
        epilog="example: cnnfast bench gpu --part tests --out gpu-results",
    )
    gpu.add_argument("--part", choices=("tests", "ops", "models"), required=True, help="in this order, in three calls")
    gpu.add_argument("--out", type=Path, required=True, metavar="DIR", help="for <part>.json, gpu.json and the logs")
    gpu.add_argument("--minutes", type=positive_int, default=8, metavar="N", help="(default: 8)")
    gpu.add_argument("--rehearse", action="store_true", help="on the CPU, a few small cases: nothing is measured")
    return parser


def run(args: argparse.Namespace) -> int:
    """1 if an output was wrong or a contender could not run."""
    if args.kind == "gpu":
        return _run_gpu(args)
    from cnnfast.bench import ceilings, peers, report
    from cnnfast.bench.measure import Settings, run_cases

    cases = _cases(args)
    missing = {name for name in peers.ENGINES if not find_spec(name)}
    names = tuple(args.peers.split(",")) if args.peers else tuple(name for name in peers.PEERS if name not in missing)
    if unknown := set(names) - set(peers.PEERS):
        raise UsageError(f"--peers: no peer {', '.join(sorted(unknown))}; there are {', '.join(peers.PEERS)}")
    for name in missing.intersection(names):
        require(name, "bench")
    threads = set_threads(args.threads)
    settings = Settings(threads, DTYPES[args.dtype], args.batch, args.rounds or (5 if args.quick else 15), peers=names)

    measurements = []
    progress = Console(stderr=True, highlight=False)
    with progress.status("starting") as status:
        dram_rate = ceilings.dram_rate(threads)
        total = len(cases) * args.processes
        try:
            for measurement in run_cases(cases, settings, args.processes, isolate=args.kind == "models"):
                measurements.append(measurement)
                status.update(f"{len(measurements)}/{total} {measurement.group} {measurement.name}")
        except KeyboardInterrupt:
            progress.print(f"interrupted: reporting {len(measurements)} of {total} measurements")
    rows = report.make_rows(measurements)
    report.print_report(rows, settings.peers, report.title_of(settings), Console())
    if path := args.json or (None if args.quick else report.default_path(args.kind)):
        report.write_json(report.to_json(rows, measurements, settings, dram_rate), path)
        progress.print(f"written: {path}", soft_wrap=True)
    return 1 if any(row.problems for row in rows) else 0


def _run_gpu(args: argparse.Namespace) -> int:
    """1 if a test is red, an output was wrong or cnnfast could not run."""
    import torch

    from cnnfast.bench import gpu, report
    from cnnfast.bench.device import Device
    from cnnfast.bench.measure import OURS

    if not args.rehearse and not torch.cuda.is_available():
        raise UsageError("torch sees no CUDA device; --rehearse goes through a part without one")
    tests = Path(gpu.__file__).parents[1] / "tests/gpu"
    if args.part == "tests" and not tests.is_dir():
        raise UsageError(f"--part tests needs the source tree, with {tests.name} in it, which an installed wheel lacks")
    if args.part == "models":
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
        report.print_report(
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
        from cnnfast.bench import models as suite

        known = list_models()
    if unknown := sorted(set(args.names or ()) - set(known)):
        close = difflib.get_close_matches(unknown[0], known, cutoff=0.4)
        shown = ", ".join(known) if len(known) < 10 else f"{len(known)}, such as {' and '.join(close or known[:3])}"
        raise UsageError(f"no {args.kind[:-1]} {', '.join(unknown)} to bench; there are {shown}")
    return suite.select(args.names, args.quick)
