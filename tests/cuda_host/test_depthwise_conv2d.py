"""csrc/cuda/depthwise_conv2d, device code and host side, run on host threads against the reference.

Fails when a kernel's arithmetic, indexing, tails, layouts or masks are wrong, an output stays unwritten (they begin as
NaN), the wrong kernel is chosen, or the order of a block's threads shows in the result.
"""

import contextlib

import pytest
import torch
from cuda_host import harness
from cuda_host.cases.depthwise_conv2d import (
    DTYPES,
    EMPTY,
    FORMATS,
    GENERIC,
    VECTORIZED,
    case,
    is_vectorized,
    options_of,
    run,
    run_backward,
    tensors_of,
)
from numerics import LAYOUTS, assert_close_by_policy, assert_gradients_by_policy, channel_scales, draw, fresh_generator

from cnnfast import reference

pytestmark = [harness.needs_toolkit, pytest.mark.usefixtures("nan_outputs", "forward_order")]


@contextlib.contextmanager
def unfilled():
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


def same_bits(a, b):
    return a.equal(b) or (a.isnan().equal(b.isnan()) and a.nan_to_num().equal(b.nan_to_num()))


def host_runs(*kernels):
    """Marks a test as the proof of these kernels."""

    def mark(function):
        for kernel in kernels:
            function = pytest.mark.proof("host-run", kernel=f"depthwise_conv2d_{kernel}_kernel")(function)
        return function

    return mark


@host_runs("forward", "forward_generic")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", VECTORIZED + GENERIC + EMPTY, ids=str)
def test_forward(host, case, dtype):
    tensors = tensors_of(case, dtype, fresh_generator())
    y = run(host, case, **tensors)
    ran = host.kernels_run()
    wanted = "depthwise_conv2d_forward" + ("_kernel" if is_vectorized(case, dtype) else "_generic_kernel")
    assert ran == ([] if case in EMPTY else [wanted])
    assert_close_by_policy(
        y, reference.depthwise_conv2d, *tensors.values(), **options_of(case), terms=tensors["weight"][0].numel() + 1
    )
    if case not in EMPTY and case["shape"][1] > 1 and case["shape"][2:] != (1, 1):  # these are in both formats
        assert y.is_contiguous(memory_format=FORMATS[case["layout"]])


@host_runs("input_gradient", "input_gradient_generic")
@host_runs("weight_gradient", "weight_gradient_generic", "weight_gradient_sum")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", VECTORIZED + GENERIC + EMPTY, ids=str)
def test_backward(host, case, dtype):
    generator = fresh_generator()
    tensors = tensors_of(case, dtype, generator, integers=True)
    y = run(host, case, **tensors)
    grad = LAYOUTS[case["layout"]](
        draw(generator, y.shape, dtype, scale=channel_scales(generator, y.shape[1], 3.0).reshape(-1, 1, 1))
    )
    host.kernels_run()
    gradients = dict(zip(tensors, run_backward(host, case, grad, tensors), strict=True))
    generic = "" if is_vectorized(case, dtype) else "_generic"
    wanted = [f"depthwise_conv2d_{kernel}{generic}_kernel" for kernel in ("input_gradient", "weight_gradient")]
    wanted += ["depthwise_conv2d_weight_gradient_sum_kernel"]
    if case["act"]:
        wanted.insert(0, f"depthwise_conv2d_forward{generic}_kernel")
    assert host.kernels_run() == (wanted[-1:] if case in EMPTY else wanted)
    taps, pixels = tensors["weight"][0].numel(), grad.numel() // max(grad.shape[1], 1)
    terms = {"x": taps * case["m"], "weight": pixels, "bias": pixels}
    assert_gradients_by_policy(gradients, reference.depthwise_conv2d, grad, tensors, options_of(case), terms=terms)
    assert case in EMPTY or gradients["x"].stride() == tensors["x"].stride()


@pytest.mark.parametrize("mask", range(8))
def test_only_the_gradients_wanted(host, mask):
    case = VECTORIZED[1]
    generator = fresh_generator()
    tensors = tensors_of(case, torch.float32, generator)
    grad = draw(generator, run(host, case, **tensors).shape)
    every = run_backward(host, case, grad, tensors)
    for i, (got, wanted) in enumerate(zip(run_backward(host, case, grad, tensors, mask), every, strict=True)):
        assert got.equal(wanted) if mask >> i & 1 else got.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [VECTORIZED[1], GENERIC[4]], ids=str)
