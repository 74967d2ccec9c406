"""Bad input: one sentence that names the argument, what came and what is wanted. Fails if a kernel sees it instead."""

import re

import pytest
import torch
from numerics import fresh_generator
from op_cases import OPS, WITH_KERNEL, make

IN = {  # (the first with a kernel size, the last pointwise) weight of each op
    "depthwise_conv2d": ("weight", None),
    "pointwise_conv2d": (None, "weight"),
    "separable_conv2d": ("dw_weight", "pw_weight"),
    "inverted_residual": ("dw_weight", "project_weight"),
    "squeeze_excite": (None, "expand_weight"),
    "conv2d": ("weight", None),
}


def bias_of(weight: str) -> str:
    return weight.replace("weight", "bias")


def mistakes(op):
    """(changes to the call, exception, message)"""
    x = torch.randn(2, 8, 9, 8)
    depthwise, pointwise = IN[op]
    weight = depthwise or pointwise
    yield {"x": x[0]}, ValueError, "x must have 4 dimensions (N, C, H, W), got shape (8, 9, 8)"
    yield {"x": x.numpy()}, TypeError, "x must be a torch.Tensor, got ndarray"
    yield {"x": x.int()}, TypeError, "x must be float32, float64, bfloat16 or float16, got torch.int32"
    yield {"x": x.to(torch.float8_e5m2)}, TypeError, "got torch.float8_e5m2"
    yield {"x": x[:, :, :0]}, ValueError, "x must have at least one channel, row and column, got shape (2, 8, 0, 8)"
    yield {"x": x[:, :0]}, ValueError, "x must have at least one channel, row and column, got shape (2, 0, 9, 8)"
    yield {"x": x[:, :5]}, ValueError, "the 5 channels that come in"
    yield {"x": x.double()}, TypeError, "must have dtype torch.float64 like x, got torch.float32"
    yield {weight: torch.randn(8, 1, 3)}, ValueError, f"{weight} must have shape ("
    yield {weight: None}, TypeError, f"{weight} must be a torch.Tensor, got NoneType"
    yield {weight: torch.randn(8, 1, 3, 3).half()}, TypeError, f"{weight} must have dtype torch.float32 like x, got"
    yield {weight: torch.randn(8, 1, 3, 3, device="meta")}, ValueError, f"{weight} must be on cpu like x, got meta"
    yield {bias_of(weight): torch.randn(7)}, ValueError, f"{bias_of(weight)} must have shape ("
    yield {bias_of(weight): torch.randn(8, 1)}, ValueError, f"{bias_of(weight)} must have shape ("
    yield {bias_of(weight): torch.randn(8).half()}, TypeError, f"{bias_of(weight)} must have dtype torch.float32 like x"
    yield {bias_of(weight): torch.randn(8, device="meta")}, ValueError, f"{bias_of(weight)} must be on cpu like x"
    yield {bias_of(weight): 0.5}, TypeError, f"{bias_of(weight)} must be a torch.Tensor, got float"
    if op == "separable_conv2d":
        message = "order must be 'depthwise_first' or 'pointwise_first', got "
        yield {"order": "pointwise"}, ValueError, message + "'pointwise'"
        yield {"order": x.numpy()}, TypeError, message + "ndarray"
    if op != "squeeze_excite":
        yield {"stride": 0}, ValueError, "stride must be a positive int or two (vertical, horizontal), got (0, 0)"
        yield (
            {"stride": (1, -1)},
            ValueError,
            "stride must be a positive int or two (vertical, horizontal), got (1, -1)",
        )
        yield (
            {"stride": (1, 1, 1)},
            ValueError,
            "stride must be a positive int or two (vertical, horizontal), got (1, 1, 1)",
        )
        yield {"stride": 1.5}, TypeError, "stride must be an int or two (vertical, horizontal), got 1.5"
    yield (
        {"activation": "swish"},
        ValueError,
        "activation must be one of None, 'identity', 'relu', 'relu6', 'sigmoid', 'silu', 'gelu', 'tanh', got 'swish'",
    )
    yield (
        {"activation": ["relu"]},
        ValueError,
        "activation must be one of None, 'identity', 'relu', 'relu6', 'sigmoid', 'silu', 'gelu', 'tanh', got ['relu']",
    )
    yield (
        {"backend": "fast"},
        ValueError,
        "backend must be one of 'auto', 'cpu', 'cuda', 'triton', 'reference', got 'fast'",
    )
    if depthwise:
        yield {"padding": -1}, ValueError, "padding must be one, two or four ints, none negative, got (-1, -1, -1, -1)"
        yield {"padding": (1, 1, 1)}, ValueError, "padding must be one, two or four ints, none negative, got (1, 1, 1)"
        yield {"padding": "valid"}, ValueError, "padding must be 'same' or ints, got 'valid'"
        yield (
            {"padding": 0.5},
            TypeError,
            "padding must be an int, (vertical, horizontal), (top, bottom, left, right) or",
        )
        yield {"dilation": 0}, ValueError, "dilation must be a positive int or two (vertical, horizontal), got (0, 0)"
        yield (
            {"padding": (0, 1, 1, 0), "dilation": (5, 1)},
            ValueError,
            "x must be at least as large as the kernel once padded, got 9 x 8 with padding [0, 1, 1, 0] for a kernel of"
            " 3 x 3 with dilation [5, 1]",
        )
    if pointwise:
        yield {pointwise: torch.randn(12, 8, 3, 3)}, ValueError, f"{pointwise} must have shape (out_channels, "
    if op != "depthwise_conv2d":
        out = 8 if op == "squeeze_excite" else 12
        wrong = torch.randn(2, out, 9, 7)
        says = f"residual must have the output's shape (2, {out}, 9, 8), got (2, {out}, 9, 7)"
        yield {"residual": wrong}, ValueError, says
        yield {"residual": wrong.half()}, TypeError, "residual must have dtype torch.float32 like x, got torch.float16"
    if op == "separable_conv2d":
        yield {"pre_activation": "x"}, ValueError, "pre_activation must be one of"
        yield {"mid_activation": "x"}, ValueError, "mid_activation must be one of"
        yield {"pw_weight": torch.randn(12, 9, 1, 1)}, ValueError, "pw_weight must have shape (out_channels, 8, 1, 1)"
    if op == "inverted_residual":
        yield {"dw_weight": torch.randn(22, 1, 3, 3)}, ValueError, "dw_weight must have shape (out, 1, kh, kw), out 11"
        yield (
            {"expand_weight": torch.randn(11, 7, 1, 1)},
            ValueError,
            "expand_weight must have shape (out_channels, 8, ",
        )
        bias, reduce, expand = torch.randn(11), torch.randn(3, 11, 1, 1), torch.randn(11, 3, 1, 1)
        yield {"expand_weight": None}, ValueError, "expand_bias must be None where expand_weight is, got a Tensor"
        yield (
            {"se_reduce_weight": reduce},
            ValueError,
            "se_expand_weight must be given where se_reduce_weight is, got No",
        )
        yield (
            {"se_expand_weight": expand},
            ValueError,
            "se_reduce_weight must be given where se_expand_weight is, got No",
        )
        yield (
            {"se_expand_bias": bias},
            ValueError,
            "se_expand_bias must be None where se_reduce_weight is, got a Tensor",
        )
        excite = {"se_reduce_weight": reduce, "se_expand_weight": expand}
        yield (
            {**excite, "se_reduce_weight": reduce[:, :8]},
            ValueError,
            "se_reduce_weight must have shape (out_channels, 11",
        )
        yield (
            {**excite, "se_expand_weight": expand[:, :2]},
            ValueError,
            "se_expand_weight must have shape (out_channels, 3,",
        )
        yield (
            {**excite, "se_expand_weight": expand[:8]},
            ValueError,
            "se_expand_weight must have shape (11, 3, 1, 1) for",
        )
        yield {**excite, "se_expand_bias": bias[:3]}, ValueError, "se_expand_bias must have shape (11,), got (3,)"
        yield {**excite, "se_activation": "x"}, ValueError, "se_activation must be one of"
        yield {**excite, "gate_activation": "x"}, ValueError, "gate_activation must be one of"
    if op == "conv2d":
        yield (
            {"weight": torch.randn(12, 4, 3, 3)},
            ValueError,
            "weight must have shape (K, 8, kh, kw) for the 8 channels",
        )
    if op == "squeeze_excite":
        yield {"reduce_weight": torch.randn(3, 7, 1, 1)}, ValueError, "reduce_weight must have shape (out_channels, 8, "
        yield (
            {"expand_weight": torch.randn(7, 3, 1, 1)},
            ValueError,
            "expand_weight must have shape (8, 3, 1, 1) for the 8",
        )
        yield {"reduce_bias": torch.randn(8)}, ValueError, "reduce_bias must have shape (3,), got (8,)"
        yield {"gate_activation": "x"}, ValueError, "gate_activation must be one of"
        yield {"post_activation": "x"}, ValueError, "post_activation must be one of"


