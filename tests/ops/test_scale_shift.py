"""scale_shift, scale_shift_excite and batch_norm_scale_shift: what training has between convolutions.

Fails if a result or a gradient differs from the reference's by more than the policy allows, bits depend on the number
of threads, torch.compile or autocast breaks, or statistics that cancel lose more digits than they have to.
"""

import pytest
import torch
from numerics import LAYOUTS, assert_gradients_by_policy, draw, fresh_generator, threads
from op_cases import DTYPES, arguments_of
from scale_shift_cases import OPS, check_output, make, run, sums_of

import cnnfast.ops
import cnnfast.reference
from cnnfast.ops import activations

pytestmark = pytest.mark.usefixtures("nan_outputs")

# One pixel, one row, few and many images, whole and broken panels, several tasks an image, no image.
SIZES = ((1, 1, 1, 1), (3, 3, 1, 37), (2, 19, 13, 11), (70, 16, 3, 2), (1, 160, 70, 40), (2, 48, 9, 8), (0, 5, 4, 4))


def check(op, tensors, options):
    check_output(op, tensors, options, run(op, tensors, options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", tuple(activations.CODES))
@pytest.mark.parametrize("op", OPS)
def test_results(op, activation, dtype):
    for layout, residual in zip(LAYOUTS, (True, False), strict=True):
        check(op, *make(op, dtype=dtype, layout=layout, residual=residual, activation=activation))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("op", OPS)
def test_shapes(op, dtype):
    for size in SIZES:
        check(op, *make(op, size, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", (None, "relu6", "silu"))
@pytest.mark.parametrize("op", OPS)
def test_gradients(op, activation, dtype):
    for size, layout, residual in ((SIZES[2], "nchw", False), *((size, "channels_last", True) for size in SIZES)):
        tensors, options = make(op, size, dtype, layout, residual, activation)
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        y = run(op, leaves, options)
        grad = draw(fresh_generator(), y.shape, dtype)
        y.backward(grad)
        for name, leaf in leaves.items():
            assert leaf.grad.dtype is leaf.dtype and leaf.grad.stride() == leaf.stride(), name
        assert_gradients_by_policy(
            {name: leaf.grad.to(dtype) for name, leaf in leaves.items()},
            getattr(cnnfast.reference, op),
            grad,
            tensors,
            options,
            terms=dict.fromkeys(tensors, max(y.numel(), 4)),
        )


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op):
    tensors, options = make(op, (2, 3, 3, 2), torch.float64, activation="silu")
    names, leaves = zip(*((name, t.requires_grad_()) for name, t in tensors.items()), strict=True)
    torch.autograd.gradcheck(lambda *leaves: run(op, dict(zip(names, leaves, strict=True)), options), leaves)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("op", OPS)
def test_repeatable(op, dtype):
    """Bitwise, on any number of threads; an image's result doesn't depend on its neighbours."""
    tensors, options = make(op, (3, 40, 37, 23), dtype)

    def everything():
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        y = run(op, leaves, options)
        y.backward(torch.ones_like(y))
        return [y, *(leaf.grad for leaf in leaves.values())]

    first = everything()
    for count in (1, 2, 3, 3):
        with threads(count):
            assert all(map(torch.equal, everything(), first))
    single = tensors | {name: tensors[name][1:2] for name in ("x", "residual") if name in tensors}
    assert torch.equal(run(op, single, options), first[0][1:2])


def test_what_is_kept():
    """x, and the residual where an activation follows; never a result."""
    for activation, residuals in ((None, 0), ("relu", 1)):
        tensors, options = make("scale_shift", activation=activation)
        leaves = {name: t.requires_grad_() for name, t in tensors.items()}
        y = run("scale_shift", leaves, options)
        kept = [t for t in y.grad_fn.saved_tensors if t is not None and t.dim() == 4]
        assert [t.data_ptr() for t in kept] == [leaves[name].data_ptr() for name in ("x", "residual")[: 1 + residuals]]


@pytest.mark.parametrize("op", (*OPS, "batch_norm_scale_shift"))
def test_compile(op):
    torch._dynamo.reset()
    shape = (2, 19, 13, 11)
    tensors, options = make(op, shape) if op in OPS else sums_of(torch.randn(shape))
    compiled = torch.compile(lambda **t: run(op, t, options), fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (shape, (4, 19, 9, 10)):
        tensors, options = make(op, size) if op in OPS else sums_of(torch.randn(size))
        eager, traced = ({name: t.clone().requires_grad_() for name, t in tensors.items()} for _ in range(2))
        for outputs in (run(op, eager, options), compiled(**traced)):
            outputs = (outputs,) if op in OPS else outputs[:2]
            sum(y.square().sum() for y in outputs).backward()
        for name in eager:
            if name != "y":
                torch.testing.assert_close(traced[name].grad, eager[name].grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", (*OPS, "batch_norm_scale_shift"))
def test_opcheck(op):
    tensors, options = make(op) if op in OPS else sums_of(torch.randn(2, 19, 5, 4))
    overload = getattr(torch.ops.cnnfast, op).default
    values = tensors | options
    outputs = run(op, tensors, options)
    if op in OPS:
        values |= {"grad": torch.randn_like(outputs)}
    else:
        values |= {"grad_scale": torch.randn_like(outputs[0]), "grad_shift": torch.randn_like(outputs[1])}
    codes = {name: value for name, value in options.items() if name.endswith("activation")}
    leaves = {name: t.clone().requires_grad_(name != "y") for name, t in tensors.items()}
    torch.library.opcheck(overload, arguments_of(overload, {**values, **leaves}, codes))
    backward = getattr(torch.ops.cnnfast, f"{op}_backward").default
    torch.library.opcheck(backward, arguments_of(backward, values, codes))


def test_autocast():
    """x and weights are cast for squeeze-excite, as its convolutions are; batch normalisation takes what comes."""
    tensors, options = make("scale_shift_excite")
    with torch.autocast("cpu", torch.bfloat16):
        got = run("scale_shift_excite", tensors, options)
        plain = run("scale_shift", *make("scale_shift"))
    kept = ("bias", "scale", "shift")
    cast = {name: t if name.endswith(kept) else t.bfloat16() for name, t in tensors.items()}
    assert torch.equal(got, run("scale_shift_excite", cast, options)) and plain.dtype is torch.float32


@pytest.mark.parametrize("op", OPS)
def test_mistakes(op):
    tensors, options = make(op)
    c = tensors["x"].shape[1]
    changes = [
        ({"scale": tensors["scale"][:3]}, ValueError, rf"scale must have shape \({c},\), .* got \(3,\)"),
        ({"shift": tensors["shift"].double()}, TypeError, "shift must have dtype torch.float32 beside an x of"),
        ({"activation": "mish"}, ValueError, "activation must be one of"),
        ({"backend": "triton"}, ValueError, f"backend must be one that can run {op} on cpu"),
    ]
    if op == "scale_shift":
        changes.append(({"residual": tensors["x"][:1]}, ValueError, "residual must have the output's shape"))
    for change, error, says in changes:
        with pytest.raises(error, match=says):
            run(op, {**tensors, **options, **change}, {})


# ---- batch_norm_scale_shift


@pytest.mark.parametrize("affine", ("weight bias", "weight", "bias", ""))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_statistics(dtype, affine):
    tensors, options = sums_of(torch.randn(3, 17, 5, 4).to(dtype))
    tensors = {name: t for name, t in tensors.items() if name in ("y", "sum", "squares", *affine.split())}
    got = run("batch_norm_scale_shift", tensors, options)
    doubles = {name: t.double() for name, t in tensors.items()}
    expected = run("batch_norm_scale_shift", doubles, options | {"backend": "reference"})
    for ours, ref in zip(got, expected, strict=True):
        assert ours.dtype is tensors["sum"].dtype
        torch.testing.assert_close(ours.double(), ref, rtol=torch.finfo(ours.dtype).eps, atol=1e-7)
    y = tensors["y"].double()
    var, mean = torch.var_mean(y, (0, 2, 3))
    torch.testing.assert_close(got[2].double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[3].double(), var, rtol=1e-5, atol=1e-6)


def test_gradients_of_statistics():
    tensors, options = sums_of(torch.randn(3, 4, 5, 4, dtype=torch.float64))
    y = tensors.pop("y")
    names, leaves = zip(*((name, t.requires_grad_()) for name, t in tensors.items()), strict=True)

    def scale_and_shift(*leaves):
        return run("batch_norm_scale_shift", {"y": y, **dict(zip(names, leaves, strict=True))}, options)[:2]

    torch.autograd.gradcheck(scale_and_shift, leaves)
    *_, mean, var = run("batch_norm_scale_shift", {"y": y, **tensors}, options)
    assert not mean.requires_grad and not var.requires_grad


def test_values_that_are_all_alike():
    """The variance is 0, never below, and its gradient finite."""
    y = torch.full((2, 3, 50, 70), 1234.567)
    tensors, options = sums_of(y, eps=1e-5)
    leaves = {name: t.clone().requires_grad_(name != "y") for name, t in tensors.items()}
    leaves["squares"] = (leaves["squares"].detach() * (1 - 2**-20)).requires_grad_()
    scale, shift, _, var = run("batch_norm_scale_shift", leaves, options)
    assert torch.equal(var, torch.zeros(3))
    torch.testing.assert_close(scale, tensors["weight"] / 1e-5**0.5)
    (scale.sum() + shift.sum()).backward()
    assert torch.equal(leaves["squares"].grad, torch.zeros(3)) and leaves["sum"].grad.isfinite().all()


def test_mistakes_of_statistics():
    tensors, options = sums_of(torch.randn(2, 5, 3, 3))
    for change, error, says in (
        ({"sum": tensors["sum"][:3]}, ValueError, r"sum must have shape \(5,\), got \(3,\)"),
        ({"squares": tensors["squares"].double()}, TypeError, "squares must have dtype torch.float32 beside a y of"),
        ({"weight": 1.0}, TypeError, "weight must be a torch.Tensor, got float"),
        ({"backend": "triton"}, ValueError, "backend must be one that can run batch_norm_scale_shift on cpu"),
    ):
        with pytest.raises(error, match=says):
            run("batch_norm_scale_shift", {**tensors, **change}, options if "backend" not in change else {})
