"""The `build_ext` command: generates the ninja file, runs it, puts the libraries and _build.json into the package."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools.command.build_ext import build_ext

from build_backend.cuda import Cuda, find_cuda
from build_backend.ninja_file import CUDA_RULES, RULES, NinjaFile
from build_backend.toolchain import (
    CXX_STANDARD,
    ROOT,
    BuildError,
    Compiler,
    Isa,
    Torch,
    find_compiler,
    find_ninja,
    require_torch,
    usable_isas,
)

CSRC = ROOT / "csrc"
STABLE_ABI = ("-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000")
# g++'s own std::optional and AVX-512 headers set off these two, megabytes of it (GCC bug 105593); clang++ does not know
# the second. The third warns of the ABI of functions that pass vectors: ours are static.
QUIET = ("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi", "-Wno-unknown-warning-option")
CXX_FLAGS = (CXX_STANDARD, "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", *QUIET, f"-I{CSRC}")
SANITIZERS = ("address,undefined", "thread")
# Of kernels that sanitizers watch: compiled quickly, since they are run a little.
SANITIZED_FLAGS = ("-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
LINK_FLAGS = ("-Wl,-z,defs", "-Wl,--as-needed")  # an undefined symbol is found here, not at the first call
MEMINFO = Path("/proc/meminfo")
EXTENSION = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def sources(pattern: str) -> list[Path]:
    return sorted(CSRC.glob(pattern))


def linked(folder: Path, name: str, target: Path) -> str:
    """A link in the build folder, by which commands name what lies elsewhere: the headers of an isolated build lie in a
    new temporary folder each time, and ninja compiles again whatever has another command line."""
    link = folder / name
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    return name


def sanitizer_flags() -> list[str]:
    """What $CNNFAST_SANITIZE asks for, of the compiler and of the linker."""
    wish = os.environ.get("CNNFAST_SANITIZE", "")
    if wish not in ("", *SANITIZERS):
        raise BuildError(f"CNNFAST_SANITIZE is {wish!r}; it can be {' or '.join(SANITIZERS)}, or unset.")
    return [*SANITIZED_FLAGS, f"-fsanitize={wish}"] if wish else []


def object_of(source: Path) -> str:
    return str(source.relative_to(CSRC).with_suffix(".o"))


def plan(
    folder: Path, compiler: Compiler, isas: list[Isa], torch: Torch, cuda: Cuda | None
) -> tuple[NinjaFile, list[str]]:
    """The ninja file and the names of the libraries that it makes in `folder`."""
    import pybind11

    ninja = NinjaFile()
    ninja.rules(RULES.format(cxx=" ".join(compiler.command)))
    have = [f"-D{isa.macro}" for isa in isas]
    sanitized = sanitizer_flags()

    pybind = linked(folder, f"pybind11-{pybind11.__version__}", Path(pybind11.get_include()))
    python_includes = [f"-isystem {pybind}", f"-isystem {sysconfig.get_path('include')}"]
    bindings = [
        ninja.build("cxx", object_of(source), [source], [*CXX_FLAGS, *have, *python_includes])
        for source in [*sources("bindings.cpp"), *sources("watch.cpp")]
    ]
    ninja.build("link", EXTENSION, bindings, ["-Wl,--as-needed"])  # Python's symbols come from the interpreter

    torch_root = linked(folder, f"torch-{torch.version}", torch.root)
    torch_flags = [*STABLE_ABI, f"-isystem {torch_root}/include"]
    objects = [
        ninja.build("cxx", object_of(source), [source], [*CXX_FLAGS, *sanitized, *have, *torch_flags])
        for source in [*sources("ops.cpp"), *sources("cpu/*.cpp")]
    ]
    # Without exceptions: their personality routine would be a symbol that the linker may take from any of the objects.
    kernel_flags = [*CXX_FLAGS, *sanitized, "-fno-exceptions"]
    objects += [
        ninja.build("cxx", f"isa_{isa.name}.o", [source], [*kernel_flags, f"-DCNNFAST_ISA={isa.name}", *isa.flags])
        for isa in isas
        for source in sources(f"cpu/kernels/{isa.source}")
    ]
    # libstdc++ first: torch's libraries export some of its symbols, and another torch may not.
    torch_libraries = ["-lstdc++", f"-L{torch_root}/lib", "-ltorch_cpu", "-lc10"]
    ninja.build("link", "libcnnfast_ops.so", objects, [*LINK_FLAGS, *sanitized, *torch_libraries])
    libraries = [EXTENSION, "libcnnfast_ops.so"]

    if cuda is not None:
        ninja.rules(CUDA_RULES.format(nvcc=cuda.nvcc))
        host = [f"-ccbin {compiler.command[0]}", "-Xcompiler -fPIC,-fvisibility=hidden,-Wall", CXX_STANDARD, "-O3"]
        flags = [*host, "-DUSE_CUDA", f"-I{CSRC}", *torch_flags, "--threads 1", *cuda.gencode_flags]
        objects = [
            ninja.build("cxx", object_of(source), [source], [*CXX_FLAGS, "-DUSE_CUDA", *torch_flags])
            for source in sources("cuda/*.cpp")
        ]
        objects += [ninja.build("nvcc", object_of(source), [source], flags) for source in sources("cuda/**/*.cu")]
        needed = ["-lstdc++", "-Xlinker --no-as-needed", f"-L{torch_root}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
        ninja.build("nvcc_link", "libcnnfast_cuda.so", objects, ["-cudart static", *needed])
        libraries.append("libcnnfast_cuda.so")
    return ninja, libraries


def jobs(gigabytes_each: float) -> int:
    """As many as cores and available memory allow; $MAX_JOBS overrides."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    available = available_gigabytes()
    return cores if available is None else max(1, min(cores, int(available / gigabytes_each)))


