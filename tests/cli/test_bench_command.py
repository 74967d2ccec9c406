"""`cnnfast bench` and `cnnfast info` from their arguments to their output.

Fails if an option doesn't reach the run, an unknown name ends in a traceback, or the JSON isn't written.
"""

import json
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import product

import pytest
import torch

from cnnfast.bench import ceilings, measure, performance
from cnnfast.cli.main import main

EXTRA = ("openvino", "timm", "matplotlib")
needs_extra = pytest.mark.skipif(not all(map(find_spec, EXTRA)), reason="the extra bench isn't installed")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ops", "--op", "conv3d"], "no op conv3d to bench; there are depthwise_conv2d"),
        (["models", "--model", "exception"], "no model exception to bench; there are "),
        (["ops", "--peers", "eager,tensorflow"], "--peers: no peer tensorflow; there are eager"),
    ],
)
def test_unknown_names(arguments, said, capsys):
    assert main(["bench", *arguments]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith("cnnfast bench: error: ") and said in err[0]


@pytest.mark.slow
def test_one_op_in_a_fresh_process(tmp_path, capsys):
    file = tmp_path / "out" / "ops.json"
    arguments = ["--quick", "--op", "pointwise_conv2d", "--rounds", "2", "--threads", "1", "--peers", "eager"]
    assert main(["bench", "ops", *arguments, "--json", str(file)]) == 0
    assert "pointwise_conv2d" in capsys.readouterr().out
    written = json.loads(file.read_text())
    (cell,) = written["cells"]
    assert cell["settings"]["peers"] == ["eager"] and cell["settings"]["threads"] == 1
    (row,) = cell["rows"]
    assert row["problems"] == {} and set(row["timings"]) == {"cnnfast", "eager"}
    assert [len(rounds) for rounds in row["timings"]["cnnfast"]["samples_ms"]] == [2]


@dataclass(frozen=True)
class Layer:
    """In a network's place."""

    name: str
    group: str = "model"

    def build(self, settings):
        plain = torch.nn.Conv2d(4, 8, 3).requires_grad_(False).to(settings.dtype)
        x = torch.randn(settings.batch, 4, 9, 9).to(settings.dtype)
        return measure.Problem(lambda: lambda: plain(x), plain, x, flops=28224, nbytes=4000)


def planted(monkeypatch, interrupt_at=None):
    """`run_cases` of a layer, in this process; OpenVINO can't run. What it returns grows with each measurement."""

    def absent(module, x):
        raise RuntimeError("no such device")

    told = []

    def run_cases(cases, settings, processes, isolate):
        brief = replace(settings, sample_seconds=1e-4, gemm_size=64)
        for case in cases * processes:
            if len(told) == interrupt_at:
                raise KeyboardInterrupt
            told.append(isolate)
            yield measure.measure(Layer(case.name), brief, measure.PEERS | {"openvino": absent})

    monkeypatch.setattr(measure, "run_cases", run_cases)
    monkeypatch.setattr(ceilings, "dram_rate", lambda threads: 1e10)
    return told


MODELS = "--model mobilenet_v2 --model mobilenet_v1"
FLAGS = "--batch 1,3 --dtype float32,bfloat16 --threads 1,2 --peers eager_channels_last,openvino --rounds 2"


def words(text):
    return " ".join(text.split())


@pytest.fixture
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@needs_extra
def test_cells_their_picture_and_their_page(tmp_path, monkeypatch, capsys, same_threads):
    """Every cell in one file; a peer that can't run is a sentence in the output, the file and the page."""
    told, file, png = planted(monkeypatch), tmp_path / "a.json", tmp_path / "a.png"
    monkeypatch.setenv("COLUMNS", "80")
    command = f"bench models {MODELS} {FLAGS}"
    assert main([*command.split(), "--json", str(file), "--png", str(png)]) == 1
    out = capsys.readouterr().out
    assert len(told) == 16 and all(told) and max(map(len, out.splitlines())) <= 80
    assert words(out).count("mobilenet_v1: openvino: cannot run: RuntimeError: no such device") == 8
    written = json.loads(file.read_text())
    cells = [tuple(cell["settings"][key] for key in ("dtype", "threads", "batch")) for cell in written["cells"]]
    assert cells == list(product(("float32", "bfloat16"), (1, 2), (1, 3)))
    for cell in written["cells"]:
        assert [row["name"] for row in cell["rows"]] == ["mobilenet_v2", "mobilenet_v1"]
        assert all(set(row["problems"]) == {"openvino"} and row["best_peer"] for row in cell["rows"])
    assert written["command"] == f"cnnfast {command} --processes 1"
    page = performance.text([file])
    assert page.count("\n| mobilenet_v1 | 3 | ") >= 4
    assert page.count("OpenVINO, all cells: cannot run: RuntimeError: no such device.") == 4
    assert png.read_bytes()[1:4] == b"PNG" and int.from_bytes(png.read_bytes()[16:20], "big") == 1200  # pixels


@needs_extra
def test_ctrl_c_leaves_what_was_measured(tmp_path, monkeypatch, capsys, same_threads):
    planted(monkeypatch, interrupt_at=5)
    assert main([*f"bench models {MODELS} {FLAGS}".split(), "--json", str(tmp_path / "a.json")]) == 130
    assert "interrupted: reporting 1 of 2 measurements of batch 1, float32, threads 2" in words(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]
    cells = json.loads((tmp_path / "a.json").read_text())["cells"]
    assert [len(cell["rows"]) for cell in cells] == [2, 2, 1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dtype", "float32,int8"], "--dtype: no dtype 'int8'; there are float32, float64, bfloat16, float16"),
        (["--batch", "1,0"], "--batch: 0 is not 1 or more"),
        (["--threads", "1,x"], "--threads: x is not 1 or more"),
    ],
)
def test_lists(arguments, said, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "models", *arguments])
    assert said in capsys.readouterr().err


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"cnnfast", "build", "machine", "ops"} <= set(facts)
    assert main(["info"]) == 0
    assert "depthwise_conv2d" in capsys.readouterr().out
