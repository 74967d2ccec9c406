"""No op allocates more than its output and a tile a thread: measured by the peak of a fresh process's memory.

Fails if a call makes a temporary of the size of x, of its output or of an intermediate: a widened or padded copy of x,
a depthwise result. Squeeze-excite may keep an image of the depthwise result a thread, which it waits for. Not promised:
images in NCHW (converted), float64 and gradients (right, not lean), ATen's convolution on machines without AVX-512.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cnnfast import _C

pytestmark = [
    pytest.mark.slow,  # seconds each
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets the peak of a process's memory"),
]
HERE = Path(__file__).parent


def growth(forms: str, dtype: str, isa: str) -> list[dict]:
    path = os.pathsep.join(str(folder) for folder in (HERE.parent, HERE.parents[1]))
    environment = os.environ | {"CNNFAST_ISA": isa, "PYTHONPATH": path, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(HERE / "growth.py"), forms, dtype]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    return [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("isa", [isa for isa in _C.isas_built if isa in _C.cpu_features and isa != "generic"])
def test_output_and_a_tile_a_thread(isa, dtype):
    rows = growth("plain,packed", dtype, isa)
    assert len(rows) == 15
    assert [row for row in rows if row["growth"] > row["allowed"]] == []
    # Not less than the output either: that the peak is seen at all.
    assert [row for row in rows if row["growth"] < row["output"]] == []


def test_a_copy_of_x_is_seen():
    rows = growth("copying", "bfloat16", _C.isa)
    assert len(rows) == 8
    assert [row for row in rows if row["growth"] <= row["allowed"]] == []
