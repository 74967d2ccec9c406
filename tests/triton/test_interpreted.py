"""Runs tests/triton/interpreted in processes with TRITON_INTERPRET=1, one a core, and counts here what they prove.

Fails if a test there fails, or if none runs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


def run_interpreted(tmp_path, *options):
    files = sorted(FOLDER.glob("test_*.py"), key=lambda file: file.stat().st_size, reverse=True)
    processes = min(os.cpu_count(), len(files))
    runs, proofs = [], []
    for i in range(processes):
        written, log = tmp_path / f"proofs{i}.json", tmp_path / f"log{i}"
        command = [sys.executable, "-m", "pytest", *files[i::processes], "-q", "--proofs-json", written]
        command += ["-p", "no:cacheprovider", *options]
        environment = dict(os.environ, TRITON_INTERPRET="1")
        with log.open("w") as output:
            run = subprocess.Popen(
                command, env=environment, cwd=FOLDER.parents[2], stdout=output, stderr=subprocess.STDOUT
            )
        runs.append((run, written, log))
    failed = 0
    for run, written, log in runs:
        failed += run.wait() != 0
        print(log.read_text())
        if written.exists():
            proofs += json.loads(written.read_text())
    assert not failed, "a test under the interpreter failed; its output is above"
    return proofs


@pytest.mark.timeout(600)
def test_interpreted(tmp_path, record_proof):
    proofs = run_interpreted(tmp_path)
    assert proofs
    for how, kernel, _ in proofs:
        record_proof(how, kernel=kernel)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_interpreted_slow(tmp_path):
    run_interpreted(tmp_path, "-m", "slow")
