"""`cnnfast completion`: what a shell needs to complete our commands, options, networks and files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from cnnfast.cli.errors import require
from cnnfast.cli.options import Help
from cnnfast.models import list_models

SHELLS = ("bash", "zsh")
EXAMPLE = "example:\n  cnnfast completion bash > ~/.local/share/bash-completion/completions/cnnfast"
_FUNCTION = "_cnnfast_networks"
_NETWORKS = {"bash": _FUNCTION, "zsh": _FUNCTION}
_FILES = {"bash": "_shtab_compgen_files", "zsh": "_files"}  # shtab.FILE, which is None where it isn't installed
_DIRECTORIES = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/"}
# By what an argument is called in its help.
_COMPLETED = {
    "NETWORK": _NETWORKS,
    "--model": _NETWORKS,
    "verify NAME": _NETWORKS,
    "summary NAME": _NETWORKS,
    "FILE": _FILES,
    "PATH": _FILES,
    "DIR": _DIRECTORIES,
}


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    summary = "print a script by which your shell completes commands, options, networks and files"
    parser = subparsers.add_parser(
        "completion",
        help=summary,
        description=f"{summary}. In zsh write it to a file _cnnfast in a folder of $fpath. Write it again after an"
        " update: names of networks are in it, so that completing them starts no Python.",
        epilog=EXAMPLE,
        formatter_class=Help,
    )
    parser.add_argument("shell", choices=SHELLS, metavar="|".join(SHELLS))
    return parser


def run(args: argparse.Namespace) -> int:
    require("shtab", "completion")
    from cnnfast.cli.main import build_parser

    print(script(build_parser(), args.shell))
    return 0


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    import shtab

    for command, action in _actions(parser):
        called = [f"{command} {action.metavar}", *action.option_strings, str(action.metavar)]
        found = next((_COMPLETED[name] for name in called if name in _COMPLETED), None)
        if found and action.nargs != 0:
            action.complete = found  # type: ignore[attr-defined]
    names = " ".join(list_models())
    functions = {
        "bash": f'{_FUNCTION}() {{\n  compgen -W "{names}" -- "$1"\n}}',
        "zsh": f"{_FUNCTION}() {{\n  compadd {names}\n}}",
    }
    return shtab.complete(parser, shell, preamble=functions)  # type: ignore[arg-type]


def _actions(parser: argparse.ArgumentParser, command: str = "") -> Iterator[tuple[str, argparse.Action]]:
    """Of all commands, with the command's name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from _actions(child, name)
        else:
            yield command, action
