"""What the build does on machines unlike this one: no compiler, an old one, no nvcc, a wrapped nvcc, no torch.

Fails when such a machine would get a traceback, a wrong choice, or a sentence that doesn't say what to install.
"""

import os
from pathlib import Path

import pytest

from build_backend import backend, command, cuda, toolchain

CPU_TORCH = toolchain.Torch(Path("/nowhere/torch"), "2.13.0+cpu", None)
CUDA_TORCH = toolchain.Torch(Path("/nowhere/torch"), "2.14.1", "13.0")
OLD_TORCH = toolchain.Torch(Path("/nowhere/torch"), "2.9.1", None)
CU = [Path("depthwise_conv2d.cu")]


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine with nothing on PATH but what the test puts into the returned folder."""
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "CNNFAST_CUDA", "CNNFAST_CUDA_ARCHS", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_no_compiler_says_what_to_install(bare):
    with pytest.raises(SystemExit, match=r"there is no C\+\+ compiler on PATH; install g\+\+ 11 or newer"):
        toolchain.find_compiler()


def test_cxx_that_is_not_there(bare, monkeypatch):
    monkeypatch.setenv("CXX", "g++-99")
    with pytest.raises(SystemExit, match=r"CXX names 'g\+\+-99', which is not there; install g\+\+"):
        toolchain.find_compiler()


def test_compiler_without_cpp20(bare):
    script(bare / "c++", 'case "$*" in *--version*) echo "c++ 8.3.0";; *) echo "error: c++20?"; exit 1;; esac')
    with pytest.raises(SystemExit, match=r"c\+\+ \(c\+\+ 8.3.0\) does not compile C\+\+20 .*install g\+\+ 11"):
        toolchain.find_compiler()


def test_isa_that_the_compiler_lacks_is_dropped_with_a_note(bare, monkeypatch):
    script(bare / "c++", 'case "$*" in *avx512*) echo "error: unknown -mavx512f"; exit 1;; esac')
    monkeypatch.setattr(toolchain.platform, "machine", lambda: "x86_64")
    isas, notes = toolchain.usable_isas(toolchain.Compiler(("c++",), "c++ 4.8"))
    assert [isa.name for isa in isas] == ["generic", "avx2"]
    said = "kernels left out: c++ 4.8 says: error: unknown -mavx512f"
    assert notes == [f"avx512 {said}", f"amx {said}"]


def test_aarch64_builds_generic_alone(monkeypatch):
    monkeypatch.setattr(toolchain.platform, "machine", lambda: "aarch64")
    isas, notes = toolchain.usable_isas(toolchain.Compiler(("false",), "none"))
    assert [isa.name for isa in isas] == ["generic"] and notes == []


def test_generic_objects_get_no_instruction_set_flags():
    assert toolchain.ISAS[0].name == "generic" and toolchain.ISAS[0].flags == ()


def test_cuda_is_left_out_beside_a_cpu_torch(bare):
    found, reason = cuda.find_cuda(CPU_TORCH, CU)
    assert found is None and "not a CUDA build" in reason


def test_no_nvcc_beside_a_cuda_torch_is_a_note(bare):
    found, reason = cuda.find_cuda(CUDA_TORCH, CU)
    assert found is None and "nvcc is neither in CUDA_HOME nor on PATH" in reason


def test_no_nvcc_where_cuda_is_asked_for_is_an_error(bare, monkeypatch):
    monkeypatch.setenv("CNNFAST_CUDA", "1")
    with pytest.raises(SystemExit, match=r"CNNFAST_CUDA=1 needs nvcc.*install the CUDA toolkit"):
        cuda.find_cuda(CPU_TORCH, CU)


def test_cuda_switch_takes_0_1_or_nothing(bare, monkeypatch):
    monkeypatch.setenv("CNNFAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="CNNFAST_CUDA is 'yes'; it can be 0"):
        cuda.find_cuda(CUDA_TORCH, CU)


@pytest.fixture
def toolkit(bare, tmp_path):
    """A toolkit that knows sm_80 to sm_90, and a wrapper for its nvcc on PATH."""
    real = tmp_path / "toolkit" / "bin"
    script(
        real / "nvcc",
        f"""case "$*" in
  *--dryrun*) echo '#$ _HERE_={real}';;
  *--list-gpu-arch*) printf 'compute_80\\ncompute_86\\ncompute_90\\n';;
  *--version*) echo 'Cuda compilation tools, release 12.4, V12.4.131';;
