from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cnnfast.nn.depthwise_conv2d import DepthwiseConv2d
from cnnfast.nn.fusable import activation_name
from cnnfast.nn.fused import FusedModule, NotFusable
from cnnfast.nn.fusion import fuse_inverted_residual
from cnnfast.nn.layers import DropPath, PointwiseConv2d, activation_module
from cnnfast.nn.squeeze_excite import excite_module, fusable_excite
from cnnfast.nn.training import block
from cnnfast.ops.arguments import Ints


class InvertedResidual(FusedModule):
    """MBConv: expand (1x1), BN, activation, depthwise, BN, activation (, squeeze-excite), project (1x1), BN (, + x).

    (N, in_channels, H, W) -> (N, out_channels, H', W'). Keys `conv_pw`, `bn1`, `conv_dw`, `bn2`, `se`, `conv_pwl`,
    `bn3`, as in timm's InvertedResidual. For inference one call of cnnfast.inverted_residual: the expanded tensor is
    never in memory.

    Args:
        kernel_size, stride, padding, dilation: of the depthwise convolution; padding as DepthwiseConv2d's.
        expand_ratio: expanded channels / in_channels.
        squeezed_channels: of the squeeze-excite layer, 0 for none; its activation is the block's.
        activation: after expansion and depthwise, as the ops': None, "relu", "relu6", "silu", ...
        skip: adds x where the shapes allow (stride 1, in_channels == out_channels).
        drop_path: probability, in training, of leaving out an image's block where x is added.
        eps, momentum: of the batch normalisations.

    MobileNetV2, https://arxiv.org/abs/1801.04381; EfficientNet, https://arxiv.org/abs/1905.11946.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: Ints | str = "same",
        dilation: int = 1,
        *,
        expand_ratio: float = 6,
        squeezed_channels: int = 0,
        activation: str | None = "relu6",
        skip: bool = True,
        drop_path: float = 0.0,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        expanded = round(in_channels * expand_ratio)
        self.skip = skip and stride == 1 and in_channels == out_channels
        self.conv_pw = PointwiseConv2d(in_channels, expanded, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(expanded, eps, momentum, **factory)
        self.act1 = activation_module(activation)
        self.conv_dw = DepthwiseConv2d(expanded, kernel_size, stride, padding, dilation, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(expanded, eps, momentum, **factory)
        self.act2 = activation_module(activation)
        self.se = excite_module(expanded, squeezed_channels, activation, **factory)
        self.conv_pwl = PointwiseConv2d(expanded, out_channels, bias=False, **factory)
        self.bn3 = nn.BatchNorm2d(out_channels, eps, momentum, **factory)
        self.drop_path = DropPath(drop_path)

    def layers(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv_pw(x)))
        y = self.act2(self.bn2(self.conv_dw(y)))
        y = self.bn3(self.conv_pwl(self.se(y)))
        return self.drop_path(y) + x if self.skip else y

    def fuse(self) -> Any:
        activation = activation_name(self.act1)
        if activation_name(self.act2) != activation:
            raise NotFusable("its two activations differ")
        layers = self.conv_pw, self.bn1, self.conv_dw, self.bn2, self.conv_pwl, self.bn3
        call = fuse_inverted_residual(*layers, fusable_excite(self.se), activation=activation, backend=self.backend)
        return (lambda x: call(x, residual=x)) if self.skip else call

    def fuse_training(self) -> Any:
        return block(
            [(self.conv_pw, self.bn1, self.act1), (self.conv_dw, self.bn2, self.act2), (self.conv_pwl, self.bn3, None)],
            fusable_excite(self.se),
            self.drop_path if self.skip else None,
            self.backend,
        )
