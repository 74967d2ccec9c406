"""A network's images take the memory of those that live at once, whatever their order: measured by the peak of a fresh
process's memory.

Fails if memory that no image needs any more isn't used again, or only whole, if a result doesn't take its residual's
place, if a layer's image lies beside the others' memory (local response normalisation's), or if threads keep more than
their tiles.
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
IMAGES, THREADS, TILES = 8, 2, 2_900_000  # bytes that a thread may keep: operands, as floats and split, and panels

# How high and wide x is, and the elements of the images that live at once, of each of a batch.
LIVE = {
    "resnet50": (224, 56 * 56 * (256 + 128) + 28 * 28 * 128),  # layer2.0: x, conv1's, conv2's
    "se_resnet50": (224, 56 * 56 * (256 + 64 + 256)),  # layer1.1: x, conv2's, conv3's
    "inception_v3": (299, 147 * 147 * (32 + 64)),  # Conv2d_2b_3x3
    "googlenet": (224, 56 * 56 * (192 + 192)),  # lrn2
    "xception": (299, 147 * 147 * (64 + 128) + 74 * 74 * 128),  # block1: x, between its two, pooled
}


def growth(name: str, size: int, dtype: str) -> int:
    path = os.pathsep.join(str(folder) for folder in (HERE.parent, HERE.parents[1]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(THREADS)}
    command = [sys.executable, str(HERE / "memory.py"), name, str(size), dtype, str(IMAGES)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    return json.loads(process.stdout.splitlines()[-1])["growth"]


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("name", LIVE)
def test_no_more_than_lives_at_once(name, dtype):
    if dtype == "bfloat16" and _C.isa != "amx":
        pytest.skip("without AMX dense convolutions in bfloat16 are ATen's")
    size, live = LIVE[name]
    images = live * IMAGES * (4 if dtype == "float32" else 2)
    grown = growth(name, size, dtype)
    # Not less than the images either: that the peak is seen at all.
    assert images <= grown <= images + THREADS * TILES, (grown, images)
