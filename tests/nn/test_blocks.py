"""Each block against the same layers of plain torch.

Fails if a fused block leaves its numerics (elementwise bound of tests/numerics.py, where the layers are one op), if an
unfused one differs from torch.nn layers in output or gradients, or if either form isn't the one that ran.
"""

import pytest
import torch
import torch.nn.functional as F
from networks import assert_as_exact_as, assert_same_gradients, draw_batch_norms, in_float64, ops_of, relative
from numerics import assert_close_by_policy
from torch import nn

from cnnfast import reference
from cnnfast.nn import (
    Conv2dSame,
    ConvBN,
    DepthwiseConv2d,
    InvertedResidual,
    PointwiseConvBN,
    SeparableConv2d,
    SqueezeExcite,
    fusion,
)

ACTIVATIONS = {
    nn.Identity: lambda x: x,
    nn.ReLU: F.relu,
    nn.ReLU6: F.relu6,
    nn.Sigmoid: torch.sigmoid,
    nn.SiLU: F.silu,
    nn.GELU: F.gelu,
    nn.Tanh: torch.tanh,
}

BLOCKS = {
    "conv": (lambda: ConvBN(5, 8, 3, 2, "same", activation="relu6"), ["conv2d_packed"]),
    "conv_padded": (lambda: ConvBN(5, 8, 3, padding=1), ["conv2d_packed"]),
    "conv_row": (lambda: ConvBN(5, 8, (1, 7), padding=(0, 3), eps=1e-3, bias=True), ["conv2d_packed"]),
    "conv_1x1": (lambda: ConvBN(5, 8, 1, 2, bias=True), ["pointwise_conv2d_packed"]),
    "depthwise": (lambda: DepthwiseConv2d(5, 3, padding=1, activation="relu6"), ["depthwise_conv2d_packed"]),
    "depthwise_asymmetric": (
        lambda: DepthwiseConv2d(5, (3, 5), 2, (0, 1, 2, 1), channel_multiplier=2, bias=False, pre_activation="relu"),
        ["depthwise_conv2d_packed"],
    ),
    "pointwise": (lambda: PointwiseConvBN(5, 19, activation="relu"), ["pointwise_conv2d_packed"]),
    "pointwise_strided": (lambda: PointwiseConvBN(5, 8, 2), ["pointwise_conv2d_packed"]),
    "separable": (lambda: SeparableConv2d(5, 17), ["separable_conv2d_packed"]),
    "separable_skip": (lambda: SeparableConv2d(5, 5, padding=1), ["separable_conv2d_packed"]),
    "separable_skip_activation": (lambda: SeparableConv2d(5, 5, activation="relu"), ["separable_conv2d_packed"]),
    "separable_strided": (lambda: SeparableConv2d(5, 8, 5, 2, activation="relu"), ["separable_conv2d_packed"]),
    "separable_dilated": (lambda: SeparableConv2d(5, 8, 3, padding=2, dilation=2), ["separable_conv2d_packed"]),
    "inverted": (lambda: InvertedResidual(5, 8, 5, 2), ["inverted_residual_packed"]),
    "inverted_skip": (lambda: InvertedResidual(5, 5, expand_ratio=3.4), ["inverted_residual_packed"]),
    "inverted_no_skip": (
        lambda: InvertedResidual(5, 5, padding=1, skip=False, activation="relu"),
        ["inverted_residual_packed"],
    ),
    "inverted_excite": (
        lambda: InvertedResidual(5, 8, 5, 2, squeezed_channels=3, activation="silu"),
        ["inverted_residual_packed"],
    ),
    "inverted_excite_skip": (
        lambda: InvertedResidual(5, 5, squeezed_channels=2, activation="gelu"),
        ["inverted_residual_packed"],
    ),
    "separable_excite": (
        lambda: SeparableConv2d(5, 8, padding=1, squeezed_channels=2, mid_activation="silu"),
        ["inverted_residual_packed"],
    ),
    "separable_excite_skip": (lambda: SeparableConv2d(5, 5, squeezed_channels=1), ["inverted_residual_packed"]),
    "squeeze_excite": (lambda: SqueezeExcite(5, 3), ["squeeze_excite_packed"]),
    "conv_tanh": (lambda: ConvBN(5, 8, 3, padding=1, activation="tanh"), ["conv2d_packed"]),
}
SIZES = [(3, 5, 31, 29), (1, 5, 32, 40)]


