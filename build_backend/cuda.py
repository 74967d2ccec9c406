"""The CUDA toolkit: its real root, its version, the architectures it knows."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from build_backend.toolchain import BuildError, Torch, output_of

ARCHES = ("75", "80", "86", "89", "90a", "100", "120")  # the newest one known also goes in as PTX


@dataclass(frozen=True)
class Cuda:
    nvcc: Path
    version: str
    arches: tuple[str, ...]

    @property
    def gencode_flags(self) -> list[str]:
        flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.arches]
        newest = max((arch for arch in self.arches if arch.isdigit()), key=int, default=None)
        if newest is not None:
            flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        return flags


def find_cuda(torch: Torch, sources: list[Path]) -> tuple[Cuda | None, str]:
    """The toolkit to build the CUDA part with, or None and why the CUDA part is left out.

    Built by default where nvcc is and the torch beside it is a CUDA build; CNNFAST_CUDA=1 builds it beside any torch
    (and it is then an error if that can't be), CNNFAST_CUDA=0 leaves it out.
    """
    wish = os.environ.get("CNNFAST_CUDA", "")
    if wish not in ("", "0", "1"):
        raise BuildError(f"CNNFAST_CUDA is {wish!r}; it can be 0 (without CUDA), 1 (with CUDA) or unset.")
    if wish == "0":
        return None, "CNNFAST_CUDA=0"
    if not sources:
        return None, "there are no CUDA sources"
    if wish == "" and torch.cuda is None:
        return None, f"torch {torch.version} is not a CUDA build (CNNFAST_CUDA=1 builds them all the same)"
    nvcc = find_nvcc()
    if nvcc is None:
        if wish == "1":
            raise BuildError(
                "CNNFAST_CUDA=1 needs nvcc, which is neither in CUDA_HOME nor on PATH;"
                " install the CUDA toolkit (12.4 or newer), or unset CNNFAST_CUDA."
            )
        return None, "nvcc is neither in CUDA_HOME nor on PATH (Triton kernels serve the GPU)"
    _, said = output_of(nvcc, "--version")
    version = re.search(r"V(\d+\.\d+\.\d+)", said)
    return Cuda(nvcc, version[1] if version else "unknown", usable_arches(nvcc)), ""


def find_nvcc() -> Path | None:
    """The toolkit's own nvcc: the one on PATH may be a wrapper, so that nvcc itself is asked where it lives."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    named = Path(home) / "bin" / "nvcc" if home else None
    found = str(named) if named and named.exists() else shutil.which("nvcc")
    if found is None:
        return None
    _, said = output_of(found, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull)
    here = re.search(r"^#\$ _HERE_=(.+)$", said, re.MULTILINE)
    real = Path(here[1].strip()) / "nvcc" if here else Path(found).resolve()
    return real if real.exists() else Path(found).resolve()


def usable_arches(nvcc: Path) -> tuple[str, ...]:
    """What the toolkit knows of ARCHES, or $CNNFAST_CUDA_ARCHS ("80,90a"), which has to be known entirely."""
    _, said = output_of(nvcc, "--list-gpu-arch")
    known = set(re.findall(r"compute_(\d+)", said))
    wanted = re.split(r"[,;\s]+", os.environ.get("CNNFAST_CUDA_ARCHS", "").strip())
    if wanted == [""]:
        return tuple(arch for arch in ARCHES if arch.rstrip("af") in known)
    unknown = [arch for arch in wanted if arch.rstrip("af") not in known]
    if unknown:
        raise BuildError(
            f"CNNFAST_CUDA_ARCHS asks for {', '.join(unknown)}, which {nvcc} does not know;"
            f" it knows {', '.join(sorted(known, key=int))}."
        )
    return tuple(wanted)
