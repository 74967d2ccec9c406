"""Functions run in several processes that torch.distributed joins by gloo, as ranks of one job."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch"])


def _run(function: Callable, rank: int, world: int, folder: str, arguments: tuple) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    torch.save(function(rank, world, *arguments), f"{folder}/{rank}")
    dist.destroy_process_group()


def in_processes(function: Callable, world: int, *arguments: Any) -> list[Any]:
    """What `function(rank, world, *arguments)` returns in each of `world` processes; it lies in a module that is not a
    test's, whence they import it."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = [_context.Process(target=_run, args=(function, n, world, folder, arguments)) for n in range(world)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(120)
            job.kill()  # one that hangs
            job.join()
        assert [job.exitcode for job in jobs] == [0] * world
        return [torch.load(Path(folder, str(rank)), weights_only=True) for rank in range(world)]
