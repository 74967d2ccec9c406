"""Options that several subcommands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cnnfast.cli.errors import UsageError
from cnnfast.imports import import_module

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Help(argparse.HelpFormatter):
    """Texts of several lines stay as they are, so that an example can be copied; others are filled."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def positive_int(text: str) -> int:
    """An argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def comma_list(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """An argparse type: what `parse` makes of each of a comma-separated list, in order, each once."""

    def parse_all(text: str) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(map(parse, text.split(","))))

    return parse_all


def dtype_name(text: str) -> str:
    """An argparse type."""
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"no dtype {text!r}; there are {', '.join(DTYPES)}")
    return text


def add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--import",
        action="append",
        dest="imports",
        metavar="MODULE",
        help="first import this, which registers networks of yours (repeatable)",
    )


def import_modules(names: Sequence[str] | None) -> None:
    """Apply --import."""
    for name in names or ():
        try:
            import_module(name)
        except ValueError as error:
            raise UsageError(f"--import {error}") from None


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: PyTorch's)")


def set_threads(threads: int | None) -> int:
    """Apply --threads; returns the number in use."""
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def parse_device(name: str) -> torch.device:
    """A device that is here."""
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise UsageError(f"--device {name}: want cpu, cuda, cuda:1, ...")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device
