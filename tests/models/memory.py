"""By how much a network's calls make the process grow, for test_memory.py: a line of JSON.

In a process of its own that has run the network on one small image, so that what is measured is images and what threads
keep for themselves, not code and threads.
"""

import json
import sys

import torch

import cnnfast
from cnnfast.bench.timing import peak_growth


@torch.no_grad()
def measure(name: str, size: int, dtype: str, images: int) -> dict[str, object]:
    model = cnnfast.create_model(name).eval().to(getattr(torch, dtype))
    x = torch.randn(images, 3, size, size).to(getattr(torch, dtype)).contiguous(memory_format=torch.channels_last)
    model(x[:1, :, :96, :96].contiguous(memory_format=torch.channels_last))
    _, growth = peak_growth(lambda: [model(x) for _ in range(3)])
    assert growth is not None, "the kernel won't reset the peak of this process's memory"
    return {"network": name, "dtype": dtype, "growth": growth}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))))
