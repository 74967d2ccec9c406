"""libcnnfast_ops.so built with CNNFAST_SANITIZE, loaded beside torch: the ops run under ASan + UBSan and under TSan.

torch itself isn't instrumented: what is seen is what the kernels and their callers in csrc/cpu do, on memory that torch
allocates (the sanitizers' runtimes are preloaded). Not seen: tiles of AMX; tests/cpu_host has guard pages for those.

Fails on an access outside of a tensor, undefined behaviour, or a race in what ops/sample.py runs, or where a planted
out-of-bounds read or race isn't reported.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from build_backend.command import SANITIZERS, build, build_folder
from build_backend.toolchain import ROOT, find_compiler, find_ninja, output_of
from cnnfast import _C

pytestmark = pytest.mark.slow  # minutes of compilation, unless the build folder has the objects
TESTS = ROOT / "tests"
SAMPLE = TESTS / "ops" / "sample.py"
BEST = [isa for isa in _C.isas_built if isa in _C.cpu_features][-1]
RUNTIMES = {"address,undefined": ("libasan.so", "libubsan.so", "libstdc++.so"), "thread": ("libtsan.so",)}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",  # Python's and torch's
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1",
}
FAULTS = {  # sanitizer: file of csrc/cpu, what stands there, what stands there instead, what is reported
    "address,undefined": ("stages.cpp", "t.height = conv.h;", "t.height = conv.h + 1;", "heap-buffer-overflow"),
    "thread": ("products.cpp", "std::min(block * unit, whole", "std::min(block * unit + 1, whole", "data race"),
}


def package(folder: Path) -> Path:
    """A folder for PYTHONPATH in which cnnfast is this checkout's, but for what is built."""
    (folder / "cnnfast").mkdir(parents=True)
    for path in (ROOT / "cnnfast").iterdir():
        if path.suffix != ".so" and path.name not in ("__pycache__", "_build.json"):
            (folder / "cnnfast" / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module", params=SANITIZERS)
def sanitizer(request) -> str:
    missing = [name for name in RUNTIMES[request.param] if not runtime(name).is_absolute()]
    if missing:
        pytest.skip(f"{find_compiler().version} has no {', '.join(missing)}")
    return request.param


@pytest.fixture(scope="module")
def built(sanitizer, tmp_path_factory) -> Path:
    folder = package(tmp_path_factory.mktemp("sanitized"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CNNFAST_SANITIZE", sanitizer)
        patch.setenv("CNNFAST_CUDA", "0")
        build(folder / "cnnfast")
    return folder


def runtime(name: str) -> Path:
    """The compiler's copy of a library, or the bare name where it has none."""
    return Path(output_of(*find_compiler().command, f"-print-file-name={name}")[1].strip())


def sample(folder: Path, sanitizer: str, isa: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        **OPTIONS,
        "CNNFAST_ISA": isa,
        "OMP_NUM_THREADS": "3",
        "LD_PRELOAD": " ".join(str(runtime(name)) for name in RUNTIMES[sanitizer]),
        "PYTHONPATH": os.pathsep.join(map(str, (folder, TESTS, ROOT))),
    }
    command = [sys.executable, str(SAMPLE), isa, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)


@pytest.mark.parametrize("isa", dict.fromkeys(("generic", BEST)))
def test_ops(built, sanitizer, isa):
    done = sample(built, sanitizer, isa, "100")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:6000]
    assert done.stdout.endswith(f"{built / 'cnnfast'}: ok\n")


def test_planted_fault_is_found(built, sanitizer, tmp_path, monkeypatch, request):
    """In a copy of the build folder, with one changed source: the rest is linked as it is."""
    file, sound, faulty, report = FAULTS[sanitizer]
    monkeypatch.setenv("CNNFAST_SANITIZE", sanitizer)
    objects, sources = build_folder().with_name(f"{build_folder().name}-faulty"), tmp_path / "csrc" / "cpu"
    request.addfinalizer(lambda: shutil.rmtree(objects))
    shutil.copytree(build_folder(), objects, symlinks=True)  # beside it: ccache has relative paths written
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    text = (sources / file).read_text()
    assert text.count(sound) == 1
    (sources / file).write_text(text.replace(sound, faulty))
    plan = (objects / "build.ninja").read_text()
    (objects / "build.ninja").write_text(plan.replace(str(ROOT / "csrc" / "cpu" / file), str(sources / file)))
    status, said = output_of(find_ninja(), "-C", objects, "libcnnfast_ops.so")
    assert status == 0, said[-4000:]
    folder = package(tmp_path / "package")
    for library in (objects / "libcnnfast_ops.so", *(built / "cnnfast").glob("_C*.so")):
        shutil.copy2(library, folder / "cnnfast")
    done = sample(folder, sanitizer, "generic", "100")  # on a busy machine one thread may do all of a small op's tasks
    assert done.returncode != 0 and report in done.stderr, done.stdout[-2000:] + done.stderr[-4000:]