def available_gigabytes() -> float | None:
    """Memory that compilers could have; None where the system doesn't say.

    Linux counts the files it has cached as used in SC_AVPHYS_PAGES, and in MemAvailable what it would give up of them.
    """
    if MEMINFO.exists() and (line := re.search(r"^MemAvailable: *(\d+) kB$", MEMINFO.read_text(), re.M)):
        return int(line[1]) / 2**20
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        return None


def build_folder() -> Path:
    """Where objects are kept between builds; those of a sanitizer in a folder of their own."""
    wish = os.environ.get("CNNFAST_SANITIZE", "").replace(",", "-")
    return ROOT / "build" / "-".join(filter(None, ("ninja", sysconfig.get_config_var("SOABI"), wish)))


def build(destination: Path) -> list[Path]:
    """Builds everything that this machine can into `destination` (the package's folder); returns the files."""
    compiler, torch = find_compiler(), require_torch()
    isas, notes = usable_isas(compiler)
    cuda, reason = find_cuda(torch, sources("cuda/**/*.cu"))
    if cuda is None:
        notes.append(f"CUDA kernels left out: {reason}")
    if sanitizer_flags():
        notes.append(f"CPU kernels built with -fsanitize={os.environ['CNNFAST_SANITIZE']}, for tests")

    folder = build_folder()
    folder.mkdir(parents=True, exist_ok=True)
    ninja, libraries = plan(folder, compiler, isas, torch, cuda)
    ninja.write(folder / "build.ninja")
    command = [find_ninja(), "-C", str(folder), "-j", str(jobs(4 if cuda else 2)), *libraries]
    status = subprocess.run(command, env={**os.environ, "NINJA_STATUS": "[%f/%t] %es "}).returncode
    if status:
        raise BuildError(f"the build failed (ninja's exit status {status}); the compiler's message is above.")

    destination.mkdir(parents=True, exist_ok=True)
    for name in libraries:
        staged = destination / f"{name}.new"  # renamed into place: a process that has the old file mapped keeps it
        shutil.copy2(folder / name, staged)
        staged.replace(destination / name)
    if cuda is None:
        (destination / "libcnnfast_cuda.so").unlink(missing_ok=True)  # from an earlier build: no longer these sources
    facts = {
        "compiler": compiler.version,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch_headers": torch.version,
        "isas": [isa.name for isa in isas],
        "nvcc": cuda.version if cuda else None,
        "cuda_arches": list(cuda.arches) if cuda else [],
        "notes": notes,
    }
    (destination / "_build.json").write_text(json.dumps(facts, indent=2) + "\n")
    for note in notes:
        print(f"cnnfast: {note}", file=sys.stderr)
    return [destination / name for name in [*libraries, "_build.json"]]


class BuildExtensions(build_ext):
    def run(self) -> None:
        build(self._destination())

    def _destination(self) -> Path:
        return ROOT / "cnnfast" if self.inplace else Path(self.build_lib) / "cnnfast"

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "cnnfast"
        built = [EXTENSION, "libcnnfast_ops.so", "libcnnfast_cuda.so", "_build.json"]
        return [str(folder / name) for name in built if (self._destination() / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        return {output: str(self._destination() / Path(output).name) for output in self.get_outputs()}

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*")) if path.is_file()]
