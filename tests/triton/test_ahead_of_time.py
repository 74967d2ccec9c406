"""Every Triton kernel compiles for GPUs that aren't here, without spills, within their shared memory, loads wide.

Fails also if docs/kernels.md was made from other sources than these (slow: if its figures are others).
"""

import kernels_file
import kernels_table
import pytest
import triton
from ahead_of_time import TARGETS

from cnnfast.bench.launches import is_kernel, modules
from cnnfast.kernels import depthwise_conv2d, products

DEFAULT = "sm_90"  # for the default run


def level(case, target):
    """Which run compiles it: the default one, CI's sample of the slow ones, or the whole slow suite."""
    if not kernels_table.CASES[case].quick:
        return [pytest.mark.slow]
    return [] if target == DEFAULT else [pytest.mark.slow, pytest.mark.sample]


@pytest.mark.parametrize(
    ("kernel", "case", "target"),
    [
        pytest.param(
            kernel,
            case,
            target,
            id=f"{kernel}-{case}-{target}",
            marks=[
                pytest.mark.proof("compiled", kernel=kernel, target=target),
                *level(case, target),
            ],
        )
        for case in kernels_table.CASES
        for kernel in kernels_table.launches(case)
        for target in TARGETS
    ],
)
def test_compiles(kernel, case, target):
    result = kernels_table.compiled(case, kernel, target)
    assert not kernels_table.objections(case, kernel, target, result)


def test_every_kernel_is_compiled():
    launched = {kernel for case in kernels_table.CASES for kernel in kernels_table.launches(case)}
    assert launched == {name for module in modules() for name, value in vars(module).items() if is_kernel(name, value)}


def test_table_is_of_these_sources():
    assert kernels_table.made_with()[1] == kernels_table.digest(), "run python tests/kernels_table.py"


def test_digest_is_of_code_and_launches(monkeypatch):
    before = kernels_table.digest()
    with monkeypatch.context() as patch:
        patch.setattr(products.sampled, "_src", products.sampled.src.replace("o_p // OW", "o_p // W"))
        assert kernels_table.digest.__wrapped__() != before
    with monkeypatch.context() as patch:
        patch.setattr(depthwise_conv2d.depthwise_conv2d_fwd_kernel, "do_not_specialize", ["W"])
        assert kernels_table.digest.__wrapped__() != before
    launch = kernels_table.launches("depthwise 3x3, bf16", DEFAULT)["depthwise_conv2d_fwd_kernel"]
    with monkeypatch.context() as patch:
        patch.setitem(launch.kwargs, "num_warps", 2 * launch.kwargs["num_warps"])
        assert kernels_table.digest.__wrapped__() != before
    assert kernels_table.digest.__wrapped__() == before


@pytest.mark.slow
def test_table_is_up_to_date():
    version, _ = kernels_table.made_with()
    if version != triton.__version__:
        pytest.skip(f"docs/kernels.md is of Triton {version}, this is {triton.__version__}")
    text, wrong = kernels_table.table()
    assert not wrong
    assert text == kernels_file.halves()[kernels_table.TITLE], "run python tests/kernels_table.py"
