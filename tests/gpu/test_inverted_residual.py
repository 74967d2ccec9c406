"""inverted_residual on a GPU, by both backends, against the reference on the same GPU in float64, float32 by IEEE
multiplications.

Fails if an element is wrong or unwritten, by one kernel or by a kernel a stage, a kernel runs on another stream or
device than PyTorch's current one, can't be captured, compiled or exported, addresses beyond 2^31 elements wrongly, or
gives other bits the second time.
"""

import functools
import importlib
from unittest import mock

import pytest
import torch
from gpu import calls
from gpu.calls import DEVICE, require, run
from numerics import float32_by, fresh_generator
from op_cases import DTYPES, Case, all_pairs, arguments_of, identifier

import cnnfast
from cnnfast.ops import cuda_kernels

pytestmark = pytest.mark.gpu
WAYS = ("fused", "apart")
EXCITE = (False, True)
WEIGHTS = ((64, 64, 1, 1), (64, 1, 3, 3), (64, 64, 1, 1))
PAIRS = all_pairs(
    {
        "way": WAYS,
        "dtype": DTYPES,
        "layout": ("channels_last", "nchw"),
        "k": ((3, 3), (1, 1), (5, 5), (2, 3), (7, 7)),
        "stride": (1, 2, (3, 1)),
        "dilation": (1, (2, 1)),
        "padding": ("same", (1, 0, 2, 3)),
        "activation": (None, "relu", "relu6", "sigmoid", "silu", "gelu", "tanh"),
        "c": (24, 1, 3, 17, 40, 131),
        "out": (32, 1, 5, 24, 300),
        "multiplier": (1, 6),
        "expand": (True, False),
        "excite": EXCITE,
        "bias": (True, False),
        "residual": (True, False),
        "size": ((19, 20), (37, 41)),
    }
)
NETWORKS = [  # (channels, out, size, k, stride, multiplier, excite): MobileNetV2, EfficientNet-B0
    (32, 16, 112, 3, 1, None, False),
    (24, 24, 56, 3, 1, 6, False),
    (64, 64, 14, 3, 1, 6, False),
    (96, 160, 14, 3, 2, 6, False),
    (160, 320, 7, 3, 1, 6, False),
    (40, 40, 28, 5, 1, 6, True),
    (112, 192, 14, 5, 2, 6, True),
]
ONE_PASS = [(80, 112, 14, 5, 1), (80, 80, 14, 3, 2), (96, 40, 7, 5, 1)]  # (channels, out, size, k, stride)
SMALL = {
    "1x1 image": dict(size=(1, 1), padding=1),
    "W=1": dict(size=(5, 1), padding=1),
    "C=1": dict(c=1, size=(5, 4)),
    "K=1": dict(out=1, size=(5, 4)),
    "batch 0": dict(n=0, size=(4, 4)),
    "stride > size": dict(size=(2, 3), stride=4, padding=1),
}
on_gpu = functools.partial(calls.on_gpu, "inverted_residual")


def away_from_kinks(generator, **row):
    return calls.away_from_kinks("inverted_residual", generator, **row)


@pytest.fixture(params=("triton", "cuda"))
def backend(request):
    """Gradients are Triton's in both cases."""
    require("inverted_residual", request.param)
    with float32_by("ieee"):
        yield request.param


@pytest.fixture(params=WAYS)
def way(request, backend):
    """One kernel (with squeeze-excite two passes), or a kernel a stage, whatever Triton's rule says."""
    if backend == "cuda" and request.param == "apart":
        pytest.skip("the C++ kernels have one way")
    with forced(request.param):
        yield request.param


def forced(way):
    kernels = importlib.import_module("cnnfast.kernels.inverted_residual")
    answer = lambda *sizes: way == "fused"  # noqa: E731
    return mock.patch.multiple(kernels, fusion_pays=answer, recompute_pays=answer)


def refused(case, backend):
    """float64 and what doesn't fit shared memory by the C++ kernels, in one sentence."""
    if backend != "cuda":
        return False
    schema = torch.ops.cnnfast.inverted_residual.default
    names = [argument.name for argument in schema._schema.arguments]
    refusal = cuda_kernels.refusal(
        "inverted_residual", dict(zip(names, arguments_of(schema, case.tensors, case.options), strict=False))
    )
    if refusal is not None:
        with pytest.raises(ValueError, match="with backend 'cuda'"):
            run(case, backend)
    return refusal is not None