def test_float32_bias_beside_low_precision(host, case, dtype):
    generator = fresh_generator()
    tensors = tensors_of(case, dtype, generator, integers=True, bias_dtype=torch.float32)
    tensors["bias"] += 2.0**-12 * torch.arange(len(tensors["bias"]))  # more than the low precision holds
    y = run(host, case, **tensors)
    assert_close_by_policy(y, reference.depthwise_conv2d, *tensors.values(), **options_of(case), terms=10)
    gradients = run_backward(host, case, torch.ones_like(y), tensors)
    assert gradients[2].dtype == torch.float32
    assert [g.dtype for g in run_backward(host, case, torch.ones_like(y), tensors, mask=0)] == [
        dtype,
        dtype,
        torch.float32,
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_nan_and_inf(host, layout, activation):
    """As PyTorch's relu and relu6, before and after; backward relu's only: whether the gradient of PyTorch's relu6 at
    NaN is 1 or 0 depends on where in the tensor it lies. Ours passes it on, as its relu does."""
    case_ = case((1, 8, 6, 7), 3, pre=activation, act=activation, layout=layout)
    tensors = tensors_of(case_, torch.float32, fresh_generator(), integers=True)
    for value, at in ((torch.nan, (0, 1, 2, 3)), (torch.inf, (0, 2, 3, 3)), (-torch.inf, (0, 3, 1, 1))):
        tensors["x"][at] = value
    y = run(host, case_, **tensors)
    wanted = reference.depthwise_conv2d(*tensors.values(), **options_of(case_))
    assert y.isnan().any() and same_bits(y, wanted)
    if activation == "relu6":
        return
    leaves = [t.clone().requires_grad_() for t in tensors.values()]
    grad = torch.randint(-3, 4, y.shape).float()
    reference.depthwise_conv2d(*leaves, **options_of(case_)).backward(grad)
    for got, leaf in zip(run_backward(host, case_, grad, tensors), leaves, strict=True):
        assert same_bits(got, leaf.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [VECTORIZED[0], VECTORIZED[2], VECTORIZED[9], VECTORIZED[12], GENERIC[4]], ids=str)
def test_order_of_threads_does_not_show(host, case, dtype):
    generator = fresh_generator()
    tensors = tensors_of(case, dtype, generator)
    grad = draw(generator, run(host, case, **tensors).shape, dtype)
    results = []
    for order in (harness.FORWARD, harness.REVERSE):
        host.order(order)
        results.append([run(host, case, **tensors), *run_backward(host, case, grad, tensors)])
    for forward, reverse in zip(*results, strict=True):
        assert forward.equal(reverse)


def test_an_image_does_not_depend_on_its_neighbours(host):
    case_ = case((5, 264, 20, 20), 3, pre="relu", act="relu6")  # enough blocks to change how many rows each takes
    tensors = tensors_of(case_, torch.bfloat16, fresh_generator())
    whole = run(host, case_, **tensors)
    alone = run(
        host, case_, tensors["x"][3:4].contiguous(memory_format=torch.channels_last), *list(tensors.values())[1:]
    )
    assert whole[3:4].equal(alone)


def test_misaligned_and_noncontiguous_inputs(host):
    case_ = VECTORIZED[1]
    tensors = tensors_of(case_, torch.float32, fresh_generator())
    x = tensors["x"]
    wanted = run(host, case_, **tensors)
    host.kernels_run()
    storage = torch.empty(x.numel() + 1)
    shifted = storage[1:].as_strided(x.shape, x.stride())
    shifted.copy_(x)
    torch.testing.assert_close(run(host, case_, **{**tensors, "x": shifted}), wanted)
    assert host.kernels_run() == ["depthwise_conv2d_forward_generic_kernel"]
    wide = torch.cat([x, x], dim=3).contiguous(memory_format=torch.channels_last)[..., : x.shape[3]]
    assert run(host, case_, **{**tensors, "x": wide}).equal(wanted)
    odd_weight = torch.cat([tensors["weight"]] * 2, dim=3)[..., :3]
    assert run(host, case_, **{**tensors, "weight": odd_weight}).equal(wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_2_to_the_31_elements(host, layout):
    """Only the block of the last elements runs: of the 4.3 GB that x, y and dx are each, few pages are ever touched."""
    height, width, channels = 16384, 16400, 8
    assert height * width * channels > 2**31
    with unfilled():
        x = torch.empty((1, channels, height, width), dtype=torch.bfloat16, memory_format=FORMATS[layout])
        x[..., -16:, :] = torch.randn(16, width).bfloat16()
        weight = torch.randn(channels, 1, 3, 3).bfloat16()
        last_block = -(-x.numel() // 256) - 1  # NCHW: 65,535 blocks, striding on from there
        host.c.host_only_block_from_end(0 if layout == "channels_last" else 65534 - last_block % 65535)
        try:
            y = host.ops.depthwise_conv2d(x, weight, None, [1, 1], [1, 1, 1, 1], [1, 1], 0, 0)
            dx, *_ = host.ops.depthwise_conv2d_backward(x, x, weight, None, [1, 1], [1, 1, 1, 1], [1, 1], 0, 0, 1)
        finally:
            host.c.host_only_block_from_end(-1)
        corner = x[..., -4:, -64:].float()
        wanted = torch.nn.functional.conv2d(corner, weight.float(), padding=1, groups=channels)
        wanted_dx = torch.nn.functional.conv_transpose2d(corner, weight.float(), padding=1, groups=channels)
        # NHWC: the last tile of all channels; NCHW: the last row's end of the last channel
        last = (0, slice(None), -1, slice(-8, None)) if layout == "channels_last" else (0, -1, -1, slice(-8, None))
        torch.testing.assert_close(y[last].float(), wanted[last], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(dx[last].float(), wanted_dx[last], rtol=1e-2, atol=1e-2)
