"""Builds the torch-free test programs of this folder with the CPU kernels, for this machine or for aarch64."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

from build_backend.command import CXX_FLAGS
from build_backend.toolchain import ISAS, ROOT, find_compiler, output_of
from cnnfast import _C

HERE = Path(__file__).parent
OBJECTS = ROOT / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"  # of `pip install -e .` in this checkout
KERNELS = ROOT / "csrc" / "cpu" / "kernels"
SANITIZED = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
AARCH64 = "aarch64-linux-gnu-g++"


def qemu(machine: str) -> str | None:
    """qemu-user for a machine, which runs that machine's programs here."""
    return shutil.which(f"qemu-{machine}-static") or shutil.which(f"qemu-{machine}")


CAN_RUN_AARCH64 = bool(qemu("aarch64") and shutil.which(AARCH64))
BUILT = [isa for isa in ISAS if isa.name in _C.isas_built]


def compile_(command: tuple[str, ...], *arguments: str | Path) -> None:
    status, said = output_of(*command, *CXX_FLAGS, *arguments)
    assert status == 0, said[-4000:]


def program(folder: Path, name: str) -> Path:
    """NAME.cpp linked with the objects of all ISAs that were built."""
    objects = [OBJECTS / f"isa_{isa.name}.o" for isa in BUILT]
    macros = [f"-D{isa.macro}" for isa in BUILT]
    compile_(find_compiler().command, "-O1", *macros, HERE / f"{name}.cpp", *objects, "-o", folder / name)
    return folder / name


def program_with(
    folder: Path, name: str, isa: str, *flags: str, kernels: Path = KERNELS, command: tuple[str, ...] | None = None
) -> Path:
    """NAME.cpp and the kernels of one ISA, both compiled with `flags`."""
    command = command or find_compiler().command
    (chosen,) = (each for each in ISAS if each.name == isa)
    obj = folder / f"isa_{isa}.o"
    compile_(command, *flags, *chosen.flags, f"-DCNNFAST_ISA={isa}", "-c", kernels / "isa.cpp", "-o", obj)
    compile_(command, *flags, f"-D{chosen.macro}", HERE / f"{name}.cpp", obj, "-o", folder / name)
    return folder / name


def aarch64_program(folder: Path, name: str) -> Path:
    """NAME.cpp and the generic kernels for aarch64; static, so that qemu-user needs no libraries of that machine."""
    return program_with(folder, name, "generic", "-O2", "-static", command=(AARCH64,))


def run(*command: str | Path, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=timeout, env=environment or None
    )
