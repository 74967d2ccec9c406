"""What LeNets are made of: convolutions by a connection table, trainable subsampling, the squashing function, radial
basis functions. From the papers of lenet.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnfast.nn import FusedModule
from cnnfast.nn.fused import NotFusable
from cnnfast.nn.fusion import fuse_conv2d, fuse_depthwise_conv2d

AMPLITUDE, SLOPE = 1.7159, 2 / 3  # of the squashing function; it maps 1 to 1 and -1 to -1

# Of each map the maps it sees.
H3 = ((0,), (0, 1), (0, 1), (1,), (0, 1), (0, 1), (2,), (2, 3), (2, 3), (3,), (2, 3), (2, 3))
C3 = (
    *[tuple(sorted((i + j) % 6 for j in range(3))) for i in range(6)],
    *[tuple(sorted((i + j) % 6 for j in range(4))) for i in range(6)],
    *[tuple(sorted((i + j) % 6 for j in (0, 1, 3, 4))) for i in range(3)],
    tuple(range(6)),
)

# The digits as 12 rows of 7 pixels, drawn after figure 3 of the paper, which doesn't give its own as numbers.
DIGITS = (
    "1c 36 63 63 63 63 63 63 63 63 36 1c",
    "18 38 78 18 18 18 18 18 18 18 18 7e",
    "3e 63 63 03 03 06 0c 18 30 60 60 7f",
    "7f 03 06 0c 1e 03 03 03 03 63 63 3e",
    "06 0e 1e 36 66 66 66 7f 06 06 06 06",
    "7f 60 60 60 7e 63 03 03 03 63 63 3e",
    "1e 30 60 60 7e 63 63 63 63 63 63 3e",
    "7f 03 03 06 06 0c 0c 18 18 30 30 30",
    "3e 63 63 63 36 1c 36 63 63 63 63 3e",
    "3e 63 63 63 63 63 3f 03 03 03 06 3c",
)


class ScaledTanh(nn.Module):
    """1.7159 tanh(2/3 x), the papers' squashing function."""

    def forward(self, x: Tensor) -> Tensor:
        return AMPLITUDE * torch.tanh(SLOPE * x)


class TableConv2d(nn.Conv2d):
    """Convolution whose map k sees the maps table[k]: (N, in_channels, H, W) -> (N, len(table), H', W'). `weight` has
    only the kernels that there are: (connections, kernel_size, kernel_size)."""

    def __init__(self, in_channels: int, table: Sequence[Sequence[int]], kernel_size: int, **factory: Any):
        super().__init__(in_channels, len(table), kernel_size, **factory)
        self.places = [k * in_channels + c for k, seen in enumerate(table) for c in seen]
        self.weight = nn.Parameter(self.weight.detach().flatten(0, 1)[self.places].clone())
        self.fan_ins = [len(seen) * kernel_size**2 for seen in table for _ in seen]  # of each kernel

    def dense_weight(self) -> Tensor:
        """(out_channels, in_channels, kernel_size, kernel_size), 0 where there is no connection."""
        dense = self.weight.new_zeros(self.out_channels * self.in_channels, *self.kernel_size)
        # Not a buffer: one that isn't in checkpoints has no values in a network made on the meta device.
        dense = dense.index_copy(0, torch.tensor(self.places, device=dense.device), self.weight)
        return dense.unflatten(0, (self.out_channels, self.in_channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.dense_weight(), self.bias)


class Subsample(nn.Module):
    """The sum of 2 x 2 pixels times a coefficient, plus a bias, both of the map: (N, C, H, W) -> (N, C, H / 2, W / 2).

    An odd row or column at the end is left out."""

    def __init__(self, channels: int, **factory: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, **factory))
        self.bias = nn.Parameter(torch.empty(channels, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2, divisor_override=1) * self.weight[:, None, None] + self.bias[:, None, None]


@dataclass
class _Convolution:
    """What nn.Conv2d with these would compute, of a layer that isn't one."""

    weight: Tensor
    bias: Tensor
    in_channels: int
    stride: tuple[int, int] = (1, 1)
    groups: int = 1
    padding: ClassVar = (0, 0)
    dilation: ClassVar = (1, 1)
    padding_mode: ClassVar = "zeros"
    forward: ClassVar = nn.Conv2d.forward

    def __post_init__(self) -> None:
        self.out_channels, self.kernel_size = len(self.weight), tuple(self.weight.shape[2:])


class Squashed(FusedModule):
    """A convolution or a subsampling, `layer`, then the squashing function: for inference one call, and the function in
    place. A slope folded into the weights would round them once more, which few and small maps show."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.act = ScaledTanh()

    def layers(self, x: Tensor) -> Tensor:
        return self.act(self.layer(x))

    def fuse(self) -> Any:
        layer: Any = self.layer
        if type(self.act) is not ScaledTanh:
            raise NotFusable(f"{type(self.act).__name__} isn't the squashing function")
        if type(layer) is Subsample:
            channels = len(layer.weight)
            weight = layer.weight[:, None, None, None].expand(-1, -1, 2, 2)
            conv = _Convolution(weight, layer.bias, channels, (2, 2), channels)
            call = fuse_depthwise_conv2d(conv, backend=self.backend)
        elif type(layer) is TableConv2d:
            conv = _Convolution(layer.dense_weight(), layer.bias, layer.in_channels)  # type: ignore[arg-type]
            call = fuse_conv2d(conv, backend=self.backend)
        else:
            call = fuse_conv2d(layer, backend=self.backend)
        return lambda x: call(x).mul_(SLOPE).tanh_().mul_(AMPLITUDE)


class RadialBasis(nn.Module):
    """Minus the squared distances of x from the pictures of the digits: (N, 84) -> (N, 10).

    The pictures are a buffer, `weight`, and aren't trained. The paper's outputs are the distances themselves; with
    their sign changed the largest is the recognised class, as of any other classifier, and the cross-entropy of these
    is the paper's discriminative loss (equation 9) but for its constant."""

    weight: Tensor

    def __init__(self, device: Any = None, dtype: Any = None):
        super().__init__()
        rows = [[int(row, 16) for row in digit.split()] for digit in DIGITS]
        pixels = [[2.0 * (row >> 6 - n & 1) - 1 for row in digit for n in range(7)] for digit in rows]
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.register_buffer("weight", torch.tensor(pixels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return -(x[:, None] - self.weight).square().sum(-1)


def init_by_fan_in(module: nn.Module) -> None:
    """Uniform within 2.4 / fan-in, as in the papers; biases 0."""
    if isinstance(module, TableConv2d):
        bounds = module.weight.new_tensor([2.4 / fan_in for fan_in in module.fan_ins])[:, None, None]
        with torch.no_grad():
            nn.init.uniform_(module.weight, -1, 1).mul_(bounds)
    elif isinstance(module, (nn.Conv2d, nn.Linear, Subsample)):
        bound = 2.4 / (4 if isinstance(module, Subsample) else module.weight[0].numel())
        nn.init.uniform_(module.weight, -bound, bound)
    else:
        return
    nn.init.zeros_(module.bias)  # type: ignore[arg-type]
