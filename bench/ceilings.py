"""What this machine can do at all, measured in the run that it is compared with."""

from __future__ import annotations

from functools import cache

import torch

from .timing import sample

_DRAM_BYTES = 1 << 29  # read + written: larger than any last-level cache


@cache
def gemm_rate(dtype: torch.dtype, threads: int, size: int) -> float:
    """FLOP/s of torch.mm on `size` x `size` matrices, the best of ten. `threads`: those in use (a key of the cache)."""
    a, b = torch.randn(2, size, size).to(dtype)
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    return 2 * size**3 / min(sample(lambda: torch.mm(a, b, out=out), 1) for _ in range(10))


@cache
def copy_rate(nbytes: int, threads: int) -> float:
    """Bytes/s, read + written, of copying so that `nbytes` are moved.

    A row's floor uses its own size: what fits a cache may be served by it, for the kernel as for the copy.
    """
    source = torch.ones(max(64, nbytes // 2), dtype=torch.uint8)
    target = torch.empty_like(source)
    target.copy_(source)
    count = max(1, (1 << 22) // max(1 << 12, nbytes))
    return 2 * source.numel() / min(sample(lambda: target.copy_(source), count) for _ in range(10))


def dram_rate(threads: int) -> float:
    """Bytes/s, read + written, of a copy that no cache holds."""
    return copy_rate(_DRAM_BYTES, threads)
