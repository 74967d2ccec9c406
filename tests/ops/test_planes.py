"""float32 products on AMX, each float as three bfloat16 (csrc/cpu/kernels/amx_planes.h); elsewhere the same by FMA.

Fails if an element is further from the float64 reference than the policy allows; if subnormal, huge, infinite or NaN
inputs or weights, which AMX does not take, spoil an element; if the error is larger than FMA's; if a result depends on
the batch or the threads; or if the sizes here aren't those that are multiplied so.
"""

import os
import subprocess
import sys

import pytest
import torch
from numerics import fresh_generator, nan_filled, threads
from op_cases import make

from cnnfast import _C

# Above 24 million products an image, 96 pixels and 64 columns; depths and columns that end within a tile.
CASES = {
    "pointwise": ("pointwise_conv2d", {"c": 501, "out": 260, "size": (14, 15)}),
    "pointwise of an odd number of panels": ("pointwise_conv2d", {"c": 640, "out": 400, "size": (10, 10), "n": 3}),
    "strided pointwise": ("pointwise_conv2d", {"c": 300, "out": 300, "size": (35, 33), "stride": 2}),
    "gated pointwise": ("pointwise_conv2d", {"c": 512, "out": 256, "size": (14, 14), "excite": True}),
    "separable": ("separable_conv2d", {"c": 290, "out": 301, "size": (17, 19)}),
    "pointwise first": ("separable_conv2d", {"c": 290, "out": 301, "size": (17, 19), "pointwise_first": True}),
    "conv2d": ("conv2d", {"c": 64, "out": 97, "size": (17, 19), "k": (3, 5)}),
    "strided conv2d": ("conv2d", {"c": 96, "out": 130, "size": (35, 31), "stride": 2, "padding": 1}),
    "dilated conv2d": ("conv2d", {"c": 64, "out": 96, "size": (23, 21), "dilation": (1, 2)}),
    "conv2d in place": ("conv2d", {"c": 160, "out": 192, "size": (17, 21), "k": (1, 7), "padding": 0}),
}
ODD = {
    "a small number": 1e-30,
    "a subnormal number": 1e-41,
    "almost the largest": 3.4e38,
    "Inf": float("inf"),
    "NaN": float("nan"),
}


@pytest.fixture(params=CASES)
def case(request):
    op, sizes = CASES[request.param]
    return make(op, fresh_generator(), **sizes)


def test_policy(case):
    with nan_filled():
        case.check(case.run_packed(), packed=True)


@pytest.mark.parametrize("of", ["x", "weight"])
@pytest.mark.parametrize("value", ODD)
def test_what_is_no_sum_of_three(case, of, value):
    """Beside it, elements are as near the reference as ever. Without an activation, which would hide some."""
    for name in case.options:
        if name.endswith("activation"):
            case.options[name] = None
    name = of if of in case.tensors else "pw_weight"
    if value == "almost the largest":  # what it is multiplied by so small that nothing overflows
        for tensor in case.tensors.values():
            tensor *= 2.0**-12
    tensor = case.tensors[name]
    for at in torch.randint(tensor.numel(), (3,)):
        tensor[torch.unravel_index(at, tensor.shape)] = ODD[value]
    with nan_filled():
        case.check(case.run_packed(), packed=True)


def test_same_bits(case):
    packed = case.pack()
    ours = case.run_packed(packed)
    for count in (1, 2, 3):
        with threads(count):
            assert torch.equal(case.run_packed(packed), ours)
    last = {name: case.tensors[name][-1:] for name in ("x", "residual", "gate") if name in case.tensors}
    assert torch.equal(case.run_packed(packed, **last), ours[-1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_floats_of_low_precision_images(dtype):
    """Where x is float16, or bfloat16 beside float32 weights, the product is of floats."""
    case = make("separable_conv2d", fresh_generator(), c=290, out=301, size=(17, 19))
    packed = case.to(lambda t: t.to(dtype)).pack() if dtype is torch.float16 else case.pack()
    for name in ("x", "residual"):
        case.tensors[name] = case.tensors[name].to(dtype)
    if dtype is torch.float16:
        case = case.to(lambda t: t.to(dtype))
    case.check(case.run_packed(packed), packed=True)


ERROR = """
import torch, cnnfast
generator = torch.Generator().manual_seed(int(input()))
x, weight = torch.randn(1, 728, 14, 14, generator=generator), torch.randn(256, 728, 1, 1, generator=generator)
with torch.no_grad():
    y = cnnfast.pointwise_conv2d_packed(x, cnnfast.pack_pointwise_conv2d(weight), out_channels=256)
exact = torch.einsum("nchw,kc->nkhw", x.double(), weight[:, :, 0, 0].double())
print(float((y - exact).square().mean().sqrt()))
"""


@pytest.mark.skipif(_C.isa != "amx", reason="this CPU, or this run, has no AMX")
def test_error_is_less_than_of_fma():
    """Of random numbers: and so the sizes of CASES are multiplied in planes, the two results aren't the same bits."""
    seed = str(fresh_generator().initial_seed())
    error = {
        isa: float(
            subprocess.run(
                [sys.executable, "-c", ERROR],
                input=seed,
                env={**os.environ, "CNNFAST_ISA": isa},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for isa in ("avx512", "amx")
    }
    assert error["amx"] < 0.8 * error["avx512"]
