"""What `import cnnfast` says where something is missing, and which ISA it takes.

Fails when a missing or unfit file is found only at the first call, or as a traceback without a remedy.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fresh import run_fresh

import cnnfast

_C = cnnfast._library._C
PACKAGE = Path(cnnfast.__file__).parent
IMPORT = "try:\n    import cnnfast\nexcept ImportError as e: print(e)\nelse: print('imported')\n"


def say(code: str, path: Path | None = None, **environment: str) -> str:
    """Output of Python code in a process that has imported torch and nothing else."""
    return run_fresh(code, path, **environment)[0]


def say_without_torch(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def unbuilt(tmp_path) -> Path:
    """A folder with the package as it is before the build."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "cnnfast", ignore=ignore)
    return tmp_path


def test_torch_is_missing():
    said = say_without_torch("import sys; sys.modules['torch'] = None\n" + IMPORT)
    assert said == "cnnfast needs torch 2.10 or newer, and torch is not installed: pip install torch"


def test_torch_is_too_old():
    fake = "import sys, types; sys.modules['torch'] = types.SimpleNamespace(__version__='2.9.1+cpu')"
    said = say_without_torch(f"{fake}\n{IMPORT}")
    assert said == "cnnfast needs torch 2.10 or newer; this is torch 2.9.1+cpu: pip install -U torch"


def test_bindings_are_missing(unbuilt):
    said = say(IMPORT, unbuilt)
    assert said.startswith(f"cnnfast is not built: {unbuilt / 'cnnfast' / '_C'}") and "pip install -e ." in said


def test_bindings_are_for_another_python(unbuilt):
    (unbuilt / "cnnfast" / "_C.cpython-27-x86_64-linux-gnu.so").touch()
    assert "(there is _C.cpython-27-x86_64-linux-gnu.so, for another Python)" in say(IMPORT, unbuilt)


def test_ops_library_is_missing(unbuilt):
    for extension in PACKAGE.glob("_C.*.so"):
        shutil.copy(extension, unbuilt / "cnnfast")
    said = say(IMPORT, unbuilt)
    assert "libcnnfast_ops.so is missing" in said and "pip install -e ." in said


def test_ops_library_is_unfit(unbuilt):
    for extension in PACKAGE.glob("_C.*.so"):
        shutil.copy(extension, unbuilt / "cnnfast")
    (unbuilt / "cnnfast" / "libcnnfast_ops.so").write_text("not a library")
    said = say(IMPORT, unbuilt)
    assert "libcnnfast_ops.so does not load beside torch" in said and "pip install -e ." in said


def test_import_asks_no_driver():
    """Nothing touches a GPU at import: a process that forks afterwards, or has none, is none the worse."""
    assert say("import cnnfast, torch; print(torch.cuda.is_initialized())") == "False"


def test_generic_can_be_asked_for():
    assert say("import cnnfast; print(cnnfast._library._C.isa)", CNNFAST_ISA="generic") == "generic"


def test_best_isa_is_taken():
    usable = [isa for isa in _C.isas_built if isa in _C.cpu_features]
    assert say("import cnnfast; print(cnnfast._library._C.isa)", CNNFAST_ISA="") == usable[-1]


def test_unknown_isa_is_named():
    assert "CNNFAST_ISA is 'sse9'; it can be one of: generic, avx2, avx512" in say(IMPORT, CNNFAST_ISA="sse9")


def test_isa_that_the_cpu_lacks():
    lacking = [isa for isa in _C.isas_built if isa not in _C.cpu_features]
    if not lacking:
        pytest.skip(f"this CPU has every ISA that was built ({', '.join(_C.isas_built)})")
    assert f"CNNFAST_ISA={lacking[0]} can't run: this CPU lacks it" in say(IMPORT, CNNFAST_ISA=lacking[0])


def test_packed_bytes():
    # depthwise 3x3 of 20 channels: header + (bias + 9 taps) * 32 floats, channels rounded up to panels of 16
    assert _C.packed_bytes(1, 20, 20, 20, 3, 3, 4) == 64 + 10 * 32 * 4
    with pytest.raises(ValueError, match="op is 9; expected a code of"):
        _C.packed_bytes(9, 1, 1, 1, 1, 1, 4)
