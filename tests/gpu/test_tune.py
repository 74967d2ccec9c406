"""Tuning on a GPU, with times of its own; a few candidates of each kernel, since each is compiled.

Fails if what is tuned computes a wrong result, meanwhile or afterwards, depends on the batch or on anything but what
was kept, or if times are none.
"""

import math

import pytest
import torch
from gpu import calls
from gpu.calls import require, run
from numerics import draw, float32_by, fresh_generator

from cnnfast import info
from cnnfast.cli.main import main

pytestmark = pytest.mark.gpu
OPS = ("pointwise_conv2d", "depthwise_conv2d", "conv2d", "squeeze_excite")
DTYPES = (torch.bfloat16, torch.float32)


@pytest.fixture
def tuning(tmp_path, monkeypatch):
    """The module, for a cache of the test's own."""
    module = pytest.importorskip("cnnfast.kernels.tuning", reason="triton is not installed")
    monkeypatch.setenv("CNNFAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(module.tuned, "_entries", {})
    listed = module.candidates
    monkeypatch.setattr(module, "candidates", lambda default, vary: listed(default, vary)[:3])
    with float32_by("ieee"):
        yield module


def check_tuned(case, tuning, monkeypatch, generator):
    """Values and gradients while the op is tuned and afterwards, as a later process runs it."""
    outcomes = []
    grad = draw(generator, case.reference(**case.tensors, **case.options).shape, case.x.dtype).to(case.x.device)
    before = calls.gradients(case, grad, "triton")
    assert not tuning.tuned.path(tuning.tuned.identity(case.x.device)).exists()
    with tuning.tuning(outcomes.append):
        case.check(run(case, "triton"))
        meanwhile = calls.gradients(case, grad, "triton")
    assert outcomes and all(0 < outcome.best_ms <= outcome.default_ms < math.inf for outcome in outcomes)
    monkeypatch.setattr(tuning.tuned, "_entries", {})
    assert tuning.tuned.entries(case.x.device) == {outcome.key: outcome.best for outcome in outcomes}
    y, after = run(case, "triton"), calls.gradients(case, grad, "triton")
    case.check(y)
    if not {"gate", "residual"} & set(case.tensors):
        assert torch.equal(case.run(x=case.x[1:2], backend="triton"), y[1:2])
    tolerance = 2e-2 if case.x.dtype.itemsize == 2 else 1e-4
    for name in before:
        for ours in (meanwhile[name], after[name]):
            error = (ours.double() - before[name].double()).norm() / before[name].double().norm()
            assert error < tolerance, name
    with tuning.tuning(outcomes.append):
        count = len(outcomes)
        run(case, "triton")
    assert len(outcomes) == count, "tuned again"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_tune(op, dtype, tuning, monkeypatch):
    require(op, "triton")
    generator = fresh_generator()
    row = dict(n=4, c=64, out=72, size=(14, 15), dtype=dtype, activation="silu", residual=op == "conv2d")
    check_tuned(calls.away_from_kinks(op, generator, **row), tuning, monkeypatch, generator)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_the_current_one(tuning, monkeypatch):
    require("pointwise_conv2d", "triton")
    generator = fresh_generator()
    case = calls.away_from_kinks("pointwise_conv2d", generator, n=2, c=24, device="cuda:1", activation=None)
    check_tuned(case, tuning, monkeypatch, generator)


def test_command(tuning, capsys):
    require("local_response_norm", "triton")
    assert main(["tune", "--op", "local_response_norm", "--batch", "2", "--train"]) == 0
    said = capsys.readouterr()
    assert "local_response_norm_fwd_kernel" in said.out and "local_response_norm_bwd_kernel" in said.out
    facts = info.tuned_facts()[torch.cuda.current_device()]
    assert facts["entries"] == said.out.count("_kernel, ") > 2 and facts["file"] in said.err
    assert main(["tune", "--clear"]) == 0 and info.tuned_facts()[torch.cuda.current_device()]["entries"] == 0
