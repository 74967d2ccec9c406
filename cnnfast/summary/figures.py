"""The numbers of a summary beside this machine's ceilings, for tables, files and plots."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cnnfast.summary.network import Block, Summary
from cnnfast.summary.recorder import Layer


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do at all: FLOP/s of a large matrix product, and bytes/s, read and written, of a copy that
    moves so many bytes (what fits a cache may be served by it; of a GPU the same for all sizes, None) or more than any
    cache holds."""

    machine: str
    flops: float
    copy: Callable[[int], float] | None
    dram: float


@dataclass(frozen=True)
class Figures:
    """A block, a stage or the whole network. Floors are in seconds, `share` is that of the network's floor.

    A block's floor is the longer of its FLOPs at the machine's rate and its calls' bytes at that of copies; a stage's
    is the sum of its blocks'. `unfused_floor` is the same sum over the plain layers. FLOPs are two a multiply-add, of
    convolutions and matrix products alone.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    unfused: int
    fused: int
    unfused_floor: float
    floor: float
    share: float
    bound: str  # "compute" or "memory"
    runs: list[tuple[str, str]]

    @property
    def intensity(self) -> float:
        """FLOPs a byte, fused."""
        return 2 * self.macs / self.fused if self.fused else 0.0

    @property
    def unfused_intensity(self) -> float:
        return 2 * self.macs / self.unfused if self.unfused else 0.0

    @property
    def backends(self) -> list[str]:
        return list(dict.fromkeys(backend for _, backend in self.runs))


class Report:
    """Figures of `summary`'s blocks, stages and total on a machine of `ceilings`."""

    def __init__(self, summary: Summary, ceilings: Ceilings):
        self.summary, self.ceilings = summary, ceilings
        self._floors = {block.name: self._floor(block) for block in summary.blocks}
        self._all = sum(max(times) for times in self._floors.values())
        self.blocks = [self._figures(block.name, [block]) for block in summary.blocks]
        self.stages = {stage: self._figures(stage, self.blocks_of(stage)) for stage in summary.stages}
        self.total = self._figures(summary.name, summary.blocks)

    def blocks_of(self, stage: str) -> list[Block]:
        return [block for block in self.summary.blocks if block.stage == stage]

    def figures_of(self, stage: str) -> list[Figures]:
        return [row for row, block in zip(self.blocks, self.summary.blocks, strict=True) if block.stage == stage]

    def _floor(self, block: Block) -> tuple[float, float]:
        """Seconds of computing and of moving."""
        return 2 * block.macs / self.ceilings.flops, sum(self._moving(call) for call in block.calls)

    def _unfused_floor(self, block: Block) -> float:
        return sum(max(2 * layer.macs / self.ceilings.flops, self._moving(layer)) for layer in block.layers)

    def _moving(self, layer: Layer) -> float:
        nbytes = 1 << max(12, (layer.bytes - 1).bit_length())  # few sizes, so that few are measured
        return layer.bytes / (self.ceilings.copy(nbytes) if self.ceilings.copy else self.ceilings.dram)

    def _figures(self, name: str, blocks: Sequence[Block]) -> Figures:
        floors = [self._floors[block.name] for block in blocks]
        floor = sum(max(times) for times in floors)
        computing = sum(compute for compute, moving in floors if compute >= moving)
        return Figures(
            name=name,
            shape=blocks[-1].shape,
            parameters=sum(block.parameters for block in blocks),
            macs=sum(block.macs for block in blocks),
            unfused=sum(block.unfused for block in blocks),
            fused=sum(block.fused for block in blocks),
            unfused_floor=sum(map(self._unfused_floor, blocks)),
            floor=floor,
            share=floor / self._all,
            bound="compute" if 2 * computing >= floor else "memory",
            runs=[run for block in blocks for run in block.runs],
        )


def to_json(report: Report) -> str:
    """Everything, down to the plain layers and the calls."""
    summary, ceilings = report.summary, report.ceilings
    stages = [
        _entry(report.stages[stage])
        | {
            "blocks": [
                _entry(row)
                | {
                    "layers": [_layer(layer) for layer in block.layers],
                    "calls": [dict(op=op, backend=backend) for op, backend in row.runs],
                }
                for row, block in zip(report.figures_of(stage), report.blocks_of(stage), strict=True)
            ]
        }
        for stage in summary.stages
    ]
    document = {
        "network": summary.name,
        "input": list(summary.shape),
        "dtype": str(summary.dtype).removeprefix("torch."),
        "ceilings": {
            "machine": ceilings.machine,
            "gflop_per_s": ceilings.flops / 1e9,
            "dram_copy_gb_per_s": ceilings.dram / 1e9,
        },
        "total": _entry(report.total) | {"parameters": summary.parameters},
        "parameters_not_read_by_an_eval_forward": summary.unread_parameters,
        "stages": stages,
        "factorised": [vars(one) for one in summary.factorised],
    }
    return json.dumps(document, indent=1) + "\n"


def to_csv(report: Report) -> str:
    """A line for each plain layer, each block that runs as one, each stage and the total: `level` says which. What has
    no sense on a level (the fused bytes of one of the layers that a call replaces) is empty."""
    columns = ["level", "stage", "block", "name", "output", "parameters", "macs", "bytes_unfused", "bytes_fused"]
    columns += ["flop_per_byte", "floor_us_unfused", "floor_us", "floor_share", "bound", "ops", "backends"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for stage in report.summary.stages:
        for row, block in zip(report.figures_of(stage), report.blocks_of(stage), strict=True):
            for layer in block.layers:
                entry = dict(_layer(layer), name=f"{layer.path} {layer.kind}".strip())
                entry["output"] = times(layer.shape)
                del entry["kind"]
                writer.writerow(entry | {"level": "layer", "stage": stage, "block": block.name})
            writer.writerow(_flat(row) | {"level": "block", "stage": stage, "block": block.name})
        writer.writerow(_flat(report.stages[stage]) | {"level": "stage", "stage": stage})
    total = _flat(report.total) | {"parameters": report.summary.parameters}
    writer.writerow(total | {"level": "total"})
    return text.getvalue()


def times(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _entry(row: Figures) -> dict[str, Any]:
    return dict(
        name=row.name,
        output=list(row.shape),
        parameters=row.parameters,
        macs=row.macs,
        bytes_unfused=row.unfused,
        bytes_fused=row.fused,
        flop_per_byte=row.intensity,
        floor_us_unfused=row.unfused_floor * 1e6,
        floor_us=row.floor * 1e6,
        floor_share=row.share,
        bound=row.bound,
        backends=row.backends,
    )


def _flat(row: Figures) -> dict[str, Any]:
    entry = _entry(row)
    entry["output"], entry["backends"] = times(row.shape), " + ".join(row.backends)
    return entry | {"ops": " + ".join(op for op, _ in row.runs)}


def _layer(layer: Layer) -> dict[str, Any]:
    return dict(
        name=layer.path,
        kind=layer.kind,
        output=list(layer.shape),
        parameters=layer.parameters,
        macs=layer.macs,
        bytes_unfused=layer.bytes,
    )
