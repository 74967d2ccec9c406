"""`cnnfast evaluate`: the accuracy of a network over a folder of labelled images."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import cnnfast
from cnnfast.cli.classify import load_model, progress_bar, report_failure
from cnnfast.cli.errors import UsageError, require, users_network
from cnnfast.cli.interrupts import deferred_interrupts
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
from cnnfast.evaluation import MODES, Failure, ImageFolder, Prediction, Table, Views, accuracy, predict, read_folder
from cnnfast.evaluation.table import replace_file
from cnnfast.models.registry import model_entry
from cnnfast.nn import set_backend
from cnnfast.ops.backends import BACKENDS

if TYPE_CHECKING:
    from rich.console import Console

_DESCRIPTION = """\
Top-1 and top-5 accuracy over a folder that has a folder of images for each
class.

A class folder is named for its class: a line of --labels, or else for an
ImageNet network the class's name or WordNet id; or the number of the network's
output. Where no name is known and there are as many folders as classes, their
sorted order is that of the outputs.

The softmax outputs of all views of an image (crops, sizes, mirrored ones) are
averaged. Dense: the classifier's scores are averaged over the positions, then
softmax.

Exit status 1 if some images could not be read, 2 if nothing could be done."""

_EXAMPLES = """\
examples:
  cnnfast evaluate --data imagenet/val --csv lite0.csv
  cnnfast evaluate --data imagenet/val --mode dense --sizes 256,320 --mirror
  cnnfast evaluate --data flowers --model xception --weights flowers.pth \\
      --num-classes 102
  cnnfast evaluate --data flowers --model my_network --import my_module \\
      --weights flowers.pth"""


@dataclass(frozen=True)
class Summary:
    """`seconds` and `images_per_second` are of this run, reading included, without the images that a CSV had."""

    images: int
    top1: float | None
    top5: float | None
    continued: int
    seconds: float
    images_per_second: float | None


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "evaluate",
        help="accuracy of a network over a folder of labelled images",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=Help,
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="with a folder of images for each class"
    )
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="(default: %(default)s)")
    parser.add_argument("--weights", metavar="FILE", help="a checkpoint (default: the published ImageNet weights)")
    parser.add_argument("--num-classes", type=positive_int, metavar="N", help="(default: the published weights')")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="a line for each output: WordNet id or name")
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="single",
        help="single centre crop; ten-crop; multi-crop: GoogLeNet's 144; dense: the classifier at every position of the"
        " whole image (default: single)",
    )
    parser.add_argument(
        "--sizes",
        type=_sizes,
        default=(),
        metavar="N,...",
        help="of the input (single) or of the short side the image is resized to; of several the mean",
    )
    parser.add_argument("--mirror", action="store_true", help="single and dense: the mean with the mirrored image")
    parser.add_argument("--batch", type=positive_int, default=32, metavar="N", help="views in one call (default: 32)")
    parser.add_argument("--workers", type=_count, default=0, metavar="N", help="processes that read (default: 0)")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="only N images, spread evenly")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="a row for each image; an existing one is continued")
    parser.add_argument("--restart", action="store_true", help="replace an existing --csv")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: %(default)s)")
    parser.add_argument(
        "--backend", choices=["auto", *BACKENDS], default="auto", help="of every fused op (default: auto)"
    )
    add_import(parser)
    add_threads(parser)
    return parser


def _count(text: str) -> int:
    return 0 if text == "0" else positive_int(text)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(positive_int, text.split(",")))


def run(args: argparse.Namespace) -> int:
    require("PIL", "demo")
    import_modules(args.imports)
    if args.mode in ("ten", "multi"):
        require("torchvision", "transforms")
    from rich.console import Console

    device = parse_device(args.device)
    set_threads(args.threads)
    options = {} if args.num_classes is None else {"num_classes": args.num_classes}
    model, preprocessing, weights = load_model(args.model, args.weights, **options)
    model = model.to(device, DTYPES[args.dtype]).eval()
    set_backend(model, args.backend)
    cfg = model_entry(args.model).pretrained_cfg
    num_classes = args.num_classes or cfg["num_classes"]
    label_set = cfg["label_set"] if num_classes == cfg["num_classes"] else ""
    for file in filter(None, (args.csv, args.json)):  # not after hours
        if not file.parent.is_dir() or file.is_dir():
            raise UsageError(f"{file} can't be written: {'a folder' if file.is_dir() else 'no such folder'}")
    try:
        views = Views(preprocessing, args.mode, args.sizes, args.mirror)
        folder = read_folder(args.data, num_classes, args.labels, label_set)
        samples = folder.limited(args.limit or len(folder.samples))
        if not samples:
            raise ValueError(f"--data {args.data}: no images in the class folders")
        settings = _settings(args, weights, views, folder)
        table = Table(args.csv, settings, folder.names, args.restart) if args.csv else None
    except (ValueError, OSError) as error:
        raise UsageError(_hint(str(error), args)) from None

    done = table.done if table else {}
    todo = [sample for sample in samples if sample.path not in done]
    predictions = [done[sample.path] for sample in samples if sample.path in done]
    errors = Console(stderr=True, highlight=False)
    try:
        with users_network(args.model):
            batches = predict(model, views, todo, args.batch, args.workers)
        start = time.perf_counter()
        failures = collect(batches, predictions, table, args.data, len(todo), errors)
    except (ValueError, TypeError, OSError) as error:  # the backend can't run here, a full disk
        raise UsageError(str(error)) from None
    except KeyboardInterrupt:
        kept = f"; {args.csv} has them, and the same command goes on" if table else ""
        errors.print(f"interrupted: {len(predictions)} of {len(samples)} images done{kept}", soft_wrap=True)
        raise
    seconds = time.perf_counter() - start

    made = len(todo) - len(failures)
    speed = made / seconds if made else None
    summary = Summary(len(predictions), *accuracy(predictions), len(samples) - len(todo), seconds, speed)
    if args.json:
        settings |= {"batch": args.batch, "workers": args.workers, "limit": args.limit}
        report = settings | asdict(summary) | {"errors": [asdict(failure) for failure in failures]}
        replace_file(args.json, json.dumps(report, indent=2) + "\n")
    print_table(summary, settings, views, folder, len(failures), Console())
    return 1 if failures else 0


def collect(
    batches: Iterable[list[Prediction | Failure]],
    predictions: list[Prediction],
    table: Table | None,
    data: Path,
    total: int,
    errors: Console,
) -> list[Failure]:
    """Adds what is predicted to `predictions` and `table`, reports what fails and returns it."""
    failures: list[Failure] = []
    with progress_bar(errors, total) as advance, deferred_interrupts() as stop_if_interrupted:
        for results in batches:
            new = [result for result in results if isinstance(result, Prediction)]
            if table:
                table.add(new)
            predictions += new
            for result in results:
                advance()
                if isinstance(result, Failure):
                    failures.append(result)
                    report_failure(errors, str(data / result.path), result.reason)
            stop_if_interrupted()
    return failures


def _settings(args: argparse.Namespace, weights: Path, views: Views, folder: ImageFolder) -> dict[str, Any]:
    """What the predictions depend on."""
    return {
        "model": args.model,
        "weights": weights.name,
        "weights_digest": _digest(weights.read_bytes()),
        "data": str(args.data.resolve()),
        "classes_digest": _digest(repr((sorted(folder.targets.items()), folder.names)).encode()),
        "preprocessing": asdict(views.preprocessing),
        "mode": views.mode,
        "sizes": list(views.sizes),
        "mirror": views.mirror,
        "device": args.device,
        "dtype": args.dtype,
        "backend": args.backend,
        "cnnfast": cnnfast.__version__,
        "torch": torch.__version__,
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _hint(message: str, args: argparse.Namespace) -> str:
    restartable = args.csv and message.startswith(str(args.csv))
    return f"{message} (--restart replaces it)" if restartable else message


def print_table(
    summary: Summary, settings: dict[str, Any], views: Views, folder: ImageFolder, failed: int, console: Console
) -> None:
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(title=settings["model"], title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value")
    sizes = ", ".join(map(str, views.sizes)) + (" and mirrored" if views.mirror else "")
    count = f"{len(views)} views" if len(views) > 1 else "1 view"
    table.add_row("data", Text(f"{folder.folder}, {len(folder.targets)} class folders by {folder.matched}"))
    table.add_row("mode", f"{views.mode}, {count} of an image, size {sizes}")
    table.add_row("arithmetic", f"{settings['dtype']} on {settings['device']}, backend {settings['backend']}")
    continued = f", {summary.continued} of them from the CSV" if summary.continued else ""
    table.add_row("images", f"{summary.images}{continued}" + (f"; {failed} failed" if failed else ""))
    for name, value in (("top-1", summary.top1), ("top-5", summary.top5)):
        table.add_row(name, "none" if value is None else f"{100 * value:.2f} %")
    if summary.images_per_second:
        table.add_row("images/s", f"{summary.images_per_second:.1f}, reading included")
    console.print(table)
