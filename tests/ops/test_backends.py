"""The choice of backend: reasons, explicit choices, logging; each ISA on the CPU; the CUDA key without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numerics import fresh_generator
from op_cases import OPS, make

import cnnfast.ops
from cnnfast import _C, _library
from cnnfast.ops import _registration, backends

needs_no_cuda = pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a CUDA build")


@pytest.fixture
def fresh_choice():
    backends.choose.cache_clear()
    yield
    backends.choose.cache_clear()


@pytest.mark.parametrize("op", OPS)
def test_reference_is_the_reference(op):
    case = make(op, fresh_generator())
    assert torch.equal(case.run(backend="reference"), case.reference(**case.tensors, **case.options))
    assert torch.equal(case.run(backend="cpu"), case.run())


@pytest.mark.parametrize("op", OPS)
def test_can_run(op):
    for x in (None, "cpu", torch.device("cpu"), torch.empty(1)):
        assert cnnfast.ops.can_run(op, "cpu", x) == cnnfast.ops.can_run(f"{op}_packed", "cpu", x) == []
        assert cnnfast.ops.can_run(op, "reference", x) == []
    assert cnnfast.ops.can_run(op, "auto", "cpu") == []
    assert "triton takes tensors on cuda, not cpu" in cnnfast.ops.can_run(op, "triton", "cpu")
    assert cnnfast.ops.can_run(op, "cpu", "cuda") == ["cpu takes tensors on cpu, not cuda"]
    assert cnnfast.ops.can_run(op, "auto", "xpu") == ["no backend takes tensors on xpu"]
    assert cnnfast.ops.can_run(f"{op}_packed", "reference") == ["reference takes plain weights, not packed ones"]
    with pytest.raises(ValueError, match="op must be one of"):
        cnnfast.ops.can_run("conv3d")


@needs_no_cuda
def test_explicit_backend_that_cannot_run(fresh_choice):
    case = make("depthwise_conv2d", fresh_generator())
    with pytest.raises(
        ValueError, match="depthwise_conv2d on cpu, got 'cuda': cuda takes tensors on cuda, not cpu; torch"
    ):
        case.run(backend="cuda")
    with pytest.raises(ValueError, match=r"got .triton.: triton takes tensors on cuda, not cpu.*; backend=.reference"):
        case.run(backend="triton")


@pytest.mark.parametrize("op", OPS)
def test_no_silent_fallback_on_cuda(op, fresh_choice, monkeypatch):
    """Where nothing can run, the call says everything that stands in the way, and what could be asked for."""
    monkeypatch.setattr(_library, "cuda_missing", "the CUDA kernels were not built")
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    case = make(op, fresh_generator())
    message = f"run {op} on cuda, got 'auto': cuda: the CUDA kernels were not built; triton: .*; backend=\"reference\""
    with torch._subclasses.FakeTensorMode():
        fakes = {name: torch.empty(t.shape, device="cuda") for name, t in case.tensors.items()}
        with pytest.raises(ValueError, match=message):
            case.run(**fakes)


def test_cuda_key_calls_the_chosen_backend(fresh_choice, monkeypatch):
    """The same arguments less `backend` reach cnnfast_cuda or the Triton module."""
    calls = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getattr__(self, function):
            return lambda *args: calls.append((self.name, function, len(args)))

    monkeypatch.setattr(_library, "cuda_missing", None)
    monkeypatch.setattr(torch.ops, "cnnfast_cuda", Recorder("cuda"), raising=False)
    monkeypatch.setattr(_registration.importlib, "import_module", lambda name: Recorder(name))
    forward = _registration._cuda_kernel("depthwise_conv2d", "depthwise_conv2d")
    backward = _registration._cuda_kernel("depthwise_conv2d", "depthwise_conv2d_backward")
    forward(*[0] * 8)  # backend left to its default
    forward(*[0] * 8, backends.CODES["triton"])
    backward(*[0] * 10, backends.CODES["cuda"])
    assert calls == [
        ("cuda", "depthwise_conv2d", 8),
        ("cnnfast.kernels.depthwise_conv2d", "depthwise_conv2d", 8),
        ("cuda", "depthwise_conv2d_backward", 10),
    ]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_log_says_each_choice_once():
    code = (
        "import torch, cnnfast.ops as ops\n"
        "for _ in range(3): ops.depthwise_conv2d(torch.ones(1, 2, 3, 3), torch.ones(2, 1, 3, 3))\n"
        "ops.depthwise_conv2d(torch.ones(1, 2, 3, 3), torch.ones(2, 1, 3, 3), backend='reference')\n"
    )
    logged = run_python(code, CNNFAST_LOG="1")
    assert logged.stderr.splitlines() == [
        "cnnfast: depthwise_conv2d on cpu: backend auto -> cpu",
        "cnnfast: depthwise_conv2d on cpu: backend reference -> reference",
    ], logged.stderr


def test_log_is_silent_unless_asked(fresh_choice, monkeypatch, capfd):
    monkeypatch.setattr(backends, "_LOG", False)
    make("depthwise_conv2d", fresh_generator()).run()
    assert capfd.readouterr().err == ""


OTHER_ISAS = [isa for isa in _C.isas_built if isa != _C.isa]
HERE = Path(__file__).parent


def run_with(isa: str, *arguments: str) -> subprocess.Popen:
    path = os.pathsep.join(str(folder) for folder in (HERE.parent, HERE.parents[1]))
    environment = {**os.environ, "CNNFAST_ISA": isa, "PYTHONPATH": path}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *arguments], env=environment, cwd=HERE.parents[1], **pipes)


def assert_succeeds(process: subprocess.Popen) -> None:
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stdout[-4000:] + stderr[-4000:]


def test_samples_with_the_other_isas():
    isas = [isa for isa in OTHER_ISAS if isa in _C.cpu_features]
    for process in [run_with(isa, str(HERE / "sample.py"), isa) for isa in isas]:  # side by side
        assert_succeeds(process)


@pytest.mark.slow  # minutes each
@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_ops_with_another_isa(isa):
    """All that the default run does with the ops: float64, too, which every ISA leaves to the generic kernels."""
    if isa not in _C.cpu_features:
        pytest.skip(f"this CPU has no {isa}")
    files = [str(path) for path in sorted(HERE.glob("test_*.py")) if path != Path(__file__)]
    assert_succeeds(run_with(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files))
