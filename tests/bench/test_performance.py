"""docs/performance.md is what bench/performance.py makes of the committed results, and what that makes of results.

Fails if a cell, a peer's problem or an interval doesn't reach the page, a bar is held against the wrong peer, a cell
below its bar isn't listed, or the page isn't what its command makes.
"""

import json
import re
from pathlib import Path

import pytest
import torch

from cnnfast.bench import measure, performance, report

ROOT = Path(__file__).parents[2]
TO_BEAT = ("eager_channels_last", "inductor", "onnxruntime", "openvino")


def jittered(ms):
    """Three processes' samples about `ms`."""
    return [(ms * (1 + 0.02 * torch.rand(5).sub(0.5))).div(1e3).tolist() for _ in range(3)]


def document(path, cells, date="2026-11-24T00:00:00+00:00", **environment):
    """A file of `cells`: settings, and by network the ms (or MB, or problem) of each contender."""
    facts = {"isa": {"cnnfast": "amx", "torch": "AVX512"}, "restrictions": {}, "versions": {"torch": "2.13"}}
    facts |= {"cpu": "A CPU", "cores": 2, "commit": "0123456789ab", "date": date}
    written = {"environment": facts | environment, "command": "cnnfast bench models --batch 1,8", "cells": []}
    for of, networks in cells:
        settings = measure.Settings(**{"threads": 2, "peers": TO_BEAT} | of)
        rows, measurements = [], []
        for name, contenders in networks.items():
            samples = {c: None if isinstance(v, str) or settings.memory else jittered(v) for c, v in contenders.items()}
            for process in range(1 if settings.memory else 3):
                found = {}
                for contender, value in contenders.items():
                    if isinstance(value, str):
                        found[contender] = measure.Contender(problem=value)
                    elif settings.memory:
                        found[contender] = measure.Contender(peak_growth=int(value * 1e6))
                    else:
                        found[contender] = measure.Contender(seconds=samples[contender][process])
                rate = 0.0 if settings.memory else 1e9
                measurements.append(measure.Measurement("model", name, 1_000_000, 1000, rate, rate, found))
        rows = report.make_rows(measurements)
        written["cells"].append(report.to_json(rows, measurements, settings, 1e10))
    path.write_text(json.dumps(written))
    return path


def contenders(ours, channels_last, inductor, onnxruntime, openvino):
    return dict(zip(("cnnfast", *TO_BEAT), (ours, channels_last, inductor, onnxruntime, openvino), strict=True))