def make(name, dtype=torch.float32):
    torch.manual_seed(5)
    block = BLOCKS[name][0]()
    draw_batch_norms(block, torch.randn(4, 5, 9, 7))
    return block.eval().to(dtype)


def plain(block, x):
    """The block's layers by torch.nn.functional: what its forward says, written again."""

    def conv(layer, x):
        if isinstance(layer, (DepthwiseConv2d, Conv2dSame)):
            x = reference_pad(layer, x)
            return F.conv2d(x, layer.weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups)
        return nn.Conv2d.forward(layer, x)

    if isinstance(block, DepthwiseConv2d):
        x = {None: x, "relu": F.relu(x)}[block.pre_activation]
        y = conv(block, x)
        return F.relu6(y) if block.activation else y
    if isinstance(block, SqueezeExcite):
        squeezed = ACTIVATIONS[type(block.act1)](conv(block.conv_reduce, x.mean((2, 3), keepdim=True)))
        return x * ACTIVATIONS[type(block.gate)](conv(block.conv_expand, squeezed))
    y, layers = x, list(block.children())
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            y = conv(layer, y)
        elif isinstance(layer, nn.BatchNorm2d):
            statistics = (layer.running_mean, layer.running_var)
            y = F.batch_norm(y, *statistics, layer.weight, layer.bias, layer.training, layer.momentum, layer.eps)
        elif isinstance(layer, SqueezeExcite):
            y = plain(layer, y)
        elif type(layer) in ACTIVATIONS:
            y = ACTIVATIONS[type(layer)](y)
    return y + x if getattr(block, "skip", False) else y


def reference_pad(layer, x):
    padding = "same" if isinstance(layer, Conv2dSame) else layer.padding
    return reference.common.pad(x, padding, layer.kernel_size, layer.stride, layer.dilation)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", BLOCKS)
def test_fused(name, layout, nan_outputs):
    block = make(name)
    exact = in_float64(block)
    for size in SIZES:
        x = torch.randn(size).to(memory_format=layout)
        with torch.no_grad():
            theirs = plain(block, x)
            ours = block(x)
            assert_as_exact_as(ours, theirs, plain(exact, x.double()))
            assert ours.stride() == theirs.stride()
            assert ops_of(block, x) == BLOCKS[name][1]


@pytest.mark.parametrize("size", [(2, 5, 3, 3), (1, 5, 1, 1), (0, 5, 6, 6), (2, 5, 1, 7)])
@pytest.mark.parametrize("name", BLOCKS)
def test_fused_small_images(name, size, nan_outputs):
    if name in ("depthwise_asymmetric", "separable_dilated") and min(size[2:]) < 3:
        pytest.skip("smaller than the kernel")
    block, x = make(name), torch.randn(size)
    with torch.no_grad():
        torch.testing.assert_close(block(x), plain(block, x), rtol=1e-5, atol=1e-5)


