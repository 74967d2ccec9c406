"""The benchmark itself: ratios and intervals, a wrong contender gets no speed, the report's fields.

Fails if a planted wrong or raising contender is timed, if a mismatch is judged by the tensor's maximum, if a ratio is
upside down, or if a field of the JSON is missing. Nothing here asserts on a time that was measured.
"""

import json
import math
import threading
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from cnnfast.bench import ceilings, measure, peers, report, tables, timing
from cnnfast.bench.environment import environment


@dataclass(frozen=True)
class TinyCase:
    group: str = "tiny"
    name: str = "4 @5"

    def build(self, settings):
        plain = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False).to(settings.dtype)
        x = torch.randn(settings.batch, 4, 5, 5).to(settings.dtype)
        return measure.Problem(lambda: lambda: plain(x), plain, x, flops=7200, nbytes=1376)


def wrong(module, x):
    return lambda: module(x) * torch.tensor([1.0, 1.0, 1.0, 1.01]).view(1, 4, 1, 1)


def absent(module, x):
    raise ModuleNotFoundError("no such runtime\nand a long story")


def quick_settings(*names, **kw):
    return measure.Settings(threads=1, rounds=3, sample_seconds=1e-4, gemm_size=256, peers=names, **kw)


@pytest.fixture(autouse=True)
def cheap_ceilings(monkeypatch):
    monkeypatch.setattr(measure.ceilings, "gemm_rate", lambda dtype, threads, size: 1e11)


def test_wrong_and_missing_peers_get_no_speed():
    settings = quick_settings("eager", "wrong", "absent")
    found = measure.measure(TinyCase(), settings, {"eager": peers.eager, "wrong": wrong, "absent": absent})
    row = report.make_row([found])
    assert row.problems["wrong"].startswith("wrong output: off by")
    assert row.problems["absent"] == "cannot run: ModuleNotFoundError: no such runtime"
    assert set(row.timings) == {"cnnfast", "eager"} and set(row.ratios) == {"eager"}
    assert len(found.contenders["eager"].seconds) == 3 and found.contenders["wrong"].seconds == []


def test_wrong_cnnfast_gets_no_speed_and_no_ratio():
    class Wrong(TinyCase):
        def build(self, settings):
            problem = super().build(settings)
            return measure.Problem(lambda: wrong(problem.plain, problem.x), problem.plain, problem.x, 1, 1)

    row = report.make_row([measure.measure(Wrong(), quick_settings("eager"))])
    assert "cnnfast" in row.problems and row.ratios == {} and row.ratio is None
    assert report.geometric_means([row]) == {}


def test_a_problem_in_one_process_is_a_problem():
    good = measure.measure(TinyCase(), quick_settings("eager"))
    bad = measure.measure(TinyCase(), quick_settings("eager"))
    bad.contenders["eager"] = measure.Contender(problem="wrong output")
    row = report.make_row([good, bad])
    assert row.problems == {"eager": "wrong output"} and len(row.timings["cnnfast"].samples_ms) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_mismatch(dtype):
    expected = torch.randn(2, 6, 9, 9, dtype=torch.float64) * torch.logspace(0, -1, 6).view(1, 6, 1, 1)
    output = expected.to(dtype)
    assert measure.mismatch(output, expected, dtype) is None
    assert "complex64 instead of" in measure.mismatch(output.cfloat(), expected, dtype)
    assert "shape" in measure.mismatch(output[:1], expected, dtype)
    for value in (0.0, math.nan):
        spoilt = output.clone()
        spoilt[:, 5] = value  # the smallest channel, a tenth of the largest
        assert "off by" in measure.mismatch(spoilt, expected, dtype)