def rows_of(page, heading):
    """The table under a heading."""
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [[part.strip() for part in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def number(text):
    return float(text.split()[0])


def test_every_cell_and_what_is_below_its_bar(tmp_path):
    none = "cannot run: TypeError: ONNX Runtime's CPU kernels compute no bfloat16"
    cells = [
        ({"batch": 1}, {"xception": contenders(2, 8, 6, 5, 3), "vgg16": contenders(2, 8, 6, 5, 1.9)}),
        ({"batch": 8}, {"xception": contenders(20, 80, 60, 50, 15), "resnet50": contenders(2, 8, 6, 5, 1.6)}),
        (
            {"dtype": torch.bfloat16},
            {"alexnet": contenders(2, 8, 3, none, 1), "googlenet": contenders(2, 8, 1.5, none, 1)},
        ),
        (
            {"memory": True, "batch": 8},
            {"vgg16": contenders(50, 90, 40, 80, 70), "mobilenet_v2": contenders(43, 9e3, 40, 80, 70)},
        ),
    ]
    page = performance.text([document(tmp_path / "a.json", cells)])
    table = rows_of(page, "float32, 2 threads, amx")
    assert [(row["network"], row["batch"]) for row in table] == [
        ("xception", "1"),
        ("vgg16", "1"),
        ("xception", "8"),
        ("resnet50", "8"),
    ]
    first = table[0]
    assert first["the best"] == "OpenVINO" and number(first["ratio to the best"]) == pytest.approx(1.5, abs=0.03)
    low, high = map(float, re.search(r"\((.+)-(.+)\)", first["ratio to the best"]).groups())
    assert 1.45 < low <= number(first["ratio to the best"]) <= high < 1.55
    assert number(first["cnnfast"]) == pytest.approx(2, rel=0.02) and first["% of floor"] == "50"
    below = {(row["network"], row["batch"], row["dtype"]): row["cnnfast"] for row in rows_of(page, "Below the bar")}
    assert list(below) == [
        ("xception", "8", "float32"),  # 0.75 of the best
        ("resnet50", "8", "float32"),  # dense: 0.8, under 0.9; vgg16's 0.95 isn't
        ("googlenet", "1", "bfloat16"),  # of Inductor; alexnet's OpenVINO is twice as fast, which is reported only
        ("vgg16", "8", "float32"),  # memory: 1.25 of the leanest
    ]
    assert (
        below["googlenet", "1", "bfloat16"].endswith("Inductor")
        and "1.25 times Inductor's" in below["vgg16", "8", "float32"]
    )
    assert f"ONNX Runtime, all cells: {none}." in page
    (separable, *_) = rows_of(page, "Means")
    assert separable["networks"] == "separable" and separable["batch"] == "1, 8" and separable["cells"] == "2"
    assert number(separable["the best"]) == pytest.approx((1.5 * 0.75) ** 0.5, abs=0.03)
    memory = {row["network"]: row["to the leanest"] for row in rows_of(page, "Memory")}
    assert memory == {"vgg16": "1.25 (Inductor)", "mobilenet_v2": "1.07 (Inductor)"}


def test_a_cell_without_a_ratio_is_below_its_bar(tmp_path):
    cells = [({}, {"xception": contenders("wrong output: off by 1e9", 8, 6, 5, 3)})]
    page = performance.text([document(tmp_path / "a.json", cells)])
    (row,) = rows_of(page, "Below the bar")
    assert row["cnnfast"] == "no ratio: wrong output: off by 1e9"
    assert "cnnfast, all cells: wrong output: off by 1e9." in page


def test_a_later_file_takes_a_cells_place(tmp_path):
    old = document(tmp_path / "old.json", [({}, {name: contenders(4, 8, 6, 5, 3) for name in ("xception", "vgg16")})])
    of_vgg = [({"peers": TO_BEAT[:2]}, {"vgg16": {"cnnfast": 2, "eager_channels_last": 6, "inductor": 4}})]
    new = document(tmp_path / "new.json", of_vgg, date="2026-11-25T00:00:00+00:00")
    for files in ([old, new], [new, old]):
        page = performance.text(files)
        times = {row["network"]: number(row["cnnfast"]) for row in rows_of(page, "float32, 2 threads, amx")}
        assert times == pytest.approx({"xception": 4, "vgg16": 2}, rel=0.02)
        assert "2 cells, 1 of them measured again later." in page
        assert "OpenVINO, vgg16 at batch 1: not among the peers of that run." in page


def test_batches_threads_and_restricted_machines(tmp_path):
    cells = [({"batch": 8}, {"xception": contenders(80, 1, 1, 1, 1)})]
    cells += [({"batch": 32}, {"xception": contenders(320, 1, 1, 1, 1)})]
    cells += [({"batch": 8, "threads": 1}, {"xception": contenders(150, 1, 1, 1, 1)})]
    isa = {"isa": {"cnnfast": "avx2", "torch": "AVX2"}, "restrictions": {"CNNFAST_ISA": "avx2"}}
    page = performance.text([document(tmp_path / "a.json", cells, **isa)])
    rows = {row["time of"]: number(row["ratio"]) for row in rows_of(page, "Batches and threads")}
    expected = {"image at batch 32 / at batch 8, 2 threads": 1, "1 thread / 2 threads, batch 8": 1.875}
    assert rows == pytest.approx(expected, rel=0.03)
    assert "0 of 0 cells." in page  # reported, held against no bar
    assert rows_of(page, "float32, 1 thread, avx2, CNNFAST_ISA=avx2")


def test_reasons_stand_beneath_the_list(tmp_path):
    page = performance.text([document(tmp_path / "a.json", [({}, {"vgg16": contenders(2, 1, 1, 1, 1)})])], "Because.")
    assert "Because." in page.split("## Below the bar")[1].split("\n## ")[0]


def test_only_cells(tmp_path):
    (tmp_path / "old.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match=r"^old.json has no cells: want a file written by cnnfast bench models$"):
        performance.text([tmp_path / "old.json"])


@pytest.mark.skipif(not (ROOT / performance.FILE).exists(), reason="not measured yet")
def test_file_is_up_to_date():
    written = (ROOT / performance.FILE).read_text(encoding="utf-8")
    command = re.search(r"`python -m cnnfast.bench.performance (.+)`", written)[1]
    reasons = ROOT / performance.REASONS
    made = performance.text(
        [ROOT / name for name in command.split()], reasons.read_text(encoding="utf-8") if reasons.exists() else ""
    )
    assert made == written, f"run python -m cnnfast.bench.performance {command}"
