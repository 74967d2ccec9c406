"""VGG, https://arxiv.org/abs/1409.1556: 3 x 3 convolutions in five stages that end in max pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from cnnfast.models.fully_connected import FullyConnectedNetwork, two_hidden_layers
from cnnfast.models.network import renamed
from cnnfast.models.registry import register_model
from cnnfast.nn import FusedSequential, LocalResponseNorm, PointwiseConv2d

WIDTHS = (64, 128, 256, 512, 512)
A, B, D, E = (1, 1, 2, 2, 2), (2, 2, 2, 2, 2), (2, 2, 3, 3, 3), (2, 2, 4, 4, 4)  # convolutions of each stage
_CFG: dict[str, Any] = dict(paper="https://arxiv.org/abs/1409.1556", year=2014, interpolation="bilinear")


class VGG(FullyConnectedNetwork):
    """VGG (2014); of each configuration's parameters and multiply-adds see the functions named for it.

    (N, in_chans, H, W) -> (N, num_classes), H and W at least 32; input normalised by ImageNet's mean and deviation, RGB
    (the paper subtracts the mean pixel only). State-dict keys and initialisation of torchvision's: `features.0`, ...,
    `classifier.6`; checkpoint_keys has timm's, whose first linear layer is a 7 x 7 convolution of the same numbers. The
    feature maps are timm's: before each pooling, and the last. Trained layer by layer; in eval mode with grad disabled
    each convolution with what follows it up to its ReLU is one call.

    Where the last map is larger than 7 x 7 (images of 256 and more) it is averaged to 7 x 7, as in torchvision; timm
    applies the classifier to every 7 x 7 window and averages what the hidden layers make, so its logits are others.
    The paper initialised its deeper networks from trained shallow ones; here as in torchvision convolutions are drawn
    by fan-out, linear layers with deviation 0.01, biases are 0.

    Args:
        depths: convolutions of each stage.
        norm: "bn", batch normalisation before each ReLU (not in the paper), "lrn", response normalisation after the
            first (A-LRN), or None.
        pointwise: the last convolution of a stage of three is 1 x 1 (configuration C).
        num_classes: outputs; 0 for none (forward returns the 4096 features before them).
        in_chans: channels of x.
        drop_rate: dropout after each of the two hidden linear layers.
        global_pool: "avg", to the 7 x 7 that the first linear layer has weights for, or "" with num_classes 0: forward
            returns the last map.

    Very Deep Convolutional Networks for Large-Scale Image Recognition, https://arxiv.org/abs/1409.1556.
    """

    key_source = "torchvision"
    classifier_name = "classifier.6"
    grid = 7
    min_size = 32
    head_hidden_size = 4096

    def __init__(
        self,
        depths: Sequence[int],
        norm: str | None = None,
        pointwise: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.5,
        global_pool: str = "avg",
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        if norm not in (None, "bn", "lrn"):
            raise ValueError(f"norm must be None, 'bn' or 'lrn', got {norm!r}")
        if len(depths) != len(WIDTHS) or min(depths) < 1:
            raise ValueError(f"depths must be {len(WIDTHS)} positive numbers, got {depths!r}")
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans = in_chans
        self.in_timm = self.in_pretrainedmodels = norm != "lrn" and not pointwise
        features, channels = FusedSequential(), in_chans
        maps: list[tuple[str, int, int]] = []
        for stage, (depth, width) in enumerate(zip(depths, WIDTHS, strict=True)):
            for i in range(depth):
                if pointwise and i == 2:
                    features.append(PointwiseConv2d(channels, width, **factory))
                else:
                    features.append(nn.Conv2d(channels, width, 3, padding=1, **factory))
                if norm == "bn":
                    features.append(nn.BatchNorm2d(width, **factory))
                features.append(nn.ReLU(inplace=True))
                if norm == "lrn" and len(features) == 2:  # the paper's AlexNet's, see there
                    features.append(LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2))
                channels = width
            maps.append((str(len(features) - 1), width, 1 << stage))
            features.append(nn.MaxPool2d(2, 2))
        maps.append((str(len(features) - 1), channels, 1 << len(WIDTHS)))
        head = dict(num_classes=num_classes, drop_rate=drop_rate, global_pool=global_pool, factory=factory)
        self._make_layers(features, maps, channels, **head)
        features.apply(self._init_layer)

    def _hidden_layers(self, in_features: int, factory: Any) -> list[nn.Module]:
        return two_hidden_layers(in_features, 4096, self.drop_rate, factory)

    def _init_layer(self, module: nn.Module) -> None:
        """As torchvision's."""
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)

    def checkpoint_keys(self, source: str) -> dict[str, str]:
        """timm's linear layers have names of their own."""
        if source != "timm" or not self.in_timm:
            return super().checkpoint_keys(source)
        modules = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2", "classifier.6": "head.fc"}
        return renamed(self.state_dict(), modules)

    def checkpoint_shapes(self, source: str) -> dict[str, tuple[int, ...]]:
        """timm's hidden linear layers are convolutions."""
        if source != "timm":
            return {}
        own = self.state_dict()
        maps = {"classifier.0.weight": self.grid, "classifier.3.weight": 1}
        return {key: (own[key].shape[0], -1, size, size) for key, size in maps.items() if key in own}


