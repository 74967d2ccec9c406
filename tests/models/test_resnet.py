"""Residual networks that neither timm nor torchvision has: shortcut A, the plain networks, CIFAR's; and what options
do. Twins (shortcut B) are in test_twins.py.

The paper's networks are built here again of plain layers. Fails if a layer, shortcut or stride differs from these, if a
fused network is less exact than the policy allows, if a figure isn't the paper's, if a shortcut is added outside the
convolution's call, or if dilation, stochastic depth or initialisation isn't timm's.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from networks import assert_as_exact_over, assert_same_gradients, draw_batch_norms, in_float64, ops_of, relative
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import cnnfast
from cnnfast._peers import import_timm
from cnnfast.models.figures import count_macs, count_parameters
from cnnfast.models.residual import BasicBlock, Bottleneck, ResidualBlock
from cnnfast.nn import set_backend

IMAGENET = dict(widths=(64, 128, 256, 512), stem=(7, 2))
CIFAR = dict(widths=(16, 32, 64), stem=(3, 1))
slow = pytest.mark.slow


class PaperNetwork(nn.Module):
    """Section 3.3 (Figure 3) and section 4.2 of the paper: two 3x3 convolutions a block, shortcut A or none."""

    def __init__(self, depths, widths, stem, shortcut, num_classes):
        super().__init__()
        self.depths, self.widths, self.shortcut, self.pooled = depths, widths, shortcut, stem[0] == 7
        kernel, stride = stem
        convs, channels = [nn.Conv2d(3, widths[0], kernel, stride, kernel // 2, bias=False)], widths[0]
        for stage, (blocks, width) in enumerate(zip(depths, widths, strict=True)):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                convs.append(nn.Conv2d(channels, width, 3, stride, 1, bias=False))
                convs.append(nn.Conv2d(width, width, 3, 1, 1, bias=False))
                channels = width
        self.layers = nn.ModuleList(layer for conv in convs for layer in (conv, nn.BatchNorm2d(conv.out_channels)))
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x):
        """The maps of the stem and the stages, and the logits."""
        layers = iter(self.layers)

        def conv_bn(x):
            conv, bn = next(layers), next(layers)
            return bn(conv(x))

        y = F.relu(conv_bn(x))
        maps = [y]
        if self.pooled:
            y = F.max_pool2d(y, 3, 2, 1)
        for blocks in self.depths:
            for _ in range(blocks):
                z = conv_bn(F.relu(conv_bn(y)))
                if self.shortcut == "A":
                    strided = F.avg_pool2d(y, 1, 2) if z.shape[1] > y.shape[1] else y
                    zeros = z.new_zeros(z.shape[0], z.shape[1] - y.shape[1], *z.shape[2:])
                    z = z + torch.cat((strided, zeros), 1)
                y = F.relu(z)
            maps.append(y)
        return [*maps, self.fc(y.mean((2, 3)))]


# Name, options, the paper's build, size of x.
NETWORKS = {
    "plain18": ("plain18", {}, dict(depths=(2, 2, 2, 2), shortcut=None, **IMAGENET), 49),
    "plain34": ("plain34", {}, dict(depths=(3, 4, 6, 3), shortcut=None, **IMAGENET), 49),
    "resnet18-A": ("resnet18", dict(shortcut="A"), dict(depths=(2, 2, 2, 2), shortcut="A", **IMAGENET), 49),
    "resnet34-A": ("resnet34", dict(shortcut="A"), dict(depths=(3, 4, 6, 3), shortcut="A", **IMAGENET), 49),
    "cifar20-plain": ("cifar_resnet20", dict(shortcut=None), dict(depths=(3,) * 3, shortcut=None, **CIFAR), 13),
    **{
        f"cifar{6 * n + 2}": (f"cifar_resnet{6 * n + 2}", {}, dict(depths=(n,) * 3, shortcut="A", **CIFAR), 13)
        for n in (3, 5, 7, 9, 18)
    },
    "cifar1202": ("cifar_resnet1202", {}, dict(depths=(200,) * 3, shortcut="A", **CIFAR), 9),
}
QUICK = ("cifar20-plain", "resnet18-A", "cifar20")


@functools.cache
def _drawn(case):
    name, options, _, size = NETWORKS[case]
    torch.manual_seed(7)
    ours = cnnfast.create_model(name, num_classes=100, **options)
    draw_batch_norms(ours, torch.randn(3, 3, size, size))
    return ours.state_dict()


@pytest.fixture(params=[pytest.param(case, marks=() if case in QUICK else slow) for case in NETWORKS])
def pair(request):
    """(the paper's network of plain layers, ours, size of x, names of our keys in theirs) with one state, in eval; 100
    classes, for the errors of a few logits say little."""
    name, options, build, size = NETWORKS[request.param]
    state = _drawn(request.param)
    ours, theirs = cnnfast.create_model(name, num_classes=100, **options), PaperNetwork(**build, num_classes=100)
    keys = dict(zip(state, theirs.state_dict(), strict=True))  # both in the order of calls
    ours.load_state_dict(state)
    theirs.load_state_dict({keys[key]: value for key, value in state.items()})
    return theirs.eval(), ours.eval(), size, keys


def maps_and_logits(network, x):
    last, maps = network.forward_intermediates(x)
    return [*maps, network.forward_head(last)]


def test_in_float64(pair, nan_outputs):
    theirs, ours, size, _ = pair
    theirs.double(), ours.double()
    for shape in ((3, 3, size, size + 6), (1, 3, size + 14, size + 1)):
        x = torch.randn(shape, dtype=torch.float64)
        with torch.no_grad():
            for got, expected in zip(maps_and_logits(ours, x), theirs(x), strict=True):
                assert got.shape == expected.shape and relative(got, expected) <= 1e-10
            assert relative(ours(x), theirs(x)[-1]) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision(pair, dtype):
    """In channels_last, as ours computes whatever x is: there PyTorch's float32 sums err as ours, in the other layout
    0.6 times that, which these networks without projections carry to the end. At CIFAR's size, over eight inputs."""
    theirs, ours, size, _ = pair
    for network in (theirs, ours):
        network.to(dtype).to(memory_format=torch.channels_last)
    exact, outputs = in_float64(theirs), []
    size = max(size, 32) if count_parameters(ours) < 1e7 else size  # but not of 1202 layers
    for shape in ((3, 3, size, size + 6), (1, 3, size + 14, size + 1)) * 4:
        x = torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)
        with torch.no_grad():
            outputs.append(list(zip(maps_and_logits(ours, x), theirs(x), exact(x.double()), strict=True)))
    for stage in zip(*outputs, strict=True):
        assert_as_exact_over(list(stage))


