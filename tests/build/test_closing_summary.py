"""What a run says at its end (tests/summary.py) is the same whether its tests run here or in pytest-xdist's workers.

Fails if a proof, a failure or a test that waits is lost between the processes, or is counted by each of them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILE = """
import pytest

@pytest.mark.proof("host-run", kernel="sound")
def test_sound():
    pass

@pytest.mark.proof("host-run", kernel="faulty")
def test_faulty():
    assert False

def test_compiled(record_proof):
    record_proof("compiled", kernel="sound", target="sm_90")

@pytest.mark.slow
def test_slow():
    pass

@pytest.mark.gpu
@pytest.mark.parametrize("n", range(3))
def test_gpu(n):
    pytest.skip("no GPU")
"""
LINES = """\
   0 Triton kernels run in the interpreter
   1 CUDA kernels run on the host harness, 1 tests: sound
     not counted, a test of theirs failed: faulty
   1 kernels compiled ahead of time for 1 targets (sm_90), 1 tests: sound
   3 tests wait for a GPU
   1 slow tests were not run
"""


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["here", "workers"])
def test_closing_summary(tmp_path, options):
    (tmp_path / "test_some.py").write_text(FILE)
    command = [sys.executable, "-m", "pytest", "-p", "summary", "-m", "not slow", "--proofs-json", "proofs", *options]
    environment = dict(os.environ, PYTHONPATH=str(TESTS))
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert LINES in done.stdout, done.stdout + done.stderr
    proofs = json.loads((tmp_path / "proofs").read_text())
    assert sorted(proofs) == [["compiled", "sound", "sm_90"], ["host-run", "sound", None]]
