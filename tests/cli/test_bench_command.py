"""`cnnfast bench` and `cnnfast info` from their arguments to their output.

Fails if an option doesn't reach the run, an unknown name ends in a traceback, or the JSON isn't written.
"""

import json

import pytest

from cnnfast.cli.main import main


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


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"cnnfast", "build", "machine", "ops"} <= set(facts)
    assert main(["info"]) == 0
    assert "depthwise_conv2d" in capsys.readouterr().out