def test_training(pair):
    """Logits, gradients and running statistics, in float64."""
    theirs, ours, size, keys = pair
    theirs.double().train(), ours.double().train()
    x = torch.randn(3, 3, size, size, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    got, expected = ours(inputs[0]), theirs(inputs[1])[-1]
    assert relative(got, expected) <= 1e-9
    grad = torch.randn_like(got)
    got.backward(grad), expected.backward(grad)
    assert relative(inputs[0].grad, inputs[1].grad) <= 1e-8
    assert_same_gradients(ours, theirs, 1e-8, keys)
    buffers = dict(theirs.named_buffers())
    for key, buffer in ours.named_buffers():
        assert relative(buffer.double(), buffers[keys[key]].double()) <= 1e-9, key


@pytest.mark.parametrize(
    "name, layers, flops, parameters",
    [  # table 1 (what is called FLOPs are multiply-adds), figure 3; torchvision's parameters
        ("plain18", 18, 1.8, 11_515_688),
        ("plain34", 34, 3.6, 21_623_848),
        ("resnet18", 18, 1.8, 11_689_512),
        ("resnet34", 34, 3.6, 21_797_672),
        ("resnet50", 50, 3.8, 25_557_032),
        ("resnet101", 101, 7.6, 44_549_160),
        pytest.param("resnet152", 152, 11.3, 60_192_808, marks=slow),
    ],
)
def test_figures(name, layers, flops, parameters):
    with torch.device("meta"):
        network = cnnfast.create_model(name)
    assert count_parameters(network) == parameters and weighted_layers(network) == layers
    macs = count_macs(name)
    blocks = [module for module in network.modules() if isinstance(module, Bottleneck) and module.conv2.stride[0] == 2]
    for n, block in enumerate(blocks):  # the paper's have their stride one layer earlier
        macs -= 3 * (28 >> n) ** 2 * block.conv1.weight.numel()
    assert flops - 0.05 < macs / 1e9 < flops + 0.1
    assert network.feature_info.reduction() == [2, 4, 8, 16, 32]


def weighted_layers(network):
    modules = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return sum("downsample" not in name for name, _ in modules)


def test_output_sizes():
    """Table 1, and section 4.2's."""
    for name, size, expected in (
        ("resnet18", 224, [(64, 112), (64, 56), (128, 28), (256, 14), (512, 7)]),
        ("resnet50", 224, [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)]),
        ("plain34", 224, [(64, 112), (64, 56), (128, 28), (256, 14), (512, 7)]),
        ("cifar_resnet20", 32, [(16, 32), (16, 32), (32, 16), (64, 8)]),
    ):
        with torch.device("meta"):
            network = cnnfast.create_model(name, features_only=True)
            set_backend(network, "reference")
            with torch.no_grad():
                maps = network(torch.empty(1, 3, size, size))
        assert [(y.shape[1], y.shape[2]) for y in maps] == expected
        assert network.feature_info.channels() == [channels for channels, _ in expected]
        assert network.feature_info.reduction() == [size // side for _, side in expected]


@pytest.mark.parametrize(
    "layers, millions",
    [
        *((20, "0.27"), (32, "0.46"), (44, "0.66"), (56, "0.85"), (110, "1.7")),
        pytest.param(1202, "19.4", marks=slow),  # seconds, even on the meta device
    ],
)
def test_parameters_of_cifar(layers, millions):
    """Table 6."""
    with torch.device("meta"):
        network = cnnfast.create_model(f"cifar_resnet{layers}")
    decimals = len(millions.partition(".")[2])
    assert f"{count_parameters(network) / 1e6:.{decimals}f}" == millions
    assert weighted_layers(network) == layers
    cfg = network.pretrained_cfg
    assert (cfg["num_classes"], cfg["label_set"], cfg["input_size"]) == (10, "cifar10", (3, 32, 32))
    assert network.num_classes == 10


class AtenOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function._schema.name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name, options, calls",
    [
        ("resnet18", {}, {"conv2d_packed": 17, "pointwise_conv2d_packed": 3}),
        ("resnet18", dict(output_stride=8), {"conv2d_packed": 17, "pointwise_conv2d_packed": 3}),
        ("resnet50", {}, {"conv2d_packed": 17, "pointwise_conv2d_packed": 36}),
        ("plain18", {}, {"conv2d_packed": 17}),
        ("cifar_resnet20", {}, {"conv2d_packed": 19}),
    ],
)
def test_calls(name, options, calls):
    """A call a convolution; shortcuts and ReLUs are inside."""
    network, x = cnnfast.create_model(name, **options).eval(), torch.randn(1, 3, 40, 33)
    with torch.no_grad():
        called = ops_of(network, x)
        assert {op: called.count(op) for op in called} == calls
        with AtenOps() as aten:
            network(x)
        assert not aten.names & {"add", "add_", "relu", "relu_", "batch_norm", "native_batch_norm", "convolution"}
        assert network.forward_features(x).is_contiguous(memory_format=torch.channels_last)


