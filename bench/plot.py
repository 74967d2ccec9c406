"""The times of `cnnfast bench models` as a picture: a panel for each network in each cell, a bar for each contender."""

from __future__ import annotations

import os
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .measure import OURS
from .report import Row, row_from_json
from .tables import LABELS

# Okabe and Ito's colours, told apart by colour-blind people; grey for plain PyTorch.
_COLORS = {OURS: "#d55e00", "eager": "#c8c8c8", "eager_channels_last": "#8c8c8c"}
_COLORS |= {"inductor": "#56b4e9", "onnxruntime": "#009e73", "openvino": "#0072b2"}
_COLUMNS = 5


def plot(report: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes the picture to `path`, in the format that its suffix names. `report`: as the JSON has it."""
    lines = []  # (title, the batch, rows of at most _COLUMNS networks)
    for cell in report["cells"]:
        of, rows = cell["settings"], [row_from_json(row) for row in cell["rows"]]
        threads = f"{of['threads']} thread{'s' if of['threads'] > 1 else ''}"
        title = f"{of['dtype']}, {threads}, batch {of['batch']}"
        lines += [(title, of["batch"], rows[i : i + _COLUMNS]) for i in range(0, len(rows), _COLUMNS)]
    names = [OURS, *report["cells"][0]["settings"]["peers"]]
    columns = max(len(rows) for _, _, rows in lines)
    figure = Figure(figsize=(10, 1.0 + 2.3 * len(lines)), dpi=120, layout="constrained")
    panels: Any = figure.subfigures(len(lines), 1, squeeze=False)
    for (title, batch, rows), (part,) in zip(lines, panels, strict=True):
        part.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
        for axes, row in zip(part.subplots(1, columns, squeeze=False)[0], rows + [None] * columns, strict=False):
            if row is None:
                axes.axis("off")
            else:
                _bars(axes, row, names, batch)
    handles: list[Any] = [Patch(color=_COLORS[name], label=LABELS[name]) for name in names]
    handles.append(Line2D([], [], color="black", ls="--", lw=1.5, label="floor"))
    title = f"ms per image, {report['environment']['cpu']} (×: could not run)"
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=10, title=title)
    figure.savefig(path)


def _bars(axes: Any, row: Row, names: list[str], batch: int) -> None:
    """ms per image; a cross for who could not run."""
    for n, name in enumerate(names):
        if name in row.timings:
            value = row.timings[name].ms.p50 / batch
            axes.bar(n, value, 0.85, color=_COLORS[name])
            axes.text(n, value, f"{value:.3g}", ha="center", va="bottom", fontsize=8)
        else:
            axes.text(n, 0, "×", ha="center", va="bottom", fontsize=12, color=_COLORS[name])
    if row.floor_ms:
        axes.axhline(row.floor_ms / batch, color="black", ls="--", lw=1.5)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    axes.set_title(row.name, fontsize=10)
    axes.set_xticks([])
    axes.tick_params(axis="y", labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