esac""",
    )
    script(bare / "nvcc", f'exec {real}/nvcc "$@"')
    return real / "nvcc"


def test_nvcc_is_found_behind_its_wrapper(toolkit):
    found, reason = cuda.find_cuda(CUDA_TORCH, CU)
    assert found == cuda.Cuda(toolkit, "12.4.131", ("80", "86", "90a")) and reason == ""
    assert found.gencode_flags[-1] == "-gencode=arch=compute_86,code=compute_86"  # PTX, for what comes after


def test_cuda_home_comes_before_path(toolkit, tmp_path, monkeypatch):
    other = script(tmp_path / "other" / "bin" / "nvcc", "exit 0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "other"))
    assert cuda.find_nvcc() == other


def test_arches_can_be_chosen(toolkit, monkeypatch):
    monkeypatch.setenv("CNNFAST_CUDA_ARCHS", "80;90a")
    assert cuda.usable_arches(toolkit) == ("80", "90a")


def test_an_arch_that_the_toolkit_lacks_is_named(toolkit, monkeypatch):
    monkeypatch.setenv("CNNFAST_CUDA_ARCHS", "80,100")
    with pytest.raises(SystemExit, match=r"CNNFAST_CUDA_ARCHS asks for 100, which .* does not know; .*80, 86, 90"):
        cuda.usable_arches(toolkit)


@pytest.mark.parametrize("hook", ["get_requires_for_build_wheel", "get_requires_for_build_editable"])
@pytest.mark.parametrize(("torch", "asks"), [(None, True), (OLD_TORCH, True), (CPU_TORCH, False), (CUDA_TORCH, False)])
def test_isolated_build_asks_for_torch_only_where_there_is_none(monkeypatch, hook, torch, asks):
    monkeypatch.setattr(backend, "find_torch", lambda: torch)
    monkeypatch.setattr(backend.build_meta, hook, lambda config_settings: ["wheel"])
    wanted = getattr(backend, hook)()
    assert wanted == (["wheel", toolchain.pinned("torch")] if asks else ["wheel"])


def test_torch_of_the_target_environment_is_read_without_importing_it(monkeypatch, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.11.0+cu128'\ncuda = '12.8'\n")
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemError('imported')\n")
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path))
    assert toolchain.find_torch() == toolchain.Torch(tmp_path / "torch", "2.11.0+cu128", "12.8")


@pytest.mark.parametrize(("torch", "sentence"), [(None, "torch is not installed here"), (OLD_TORCH, "2.9.1.*too old")])
def test_no_torch_without_isolation(monkeypatch, torch, sentence):
    monkeypatch.setattr(toolchain, "find_torch", lambda: torch)
    with pytest.raises(SystemExit, match=f"{sentence}.*install torch 2.10 or newer"):
        toolchain.require_torch()


def test_jobs_follow_memory_and_max_jobs(monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert command.jobs(1e6) == 1
    assert command.jobs(1e-6) == len(os.sched_getaffinity(0))
    monkeypatch.setenv("MAX_JOBS", "7")
    assert command.jobs(1e6) == 7


PAGES = {"SC_AVPHYS_PAGES": 5 * 2**20, "SC_PAGE_SIZE": 1024}  # 5 GiB


@pytest.mark.parametrize(
    ("meminfo", "pages", "jobs"),
    [
        ("MemTotal: 24117248 kB\nMemFree:   5242880 kB\nMemAvailable:   13631488 kB\nCached: 8388608 kB\n", PAGES, 6),
        ("MemTotal: 24117248 kB\nMemFree:   5242880 kB\n", PAGES, 2),  # Linux before 3.14
        (None, PAGES, 2),
        (None, {}, 8),
    ],
    ids=("Linux", "old Linux", "no meminfo", "neither"),
)
def test_jobs_take_memory_that_caches_would_give_up(meminfo, pages, jobs, monkeypatch, tmp_path):
    def sysconf(name):
        if name in pages:
            return pages[name]
        raise ValueError("unrecognized configuration name")

    if meminfo is not None:
        (tmp_path / "meminfo").write_text(meminfo)
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(command, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(os, "sysconf", sysconf)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert command.jobs(2) == jobs
