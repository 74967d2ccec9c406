"""What popular descriptions of the networks get wrong (docs/architectures.md), as facts of the built networks.

Fails if a network isn't what its paper says at the point in question.
"""

import pytest
import torch
from torch import nn

import cnnfast
from cnnfast.models.figures import count_macs, count_parameters
from cnnfast.models.registry import model_entry
from cnnfast.nn import DepthwiseConv2d, InvertedResidual, PointwiseConv2d, SeparableConv2d


def meta(name, **options):
    with torch.device("meta"):
        return cnnfast.create_model(name, **options).eval()


def sizes(network, size, channels=3):
    """Of each convolution in the order of calls: (layer, height of its output)."""
    seen, hooks = [], []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(lambda m, _, y: seen.append((m, y.shape[2]))))
    with torch.device("meta"):
        network(torch.empty(1, channels, size, size))
    return seen


def test_xceptions_input_is_299():
    assert model_entry("xception").pretrained_cfg["input_size"] == (3, 299, 299)
    layers = sizes(meta("xception"), 299)
    assert [height for _, height in layers[:2]] == [149, 147] and layers[-1][1] == 10


def test_xceptions_middle_flow_is_eight_times_three_separable_convolutions():
    network = meta("xception")
    middle = [getattr(network, f"block{i}") for i in range(4, 12)]
    assert len(middle) == 8
    for block in middle:
        assert sum(isinstance(module, DepthwiseConv2d) for module in block.modules()) == 3
    assert sum(isinstance(module, DepthwiseConv2d) for module in network.modules()) == 34


@pytest.mark.parametrize("channels, out, kernel", [(728, 728, 3), (64, 128, 3), (32, 64, 5)])
def test_a_separable_convolution_costs_one_over_m_plus_one_over_k_squared(channels, out, kernel):
    block = SeparableConv2d(channels, out, kernel)
    separable = sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Conv2d))
    dense = nn.Conv2d(channels, out, kernel).weight.numel()
    assert separable / dense == pytest.approx(1 / out + 1 / kernel**2)


def test_mobilenet_v1_has_thirteen_separable_convolutions():
    blocks = [module for module in meta("mobilenet_v1").modules() if isinstance(module, SeparableConv2d)]
    assert len(blocks) == 13
    macs = count_macs("mobilenet_v1")
    assert 568e6 <= macs <= 569e6  # the paper's 569 million


def test_mobilenet_v2s_linear_layer_is_the_projection():
    """17 bottlenecks; the expansion and the depthwise layer have ReLU6 behind them, the projection has nothing."""
    blocks = [*meta("mobilenet_v2").features][1:-1]
    assert len(blocks) == 17
    for n, block in enumerate(blocks):
        layers = [m for m in block.conv.modules() if not isinstance(m, nn.Sequential)]
        kinds = [type(m) for m in layers]
        unit = [PointwiseConv2d, nn.BatchNorm2d, nn.ReLU6] if n else []  # the first one doesn't expand
        unit += [DepthwiseConv2d, nn.BatchNorm2d, nn.ReLU6]
        assert kinds == [*unit, PointwiseConv2d, nn.BatchNorm2d]


def test_efficientnet_b0s_flops_are_multiply_adds():
    """The paper's 0.39B FLOPS count a multiplication with its addition once."""
    assert round(count_macs("efficientnet_b0") / 1e9, 2) == 0.39
    blocks = [m for m in meta("efficientnet_b0").modules() if isinstance(m, (InvertedResidual, SeparableConv2d))]
    assert len(blocks) == 16


def test_resnet34_has_3_4_6_3_units():
    network = meta("resnet34")
    assert [len(getattr(network, f"layer{i}")) for i in range(1, 5)] == [3, 4, 6, 3]
    dense = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    assert len(dense) == 33  # and the classifier


def test_resnet50_strides_its_3x3():
    """4.1 GMACs, where the paper, which strides the 1x1, has 3.8 (and 3.9 by this count: se_resnet50's)."""
    assert round(count_macs("resnet50") / 1e9, 1) == 4.1 and round(count_macs("se_resnet50") / 1e9, 1) == 3.9


def test_squeeze_excite_adds_a_tenth_of_the_parameters_and_no_arithmetic():
    """Of SE-ResNet-50: 10 % of parameters; of MACs less than a hundredth."""
    plain, gated = (count_parameters(meta(name)) for name in ("resnet50", "se_resnet50"))
    assert 1.09 < gated / plain < 1.11
    network = meta("se_resnet50")
    excite = sum(p.numel() for n, p in network.named_parameters() if "se_module" in n and p.dim() > 1)
    assert excite / count_macs("se_resnet50") < 0.001


def test_most_of_vgg16s_parameters_are_in_the_classifier():
    network = meta("vgg16")
    linear = sum(m.weight.numel() + m.bias.numel() for m in network.modules() if isinstance(m, nn.Linear))
    assert linear / count_parameters(network) > 0.89
    assert sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Linear)) / count_macs("vgg16") < 0.01
