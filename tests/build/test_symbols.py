"""What the built files need from outside and what they define.

Fails when a source starts to use torch's C++ ABI (c10::, at::), Python, or anything else that another torch or another
machine may lack; or when a per-ISA object defines a symbol that the linker may take for everybody (weak), so that an
older CPU would run AVX-512 instructions.
"""

import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

import cnnfast

PACKAGE = Path(cnnfast.__file__).parent
OBJECTS = Path(__file__).parents[2] / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"

# Undefined symbols that any Linux machine with torch >= 2.10 resolves.
STABLE_ABI = r"(aoti_torch|torch)_\w+"  # the C shim
VERSIONED = r"(GLIBC|GLIBCXX|CXXABI|GCC|GOMP|OMP)_"  # libc, libm, libstdc++, libgcc and libgomp; torch and Python: none
TOOLCHAIN = ("_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__")


def nm(path: Path, *options: str) -> list[list[str]]:
    said = subprocess.run(["nm", *options, str(path)], check=True, capture_output=True, text=True).stdout
    return [line.split(maxsplit=2 if line[0] != " " else 1) for line in said.splitlines() if line.strip()]


def undefined(path: Path) -> list[str]:
    """Undefined dynamic symbols, weak ones too, with the version that the linker recorded (name@GLIBC_2.34)."""
    return [row[-1] for row in nm(path, "-D", "--undefined-only")]


def check_undefined(path: Path) -> None:
    unexpected = []
    for symbol in undefined(path):
        name, _, version = symbol.partition("@")
        fine = re.fullmatch(STABLE_ABI, name) or re.match(VERSIONED, version.lstrip("@")) or name in TOOLCHAIN
        if not fine:
            unexpected.append(symbol)
    assert not unexpected, f"{path.name} needs {unexpected}"


def test_ops_library_needs_only_the_stable_abi_and_libc():
    check_undefined(PACKAGE / "libcnnfast_ops.so")


def test_ops_library_uses_torch():
    assert any(symbol.startswith("aoti_torch_") for symbol in undefined(PACKAGE / "libcnnfast_ops.so"))


def test_cuda_library_needs_only_the_stable_abi_and_libc():
    library = PACKAGE / "libcnnfast_cuda.so"
    if not library.exists():
        pytest.skip("libcnnfast_cuda.so was not built here; tests/build/test_wheel.py (slow) builds and checks it")
    check_undefined(library)


def test_bindings_are_free_of_torch():
    needed = [row[-1] for row in nm(next(PACKAGE.glob("_C.*.so")), "-D", "--undefined-only")]
    assert not [name for name in needed if re.match(r"(aoti_torch|torch)_|_ZN?K?(3c10|2at|5torch)", name)]


@pytest.fixture(params=cnnfast._library._C.isas_built)
def isa_object(request) -> Path:
    path = OBJECTS / f"isa_{request.param}.o"
    assert path.exists(), f"{path} is missing: the tests look at the objects of `pip install -e .` in this checkout"
    return path


def test_isa_objects_define_no_weak_symbol(isa_object):
    weak = [row[-1] for row in nm(isa_object, "--defined-only") if row[1] in "vVwWuU"]
    assert not weak, f"{isa_object.name} defines {weak}"


def test_isa_objects_define_their_kernels(isa_object):
    isa = isa_object.stem.removeprefix("isa_")
    defined = [row[-1] for row in nm(isa_object, "--defined-only", "--extern-only", "-C")]
    assert defined and all(f"cnnfast::{isa}::" in name for name in defined), defined


def test_only_the_avx_objects_use_wide_registers():
    """The other half: whatever is not chosen at run time has to run on any x86-64 CPU."""
    objects = [path for path in OBJECTS.rglob("*.o") if path.stem not in ("isa_avx2", "isa_avx512", "isa_amx")]
    assert objects, f"no objects in {OBJECTS}"
    for path in objects:
        code = subprocess.run(["objdump", "-d", str(path)], check=True, capture_output=True, text=True).stdout
        wide = [line.strip() for line in code.splitlines() if re.search(r"%[yz]mm\d", line)]
        assert not wide, f"{path.name}: {wide[:3]}"
