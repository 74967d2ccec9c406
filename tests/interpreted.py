"""Runs tests/triton/interpreted in processes with TRITON_INTERPRET=1, one a core."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from background import yielding

FOLDER = Path(__file__).parent / "triton" / "interpreted"


class Interpreted:
    """Starts them; `options` are pytest's."""

    def __init__(self, *options: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        files = sorted(FOLDER.glob("test_*.py"), key=lambda file: file.stat().st_size, reverse=True)
        count = min(os.cpu_count() or 1, len(files))
        self.runs = [self._start(n, *options, *map(str, files[n::count])) for n in range(count)]

    def _start(self, n: int, *arguments: str) -> tuple[subprocess.Popen, Path, Path]:
        written, log = (Path(self.folder.name, f"{name}{n}") for name in ("proofs", "log"))
        command = [sys.executable, "-m", "pytest", *arguments, "-q", "--proofs-json", str(written)]
        with log.open("w") as output:
            run = subprocess.Popen(
                yielding([*command, "-p", "no:cacheprovider"]),
                env=dict(os.environ, TRITON_INTERPRET="1"),
                cwd=FOLDER.parents[2],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return run, written, log

    def proofs(self) -> list[list]:
        """Waits for all. Fails if a test there failed."""
        failed, proofs = 0, []
        for run, written, log in self.runs:
            failed += run.wait() != 0
            print(log.read_text())
            if written.exists():
                proofs += json.loads(written.read_text())
        assert not failed, "a test under the interpreter failed; its output is above"
        return proofs

    def stop(self) -> None:
        for run, _, _ in self.runs:
            run.kill()
            run.wait()
        self.folder.cleanup()
