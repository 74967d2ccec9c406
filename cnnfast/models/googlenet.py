"""GoogLeNet, https://arxiv.org/abs/1409.4842: Inception modules, as published and with batch normalisation."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cnnfast.models.branches import AuxiliaryNetwork, Branches, conv_bn
from cnnfast.models.features import FeatureInfo
from cnnfast.models.registry import INCEPTION_MEAN, INCEPTION_STD, register_model
from cnnfast.nn import FusedSequential, LocalResponseNorm, PointwiseConv2d

GoogLeNetOutputs = namedtuple("GoogLeNetOutputs", ["logits", "aux_logits2", "aux_logits1"])

# 1x1; 3x3 reduce, 3x3; 5x5 reduce, 5x5; pool proj
MODULES = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


def conv_relu(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int | None = None, **factory: Any
) -> FusedSequential:
    """Convolution with bias, ReLU; key `conv`."""
    if kernel_size == 1:
        conv: nn.Module = PointwiseConv2d(in_channels, out_channels, **factory)
    else:
        padding = kernel_size // 2 if padding is None else padding
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, **factory)
    return FusedSequential(OrderedDict(conv=conv, act=nn.ReLU(inplace=True)))


class AuxiliaryClassifier(nn.Module):
    """(N, C, H, W) -> (N, num_classes): average pooling to 4 x 4, 1x1 convolution, two linear layers.

    Args:
        pool: what makes maps of 4 x 4.
        conv: the 1x1 convolution, to 128 channels.
        drop_rate: dropout between the linear layers.
    """

    classifier_name = "fc2"

    def __init__(self, pool: nn.Module, conv: nn.Module, num_classes: int, drop_rate: float, **factory: Any):
        super().__init__()
        self.pool = pool
        self.conv = conv
        self.fc1 = nn.Linear(128 * 4 * 4, 1024, **factory)
        self.dropout = nn.Dropout(drop_rate)
        self.fc2: nn.Module = nn.Linear(1024, num_classes, **factory) if num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.pool(x)).flatten(1)
        return self.fc2(self.dropout(F.relu(self.fc1(x))))

    def reset_classifier(self, num_classes: int) -> None:
        factory: dict[str, Any] = dict(device=self.fc1.weight.device, dtype=self.fc1.weight.dtype)
        self.fc2 = nn.Linear(1024, num_classes, **factory) if num_classes > 0 else nn.Identity()


class GoogLeNet(AuxiliaryNetwork):
    """GoogLeNet (2014), see `googlenet` and `googlenet_bn`. (N, in_chans, H, W) -> (N, num_classes).

    State-dict keys as torchvision's googlenet: `conv1.conv`, `inception3a.branch2.0.conv`, ..., `fc`, `aux1`, `aux2`.
    Branch 1 of a module is the 1x1, 2 the 3x3, 3 the 5x5, 4 the pooling. Trained layer by layer; in eval mode with grad
    disabled each convolution is one call with what follows it. The fastest input is channels_last; the network makes it
    so after the first layer in any case.

    Args:
        num_classes: outputs; 0 for none (forward returns pooled features).
        in_chans: channels of x.
        drop_rate: dropout before the classifier.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "".
        batch_norm: torchvision's form, see `googlenet_bn`.
        aux_logits: in training forward returns GoogLeNetOutputs(logits, aux_logits2, aux_logits1), of which the paper
            adds the loss of the last two with weight 0.3. Without batch_norm x must then be 223 to 270 high and wide:
            maps of 14 to 16, which pooling by 5x5, stride 3 makes 4.
        aux_drop_rate: dropout in the auxiliary classifiers.
    """

    classifier_name = "fc"
    auxiliary = (("inception4a", "aux1", "aux_logits1"), ("inception4d", "aux2", "aux_logits2"))
    outputs = GoogLeNetOutputs

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.4,
        global_pool: str = "avg",
        *,
        batch_norm: bool = False,
        aux_logits: bool = False,
        aux_drop_rate: float = 0.7,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans = in_chans
        self.aux_logits = aux_logits
        self.key_source = "torchvision" if batch_norm else "cnnfast"
        self.min_size = 15 if batch_norm else 31  # four poolings
        conv: Any = conv_bn if batch_norm else conv_relu
        first: dict[str, Any] = dict(channels_last=True) if batch_norm else {}
        self.conv1 = conv(in_chans, 64, 7, 2, 3, **first, **factory)
        self.maxpool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = conv(64, 64, 1, **factory)
        self.conv3 = conv(64, 192, 3, **factory)
        self.maxpool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        channels, inputs = 192, {}
        for name, widths in MODULES.items():
            inputs[name] = channels
            setattr(self, f"inception{name}", self._inception(conv, channels, *widths, 3 if batch_norm else 5, factory))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.maxpool3 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.maxpool4 = nn.MaxPool2d(2 if batch_norm else 3, 2, ceil_mode=True)
        modules = [f"inception{name}" for name in MODULES]
        self.steps = ["conv1", "maxpool1", "conv2", "conv3", "maxpool2"]
        self.steps += [*modules[:2], "maxpool3", *modules[2:7], "maxpool4", *modules[7:]]
        last_of_conv3 = "conv3"
        if not batch_norm:
            self.lrn1, self.lrn2 = LocalResponseNorm(5), LocalResponseNorm(5)  # Caffe's alpha 1e-4, beta 0.75, k 1
            self.steps[2:5] = ["lrn1", "conv2", "conv3", "lrn2", "maxpool2"]
            self.aux_sizes = (223, 270)
            last_of_conv3 = "lrn2"
        taps = {"conv1": 64, last_of_conv3: 192, "inception3b": 480, "inception4e": 832, "inception5b": 1024}
        self.feature_info = FeatureInfo.halving(taps)
        self._make_head(channels, num_classes, drop_rate, global_pool, factory)
        self.aux1: nn.Module | None = None
        self.aux2: nn.Module | None = None
        if aux_logits:
            for classifier, after in (("aux1", "4b"), ("aux2", "4e")):
                pool = nn.AdaptiveAvgPool2d(4) if batch_norm else nn.AvgPool2d(5, 3)
                layers = pool, conv(inputs[after], 128, 1, **factory)
                setattr(self, classifier, AuxiliaryClassifier(*layers, num_classes, aux_drop_rate, **factory))
        self._init_weights(batch_norm)

    @staticmethod
    def _inception(
        conv: Any, channels: int, one: int, reduce3: int, three: int, reduce5: int, five: int, proj: int, kernel: int,
        factory: dict[str, Any],
    ) -> Branches:  # fmt: skip
        return Branches(
            {
                "branch1": conv(channels, one, 1, **factory),
                "branch2": nn.Sequential(conv(channels, reduce3, 1, **factory), conv(reduce3, three, 3, **factory)),
                "branch3": nn.Sequential(conv(channels, reduce5, 1, **factory), conv(reduce5, five, kernel, **factory)),
                "branch4": nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(channels, proj, 1, **factory)),
            }
        )

    def _init_weights(self, batch_norm: bool) -> None:
        """As torchvision's; without batch normalisation as the Caffe model's: uniform by fan-in, biases 0.2."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                if batch_norm:
                    nn.init.trunc_normal_(module.weight, std=0.01)
                else:
                    nn.init.kaiming_uniform_(module.weight, nonlinearity="linear")
                    assert module.bias is not None
                    nn.init.constant_(module.bias, 0.0 if name == "fc" or name.endswith(".fc2") else 0.2)


