"""Fifty steps of SGD beside the plain network: what a single step doesn't show, because a small mistake in a gradient
or a running statistic adds up, or because only a state that training reaches has it.

In float64 parameters and running statistics are the plain network's. In float32 rounding takes every implementation
another way: the losses stay as near to those in float64 as PyTorch's in one of its two memory formats.
"""

import copy
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from networks import relative
from torch import nn

import cnnfast
from cnnfast._peers import import_timm, plain_network
from cnnfast.models.lenet_layers import C3
from cnnfast.models.xception import Block

pytestmark = pytest.mark.slow

STEPS, BATCH, CLASSES = 50, 16, 10
# size of the images, rate; the networks are as narrow as their packages let them be. At a rate of 1e-3 mobilenet_v2's
# losses are 1e-9 apart after 40 steps, as PyTorch's in two memory formats are, and one activation on the other side of
# ReLU6's kink then moves the parameters by 1e-6; at half the rate they are 1e-12 apart at the end.
NETWORKS = {
    "mobilenet_v2": (48, 5e-4, dict(width_mult=0.35, dropout=0.0), dict(width_mult=0.35, drop_rate=0.0)),
    "tf_efficientnet_lite0": (48, 2e-3, dict(drop_rate=0.0), dict(drop_rate=0.0)),
    "xception": (48, 1e-3, {}, {}),
    "lenet5": (32, 1e-3, {}, {}),
}


class PlainLeNet5(nn.Module):
    """The paper's, of torch's functions, with the keys of `state`."""

    def __init__(self, state):
        super().__init__()
        self.names = {key: key.replace(".", "_") for key in state}
        for key, value in state.items():
            trained = key != "classifier.3.weight"  # the pictures
            setattr(self, self.names[key], nn.Parameter(value.clone(), requires_grad=trained))

    def forward(self, x):
        p = {key: getattr(self, name) for key, name in self.names.items()}
        for name in ("c1", "s2", "c3", "s4", "c5"):
            weight, bias = (p[f"features.{name}.layer.{kind}"] for kind in ("weight", "bias"))
            if name in ("s2", "s4"):
                x = 4 * F.avg_pool2d(x, 2) * weight[:, None, None] + bias[:, None, None]
            else:
                x = F.conv2d(x, self.dense(weight) if name == "c3" else weight, bias)
            x = 1.7159 * torch.tanh(2 / 3 * x)
        x = 1.7159 * torch.tanh(2 / 3 * F.linear(x.flatten(1), p["classifier.0.weight"], p["classifier.0.bias"]))
        return -(x[:, None] - p["classifier.3.weight"]).square().sum(-1)

    def dense(self, kernels):
        outputs, inputs = zip(*((k, c) for k, maps in enumerate(C3) for c in maps), strict=True)
        dense = kernels.new_zeros(16, 6, 5, 5)
        return dense.index_put((torch.tensor(outputs), torch.tensor(inputs)), kernels)


def small_xception(block):
    """Of a flow of each kind: entry, middle, exit."""
    stem = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
    entry = block(16, 32, 2, 2, start_with_relu=False), block(32, 64, 2, 2)
    last = block(64, 96, 2, 2, grow_first=False)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, CLASSES)
    return nn.Sequential(*stem, *entry, block(64, 64, 3), last, *head)


def pair(name):
    """(plain, ours) with the same weights, in float64."""
    _, _, their_options, our_options = NETWORKS[name]
    if name == "lenet5":
        ours = cnnfast.create_model(name).double()
        return PlainLeNet5(ours.state_dict()), ours
    if name == "xception":
        import_timm()
        plain, ours = (small_xception(block).double() for block in (import_module("timm.models.xception").Block, Block))
    else:
        ours = cnnfast.create_model(name, num_classes=CLASSES, **our_options).double()
        plain = plain_network(name, num_classes=CLASSES, **their_options).double()
    if (
        name == "tf_efficientnet_lite0"
    ):  # whose classifier of few classes is so large that rounding grows tenfold a step
        nn.init.normal_(plain.classifier.weight, 0, 0.01)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def images(name):
    """Each class a pattern, under noise: (steps, batch, channels, size, size), and the classes."""
    size, channels = NETWORKS[name][0], 1 if name == "lenet5" else 3
    patterns = torch.randn(CLASSES, channels, size, size, dtype=torch.float64)
    classes = torch.randint(CLASSES, (STEPS, BATCH))
    return patterns[classes] + 0.5 * torch.randn(STEPS, BATCH, channels, size, size, dtype=torch.float64), classes


def trained(network, name, data, dtype, layout):
    """The losses of training."""
    network.to(dtype).to(memory_format=layout).train()
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, NETWORKS[name][1], momentum=0.9, weight_decay=1e-4)
    losses = []
    for x, classes in zip(*data, strict=True):
        loss = F.cross_entropy(network(x.to(dtype).contiguous(memory_format=layout)), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


NCHW, NHWC = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize("name", NETWORKS)
def test_in_float64(name):
    """A bias before batch normalisation has no gradient but rounding's: it counts by the size of all parameters."""
    (plain, ours), data = pair(name), images(name)
    expected = trained(plain, name, data, torch.float64, NCHW)
    losses = trained(ours, name, data, torch.float64, NHWC)
    assert expected[-10:].mean() < expected[:10].mean()
    assert relative(losses, expected) <= 1e-6
    theirs = plain.state_dict()
    whole = torch.cat([value.double().flatten() for value in theirs.values()]).norm()
    for key, value in ours.state_dict().items():
        other = theirs[getattr(plain, "names", {}).get(key, key)].double()
        assert (value - other).norm() <= 1e-6 * max(other.norm(), 1e-6 * whole), key


@pytest.mark.parametrize("name", NETWORKS)
def test_in_float32(name):
    """As the numerics policy has it for a network's outputs: 1.5 times PyTorch's distance over all steps, three times
    its largest."""
    (plain, ours), data = pair(name), images(name)
    exact = trained(copy.deepcopy(plain), name, data, torch.float64, NCHW)

    def distances(network):
        """Of the losses in each memory format from the exact ones."""
        for layout in (NCHW, NHWC):
            yield trained(copy.deepcopy(network), name, data, torch.float32, layout) - exact

    spread = list(distances(plain))
    for distance in distances(ours):
        for size, factor in ((torch.linalg.vector_norm, 1.5), (lambda d: d.abs().max(), 3)):
            got, allowed = size(distance), factor * max(map(size, spread))
            assert got <= allowed
