"""What a network costs, without its weights: parameters and multiply-adds; and of the registered ones a table of that,
since building them all takes a minute."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cnnfast.models.layouts import SOURCES, Layouts
from cnnfast.models.registry import create_model, list_models, model_entry
from cnnfast.nn import set_backend

_TABLE = "network_figures.json"


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(name: str, size: int | None = None, **options: Any) -> int:
    """Multiply-adds of convolutions and matrix products for one image, as torch's FlopCounterMode counts them (two
    FLOPs each), on the meta device: nothing is computed.

    Args:
        size: height and width of the image; None for pretrained_cfg's.
        options: create_model's.
    """
    with torch.device("meta"):
        network = create_model(name, **options).eval()
        set_backend(network, "reference")
        channels, height, width = model_entry(name).pretrained_cfg["input_size"]
        shape = (1, options.get("in_chans", channels), size or height, size or width)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty(shape))
    return counter.get_total_flops() // 2


def count(name: str) -> dict[str, Any]:
    """`parameters`, `macs` at the network's input, and `checkpoints`, the sources that load_weights takes for it."""
    with torch.device("meta"):
        network = create_model(name)
    sources = [s for s in SOURCES[1:] if network.checkpoint_keys(s)] if isinstance(network, Layouts) else []
    lacking = {"timm", "torchvision"} - model_entry(name).peers.keys()
    if not getattr(network, "in_pretrainedmodels", False):  # whose layout a relative of its network may have, too
        lacking.add("pretrainedmodels")
    sources = [s for s in sources if s not in lacking]
    return dict(parameters=count_parameters(network), macs=count_macs(name), checkpoints=sources)


def figures(name: str) -> dict[str, Any]:
    """The same, of the package's own networks from its table."""
    return table()[name] if name in table() else count(name)


@cache
def table() -> dict[str, dict[str, Any]]:
    """Of each of the package's networks what `count` gives, as it was when the table was written."""
    return json.loads(resources.files("cnnfast").joinpath(f"data/{_TABLE}").read_text(encoding="utf-8"))


def write_table() -> None:
    """`python -m cnnfast.models.figures` after a network was added or changed; tests compare."""
    lines = [f"  {json.dumps(name)}: {json.dumps(count(name))}" for name in list_models()]
    path = Path(str(resources.files("cnnfast"))) / "data" / _TABLE
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    write_table()