@pytest.mark.parametrize(
    ("op", "changes", "exception", "message"),
    [(op, *mistake) for op in OPS for mistake in mistakes(op)],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistake(op, changes, exception, message):
    case = make(op, fresh_generator())
    with pytest.raises(exception, match=re.escape(message)) as raised:
        case.run(**changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("op", OPS)
def test_mistake_reaches_users_of_compile(op):
    case = make(op, fresh_generator())
    torch._dynamo.reset()
    compiled = torch.compile(lambda: case.run(activation="swish"), backend="eager")
    with pytest.raises(ValueError, match="activation must be one of"):
        compiled()


@pytest.mark.parametrize("op", OPS)
def test_packed_mistakes(op):
    case = make(op, fresh_generator())
    packed = case.pack()
    wrong = [
        ({"x": case.x[0]}, ValueError, "x must have 4 dimensions"),
        ({"x": case.x.clone().requires_grad_()}, ValueError, f"x requires grad and {op}_packed is for inference only"),
        (
            {"packed": packed.float()},
            ValueError,
            f"packed must be the contiguous uint8 tensor that pack_{op} returned, got torch.f",
        ),
        ({"packed": packed[:63]}, ValueError, f"packed must be the contiguous uint8 tensor that pack_{op} returned"),
        ({"packed": 3}, TypeError, f"packed must be the tensor that pack_{op} returned, got int"),
        ({"packed": packed.to("meta")}, ValueError, "packed must be on cpu like x, got meta"),
        ({"activation": "swish"}, ValueError, "activation must be one of"),
        ({"backend": "reference"}, ValueError, "reference takes plain weights, not packed ones"),
        ({"backend": "cuda"}, ValueError, "cuda takes tensors on cuda, not cpu"),
    ]
    if op != "squeeze_excite":
        wrong.append(({"out_channels": 0}, ValueError, "out_channels must be at least 1, got 0"))
        wrong.append(({"out_channels": 8.0}, TypeError, "out_channels must be an int, got 8.0"))
        wrong.append(({"stride": 0}, ValueError, "stride must be a positive int"))
    if op in WITH_KERNEL:
        wrong.append(({"kernel_size": (3, 0)}, ValueError, "kernel_size must be a positive int"))
    if op != "depthwise_conv2d":
        wrong.append(({"residual": case.x[:1]}, ValueError, "residual must have the output's shape"))
    for changes, exception, message in wrong:
        with pytest.raises(exception, match=re.escape(message)):
            case.run_packed(**{"packed": packed, "x": case.x.detach(), **changes})


@pytest.mark.parametrize("op", OPS)
def test_pack_mistakes(op):
    case = make(op, fresh_generator())
    weight = next(iter(case.parameters))
    for change, exception, message in [
        (
            lambda t: t.detach().requires_grad_(),
            ValueError,
            f"{weight} requires grad and pack_{op} is for inference only",
        ),
        (torch.Tensor.int, TypeError, f"{weight} must be float32, float64, bfloat16 or float16, got torch.int32"),
        (torch.Tensor.flatten, ValueError, f"{weight} must have 4 dimensions, got shape"),
        (torch.Tensor.numpy, TypeError, f"{weight} must be a torch.Tensor, got ndarray"),
    ]:
        wrong = make(op, fresh_generator())
        wrong.tensors[weight] = change(wrong.tensors[weight])
        with pytest.raises(exception, match=re.escape(message)):
            wrong.pack()
    bias = bias_of(weight)
    case.tensors[bias] = torch.randn(5)
    with pytest.raises(ValueError, match=re.escape(f"{bias} must have shape (")):
        case.pack()


@pytest.mark.parametrize("op", OPS)
def test_packed_takes_parameters_where_grad_is_off(op):
    case = make(op, fresh_generator()).to(torch.Tensor.requires_grad_)
    with torch.no_grad():
        assert not case.run_packed().requires_grad