@register_model(
    "googlenet",
    paper="https://arxiv.org/abs/1409.4842",
    year=2014,
    interpolation="bilinear",
    mean=(123 / 255, 117 / 255, 104 / 255),
    std=(1 / 255,) * 3,
)
def googlenet(**options: Any) -> GoogLeNet:
    """GoogLeNet (2014): 6,998,552 parameters, 1.58 GMACs at 224 x 224, in 22 layers with weights, 9 modules; input RGB
    less (123, 117, 104).

    As the paper has it: convolutions with biases and no batch normalisation, local response normalisation after the
    first pooling and before the second, 5x5 convolutions. What it leaves open is as in Caffe's bvlc_googlenet:
    normalisation over 5 channels with alpha 1e-4 and beta 0.75, initialisation, pooling that rounds up. `aux_logits`
    adds 6,379,728 parameters. The first row of the paper's table (2.7K parameters, 34M operations) is that of a
    separable convolution, 8 filters a channel; its text, figure 3 and Caffe's model have a dense one. For GoogLeNet's
    arguments and keys see there. Going Deeper with Convolutions, https://arxiv.org/abs/1409.4842.
    """
    return GoogLeNet(**options)


@register_model(
    "googlenet_bn",
    torchvision="googlenet",
    paper="https://arxiv.org/abs/1409.4842",
    year=2014,
    interpolation="bilinear",
    mean=INCEPTION_MEAN,
    std=INCEPTION_STD,
)
def googlenet_bn(**options: Any) -> GoogLeNet:
    """torchvision's googlenet: 6,624,904 parameters, 1.50 GMACs at 224 x 224; input (x - 127.5) / 127.5, RGB.

    What differs from the paper's `googlenet`, as in the TensorFlow network whose weights torchvision's are: batch
    normalisation (eps 1e-3) instead of biases and of local response normalisation, 3x3 convolutions in the branches of
    the 5x5, the last pooling 2x2, pooling of the auxiliary classifiers to 4 x 4 from any size, and the dropout of 0.2.
    torchvision turns images normalised by ImageNet's mean and deviation into the network's range inside the network
    (transform_input); here x is in that range. For GoogLeNet's arguments and keys see there. Going Deeper with
    Convolutions, https://arxiv.org/abs/1409.4842.
    """
    return GoogLeNet(**(dict(batch_norm=True, drop_rate=0.2) | options))