def check(case, backend):
    """Rounded are e, d and, where there is squeeze-excite, d times its gates; by C++ the gates, too."""
    if refused(case, backend):
        return
    excites = "se_reduce_weight" in case.tensors
    case.check(run(case, backend), rounded=2 + excites * (2 if backend == "cuda" else 1))


def check_gradients(case, generator, backend):
    if refused(case, backend):
        return

    def terms(case, shape):
        images, pixels = max(shape[0], 1), max(shape[2] * shape[3], case.x.shape[2] * case.x.shape[3])
        return dict.fromkeys(case.tensors, images * pixels + case.terms + shape[1])

    calls.check_gradients(case, generator, backend, terms, rounded=3)


@pytest.mark.parametrize("row", PAIRS, ids=identifier)
def test_all_pairs(row, backend):
    options = {name: value for name, value in row.items() if name != "way"}
    with forced(row["way"]):
        check(on_gpu(fresh_generator(), decades=3.0, **options), backend)


@pytest.mark.parametrize("row", PAIRS, ids=identifier)
def test_gradients_of_all_pairs(row, backend):
    """relu and relu6 kink inside, where a draw can't be kept away from it: in place of theirs silu's slopes."""
    options = {name: value for name, value in row.items() if name != "way"}
    if row["activation"] in ("relu", "relu6"):
        options["activation"] = "silu"
    generator = fresh_generator()
    check_gradients(on_gpu(generator, **options), generator, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("c", "out", "size", "k", "stride", "multiplier", "excite"), NETWORKS)
def test_networks(c, out, size, k, stride, multiplier, excite, dtype, backend, way):
    generator = fresh_generator()
    row = dict(n=3, c=c, out=out, size=(size, size), k=(k, k), stride=stride, excite=excite, dtype=dtype)
    row |= dict(expand=multiplier is not None, multiplier=multiplier or 1)
    check(on_gpu(generator, activation="relu6", decades=3.0, **row), backend)
    check_gradients(on_gpu(generator, activation=None, **row), generator, backend)


@pytest.mark.parametrize("excite", EXCITE)
@pytest.mark.parametrize("layout", ("channels_last", "nchw"))
@pytest.mark.parametrize("row", SMALL.values(), ids=SMALL.keys())
def test_small_shapes(row, layout, excite, backend, way):
    generator = fresh_generator()
    case = on_gpu(generator, **{"c": 5, "activation": "silu", "layout": layout, "excite": excite, **row})
    check(case, backend)
    check_gradients(case, generator, backend)


def test_special_values(backend, way):
    case = on_gpu(fresh_generator(), c=8, size=(6, 6), activation="relu6")
    for i, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        case.x[0, i, 2, i] = value
    check(case, backend)


@pytest.mark.parametrize("excite", EXCITE)
def test_repeatable_and_independent_of_the_batch(excite, backend, way):
    row = dict(n=16, c=24, out=40, size=(28, 28), multiplier=6, activation="silu", excite=excite)
    calls.check_repeatable_and_independent_of_the_batch(
        on_gpu(fresh_generator(), **row), backend, per_image=("x", "residual")
    )


def kernels_run(case):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        y = run(case, "cuda")
        torch.cuda.synchronize()
    return y, {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    ("c", "out", "size", "k", "stride"), [(80, 112, 14, 5, 1), (80, 80, 14, 3, 2), (96, 40, 7, 5, 1)]
)
def test_bits_of_one_pass_and_of_several_launches(c, out, size, k, stride, dtype):
    """Few images take one launch on clusters, many several: images of the one in the other."""
    require("inverted_residual", "cuda")
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("no thread-block clusters")
    many = 2 * torch.cuda.get_device_properties(DEVICE).multi_processor_count
    row = dict(n=many, c=c, out=out, size=(size, size), k=(k, k), stride=stride, multiplier=6, excite=True, dtype=dtype)
    case = on_gpu(fresh_generator(), activation="silu", residual=False, **row)
    few = Case(case.op, case.tensors | {"x": case.x[5:7]}, case.options)
    with float32_by("ieee"):
        together, several = kernels_run(case)
        ours, one = kernels_run(few)
        assert any("one_pass" in name for name in one) and not any("one_pass" in name for name in several)
        assert torch.equal(ours, together[5:7])
        few.check(ours, rounded=4)


