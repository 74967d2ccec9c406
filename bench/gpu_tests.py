"""The tests part of `cnnfast bench gpu`: the suite of tests/gpu and what it says of an op's kernels; its small shapes
once more under NVIDIA's compute-sanitizer, on the C++ kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BACKENDS = ("triton", "cuda")
TOOLS = ("memcheck", "racecheck", "synccheck")  # of compute-sanitizer: addresses; shared memory; barriers
SANITIZED = ("-k", "small_shapes and cuda")  # a sanitized kernel takes 10 to 100 times as long
TESTED_WITH = {"scale_shift_excite": "scale_shift"}  # another op
FOUND = 99  # exit code of a tool that found something


class Deadline:
    """Seconds from now on."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def run_tests(
    folder: Path, out: Path, deadline: Deadline, options: Sequence[str] = (), sanitizer: Path | None = None
) -> dict[str, Any]:
    """Outcomes of the tests in `folder`, a process a file, all at once; files that the deadline cut off are named.

    sanitizer: compute-sanitizer, one process more for each of its TOOLS; without it they are said not to have run.
    """
    pytest = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *options]

    def start(command: Sequence[str | Path], log: Path, **environment: str) -> subprocess.Popen:
        with log.open("w") as file:
            return subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=folder.parents[1], env=os.environ | environment
            )

    logs = {file.stem: out / f"{file.stem}.log" for file in sorted(folder.glob("test_*.py"))}
    processes = {stem: start([*pytest, folder / f"{stem}.py"], log) for stem, log in logs.items()}
    # Without PyTorch's cache of memory an access beyond a tensor is one beyond an allocation.
    sanitized = {
        tool: start([*sanitize(sanitizer, tool), *pytest, *SANITIZED, folder], out / f"{tool}.log",
                    PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        for tool in TOOLS if sanitizer is not None
    }  # fmt: skip
    ended = {stem: end(process, deadline) is not None for stem, process in processes.items()}
    tools = dict.fromkeys(TOOLS, "not run: compute-sanitizer is neither on PATH nor in CUDA_HOME")
    codes = {tool: end(process, deadline) for tool, process in sanitized.items()}
    tools |= {tool: found(code, (out / f"{tool}.log").read_text(errors="replace")) for tool, code in codes.items()}
    outcomes = {stem: outcomes_of(log.read_text(errors="replace")) for stem, log in logs.items()}
    return {
        "outcomes": outcomes,
        "unfinished": [stem for stem, in_time in ended.items() if not in_time],
        "counts": {stem: counts(by_test) for stem, by_test in outcomes.items()},
        "compute_sanitizer": tools,
    }


def end(process: subprocess.Popen, deadline: Deadline) -> int | None:
    """Its exit code; None for one that the deadline cut off."""
    try:
        return process.wait(max(deadline.left(), 0))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def find_sanitizer() -> Path | None:
    """compute-sanitizer, which comes with the CUDA toolkit."""
    command = shutil.which("compute-sanitizer")
    if command is None and (toolkit := os.environ.get("CUDA_HOME")):
        command = shutil.which("compute-sanitizer", path=f"{toolkit}/bin")
    return Path(command) if command else None


def sanitize(sanitizer: Path, tool: str) -> list[str | Path]:
    """What to put before a command."""
    return [sanitizer, "--tool", tool, "--kernel-name", "kns=cnnfast", "--error-exitcode", str(FOUND)]


def found(code: int | None, log: str) -> str:
    """What a tool's run says, by its exit code: the tool's, or pytest's where it found nothing."""
    if code == FOUND:
        return "errors"
    if code is None:
        return "cut off"
    passed = counts(outcomes_of(log)).get("passed", 0)
    if code != 0:
        return f"failed with exit code {code}"
    return f"clean, {passed} tests" if passed else "not run: no test of a C++ kernel ran"


def outcomes_of(log: str) -> dict[str, str]:
    """What `pytest -v` said of each test, by its name: also of a run that was cut off."""
    lines = re.findall(r"^\S+?::(\S.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", log, re.M)
    return {name: outcome.lower() for name, outcome in lines}


def counts(outcomes: dict[str, str]) -> dict[str, int]:
    values = list(outcomes.values())
    return {outcome: values.count(outcome) for outcome in sorted(set(values))}


def verdict(tests: dict[str, Any] | None, op: str, backend: str) -> str:
    """What `tests` say of the op's kernels of that backend: "green", "red" or "not run"."""
    outcomes = (tests or {}).get("outcomes", {}).get(f"test_{TESTED_WITH.get(op, op)}", {})
    others = set(BACKENDS) - {backend}
    mine = [outcome for name, outcome in outcomes.items() if not others & set(re.split(r"[\[\]-]", name))]
    if any(outcome in ("failed", "error") for outcome in mine):
        return "red"
    return "green" if "passed" in mine else "not run"