@register_model("vgg11", timm="vgg11", torchvision="vgg11", **_CFG)
def vgg11(**options: Any) -> VGG:
    """VGG-11, configuration A (2014): 132,863,336 parameters, 7.6 GMACs at 224 x 224; see VGG."""
    return VGG(A, **options)


@register_model("vgg11_bn", timm="vgg11_bn", torchvision="vgg11_bn", **_CFG)
def vgg11_bn(**options: Any) -> VGG:
    """VGG-11 with batch normalisation: 132,868,840 parameters, 7.6 GMACs at 224 x 224; see VGG."""
    return VGG(A, "bn", **options)


@register_model("vgg11_lrn", **_CFG)
def vgg11_lrn(**options: Any) -> VGG:
    """VGG-11 with response normalisation, configuration A-LRN (2014): 132,863,336 parameters, 7.6 GMACs at 224 x
    224. The paper has AlexNet's normalisation (k 2, 5 channels, alpha 1e-4, beta 0.75) once, after the first ReLU, and
    finds that it doesn't help; see VGG."""
    return VGG(A, "lrn", **options)


@register_model("vgg13", timm="vgg13", torchvision="vgg13", **_CFG)
def vgg13(**options: Any) -> VGG:
    """VGG-13, configuration B (2014): 133,047,848 parameters, 11.3 GMACs at 224 x 224; see VGG."""
    return VGG(B, **options)


@register_model("vgg13_bn", timm="vgg13_bn", torchvision="vgg13_bn", **_CFG)
def vgg13_bn(**options: Any) -> VGG:
    """VGG-13 with batch normalisation: 133,053,736 parameters, 11.3 GMACs at 224 x 224; see VGG."""
    return VGG(B, "bn", **options)


@register_model("vgg16", timm="vgg16", torchvision="vgg16", **_CFG)
def vgg16(**options: Any) -> VGG:
    """VGG-16, configuration D (2014): 138,357,544 parameters, 15.5 GMACs at 224 x 224; see VGG."""
    return VGG(D, **options)


@register_model("vgg16_bn", timm="vgg16_bn", torchvision="vgg16_bn", **_CFG)
def vgg16_bn(**options: Any) -> VGG:
    """VGG-16 with batch normalisation: 138,365,992 parameters, 15.5 GMACs at 224 x 224; see VGG."""
    return VGG(D, "bn", **options)


@register_model("vgg16_c", **_CFG)
def vgg16_c(**options: Any) -> VGG:
    """VGG-16, configuration C (2014): 133,638,952 parameters, 11.8 GMACs at 224 x 224. The last convolution
    of each of the three stages of three is 1 x 1; see VGG."""
    return VGG(D, pointwise=True, **options)


@register_model("vgg19", timm="vgg19", torchvision="vgg19", **_CFG)
def vgg19(**options: Any) -> VGG:
    """VGG-19, configuration E (2014): 143,667,240 parameters, 19.6 GMACs at 224 x 224; see VGG."""
    return VGG(E, **options)


@register_model("vgg19_bn", timm="vgg19_bn", torchvision="vgg19_bn", **_CFG)
def vgg19_bn(**options: Any) -> VGG:
    """VGG-19 with batch normalisation: 143,678,248 parameters, 19.6 GMACs at 224 x 224; see VGG."""
    return VGG(E, "bn", **options)
