"""Ops that return more than an image: <op>_stats, and depthwise_conv2d with its squeeze.

Fails if an output or a gradient differs from the reference's by more than the policy allows, a sum isn't that of the y
that is returned, bits depend on the number of threads, torch.compile or autocast breaks, or batch normalisation made of
the sums, scales and shifts isn't PyTorch's.
"""

import itertools

import pytest
import torch
from numerics import LAYOUTS, assert_within, draw, fresh_generator, threads
from op_cases import DTYPES, arguments_of
from stats_cases import OPS, PROLOGUES, ROUNDED, STATS, check_gradients, check_outputs, make, run
from torch import nn

import cnnfast.ops

pytestmark = pytest.mark.usefixtures("nan_outputs")

# Tests that take seconds an op: two of them by default.
SOME = [pytest.param(op, marks=[pytest.mark.slow] * (op not in ("separable_conv2d_stats", OPS[-1]))) for op in OPS]


def check(op, tensors, options):
    check_outputs(op, tensors, options, run(op, tensors, options))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, *(pytest.param(t, marks=pytest.mark.slow) for t in DTYPES[1::2])], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_prologues(op, layout, dtype):
    for prologue, stride in itertools.product(PROLOGUES, (1, 2)):
        check(op, *make(op, layout=layout, dtype=dtype, prologue=prologue, stride=stride))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("op", OPS)
def test_shapes(op, dtype):
    """One pixel, one row, few and many bands and images, whole and broken panels, several tiles a band, no image."""
    for row in (
        {"n": 1, "c": 1, "out": 1, "size": (1, 1)},
        {"n": 3, "c": 3, "size": (1, 37), "bias": False},
        {"n": 1, "c": 32, "out": 16, "size": (131, 5), "k": (5, 5), "stride": 2},
        {"n": 70, "c": 16, "out": 17, "size": (3, 2)},
        {"n": 1, "c": 160, "out": 48, "size": (70, 90)},
        {"n": 2, "size": (9, 8), "k": (3, 2), "padding": 0, "stride": (2, 1)},
        {"n": 0},
    ):
        check(op, *make(op, dtype=dtype, **row))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("prologue", ("none", "batch_norm", "all"))
@pytest.mark.parametrize("op", OPS)
def test_gradients(op, prologue, dtype):
    """Through all outputs at once, each with a gradient of its own."""
    for layout, stride in zip(LAYOUTS, (1, 2), strict=True):
        tensors, options = make(op, dtype=dtype, layout=layout, prologue=prologue, stride=stride)
        outputs = run(op, tensors, options)
        grads = [draw(fresh_generator(), t.shape, t.dtype) for t in outputs]
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        torch.autograd.backward(run(op, leaves, options), grads)

        computed = {name: leaf.grad for name, leaf in leaves.items()}
        # y, by which the gradient of the squares is multiplied, is itself rounded; so is what PyTorch's conv takes
        more = 2 if op == "conv2d_stats" else 1
        check_gradients(op, tensors, options, grads, computed, rounded=ROUNDED[op] + more)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(
    "row",
    [
        {"n": 3, "c": 24, "out": 144, "size": (17, 15)},
        {"n": 3, "c": 144, "out": 24, "size": (17, 15)},
        {"n": 2, "c": 100, "out": 170, "size": (14, 20)},
        {"n": 2, "c": 401, "out": 430, "size": (19, 17)},
    ],
    ids=str,
)
def test_gradients_of_many_tiles(row, dtype):
    """Pointwise: several tiles and ranges of pixels, either side with more channels, a weight in blocks; and their bits
    on any number of threads."""
    tensors, options = make("pointwise_conv2d_stats", dtype=dtype, prologue="batch_norm", **row)
    outputs = run("pointwise_conv2d_stats", tensors, options)
    grads = [draw(fresh_generator(), t.shape, t.dtype) for t in outputs]

    def computed(count):
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        with threads(count):
            torch.autograd.backward(run("pointwise_conv2d_stats", leaves, options), grads)
        return {name: leaf.grad for name, leaf in leaves.items()}

    first = computed(1)
    check_gradients("pointwise_conv2d_stats", tensors, options, grads, first, ROUNDED["pointwise_conv2d_stats"] + 1)
    for count in (2, 3):
        assert all(torch.equal(gradient, first[name]) for name, gradient in computed(count).items())


