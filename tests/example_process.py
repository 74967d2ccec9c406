"""An example's process: as it is, in another dtype, on other data, or killed (SIGKILL) at a chosen moment.

Moments are numbered as they come: before each backward pass, half-way through each file that torch.save writes, before
and after each os.replace. As a program, for torchrun: example_process.py OPTIONS SCRIPT [ARGUMENT ...], OPTIONS the
keywords of `example` as JSON.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch"])


def example(
    script: str, arguments: list[str], *, dtype: str = "float32", kill_at: int = 0, rank: int = 0, digits: Any = None
) -> None:
    """Runs the script in this process; `kill_at` kills it at that moment if it is this `rank`; `digits`: a file of
    torch.save with the images and classes that load_digits returns."""
    torch.set_num_threads(1)
    torch.set_default_dtype(getattr(torch, dtype))
    if kill_at and rank == int(os.environ.get("RANK", 0)):
        _kill_at(kill_at)
    if digits:
        import sklearn.datasets
        from sklearn.utils import Bunch

        images, classes = torch.load(digits)
        sklearn.datasets.load_digits = lambda: Bunch(images=images.numpy(), target=classes.numpy())
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(EXAMPLES))  # as python does
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def _kill_at(moment: int) -> None:
    count = 0

    def pass_moment() -> None:
        nonlocal count
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    backward, save, replace = torch.Tensor.backward, torch.save, os.replace

    def stopping_backward(*arguments: Any, **options: Any) -> None:
        pass_moment()
        backward(*arguments, **options)

    def stopping_save(state: Any, file: Any, **options: Any) -> None:
        if not isinstance(file, io.BufferedWriter):  # messages between processes
            return save(state, file, **options)
        save(state, whole := io.BytesIO())
        half = len(whole.getvalue()) // 2
        file.write(whole.getvalue()[:half])
        file.flush()
        pass_moment()
        file.write(whole.getvalue()[half:])

    def stopping_replace(*paths: Any) -> None:
        pass_moment()
        replace(*paths)
        pass_moment()

    torch.Tensor.backward, torch.save, os.replace = stopping_backward, stopping_save, stopping_replace  # type: ignore


def _redirected(folder: str, script: str, arguments: list[str], options: dict[str, Any]) -> None:
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    example(script, arguments, **options)


def start(folder: Path, script: str, *arguments: Any, **options: Any) -> Any:
    """The process, whose stdout and stderr are files of `folder`."""
    process = _context.Process(target=_redirected, args=(str(folder), script, [*map(str, arguments)], options))
    process.start()
    return process


def run(folder: Path, script: str, *arguments: Any, **options: Any) -> tuple[int, str, str]:
    """Exit status, minus the signal for a process that one ended; stdout; stderr."""
    process = start(folder, script, *arguments, **options)
    process.join(600)
    process.kill()  # one that hangs
    process.join()
    return process.exitcode, *((folder / name).read_text() for name in ("stdout", "stderr"))


def torchrun(script: str, *arguments: Any, processes: int = 2, **options: Any) -> subprocess.CompletedProcess:
    """The same in several processes; TimeoutExpired if the job hangs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [__file__, json.dumps(options), script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


if __name__ == "__main__":
    example(sys.argv[2], sys.argv[3:], **json.loads(sys.argv[1]))
