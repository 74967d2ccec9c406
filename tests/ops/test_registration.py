"""What torch expects of an op: opcheck, torch.compile, torch.export, AOTInductor, autocast.

Fails if a fake's shape, stride or dtype differs from the kernel's, an input is changed, a graph breaks, a dynamic shape
is specialised, or autocast casts what it shouldn't (or not what it should).
"""

import io
import random

import pytest
import torch
from numerics import draw, fresh_generator
from op_cases import OPS, make, schema_arguments

import cnnfast.ops
from cnnfast.ops import activations

MUCH = {"excite": True, "pointwise_first": True}
LITTLE = {"expand": False, "bias": False, "residual": False, "dtype": torch.bfloat16, "stride": 2, "c": 1}
LITTLE["size"] = (1, 5)  # with one channel both memory formats in one


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        pytest.param(MUCH, "nchw", id="much-nchw"),
        pytest.param(LITTLE, "channels_last", id="little-channels_last"),
        pytest.param(MUCH, "channels_last", id="much-channels_last", marks=pytest.mark.slow),
        pytest.param(LITTLE, "nchw", id="little-nchw", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("form", ("{}", "{}_backward", "pack_{}", "{}_packed"))
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, form, row, layout):
    name = form.format(op)
    case = make(op, fresh_generator(), layout=layout, **row)
    if form == "{}":
        case = case.to(torch.Tensor.requires_grad_)
    torch.library.opcheck(getattr(torch.ops.cnnfast, name).default, schema_arguments(case, name))


@pytest.mark.parametrize("op", OPS)
def test_backward_returns_nothing_for_what_is_not_wanted(op):
    case = make(op, fresh_generator(), excite=True, pointwise_first=True)
    name = f"{op}_backward"
    arguments = list(schema_arguments(case, name))
    overload = getattr(torch.ops.cnnfast, name).default
    position = next(i for i, argument in enumerate(overload._schema.arguments) if argument.name == "output_mask")
    names = [argument.name for argument in overload._schema.arguments if "Tensor" in str(argument.type)][1:]
    masks = range(2 ** len(names))
    for mask in masks if len(masks) <= 256 else random.sample(masks, 256):
        arguments[position] = mask
        for i, (name, gradient) in enumerate(zip(names, overload(*arguments), strict=True)):
            assert (gradient.numel() > 0) == (name in case.tensors and bool(mask >> i & 1)), (name, mask)


