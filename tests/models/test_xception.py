"""Xception's forms that timm doesn't have, against a build of plain layers: pointwise first, without residual
connections, dilated, with fully connected layers.

Fails if an order, a dilation, a pooling, a shortcut or a key differs, if a form isn't the fused calls that it should
be, or if a dilated network's pixels aren't those of the strided one.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from networks import assert_as_exact_over, assert_same_gradients, draw_batch_norms, in_float64, ops_of, relative
from torch import nn

import cnnfast
from cnnfast.models.figures import count_macs, count_parameters


class PlainSeparable(nn.Module):
    def __init__(self, channels, out_channels, dilation, pointwise_first):
        super().__init__()
        depth = out_channels if pointwise_first else channels
        self.conv1 = nn.Conv2d(depth, depth, 3, 1, dilation, dilation, groups=depth, bias=False)
        self.pointwise = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.pointwise_first = pointwise_first

    def forward(self, x):
        first, second = (self.pointwise, self.conv1) if self.pointwise_first else (self.conv1, self.pointwise)
        return second(first(x))


class PlainPool(nn.Module):
    """Each pixel's window by hand: the largest of nine shifted images."""

    def __init__(self, stride, dilation):
        super().__init__()
        self.stride, self.dilation = stride, dilation

    def forward(self, x):
        d, (h, w) = self.dilation, x.shape[2:]
        padded = F.pad(x, (d, d, d, d), value=float("-inf"))
        shifts = [padded[:, :, i * d : i * d + h, j * d : j * d + w] for i in range(3) for j in range(3)]
        return torch.stack(shifts).amax(0)[:, :, :: self.stride, :: self.stride]


class PlainBlock(nn.Module):
    """Units of (channels, ReLU first)."""

    def __init__(self, widths, stride, pooled, relu_first, dilation, pointwise_first, residual):
        super().__init__()
        layers = []
        for n, (channels, out_channels) in enumerate(itertools.pairwise(widths)):
            if n or relu_first:
                layers.append(nn.ReLU())
            layers.append(PlainSeparable(channels, out_channels, dilation, pointwise_first))
            layers.append(nn.BatchNorm2d(out_channels))
        if pooled:
            layers.append(PlainPool(stride, dilation))
        self.rep = nn.Sequential(*layers)
        self.residual = residual
        if residual and pooled:
            self.skip = nn.Conv2d(widths[0], widths[-1], 1, stride, bias=False)
            self.skipbn = nn.BatchNorm2d(widths[-1])

    def forward(self, x):
        y = self.rep(x)
        if not self.residual:
            return y
        return y + (self.skipbn(self.skip(x)) if hasattr(self, "skip") else x)


