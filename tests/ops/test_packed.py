"""Packings: a foreign, truncated or damaged one is refused. Fails if a kernel reads one that isn't its own."""

import pytest
import torch
from numerics import fresh_generator
from op_cases import DTYPES, OPS, WITH_KERNEL, make

OTHER = dict(zip(OPS, (*OPS[1:], OPS[0]), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_plain_and_packed_agree(op, dtype):
    """Both forms run one kernel on CPU: the same bits; conv2d where its padding isn't ATen's."""
    for bias in (True, False):
        padding = {"padding": (1, 0, 2, 1)} if op == "conv2d" else {}
        case = make(op, fresh_generator(), dtype=dtype, bias=bias, **padding)
        packed = case.pack()
        assert packed.dtype is torch.uint8 and packed.dim() == 1
        assert torch.equal(packed, case.pack())  # no byte is left as memory was
        assert torch.equal(case.run_packed(packed), case.run())


@pytest.mark.parametrize("op", OPS)
def test_low_precision_weights_in_a_float32_packing(op):
    """float32 weights packed serve a bfloat16 x: they are not rounded."""
    case = make(op, fresh_generator())
    x = case.x.bfloat16()
    options = case.packed_options
    if "residual" in options:
        options["residual"] = options["residual"].bfloat16()
        case.tensors["residual"] = options["residual"]
    ours = case.run_packed(case.pack(), **{**options, "x": x})
    assert ours.dtype is torch.bfloat16
    case.tensors["x"] = x
    case.check(ours, packed=True)


@pytest.mark.parametrize("op", OPS)
def test_foreign(op):
    case = make(op, fresh_generator())
    packed = case.pack()
    expected = case.run_packed(packed)

    def changed(byte, value):
        copy = packed.clone()
        copy[byte] = value
        return copy

    foreign = {
        "another op's": make(OTHER[op], fresh_generator()).pack(),
        "other channels": make(op, fresh_generator(), c=16, out=24).pack(),
        "float64": case.to(torch.Tensor.double).pack(),
        "zeros": torch.zeros_like(packed),
        "noise": torch.randint(0, 256, packed.shape, dtype=torch.uint8),
        "truncated": packed[:-1],
        "header only": packed[:64],
        "too long": torch.cat((packed, packed[:16])),
        "magic": changed(0, 0),
        "version": changed(4, 99),
        "op": changed(6, 77),
    }
    if op in WITH_KERNEL:
        foreign["another kernel"] = make(op, fresh_generator(), k=(5, 5)).pack()
    for name, wrong in foreign.items():
        with pytest.raises(RuntimeError, match="pack"):
            case.run_packed(wrong)
            pytest.fail(f"{name} was accepted")
    assert torch.equal(case.run_packed(packed), expected)


@pytest.mark.parametrize("op", OPS)
def test_ints_that_contradict_the_header(op):
    case = make(op, fresh_generator())
    wrong = [{"out_channels": 2 * case.packed_options.get("out_channels", 0), "residual": None}]
    if op == "depthwise_conv2d":
        wrong = [{"out_channels": 16}]
    if op == "squeeze_excite":  # whose shapes are x's
        wrong = [{"x": torch.randn(2, 16, 9, 8), "residual": None}]
    if op in WITH_KERNEL:
        wrong += [{"kernel_size": (3, 5)}, {"kernel_size": (1, 9)}]
    if op == "inverted_residual":
        wrong += [{"expanded_channels": 16}]
    for changes in wrong:
        with pytest.raises(RuntimeError, match="packed"):
            case.run_packed(**changes)


@pytest.mark.parametrize("op", OPS)
def test_not_aligned(op):
    """A packing may lie at any offset of a larger buffer, but in one piece."""
    case = make(op, fresh_generator())
    packed = case.pack()
    buffer = torch.empty(packed.numel() + 3, dtype=torch.uint8)
    buffer[3:] = packed
    assert torch.equal(case.run_packed(buffer[3:]), case.run_packed(packed))
    strided = torch.stack((packed, packed), dim=1)[:, 0]
    with pytest.raises(ValueError, match="packed must be the contiguous uint8 tensor"):
        case.run_packed(strided)
