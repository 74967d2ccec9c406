"""The choice of backend: reasons, explicit choices, logging; each ISA on the CPU; the CUDA key without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fresh import run_fresh
from numerics import channels_last, fresh_generator
from op_cases import OPS, make, schema_arguments

import cnnfast.ops
from cnnfast import _C, _library
from cnnfast.ops import _registration, backends, cuda_kernels

needs_no_cuda = pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a CUDA build")


@pytest.fixture
def fresh_choice():
    caches = (backends.available, backends.choose, backends._in_cuda, backends._log)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


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


class Recorder:
    """Stands for cnnfast_cuda and for the Triton modules: keeps who was called with how many arguments."""

    def __init__(self, name, calls, functions=None):
        self.name, self.calls, self.functions = name, calls, functions

    def __getattr__(self, function):
        if self.functions is not None and function not in self.functions:
            raise AttributeError(function)
        return lambda *args: self.calls.append((self.name, function, len(args)))


@pytest.fixture
def calls(fresh_choice, monkeypatch):
    """[(module, function, arguments)] of what the CUDA key called, as if both GPU backends were there."""
    made = []
    functions = [*cuda_kernels.KERNELS, "depthwise_conv2d_backward", "depthwise_conv2d_packed"]
    monkeypatch.setattr(_library, "cuda_missing", None)
    monkeypatch.setattr(torch.ops, "cnnfast_cuda", Recorder("cuda", made, functions), raising=False)
    monkeypatch.setattr(_registration.importlib, "import_module", lambda name: Recorder("triton", made))
    return made


def call(name, backend, *, op=None, layout=channels_last, **case):
    """cnnfast::<name>'s CUDA kernel, with a case's tensors."""
    op = op or name.removesuffix("_backward")
    made = make(op, fresh_generator(), **case)
    made.tensors["x"] = layout(made.tensors["x"])
    _registration._cuda_kernel(op, name)(*schema_arguments(made, name), backends.CODES[backend])


def test_cuda_key_calls_the_chosen_backend(calls):
    """The same arguments less `backend` reach cnnfast_cuda or the Triton module."""
    call("depthwise_conv2d", "cuda")
    call("depthwise_conv2d", "triton")
    call("depthwise_conv2d_backward", "cuda")
    assert calls == [
        ("cuda", "depthwise_conv2d", 8),
        ("triton", "depthwise_conv2d", 8),
        ("cuda", "depthwise_conv2d_backward", 10),
    ]


NCHW = torch.Tensor.contiguous
WIDE = dict(c=512, out=512, dtype=torch.bfloat16)
# Per op: what its C++ kernels are predicted to be faster at, and what Triton's.
PREFERRED = {
    "depthwise_conv2d": (dict(c=24), [dict(c=24, layout=NCHW), dict(c=25), dict(c=24, k=(7, 7))]),
    "pointwise_conv2d": (
        dict(c=24, out=40),
        [dict(c=24, out=40, layout=NCHW), dict(c=25), dict(c=512, out=512, dtype=torch.bfloat16)],
    ),
    "inverted_residual": (
        dict(c=24, out=40, expand=False),
        [
            dict(c=24, out=40, expand=False, **change)
            for change in (dict(layout=NCHW), dict(size=(7, 7)), dict(k=(7, 7)))
        ],
    ),
    "squeeze_excite": (dict(c=24), [dict(c=24, layout=NCHW), dict(c=25)]),
}


@pytest.mark.parametrize("op", cuda_kernels.KERNELS)
def test_auto_follows_the_predictions(op, calls):
    cuda, triton = PREFERRED[op]
    for case, module in ((cuda, "cuda"), *((case, "triton") for case in triton)):
        call(op, "auto", **case)
        assert calls.pop()[0] == module, case
        call(op, "cuda", **case)  # named, it takes them all the same
        assert calls.pop()[0] == "cuda"


@pytest.mark.parametrize("op", cuda_kernels.KERNELS)
def test_without_triton_auto_is_cuda(op, calls, monkeypatch):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    for case in PREFERRED[op][1]:
        call(op, "auto", **case)
        assert calls.pop()[0] == "cuda"


# What the C++ kernels don't take, and the sentence.
REFUSED = {
    "depthwise_conv2d": (dict(activation="silu"), r"activation must be one of None, .*'cuda', got 'silu'"),
    "depthwise_conv2d_backward": (dict(activation="silu"), r"activation must be one of None, .*'cuda', got 'silu'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cuda_refuses(name, calls, monkeypatch):
    """auto is Triton then; where that can't run, and where cuda was named, the sentence says what cuda wants."""
    case, sentence = REFUSED[name]
    call(name, "auto", **case)
    assert calls.pop()[0] == "triton"
    with pytest.raises(ValueError, match=sentence):
        call(name, "cuda", **case)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    backends.available.cache_clear()
    with pytest.raises(ValueError, match=sentence):
        call(name, "auto", **case)
    assert not calls


def test_log_says_each_choice_once():
    code = (
        "import torch, cnnfast.ops as ops\n"
        "for _ in range(3): ops.depthwise_conv2d(torch.ones(1, 2, 3, 3), torch.ones(2, 1, 3, 3))\n"
        "ops.depthwise_conv2d(torch.ones(1, 2, 3, 3), torch.ones(2, 1, 3, 3), backend='reference')\n"
    )
    _, logged = run_fresh(code, CNNFAST_LOG="1")
    assert logged.splitlines() == [
        "cnnfast: depthwise_conv2d on cpu: backend auto -> cpu",
        "cnnfast: depthwise_conv2d on cpu: backend reference -> reference",
    ]


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
