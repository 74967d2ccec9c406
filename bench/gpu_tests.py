"""The tests part of `cnnfast bench gpu`: the suite of tests/gpu, and what it says of an op's kernels."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BACKENDS = ("triton", "cuda")


class Deadline:
    """Seconds from now on."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def run_tests(folder: Path, out: Path, deadline: Deadline, options: Sequence[str] = ()) -> dict[str, Any]:
    """Outcomes of the tests in `folder`, a process a file, all at once; files that the deadline cut off are named."""
    files = sorted(folder.glob("test_*.py"))
    logs = {file.stem: out / f"{file.stem}.log" for file in files}
    processes = []
    for file in files:
        command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *options, str(file)]
        with logs[file.stem].open("w") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder.parents[1]))
    ended = []
    for process in processes:
        try:
            process.wait(max(deadline.left(), 0))
            ended.append(True)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended.append(False)
    outcomes = {stem: outcomes_of(log.read_text(errors="replace")) for stem, log in logs.items()}
    return {
        "outcomes": outcomes,
        "unfinished": [file.stem for file, end in zip(files, ended, strict=True) if not end],
        "counts": {stem: counts(by_test) for stem, by_test in outcomes.items()},
    }


def outcomes_of(log: str) -> dict[str, str]:
    """What `pytest -v` said of each test, by its name: also of a run that was cut off."""
    lines = re.findall(r"^\S+?::(\S.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", log, re.M)
    return {name: outcome.lower() for name, outcome in lines}


def counts(outcomes: dict[str, str]) -> dict[str, int]:
    values = list(outcomes.values())
    return {outcome: values.count(outcome) for outcome in sorted(set(values))}


def verdict(tests: dict[str, Any] | None, op: str, backend: str) -> str:
    """What `tests` say of the op's kernels of that backend: "green", "red" or "not run"."""
    outcomes = (tests or {}).get("outcomes", {}).get(f"test_{op}", {})
    others = set(BACKENDS) - {backend}
    mine = [outcome for name, outcome in outcomes.items() if not others & set(re.split(r"[\[\]-]", name))]
    if any(outcome in ("failed", "error") for outcome in mine):
        return "red"
    return "green" if "passed" in mine else "not run"
