"""LeNet-1, LeNet-5 with its connection table, trainable subsampling and radial basis functions, and what is commonly
called LeNet-5."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from cnnfast.models.fully_connected import FullyConnectedNetwork
from cnnfast.models.lenet_layers import (
    C3,
    DIGITS,
    H3,
    RadialBasis,
    ScaledTanh,
    Squashed,
    Subsample,
    TableConv2d,
    init_by_fan_in,
)
from cnnfast.models.registry import register_model
from cnnfast.nn import FusedSequential
from cnnfast.nn.layers import activation_module

_CFG: dict[str, Any] = dict(
    input_size=(1, 32, 32),
    crop_pct=1.0,
    interpolation="bilinear",
    mean=(0.1307,),
    std=(0.3081,),
    num_classes=10,
    label_set="mnist",
)


@register_model(
    "lenet1",
    paper="https://papers.nips.cc/paper/293-handwritten-digit-recognition-with-a-back-propagation-network",
    year=1989,
    **_CFG | dict(input_size=(1, 28, 28)),
)
class LeNet1(FullyConnectedNetwork):
    """LeNet-1 (1989): 2,578 parameters, 136,320 MACs at 28 x 28, H3's zeros included; input normalised by MNIST's mean
    and deviation, grey.

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
        self.features.apply(init_by_fan_in)

    def _hidden_layers(self, in_features: int, factory: Any) -> list[nn.Module]:
        return [nn.Dropout(self.drop_rate)]

    def _init_layer(self, module: nn.Module) -> None:
        init_by_fan_in(module)


@register_model("lenet5", paper="http://yann.lecun.com/exdb/publis/pdf/lecun-01a.pdf", year=1998, **_CFG)
class LeNet5(FullyConnectedNetwork):
    """LeNet-5 as in the paper (1998): 60,000 parameters, 415,680 MACs at 32 x 32, C3's zeros included; input normalised
    by MNIST's mean and deviation, grey (the paper's background is -0.1, its ink 1.175).

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
        self.features.apply(init_by_fan_in)

    def _hidden_layers(self, in_features: int, factory: Any) -> list[nn.Module]:
        return [nn.Linear(in_features, 84, **factory), ScaledTanh(), nn.Dropout(self.drop_rate)]

    def _last_layer(self, num_classes: int, factory: Any) -> nn.Module:
        if self.output == "linear":
            return super()._last_layer(num_classes, factory)
        if num_classes != len(DIGITS):
            raise ValueError(f"num_classes must be {len(DIGITS)} or 0 with output 'rbf', got {num_classes}")
        return RadialBasis(**factory)

    def _init_layer(self, module: nn.Module) -> None:
        init_by_fan_in(module)


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
