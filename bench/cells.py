"""The cells of result files: a network under the settings of a run, and the bar that it is held against."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .report import Row, row_from_json
from .timing import Ratio

SEPARABLE = ("xception", "mobilenet_v1", "mobilenet_v2", "efficientnet_b0", "tf_efficientnet_lite0")
DENSE = ("resnet50", "se_resnet50", "inception_v3", "googlenet", "vgg16", "alexnet")


@dataclass(frozen=True)
class Cell:
    """A network under one run's settings. `isa`: cnnfast's, and what restricts the peers'."""

    row: Row
    isa: str
    restricted: bool
    dtype: str
    threads: int
    batch: int
    memory: bool
    measured: str
    file: str

    @property
    def key(self) -> tuple[Any, ...]:
        return self.isa, self.dtype, self.threads, self.batch, self.memory, self.row.name

    @property
    def kind(self) -> str:
        name = self.row.name
        return "separable" if name in SEPARABLE else "dense" if name in DENSE else "other"

    @property
    def peer(self) -> str | None:
        """The one that the bar is held against, None for the fastest: dense networks in bfloat16 against Inductor."""
        return "inductor" if self.kind == "dense" and self.dtype == "bfloat16" else None

    @property
    def bar(self) -> float:
        return 0.9 if self.kind == "dense" and self.dtype == "float32" else 1.0

    @property
    def held(self) -> Ratio | None:
        return self.row.ratios.get(self.peer) if self.peer else self.row.ratio


def read(files: Sequence[Path]) -> tuple[dict[str, dict[str, Any]], list[Cell]]:
    """The files by the name that the page gives them, and their cells."""
    documents, cells = {}, []
    for path in files:
        document = json.loads(path.read_text(encoding="utf-8"))
        if "cells" not in document:
            raise ValueError(f"{path.name} has no cells: want a file written by cnnfast bench models")
        documents[path.name] = document
        environment = document["environment"]
        restrictions = environment["restrictions"]
        isa = ", ".join([environment["isa"]["cnnfast"], *(f"{name}={value}" for name, value in restrictions.items())])
        for run in document["cells"]:
            of = run["settings"]
            facts = isa, bool(restrictions), of["dtype"], of["threads"], of["batch"], of["memory"], environment["date"]
            cells += [Cell(row_from_json(row), *facts, path.name) for row in run["rows"]]
    return documents, cells