@pytest.mark.parametrize("op", OPS)
def test_compile_dynamic(op):
    """Forward and backward in one graph, no break, no recompilation for other sizes and batches."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    case = make(op, fresh_generator(), residual=False)
    compiled = torch.compile(lambda **tensors: case.run(**tensors) * 2, fullgraph=True, dynamic=True, backend=counting)
    for n, size in ((4, (9, 10)), (3, (11, 17)), (6, (23, 8))):  # no two alike at first: dynamo would tie them
        x = draw(fresh_generator(), (n, 8, *size)).to(memory_format=torch.channels_last)
        eager = {name: t.detach().requires_grad_() for name, t in {**case.tensors, "x": x}.items()}
        traced = {name: t.detach().requires_grad_() for name, t in eager.items()}
        expected, got = case.run(**eager) * 2, compiled(**traced)
        assert torch.equal(got, expected) and got.stride() == expected.stride()
        expected.square().sum().backward()
        got.square().sum().backward()
        for name in eager:
            torch.testing.assert_close(traced[name].grad, eager[name].grad, rtol=1e-6, atol=1e-6)
    assert len(graphs) == 1


@pytest.mark.parametrize("op", OPS)
def test_compile_packed(op):
    """Under Inductor with freezing the packing is folded: the compiled code packs nothing and gives the same bits."""
    case = make(op, fresh_generator())
    module = Packed(case).eval()
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(module, fullgraph=True)
        got, (code,) = torch._inductor.utils.run_and_get_code(compiled, case.x)
    assert torch.equal(got, case.run_packed())
    assert f"{op}_packed" in code and f"pack_{op}" not in code


class Packed(torch.nn.Module):
    """A block as cnnfast.nn has it in eval: weights packed inside the graph."""

    def __init__(self, case):
        super().__init__()
        self.op, self.options = case.op, case.packed_options
        self.names = list(case.parameters)
        self.parameters_ = torch.nn.ParameterList(
            torch.nn.Parameter(t, requires_grad=False) for t in case.parameters.values()
        )
        self.residual = (
            torch.nn.Parameter(self.options.pop("residual"), requires_grad=False)
            if "residual" in self.options
            else None
        )

    def forward(self, x):
        packed = getattr(cnnfast.ops, f"pack_{self.op}")(**dict(zip(self.names, self.parameters_, strict=True)))
        residual = {} if self.residual is None else {"residual": self.residual}
        return getattr(cnnfast.ops, f"{self.op}_packed")(x, packed, **residual, **self.options)


class Plain(Packed):
    def __init__(self, case):
        super().__init__(case)
        self.options = case.options

    def forward(self, x):
        tensors = dict(zip(self.names, self.parameters_, strict=True))
        if self.residual is not None:
            tensors["residual"] = self.residual
        return getattr(cnnfast.ops, self.op)(x, **tensors, **self.options)


@pytest.mark.parametrize("form", (Plain, Packed))
@pytest.mark.parametrize("op", OPS)
def test_export(op, form):
    """Through torch.export with dynamic batch and size, saved and loaded."""
    case = make(op, fresh_generator(), residual=False)
    module = form(case).eval()
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(module, (case.x,), dynamic_shapes={"x": dynamic})
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        for n, size in ((2, (9, 8)), (3, (12, 5))):
            x = draw(fresh_generator(), (n, 8, *size)).to(memory_format=torch.channels_last)
            assert torch.equal(loaded(x), module(x))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_aot_inductor(op, tmp_path):
    case = make(op, fresh_generator(), residual=False)
    module = Packed(case).eval()
    with torch.no_grad():
        program = torch.export.export(module, (case.x,), dynamic_shapes={"x": {0: torch.export.Dim("n", min=1, max=8)}})
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "op.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        assert torch.equal(loaded(case.x), module(case.x))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("op", OPS)
def test_autocast(op, dtype):
    """x, weights and residual are cast, biases stay float32; gradients come back in the parameters' own dtype."""
    case = make(op, fresh_generator(), activation="silu")  # relu may be 0 for all that a small image is squeezed to
    leaves = {name: t.requires_grad_() for name, t in case.tensors.items()}
    with torch.autocast("cpu", dtype):
        y = case.run()
    assert y.dtype is dtype
    cast = {name: t if name.endswith("bias") else t.to(dtype) for name, t in case.tensors.items()}
    assert torch.equal(y, case.run(**cast))
    y.float().square().sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad.dtype is torch.float32 and leaf.grad.any(), name


@pytest.mark.parametrize("op", OPS)
def test_autocast_packed(op):
    case = make(op, fresh_generator())
    packed = case.pack()
    with torch.autocast("cpu", torch.bfloat16):
        y = case.run_packed(packed)
    options = case.packed_options
    if "residual" in options:
        options["residual"] = options["residual"].bfloat16()
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, case.run_packed(packed, **{**options, "x": case.x.bfloat16()}))


@pytest.mark.parametrize("op", OPS)
def test_autocast_mixes_dtypes_but_leaves_float64(op):
    case = make(op, fresh_generator())
    double = case.to(torch.Tensor.double)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(case.run(x=case.x.bfloat16()), case.run())  # x already cast by the op before
        assert double.run().dtype is torch.float64
        with pytest.raises(TypeError, match=r"must have dtype torch.float64 like x, got torch.float32"):
            case.run(x=double.x)


@pytest.mark.parametrize("op", OPS)
def test_autocast_compiled(op):
    case = make(op, fresh_generator())
    torch._dynamo.reset()

    def run(**tensors):
        with torch.autocast("cpu", torch.bfloat16):
            return case.run(**tensors)

    leaves = {name: t.detach().requires_grad_() for name, t in case.tensors.items()}
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(**leaves)
    assert torch.equal(got, run(**case.tensors))
    got.float().sum().backward()
    assert all(leaf.grad.dtype is torch.float32 for leaf in leaves.values())


def test_one_table_of_activations():
    assert set(activations.CODES) == set(activations.FUNCTIONS)
    x = torch.linspace(-9, 9, 37)
    for name, code in activations.CODES.items():
        case = make("pointwise_conv2d", fresh_generator(), c=1, out=1, bias=False, residual=False, size=(1, 37), n=1)
        case.tensors["weight"] = torch.ones(1, 1, 1, 1)
        got = torch.ops.cnnfast.pointwise_conv2d(
            x.reshape(1, 1, 1, 37), case.tensors["weight"], None, None, None, [1, 1], code
        )
        torch.testing.assert_close(
            got.flatten().double(), activations.FUNCTIONS[name](x.double()), rtol=1e-6, atol=1e-15
        )
