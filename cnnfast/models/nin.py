"""Network in Network, https://arxiv.org/abs/1312.4400: each convolution is followed by two of 1 x 1, and there is no
fully connected layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cnnfast.models.features import FeatureInfo
from cnnfast.models.network import Network
from cnnfast.models.registry import CIFAR10_MEAN, CIFAR10_STD, register_model
from cnnfast.nn import FusedSequential, GlobalPool, PointwiseConv2d, set_backend

_PAPER = "https://arxiv.org/abs/1312.4400"


class NIN(Network):
    """Network in Network (2013) as in the authors' Caffe models; see nin and nin_cifar.

    (N, in_chans, H, W) -> (N, num_classes). Keys `features.conv1`, `features.cccp1`, ..., as Caffe's names of the
    layers, and `classifier.0`. The classifier is the last 1 x 1 convolution, one map a class, with a ReLU as every
    other, so that no logit is negative; then the maps are averaged. get_classifier returns this convolution (which
    wants a map, not pooled features), reset_classifier replaces it; `forward_features` ends before it, and
    `forward_head(x, pre_logits=True)` pools without it. Poolings round the size up, as in Caffe. Trained layer by
    layer; in eval mode with grad disabled each convolution with its ReLU is one call. The feature maps are the outputs
    of the stages, before pooling.

    Args:
        stages: of each the convolution's layer and the channels of the 1 x 1 convolutions behind it.
        pools: what follows each stage but the last: "max" or "avg", 3 x 3 with stride 2.
        dropped: after how many of the stages, counted from the last but one, there is dropout.
        num_classes: outputs; 0 for none (forward returns the pooled features).
        drop_rate: dropout, in the features: there is no other place for it.
        global_pool: "avg", "max", "avgmax" or "": forward returns the maps of the classes.

    https://arxiv.org/abs/1312.4400; the Caffe models: https://gist.github.com/mavenlin/d802a5849de39225bcc6 and
    https://gist.github.com/mavenlin/e56253735ef32c3c296d.
    """

    classifier_name = "classifier.0"
    classifier_std = 0.05  # of its weights at first

    def __init__(
        self,
        stages: Sequence[tuple[nn.Conv2d, Sequence[int]]],
        pools: Sequence[str],
        dropped: int,
        num_classes: int,
        drop_rate: float,
        global_pool: str,
        factory: Any,
    ):
        super().__init__()
        self.in_chans = stages[0][0].in_channels
        self.features = FusedSequential()
        maps, reduction, pointwise = [], 1, 0
        for n, (conv, widths) in enumerate(stages, 1):
            self.features.add_module(f"conv{n}", conv)
            self.features.add_module(f"relu{n}", nn.ReLU(inplace=True))
            channels = conv.out_channels
            for width in widths:
                pointwise += 1
                self.features.add_module(f"cccp{pointwise}", PointwiseConv2d(channels, width, **factory))
                self.features.add_module(f"cccp_relu{pointwise}", nn.ReLU(inplace=True))
                channels = width
            reduction *= conv.stride[0]
            maps.append(dict(num_chs=channels, reduction=reduction, module=f"features.cccp_relu{pointwise}"))
            if n < len(stages):
                pool = nn.MaxPool2d if pools[n - 1] == "max" else nn.AvgPool2d
                self.features.add_module(f"pool{n}", pool(3, 2, ceil_mode=True))
                reduction *= 2
                if len(stages) - n <= dropped:
                    self.features.add_module(f"drop{n}", nn.Dropout(drop_rate))
        self.steps = ["features"]
        self.feature_info = FeatureInfo(maps)
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.05)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        self._make_head(channels, num_classes, drop_rate, global_pool, factory)

    def _make_classifier(self, num_classes: int, global_pool: str, factory: Any) -> None:
        if global_pool == "catavgmax":
            raise ValueError("global_pool must be one number a class, got 'catavgmax'")
        self.num_classes, self.global_pool = num_classes, GlobalPool(global_pool)
        self.classifier = FusedSequential(nn.Identity())
        if num_classes > 0:
            conv = PointwiseConv2d(self.num_features, num_classes, **factory)
            nn.init.normal_(conv.weight, 0, self.classifier_std)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            self.classifier = FusedSequential(conv, nn.ReLU(inplace=True))
            set_backend(self.classifier, self.backend)
        self.classifier.train(self.training)

    def _head(self, x: Tensor, pre_logits: bool) -> Tensor:
        return self.global_pool(x if pre_logits else self.classifier(x))


@register_model("nin", paper=_PAPER, year=2013)
class ImageNetNIN(NIN):
    """Network in Network for ImageNet (2014): 7,595,176 parameters, 1.1 GMACs at 224 x 224; input normalised by
    ImageNet's mean and deviation, RGB (the Caffe model subtracts the mean of values 0 to 255).

    (N, in_chans, H, W) -> (N, num_classes), H and W at least 39. The paper has results on CIFAR, SVHN and MNIST only;
    this is the authors' Caffe model: four stages, convolutions of 96 11 x 11 (stride 4), 256 5 x 5, 384 3 x 3 and 1024
    3 x 3, each with two of 1 x 1 (the last of these is the classifier), 54 -> 27 -> 13 -> 6 pixels, dropout before the
    last stage. Arguments and what the classifier is: see NIN.

    https://arxiv.org/abs/1312.4400, https://gist.github.com/mavenlin/d802a5849de39225bcc6.
    """

    min_size = 39
    classifier_std = 0.01

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.5,
        global_pool: str = "avg",
        device: Any = None,
        dtype: Any = None,
    ):
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        stages = (
            (nn.Conv2d(in_chans, 96, 11, 4, **factory), (96, 96)),
            (nn.Conv2d(96, 256, 5, padding=2, **factory), (256, 256)),
            (nn.Conv2d(256, 384, 3, padding=1, **factory), (384, 384)),
            (nn.Conv2d(384, 1024, 3, padding=1, **factory), (1024,)),
        )
        super().__init__(stages, ("max", "max", "max"), 1, num_classes, drop_rate, global_pool, factory)
        for conv in (stages[0][0], stages[2][0]):  # as in the Caffe model
            nn.init.normal_(conv.weight, 0, 0.01)


@register_model(
    "nin_cifar",
    paper=_PAPER,
    year=2013,
    input_size=(3, 32, 32),
    crop_pct=1.0,
    interpolation="bilinear",
    mean=CIFAR10_MEAN,
    std=CIFAR10_STD,
    num_classes=10,
    label_set="cifar10",
)
class CifarNIN(NIN):
    """Network in Network for CIFAR-10 (2013): 966,986 parameters, 0.22 GMACs at 32 x 32; input normalised by
    CIFAR-10's mean and deviation, RGB (the paper has global contrast normalisation and ZCA whitening).

    (N, in_chans, H, W) -> (N, num_classes), H and W at least 4. The authors' Caffe model, whose widths the paper
    doesn't give: three stages, convolutions of 192 5 x 5, 192 5 x 5 and 192 3 x 3, each with two of 1 x 1 (the last of
    these is the classifier), 32 -> 16 -> 8 pixels by a max and an average pooling, dropout after both. Arguments and
    what the classifier is: see NIN.

    https://arxiv.org/abs/1312.4400, https://gist.github.com/mavenlin/e56253735ef32c3c296d.
    """

    min_size = 4

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.5,
        global_pool: str = "avg",
        device: Any = None,
        dtype: Any = None,
    ):
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        stages = (
            (nn.Conv2d(in_chans, 192, 5, padding=2, **factory), (160, 96)),
            (nn.Conv2d(96, 192, 5, padding=2, **factory), (192, 192)),
            (nn.Conv2d(192, 192, 3, padding=1, **factory), (192,)),
        )
        super().__init__(stages, ("max", "avg"), 2, num_classes, drop_rate, global_pool, factory)
