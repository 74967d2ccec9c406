"""The packed form, and what csrc/cuda/depthwise_conv2d.cu refuses, host-run.

Fails when a packing is read wrongly or a foreign one is taken, or when bad arguments reach a kernel.
"""

import pytest
import torch
from cuda_host import harness
from cuda_host.cases.depthwise_conv2d import DTYPES, GENERIC, VECTORIZED, geometry, run, tensors_of
from numerics import fresh_generator

pytestmark = [harness.needs_toolkit, pytest.mark.usefixtures("nan_outputs", "forward_order")]


def pack(weight, bias, op=1, magic=0x464E4E43):
    """csrc/packing.h, written down a second time."""
    scalar = torch.float64 if weight.dtype is torch.float64 else torch.float32
    channels, _, kh, kw = weight.shape
    rows = torch.cat([bias.to(scalar)[None], weight.to(scalar).reshape(channels, -1).t()])
    rows = torch.nn.functional.pad(rows, (0, -channels % 16))
    header = torch.tensor([magic, 2 | op << 16, scalar.itemsize, *[channels] * 3, kh, kw, *[0] * 8], dtype=torch.int32)
    return torch.cat([header.view(torch.uint8), rows.contiguous().view(torch.uint8).flatten()])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", [VECTORIZED[1], VECTORIZED[2], VECTORIZED[15], GENERIC[4], GENERIC[9]], ids=str)
def test_packed(host, case, dtype):
    tensors = tensors_of(case, dtype, fresh_generator())
    packed = pack(tensors["weight"], tensors["bias"])
    channels, kernel = len(tensors["bias"]), list(case["kernel"])
    y = host.ops.depthwise_conv2d_packed(tensors["x"], packed, channels, kernel, *geometry(case))
    assert not host.trapped()
    assert y.equal(run(host, case, **tensors))


def test_foreign_packing_is_refused(host):
    case_ = VECTORIZED[0]
    tensors = tensors_of(case_, torch.float32, fresh_generator())
    x, weight, bias = tensors.values()

    def packed_run(packed, channels=8, kernel=(3, 3)):
        return host.ops.depthwise_conv2d_packed(x, packed, channels, list(kernel), *geometry(case_))

    for foreign in (pack(weight, bias, op=2), pack(weight, bias, magic=1), torch.zeros_like(pack(weight, bias))):
        packed_run(foreign)
        assert host.trapped()
    with pytest.raises(RuntimeError, match="packed has 704 bytes; weights of 24 channels and 9 taps take 1344"):
        packed_run(pack(weight, bias), channels=24)
    packed_run(pack(weight, bias), channels=16)  # as many bytes
    assert host.trapped()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(8, 7, 7)), r"x has 3 dimensions; \(N, C, H, W\) is wanted"),
        (dict(weight=torch.zeros(9, 1, 3, 3), bias=None), "weight has 9 output channels; a multiple of x's 8"),
        (dict(weight=torch.zeros(8, 1, 3, 3).double()), "weight's dtype has to be x's"),
        (dict(bias=torch.zeros(7)), "bias has to be"),
        (dict(bias=torch.zeros(8).half()), "bias's dtype has to be x's or float32"),
        (dict(stride=[0, 1]), "1 or more, got 0"),
        (dict(padding=[1, -1, 0, 0]), "padding can't be negative, got -1"),
        (dict(padding=[0, 0, 0, 0], dilation=[9, 1]), "the kernel reaches over 19 pixels, the padded input has 7"),
        (dict(activation=3), "activation is 3; 0 identity, 1 relu or 2 relu6"),
    ],
)
def test_bad_arguments(host, change, message):
    arguments = dict(x=torch.zeros(1, 8, 7, 7), weight=torch.zeros(8, 1, 3, 3), bias=torch.zeros(8), stride=[1, 1])
    arguments |= dict(padding=[], dilation=[1, 1], pre_activation=0, activation=0) | change
    with pytest.raises(RuntimeError, match=message):
        host.ops.depthwise_conv2d(*arguments.values())
