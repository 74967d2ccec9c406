"""The cases: each is right against the plain layers, and counts what it should.

Fails if a case's cnnfast call and its plain layers differ (padding, activation, residual, order of weights), if FLOPs
or bytes are miscounted, or if a --quick case was renamed away.
"""

import importlib.util
from dataclasses import replace

import pytest
import torch

from cnnfast.bench import conv_ops, models, ops
from cnnfast.bench.measure import Settings, measure

SETTINGS = Settings(threads=1, rounds=1, sample_seconds=1e-4, gemm_size=128, peers=("eager",))
TRAITS = (
    *("group", "kernel", "stride", "tf_same", "residual"),
    *("pre_activation", "mid_activation", "activation"),
)
LARGE = ("efficientnet_b0", "se_resnet50", "xception")  # seconds each; test_twins.py has what is special in them
KINDS = {tuple(getattr(case, trait, None) for trait in TRAITS): case for case in ops.CASES}


@pytest.mark.parametrize("case", KINDS.values(), ids=lambda case: f"{case.group}-{case.name}")
def test_ops_equal_the_plain_layers(case):
    """One of each kind, on smaller images of the same parity."""
    found = measure(replace(case, size=8 + case.size % 2), SETTINGS)
    assert {name: contender.problem for name, contender in found.contenders.items()} == {"cnnfast": None, "eager": None}


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (case.name in LARGE), id=case.name) for case in models.select()],
)
def test_models_equal_the_plain_layers(case):
    found = measure(replace(case, size=75), SETTINGS)
    assert {name: contender.problem for name, contender in found.contenders.items()} == {"cnnfast": None, "eager": None}


@pytest.mark.slow
def test_the_deepest_at_full_size():
    """Where statistics that don't fit a network enlarge rounding beyond what is allowed."""
    found = measure(models.case("inception_v4"), SETTINGS)
    assert {name: contender.problem for name, contender in found.contenders.items()} == {"cnnfast": None, "eager": None}


def test_counts():
    (case,) = [case for case in ops.CASES if case.group == "separable_conv2d" and case.name.startswith("728-728 @19")]
    problem = case.build(Settings(1, batch=2))
    pixels = 2 * 19 * 19
    assert problem.flops == 2 * pixels * (728 * 9 + 728 * 728)
    assert problem.nbytes == 4 * (2 * pixels * 728 + 728 * (9 + 1) + 728 * (728 + 1))


def test_same_padding():
    """TensorFlow's rule: the odd zero comes after."""
    assert conv_ops.same_padding(112, 3, 2) == (0, 1) and conv_ops.same_padding(7, 5, 1) == (2, 2)
    assert conv_ops.same_padding(19, 3, 2) == (1, 1) and conv_ops.same_padding(4, 1, 2) == (0, 0)


def test_selection():
    names = [(case.group, case.name) for case in ops.CASES]
    assert len(set(names)) == len(names)
    quick = ops.select(quick=True)
    assert {case.group for case in quick} == set(ops.OPS) and {case.name for case in quick} == ops._QUICK
    assert {case.group for case in ops.select(["separable_conv2d"])} == {"separable_conv2d"}
    assert [case.name for case in models.select(["xception"])] == ["xception"] and len(models.select(quick=True)) == 1


def test_layers_that_a_dtype_lacks_are_a_peers_matter():
    """PyTorch's local response normalisation has no bfloat16: the network is measured beside a sentence."""
    settings = replace(SETTINGS, dtype=torch.bfloat16)
    problem = replace(models.case("googlenet"), size=64).build(settings)
    assert problem.ours()().shape == (settings.batch, 1000) and problem.flops > 0
    with pytest.raises(NotImplementedError, match="BFloat16"):
        problem.plain(problem.x)
