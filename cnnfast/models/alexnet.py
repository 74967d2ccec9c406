"""AlexNet: the paper's network on two GPUs, and the one tower of https://arxiv.org/abs/1404.5997 that torchvision
has."""

from __future__ import annotations

from typing import Any

from torch import nn

from cnnfast.models.fully_connected import FullyConnectedNetwork, two_hidden_layers
from cnnfast.models.registry import register_model
from cnnfast.nn import FusedSequential, LocalResponseNorm

_PAPER = "https://papers.nips.cc/paper/4824-imagenet-classification-with-deep-convolutional-neural-networks"


@register_model(
    "alexnet", torchvision="alexnet", paper="https://arxiv.org/abs/1404.5997", year=2014, interpolation="bilinear"
)
class AlexNet(FullyConnectedNetwork):
    """AlexNet in one tower (2014): 61,100,840 parameters, 0.71 GMACs at 224 x 224; input normalised by ImageNet's mean
    and deviation, RGB.

    (N, in_chans, H, W) -> (N, num_classes), H and W at least 63. State-dict keys and initialisation of torchvision's
    alexnet: `features.0`, ..., `classifier.6`. Trained layer by layer; in eval mode with grad disabled each convolution
    with its ReLU is one call. The feature maps are those before each pooling, and the last.

    This is not the paper's network (alexnet_two_tower): five convolutions of 64, 192, 384, 256, 256 filters, the first
    with padding 2, no groups and no normalisation.

    Args:
        num_classes: outputs; 0 for none (forward returns the 4096 features before them).
        in_chans: channels of x.
        drop_rate: dropout before each of the two hidden linear layers.
        global_pool: "avg", to the 6 x 6 that the first linear layer has weights for (images of 224 x 224 have just
            these, of others the map is averaged), or "" with num_classes 0: forward returns the last map.

    One weird trick for parallelizing convolutional neural networks, https://arxiv.org/abs/1404.5997.
    """

    key_source = "torchvision"
    in_pretrainedmodels = True
    classifier_name = "classifier.6"
    grid = 6
    min_size = 63
    head_hidden_size = 4096

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.5,
        global_pool: str = "avg",
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans = in_chans
        features = FusedSequential(
            nn.Conv2d(in_chans, 64, 11, 4, 2, **factory),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2, **factory),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1, **factory),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1, **factory),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1, **factory),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
        )
        maps = (("1", 64, 4), ("4", 192, 8), ("11", 256, 16), ("12", 256, 32))
        head = dict(num_classes=num_classes, drop_rate=drop_rate, global_pool=global_pool, factory=factory)
        self._make_layers(features, maps, 256, **head)

    def _hidden_layers(self, in_features: int, factory: Any) -> list[nn.Module]:
        *layers, last = two_hidden_layers(in_features, 4096, self.drop_rate, factory)
        return [last, *layers]  # dropout before the linear layers


@register_model("alexnet_two_tower", paper=_PAPER, year=2012, input_size=(3, 227, 227), crop_pct=227 / 256)
class AlexNetTwoTower(FullyConnectedNetwork):
    """AlexNet as in the paper (2012): 60,965,224 parameters, 0.72 GMACs at 227 x 227; input normalised by ImageNet's
    mean and deviation, RGB (the paper subtracts the mean image, of values 0 to 255).

    (N, in_chans, H, W) -> (N, num_classes), H and W at least 67. Keys `features.0`, ..., `classifier.6`. The two GPUs'
    towers are groups: of the second, fourth and fifth convolution, which see the maps of their own GPU; the third and
    the linear layers see all. Pooling is 3 x 3 with stride 2, and so overlaps, after the first, second and fifth
    convolution; response normalisation follows the ReLU of the first two. Trained layer by layer; in eval mode with
    grad disabled each convolution with its ReLU is one call, and so is a normalisation. The feature maps are those
    before each pooling, and the last.

    The paper says 224 x 224, which doesn't give the 55 x 55 of its first layer: 11 x 11 filters with stride 4 and no
    padding need 227 (227 -> 55 -> 27 -> 13 -> 6). Its alpha of 1e-4 multiplies the sum of five squares; PyTorch and
    Caffe divide alpha by the number of channels in the sum, so that it is 5e-4 there, and Caffe's published AlexNet,
    with 1e-4 and k = 1, normalises less than the paper's with k = 2. The sum runs over the channels of both GPUs, as
    in Caffe's.

    Initialisation as in the paper: weights normal with deviation 0.01, biases 1 in the second, fourth and fifth
    convolution and the hidden linear layers, 0 in the others.

    Args:
        num_classes: outputs; 0 for none (forward returns the 4096 features before them).
        in_chans: channels of x.
        drop_rate: dropout after each of the two hidden linear layers.
        global_pool: "avg", to the 6 x 6 that the first linear layer has weights for (images of 227 x 227 have just
            these, of others the map is averaged), or "" with num_classes 0: forward returns the last map.

    ImageNet Classification with Deep Convolutional Neural Networks,
    https://papers.nips.cc/paper/4824-imagenet-classification-with-deep-convolutional-neural-networks.
    """

    classifier_name = "classifier.6"
    grid = 6
    min_size = 67
    head_hidden_size = 4096

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.5,
        global_pool: str = "avg",
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans = in_chans
        features = FusedSequential(
            nn.Conv2d(in_chans, 96, 11, 4, **factory),
            nn.ReLU(inplace=True),
            LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(96, 256, 5, padding=2, groups=2, **factory),
            nn.ReLU(inplace=True),
            LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(256, 384, 3, padding=1, **factory),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 384, 3, padding=1, groups=2, **factory),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1, groups=2, **factory),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
        )
        maps = (("2", 96, 4), ("6", 256, 8), ("13", 256, 16), ("14", 256, 32))
        head = dict(num_classes=num_classes, drop_rate=drop_rate, global_pool=global_pool, factory=factory)
        self._make_layers(features, maps, 256, **head)
        features.apply(self._init_layer)

    def _hidden_layers(self, in_features: int, factory: Any) -> list[nn.Module]:
        return two_hidden_layers(in_features, 4096, self.drop_rate, factory)

    def _init_layer(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight, 0, 0.01)
            towers = isinstance(module, nn.Conv2d) and module.groups == 2
            hidden = isinstance(module, nn.Linear) and module.out_features == self.head_hidden_size
            nn.init.constant_(module.bias, float(towers or hidden))  # type: ignore[arg-type]