@pytest.mark.parametrize("size", [(1, 9), (7, 9), (16, 16), (131, 77)], ids=str)
def test_sums_of_pixels_that_are_all_alike(size):
    """Each addition of a run of them rounds in the same direction, where the policy's bound counts on chance."""
    weight, bias = torch.zeros(256, 1, 1, 1), draw(fresh_generator(), (256,)).abs() + 0.5
    outputs = cnnfast.ops.pointwise_conv2d_stats(torch.zeros(3, 1, *size), weight, bias)
    for name, sums, power in zip(("sum", "squares"), outputs[1:], (1, 2), strict=True):
        exact = 3 * size[0] * size[1] * bias.double() ** power
        assert_within(sums, exact, exact, terms=1, name=name)


@pytest.mark.parametrize("op", SOME)
def test_gradcheck(op):
    tensors, options = make(op, dtype=torch.float64, c=3, out=4, size=(5, 4), stride=(2, 1))
    names, leaves = zip(*((name, t.requires_grad_()) for name, t in tensors.items()), strict=True)
    torch.autograd.gradcheck(lambda *leaves: run(op, dict(zip(names, leaves, strict=True)), options), leaves)


@pytest.mark.parametrize("op", [op for op in OPS if op.endswith("_stats")])
def test_vectors_that_are_not_dense(op):
    """The same bits, forward and backward, whatever the strides of scale and shift."""
    tensors, options = make(op)
    strided = tensors | {name: tensors[name].repeat_interleave(2)[::2] for name in ("scale", "shift")}
    assert not strided["scale"].is_contiguous()

    def everything(tensors):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        outputs = run(op, leaves, options)
        sum(t.square().sum() for t in outputs).backward()
        return [*outputs, *(leaf.grad for leaf in leaves.values())]

    assert all(map(torch.equal, everything(strided), everything(tensors)))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("op", [op for op in OPS if op != "conv2d_stats"])  # PyTorch's convolution promises none of it
def test_repeatable(op, dtype):
    """Bitwise, on any number of threads."""
    tensors, options = make(op, dtype=dtype, n=3, c=40, out=72, size=(37, 23))
    first = run(op, tensors, options)
    for other in (1, 2, 3, 3):
        with threads(other):
            assert all(map(torch.equal, run(op, tensors, options), first))


@pytest.mark.parametrize("op", SOME)
def test_compile(op):
    """Forward and backward in one graph of dynamic shape."""
    torch._dynamo.reset()
    tensors, options = make(op)
    compiled = torch.compile(lambda **t: run(op, t, options), fullgraph=True, dynamic=True, backend="aot_eager")
    for n, size in ((2, (13, 11)), (4, (9, 10))):
        tensors["x"] = draw(fresh_generator(), (n, 19, *size)).to(memory_format=torch.channels_last)
        eager, traced = ({name: t.clone().requires_grad_() for name, t in tensors.items()} for _ in range(2))
        expected, got = run(op, eager, options), compiled(**traced)
        assert all(map(torch.equal, got, expected))
        for outputs in (expected, got):
            sum(t.square().sum() for t in outputs).backward()
        for name in eager:
            torch.testing.assert_close(traced[name].grad, eager[name].grad, rtol=1e-6, atol=1e-6)


class Call(nn.Module):
    def __init__(self, op, tensors, options):
        super().__init__()
        self.op, self.options = op, options
        self.tensors = nn.ParameterDict({name: t for name, t in tensors.items() if name != "x"})

    def forward(self, x):
        return run(self.op, {"x": x, **self.tensors}, self.options)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_export(op):
    tensors, options = make(op)
    module = Call(op, tensors, options).requires_grad_(False).eval()
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(module, (tensors["x"],), dynamic_shapes={"x": dynamic}).module()
    for n, size in ((2, (13, 11)), (3, (9, 10))):
        x = draw(fresh_generator(), (n, 19, *size)).to(memory_format=torch.channels_last)
        assert all(map(torch.equal, exported(x), module(x)))


