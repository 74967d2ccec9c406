from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cnnfast import ops
from cnnfast.nn.fused import FusedModule
from cnnfast.nn.fusion import fuse_depthwise_conv2d
from cnnfast.ops.activations import code
from cnnfast.ops.arguments import Ints, edges


class DepthwiseConv2d(FusedModule, nn.Conv2d):
    """Depthwise convolution with bias and activations: (N, C, H, W) -> (N, C * channel_multiplier, H', W').

    An nn.Conv2d with groups = C (same keys `weight`, `bias`, same initialisation) that runs cnnfast.depthwise_conv2d:
    activation(conv(pre_activation(x))).

    Args:
        in_channels: C.
        padding: int, (vertical, horizontal), (top, bottom, left, right) or "same" (TensorFlow's, for any stride).
        pre_activation, activation: as the ops': None, "relu", "relu6", "silu", ...

    Xception, https://arxiv.org/abs/1610.02357; MobileNets, https://arxiv.org/abs/1704.04861.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: Ints | str = 0,
        dilation: int | tuple[int, int] = 1,
        channel_multiplier: int = 1,
        bias: bool = True,
        pre_activation: str | None = None,
        activation: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ):
        (
            code("pre_activation", pre_activation),
            code("activation", activation),
            edges(padding),
        )  # checked here, not later
        super().__init__(
            in_channels,
            in_channels * channel_multiplier,
            kernel_size,
            stride,
            0,
            dilation,
            groups=in_channels,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.padding: Any = (padding, padding) if isinstance(padding, int) else padding
        self.pre_activation = pre_activation
        self.activation = activation

    def layers(self, x: Tensor) -> Tensor:
        return ops.depthwise_conv2d(
            x,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            pre_activation=self.pre_activation,
            activation=self.activation,
            backend=self.backend,
        )

    def fuse(self) -> Any:
        return fuse_depthwise_conv2d(
            self, pre_activation=self.pre_activation, activation=self.activation, backend=self.backend
        )

    def extra_repr(self) -> str:
        activations = [f"{n}={getattr(self, n)}" for n in ("pre_activation", "activation") if getattr(self, n)]
        return ", ".join([super().extra_repr(), *activations])
