"""`cnnfast list`, and the table of figures that it reads.

Fails if a network is missing from the table, if its figures aren't those of the network, or if a line is lost or cut at
80 columns.
"""

import json
import os
import random
import subprocess
import sys

import pytest

import cnnfast
from cnnfast.cli.listing import short
from cnnfast.cli.main import main
from cnnfast.models.figures import count, figures, table


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def call(*args):
        status = main(["list", *args])
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_every_network_has_figures():
    """`python -m cnnfast.models.figures` writes the table anew."""
    assert list(table()) == cnnfast.list_models()


@pytest.mark.parametrize("chosen", [3, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
def test_figures_are_the_networks(chosen):
    names = cnnfast.list_models()
    for name in random.sample(names, chosen) if chosen else names:
        assert table()[name] == count(name), name


def test_a_network_of_the_users_is_counted(monkeypatch):
    expected = dict(table()["mobilenet_v2"])
    monkeypatch.delitem(table(), "mobilenet_v2")
    assert figures("mobilenet_v2") == expected


def test_table(run):
    status, out, err = run()
    lines = out.splitlines()
    assert (status, err) == (0, "") and max(map(len, lines)) <= 80 and "…" not in out
    rows = {line.split()[0]: line.split() for line in lines if line.strip()}
    assert rows.keys() >= set(cnnfast.list_models())
    assert rows["mobilenet_v2"][1:] == ["3.50M", "301M", "224", "2018", "torchvision,", "timm"]
    assert rows["xception"][1:5] == ["22.9M", "8.36G", "299", "2016"]


@pytest.mark.parametrize(
    "number, says",
    [
        (99_960_000, "100M"),
        (9_996_000, "10.0M"),
        (999_600, "1.00M"),
        (61_706, "61.7k"),
        (480_309_308, "480M"),
        (7, "7"),
    ],
)
def test_three_digits(number, says):
    assert short(number) == says


def test_pattern_and_json(run):
    status, out, _ = run("*lite0", "--json")
    row = next(row for row in json.loads(out) if row["name"] == "tf_efficientnet_lite0")
    assert status == 0 and all("lite0" in one["name"] for one in json.loads(out))
    assert (row["parameters"], row["macs"], row["input_size"]) == (4_652_008, 385_187_552, [3, 224, 224])
    assert row["checkpoints"] == {"timm": "tf_efficientnet_lite0", "efficientnet_lite_pytorch": None}
    assert row["year"] == 2020 and row["paper"].startswith("https://")


def test_nothing_found(run):
    status, out, err = run("lite")
    assert (status, out) == (2, "") and "no network is called lite" in err and err.count("\n") == 1


@pytest.mark.parametrize("command", [["list", "*lite0"], ["summary", "lenet5"]])
def test_a_terminal_of_few_characters(command, tmp_path):
    """Signs that it lacks become "?"; nothing ends in a traceback."""
    run = subprocess.run(
        [sys.executable, "-m", "cnnfast", *command],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "80", "NO_COLOR": "1"},
        capture_output=True,
        timeout=120,
    )
    assert (run.returncode, run.stderr) == (0, b"")
    lines = run.stdout.decode("ascii").splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) > 4
