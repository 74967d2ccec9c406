"""`cnnfast bench gpu` as far as it goes without a GPU: every line but those that launch.

Fails if a part's file or the merged one lacks what ran, a red kernel keeps its speed, a wrong gradient is timed, a run
that is cut off loses what it has, or a machine without a GPU gets more than one sentence.
"""

import importlib.util
import json
import time
from dataclasses import replace

import pytest
import torch

import cnnfast
from cnnfast.bench import gpu, gpu_tests, train
from cnnfast.bench import ops as op_suite
from cnnfast.bench.device import Device
from cnnfast.bench.measure import OURS, Contender, Measurement, Settings
from cnnfast.cli.main import main

CPU = Device("cpu")
QUICK = Settings(1, rounds=2, sample_seconds=0.001, peers=("eager", "eager_channels_last"))


def depthwise(gradients=False, backend="triton"):
    (case,) = [case for case in op_suite.CASES if case.name == "1152 @7 k5 (lite0)" or "1152-1152 @7" in case.name]
    return gpu.Run(case, backend, gradients)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path, capsys):
    assert main(["bench", "gpu", "--part", "ops", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "torch sees no CUDA device" in line and not list(tmp_path.iterdir())


def test_rehearsal_of_the_ops(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PEERS", QUICK.peers)
    monkeypatch.setattr(gpu, "op_runs", lambda quick: [depthwise(), depthwise(gradients=True)])
    assert main(["bench", "gpu", "--part", "ops", "--out", str(tmp_path), "--rehearse"]) == 0
    out = capsys.readouterr().out
    assert "depthwise_conv2d by triton, with gradients" in out and "rehearsal" in out
    written = json.loads((tmp_path / "ops.json").read_text())
    assert written["rehearsal"] and written["left_out"] == []
    assert [set(row["timings"]) for row in written["rows"]] == [{OURS, *QUICK.peers}] * 2
    assert set(written["tests"].values()) == {"not run"}
    assert json.loads((tmp_path / "gpu.json").read_text()) == {"ops": written}


@pytest.mark.slow
def test_rehearsal_of_the_models(tmp_path, capsys):
    assert main(["bench", "gpu", "--part", "models", "--out", str(tmp_path), "--rehearse"]) == 0
    (row,) = json.loads((tmp_path / "models.json").read_text())["rows"]
    assert set(row["timings"]) == {OURS, *gpu.PEERS}


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_rehearsal_of_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PEERS", QUICK.peers)
    monkeypatch.setattr(gpu, "TRAINED", [replace(gpu.TRAINED[0], size=64)])
    monkeypatch.setattr(gpu, "TRAIN_RUNS", ((torch.float32, 2),))
    assert main(["bench", "gpu", "--part", "train", "--out", str(tmp_path), "--rehearse"]) == 0
    assert "training step" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "train.json").read_text())["rows"]
    assert set(row["timings"]) == {OURS, "eager_channels_last"}


def test_a_wrong_step_is_not_timed(monkeypatch):
    """The gradients of one contender are others."""
    honest = train._check

    def faulty(network, *arguments):
        if isinstance(network, cnnfast.models.mobilenet_v2.MobileNetV2):
            next(network.parameters()).data.mul_(-1)
        honest(network, *arguments)

    monkeypatch.setattr(train, "_check", faulty)
    result = gpu.measure_training(replace(gpu.TRAINED[0], size=64), replace(QUICK, batch=2), CPU)
    assert result.contenders["eager_channels_last"].problem is None
    assert (result.contenders[OURS].problem or "").startswith("wrong output: gradients off")


class OnceLogged(gpu_tests.Deadline):
    """Ends soon after each log, by its stem, says what it should; a minute later at the latest."""

    def __init__(self, folder, wanted):
        super().__init__(60)
        self.wanted = {folder / f"{stem}.log": text for stem, text in wanted.items()}

    def left(self):
        while super().left() > 0 and not all(text in log.read_text() for log, text in self.wanted.items()):
            time.sleep(0.1)
        return 3


def test_rehearsal_of_the_tests(tmp_path, capsys):
    folder = tmp_path / "tests/gpu"
    folder.mkdir(parents=True)
    (folder / "test_depthwise_conv2d.py").write_text(
        "import pytest\n@pytest.mark.parametrize('backend', ['triton', 'cuda'])\ndef test_it(backend):\n"
        "    assert backend == 'cuda'\n"
    )
    (folder / "test_slow_op.py").write_text(
        "import time\ndef test_fast(): pass\ndef test_forever():\n    time.sleep(60)\n"
    )
    start = time.monotonic()
    logs = {"test_depthwise_conv2d": "1 failed, 1 passed in", "test_slow_op": "test_fast PASSED"}
    result = gpu_tests.run_tests(folder, tmp_path, OnceLogged(tmp_path, logs))
    assert time.monotonic() - start < 60
    assert result["counts"] == {"test_depthwise_conv2d": {"failed": 1, "passed": 1}, "test_slow_op": {"passed": 1}}
    assert result["unfinished"] == ["test_slow_op"]
    assert set(result["compute_sanitizer"]) == {"memcheck", "racecheck", "synccheck"}
    assert all(said.startswith("not run") for said in result["compute_sanitizer"].values())
    assert gpu.verdict(result, "depthwise_conv2d", "triton") == "red"
    assert gpu.verdict(result, "depthwise_conv2d", "cuda") == "green"
    assert gpu.verdict(result, "slow_op", "triton") == "green"
    assert gpu.verdict(result, "pointwise_conv2d", "triton") == gpu.verdict(None, "slow_op", "cuda") == "not run"


SANITIZER = """#!/bin/sh
# Runs what it is told to sanitize; each tool ends in its own way.
[ "$1 $3 $4 $5 $6" = "--tool --kernel-name kns=cnnfast --error-exitcode 99" ] || exit 3
tool=$2; shift 6
[ $tool = synccheck ] && sleep 60
"$@" || exit 1
[ $PYTORCH_NO_CUDA_MEMORY_CACHING = 1 ] || exit 4
[ $tool = racecheck ] && exit 99
exit 0
"""


def test_compute_sanitizer(tmp_path, monkeypatch):
    folder = tmp_path / "tests/gpu"
    folder.mkdir(parents=True)
    (folder / "test_an_op.py").write_text(
        "import os, pytest\n@pytest.mark.parametrize('backend', ['triton', 'cuda'])\ndef test_small_shapes(backend):\n"
        "    assert backend == 'cuda' or 'PYTORCH_NO_CUDA_MEMORY_CACHING' not in os.environ\n"
        "def test_networks(): assert 'PYTORCH_NO_CUDA_MEMORY_CACHING' not in os.environ\n"
    )
    tool = tmp_path / "bin/compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert gpu_tests.find_sanitizer() is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_tests.find_sanitizer() == tool
    logs = {"test_an_op": "3 passed", "memcheck": "1 passed", "racecheck": "1 passed"}
    result = gpu_tests.run_tests(folder, tmp_path, OnceLogged(tmp_path, logs), sanitizer=tool)
    assert result["counts"] == {"test_an_op": {"passed": 3}}
    said = {"memcheck": "clean, 1 tests", "racecheck": "errors", "synccheck": "cut off"}
    assert result["compute_sanitizer"] == said


def test_what_the_sanitizer_says():
    assert gpu_tests.found(0, "t.py::test_small_shapes[cuda] SKIPPED") == "not run: no test of a C++ kernel ran"
    assert gpu_tests.found(0, "t.py::test_small_shapes[cuda] PASSED") == "clean, 1 tests"
    assert gpu_tests.found(1, "t.py::test_small_shapes[cuda] FAILED") == "failed with exit code 1"


@pytest.mark.slow
def test_the_gpu_suite_collects(tmp_path, capsys):
    assert main(["bench", "gpu", "--part", "tests", "--out", str(tmp_path), "--rehearse"]) == 0
    assert "test_depthwise_conv2d" in (tmp_path / "test_depthwise_conv2d.log").read_text()
    assert not json.loads((tmp_path / "gpu.json").read_text())["tests"]["unfinished"]


def test_a_red_kernel_has_no_speed():
    tests = {"outcomes": {"test_depthwise_conv2d": {"test_a[cuda]": "passed", "test_a[triton]": "error"}}}
    for backend, verdict, times in (("triton", "red", []), ("cuda", "green", [1.0])):
        measurement = Measurement(depthwise(backend=backend).group, "", contenders={OURS: Contender(seconds=[1.0])})
        assert gpu.without_speed_where_red(measurement, tests) == verdict
        assert measurement.contenders[OURS].seconds == times


@pytest.mark.parametrize("what", range(4))
def test_wrong_results_and_gradients_are_seen(what, monkeypatch):
    """Of the result, x, weight and bias."""
    run = depthwise(gradients=True)
    honest = gpu.with_gradients

    def faulty(function, module, x):
        call = honest(function, module, x)

        def spoilt():
            tensors = call()
            if x.dtype != torch.float64 and function is not module:  # ours
                tensors[what] = tensors[what] * 1.5
            return tensors

        return spoilt

    monkeypatch.setattr(gpu, "with_gradients", faulty)
    result = gpu.measure_op(run, QUICK, CPU)
    assert result.contenders["eager"].problem is None
    assert (result.contenders[OURS].problem or "").startswith("wrong")


def test_a_deadline_leaves_the_rest_out(monkeypatch):
    monkeypatch.setattr(gpu, "op_runs", lambda quick: [depthwise(), depthwise(gradients=True)])
    left_out = []
    deadline = gpu_tests.Deadline(3600)

    def measured(run, settings, device):
        deadline.end = 0
        return Measurement(run.group, run.case.name)

    monkeypatch.setattr(gpu, "measure_op", measured)
    assert len(list(gpu.measurements("ops", CPU, deadline, left_out))) == 1
    assert len(left_out) == 1 and "with gradients" in left_out[0]


def test_every_op_with_kernels_comes_early():
    """The first case of every op, backend and direction before the second of any."""
    pytest.importorskip("triton")
    runs = gpu.op_runs()
    groups = [run.group for run in runs]
    assert {run.backend for run in runs} >= {"triton"} and "depthwise_conv2d by triton, with gradients" in groups
    assert len(set(groups[: len(set(groups))])) == len(set(groups))
