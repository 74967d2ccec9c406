"""Tuning from a launch to the file and back, through triton.autotune in the interpreter, with times that are made up.

Fails if the best isn't what is kept and launched with from then on, a launch that is tuned leaves another result, a
candidate computes one (so that a launcher lets a block vary that its arguments depend on), or a call that nobody asked
to tune does. test_faults breaks a copy of the sources, a line at a time, and wants the same checks to fail.
"""

import contextlib
import importlib
from unittest import mock

import pytest
import scale_shift_cases
import torch
from launchers import arguments, away_from_kinks, survivors
from numerics import LAYOUTS, draw, fresh_generator, nan_filled
from op_cases import Case
from triton.runtime.interpreter import InterpretedFunction

from cnnfast.cli import main, tune
from cnnfast.kernels import tuning

GPU = dict(device="GPU 1", capability="9.0", torch="2", triton="3", kernels="0")
ROWS = {
    "pointwise_conv2d": dict(c=5, out=19, excite=True, stride=2, activation="silu"),
    "pointwise_conv2d alone": dict(c=5, out=19, activation=None),
    "depthwise_conv2d": dict(c=5, stride=3),
    "depthwise_conv2d nchw": dict(c=3, layout="nchw", activation="silu"),
    "conv2d": dict(c=3, out=7, activation="silu"),
    "squeeze_excite": dict(c=5),
    "separable_conv2d": dict(c=5, out=19),
    "inverted_residual": dict(c=5, out=19),
    "inverted_residual excited": dict(c=5, out=19, excite=True),
    "local_response_norm": dict(c=19),
    "local_response_norm nchw": dict(c=5, layout="nchw"),
    "local_response_norm wide": dict(c=19),
    "scale_shift": {},
    "scale_shift_excite": {},
}
TUNED = {
    "pointwise_conv2d": {f"pointwise_conv2d_{name}_kernel" for name in ("fwd", "bwd_input", "bwd_weight")},
    "depthwise_conv2d": {f"depthwise_conv2d_{name}_kernel" for name in ("fwd", "bwd_input", "bwd_weight")},
    "conv2d": {"conv2d_epilogue_kernel"},
    "squeeze_excite": {"channel_sums_kernel", "squeeze_excite_scale_kernel"},
    "separable_conv2d": {"separable_conv2d_fwd_kernel"},
    "inverted_residual": {"inverted_residual_fwd_kernel"},
    "inverted_residual excited": {"pointwise_depthwise_fwd_kernel"},
    "local_response_norm": {f"local_response_norm_{name}_kernel" for name in ("fwd", "bwd")},
    "local_response_norm wide": {"local_response_norm_wide_kernel"},
    "scale_shift": {"squeeze_excite_scale_kernel", "scale_shift_bwd_kernel"},
    "scale_shift_excite": {"channel_sums_kernel", "squeeze_excite_scale_kernel", "scale_shift_bwd_kernel"},
}


def work_of(name, n=2, package="cnnfast.kernels"):
    """A call of the op in float64, and one of its gradients: everything that they return, unwritten elements NaN."""
    op, *kind = name.split()
    module = importlib.import_module(f"{package}.{op}")
    generator, row = fresh_generator(1), dict(n=n, size=(3, 4), dtype=torch.float64) | ROWS[name]
    if op == "local_response_norm":
        x = LAYOUTS[row.get("layout", "channels_last")](draw(generator, (n, row["c"], 3, 4), torch.float64))
        values = [x, 18 if "wide" in kind else 5, 0.7, 0.75, 1.5]
        forward, backward = lambda: module.local_response_norm(*values), module.local_response_norm_backward
        grad = draw(generator, x.shape, torch.float64)
        both = lambda: (forward(), backward(grad, *values))  # noqa: E731
    else:
        if op.startswith("scale_shift"):
            case = Case(op, *scale_shift_cases.make(op, (n, 5, 3, 4), torch.float64, activation="silu", seed=1))
        else:
            case = away_from_kinks(op, generator, **row)
        grad = draw(generator, case.reference(**case.tensors, **case.options).shape, torch.float64)
        forward = lambda: getattr(module, op)(*arguments(case, op))  # noqa: E731
        gradients = arguments(case, f"{op}_backward", grad=grad, output_mask=-1)
        both = lambda: (forward(), *getattr(module, f"{op}_backward")(*gradients))  # noqa: E731

    def work():
        with nan_filled(), in_one_kernel(module):
            return [tensor.clone() for tensor in both()]

    return work


@contextlib.contextmanager
def in_one_kernel(module):
    """inverted_residual takes the fused ways meanwhile, whatever float64 costs."""
    with contextlib.ExitStack() as stack:
        for choice in {"fusion_pays", "recompute_pays"} & set(vars(module)):
            stack.enter_context(mock.patch.object(module, choice, lambda *_: True))
        yield