def timms(ours, name, **options):
    """timm's network with the weights of ours."""
    theirs = import_timm().create_model(name, **options)
    theirs.load_state_dict(ours.state_dict())
    return theirs.double()


@pytest.mark.parametrize("output_stride", [16, 8])
@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=slow)])
def test_output_stride(name, output_stride):
    ours = cnnfast.create_model(name, output_stride=output_stride)
    draw_batch_norms(ours, torch.randn(2, 3, 65, 65))
    theirs = timms(ours, name, output_stride=output_stride).eval()
    ours.double().eval()
    assert ours.feature_info.reduction() == [one["reduction"] for one in theirs.feature_info]
    for shape in ((2, 3, 65, 49), (1, 3, 96, 97)):
        x = torch.randn(shape, dtype=torch.float64)
        with torch.no_grad():
            last, maps = theirs.forward_intermediates(x)
            for got, expected in zip(maps_and_logits(ours, x), [*maps, theirs.forward_head(last)], strict=True):
                assert got.shape == expected.shape and relative(got, expected) <= 1e-10


def test_drop_rates():
    """The same random numbers drop the same images and features."""
    rates = dict(num_classes=5, drop_rate=0.3, drop_path_rate=0.4)
    ours = cnnfast.create_model("resnet18", **rates)
    theirs = timms(ours, "resnet18", **rates).train()
    ours.double().train()
    x = torch.randn(4, 3, 40, 40, dtype=torch.float64)
    torch.manual_seed(3)
    expected = theirs(x)
    torch.manual_seed(3)
    assert relative(ours(x), expected) <= 1e-9
    assert relative(ours(x), expected) > 1e-3


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_zero_init_last(name):
    """The parameters that begin as zeros are timm's; by default, as torchvision's, no weights do."""
    theirs = import_timm().create_model(name, zero_init_last=True)
    zero = lambda network: {key for key, p in network.named_parameters() if not p.any()}  # noqa: E731
    ours = cnnfast.create_model(name, zero_init_last=True)
    assert zero(ours) == zero(theirs)
    assert not any(key.endswith("weight") for key in zero(cnnfast.create_model(name)))


