"""LeNet-1, LeNet-5 with its connection table, trainable subsampling and radial basis functions, and what is commonly
called LeNet-5."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnfast.models.fully_connected import FullyConnectedNetwork
from cnnfast.models.registry import register_model
from cnnfast.nn import FusedModule, FusedSequential
from cnnfast.nn.fused import NotFusable
from cnnfast.nn.fusion import fuse_conv2d, fuse_depthwise_conv2d
from cnnfast.nn.layers import activation_module

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
_CFG: dict[str, Any] = dict(
    input_size=(1, 32, 32),
    crop_pct=1.0,
    interpolation="bilinear",
    mean=(0.1307,),
    std=(0.3081,),
    num_classes=10,
    label_set="mnist",
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
        places = [k * in_channels + c for k, seen in enumerate(table) for c in seen]
        self.weight = nn.Parameter(self.weight.detach().flatten(0, 1)[places].clone())
        self.fan_ins = [len(seen) * kernel_size**2 for seen in table for _ in seen]  # of each kernel
        places = torch.tensor(places, device=self.weight.device)  # type: ignore[assignment]
        self.register_buffer("places", places, persistent=False)  # type: ignore[arg-type]

    def dense_weight(self) -> Tensor:
        """(out_channels, in_channels, kernel_size, kernel_size), 0 where there is no connection."""
        dense = self.weight.new_zeros(self.out_channels * self.in_channels, *self.kernel_size)
        dense = dense.index_copy(0, self.places, self.weight)  # type: ignore[arg-type]
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


def _init_by_fan_in(module: nn.Module) -> None:
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


@register_model(
    "lenet1",
    paper="https://papers.nips.cc/paper/293-handwritten-digit-recognition-with-a-back-propagation-network",
    year=1989,
    **_CFG | dict(input_size=(1, 28, 28)),
)
class LeNet1(FullyConnectedNetwork):
    """LeNet-1 (1989): 2,578 parameters, 136,320 MACs at 28 x 28; input normalised by MNIST's mean and deviation,
    grey.

    (N, in_chans, H, W) -> (N, num_classes), H and W at least 16. Keys are the paper's names of the layers:
    `features.h1.layer`, `h2`, `h3`, `h4`, and `classifier.1`. 4 maps 24 x 24 of 5 x 5 filters, subsampling by 2, 12
    maps 8 x 8 that see one or two of the 4 (H3, 20 kernels), subsampling by 2, 10 outputs that see all 192 pixels. A
    subsampling is the sum of 2 x 2 pixels times a coefficient plus a bias, both trained: only with these the parameters
    are the paper's 2,578 (and connections its 98,442). Each layer is squashed, 1.7159 tanh(2/3 x); the outputs aren't,
    so that they are logits (the paper squashes them too, which doesn't change their order). Trained layer by layer; in
    eval mode with grad disabled each layer is one call, then squashed in place. The paper has 16 x 16 digits in the
    middle of 28 x 28.

    Args:
        num_classes: outputs; 0 for none (forward returns 192 features).
        in_chans: channels of x.
        drop_rate: dropout before the outputs, of which the paper has none.
        global_pool: "avg", to the 4 x 4 that the outputs have weights for (images of 28 x 28 have just these, of others
            the map is averaged), or "" with num_classes 0: forward returns the last map.

    Handwritten Digit Recognition with a Back-Propagation Network, NIPS 1989.
    """

    classifier_name = "classifier.1"
    grid = 4
    min_size = 16
    head_hidden_size = 192

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans = in_chans
        features: OrderedDict[str, nn.Module] = OrderedDict(
            h1=Squashed(nn.Conv2d(in_chans, 4, 5, **factory)),
            h2=Squashed(Subsample(4, **factory)),
            h3=Squashed(TableConv2d(4, H3, 5, **factory)),
            h4=Squashed(Subsample(12, **factory)),
        )
        head = dict(num_classes=num_classes, drop_rate=drop_rate, global_pool=global_pool, factory=factory)
        self._make_layers(nn.Sequential(features), (("h1", 4, 1), ("h3", 12, 2), ("h4", 12, 4)), 12, **head)
        self.features.apply(_init_by_fan_in)

    def _hidden_layers(self, in_features: int, factory: Any) -> list[nn.Module]:
        return [nn.Dropout(self.drop_rate)]

    def _init_layer(self, module: nn.Module) -> None:
        _init_by_fan_in(module)


@register_model("lenet5", paper="http://yann.lecun.com/exdb/publis/pdf/lecun-01a.pdf", year=1998, **_CFG)
class LeNet5(FullyConnectedNetwork):
    """LeNet-5 as in the paper (1998): 60,000 parameters, 415,680 MACs at 32 x 32; input normalised by MNIST's mean
    and deviation, grey (the paper's background is -0.1, its ink 1.175).

    (N, in_chans, H, W) -> (N, num_classes), H and W at least 32. Keys are the paper's names of the layers:
    `features.c1.layer`, `s2`, `c3`, `s4`, `c5`, then `classifier.0` (F6) and `classifier.3`. C3's 16 maps see 3, 4 or 6
    of S2's six by the paper's table: 60 kernels, 1,516 parameters, where one that sees all has 2,416. S2 and S4 are the
    sum of 2 x 2 pixels times a coefficient plus a bias, both trained. Each of these layers and F6 is squashed, 1.7159
    tanh(2/3 x). C5 is a convolution, one pixel for images of 32 x 32; of larger ones its map is averaged. Trained layer
    by layer; in eval mode with grad disabled each layer is one call, then squashed in place.

    Args:
        num_classes: outputs; 0 for none (forward returns F6's 84 features).
        in_chans: channels of x.
        drop_rate: dropout before the outputs, of which the paper has none.
        global_pool: "avg", or "" with num_classes 0: forward returns C5.
        output: "rbf", the paper's: minus the squared distance of F6 from each digit's picture of 7 x 12 pixels, which
            isn't trained, so that num_classes must be 10; see RadialBasis. "linear": 850 parameters more.

    Raises:
        ValueError: another output; "rbf" with num_classes that are neither 10 nor 0.

    Gradient-Based Learning Applied to Document Recognition, http://yann.lecun.com/exdb/publis/pdf/lecun-01a.pdf.
    """

    classifier_name = "classifier.3"
    grid = 1
    min_size = 32
    head_hidden_size = 84

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        *,
        output: str = "rbf",
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        if output not in ("rbf", "linear"):
            raise ValueError(f"output must be 'rbf' or 'linear', got {output!r}")
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans, self.output = in_chans, output
        features: OrderedDict[str, nn.Module] = OrderedDict(
            c1=Squashed(nn.Conv2d(in_chans, 6, 5, **factory)),
            s2=Squashed(Subsample(6, **factory)),
            c3=Squashed(TableConv2d(6, C3, 5, **factory)),
            s4=Squashed(Subsample(16, **factory)),
            c5=Squashed(nn.Conv2d(16, 120, 5, **factory)),
        )
        head = dict(num_classes=num_classes, drop_rate=drop_rate, global_pool=global_pool, factory=factory)
        self._make_layers(nn.Sequential(features), (("c1", 6, 1), ("c3", 16, 2), ("c5", 120, 4)), 120, **head)
        self.features.apply(_init_by_fan_in)

    def _hidden_layers(self, in_features: int, factory: Any) -> list[nn.Module]:
        return [nn.Linear(in_features, 84, **factory), ScaledTanh(), nn.Dropout(self.drop_rate)]

    def _last_layer(self, num_classes: int, factory: Any) -> nn.Module:
        if self.output == "linear":
            return super()._last_layer(num_classes, factory)
        if num_classes != len(DIGITS):
            raise ValueError(f"num_classes must be {len(DIGITS)} or 0 with output 'rbf', got {num_classes}")
        return RadialBasis(**factory)

    def _init_layer(self, module: nn.Module) -> None:
        _init_by_fan_in(module)


@register_model("lenet5_simple", paper="http://yann.lecun.com/exdb/publis/pdf/lecun-01a.pdf", year=1998, **_CFG)
class LeNet5Simple(FullyConnectedNetwork):
    """What is commonly called LeNet-5: 61,706 parameters, 416,520 MACs at 32 x 32; input normalised by
    MNIST's mean and deviation, grey.

    (N, in_chans, H, W) -> (N, num_classes), H and W at least 16. Keys `features.0`, `features.3`, `classifier.0`,
    `classifier.2`, `classifier.5`. Sizes as in the paper's network (lenet5), but the second convolution sees all maps
    (2,416 parameters for 1,516), pooling has no parameters (32 and 12 fewer), the outputs are linear (850 more) and the
    activation is the common one. Trained layer by layer; in eval mode with grad disabled each convolution with its
    activation is one call.

    Args:
        num_classes: outputs; 0 for none (forward returns the 84 features before them).
        in_chans: channels of x.
        drop_rate: dropout before the outputs.
        global_pool: "avg", to the 5 x 5 that the first linear layer has weights for (images of 32 x 32 have just these,
            of others the map is averaged), or "" with num_classes 0: forward returns the last map.
        activation: "relu" or "tanh".
        pooling: "max" or "avg", 2 x 2.

    Gradient-Based Learning Applied to Document Recognition, http://yann.lecun.com/exdb/publis/pdf/lecun-01a.pdf.
    """

    classifier_name = "classifier.5"
    grid = 5
    min_size = 16
    head_hidden_size = 84

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        *,
        activation: str = "relu",
        pooling: str = "max",
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        if activation not in ("relu", "tanh"):
            raise ValueError(f"activation must be 'relu' or 'tanh', got {activation!r}")
        if pooling not in ("max", "avg"):
            raise ValueError(f"pooling must be 'max' or 'avg', got {pooling!r}")
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans, self.activation = in_chans, activation
        pool = nn.MaxPool2d if pooling == "max" else nn.AvgPool2d
        features = FusedSequential(
            nn.Conv2d(in_chans, 6, 5, **factory),
            activation_module(activation),
            pool(2),
            nn.Conv2d(6, 16, 5, **factory),
            activation_module(activation),
            pool(2),
        )
        head = dict(num_classes=num_classes, drop_rate=drop_rate, global_pool=global_pool, factory=factory)
        self._make_layers(features, (("1", 6, 1), ("4", 16, 2), ("5", 16, 4)), 16, **head)

    def _hidden_layers(self, in_features: int, factory: Any) -> list[nn.Module]:
        first, second = nn.Linear(in_features, 120, **factory), nn.Linear(120, 84, **factory)
        activation = activation_module(self.activation)
        return [first, activation, second, activation_module(self.activation), nn.Dropout(self.drop_rate)]