def assert_same(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@contextlib.contextmanager
def process(tuning=tuning):
    """One that takes the CPU for a GPU, and has read nothing yet."""
    with mock.patch.multiple(tuning.tuned, _entries={}, identity=lambda device: GPU):
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CNNFAST_CACHE_DIR", str(tmp_path / "cache"))


class Timer:
    """In the place of Triton's: one candidate (the last) takes `best_ms`, the others 2 ms; those in `fails` raise."""

    def __init__(self, tuning=tuning, best=-1, best_ms=1.0, fails=()):
        self.best, self.best_ms, self.fails = best, best_ms, fails
        self.lists, self.runs = [], 0
        real = tuning.candidates

        def candidates(default, vary):
            self.lists.append(real(default, vary))
            self.runs = 0
            return self.lists[-1]

        self.patches = mock.patch.multiple(tuning, candidates=candidates, do_bench=self.do_bench)

    def do_bench(self, call, quantiles):
        index, self.runs = self.runs, self.runs + 1
        if index in self.fails:
            raise RuntimeError("out of something")
        call()
        return [self.best_ms if index == self.best % len(self.lists[-1]) else 2.0] * len(quantiles)


def tuned_by(timer, work, tuning=tuning):
    """(what the work returns, outcomes) while it is tuned."""
    outcomes = []
    with timer.patches, tuning.tuning(outcomes.append):
        returned = work()
    return returned, outcomes


def launched(work):
    """[(kernel, its keyword arguments)] of the launches in `work`."""
    seen, real = [], InterpretedFunction.run

    def noted(kernel, *args, grid, warmup, **kwargs):
        seen.append((kernel.__name__, kwargs))
        return real(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    with mock.patch.object(InterpretedFunction, "run", noted):
        work()
    return seen


def check_path(name, tuning=tuning, package="cnnfast.kernels"):
    """The whole way of one op's kernels: what is best is kept, by any batch from then on, and results stay."""
    work = work_of(name, package=package)
    expected, timer = work(), Timer(tuning)
    with process(tuning):
        returned, outcomes = tuned_by(timer, work, tuning)
        assert_same(returned, expected)
        assert {outcome.key[0] for outcome in outcomes} >= TUNED[name]  # of the fused ops also those of the stages
        assert len(outcomes) == len(timer.lists) == len({outcome.key for outcome in outcomes})
        for outcome, candidates in zip(outcomes, timer.lists, strict=True):
            assert outcome.best == candidates[-1] != outcome.default == candidates[0]
            assert (outcome.best_ms, outcome.default_ms, outcome.tried) == (1.0, 2.0, len(candidates))
    with process(tuning):  # another one, later
        file = tuning.tuned.path(GPU)
        written = file.stat().st_mtime_ns
        one_image = work_of(name, n=1, package=package)
        seen = launched(one_image)
        for kernel in TUNED[name]:
            best = [outcome.best for outcome in outcomes if outcome.key[0] == kernel]
            taken = [{part: options[part] for part in best[0]} for launch, options in seen if launch == kernel]
            assert taken and all(values in best for values in taken), kernel
        _, again = tuned_by(Timer(tuning), work, tuning)
        assert not again and file.stat().st_mtime_ns == written
        assert tuning.configurations.tuner is None


def test_path():
    check_path("conv2d")


@pytest.mark.slow
@pytest.mark.parametrize("name", TUNED)
def test_path_of_every_op(name):
    check_path(name)


def check_candidates(name):
    """By every launcher's leave, nothing that any candidate would compute differs."""
    work = work_of(name)
    expected, most, index = work(), 1, 0
    while index < most:

        def other(kernel, blocks, grid, args, constants, vary, restore, index=index):
            nonlocal most
            options = tuning.candidates(blocks, vary)
            most, values = max(most, len(options)), options[index % len(options)]
            kernel[grid(values)](*args, **constants, **values)
            return True

        with mock.patch.object(tuning.configurations, "tuner", other):
            assert_same(work(), expected)
        index += 1
    assert most > 4


def test_every_candidate_computes_the_same():
    check_candidates("pointwise_conv2d alone")


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_every_candidate_of_every_op_computes_the_same(name):
    check_candidates(name)


def test_a_launcher_that_lets_too_much_vary_is_seen():
    """BLOCK_H of depthwise_conv2d's input gradient has to be a multiple of the stride."""
    module = importlib.import_module("cnnfast.kernels.depthwise_conv2d")

    def careless(kernel, blocks, grid, *args, vary=(), **options):
        tuning.configurations.launch(kernel, blocks, grid, *args, vary=("BLOCK_H", *vary), **options)

    with mock.patch.object(module, "launch", careless), pytest.raises(AssertionError):
        check_candidates("depthwise_conv2d")


def outcome_of(**times):
    timer = Timer(**times)
    with process():
        outcome, *_ = tuned_by(timer, work_of("conv2d"))[1]
        tuning.tuned.clear()
    return outcome, timer.lists[0]


def test_what_is_hardly_faster_is_not_kept():
    outcome, _ = outcome_of(best_ms=1.97)
    assert outcome.best == outcome.default and outcome.best_ms == 2.0
    outcome, candidates = outcome_of(best=3, best_ms=1.9)
    assert outcome.best == candidates[3]


def test_candidates_that_fail_are_passed_over():
    outcome, candidates = outcome_of(best=1, fails=(1, 2))
    assert outcome.best == candidates[0]


def test_a_default_that_fails_is_replaced():
    outcome, candidates = outcome_of(best=2, fails=(0, 1))
    assert outcome.best == candidates[2] and outcome.default_ms == float("inf")


def test_only_tune_tunes(monkeypatch, tmp_path):
    """A call looks once for a file where it runs on a GPU, never else, and writes none."""
    monkeypatch.setattr(tuning, "do_bench", None)
    monkeypatch.setattr(tuning.tuned, "keep", None)
    reads = []
    monkeypatch.setattr(tuning.tuned, "read", lambda of: reads.append(of) or {})
    work = work_of("conv2d")
    with mock.patch.object(tuning.tuned, "_entries", {}):
        work()
        assert not reads
    with process():
        work(), work()
        assert reads == [GPU]
    assert not (tmp_path / "cache").exists()


def test_nothing_is_tuned_on_no_gpu():
    returned, outcomes = tuned_by(Timer(), work_of("conv2d"))
    assert not outcomes
    assert_same(returned, work_of("conv2d")())


# ---- the command


@pytest.fixture
def command(monkeypatch):
    """`cnnfast tune` where the CPU is a GPU, with one call in the place of an op's cases."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "parse_device", lambda name: torch.device("cpu"))

    def of(*works):
        monkeypatch.setattr(
            tune, "op_works", lambda args, device: [(f"case {i}", lambda w=w: w) for i, w in enumerate(works)]
        )
        with process(), Timer().patches:
            return main.main(["tune", "--dtype", "float64"])

    return of


def test_command(command, capsys):
    assert command(work_of("conv2d"), work_of("pointwise_conv2d alone")) == 0
    said = capsys.readouterr()
    assert "pointwise_conv2d_bwd_input_kernel" in said.out and "conv2d_epilogue" in said.out
    assert "5 configurations: " in said.err and str(tuning.tuned.path(GPU)) in said.err
    assert command(work_of("conv2d")) == 0
    said = capsys.readouterr()
    assert "conv2d_epilogue" not in said.out and "5 configurations: " in said.err


def test_command_keeps_nothing_that_changes_a_result(command, capsys):
    work, calls = work_of("conv2d"), []

    def spoilt():
        calls.append(work())
        return [tensor + len(calls) for tensor in calls[-1]]

    assert command(spoilt) == 1
    said = capsys.readouterr()
    assert "case 0: wrong output: off by" in said.err and "which isn't kept" in said.err
    with process():
        entries = tuning.tuned.entries(torch.device("cpu"))
        assert entries and all(values == dict(BLOCK_C=1024, num_warps=4) for values in entries.values())


def test_command_interrupted(command, capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert command(work_of("conv2d"), interrupted, work_of("pointwise_conv2d alone")) == 0
    said = capsys.readouterr()
    assert "interrupted in 2/3 case 1" in said.err and "2 configurations: " in said.err


# ---- what the checks above see

FAULTS = {
    "tuning": {
        "the default is always kept": ("if best_ms > MARGIN * default_ms:", "if True:"),
        "not written": ("tuned.keep(blocks.device, {blocks.key: kept})", "pass"),
        "tuned again each time": (" or blocks.key in tuned.entries(blocks.device)", ""),
        "launched twice": ("return True", "return False"),
        "overwritten while timed": ("restore_value=list(restore)", "restore_value=None"),
        "the warps forgotten": ('num_warps=values["num_warps"]', "num_warps=4"),
        "not ended": ("        configurations.tuner = None", "        pass"),
    },
    "configurations": {
        "what is kept isn't taken": ("if kept is not None:", "if False:"),
        "kept by the batch": ("*shape.items())", "*shape.items(), (\"images\", x.shape[0]))"),
        "the tuner never asked": ("if tuner is None or not", "if True or not"),
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("source", FAULTS)
def test_faults(source, tmp_path, monkeypatch):
    def check_module(module):
        package = module.__name__.rpartition(".")[0]
        monkeypatch.setenv("CNNFAST_CACHE_DIR", str(tmp_path / f"cache of {package}"))
        try:
            check_path("conv2d", importlib.import_module(f"{package}.tuning"), package)
        except FileNotFoundError as error:
            raise AssertionError from error

    assert not survivors(source, FAULTS[source], check_module, tmp_path, monkeypatch)
