"""The same built files in other environments (slow: a whole build, and a second torch of 5.5 GB).

One wheel is built offline, without isolation, with the CUDA part where nvcc is; then it is looked into, and loaded
beside this torch and beside a CUDA build of another torch version. CNNFAST_TEST_TORCH_VENV names a virtual environment
with torch 2.14.1 to use instead of making one.

Fails when the build reaches for the network, when a file is missing from the wheel, or when what was built here does
not load or computes something else beside another torch.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from symbols import foreign

from build_backend.cuda import find_nvcc
from cnnfast.ops import cuda_kernels

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SMOKE = Path(__file__).with_name("smoke.py")
OTHER_TORCH = "torch==2.14.1"


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what a clone would have, without anything built."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    with_cuda = "1" if find_nvcc() else "0"
    offline = ["--no-index", "--no-build-isolation", "--no-deps"]
    run(
        *(sys.executable, "-m", "pip", "wheel", *offline, "-w", folder, checkout),
        CNNFAST_CUDA=with_cuda,
        CNNFAST_CUDA_ARCHS="80,90a",
    )
    (built,) = folder.glob("cnnfast-*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def smoke(python: Path | str, packages: Path) -> dict:
    """Facts of the ops in `packages`, run by another Python, with this checkout out of sight."""
    return json.loads(run(python, SMOKE, cwd=packages, PYTHONPATH=str(packages)).splitlines()[-1])


def test_wheel_is_whole(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    extension = f"cnnfast/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    expected = {extension, "cnnfast/libcnnfast_ops.so", "cnnfast/_build.json", "cnnfast/py.typed"}
    for folder, inside in {"cnnfast": "cnnfast", "kernels": "cnnfast/kernels", "bench": "cnnfast/bench"}.items():
        expected |= {f"{inside}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*.py")}
    assert expected - names == set()
    assert any(name.endswith("LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"cnnfast"}  # no bare `kernels`, no tests


def test_wheel_runs_beside_this_torch(unpacked):
    facts = smoke(sys.executable, unpacked)
    assert facts["torch"] == torch.__version__ and facts["from"] == str(unpacked / "cnnfast")
    assert facts["error"] < 1e-4


@pytest.fixture(scope="module")
def other_python(tmp_path_factory) -> Path:
    """The Python of an environment with another torch, a CUDA build."""
    named = os.environ.get("CNNFAST_TEST_TORCH_VENV")
    folder = Path(named) if named else tmp_path_factory.mktemp("venv") / "torch"
    python = folder / "bin" / "python"
    if not named:
        venv.create(folder, with_pip=True)
        run(python, "-m", "pip", "install", OTHER_TORCH, "numpy", "rich")
    return python


def test_wheel_runs_beside_another_torch(unpacked, other_python):
    facts = smoke(other_python, unpacked)
    assert facts["torch"].startswith(OTHER_TORCH.removeprefix("torch==")) and facts["from"] == str(unpacked / "cnnfast")
    assert facts["error"] < 1e-4
    if (unpacked / "cnnfast" / "libcnnfast_cuda.so").exists():
        assert facts["cuda_missing"] is None and facts["cuda_kernels"] == [*cuda_kernels.KERNELS]
    else:
        assert facts["cuda_missing"] == "the CUDA kernels were not built"


def test_cuda_library_built_beside_a_cpu_torch(unpacked):
    if not find_nvcc():
        pytest.skip("no nvcc here")
    library = unpacked / "cnnfast" / "libcnnfast_cuda.so"
    assert foreign(library) == []
    assert json.loads((unpacked / "cnnfast" / "_build.json").read_text())["cuda_arches"] == ["80", "90a"]
    assert ".nv_fatbin" in run("readelf", "-SW", library)
    needed = run("readelf", "-dW", library)
    assert "libcudart" not in needed  # static: another torch brings another one
    assert all(f"[{name}]" in needed for name in ("libtorch.so", "libtorch_cpu.so", "libc10.so"))


def test_editable_install_offline(checkout, wheel, tmp_path):
    """After the wheel, in the same checkout: ninja has nothing left to compile, the files go beside the sources."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    ours = [path for path in sys.path if path.endswith("site-packages")]  # this environment's torch, setuptools, ninja
    (site / "ours.pth").write_text("\n".join(ours))
    offline = ["--no-index", "--no-build-isolation", "--no-deps"]
    run(python, "-m", "pip", "install", *offline, "-e", checkout, CNNFAST_CUDA="0")
    facts = json.loads(run(python, SMOKE, cwd=tmp_path).splitlines()[-1])
    assert facts["from"] == str(checkout / "cnnfast") and facts["error"] < 1e-4