def test_one_op_block_is_within_the_elementwise_bound(nan_outputs):
    block = make("depthwise")
    x = torch.randn(3, 5, 9, 7) * torch.logspace(-2, 1, 5).reshape(5, 1, 1)
    with torch.no_grad():
        ours = block(x)
    assert_close_by_policy(
        ours, reference.depthwise_conv2d, x, block.weight, block.bias, padding=1, activation="relu6", terms=10
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BLOCKS)
def test_fused_in_low_precision(name, dtype):
    block = make(name, dtype)
    x = torch.randn(4, 5, 13, 14).to(dtype)
    with torch.no_grad():
        ours = block(x)
        assert ours.dtype == dtype
        assert_as_exact_as(ours, plain(block, x), plain(in_float64(block), x.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", [name for name in BLOCKS if not name.startswith("conv")])  # ATen's on a GPU
def test_where_kernels_take_plain_weights(name, dtype, monkeypatch):
    """As on a GPU: the plain op with folded weights in the parameters' dtype, one call a block."""
    monkeypatch.setattr(fusion, "_takes_packed", lambda op, device, backend: False)
    block, x = make(name, dtype), torch.randn(4, 5, 13, 14).to(dtype)
    with torch.no_grad():
        ours = block(x)
        assert ops_of(block, x) == [BLOCKS[name][1][0].removesuffix("_packed")]
        assert_as_exact_as(ours, plain(block, x), plain(in_float64(block), x.double()))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_layers_and_gradients(name, mode):
    block, other = make(name, torch.float64), make(name, torch.float64)
    for b in (block, other):
        b.train(mode == "train")
    x = torch.randn(SIZES[0], dtype=torch.float64)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    ours, theirs = block(inputs[0]), plain(other, inputs[1])
    assert relative(ours, theirs) <= 1e-9
    grad = torch.randn_like(ours)
    ours.backward(grad)
    theirs.backward(grad)
    assert relative(inputs[0].grad, inputs[1].grad) <= 1e-9
    assert_same_gradients(block, other, 1e-9)
    for (key, p), q in zip(block.named_buffers(), other.buffers(), strict=True):
        if key.startswith("running"):
            assert relative(p, q) <= 1e-9, key


def test_pointwise_residual():
    block = make("pointwise")
    x, residual = torch.randn(2, 5, 6, 7), torch.randn(2, 19, 6, 7)
    with torch.no_grad():
        torch.testing.assert_close(block(x, residual), block.layers(x, residual), rtol=1e-5, atol=1e-5)
    assert block.train()(x, residual).shape == residual.shape


def test_drop_path_drops_images():
    torch.manual_seed(0)
    block = InvertedResidual(4, 4, drop_path=0.5).train()
    x = torch.randn(64, 4, 3, 3)
    kept = (block(x) - x).abs().amax((1, 2, 3)) > 0
    assert 16 < kept.sum() < 48
    block.eval()
    with torch.no_grad():
        assert ((block(x) - x).abs().amax((1, 2, 3)) > 0).all()


MISTAKES = {
    "rank": (lambda: InvertedResidual(4, 4), (4, 5, 5), "4 dimensions"),
    "channels": (lambda: InvertedResidual(4, 4), (1, 5, 5, 5), r"\b4\b"),
    "separable_channels": (lambda: SeparableConv2d(4, 4), (1, 5, 5, 5), r"\b4\b"),
    "pointwise_channels": (lambda: PointwiseConvBN(4, 4), (1, 5, 5, 5), r"\b4\b"),
    "depthwise_size": (lambda: DepthwiseConv2d(4, 3), (1, 4, 2, 2), "kernel"),
}


@pytest.mark.parametrize("mode", ["fused", "layers"])
@pytest.mark.parametrize("make_block, shape, says", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_in_x(make_block, shape, says, mode):
    block = make_block().eval()
    with torch.set_grad_enabled(mode == "layers"), pytest.raises(ValueError, match=says) as error:
        block(torch.randn(shape))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "make_block, says",
    [
        (lambda: DepthwiseConv2d(4, 3, activation="swish"), "activation must be one of"),
        (lambda: DepthwiseConv2d(4, 3, padding=-1), "padding"),
        (lambda: DepthwiseConv2d(4, 3, padding="valid"), "padding"),
        (lambda: InvertedResidual(4, 4, activation="swish"), "activation must be one of"),
        (lambda: InvertedResidual(4, 4, drop_path=1.0), "drop_prob"),
    ],
)
def test_mistakes_in_construction(make_block, says):
    with pytest.raises(ValueError, match=says):
        make_block()


@pytest.mark.parametrize("name", ["inverted_excite", "separable_excite"])
def test_another_kind_of_excitation_runs_as_it_is(name):
    """A layer in squeeze-excite's place that has its parts, but another forward, is not taken for it."""

    class Twice(SqueezeExcite):
        def forward(self, x):
            return super().forward(super().forward(x))

    block, x = make(name), torch.randn(2, 5, 9, 8)
    once = block.layers(x)
    block.se.__class__ = Twice
    with torch.no_grad():
        y = block(x)
        assert relative(y, once) > 1e-2
        torch.testing.assert_close(y, block.layers(x))
        assert BLOCKS[name][1][0] not in ops_of(block, x)
