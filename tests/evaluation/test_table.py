"""The CSV of predictions: exact, continued where it ends, refused where it is something else.

Fails if a row is read back otherwise than it was written, or a damaged file is continued or overwritten.
"""

import csv

import pytest

from cnnfast.evaluation import Prediction, Table, accuracy
from cnnfast.evaluation.table import replace_file

NAMES = [f'class "{n}", or\t{n}' for n in range(9)]
PREDICTIONS = [
    Prediction("a, b/\N{SNOWMAN}.png", 3, (3, 1, 4, 5, 8), (0.5, 0.25, 0.125, 0.0625, 1e-9)),
    Prediction("a/\udcff.png", 0, (3, 1, 4, 0, 8), (0.5, 0.25, 0.125, 0.0625, 0.0)),
    Prediction("c/x.png", 2, (1, 0), (0.75, 0.25)),
]
SETTINGS = {"model": "m", "sizes": [1, 2]}


@pytest.fixture
def file(tmp_path):
    table = Table(tmp_path / "r.csv", SETTINGS, NAMES)
    table.add(PREDICTIONS[:2])
    table.add(PREDICTIONS[2:])
    return table.path


def test_read_back(file):
    assert list(Table(file, SETTINGS, NAMES).done.values()) == PREDICTIONS
    with open(file, newline="", encoding="utf-8", errors="surrogateescape") as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["top1"], row["top5"]) for row in rows] == [("1", "1"), ("0", "1"), ("0", "0")]
    assert rows[1]["true_label"] == NAMES[0] and rows[1]["label_4"] == NAMES[0]


def test_accuracy():
    assert accuracy(PREDICTIONS) == (1 / 3, 2 / 3) and accuracy([]) == (None, None)


@pytest.mark.parametrize("lost", [1, 2, 20])
def test_a_row_that_was_cut_off(file, lost):
    whole = file.read_bytes()
    file.write_bytes(whole[:-lost])
    table = Table(file, SETTINGS, NAMES)
    assert list(table.done.values()) == PREDICTIONS[:2]
    table.add(PREDICTIONS[2:])
    assert file.read_bytes() == whole


def test_restart(file):
    assert not Table(file, {"model": "n"}, NAMES, restart=True).done
    assert len(file.read_text().splitlines()) == 1
    Table(file, {"model": "n"}, NAMES)


def damaged(content):
    return content.replace(b"0.75", b"x")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (damaged, "r.csv has a damaged row, 4"),
        (lambda content: content.replace(b",2,", b",", 1), "r.csv has a damaged row"),
        (lambda content: content + b"a,b\n", "r.csv has a damaged row, 5"),
        (lambda content: b"x" + content, "r.csv is no table of predictions"),
        (lambda content: b"", "r.csv is no table of predictions"),
    ],
)
def test_a_damaged_file(file, change, said):
    content = change(file.read_bytes())
    file.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        Table(file, SETTINGS, NAMES)
    assert file.read_bytes() == content


def test_other_settings(file):
    with pytest.raises(ValueError, match=r"made with other settings: sizes \[1, 2\], now \[1\], torch None, now '3'$"):
        Table(file, {"model": "m", "sizes": [1], "torch": "3"}, NAMES)
    Table(file, {"model": "m", "sizes": (1, 2)}, NAMES)  # JSON has no tuples
    file.with_name("r.csv.settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"can't be continued without r\.csv\.settings\.json"):
        Table(file, SETTINGS, NAMES)


def test_replace_file_leaves_the_old_one(tmp_path, monkeypatch):
    replace_file(tmp_path / "x", "old")
    monkeypatch.setattr("cnnfast.files.os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        replace_file(tmp_path / "x", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "old")]
