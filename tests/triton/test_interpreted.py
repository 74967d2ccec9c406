"""Runs tests/triton/interpreted in a process with TRITON_INTERPRET=1, and counts here what it proves.

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
    proofs = tmp_path / "proofs.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        FOLDER,
        "-q",
        "--proofs-json",
        proofs,
        "-p",
        "no:cacheprovider",
        *options,
    ]
    run = subprocess.run(
        command, env=dict(os.environ, TRITON_INTERPRET="1"), cwd=FOLDER.parents[2], capture_output=True, text=True
    )
    print(run.stdout, run.stderr)
    assert run.returncode == 0, "a test under the interpreter failed; its output is above"
    return json.loads(proofs.read_text())


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