@pytest.mark.parametrize("name", ["eager", "eager_channels_last"])
def test_peers_compute_the_module(name):
    module = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU6()).requires_grad_(False)
    x = torch.randn(2, 3, 11, 11)
    y = peers.PEERS[name](module, x)()
    torch.testing.assert_close(y, module(x))
    assert y.is_contiguous(memory_format=torch.channels_last) == (name == "eager_channels_last")


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_engines_compute_the_module(name, dtype):
    """In float32 as exact as float32 is; in bfloat16 by bfloat16, where they have it."""
    pytest.importorskip(name)
    module = nn.Sequential(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 1)).requires_grad_(False)
    x = torch.randn(2, 32, 23, 23).to(memory_format=torch.channels_last)
    expected = module(x)
    if (name, dtype) == ("onnxruntime", torch.bfloat16):
        with pytest.raises(TypeError, match="compute no bfloat16"):
            peers.PEERS[name](module.to(dtype), x.to(dtype))
        return
    y = peers.PEERS[name](module.to(dtype), x.to(dtype))()
    error = (y - expected).abs().max() / expected.abs().max()
    assert y.dtype == dtype and y.shape == expected.shape
    assert error < 1e-5 if dtype == torch.float32 else 1e-4 < error < 3e-2


def test_logits_may_be_five_times_farther_off():
    expected = torch.randn(1, 1000, dtype=torch.float64)
    off = (expected + 0.3 * torch.ones_like(expected)).bfloat16()
    assert measure.mismatch(off, expected, torch.bfloat16) is None
    image = expected.reshape(1, 10, 10, 10)
    assert "off by" in measure.mismatch(off.reshape(image.shape), image, torch.bfloat16)
    assert "off by" in measure.mismatch(-off, expected, torch.bfloat16)


def fake_row(name, ours, channels_last, inductor):
    rounds = {"cnnfast": ours, "eager_channels_last": channels_last, "inductor": inductor}
    contenders = {key: measure.Contender(seconds=[value] * 4, peak_growth=1000) for key, value in rounds.items()}
    return report.make_row([measure.Measurement("op", name, 2_000_000, 1000, 1e9, 1e9, contenders)])


def test_report_says_where_it_loses(capsys):
    from rich.console import Console

    rows = [fake_row("won", 4e-3, 16e-3, 12e-3), fake_row("lost", 4e-3, 3e-3, 9e-3)]
    assert rows[0].best_peer == "inductor" and rows[1].best_peer == "eager_channels_last"
    assert rows[0].timings["cnnfast"].percent_of_floor == pytest.approx(50)
    assert rows[0].timings["cnnfast"].gflop_per_s == pytest.approx(0.5)
    assert report.geometric_means(rows)["op"].value == pytest.approx(1.5)
    assert [row.name for row in report.losses(rows)] == ["lost"]
    tables.print_report(rows, ("eager_channels_last", "inductor"), "title", Console(width=200))
    text = capsys.readouterr().out
    assert "op: 1.50 (1.50-1.50) x the fastest of eager_channels_last, inductor" in text
    assert "op lost: 0.75 (0.75-0.75) eager_channels_last" in text


def test_json_has_what_it_promises(tmp_path):
    settings = quick_settings("eager", "eager_channels_last")
    found = [measure.measure(TinyCase(), settings) for _ in range(2)]
    report.write_json(report.to_json(report.make_rows(found), found, settings, 1e10), tmp_path / "a" / "b.json")
    written = json.loads((tmp_path / "a" / "b.json").read_text())
    assert set(written) == {"settings", "ceilings", "geometric_means", "rows", "losses"}
    facts = {"versions", "cpu", "cpu_mhz", "cores", "isa", "restrictions", "commit", "date"}
    assert set(environment()) == facts
    assert written["settings"]["dtype"] == "float32" and written["settings"]["threads"] == 1
    assert written["ceilings"] == {"gemm_gflop_per_s": 100.0, "dram_copy_gb_per_s": 10.0}
    (row,) = written["rows"]
    assert row["best_peer"] == "eager_channels_last" and row["flops"] == 7200 and row["floor_ms"] > 0
    assert set(row["ratios"]["eager"]) == {"value", "low", "high"}
    ours = row["timings"]["cnnfast"]
    assert set(ours["ms"]) == {"p20", "p50", "p80"} and [len(rounds) for rounds in ours["samples_ms"]] == [3, 3]
    assert {"gflop_per_s", "gb_per_s", "percent_of_floor"} < set(ours)
    assert set(row["peak_growth_bytes"]) <= {"cnnfast"}