@pytest.mark.parametrize("mark", ["relu", "downsample", "drop_path", "bn1"])
def test_a_changed_block_runs_as_it_is(mark):
    """A layer that was exchanged inside isn't ignored: the block runs layer by layer."""
    downsample = nn.Sequential(nn.Conv2d(8, 6, 1, 2), nn.BatchNorm2d(6))
    block, x = BasicBlock(8, 6, 2, downsample=downsample), torch.randn(2, 8, 9, 7)
    draw_batch_norms(block, torch.randn(4, 8, 9, 7))
    with torch.no_grad():
        before = block.eval()(x)
        assert ops_of(block, x) == ["conv2d_packed"] * 3
        other = {
            "relu": nn.Hardswish(),
            "downsample": nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)),
            "drop_path": nn.Softplus(),
            "bn1": nn.InstanceNorm2d(6),
        }
        setattr(block, mark, other[mark].eval())
        after = block(x)
        assert relative(after, before) > 1e-3 and not any("packed" in op for op in ops_of(block, x))
    torch.testing.assert_close(after, block.layers(x).detach())


def test_blocks_of_one_size_take_no_projection():
    for name, count in (("resnet18", 3), ("resnet50", 4), ("plain34", 0), ("cifar_resnet20", 2)):
        with torch.device("meta"):
            network = cnnfast.create_model(name)
        blocks = [module for module in network.modules() if isinstance(module, ResidualBlock)]
        assert sum(block.downsample is not None for block in blocks) == count


@pytest.mark.parametrize(
    "name, options, says",
    [
        ("resnet18", dict(shortcut="C"), "shortcut must be 'A', 'B' or None, got 'C'"),
        ("resnet18", dict(output_stride=4), "output_stride must be one of 8, 16, 32, got 4"),
        ("cifar_resnet20", dict(output_stride=8), "output_stride must be one of 1, 2, 4, got 8"),
        ("resnet50", dict(drop_path_rate=1.0), "drop_prob must be"),
        ("resnet50", dict(global_pool="median"), "global_pool must be one of"),
        ("plain18", dict(drop_path_rate=0.1), "drop_path_rate must be 0 without shortcuts, got 0.1"),
    ],
)
def test_mistaken_arguments(name, options, says):
    with pytest.raises(ValueError, match=says):
        cnnfast.create_model(name, **options)
