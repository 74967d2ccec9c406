"""Python code in a process that has imported nothing of cnnfast; torch, which takes a second, once for all of them."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch"])


def _run(code: str, folder: str, path: Path | None, environment: dict[str, str]) -> None:
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(path or "/")
    if path:
        sys.path.insert(0, str(path))
    assert "torch" in sys.modules and "cnnfast" not in sys.modules
    exec(code, {})


def run_fresh(code: str, path: Path | None = None, **environment: str) -> tuple[str, str]:
    """What the code says on stdout and stderr, with `path` in front of everything else on sys.path, and as the current
    folder. Forked from a process that has Python and torch: what these read at their start isn't in `environment`."""
    with tempfile.TemporaryDirectory() as folder:
        process = _context.Process(target=_run, args=(code, folder, path, {**os.environ, **environment}))
        process.start()
        process.join(120)
        process.kill()  # one that hangs
        process.join()
        out, err = (Path(folder, name).read_text().strip() for name in ("stdout", "stderr"))
    assert process.exitcode == 0, err
    return out, err
