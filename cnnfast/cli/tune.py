"""`cnnfast tune`: the fastest tiles of the Triton kernels on this GPU, timed once and kept."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

import cnnfast
from cnnfast.cli.errors import UsageError, require
from cnnfast.cli.options import DTYPES, Help, parse_device, positive_int

if TYPE_CHECKING:
    from rich.console import Console

    from cnnfast.kernels.tuning import Outcome

Call = Callable[[], list[torch.Tensor]]
Work = tuple[str, Callable[[], Call]]  # a name, and what makes the call whose launches are tuned
EXAMPLE = "example, what training MobileNetV2 in bfloat16 launches:\n  cnnfast tune mobilenet_v2 --train --batch 64"


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    summary = "time tiles of the Triton kernels on this GPU, and keep the fastest for later runs"
    parser = subparsers.add_parser(
        "tune",
        help=summary,
        description=f"{summary}. It takes some 20 seconds a kernel and shape, once: what is known isn't tuned again, "
        "and Ctrl-C loses nothing. What is kept is for this GPU and these versions of PyTorch, Triton and the kernels; "
        "another tile may add up in another order, so that last digits change.",
        epilog=EXAMPLE,
        formatter_class=Help,
    )
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help="what it launches (default: every --op)")
    parser.add_argument("--op", action="append", metavar="OP", help="at the real networks' shapes (repeatable)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--batch", type=positive_int, default=32, metavar="N", help="images (default: %(default)s)")
    parser.add_argument("--size", type=positive_int, metavar="N", help="a NETWORK's input (default: its own, else 224)")
    parser.add_argument("--train", action="store_true", help="gradients, too; a NETWORK in training mode")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument("--clear", action="store_true", help="only remove what was kept, of every GPU and version")
    return parser


def run(args: argparse.Namespace) -> int:
    """1 if a result was another one with what was tuned for it, which then isn't kept."""
    require("triton", "gpu")
    from rich.console import Console

    from cnnfast.kernels import tuned

    progress = Console(stderr=True, highlight=False)
    if args.clear:
        removed = [f"removed: {file}" for file in tuned.clear()]
        progress.print(*removed or ["nothing was kept"], sep="\n", soft_wrap=True)
        return 0
    if not torch.cuda.is_available():
        raise UsageError("torch sees no CUDA device to tune for")
    device = parse_device(args.device)
    identity = tuned.identity(device)
    if identity is None:
        raise UsageError(f"--device is {args.device}: want a GPU, such as cuda or cuda:1")
    device = torch.device(device.type, device.index or 0)  # as tensors there name it
    works = [*network_works(args, device), *(op_works(args, device) if args.op or not args.networks else ())]
    outcomes, wrong = tune(works, DTYPES[args.dtype], device, progress)
    for outcome in outcomes:
        print(line(outcome))
    for sentence in wrong:
        progress.print(sentence, markup=False, soft_wrap=True)
    progress.print(f"{len(tuned.entries(device))} configurations: {tuned.path(identity)}", soft_wrap=True)
    return 1 if wrong else 0


def tune(
    works: Sequence[Work], dtype: torch.dtype, device: torch.device, progress: Console
) -> tuple[list[Outcome], list[str]]:
    """What was tuned and kept, and a sentence for each call whose result became another one."""
    from cnnfast.kernels import tuned

    outcomes: list[Outcome] = []
    sentences: list[str] = []
    doing = ""

    def report(outcome: Outcome) -> None:
        outcomes.append(outcome)
        status.update(f"{doing}: {outcome.key[0]}, the {len(outcomes)}th tuned")

    with progress.status("starting") as status:
        for i, (name, work) in enumerate(works, 1):
            doing, before = f"{i}/{len(works)} {name}", len(outcomes)
            status.update(doing)
            try:
                problem = tune_call(work(), dtype, report)
            except (ValueError, torch.OutOfMemoryError) as error:
                raise UsageError(f"{name}: {str(error).splitlines()[0]}") from None
            except KeyboardInterrupt:
                progress.print(f"interrupted in {doing}", markup=False)
                break
            if problem and outcomes[before:]:
                sentences.append(f"{name}: {problem} with what was tuned for it, which isn't kept")
                tuned.keep(device, {outcome.key: outcome.default for outcome in outcomes[before:]})
                del outcomes[before:]
    return outcomes, sentences