class PlainXception(nn.Module):
    """The paper's figure 5, as it is drawn."""

    def __init__(self, output_stride=32, pointwise_first=False, residual=True, hidden=()):
        super().__init__()
        entry_stride, middle, exit_stride, last = {32: (2, 1, 2, 1), 16: (2, 1, 1, 2), 8: (1, 2, 1, 4)}[output_stride]
        form = (pointwise_first, residual)
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 64, 3, bias=False), nn.BatchNorm2d(64)
        self.block1 = PlainBlock((64, 128, 128), 2, True, False, 1, *form)
        self.block2 = PlainBlock((128, 256, 256), 2, True, True, 1, *form)
        self.block3 = PlainBlock((256, 728, 728), entry_stride, True, True, 1, *form)
        for n in range(4, 12):
            setattr(self, f"block{n}", PlainBlock((728,) * 4, 1, False, True, middle, *form))
        self.block12 = PlainBlock((728, 728, 1024), exit_stride, True, True, middle, *form)
        self.conv3, self.bn3 = PlainSeparable(1024, 1536, last, pointwise_first), nn.BatchNorm2d(1536)
        self.conv4, self.bn4 = PlainSeparable(1536, 2048, last, pointwise_first), nn.BatchNorm2d(2048)
        features, layers = 2048, []
        for width in hidden:
            layers += [nn.Linear(features, width), nn.ReLU()]
            features = width
        if hidden:
            self.hidden = nn.Sequential(*layers)
        self.fc = nn.Linear(features, 1000)

    def maps(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        maps = [F.relu(self.bn2(self.conv2(x)))]
        x = maps[0]
        for n in range(1, 13):
            x = getattr(self, f"block{n}")(x)
            if n in (1, 2, 11):
                maps.append(F.relu(x))
        x = F.relu(self.bn3(self.conv3(x)))
        return [*maps, F.relu(self.bn4(self.conv4(x)))]

    def forward(self, x):
        pooled = F.adaptive_avg_pool2d(self.maps(x)[-1], 1).flatten(1)
        return self.fc(self.hidden(pooled) if hasattr(self, "hidden") else pooled)


# our options, the plain network's
FORMS = {
    "pointwise_first": (dict(order="pointwise_first"), dict(pointwise_first=True)),
    "no_residual": (dict(residual=False), dict(residual=False)),
    "stride_16": (dict(output_stride=16), dict(output_stride=16)),
    "stride_8": (dict(output_stride=8), dict(output_stride=8)),
    "hidden": (dict(hidden_features=(64, 48)), dict(hidden=(64, 48))),
    "all": (
        dict(order="pointwise_first", residual=False, output_stride=8, hidden_features=(32,)),
        dict(pointwise_first=True, residual=False, output_stride=8, hidden=(32,)),
    ),
}
QUICK = ("pointwise_first",)


@pytest.fixture(params=[pytest.param(form, marks=[pytest.mark.slow] * (form not in QUICK)) for form in FORMS])
def pair(request):
    """(the plain network with drawn statistics, ours with its weights), in eval mode."""
    ours_options, plain_options = FORMS[request.param]
    plain = PlainXception(**plain_options)
    for module in plain.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    draw_batch_norms(plain, torch.randn(3, 3, 75, 75))
    ours = cnnfast.create_model("xception", **ours_options).eval()
    ours.load_state_dict(plain.state_dict(), strict=True)
    return plain.eval(), ours


def outputs(plain, ours, x):
    with torch.no_grad():
        expected = [*plain.maps(x), plain(x)]
        return list(zip([*ours.forward_intermediates(x)[1], ours(x)], expected, strict=True))


def test_in_float64(pair):
    plain, ours = (network.double() for network in pair)
    for size in ((3, 3, 41, 47), (1, 3, 51, 38)):
        for got, expected in outputs(plain, ours, torch.randn(size, dtype=torch.float64)):
            assert got.shape == expected.shape and relative(got, expected) <= 1e-11


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["pointwise_first", "stride_8", "all"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision(pair, dtype):
    plain, ours = (network.to(dtype) for network in pair)
    exact = in_float64(plain)
    for size in ((3, 3, 75, 65), (1, 3, 71, 75)):
        x = torch.randn(size).to(dtype)
        with torch.no_grad():
            refs = [*exact.maps(x.double()), exact(x.double())]
        for (got, expected), ref in zip(outputs(plain, ours, x), refs, strict=True):
            assert_as_exact_over([(got, expected, ref)])


@pytest.mark.slow
def test_training(pair):
    plain, ours = (network.double().train() for network in pair)
    x = torch.randn(2, 3, 65, 71, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    y, expected = ours(inputs[0]), plain(inputs[1])
    assert relative(y, expected) <= 1e-9
    grad = torch.randn_like(y)
    y.backward(grad), expected.backward(grad)
    assert relative(inputs[0].grad, inputs[1].grad) <= 1e-9
    assert_same_gradients(ours, plain, 1e-9)
    buffers = dict(plain.named_buffers())
    for name, buffer in ours.named_buffers():
        assert relative(buffer.double(), buffers[name].double()) <= 1e-9, name


def test_calls(pair, request):
    """One packed call a separable convolution and one a projection, in every form."""
    _, ours = pair
    form = request.node.callspec.params["pair"]
    with torch.no_grad():
        called = ops_of(ours, torch.randn(1, 3, 75, 75))
    expected = {"separable_conv2d_packed": 4 * 2 + 8 * 3 + 2, "pointwise_conv2d_packed": 4, "conv2d_packed": 2}
    if not FORMS[form][0].get("residual", True):
        del expected["pointwise_conv2d_packed"]
    assert {name: called.count(name) for name in called} == expected


@pytest.mark.parametrize("output_stride", [pytest.param(16, marks=pytest.mark.slow), 8])
def test_a_dilated_network_has_the_pixels_of_the_strided_one(output_stride):
    strided = cnnfast.create_model("xception").eval()
    draw_batch_norms(strided, torch.randn(2, 3, 75, 75))
    dilated = cnnfast.create_model("xception", output_stride=output_stride).eval()
    dilated.load_state_dict(strided.state_dict())
    strided.double(), dilated.double()
    x = torch.randn(1, 3, 91, 75, dtype=torch.float64)
    with torch.no_grad():
        expected, maps = strided.forward_intermediates(x)[1], dilated.forward_intermediates(x)[1]
    for n, (got, wanted) in enumerate(zip(maps, expected, strict=True)):
        times = (2 << n) // dilated.feature_info.reduction(n)
        assert relative(got[:, :, ::times, ::times], wanted) <= 1e-12
    assert dilated.feature_info.reduction() == [min(2 << n, output_stride) for n in range(5)]


def test_figures():
    """Parameters follow from the table; the order changes only the depthwise convolutions' channels."""

    def parameters(**options):
        with torch.device("meta"):
            return count_parameters(cnnfast.create_model("xception", **options))

    whole = parameters()
    assert whole == 22_855_952 and round(count_macs("xception") / 1e8) == 84
    changed = {64: 128, 128: 256, 256: 728, 1024: 1536, 1536: 2048}
    # first units of blocks 1 to 3, the last of block 12, conv3, conv4
    assert parameters(order="pointwise_first") == whole + 9 * (
        sum(wide - narrow for narrow, wide in changed.items()) + 1024 - 728
    )
    projections = ((64, 128), (128, 256), (256, 728), (728, 1024))
    assert parameters(residual=False) == whole - sum(a * b + 2 * b for a, b in projections)
    hidden = 2048 * 4096 + 4096 + 4096 * 4096 + 4096
    assert parameters(hidden_features=(4096, 4096)) == whole + hidden + (4096 - 2048) * 1000
    for output_stride in (16, 8):
        assert parameters(output_stride=output_stride) == whole


def test_classifier_behind_hidden_layers():
    network = cnnfast.create_model("xception", hidden_features=(24, 12), num_classes=5, drop_rate=0.5).eval()
    x = torch.randn(2, 3, 71, 71)
    with torch.no_grad():
        features, y = network.forward_features(x), network(x)
        assert torch.equal(network.get_classifier()(network.forward_head(features, pre_logits=True)), y)
        weight = network.hidden[0].weight
        network.reset_classifier(7)
        assert network.hidden[0].weight is weight and network(x).shape == (2, 7)
        network.reset_classifier(0)
        assert network.hidden[0].weight is weight and network(x).shape == (2, 12)
        network.reset_classifier(3, "catavgmax")
        assert network.hidden[0].in_features == 4096 and network(x).shape == (2, 3)
        network.reset_classifier(0, "")
        assert torch.equal(network(x), features) and not network.hidden


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(order="channels_first"), "order must be 'depthwise_first' or 'pointwise_first', got 'channels_first'"),
        (dict(output_stride=4), "output_stride must be one of 8, 16, 32, got 4"),
        (dict(hidden_features=(4096, 0)), r"hidden_features must be positive ints, got \(4096, 0\)"),
    ],
)
def test_mistaken_arguments(options, says):
    with pytest.raises(ValueError, match=says), torch.device("meta"):
        cnnfast.create_model("xception", **options)
