"""BN-Inception (Inception v2), https://arxiv.org/abs/1502.03167, and with squeeze-and-excitation,
https://arxiv.org/abs/1709.01507."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cnnfast.models.branches import Branches, fused_call
from cnnfast.models.features import FeatureInfo
from cnnfast.models.network import Network
from cnnfast.models.registry import register_model
from cnnfast.nn import ConvBN, SqueezeExcite

# 1x1; 3x3 reduce, 3x3; double 3x3 reduce, double 3x3; pool proj. Without 1x1 and projection: stride 2.
MODULES = {
    "3a": (64, 64, 64, 64, 96, 32),
    "3b": (64, 64, 96, 64, 96, 64),
    "3c": (0, 128, 160, 64, 96, 0),
    "4a": (224, 64, 96, 96, 128, 128),
    "4b": (192, 96, 128, 96, 128, 128),
    "4c": (160, 128, 160, 128, 160, 128),
    "4d": (96, 128, 192, 160, 192, 128),
    "4e": (0, 128, 192, 192, 256, 0),
    "5a": (352, 192, 320, 160, 224, 128),
    "5b": (352, 192, 320, 192, 224, 128),
}


class CeilMaxPool2d(nn.MaxPool2d):
    """Pooling 3x3, stride 2 to ceil(H / 2) x ceil(W / 2), as a convolution padded by 1 makes of any size.

    Of even sizes Caffe's pooling does; odd ones get one more window, whose first pixels are the last row or column.
    """

    def __init__(self) -> None:
        super().__init__(3, 2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[2] % 2, x.shape[3] % 2
        return super().forward(F.pad(x, (0, columns, 0, rows), mode="replicate") if rows or columns else x)


class Inception(Branches):
    """Branches 1x1, 3x3, twice 3x3 and pooling, side by side, then squeeze-excite if `se_reduction` isn't 0.

    (N, channels, H, W) -> (N, out_channels, H, W), or with stride 2, where 1x1 and projection are missing,
    ceil(H / 2) x ceil(W / 2).
    """

    def __init__(
        self, channels: int, widths: tuple[int, ...], max_pool: bool, se_reduction: int, bias: bool, **factory: Any
    ):
        one, reduce3, three, reduce33, three3, proj = widths
        stride = 1 if proj else 2
        options = dict(bias=bias, **factory)
        modules: dict[str, nn.Module] = {
            "3x3_reduce": ConvBN(channels, reduce3, 1, **options),
            "3x3": ConvBN(reduce3, three, 3, stride, 1, **options),
            "double_3x3_reduce": ConvBN(channels, reduce33, 1, **options),
            "double_3x3_1": ConvBN(reduce33, three3, 3, 1, 1, **options),
            "double_3x3_2": ConvBN(three3, three3, 3, stride, 1, **options),
            "pool": CeilMaxPool2d(),
        }
        branches = [["3x3_reduce", "3x3"], ["double_3x3_reduce", "double_3x3_1", "double_3x3_2"], ["pool"]]
        if stride == 1:
            modules["1x1"] = ConvBN(channels, one, 1, **options)
            modules["pool"] = nn.MaxPool2d(3, 1, 1) if max_pool else nn.AvgPool2d(3, 1, 1)
            modules["pool_proj"] = ConvBN(channels, proj, 1, **options)
            branches = [["1x1"], *branches[:2], ["pool", "pool_proj"]]
        super().__init__(modules, branches)
        self.out_channels = one + three + three3 + (proj or channels)
        self.se: nn.Module | None = None
        if se_reduction:
            self.se = SqueezeExcite(self.out_channels, self.out_channels // se_reduction, **factory)

    def layers(self, x: Tensor) -> Tensor:
        y = super().layers(x)
        return y if self.se is None else self.se(y)

    def fuse(self) -> Any:
        join = super().fuse()
        if self.se is None:
            return join
        excite = fused_call(self.se)
        return lambda x: excite(join(x))


class BNInception(Network):
    """BN-Inception (2015), see `bn_inception` and `se_bn_inception`. (N, in_chans, H, W) -> (N, num_classes).

    Keys `conv1_7x7_s2.conv`, `inception_3a.3x3_reduce.conv`, `inception_3a.3x3_reduce.bn`, ..., `last_linear`;
    cnnfast.load_weights takes pretrainedmodels' (`conv1_7x7_s2`, `inception_3a_3x3_reduce`,
    `inception_3a_3x3_reduce_bn`). Trained layer by layer; in eval mode with grad disabled each convolution is one call,
    and so is squeeze-excite. The fastest input is channels_last; the network makes it so after the first layer in any
    case.

    Args:
        num_classes: outputs; 0 for none (forward returns pooled features).
        in_chans: channels of x.
        drop_rate: dropout before the classifier.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "".
        se_reduction: squeeze-excite of a module's C channels has C / se_reduction in its middle; 0 for none.
        bias: of the convolutions, which batch normalisation makes redundant.
    """

    classifier_name = "last_linear"
    key_source = "cnnfast"
    min_size = 7  # two poolings without padding

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        *,
        se_reduction: int = 0,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans = in_chans
        self.in_pretrainedmodels = not se_reduction
        self.conv1_7x7_s2 = ConvBN(in_chans, 64, 7, 2, 3, bias=bias, channels_last=True, **factory)
        self.pool1_3x3_s2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2_3x3_reduce = ConvBN(64, 64, 1, bias=bias, **factory)
        self.conv2_3x3 = ConvBN(64, 192, 3, 1, 1, bias=bias, **factory)
        self.pool2_3x3_s2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        names = [name for name, _ in self.named_children()]
        channels, taps = 192, {"conv1_7x7_s2": 64, "conv2_3x3": 192}
        for name, widths in MODULES.items():
            module = Inception(channels, widths, name == "5b", se_reduction, bias, **factory)
            if not widths[0]:  # the next one has another resolution
                taps[names[-1]] = channels
            channels = module.out_channels
            setattr(self, f"inception_{name}", module)
            names.append(f"inception_{name}")
        taps[names[-1]] = channels
        self.steps = [*names]
        self.feature_info = FeatureInfo.halving(taps)
        self._make_head(channels, num_classes, drop_rate, global_pool, factory)
        for layer in self.modules():  # as Caffe's models
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def checkpoint_keys(self, source: str) -> dict[str, str]:
        """pretrainedmodels' are flat: batch normalisation is `inception_3a_1x1_bn`."""
        if source != "pretrainedmodels":
            return super().checkpoint_keys(source)
        parts = {key: key.rpartition(".") for key in self.state_dict()}
        flat = {key: module.removesuffix(".conv").replace(".", "_") for key, (module, _, _) in parts.items()}
        return {key: f"{flat[key]}.{parts[key][2]}" for key in parts}


