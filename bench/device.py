"""Times, ceilings and facts of a GPU; or of the CPU for a rehearsal: the same code, but nothing is measured.

On a GPU every contender is captured in a CUDA graph and its replays are timed by events: what is compared is kernels,
not how fast Python launches them.
"""

from __future__ import annotations

import shutil
import subprocess

import torch

from . import timing
from .timing import Call

COPIED_BYTES = 1 << 30  # many times any GPU's second-level cache


class Device:
    """`name`: "cuda", or "cpu" for a rehearsal."""

    def __init__(self, name: str):
        self.name = name
        self.is_gpu = name != "cpu"
        self._rates: dict[object, float] = {}

    def capture(self, call: Call) -> Call:
        """A call that replays `call`'s kernels; raises where they can't be captured."""
        if not self.is_gpu:
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, picks algorithms, fills workspaces
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def sample(self, call: Call, count: int) -> float:
        """Seconds of one call, averaged over `count` in a row, by the device's clock."""
        if not self.is_gpu:
            return timing.sample(call, count)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    def copy_rate(self) -> float:
        """Bytes/s, read + written, of a copy that no cache holds."""
        if "copy" not in self._rates:
            source = torch.ones(COPIED_BYTES if self.is_gpu else 1 << 16, dtype=torch.uint8, device=self.name)
            target = torch.empty_like(source)
            self._rates["copy"] = 2 * source.numel() / self._best(lambda: target.copy_(source))
        return self._rates["copy"]

    def gemm_rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of torch.mm on large square matrices."""
        if dtype not in self._rates:
            size = 8192 if self.is_gpu else 64
            a, b = torch.randn(2, size, size, device=self.name).to(dtype)
            self._rates[dtype] = 2 * size**3 / self._best(lambda: torch.mm(a, b))
        return self._rates[dtype]

    def _best(self, call: Call) -> float:
        call()
        return min(self.sample(call, 3) for _ in range(5))

    def facts(self) -> dict[str, object]:
        """Name, capability, memory, driver and clocks, as found."""
        if not self.is_gpu:
            return {"name": "a rehearsal on the CPU: no figure here is a measurement"}
        properties = torch.cuda.get_device_properties(0)
        facts: dict[str, object] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        if shutil.which("nvidia-smi"):
            query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
            command = ["nvidia-smi", "-i", "0", f"--query-gpu={query}", "--format=csv,noheader"]
            answer = subprocess.run(command, capture_output=True, text=True)
            facts |= dict(zip(query.split(","), answer.stdout.strip().split(", "), strict=False))
        return facts
