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
from symbols import STABLE_ABI, foreign, nm, undefined, weak

import cnnfast
from build_backend.toolchain import ISAS, find_compiler, output_of

PACKAGE = Path(cnnfast.__file__).parent
OBJECTS = Path(__file__).parents[2] / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"


def test_ops_library_needs_only_the_stable_abi_and_libc():
    assert foreign(PACKAGE / "libcnnfast_ops.so") == []


def test_ops_library_uses_torch():
    assert any(re.match(STABLE_ABI, symbol) for symbol in undefined(PACKAGE / "libcnnfast_ops.so"))


def test_cuda_library_needs_only_the_stable_abi_and_libc():
    library = PACKAGE / "libcnnfast_cuda.so"
    if not library.exists():
        pytest.skip("libcnnfast_cuda.so was not built here; tests/build/test_wheel.py (slow) builds and checks it")
    assert foreign(library) == []


def test_bindings_are_free_of_torch():
    needed = foreign(next(PACKAGE.glob("_C.*.so")))
    assert needed and [name for name in needed if not re.match(r"_?Py", name)] == []


@pytest.fixture(params=cnnfast._library._C.isas_built)
def isa_object(request) -> Path:
    path = OBJECTS / f"isa_{request.param}.o"
    assert path.exists(), f"{path} is missing: the tests look at the objects of `pip install -e .` in this checkout"
    return path


def test_isa_objects_define_no_weak_symbol(isa_object):
    assert weak(isa_object) == []


def test_a_weak_symbol_is_found(tmp_path):
    """What std::vector in a kernel would be: an inline function that is called, not inlined."""
    source = "template <class T> T twice(T x) { return x + x; } int f(int x) { return twice(x); }"
    planted = tmp_path / "planted.o"
    status, said = output_of(*find_compiler().command, "-O0", "-x", "c++", "-c", "-", "-o", planted, stdin=source)
    assert status == 0, said
    assert weak(planted) == ["_Z5twiceIiET_S0_"]


def test_isa_objects_define_their_kernels_and_nothing_else(isa_object):
    isa = isa_object.stem.removeprefix("isa_")
    defined = [name for _, name in nm(isa_object, "--defined-only", "--extern-only", "-C")]
    assert defined and [name for name in defined if f"cnnfast::{isa}::" not in name] == []


def test_only_the_wide_objects_use_wide_registers():
    """The other half: whatever is not chosen at run time has to run on any x86-64 CPU."""
    wide_ones = [f"isa_{isa.name}" for isa in ISAS if isa.flags]
    objects = [path for path in OBJECTS.rglob("*.o") if path.stem not in wide_ones]
    assert objects, f"no objects in {OBJECTS}"
    for path in objects:
        code = subprocess.run(["objdump", "-d", str(path)], check=True, capture_output=True, text=True).stdout
        wide = [line.strip() for line in code.splitlines() if re.search(r"%[yz]mm\d", line)]
        assert not wide, f"{path.name}: {wide[:3]}"
