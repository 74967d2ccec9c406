"""What there is to build with: the C++ compiler and its ISAs, torch's headers, the CUDA toolkit."""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIN_TORCH = (2, 10)
CXX_STANDARD = "-std=c++20"


class BuildError(SystemExit):
    """Ends the build with one sentence instead of a traceback."""

    def __init__(self, sentence: str):
        super().__init__(f"cnnfast: {sentence}")


def output_of(*command: str | Path, stdin: str | None = None) -> tuple[int, str]:
    """Exit status and output (stdout and stderr together) of a command."""
    done = subprocess.run(
        [str(part) for part in command],
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    return done.returncode, done.stdout


# --- the C++ compiler ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Isa:
    """An instruction set that `source` in csrc/cpu/kernels is compiled for; `machines` that have it, None: all."""

    name: str
    flags: tuple[str, ...] = ()
    machines: tuple[str, ...] | None = None
    source: str = "isa.cpp"

    @property
    def macro(self) -> str:
        return f"CNNFAST_HAVE_{self.name.upper()}"


X86 = ("x86_64", "AMD64")
AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    *("-mfma", "-mavx2", "-mf16c", "-mprefer-vector-width=512"),
)
ISAS = (
    Isa("generic"),
    Isa("avx2", ("-mavx2", "-mfma", "-mf16c"), X86),
    Isa("avx512", AVX512, X86),
    Isa("amx", (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"), X86, "amx.cpp"),
)


@dataclass(frozen=True)
class Compiler:
    command: tuple[str, ...]
    version: str

    def accepts(self, *flags: str, source: str = "int main() { return 0; }\n") -> str | None:
        """None where the compiler takes the flags, else the first line of what it says."""
        status, said = output_of(*self.command, *flags, "-fsyntax-only", "-x", "c++", "-", stdin=source)
        return None if status == 0 else next(iter(said.strip().splitlines()), f"exit status {status}")


def find_compiler() -> Compiler:
    """$CXX, else c++, g++ or clang++ on PATH; it has to know C++20."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    command = wanted or next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), [])
    if not command or not shutil.which(command[0]):
        looked = f"CXX names {command[0]!r}, which is not there" if command else "there is no C++ compiler on PATH"
        raise BuildError(
            f"{looked}; install g++ 11 or newer (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++),"
            " or point CXX at one."
        )
    _, said = output_of(*command, "--version")
    version = next(iter(said.splitlines()), "unknown")
    compiler = Compiler(tuple(command), version)
    problem = compiler.accepts(CXX_STANDARD, source="#include <concepts>\n#include <barrier>\nint main() {}\n")
    if problem:
        raise BuildError(
            f"{command[0]} ({version}) does not compile C++20 ({problem});"
            " install g++ 11 or newer, or point CXX at one."
        )
    return compiler


def usable_isas(compiler: Compiler) -> tuple[list[Isa], list[str]]:
    """The ISAs to build here, and a note for each one that this compiler can't."""
    isas, notes = [], []
    for isa in ISAS:
        if isa.machines is not None and platform.machine() not in isa.machines:
            continue
        problem = compiler.accepts(*isa.flags) if isa.flags else None
        if problem:
            notes.append(f"{isa.name} kernels left out: {compiler.version} says: {problem}")
        else:
            isas.append(isa)
    return isas, notes


# --- torch --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Torch:
    root: Path  # the package's folder
    version: str
    cuda: str | None  # the CUDA version it is a build for

    @property
    def is_supported(self) -> bool:
        return tuple(int(part) for part in re.findall(r"\d+", self.version)[:2]) >= MIN_TORCH


def _torch_at(root: Path) -> Torch | None:
    version_file = root / "version.py"
    if not version_file.is_file():
        return None
    facts: dict = {}
    exec(version_file.read_text(), facts)  # torch's own generated file: plain assignments
    return Torch(root, str(facts["__version__"]), facts.get("cuda"))


def find_torch() -> Torch | None:
    """The target environment's torch, else the one that this interpreter would import; never imported itself."""
    torch = _torch_at(Path(sysconfig.get_path("purelib")) / "torch")
    if torch is None:
        spec = importlib.util.find_spec("torch")
        torch = _torch_at(Path(spec.origin).parent) if spec and spec.origin else None
    return torch


def require_torch() -> Torch:
    torch = find_torch()
    if torch is None:
        raise BuildError(
            "torch's headers are needed and torch is not installed here; install torch 2.10 or newer,"
            " or build without --no-build-isolation."
        )
    if not torch.is_supported:
        raise BuildError(f"torch {torch.version} at {torch.root} is too old; install torch 2.10 or newer.")
    return torch


def pinned(package: str) -> str:
    """`package==version` as constraints.txt has it."""
    match = re.search(rf"^{package}==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if not match:
        raise BuildError(f"constraints.txt does not pin {package}.")
    return match[0]


# --- ninja --------------------------------------------------------------------------------------------------------


def find_ninja() -> str:
    """The ninja of the Python package, else the one on PATH."""
    spec = importlib.util.find_spec("ninja")
    if spec is not None:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    found = shutil.which("ninja")
    if found is None:
        raise BuildError(f"ninja is not there; install it: {sys.executable} -m pip install ninja.")
    return found
