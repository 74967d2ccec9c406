"""What was built, what this machine has, and which backend each op would take here: the facts behind `cnnfast info`."""

import json
import platform
from pathlib import Path

import torch

from cnnfast import _C, _library, ops
from cnnfast._version import __version__

OPS = ("depthwise_conv2d", "pointwise_conv2d", "separable_conv2d", "inverted_residual")
BACKENDS = ("cpu", "cuda", "triton")


def build_facts() -> dict:
    """What the build wrote down (cnnfast/_build.json): compiler, torch headers, ISAs, CUDA arches, what was dropped."""
    return json.loads((Path(__file__).parent / "_build.json").read_text())


def machine_facts() -> dict:
    """This process: Python, torch, threads, the ISAs that the CPU has and the one in use, the GPUs."""
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cpu_isas": list(_C.cpu_features),
        "isa_in_use": _C.isa,
        "cuda_library": _library.cuda_missing or "loaded",
        "gpus": devices,
    }


def op_facts() -> dict:
    """Per op and device: the backend that "auto" takes, and for each other one every reason why it can't run here."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    facts: dict = {}
    for op in OPS:
        facts[op] = {}
        for device in devices:
            reasons = {backend: ops.can_run(op, backend, torch.device(device)) for backend in BACKENDS}
            facts[op][device] = {
                "takes": ops.auto_backend(op, torch.device(device)),
                "why_not": {backend: why for backend, why in reasons.items() if why},
            }
    return facts


def collect() -> dict:
    """Everything that `cnnfast info --json` prints."""
    return {"cnnfast": __version__, "build": build_facts(), "machine": machine_facts(), "ops": op_facts()}