@pytest.mark.parametrize("excite", EXCITE)
def test_side_stream(excite, backend, way):
    calls.check_side_stream(on_gpu(fresh_generator(), n=4, c=24, size=(56, 56), excite=excite), backend)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("excite", EXCITE)
def test_device_that_is_not_the_current_one(excite, backend, way):
    case = on_gpu(fresh_generator(), device="cuda:1", c=24, activation="silu", excite=excite)
    calls.check_device_that_is_not_the_current_one(case, backend)


@pytest.mark.parametrize("excite", EXCITE)
def test_cuda_graph(excite, backend, way):
    calls.check_cuda_graph(on_gpu(fresh_generator(), n=4, c=24, size=(28, 28), excite=excite), backend)


@pytest.mark.parametrize("dynamic", (False, True))
def test_compile(dynamic, backend):
    case = on_gpu(fresh_generator(), c=24, out=24)
    names = ("expand_weight", "dw_weight", "project_weight", "expand_bias", "dw_bias", "project_bias")
    parameters = tuple(case.tensors[name].requires_grad_() for name in names)

    def step(x, *parameters):
        return cnnfast.inverted_residual(x * 2, *parameters, padding="same", activation="silu", backend=backend) + 1

    calls.check_compile(step, parameters, [(n, 24, 14, 14) for n in (4, 6)], dynamic)


def test_export(backend):
    case = on_gpu(fresh_generator(), n=4, c=24, out=40, size=(14, 14), residual=False)
    names = ("expand_weight", "dw_weight", "project_weight", "expand_bias", "dw_bias", "project_bias")

    class Step(torch.nn.Module):
        def forward(self, x, *parameters):
            return cnnfast.inverted_residual(x, *parameters, **case.options, backend=backend)

    args = tuple(case.tensors[name] for name in ("x", *names))
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)}, (None,) * len(names))
    with torch.no_grad():
        program = torch.export.export(Step(), args, dynamic_shapes=shapes)
        assert torch.equal(program.module()(*args), run(case, backend))


@pytest.mark.parametrize("excite", EXCITE)
@pytest.mark.parametrize("layout", ("channels_last", "nchw"))
def test_opcheck(layout, excite, backend):
    case = on_gpu(fresh_generator(), c=5, out=7, size=(6, 7), activation="silu", layout=layout, excite=excite, stride=2)
    schema = torch.ops.cnnfast.inverted_residual.default._schema.arguments
    names = [argument.name for argument in schema if "Tensor" in str(argument.type)]
    code = cnnfast.ops.backends.CODES[backend]
    tensors = [case.tensors[name].requires_grad_() if name in case.tensors else None for name in names]
    options = [[2, 2], [-1], [1, 1], 4, 4, 3]
    torch.library.opcheck(torch.ops.cnnfast.inverted_residual.default, (*tensors, *options, code))
    detached = [tensor if tensor is None else tensor.detach() for tensor in tensors]
    args = (torch.randn_like(detached[-1]), *detached, *options, 0b111111111111, code)
    torch.library.opcheck(torch.ops.cnnfast.inverted_residual_backward.default, args)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ((34, 64, 1024, 1024), (1, 64, 5900, 5900)), ids=("in all", "in one image"))
def test_more_than_2_to_the_31_elements(shape, backend):
    """The last image, or the last rows of the only one, are what the op makes of them alone."""
    assert torch.Size(shape).numel() > 2**31
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, memory_format=torch.channels_last).normal_()
    weights = [torch.randn(*size, dtype=torch.bfloat16, device=DEVICE) / 8 for size in WEIGHTS]
    rows = 12 if shape[0] == 1 else shape[2]  # a multiple of a program's rows lies above, or an image

    def last(tensor, rows):
        return tensor[-1:, :, -rows:].contiguous(memory_format=torch.channels_last)

    def forward(x):
        return cnnfast.inverted_residual(x, *weights, padding=1, backend=backend)

    with torch.no_grad(), forced("fused"):
        kept = rows - 2 if rows < shape[2] else rows  # what the rows above don't reach
        assert torch.equal(last(forward(x), kept), last(forward(last(x, rows)), kept))