def test_ceilings_are_rates():
    assert 1e6 < ceilings.copy_rate(1 << 20, 1) < 1e13  # bytes/s, not bytes or seconds


def test_fresh_processes():
    """Cases travel to another process and back; one that dies is a row that says so, and the next one runs."""
    settings = quick_settings("eager")
    died, lived = measure.run_cases([DyingCase(), TinyCase()], settings, processes=1, isolate=False)
    assert {n: c.problem for n, c in died.contenders.items()} == dict.fromkeys(("cnnfast", "eager"), "the process died")
    assert lived.contenders["cnnfast"].problem is None and len(lived.contenders["eager"].seconds) == 3


class DyingCase(TinyCase):
    def build(self, settings):
        import os

        os._exit(9)


@dataclass(frozen=True)
class Allocating(TinyCase):
    """Ours takes 64 MB in its second call, after 128 MB that are gone once it is loaded."""

    def build(self, settings):
        problem = super().build(settings)

        def ours():
            assert threading.current_thread() is not threading.main_thread()
            torch.ones(32 << 20)
            calls = []

            def call():
                calls.append(torch.ones(16 << 20) if len(calls) == 1 else None)
                return problem.plain(problem.x)

            return call

        return measure.Problem(ours, problem.plain, problem.x, 1, 1)


@pytest.mark.skipif(timing.peak_growth(lambda: None)[1] is None, reason="/proc/self/clear_refs can't be written here")
def test_memory_is_that_of_calls_after_loading():
    found = measure.measure(Allocating(), quick_settings("eager", memory=True), only="cnnfast")
    assert set(found.contenders) == {"cnnfast"} and found.contenders["cnnfast"].seconds == []
    row = report.make_row([found])
    assert row.timings == row.problems == {} and 60e6 < row.peak_growth_bytes["cnnfast"] < 80e6


def test_memory_says_where_it_cannot_be_measured(monkeypatch):
    monkeypatch.setattr(measure, "peak_growth", lambda call: (call(), None))
    row = report.make_row([measure.measure(TinyCase(), quick_settings(memory=True), only="cnnfast")])
    assert row.peak_growth_bytes == {} and "only Linux" in row.problems["cnnfast"]


def test_scratch_of_loading_counts_as_growth():
    """What a thread holds goes with the thread that loads."""
    local = threading.local()

    def prepare():
        local.scratch = object()
        return lambda: torch.tensor(hasattr(local, "scratch"))

    assert not measure._loaded_elsewhere(prepare, 1)()


@pytest.mark.slow  # a process for each
def test_memory_of_each_in_a_fresh_process():
    settings = quick_settings("eager", "onnxruntime", memory=True, dtype=torch.bfloat16)
    (found,) = measure.run_cases([TinyCase()], settings, processes=3, isolate=True)
    row = report.make_row([found])
    assert set(row.peak_growth_bytes) == {"cnnfast", "eager"} and "bfloat16" in row.problems["onnxruntime"]


@pytest.mark.parametrize("memory", [False, True], ids=["times", "memory"])
def test_tables_fit_80_columns(memory, capsys):
    from rich.console import Console

    rounds = {name: measure.Contender(seconds=[123.456e-3] * 4) for name in ("cnnfast", *peers.PEERS)}
    if memory:
        rounds = {name: measure.Contender(peak_growth=1_234_500_000) for name in rounds}
    rows = [report.make_row([measure.Measurement("model", "tf_efficientnet_lite0", 10**9, 10**6, 1e9, 1e9, rounds)])]
    tables.print_report(rows, tuple(peers.PEERS), "title", Console(width=80))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "\x1b" not in out
    cells = next(line for line in out.splitlines() if "tf_efficientnet_lite0" in line).split()
    assert cells[1:] == ["1234.5"] * 6 + ["1.00"] if memory else cells[1:3] == ["123.5", "810"] and len(cells) == 10
