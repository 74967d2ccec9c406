"""A network's layers, the calls that replace them in an eval forward, and its stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cnnfast.models.figures import count_parameters
from cnnfast.models.registry import create_model, model_entry
from cnnfast.nn import set_backend
from cnnfast.summary.factorised import Factorised, factorised
from cnnfast.summary.recorder import Layer, record

HEAD = "head"


@dataclass
class Block:
    """What an eval forward runs as one, a block or a convolution with what follows it: the plain layers, and the calls
    in their place (the same layers where nothing is fused)."""

    name: str
    stage: str = ""
    layers: list[Layer] = field(default_factory=list)
    calls: list[Layer] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.layers or self.calls)[-1].shape

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def unfused(self) -> int:
        """Bytes, if each plain layer reads its input and its weights and writes its output."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def fused(self) -> int:
        """Bytes that the calls read and write, every tensor of a call once."""
        return sum(call.bytes for call in self.calls)

    @property
    def runs(self) -> list[tuple[str, str]]:
        """(op, backend) of each call."""
        return [(call.op.removesuffix("_packed") or call.kind, call.backend) for call in self.calls]


@dataclass
class Summary:
    """Of the network `name` for a batch of `shape` (N, C, H, W)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parameters: int
    blocks: list[Block]
    factorised: list[Factorised]

    @property
    def stages(self) -> list[str]:
        return list(dict.fromkeys(block.stage for block in self.blocks))

    @property
    def unread_parameters(self) -> int:
        """Of layers that an eval forward doesn't run."""
        return self.parameters - sum(block.parameters for block in self.blocks)


def summarize(
    name: str,
    size: int | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device_type: str = "cpu",
    **options: Any,
) -> Summary:
    """What the network `name` computes and moves, found on the meta device: nothing is computed, no weights are made.

    Args:
        size: height and width of the input; None for pretrained_cfg's.
        batch: images.
        dtype: of the parameters and the input.
        device_type: "cpu" or "cuda", on which the network is to run; it needn't be here. The choice among the kernels
            of a GPU is then that of an H100.
        options: create_model's.

    Raises:
        ValueError: a name that list_models doesn't have, or a size that the network doesn't take.
    """
    channels, height, width = model_entry(name).pretrained_cfg["input_size"]
    shape = (batch, options.get("in_chans", channels), size or height, size or width)
    with torch.device("meta"):
        network = create_model(name, **options).eval().to(dtype)
        x = torch.empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
        try:
            set_backend(network, "reference")
            layers = record(network, x, False, device_type)
            set_backend(network, "auto")
            calls = record(network, x, True, device_type)
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            sides = f"{shape[2]} x {shape[3]}"
            raise ValueError(f"size must be one that {name} takes, got {sides}: {reason}") from None
    blocks = _blocks(network, layers, calls)
    return Summary(name, shape, dtype, count_parameters(network), blocks, factorised(layers))


def _blocks(network: nn.Module, layers: Sequence[Layer], calls: Sequence[Layer]) -> list[Block]:
    blocks: dict[str, Block] = {}
    last: dict[str, int] = {}
    for i, layer in enumerate(layers):
        blocks.setdefault(layer.block, Block(layer.block)).layers.append(layer)
        last[layer.block] = i
    for call in calls:
        blocks.setdefault(call.block, Block(call.block)).calls.append(call)
    ends = _stage_ends(network, layers)
    for name, block in blocks.items():
        if not ends:  # no maps: the network's children
            block.stage = name.split(" ")[0].partition(".")[0] or name
            continue
        names = [stage for stage, end in ends if last.get(name, len(layers)) <= end]
        block.stage = names[0] if names else HEAD
    return list(blocks.values())


def _stage_ends(network: nn.Module, layers: Sequence[Layer]) -> list[tuple[str, int]]:
    """Of each map of feature_info: the layer after which it is taken, and the position of the last layer of that."""
    ends = []
    tap = getattr(network, "_tap", None)
    for one in getattr(network, "feature_info", None) or ():
        source = tap(one["module"])[0] if tap else one["module"]
        inside = [i for i, layer in enumerate(layers) if layer.path == source or layer.path.startswith(source + ".")]
        if inside:
            ends.append((source, inside[-1]))
    return ends
