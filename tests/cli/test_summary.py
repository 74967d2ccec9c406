"""`cnnfast summary` from its arguments to tables, files and exit status.

Fails if a line is wider than 80 columns or needs colour, the totals aren't last in the table, a file is left broken, or
a mistake ends in more than a sentence.
"""

import csv
import json

import pytest
import torch
from torch import nn

from cnnfast.bench import ceilings as measured
from cnnfast.cli import summary
from cnnfast.cli.main import main
from cnnfast.models import register_model, registry
from cnnfast.summary import Ceilings
from cnnfast.summary.tables import short


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `cnnfast summary ...` on a machine that is known: (exit status, lines of stdout, lines of stderr)."""
    machine = Ceilings("a machine", 1e11, lambda nbytes: 1e11 if nbytes < 1 << 20 else 1e10, 1e10)
    monkeypatch.setattr(summary, "measured_ceilings", lambda dtype, threads, device: machine)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*args):
        status = main(["summary", *map(str, args)])
        out, err = capsys.readouterr()
        return status, [line.rstrip() for line in out.splitlines()], err.splitlines()

    return run


def test_table(run):
    status, lines, err = run("mobilenet_v2")
    assert (status, err) == (0, []) and max(map(len, lines)) <= 80 and "\x1b" not in "".join(lines)
    assert lines[0] == "mobilenet_v2, input 1×3×224×224, float32"
    (block,) = [line for line in lines if line.startswith(" features.3 ")]
    assert block.split()[:5] == ["features.3", "24×56×56", "8.83k", "25.7M", "23.8MB"] and block.endswith("packed")
    (total,) = [line for line in lines if line.startswith("total")]
    assert total.split()[:5] == ["total", "1000", "3.5M", "301M", "173MB"] and "100.0%" in total
    after = lines[lines.index(total) :]
    assert not any(line.startswith((" features", "stage")) for line in after)
    assert any("1/160 + 1/9 = 0.1174" in line for line in after)


@pytest.mark.parametrize("name", ["xception", "se_resnet50"])
def test_long_numbers_fit_80_columns(run, name):
    status, lines, _ = run(name, "--batch", 64, "--dtype", "float64")
    assert status == 0 and max(map(len, lines)) <= 80 and not any("…" in line for line in lines[3:])


@pytest.mark.parametrize("device, says", [("cuda:99", "--device cuda:99: "), ("meta", "--device meta: want cpu, cuda")])
def test_devices_that_arent_here(run, device, says):
    status, lines, err = run("lenet5", "--device", device)
    assert (status, lines, len(err)) == (2, [], 1) and says in err[0]


def test_a_gpu(run, monkeypatch):
    """The layers that run there; the choice needs no GPU, only its ceilings do."""
    pytest.importorskip("triton")
    monkeypatch.setattr(summary, "parse_device", lambda name: torch.device(name))
    status, lines, _ = run("mobilenet_v2", "--device", "cuda")
    (block,) = [line for line in lines if line.startswith(" features.3 ")]
    assert status == 0 and block.split()[-1] in ("triton", "cuda")


def test_options(run):
    _, lines, _ = run("mobilenet_v1", "--size", 160, "--batch", 2, "--dtype", "bfloat16", "--num-classes", 7)
    assert lines[0] == "mobilenet_v1, input 2×3×160×160, bfloat16"
    assert [line.split()[:2] for line in lines if line.startswith("total")] == [["total", "7"]]


def test_wide_has_the_plain_layers(run):
    _, lines, _ = run("se_resnet50", "--wide")
    assert any(line.split()[:3] == ["layer1.0.se_module.fc1", "PointwiseConv2d", "16×1×1"] for line in lines)
    assert any("2 pointwise_conv2d, conv2d, squeeze_excite" in line for line in lines)
    assert not any("…" in line for line in lines)


def test_files(run, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    files = [tmp_path / "a.csv", tmp_path / "a.json", tmp_path / "a.png"]
    status, _, err = run("xception", "--csv", files[0], "--json", files[1], "--plot", files[2])
    assert status == 0 and err == [f"written: {file}" for file in files]
    assert sorted(tmp_path.iterdir()) == files
    assert [line["level"] for line in csv.DictReader(files[0].open())][-1] == "total"
    assert json.loads(files[1].read_text())["total"]["parameters"] == 22_855_952
    assert files[2].read_bytes().startswith(b"\x89PNG") and files[2].stat().st_size > 50_000


def test_interrupted_writing_leaves_the_old_file(run, tmp_path, monkeypatch):
    def interrupted(report):
        raise KeyboardInterrupt

    file = tmp_path / "a.json"
    file.write_text("old")
    monkeypatch.setattr("cnnfast.summary.to_json", interrupted)
    status, _, _ = run("mobilenet_v2", "--json", file)
    assert status == 130 and [*tmp_path.iterdir()] == [file] and file.read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mobilnet_v2"], "such as mobilenet_v2"),
        (["xception", "--size", "3"], "size must be one that xception takes, got 3 x 3: x must be at least 7 x 7"),
        (["mobilenet_v2", "--plot", "a.docx"], "--plot a.docx: want a name that ends in .png, .pdf or .svg"),
        (["mobilenet_v2", "--csv", "nowhere/a.csv"], "nowhere/a.csv: no such directory"),
        (["mobilenet_v2", "--json", "."], ".: is a directory"),
    ],
)
def test_one_sentence_and_exit_status_2(run, arguments, said):
    status, out, err = run(*arguments)
    assert (status, out, len(err)) == (2, [], 1)
    assert err[0].startswith("cnnfast summary: error: ") and said in err[0]


def test_nothing_to_draw(run, monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    register_model("pools")(lambda: nn.Sequential(nn.MaxPool2d(2)))
    assert run("pools")[0] == 0
    status, _, err = run("pools", "--plot", tmp_path / "a.png")
    assert status == 2 and "pools has no convolution or matrix product to draw" in err[0] and not [*tmp_path.iterdir()]
    assert "num_classes" in run("pools", "--num-classes", 3)[2][0]


@pytest.mark.parametrize("arguments", [[], ["mobilenet_v2", "--batch", "0"], ["mobilenet_v2", "--dtype", "int8"]])
def test_wrong_arguments(arguments):
    with pytest.raises(SystemExit) as exit_info:
        main(["summary", *arguments])
    assert exit_info.value.code == 2


def test_measured_ceilings(monkeypatch):
    """FLOP/s and bytes/s, not others; in 16 bits at least float32's product."""
    monkeypatch.setattr(measured, "_DRAM_BYTES", 1 << 22)
    machine = summary.measured_ceilings(torch.float16, 1, torch.device("cpu"))
    assert machine.flops >= measured.gemm_rate(torch.float32, 1, 1024) > 1e9
    assert 1e6 < machine.dram < 1e13 and 1e6 < machine.copy(1 << 16) < 1e13
    assert machine.machine.endswith(", 1 thread")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999.4, "999"), (999.6, "1k"), (1_234_567, "1.23M"), (3.5e9, "3.5G"), (0.4987, "0.499")],
)
def test_short(number, text):
    assert short(number) == text