def tune_call(call: Call, dtype: torch.dtype, report: Callable[[Outcome], None]) -> str | None:
    """Tunes what the call launches; why its result is another one afterwards, None if it isn't."""
    from cnnfast.bench.gpu import wrong
    from cnnfast.kernels.tuning import tuning

    expected = [tensor.double() for tensor in call()]
    with tuning(report):
        call()
    if not all(tensor.isfinite().all() for tensor in expected):  # a fresh network may leave float16: nothing to compare
        return None
    return wrong(call(), expected, dtype)


def op_works(args: argparse.Namespace, device: torch.device) -> list[Work]:
    """The ops' cases that have Triton kernels."""
    from cnnfast.bench import ops as suite

    if unknown := set(args.op or ()) - set(suite.OPS):
        raise UsageError(f"no op {', '.join(sorted(unknown))} to tune; there are {', '.join(suite.OPS)}")
    for op in args.op or ():
        if reasons := cnnfast.ops.can_run(op, "triton", device):
            raise UsageError(f"--op {op}: {'; '.join(reasons)}")
    cases = [case for case in suite.select(args.op) if not cnnfast.ops.can_run(case.group, "triton", device)]
    return [(f"{case.group} {case.name}", functools.partial(of_op, case, args, device)) for case in cases]


def of_op(case: Any, args: argparse.Namespace, device: torch.device) -> Call:
    from cnnfast.bench.gpu import only_forward, with_gradients
    from cnnfast.bench.measure import Settings

    problem = case.build(Settings(torch.get_num_threads(), DTYPES[args.dtype]))
    plain, x = problem.plain.to(device), images(args, device, *problem.x.shape[1:])
    return (with_gradients if args.train else only_forward)(case.op(plain, "triton"), plain, x)


def network_works(args: argparse.Namespace, device: torch.device) -> list[Work]:
    if unknown := set(args.networks) - set(cnnfast.list_models()):
        raise UsageError(f"no network {', '.join(sorted(unknown))}; there are {', '.join(cnnfast.list_models())}")
    return [(name, functools.partial(of_network, name, args, device)) for name in args.networks]


def of_network(name: str, args: argparse.Namespace, device: torch.device) -> Call:
    """As a user runs it: each op by the backend that "auto" takes; of these Triton's launches are tuned."""
    from cnnfast.bench.gpu import only_forward, with_gradients

    try:
        size = args.size or cnnfast.preprocessing_for(name).size
    except ValueError:
        size = 224
    model = cnnfast.create_model(name, device=device, dtype=DTYPES[args.dtype]).train(args.train)
    call = (with_gradients if args.train else only_forward)(model, model, images(args, device, 3, size, size))

    def seeded() -> list[torch.Tensor]:
        torch.manual_seed(0)  # dropout
        return call()[:1]  # a network's gradients in 16 bits differ too much with the last digits

    return seeded


def images(args: argparse.Namespace, device: torch.device, *shape: int) -> torch.Tensor:
    x = torch.randn(args.batch, *shape, device=device).to(DTYPES[args.dtype])
    return x.contiguous(memory_format=torch.channels_last)


def line(outcome: Outcome) -> str:
    """For a person: kernel, shape, times, and what is other than by default."""
    kernel, *shape = outcome.key
    parts = " ".join(name if value is True else f"{name} {value}" for name, value in shape if value is not False)
    other = [f"{name} {n}" for name, n in outcome.best.items() if n != outcome.default[name]]
    faster = f" -> {outcome.best_ms:.4f} ms by {', '.join(other)}" if other else " ms, the default"
    return f"{kernel}, {parts}: {outcome.default_ms:.4f}{faster}"
