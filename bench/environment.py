"""Where a result was measured: machine, versions, commit, what restricts the instruction set."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from cnnfast import info

_PACKAGES = ("cnnfast", "triton", "timm", "onnxruntime", "openvino")
# cnnfast's kernels, ATen's own, oneDNN's (PyTorch and OpenVINO each have a copy of it), MKL's products.
_RESTRICTIONS = ("CNNFAST_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def environment() -> dict[str, object]:
    """Versions, machine, commit, date of this moment."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    machine = info.machine_facts()
    return {
        "versions": versions,
        "cpu": _cpu_info("model name") or platform.processor(),
        "cpu_mhz": _cpu_info("cpu MHz"),
        "cores": os.cpu_count(),
        "isa": {"cnnfast": machine["isa_in_use"], "torch": torch.backends.cpu.get_cpu_capability()},
        "restrictions": {name: os.environ[name] for name in _RESTRICTIONS if name in os.environ},
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_info(field: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), None)


def commit() -> str | None:
    """Of the source tree that cnnfast was installed from, '-dirty' where it has changes; None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
