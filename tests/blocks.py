"""Blocks that are trained, and the same layers of torch.nn."""

import copy
import functools

import torch
import torch.nn.functional as F
from networks import draw_batch_norms
from torch import nn

from cnnfast.models.mobilenet_v2 import Bottleneck
from cnnfast.models.residual import BasicBlock
from cnnfast.models.xception import Block
from cnnfast.nn import (
    ConvBN,
    DepthwiseConv2d,
    DropPath,
    FusedSequential,
    InvertedResidual,
    PointwiseConv2d,
    PointwiseConvBN,
    SeparableConv2d,
    SqueezeExcite,
)

BLOCKS = {
    "conv": lambda: ConvBN(6, 8, 3, padding=1),
    "pointwise": lambda: PointwiseConvBN(6, 8, activation="relu"),
    "separable": lambda: SeparableConv2d(6, 6, padding=1, activation="relu6"),
    "separable_excite": lambda: SeparableConv2d(6, 8, padding=1, squeezed_channels=2, mid_activation="silu"),
    "inverted": lambda: InvertedResidual(6, 6, padding=1, expand_ratio=2),
    "inverted_excite": lambda: InvertedResidual(6, 8, 5, 2, padding=2, squeezed_channels=3, activation="silu"),
    "bottleneck": lambda: Bottleneck(6, 6, 1, 3),
    "xception": lambda: Block(6, 8, 2, 2),
    "residual": lambda: BasicBlock(6, 6),
    "sequential": lambda: FusedSequential(
        nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1)
    ),
}
SHAPE = (4, 6, 9, 7)


class PlainExcite(nn.Module):
    def __init__(self, excite):
        super().__init__()
        self.conv_reduce, self.conv_expand = plain_layer(excite.conv_reduce), plain_layer(excite.conv_expand)
        self.act1, self.gate = excite.act1, excite.gate

    def forward(self, x):
        return x * self.gate(self.conv_expand(self.act1(self.conv_reduce(F.adaptive_avg_pool2d(x, 1)))))


class Twin(nn.Module):
    """The layers of `block`, copies of torch's own kinds with the same names, one after the other."""

    def __init__(self, block):
        super().__init__()
        for name, child in copy.deepcopy(block).named_children():
            self.add_module(name, plain_layer(child))
        self.kind = type(block)
        self.skips = getattr(block, "use_res_connect", None) or (
            self.kind is not Block and getattr(block, "skip", False)
        )

    def forward(self, x):
        if self.kind is Block:
            return self.rep(x) + self.skipbn(self.skip(x))
        if self.kind is BasicBlock:
            return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)
        y = functools.reduce(lambda y, layer: layer(y), self.children(), x)
        return x + y if self.skips else y


def plain_layer(layer):
    if isinstance(layer, DropPath):
        return nn.Identity()
    if isinstance(layer, SqueezeExcite):
        return PlainExcite(layer)
    if isinstance(layer, (DepthwiseConv2d, PointwiseConv2d)):
        assert getattr(layer, "pre_activation", None) is None and getattr(layer, "activation", None) is None
        geometry = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups
        conv = nn.Conv2d(layer.in_channels, layer.out_channels, *geometry, bias=layer.bias is not None)
        conv._parameters.update(layer._parameters)
        return conv
    if next(layer.children(), None) is None:
        return layer
    sequence = nn.Sequential()
    for name, child in layer.named_children():
        sequence.add_module(name, plain_layer(child))
    return sequence


def pair(name, dtype=torch.float64):
    """(plain, ours), drawn, in training mode."""
    ours = BLOCKS[name]()
    draw_batch_norms(ours, torch.randn(SHAPE))
    ours = ours.to(dtype)
    return Twin(ours).to(dtype).train(), ours.train()