@pytest.mark.parametrize("op", SOME)
def test_opcheck(op):
    for row in ({}, {"prologue": "none", "bias": False, "dtype": torch.bfloat16, "c": 1, "size": (1, 5)}):
        tensors, options = make(op, **row)
        overload = getattr(torch.ops.cnnfast, op).default
        values = tensors | {"y": run(op, tensors, options)[0]}
        outputs = run(op, tensors, options)
        values |= dict(zip(("grad", "grad_sum", "grad_squares"), map(torch.randn_like, outputs), strict=False))
        values["grad_squeezed"] = torch.randn_like(outputs[1])
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        torch.library.opcheck(overload, arguments_of(overload, {**values, **leaves}, options))
        backward = getattr(torch.ops.cnnfast, f"{op}_backward").default
        torch.library.opcheck(backward, arguments_of(backward, values, options))


@pytest.mark.parametrize("op", OPS)
def test_autocast(op):
    """x and weights are cast; biases, scale and shift stay float32, and so do the sums."""
    tensors, options = make(op)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(op, tensors, options)
    kept = ("bias", "scale", "shift")
    cast = {name: t if name.endswith(kept) else t.bfloat16() for name, t in tensors.items()}
    assert all(map(torch.equal, got, run(op, cast, options)))
    assert got[0].dtype is torch.bfloat16 and got[1].dtype is (torch.float32 if op in STATS else torch.bfloat16)


def test_squeeze_packed():
    tensors, options = make("depthwise_conv2d_squeeze", stride=2)
    packed = cnnfast.ops.pack_depthwise_conv2d(tensors["weight"], tensors["bias"])
    size = {"out_channels": 38, "kernel_size": 3}
    got = cnnfast.ops.depthwise_conv2d_squeeze_packed(tensors["x"], packed, **size, **options)
    assert all(map(torch.equal, got, run("depthwise_conv2d_squeeze", tensors, options)))
    fake = cnnfast.ops.depthwise_conv2d_squeeze_packed(tensors["x"].to("meta"), packed.to("meta"), **size, **options)
    assert [t.stride() for t in got] == [t.stride() for t in fake]


@pytest.mark.parametrize("op", STATS)
def test_mistakes(op):
    tensors, options = make(op)
    c = tensors["x"].shape[1]
    for change, error, says in (
        ({"scale": None}, ValueError, "scale must be given where shift is, got None"),
        ({"scale": tensors["scale"][:3]}, ValueError, rf"scale must have shape \({c},\), .* got \(3,\)"),
        ({"shift": tensors["shift"].double()}, TypeError, "shift must have dtype torch.float32 beside an x of"),
        ({"shift": 1.0}, TypeError, "shift must be a torch.Tensor, got float"),
        ({"pre_activation": "mish"}, ValueError, "pre_activation must be one of"),
        ({"backend": "triton"}, ValueError, f"backend must be one that can run {op} on cpu"),
    ):
        with pytest.raises(error, match=says):
            run(op, {**tensors, **options, **change}, {})


def test_batch_normalisation():
    """A training step of conv, BN, ReLU, depthwise, BN, ReLU, pointwise, BN: what the sums and the prologue are for."""
    torch.manual_seed(int(torch.seed() % 2**31))
    layers = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 1, bias=False),
        nn.BatchNorm2d(24),
    ).double()
    for norm in (layers[1], layers[4], layers[7]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)

    def affine(norm, y, total, squares):
        count = y.numel() // y.shape[1]
        mean = total / count
        scale = norm.weight / (squares / count - mean.square() + norm.eps).sqrt()
        return {"scale": scale, "shift": norm.bias - mean * scale}

    x = torch.randn(4, 3, 17, 15, dtype=torch.float64, requires_grad=True)
    conv, norm1, _, depthwise, norm2, _, pointwise, norm3 = layers
    y, *sums = cnnfast.ops.conv2d_stats(x, conv.weight, conv.bias, 2, 1)
    prologue = affine(norm1, y, *sums)
    y, *sums = cnnfast.ops.depthwise_conv2d_stats(y, depthwise.weight, None, 1, 1, **prologue, pre_activation="relu")
    prologue = affine(norm2, y, *sums)
    y, *sums = cnnfast.ops.pointwise_conv2d_stats(y, pointwise.weight, **prologue, pre_activation="relu")
    last = affine(norm3, y, *sums)
    ours = y * last["scale"].reshape(-1, 1, 1) + last["shift"].reshape(-1, 1, 1)
    grad = torch.randn_like(ours)
    leaves = [x, *layers.parameters()]
    expected = layers(x)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    for got, wanted in zip(
        torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
