"""Predictions as a CSV file that grows with the run and by which an interrupted run goes on."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cnnfast.evaluation.predictions import TOP, Prediction
from cnnfast.files import whole_file

HEADER = ["path", "true_index", "true_label", "top1", "top5"] + [
    f"{what}_{n}" for n in range(1, TOP + 1) for what in ("index", "label", "probability")
]
_ENCODING = dict(encoding="utf-8", errors="surrogateescape")  # a path may be any bytes


class Table:
    """The file `path`: a row for each image with a prediction. Next to it, in `path` + ".settings.json", lies what the
    predictions were made with, which must be the same where they are continued.

    Rows are added whole and in order; one that was cut off (a full disk, a killed process) is dropped and made anew.

    Args:
        settings: what the predictions depend on, by name.
        names: of the classes.
        restart: an existing file is replaced instead of continued.

    Raises:
        ValueError: the file is there and was made with other settings, or isn't such a table.
    """

    def __init__(self, path: Path, settings: Mapping[str, object], names: Sequence[str], restart: bool = False):
        self.path, self.names = path, names
        self.done: dict[str, Prediction] = {}
        self._settings_path = path.with_name(path.name + ".settings.json")
        if path.exists() and not restart:
            self._check_settings(settings)
            self._read()
        else:
            replace_file(self._settings_path, json.dumps(settings, indent=2) + "\n")
            replace_file(path, _as_csv([HEADER]))

    def add(self, predictions: Iterable[Prediction]) -> None:
        rows = [self._row(prediction) for prediction in predictions]
        with open(self.path, "a", newline="", **_ENCODING) as file:  # type: ignore[call-overload]
            file.write(_as_csv(rows))

    def _row(self, prediction: Prediction) -> list[object]:
        row: list[object] = [prediction.path, prediction.target, self.names[prediction.target]]
        row += [int(prediction.right), int(prediction.in_top5)]
        for index, probability in zip(prediction.indices, prediction.probabilities, strict=True):
            row += [index, self.names[index], f"{probability:.7g}"]
        return row + [""] * (len(HEADER) - len(row))  # fewer than five classes

    def _check_settings(self, settings: Mapping[str, object]) -> None:
        try:
            before = json.loads(self._settings_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ValueError(f"{self.path} can't be continued without {self._settings_path.name}") from None
        now = json.loads(json.dumps(settings))
        if changed := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
            what = ", ".join(f"{name} {before.get(name)!r}, now {now.get(name)!r}" for name in changed)
            raise ValueError(f"{self.path} was made with other settings: {what}")

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        rows = list(csv.reader(io.StringIO(content[:whole].decode(**_ENCODING), newline="")))
        if not rows or rows[0] != HEADER:
            raise ValueError(f"{self.path} is no table of predictions")
        for n, row in enumerate(rows[1:], 2):
            try:
                prediction = _prediction(row)
            except (ValueError, IndexError):
                raise ValueError(f"{self.path} has a damaged row, {n}") from None
            self.done[prediction.path] = prediction
        if whole < len(content):
            os.truncate(self.path, whole)


def _prediction(row: Sequence[str]) -> Prediction:
    if len(row) != len(HEADER):
        raise ValueError(f"{len(row)} fields")
    indices, probabilities = [row[n] for n in range(5, len(row), 3)], [row[n] for n in range(7, len(row), 3)]
    filled = len(indices) - indices.count("")
    return Prediction(row[0], int(row[1]), tuple(map(int, indices[:filled])), tuple(map(float, probabilities[:filled])))


def _as_csv(rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def replace_file(path: Path, text: str) -> None:
    """`path` has `text`, or what it had: never a part."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="surrogateescape")
