"""What was built, what this machine has, and which backend each op takes here: the facts behind `cnnfast info`."""

import importlib.util
import io
import json
import platform
import shutil
from pathlib import Path

import torch

from cnnfast import _library
from cnnfast._version import __version__
from cnnfast.ops import backends
from cnnfast.ops.backends import OPS


def build_facts() -> dict:
    """What the build wrote into cnnfast/_build.json: compiler, torch's headers, ISAs, CUDA arches, what was dropped."""
    return json.loads((Path(__file__).parent / "_build.json").read_text())


def machine_facts() -> dict:
    """This process: Python, torch, threads, the ISAs that the CPU has and the one in use, the GPUs."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "isas_of_cpu": list(_library._C.cpu_features),
        "isa_in_use": _library._C.isa,
        "cuda_library": _library.cuda_missing or "loaded",
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "tuned": tuned_facts(),
    }


def tuned_facts() -> list[dict]:
    """Per GPU that torch sees: how many configurations of `cnnfast tune` its launches use, and their file."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return []
    from cnnfast.kernels import tuned

    facts = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        identity = tuned.identity(device)
        assert identity is not None
        facts.append({"entries": len(tuned.entries(device)), "file": str(tuned.path(identity))})
    return facts


def op_facts() -> dict:
    """Per op: the backend that "auto" takes on each device there is, and for each other one every reason against it."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    facts: dict = {}
    for op in OPS:
        takes = {device: " or ".join(backends.available(op, device)) or None for device in devices}
        reasons = {name: backends.can_run(op, name) for name in backends.BACKENDS}
        facts[op] = {"takes": takes, "why_not": {name: why for name, why in reasons.items() if why}}
    return facts


def collect() -> dict:
    """Everything, as `cnnfast info --json` prints it."""
    return {"cnnfast": __version__, "build": build_facts(), "machine": machine_facts(), "ops": op_facts()}


def render() -> str:
    """Everything, as text for a person; as wide as the terminal."""
    from rich.console import Console
    from rich.table import Table

    facts = collect()
    build, machine = facts["build"], facts["machine"]
    arches = ", ".join(f"sm_{arch}" for arch in build["cuda_arches"])
    built_for_gpu = f"nvcc {build['nvcc']} for {arches}" if build["nvcc"] else "not built"
    rows = {
        "cnnfast": facts["cnnfast"],
        "built with": f"{build['compiler']}, torch {build['torch_headers']}'s headers, for Python {build['python']}",
        "runs with": f"torch {machine['torch']}, Python {machine['python']}, {machine['threads']} threads",
        "CPU kernels": f"built: {', '.join(build['isas'])}; this CPU has: {', '.join(machine['isas_of_cpu'])};"
        f" in use: {machine['isa_in_use']}",
        "CUDA kernels": f"{built_for_gpu}; {machine['cuda_library']}",
        "GPUs": ", ".join(machine["gpus"]) or "none that torch sees",
        "tuned": "\n".join(
            f"{tuned['entries']} of the Triton kernels' configurations, {tuned['file']}" for tuned in machine["tuned"]
        )
        or "nothing: `cnnfast tune` is for GPUs with Triton",
        **{f"left out {number}": note for number, note in enumerate(build["notes"], 1)},
    }
    summary = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        summary.add_row(name, value)

    choices = Table("op", "takes", "why not the others")
    for op, fact in facts["ops"].items():
        takes = "\n".join(f"{backend or 'none'} on {device}" for device, backend in fact["takes"].items())
        choices.add_row(op, takes, "\n".join(f"{name}: {', '.join(why)}" for name, why in fact["why_not"].items()))

    text = io.StringIO()
    console = Console(file=text, width=max(80, shutil.get_terminal_size().columns))
    console.print(summary, choices, sep="\n", markup=False, highlight=False)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
