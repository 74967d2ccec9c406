"""fold(conv, bn) is conv then bn. Fails if an affine parameter, a statistic, eps or the bias is left out."""

import pytest
import torch
from networks import draw_batch_norms, relative
from torch import nn

from cnnfast.nn import DepthwiseConv2d, PointwiseConvBN
from cnnfast.nn.folding import fold


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_fold(bias, affine):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, 3, groups=2, bias=bias).double()
    bn = nn.BatchNorm2d(8, eps=0.1, affine=affine).double()
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.1, 2)
    if affine:
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    weight, shift = fold(conv, bn)
    assert relative(nn.functional.conv2d(x, weight, shift, groups=2), bn.eval()(conv(x))) < 1e-14


def test_nothing_to_fold():
    conv = DepthwiseConv2d(4, 3, bias=False)
    weight, bias = fold(conv)
    assert torch.equal(weight, conv.weight) and bias is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_folded_in_float32(dtype):
    conv, bn = nn.Conv2d(4, 4, 1, bias=False).to(dtype), nn.BatchNorm2d(4).to(dtype)
    weight, bias = fold(conv, bn)
    assert weight.dtype == bias.dtype == torch.float32


@pytest.mark.parametrize("dense", [False, True])
def test_folded_weights_that_overflow_float16(dense):
    """weight 600, eps 1e-5: folded 100,000 and more; x is tiny, so that the layers themselves stay finite."""
    from cnnfast.nn import ConvBN

    block = (ConvBN(2, 3, 1) if dense else PointwiseConvBN(2, 3)).eval()
    draw_batch_norms(block, torch.randn(8, 2, 4, 4))
    with torch.no_grad():
        block.conv.weight.fill_(600.0)
        block.bn.running_var.zero_()
        block.bn.running_mean.zero_()
        block = block.half()
        x = torch.full((1, 2, 4, 4), 2e-5, dtype=torch.float16)
        assert fold(block.conv, block.bn)[0].half().isinf().any(), "the case has no overflow"
        ours, expected = block(x), block.float().layers(x.float())
    torch.testing.assert_close(ours.float(), expected, rtol=1e-2, atol=1e-2)
