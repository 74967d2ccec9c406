from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cnnfast.nn.fusable import activation_name
from cnnfast.nn.fused import FusedModule, NotFusable
from cnnfast.nn.fusion import fuse_squeeze_excite
from cnnfast.nn.layers import PointwiseConv2d, activation_module


class SqueezeExcite(FusedModule):
    """Squeeze-and-excitation: (N, C, H, W) -> (N, C, H, W), each channel times a gate made from all channels' means.

    Keys `conv_reduce`, `conv_expand`, as in timm's SqueezeExcite. For inference one call of cnnfast.squeeze_excite; in
    a block that has one (InvertedResidual, SeparableConv2d) part of the block's call.

    Args:
        squeezed_channels: between the two 1x1 convolutions.
        activation: after the first, as the ops': None, "relu", "relu6", "silu", ...
        gate_activation: after the second.

    Squeeze-and-Excitation Networks, https://arxiv.org/abs/1709.01507.
    """

    def __init__(
        self,
        channels: int,
        squeezed_channels: int,
        *,
        activation: str | None = "relu",
        gate_activation: str | None = "sigmoid",
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        self.conv_reduce = PointwiseConv2d(channels, squeezed_channels, **factory)
        self.act1 = activation_module(activation)
        self.conv_expand = PointwiseConv2d(squeezed_channels, channels, **factory)
        self.gate = activation_module(gate_activation)

    def layers(self, x: Tensor) -> Tensor:
        squeezed = self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True)))
        return x * self.gate(self.conv_expand(squeezed))

    def fuse(self) -> Any:
        activations = dict(activation=activation_name(self.act1), gate_activation=activation_name(self.gate))
        return fuse_squeeze_excite(self.conv_reduce, self.conv_expand, **activations, backend=self.backend)


def excite_module(channels: int, squeezed_channels: int, activation: str | None, **factory: Any) -> nn.Module:
    """A block's squeeze-excite layer, or for 0 squeezed channels none."""
    if squeezed_channels == 0:
        return nn.Identity()
    return SqueezeExcite(channels, squeezed_channels, activation=activation, **factory)


def fusable_excite(module: nn.Module) -> SqueezeExcite | None:
    """What a block hands to the kernels of its squeeze-excite layer, None without one; raises NotFusable for others."""
    if type(module) is nn.Identity:
        return None
    if type(module) is not SqueezeExcite:
        raise NotFusable(f"{type(module).__name__} isn't squeeze-excite")
    return module
