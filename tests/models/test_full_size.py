"""Every family that timm or torchvision has, at the size that its weights are for and at an odd one: each feature map
and the logits in eval mode, by the numerics policy.

What test_twins.py does at small resolutions to all of them is done here to some of each family, at full size: other
tilings, other splits between threads, sums over more pixels. One is in the default run. Fails if a layer differs, or if
a fused network is less exact than the policy allows at a size at which it is used.
"""

import copy
import functools

import pytest
import torch
from networks import assert_as_exact_over, draw_batch_norms, family, in_float64, stages_of, without_weights
from plain import drawn
from torch import nn

import cnnfast
from cnnfast._peers import checkpoint_source, plain_network, plain_networks
from cnnfast.models.registry import model_entry

# Of each family the smallest, and those whose blocks another member hasn't; by the size of their images and an odd one.
SIZES = {
    **dict.fromkeys(("alexnet", "googlenet_bn", "mobilenet_v1", "mobilenet_v2", "vgg11", "vgg11_bn"), (224, 225)),
    **dict.fromkeys(("efficientnet_b0", "tf_efficientnet_b0", "tf_efficientnet_lite0"), (224, 225)),
    **dict.fromkeys(("resnet18", "resnet50", "se_resnet18", "se_resnet50", "senet154"), (224, 225)),
    **dict.fromkeys(("inception_v3", "inception_v4", "inception_resnet_v2", "xception"), (299, 331)),
}
QUICK = "mobilenet_v2"


def test_families():
    assert {family(name) for name in SIZES} == {family(name) for name in plain_networks()}
    for name, (size, _) in SIZES.items():
        assert model_entry(name).pretrained_cfg["input_size"] == (3, size, size)


def represented(tensor):
    """The nearest of the numbers that bfloat16 and float16 both have: one float64 reference, which takes the most
    time, does for both. Not for float32, where PyTorch would make no error in the products of such numbers."""
    return tensor.bfloat16().half().float()


@functools.lru_cache(maxsize=1)
def build(name, rounded):
    """Their network with drawn parameters and statistics and ours with these, in eval mode; of one image of the
    network's own size and three of the odd one x and each stage in float64.

    Theirs in channels_last, as ours computes whatever x is: PyTorch's float32 sums err more there than in the other
    layout (see test_vgg.py)."""
    torch.manual_seed(5)
    theirs, (size, odd) = plain_network(name), SIZES[name]
    if any(isinstance(module, nn.BatchNorm2d) for module in theirs.modules()):
        draw_batch_norms(theirs, torch.randn(2, 3, size, size))
    else:
        drawn(theirs)
    rounding = represented if rounded else lambda tensor: tensor
    for tensor in theirs.state_dict().values():
        tensor.copy_(rounding(tensor) if tensor.is_floating_point() else tensor)
    theirs = theirs.eval().to(memory_format=torch.channels_last)
    ours = without_weights(name).eval()
    cnnfast.load_weights(ours, theirs.state_dict(), checkpoint_source(name))
    taps, exact, inputs = [one["module"] for one in ours.feature_info], in_float64(theirs), []
    for shape in ((1, 3, size, size), (3, 3, odd, odd)):
        x = rounding(torch.randn(shape)).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            inputs.append((x, stages_of(exact, x.double(), taps)))
    return theirs, ours, inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != QUICK)) for n in SIZES])
def test_stages(name, dtype):
    theirs, ours, inputs = build(name, dtype != torch.float32)
    theirs, ours = (copy.deepcopy(network).to(dtype) for network in (theirs, ours))
    taps, outputs = [one["module"] for one in ours.feature_info], {}
    for x, expected in inputs:
        with torch.no_grad():
            got, own = (stages_of(network, x.to(dtype), taps) for network in (ours, theirs))
        assert {*taps, "logits"} <= expected.keys() == own.keys() <= got.keys()
        for stage, ref in expected.items():
            outputs.setdefault(stage, []).append((got[stage], own[stage], ref))
    for stage, triples in outputs.items():
        assert_as_exact_over(triples, stage)
