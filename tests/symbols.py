"""What a built file needs and defines, by binutils' nm."""

import re
import subprocess
from pathlib import Path

STABLE_ABI = r"(aoti_torch|torch)_\w+"  # the C shim of torch >= 2.10
VERSIONED = r"(GLIBC|GLIBCXX|CXXABI|GCC|GOMP|OMP)_"  # libc, libm, libstdc++, libgcc and libgomp; torch and Python: none
TOOLCHAIN = ("_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__")


def nm(path: Path, *options: str) -> list[tuple[str, str]]:
    """(kind, name) of each symbol; kinds are nm's letters."""
    said = subprocess.run(["nm", *options, str(path)], check=True, capture_output=True, text=True).stdout
    rows = (re.match(r"\s*(?:[0-9a-f]+\s+)?(\w) (.+)", line) for line in said.splitlines())
    return [(row[1], row[2]) for row in rows if row]


def weak(path: Path) -> list[str]:
    """Defined symbols of which the linker keeps one, whoever it is of."""
    return [name for kind, name in nm(path, "--defined-only") if kind in "vVwWu"]


def undefined(path: Path) -> list[str]:
    """Undefined dynamic symbols, weak ones too, with the version that the linker recorded (name@GLIBC_2.34)."""
    return [name for _, name in nm(path, "-D", "--undefined-only")]


def foreign(path: Path) -> list[str]:
    """Undefined symbols that neither torch's stable ABI nor the C and C++ runtimes promise."""
    found = []
    for symbol in undefined(path):
        name, _, version = symbol.partition("@")
        promised = re.fullmatch(STABLE_ABI, name) or re.match(VERSIONED, version.lstrip("@")) or name in TOOLCHAIN
        if not promised:
            found.append(symbol)
    return found
