"""Sigmoid, SiLU, GELU and tanh of each ISA against the C library in double: the errors that csrc/cpu/kernels/
activations.h states, over float32 numbers of all magnitudes; special values as PyTorch's.

Fails if a coefficient, a limit or a branch of one ISA is off by more than the stated error, or a NaN or Inf is lost.
"""

import math
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from cpu_host import host

from cnnfast import _C

# y: in 2^-24 |f(x)|; y': in 2^-24. The header states them too.
BOUNDS = {"sigmoid": (3, 2), "silu": (4, 5), "gelu": (10, 6), "tanh": (3, 3)}
FUNCTIONS = {"sigmoid": torch.sigmoid, "silu": F.silu, "gelu": F.gelu, "tanh": torch.tanh}
SMALLEST = 2.0**-149  # half of it is a tie, which the stated error may round to either side
HERE = [isa for isa in _C.isas_built if isa in _C.cpu_features]


@pytest.fixture(scope="module")
def activations(tmp_path_factory):
    return host.program(tmp_path_factory.mktemp("activations"), "activations")


def errors(*command: object, isas=HERE, **environment: str) -> list[str]:
    """What is beyond its bound; prints all."""
    done = host.run(*command, timeout=900, **environment)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows] == [[isa, name] for isa in isas for name in BOUNDS]
    beyond = []
    for isa, name, value, at, slope, slope_at in rows:
        for what, error, where, bound in zip(("y", "y'"), (value, slope), (at, slope_at), BOUNDS[name], strict=True):
            if not float(error) <= bound:
                beyond.append(f"{isa} {name} {what}: {error} at {where}, stated {bound}")
    return beyond


def test_errors_of_a_sample(activations):
    assert errors(activations, "errors", "4001") == []


@pytest.mark.slow  # a minute or two
def test_errors(activations):
    """Every float with 1/16 <= |x| < 16, and each 61st of all."""
    assert errors(activations, "errors", "1", "0.0625", "16") == []
    assert errors(activations, "errors", "61") == []


@pytest.mark.slow
@pytest.mark.skipif(not host.CAN_RUN_AARCH64, reason=f"needs {host.AARCH64} and qemu-aarch64-static")
def test_errors_on_aarch64(tmp_path):
    program = host.aarch64_program(tmp_path, "activations")
    assert errors(host.qemu("aarch64"), program, "errors", "40009", isas=["generic"]) == []


@pytest.mark.parametrize("name", BOUNDS)
def test_error_is_noticed(activations, name):
    beyond = errors(activations, "errors", "400009", ACTIVATIONS_FAULT=name)
    assert [line.split()[:3] for line in beyond] == [[isa, name, "y:"] for isa in HERE]


def test_header_states_the_bounds():
    header = " ".join((host.KERNELS / "activations.h").read_text().replace("//", " ").split())
    for which in (0, 1):
        stated = ", ".join(f"{name} {bounds[which]}" for name, bounds in BOUNDS.items())
        assert stated in header, stated


def same(a: float, b: float) -> bool:
    if math.isnan(b) or math.isinf(b) or (b == 0 and abs(a) != SMALLEST):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return abs(a - b) <= max(2**-20 * abs(b), SMALLEST)


def test_special_values(activations):
    """NaN, Inf, zeros with their sign, subnormal and huge numbers: what PyTorch makes of them, forward and backward.

    PyTorch in float64: in float32 its GELU of +Inf is NaN from a few elements on (oneDNN's), +Inf else.
    """
    rows = defaultdict(list)
    for line in host.run(activations, "special").stdout.splitlines():
        isa, name, *numbers = line.split()
        rows[isa, name].append([float.fromhex(number) for number in numbers])
    assert list(rows) == [(isa, name) for isa in HERE for name in BOUNDS]
    for (isa, name), numbers in rows.items():
        x, ours, slope = torch.tensor(numbers, dtype=torch.float64).unbind(1)
        x = x.requires_grad_()
        y = FUNCTIONS[name](x)
        (wanted,) = torch.autograd.grad(y.sum(), x)
        for at, (value, expected) in enumerate(zip(ours.tolist(), y.float().tolist(), strict=True)):
            assert same(value, expected), f"{isa} {name}({x[at].item()}) is {value}, PyTorch's {expected}"
        torch.testing.assert_close(slope, wanted, rtol=0, atol=2**-22, equal_nan=True, msg=f"{isa} {name}'")