_CAFFE: dict[str, Any] = dict(
    interpolation="bilinear", mean=(123 / 255, 117 / 255, 104 / 255), std=(1 / 255,) * 3
)  # subtracted from 0 ... 255


@register_model("bn_inception", paper="https://arxiv.org/abs/1502.03167", year=2015, **_CAFFE)
def bn_inception(**options: Any) -> BNInception:
    """BN-Inception (2015), Inception v2: 11,295,240 parameters, 2.03 GMACs at 224 x 224; pretrainedmodels' weights want
    BGR less (104, 117, 128).

    Against GoogLeNet two 3x3 convolutions for each 5x5, a tenth module, batch normalisation for local response
    normalisation, and no pooling between modules: 3c and 4e have stride 2. The paper's table gives modules 4c and 4d
    576 channels and 4e 1024, but its columns add up to 608, 608 and 1056, which is what Caffe's model and
    pretrainedmodels' have, and this; TensorFlow's slim has 576 by a projection to 96. The first convolution is
    separable in the paper, dense in the checkpoints. For BNInception's arguments and keys see there. Batch
    Normalization, https://arxiv.org/abs/1502.03167.
    """
    return BNInception(**options)


@register_model("se_bn_inception", paper="https://arxiv.org/abs/1709.01507", year=2017, **_CAFFE)
def se_bn_inception(**options: Any) -> BNInception:
    """SE-BN-Inception (2017): 11,931,622 parameters, 2.03 GMACs at 224 x 224; input RGB less (123, 117, 104).

    bn_inception with squeeze-and-excitation after each module's concatenation, reduction 16, also after 3c and 4e;
    convolutions without biases, as in the authors' Caffe network. For BNInception's arguments and keys see there.
    Squeeze-and-Excitation Networks, https://arxiv.org/abs/1709.01507.
    """
    return BNInception(**(dict(se_reduction=16, bias=False) | options))
