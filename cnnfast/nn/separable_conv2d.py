from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cnnfast.nn.depthwise_conv2d import DepthwiseConv2d
from cnnfast.nn.fusable import activation_name
from cnnfast.nn.fused import FusedModule, NotFusable
from cnnfast.nn.fusion import fuse_inverted_residual, fuse_separable_conv2d
from cnnfast.nn.layers import DropPath, PointwiseConv2d, activation_module
from cnnfast.nn.squeeze_excite import SqueezeExcite, excite_module, fusable_excite
from cnnfast.nn.training import block
from cnnfast.ops.arguments import Ints


class SeparableConv2d(FusedModule):
    """Depthwise separable block: depthwise, BN, activation (, squeeze-excite), pointwise, BN (, activation) (, + x).

    (N, in_channels, H, W) -> (N, out_channels, H', W'). Keys `conv_dw`, `bn1`, `se`, `conv_pw`, `bn2`, as in timm's
    DepthwiseSeparableConv. For inference one call of cnnfast.separable_conv2d, its intermediate never in memory; with
    squeeze-excite one of cnnfast.inverted_residual without expansion.

    Args:
        kernel_size, stride, padding, dilation: of the depthwise convolution; padding as DepthwiseConv2d's.
        squeezed_channels: of the squeeze-excite layer, 0 for none; its activation is mid_activation.
        mid_activation: between the two, as the ops': None, "relu", "relu6", "silu", ...
        activation: after the second BN.
        skip: adds x where the shapes allow (stride 1, in_channels == out_channels).
        drop_path: probability, in training, of leaving out an image's block where x is added.
        eps, momentum: of the batch normalisations.

    MobileNets, https://arxiv.org/abs/1704.04861.
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
        squeezed_channels: int = 0,
        mid_activation: str | None = "relu6",
        activation: str | None = None,
        skip: bool = True,
        drop_path: float = 0.0,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        self.skip = skip and stride == 1 and in_channels == out_channels
        self.conv_dw = DepthwiseConv2d(in_channels, kernel_size, stride, padding, dilation, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(in_channels, eps, momentum, **factory)
        self.act1 = activation_module(mid_activation)
        self.se = excite_module(in_channels, squeezed_channels, mid_activation, **factory)
        self.conv_pw = PointwiseConv2d(in_channels, out_channels, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(out_channels, eps, momentum, **factory)
        self.act2 = activation_module(activation)
        self.drop_path = DropPath(drop_path)

    def layers(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv_dw(x)))
        y = self.act2(self.bn2(self.conv_pw(self.se(y))))
        return self.drop_path(y) + x if self.skip else y

    def fuse(self) -> Any:
        excite = fusable_excite(self.se)
        if excite is not None:
            return self._fuse_with_excite(excite)
        activations = dict(mid_activation=activation_name(self.act1), activation=activation_name(self.act2))
        call = fuse_separable_conv2d(
            self.conv_dw, self.bn1, self.conv_pw, self.bn2, **activations, backend=self.backend
        )
        if not self.skip:
            return call
        if activations["activation"] is None:
            return lambda x: call(x, residual=x)
        return lambda x: call(x) + x  # the op adds its residual before the activation

    def _fuse_with_excite(self, excite: SqueezeExcite) -> Any:
        if activation_name(self.act2) is not None:
            raise NotFusable("the kernels have no activation after the projection")
        layers = self.conv_dw, self.bn1, self.conv_pw, self.bn2, excite
        options = dict(activation=activation_name(self.act1), backend=self.backend)
        call = fuse_inverted_residual(None, None, *layers, **options)
        return (lambda x: call(x, residual=x)) if self.skip else call

    def fuse_training(self) -> Any:
        layers = [(self.conv_dw, self.bn1, self.act1), (self.conv_pw, self.bn2, self.act2)]
        return block(layers, fusable_excite(self.se), self.drop_path if self.skip else None, self.backend)
