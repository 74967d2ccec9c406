"""Cases of `cnnfast bench ops` for the ops over channels: squeeze_excite, local_response_norm, scale_shift,
scale_shift_excite, scale_shift_max_pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cnnfast import ops

from .measure import Problem, Settings


class PlainSqueezeExcite(nn.Module):
    """relu(x * gates + x) by layers: the end of a block of SE-ResNet, x standing in for the residual."""

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1).requires_grad_(False)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        squeezed = self.fc1(x.mean((2, 3), keepdim=True)).relu()
        return (x * self.fc2(squeezed).sigmoid() + x).relu()


@dataclass(frozen=True)
class SqueezeExciteCase:
    """With residual and ReLU, packed."""

    network: str
    channels: int
    size: int
    reduction: int = 16
    group: str = "squeeze_excite"

    @property
    def name(self) -> str:
        return f"{self.channels} @{self.size} ({self.network})"

    def op(self, plain: nn.Module, backend: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """The op's plain, differentiable form, with the weights of the module that `build` made."""
        fc1, fc2 = (module for module in plain.modules() if isinstance(module, nn.Conv2d))
        weights = fc1.weight, fc2.weight, fc1.bias, fc2.bias
        return lambda x: ops.squeeze_excite(x, *weights, residual=x, post_activation="relu", backend=backend)

    def build(self, settings: Settings) -> Problem:
        plain = PlainSqueezeExcite(self.channels, self.reduction).to(settings.dtype)
        x = torch.randn(settings.batch, self.channels, self.size, self.size).to(settings.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        weights = sum(parameter.numel() for parameter in plain.parameters())
        flops = (
            4 * x.numel() + 2 * settings.batch * weights
        )  # a sum, a product, two clamps an element; the two products

        def ours() -> Callable[[], torch.Tensor]:
            fc1, fc2 = plain.fc1, plain.fc2
            packed = ops.pack_squeeze_excite(fc1.weight, fc2.weight, fc1.bias, fc2.bias)
            return lambda: ops.squeeze_excite_packed(x, packed, x, post_activation="relu")

        return Problem(ours, plain, x, flops, (2 * x.numel() + weights) * x.element_size())


@dataclass(frozen=True)
class LocalResponseNormCase:
    """Of a window of 5 channels, at one shape; torch's own for the peers."""

    network: str
    channels: int
    size: int
    k: float
    group: str = "local_response_norm"

    @property
    def name(self) -> str:
        return f"{self.channels} @{self.size} ({self.network})"

    def op(self, plain: nn.Module, backend: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """The op as `build`'s module has it."""
        return lambda x: ops.local_response_norm(x, 5, 1e-4, 0.75, self.k, backend=backend)

    def build(self, settings: Settings) -> Problem:
        plain = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=self.k)
        x = torch.randn(settings.batch, self.channels, self.size, self.size).to(settings.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        flops = x.numel() * (2 * plain.size + 2 + 4)  # the sum, d, then two roots, a product and a division

        def ours() -> torch.Tensor:
            return ops.local_response_norm(x, plain.size, plain.alpha, plain.beta, plain.k)

        return Problem(lambda: ours, plain, x, flops, 2 * x.numel() * x.element_size())


class PlainScaleShift(nn.Module):
    """Batch normalisation by running statistics, by layers, and what follows it: relu6, the residual x, a max pooling,
    or SiLU and squeeze-and-excitation. Its statistics are 0 and 1, so that weight and bias are scale and shift, in
    float32."""

    def __init__(
        self,
        channels: int,
        squeezed: int,
        activation: Callable[[torch.Tensor], torch.Tensor] | None,
        max_pool: tuple[int, int, int] | None,
    ):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, eps=0.0).eval()
        nn.init.normal_(self.bn.weight)
        nn.init.normal_(self.bn.bias)
        self.activation, self.max_pool = activation, max_pool
        if squeezed:
            self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.bn(x)
        if self.max_pool:
            return nn.functional.max_pool2d(z, *self.max_pool)
        if self.activation is None:
            return z + x
        z = self.activation(z)
        if not hasattr(self, "fc1"):
            return z
        return z * self.fc2(nn.functional.silu(self.fc1(z.mean((2, 3), keepdim=True)))).sigmoid()


@dataclass(frozen=True)
class ScaleShiftCase:
    """The end of a layer that is trained. squeezed: channels of scale_shift_excite's hidden layer; max_pool: kernel,
    stride, padding of a pooling without an activation before it."""

    network: str
    channels: int
    size: int
    activation: str | None = None
    squeezed: int = 0
    max_pool: tuple[int, int, int] | None = None

    @property
    def group(self) -> str:
        return "scale_shift_max_pool" if self.max_pool else "scale_shift_excite" if self.squeezed else "scale_shift"

    @property
    def name(self) -> str:
        after = "pool" if self.max_pool else self.activation or "residual"
        return f"{self.channels} @{self.size} {after} ({self.network})"

    def op(self, plain: Any, backend: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """The op with the weights of the module that `build` made."""
        rows = plain.bn.weight, plain.bn.bias
        options: dict[str, Any] = dict(activation=self.activation, backend=backend)
        if pool := self.max_pool:
            return lambda x: ops.scale_shift_max_pool(x, *rows, pool, **options)
        if not self.squeezed:
            return lambda x: ops.scale_shift(x, *rows, None if self.activation else x, **options)
        weights = plain.fc1.weight, plain.fc2.weight, plain.fc1.bias, plain.fc2.bias
        return lambda x: ops.scale_shift_excite(x, *rows, *weights, se_activation="silu", **options)

    def build(self, settings: Settings) -> Problem:
        activation = getattr(nn.functional, self.activation) if self.activation else None
        plain: Any = PlainScaleShift(self.channels, self.squeezed, activation, self.max_pool).to(settings.dtype)
        plain.bn.to(torch.promote_types(settings.dtype, torch.float32))
        x = torch.randn(settings.batch, self.channels, self.size, self.size).to(settings.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        weights = sum(parameter.numel() for parameter in plain.parameters())
        results = x.numel() // self.max_pool[1] ** 2 if self.max_pool else x.numel()
        flops = (5 if self.squeezed else 3) * x.numel() + 2 * settings.batch * weights * bool(self.squeezed)
        call = self.op(plain, "auto")
        return Problem(lambda: lambda: call(x), plain, x, flops, (x.numel() + results + weights) * x.element_size())


SCALE_SHIFTS = (
    ScaleShiftCase("mobilenetv2", 24, 56),
    ScaleShiftCase("mobilenetv2", 1280, 7, "relu6"),
    ScaleShiftCase("xception", 728, 19),
    ScaleShiftCase("efficientnet_b0", 32, 112, "silu", 8),
    ScaleShiftCase("efficientnet_b0", 240, 28, "silu", 10),
    ScaleShiftCase("efficientnet_b0", 1152, 7, "silu", 48),
    ScaleShiftCase("xception", 128, 147, max_pool=(3, 2, 1)),
    ScaleShiftCase("xception", 728, 37, max_pool=(3, 2, 1)),
)
