"""Loads what was built, at import: a missing or unfit file is one clear error there, and not at the first call."""

import sysconfig
from pathlib import Path

_FOLDER = Path(__file__).parent
_REBUILD = "build it with `pip install -e .` (or install a wheel for this Python)"


def _load_torch():
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError("cnnfast needs torch 2.10 or newer, and torch is not installed: pip install torch") from None
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        raise ImportError(f"cnnfast needs torch 2.10 or newer; this is torch {torch.__version__}: pip install -U torch")
    return torch


def _load_bindings():
    extension = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not (_FOLDER / extension).exists():
        others = sorted(path.name for path in _FOLDER.glob("_C*.so"))
        there = f" (there is {', '.join(others)}, for another Python)" if others else ""
        raise ImportError(f"cnnfast is not built: {_FOLDER / extension} is missing{there}; {_REBUILD}")
    import cnnfast._C

    return cnnfast._C


def _load_ops(torch) -> None:
    library = _FOLDER / "libcnnfast_ops.so"
    if not library.exists():
        raise ImportError(f"cnnfast is not built: {library} is missing; {_REBUILD}")
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(f"{library} does not load beside torch {torch.__version__}: {error}; {_REBUILD}") from error


def _load_cuda(torch) -> str | None:
    """Loads the CUDA kernels; returns why not, where they aren't loaded. A file that is there and unfit is an error."""
    library = _FOLDER / "libcnnfast_cuda.so"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if not library.exists():
        return "the CUDA kernels were not built"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(f"{library} does not load beside torch {torch.__version__}: {error}; {_REBUILD}") from error
    return None


_torch = _load_torch()
_C = _load_bindings()
_load_ops(_torch)
cuda_missing: str | None = _load_cuda(_torch)
"""Why cnnfast_cuda::* is not there; None where it is."""
