"""`cnnfast classify`: photos to ImageNet labels, with a network of cnnfast's fused kernels."""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import cnnfast
from cnnfast.cli.errors import UsageError, require, users_network
from cnnfast.cli.images import find_images
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
from cnnfast.nn import set_backend
from cnnfast.ops.backends import BACKENDS
from cnnfast.preprocess import Preprocessing, preprocessing_for
from cnnfast.pretrained import find_weights, imagenet_labels

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Label:
    index: int
    name: str
    probability: float


@dataclass(frozen=True)
class Result:
    """One image: its likeliest labels, and the milliseconds of reading and preparing it and of the network."""

    file: str
    labels: list[Label]
    preprocess_ms: float
    network_ms: float


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    summary = "label photos with an ImageNet network"
    parser = subparsers.add_parser(
        "classify",
        help=summary,
        description=f"{summary}; exit status 1 if some images could not be read, 2 if nothing could be done.",
        epilog="example: cnnfast classify --topk 3 photos/",
        formatter_class=Help,
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="image files, or directories to walk")
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="(default: %(default)s)")
    parser.add_argument("--weights", metavar="FILE", help="a checkpoint (default: the published ImageNet weights)")
    parser.add_argument("--topk", type=positive_int, default=5, metavar="K", help="labels an image (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: %(default)s)")
    parser.add_argument(
        "--backend", choices=["auto", *BACKENDS], default="auto", help="of every fused op (default: auto)"
    )
    add_import(parser)
    add_threads(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    require("PIL", "demo")
    import_modules(args.imports)
    from rich.console import Console

    if not args.paths:
        raise UsageError("no PATH given: name image files or directories")
    images, failures = find_images(args.paths)
    if not images:
        raise UsageError("; ".join(f"{path}: {reason}" for path, reason in failures))
    device = parse_device(args.device)
    threads = set_threads(args.threads)
    model, preprocessing, weights = load_model(args.model, args.weights)
    model = model.to(device, DTYPES[args.dtype]).eval()
    set_backend(model, args.backend)

    errors = Console(stderr=True, highlight=False)
    for path, reason in failures:
        report_failure(errors, path, reason)
    with users_network(args.model):
        results, unreadable = classify(model, preprocessing, images, args.topk, errors)
    failures += unreadable

    if args.json:
        settings = {"model": args.model, "weights": str(weights), "device": str(device), "dtype": args.dtype}
        settings |= {"backend": args.backend, "threads": threads}
        errors_found = [{"file": path, "error": reason} for path, reason in failures]
        print(json.dumps(settings | {"images": [asdict(r) for r in results], "errors": errors_found}, indent=2))
    elif results:
        print_table(results, args.model)
    return 1 if failures else 0


def load_model(name: str, weights: str | None, **options: Any) -> tuple[torch.nn.Module, Preprocessing, Path]:
    """The network (`options` are its own) with its weights, and what its input should be; UsageError where any of it
    can't be had."""
    try:
        with users_network(name):
            model = cnnfast.create_model(name, **options)
        preprocessing = preprocessing_for(name)
        file = Path(weights) if weights else find_weights(name)
        if not file.is_file():
            raise FileNotFoundError(f"--weights {file}: no such file")
        cnnfast.load_weights(model, file)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from None
    return model, preprocessing, file


def classify(
    model: torch.nn.Module, preprocessing: Preprocessing, images: list[Path], topk: int, errors: Console
) -> tuple[list[Result], list[tuple[str, str]]]:
    """Results of the images that could be read, and (file, reason) of the others, which are reported as they come."""
    parameter = next(model.parameters())
    results: list[Result] = []
    failures: list[tuple[str, str]] = []
    with torch.no_grad(), progress_bar(errors, len(images)) as advance:
        warm_up = parameter.new_zeros(1, preprocessing.size, preprocessing.size, 3).permute(0, 3, 1, 2)
        try:
            model(warm_up)  # packs the weights: the first image's time is then like the others'
        except (ValueError, TypeError) as error:  # the backend can't run here
            raise UsageError(str(error)) from None
        for path in images:
            try:
                results.append(classify_one(model, preprocessing, path, topk, parameter))
            except (ValueError, OSError) as error:
                failures.append((str(path), getattr(error, "strerror", None) or str(error)))
                report_failure(errors, *failures[-1])
            advance()
    return results, failures


def classify_one(
    model: torch.nn.Module, preprocessing: Preprocessing, path: Path, topk: int, like: torch.Tensor
) -> Result:
    """`like`: of the network's device and dtype."""
    start = time.perf_counter()
    x = preprocessing.load(path).to(like)
    read = time.perf_counter()
    logits = model(x).float().cpu()[0]  # cpu() waits for a GPU
    done = time.perf_counter()
    if not logits.isfinite().all():
        raise ValueError(f"the network's output is not finite in {str(like.dtype).removeprefix('torch.')}")
    names = imagenet_labels() if len(logits) == 1000 else [f"class {i}" for i in range(len(logits))]
    probabilities, indices = logits.softmax(-1).topk(min(topk, len(logits)))
    labels = [Label(i, names[i], p) for i, p in zip(indices.tolist(), probabilities.tolist(), strict=True)]
    return Result(str(path), labels, (read - start) * 1e3, (done - read) * 1e3)


def progress_bar(console: Console, total: int):
    """A context that gives a function to call after each image; shows nothing where stderr is no terminal."""
    if total < 2 or not console.is_terminal:
        return nullcontext(lambda: None)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    class Bar(Progress):
        def __enter__(self):
            super().__enter__()
            task = self.add_task("images", total=total)
            return lambda: self.advance(task)

    return Bar(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True)


def report_failure(console: Console, path: str, reason: str) -> None:
    console.print(f"{path}: {reason}", markup=False, soft_wrap=True)


def print_table(results: list[Result], model_name: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("file", "label", title=model_name, title_justify="left")
    table.add_column("probability", justify="right")
    table.add_column("network, ms", justify="right")
    for result in results:
        names = "\n".join(label.name for label in result.labels)
        probabilities = "\n".join(f"{label.probability:.3f}" for label in result.labels)
        table.add_row(Text(result.file), names, probabilities, f"{result.network_ms:.1f}", end_section=True)
    Console().print(table)
