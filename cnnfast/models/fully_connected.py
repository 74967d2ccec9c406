"""What LeNet, AlexNet and VGG share: a Sequential of convolutions, then fully connected layers on its map."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cnnfast.models.features import FeatureInfo
from cnnfast.models.network import Network, renamed
from cnnfast.nn.layers import GlobalPool


class GridPool(GlobalPool):
    """(N, C, H, W) -> (N, C * grid * grid), the map averaged to grid x grid as by nn.AdaptiveAvgPool2d, which passes on
    one of that size; `pool_type` "" passes on any."""

    def __init__(self, pool_type: str, grid: int):
        super().__init__(pool_type)
        if pool_type not in ("avg", ""):
            raise ValueError(
                f"global_pool must be 'avg', averaging to the {grid} x {grid} pixels of which the classifier has"
                f" weights, or '' without a classifier, got {pool_type!r}"
            )
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, self.grid).flatten(1) if self.pool_type else x


class FullyConnectedNetwork(Network):
    """`features`, a map averaged to `grid` x `grid` pixels, and the fully connected layers `classifier`.

    The last of these is what get_classifier returns and reset_classifier replaces; without it (num_classes 0) forward
    returns what the others make. They have a weight for every pixel of the grid, so there is no other pooling: with
    `global_pool` "" there is no classifier, and forward returns the map.
    """

    features: nn.Sequential
    classifier: nn.Sequential
    grid: int
    head_hidden_size: int

    def checkpoint_keys(self, source: str) -> dict[str, str]:
        """pretrainedmodels takes torchvision's linear layers out of their Sequential."""
        if source != "pretrainedmodels" or not self.in_pretrainedmodels:
            return super().checkpoint_keys(source)
        own = self.state_dict()
        linear = dict.fromkeys(key.rpartition(".")[0] for key in own if key.startswith("classifier."))
        hidden = [module for module in linear if module != self.classifier_name]
        modules = {module: f"linear{n}" for n, module in enumerate(hidden)}
        modules[self.classifier_name] = "last_linear"
        names = renamed(own, modules)
        return {key: f"_{name}" if name.startswith("features.") else name for key, name in names.items()}

    def _make_layers(
        self, features: nn.Sequential, maps: Sequence[tuple[str, int, int]], num_features: int, **head: Any
    ) -> None:
        """`maps`: (layer of `features`, channels, reduction) of each feature map; `head`: _make_head's arguments."""
        self.features = features
        self.steps = ["features"]
        self.feature_info = FeatureInfo(
            dict(num_chs=channels, reduction=reduction, module=f"features.{layer}")
            for layer, channels, reduction in maps
        )
        self._make_head(num_features, **head)

    def _hidden_layers(self, in_features: int, factory: Any) -> list[nn.Module]:
        """The layers of `classifier` before its last, which is given `head_hidden_size` numbers."""
        raise NotImplementedError

    def _last_layer(self, num_classes: int, factory: Any) -> nn.Module:
        return nn.Linear(self.head_hidden_size, num_classes, **factory)

    def _init_layer(self, module: nn.Module) -> None:
        """Draws the weights of one layer; by default they are as PyTorch draws them."""

    def _make_classifier(self, num_classes: int, global_pool: str, factory: Any) -> None:
        pool = GridPool(global_pool, self.grid)
        if not global_pool and num_classes > 0:
            raise ValueError(f"num_classes must be 0 with global_pool '', got {num_classes}")
        hidden: list[nn.Module] = [*self.classifier.children()][:-1] if hasattr(self, "classifier") else []
        fresh: list[nn.Module] = [self._last_layer(num_classes, factory) if num_classes > 0 else nn.Identity()]
        if not global_pool:
            hidden = []
        elif not hidden:
            hidden = self._hidden_layers(self.num_features * self.grid**2, factory)
            fresh = hidden + fresh
        for layer in fresh:
            self._init_layer(layer)
        self.num_classes, self.global_pool = num_classes, pool
        last = self.classifier_name.partition(".")[2]  # its name also where it is the only one
        names = [*map(str, range(len(hidden))), last]
        layers = OrderedDict(zip(names, [*hidden, fresh[-1]], strict=True))
        self.classifier = nn.Sequential(layers).train(self.training)

    def _head(self, x: Tensor, pre_logits: bool) -> Tensor:
        x = self.global_pool(x)
        return (self.classifier[:-1] if pre_logits else self.classifier)(x)


def two_hidden_layers(in_features: int, width: int, drop_rate: float, factory: Any) -> list[nn.Module]:
    """Linear, ReLU and dropout, twice."""
    return [
        nn.Linear(in_features, width, **factory),
        nn.ReLU(inplace=True),
        nn.Dropout(drop_rate),
        nn.Linear(width, width, **factory),
        nn.ReLU(inplace=True),
        nn.Dropout(drop_rate),
    ]
