"""GoogLeNet as published, BN-Inception and SE-BN-Inception, which neither timm nor torchvision has, against plain
builds written from the papers, and the figures of their tables.

Fails if a branch, its width, pooling, normalisation or padding differs, if a fused network is less exact than the
policy allows, or if a checkpoint's key lands in another place.
"""

import pytest
import torch
import torch.nn.functional as F
from networks import assert_as_exact_over, assert_same_gradients, draw_batch_norms, in_float64, relative
from torch import nn

import cnnfast
from cnnfast.models.figures import count_parameters

# Table 1 of https://arxiv.org/abs/1409.4842: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool proj; operations in millions
TABLE = {
    "3a": (64, 96, 128, 16, 32, 32, 128),
    "3b": (128, 128, 192, 32, 96, 64, 304),
    "4a": (192, 96, 208, 16, 48, 64, 73),
    "4b": (160, 112, 224, 24, 64, 64, 88),
    "4c": (128, 128, 256, 24, 64, 64, 100),
    "4d": (112, 144, 288, 32, 64, 64, 119),
    "4e": (256, 160, 320, 32, 128, 128, 170),
    "5a": (256, 160, 320, 32, 128, 128, 54),
    "5b": (384, 192, 384, 48, 128, 128, 71),
}


def norm(x):
    """Caffe's defaults. PyTorch has none of bfloat16 on CPUs."""
    wide = x.float() if x.dtype == torch.bfloat16 else x
    return F.local_response_norm(wide, 5, alpha=1e-4, beta=0.75, k=1.0).to(x.dtype)


class PlainGoogLeNet(nn.Module):
    """Keys as those of Caffe's bvlc_googlenet, with _ for /."""

    def __init__(self, num_classes, aux):
        super().__init__()
        self.conv("conv1_7x7_s2", 3, 64, 7)
        self.conv("conv2_3x3_reduce", 64, 64, 1)
        self.conv("conv2_3x3", 64, 192, 3)
        channels = 192
        for name, (one, reduce3, three, reduce5, five, proj, _) in TABLE.items():
            if aux and name in ("4b", "4e"):
                head = "loss1" if name == "4b" else "loss2"
                self.conv(f"{head}_conv", channels, 128, 1)
                self.add_module(f"{head}_fc", nn.Linear(2048, 1024))
                self.add_module(f"{head}_classifier", nn.Linear(1024, num_classes))
            self.conv(f"inception_{name}_1x1", channels, one, 1)
            self.conv(f"inception_{name}_3x3_reduce", channels, reduce3, 1)
            self.conv(f"inception_{name}_3x3", reduce3, three, 3)
            self.conv(f"inception_{name}_5x5_reduce", channels, reduce5, 1)
            self.conv(f"inception_{name}_5x5", reduce5, five, 5)
            self.conv(f"inception_{name}_pool_proj", channels, proj, 1)
            channels = one + three + five + proj
        self.loss3_classifier = nn.Linear(1024, num_classes)
        self.aux = aux

    def conv(self, name, inputs, outputs, kernel):
        self.add_module(name, nn.Conv2d(inputs, outputs, kernel, 2 if kernel == 7 else 1, kernel // 2))

    def run(self, name, x):
        return F.relu(self.get_submodule(name)(x))

    def loss(self, head, x):
        x = self.run(f"{head}_conv", F.avg_pool2d(x, 5, 3)).flatten(1)
        return self.get_submodule(f"{head}_classifier")(F.relu(self.get_submodule(f"{head}_fc")(x)))

    def forward_intermediates(self, x):
        maps, losses = [], []
        x = self.run("conv1_7x7_s2", x)
        maps.append(x)
        x = norm(F.max_pool2d(x, 3, 2, ceil_mode=True))
        x = norm(self.run("conv2_3x3", self.run("conv2_3x3_reduce", x)))
        maps.append(x)
        for name in TABLE:
            if name in ("3a", "4a", "5a"):
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            path = f"inception_{name}_"
            if self.aux and self.training and name in ("4b", "4e"):
                losses.append(self.loss("loss1" if name == "4b" else "loss2", x))
            x = torch.cat(
                [
                    self.run(path + "1x1", x),
                    self.run(path + "3x3", self.run(path + "3x3_reduce", x)),
                    self.run(path + "5x5", self.run(path + "5x5_reduce", x)),
                    self.run(path + "pool_proj", F.max_pool2d(x, 3, 1, 1)),
                ],
                1,
            )
            if name in ("3b", "4e", "5b"):
                maps.append(x)
        return [*maps, x.mean((2, 3))], losses

    def forward(self, x):
        maps, losses = self.forward_intermediates(x)
        logits = self.loss3_classifier(maps[-1])
        return [logits, *reversed(losses)] if losses else logits


def caffe_name(key):
    """Caffe's name of the parameter that is `key` in torchvision's layout."""
    module, _, kind = key.rpartition(".")
    module = module.removesuffix(".conv")
    fixed = {"conv1": "conv1_7x7_s2", "conv2": "conv2_3x3_reduce", "conv3": "conv2_3x3", "fc": "loss3_classifier"}
    fixed |= {
        f"aux{n}.{ours}": f"loss{n}_{theirs}" for n in (1, 2) for ours, theirs in (("fc1", "fc"), ("fc2", "classifier"))
    }
    fixed |= {"aux1.conv": "loss1_conv", "aux2.conv": "loss2_conv"}
    if module in fixed:
        return f"{fixed[module]}.{kind}"
    place, branch = module.removeprefix("inception").split(".", 1)
    branches = {"branch1": "1x1", "branch2.0": "3x3_reduce", "branch2.1": "3x3", "branch3.0": "5x5_reduce"}
    return f"inception_{place}_{(branches | {'branch3.1': '5x5', 'branch4.1': 'pool_proj'})[branch]}.{kind}"


def googlenet_pair(aux=False):
    torch.manual_seed(1)
    theirs = PlainGoogLeNet(13, aux)
    with torch.no_grad():
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, 0, 0.1) if parameter.dim() == 1 else nn.init.kaiming_normal_(parameter)
    options = dict(aux_logits=True, aux_drop_rate=0.0) if aux else {}
    ours = cnnfast.create_model("googlenet", num_classes=13, drop_rate=0.0, **options)
    weights = theirs.state_dict()
    ours.load_state_dict({key: weights.pop(caffe_name(key)) for key in ours.state_dict()})
    assert not weights
    return theirs.eval(), ours.eval()


# Figure 5 of https://arxiv.org/abs/1502.03167: 1x1, 3x3 reduce, 3x3, double 3x3 reduce, double 3x3, pooling, projection
FIGURE = {
    "3a": (64, 64, 64, 64, 96, "avg", 32),
    "3b": (64, 64, 96, 64, 96, "avg", 64),
    "3c": (0, 128, 160, 64, 96, "pass", 0),
    "4a": (224, 64, 96, 96, 128, "avg", 128),
    "4b": (192, 96, 128, 96, 128, "avg", 128),
    "4c": (160, 128, 160, 128, 160, "avg", 128),
    "4d": (96, 128, 192, 160, 192, "avg", 128),
    "4e": (0, 128, 192, 192, 256, "pass", 0),
    "5a": (352, 192, 320, 160, 224, "avg", 128),
    "5b": (352, 192, 320, 192, 224, "max", 128),
}


class PlainBNInception(nn.Module):
    """Keys as pretrainedmodels' bninception has them."""

    def __init__(self, num_classes, se, bias):
        super().__init__()
        self.se, self.bias = se, bias
        self.conv("conv1_7x7_s2", 3, 64, 7, 2)
        self.conv("conv2_3x3_reduce", 64, 64, 1)
        self.conv("conv2_3x3", 64, 192, 3)
        channels = 192
        self.widths = []
        for name, (one, reduce3, three, reduce33, three3, pool, proj) in FIGURE.items():
            path, stride = f"inception_{name}_", 2 if pool == "pass" else 1
            if one:
                self.conv(path + "1x1", channels, one, 1)
            self.conv(path + "3x3_reduce", channels, reduce3, 1)
            self.conv(path + "3x3", reduce3, three, 3, stride)
            self.conv(path + "double_3x3_reduce", channels, reduce33, 1)
            self.conv(path + "double_3x3_1", reduce33, three3, 3)
            self.conv(path + "double_3x3_2", three3, three3, 3, stride)
            if proj:
                self.conv(path + "pool_proj", channels, proj, 1)
            channels = one + three + three3 + (proj or channels)
            self.widths.append(channels)
            if se:
                self.add_module(path + "se_conv_reduce", nn.Conv2d(channels, channels // 16, 1))
                self.add_module(path + "se_conv_expand", nn.Conv2d(channels // 16, channels, 1))
        self.last_linear = nn.Linear(channels, num_classes)

    def conv(self, name, inputs, outputs, kernel, stride=1):
        self.add_module(name, nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=self.bias))
        self.add_module(name + "_bn", nn.BatchNorm2d(outputs))

    def run(self, x, *names):
        for name in names:
            x = F.relu(self.get_submodule(name + "_bn")(self.get_submodule(name)(x)))
        return x

    def forward_intermediates(self, x):
        maps = [x := self.run(x, "conv1_7x7_s2")]
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        maps.append(x := self.run(x, "conv2_3x3_reduce", "conv2_3x3"))
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        for name, (one, *_, pool, _) in FIGURE.items():
            if pool == "pass":
                maps.append(x)
            x = self.module(f"inception_{name}_", x, one, pool)
        return [*maps, x, x.mean((2, 3))]

    def module(self, path, x, one, pool):
        parts = [self.run(x, path + "1x1")] if one else []
        parts.append(self.run(x, path + "3x3_reduce", path + "3x3"))
        parts.append(self.run(x, path + "double_3x3_reduce", path + "double_3x3_1", path + "double_3x3_2"))
        if pool == "avg":
            parts.append(self.run(F.avg_pool2d(x, 3, 1, 1), path + "pool_proj"))
        elif pool == "max":
            parts.append(self.run(F.max_pool2d(x, 3, 1, 1), path + "pool_proj"))
        else:  # the windows of a convolution of stride 2 begin at -1; Caffe's pooling at 0
            rows, columns = x.shape[2] % 2, x.shape[3] % 2
            padded = F.pad(x, (0, columns, 0, rows), value=float("-inf"))
            parts.append(F.max_pool2d(padded, 3, 2, ceil_mode=True))
        y = torch.cat(parts, 1)
        if not self.se:
            return y
        gate = F.relu(self.get_submodule(path + "se_conv_reduce")(y.mean((2, 3), keepdim=True)))
        return y * torch.sigmoid(self.get_submodule(path + "se_conv_expand")(gate))

    def forward(self, x):
        return self.last_linear(self.forward_intermediates(x)[-1])


def bn_inception_pair(se):
    torch.manual_seed(1)
    theirs = PlainBNInception(13, se, bias=not se)
    draw_batch_norms(theirs, torch.randn(3, 3, 71, 65))
    ours = cnnfast.create_model("se_bn_inception" if se else "bn_inception", num_classes=13)
    cnnfast.load_weights(ours, theirs.state_dict(), source="pretrainedmodels")
    return theirs.eval(), ours.eval()


PAIRS = {
    "googlenet": googlenet_pair,
    "bn_inception": lambda: bn_inception_pair(False),
    "se_bn_inception": lambda: bn_inception_pair(True),
}


@pytest.fixture(params=PAIRS)
def pair(request):
    return PAIRS[request.param]()


def maps_and_logits(network, x):
    """Feature maps, pooled features, logits."""
    if isinstance(network, (PlainGoogLeNet, PlainBNInception)):
        maps = network.forward_intermediates(x)
        maps = maps[0] if isinstance(maps, tuple) else maps
        return [*maps, network(x)]
    last, maps = network.forward_intermediates(x)
    return [*maps, network.forward_head(last, pre_logits=True), network(x)]


@pytest.mark.parametrize("shape", [(3, 3, 65, 52), (1, 3, 91, 113), (2, 3, 31, 64)])
def test_eval_in_float64(pair, shape):
    theirs, ours = (network.double() for network in pair)
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        expected = maps_and_logits(theirs, x)
        for got, one in zip(maps_and_logits(ours, x), expected, strict=True):
            assert got.shape == one.shape and relative(got, one) <= 1e-11
        assert relative(expected[-1], expected[-1].roll(1, 1)) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_eval(pair, dtype):
    theirs, ours = (network.to(dtype) for network in pair)
    exact, outputs = in_float64(theirs), []
    for shape in ((3, 3, 65, 52), (1, 3, 91, 113)) * (3 if getattr(theirs, "se", False) else 1):
        x = torch.randn(shape).to(dtype)
        with torch.no_grad():
            stages = [maps_and_logits(network, x) for network in (ours, theirs)]
            stages.append(maps_and_logits(exact, x.double()))
        outputs.append(list(zip(*stages, strict=True)))
    for stage in zip(*outputs, strict=True):
        assert_as_exact_over(list(stage))


@pytest.mark.parametrize("name", ["googlenet", "bn_inception", pytest.param("se_bn_inception", marks=pytest.mark.slow)])
def test_training(name):
    """Outputs, gradients and running statistics, in float64."""
    theirs, ours = (network.double().train() for network in PAIRS[name]())
    x = torch.randn(3, 3, 65, 52, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [network(i) for network, i in zip((ours, theirs), inputs, strict=True)]
    assert relative(*outputs) <= 1e-9
    grad = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(grad)
    assert relative(inputs[0].grad, inputs[1].grad) <= 1e-9
    names = {key: caffe_name(key) for key in ours.state_dict()} if name == "googlenet" else None
    names = names or ours.checkpoint_keys("pretrainedmodels")
    assert_same_gradients(ours, theirs, 1e-9, names)
    expected = dict(theirs.named_buffers())
    for key, buffer in ours.named_buffers():
        assert relative(buffer.double(), expected[names[key]].double()) <= 1e-9, key


@pytest.mark.slow
def test_auxiliary_classifiers():
    """Of the published form, pooling 5x5 of stride 3 to 4 x 4: outputs and gradients in float64."""
    theirs, ours = (network.double().train() for network in googlenet_pair(aux=True))
    x = torch.randn(1, 3, 223, 258, dtype=torch.float64)
    outputs = [network(x) for network in (ours, theirs)]
    assert outputs[0]._fields == ("logits", "aux_logits2", "aux_logits1")
    for got, expected in zip(*outputs, strict=True):
        assert relative(got, expected) <= 1e-10
    for output in outputs:
        sum((n + 1) * one.square().sum() for n, one in enumerate(output)).backward()
    assert_same_gradients(ours, theirs, 1e-9, {key: caffe_name(key) for key in ours.state_dict()})
    with torch.no_grad():
        assert relative(ours.eval()(x), theirs.eval()(x)) <= 1e-10


def test_table_of_googlenet():
    """Multiply-adds of each row within 2 % of the paper's; of 5a it has 6 % more than its columns give.

    Its first row is that of a separable convolution of 8 filters a channel: 2.7K parameters, 34M operations, where the
    dense one has 9.4K and 118M.
    """
    with torch.device("meta"):
        network = cnnfast.create_model("googlenet").eval()
    channels = 192
    for name, (one, reduce3, three, reduce5, five, proj, millions) in TABLE.items():
        module = network.get_submodule(f"inception{name}")
        convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
        side = {"3": 28, "4": 14, "5": 7}[name[0]]
        macs = sum(conv.weight.numel() for conv in convs) * side * side
        assert macs / 1e6 == pytest.approx(millions, rel=0.06 if name == "5a" else 0.02), name
        reduced = channels * (one + reduce3 + reduce5 + proj)
        assert macs == (reduced + 9 * reduce3 * three + 25 * reduce5 * five) * side * side
        channels = one + three + five + proj
    assert channels == 1024 and len(TABLE) == 9
    reduce, conv = network.conv2.conv.weight.numel(), network.conv3.conv.weight.numel()
    assert (reduce + conv) / 1024 == 112 and (reduce + conv) * 56 * 56 / 1e6 == pytest.approx(360, rel=0.02)
    separable = 7 * 7 * 3 * 8 + 3 * 8 * 64
    assert round(separable / 1e3, 1) == 2.7 and round(separable * 112 * 112 / 1e6) == 34
    assert network.conv1.conv.weight.numel() == 9408 and round(9408 * 112 * 112 / 1e6) == 118
    weights = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(weights) == 3 + 9 * 6 + 1
    assert 1 + 2 + 2 * len(TABLE) + 1 == 22  # the longest way: its depth


def test_figure_of_bn_inception():
    """4c and 4d have 608 channels by the columns, 4e 1056, where the figure says 576 and 1024; parameters of Caffe's
    model and pretrainedmodels'."""
    assert PlainBNInception(13, False, True).widths == [256, 320, 576, 576, 576, 608, 608, 1056, 1024, 1024]
    with torch.device("meta"):
        ours = cnnfast.create_model("bn_inception").eval()
        cnnfast.nn.set_backend(ours, "reference")
        names = [f"inception_{name}" for name in FIGURE]
        maps = ours._run(torch.empty(1, 3, 224, 224), names)[1]
        widths = [tuple(maps[name].shape[1:]) for name in names]
        plain, se_plain = PlainBNInception(1000, False, True), PlainBNInception(1000, True, False)
        se = cnnfast.create_model("se_bn_inception")
    assert [width[0] for width in widths] == plain.widths
    assert [width[1] for width in widths] == [28, 28, 14, 14, 14, 14, 14, 7, 7, 7]
    assert count_parameters(ours) == count_parameters(plain) == 11_295_240
    assert count_parameters(se) == count_parameters(se_plain) == 11_931_622


def test_initialisation():
    """Caffe's: uniform within sqrt(3 / fan-in); biases 0.2, of classifiers 0."""
    network = cnnfast.create_model("googlenet", aux_logits=True)
    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = (3 / module.weight[0].numel()) ** 0.5
            assert 0.95 * bound < module.weight.abs().max() <= bound, name
            assert 0.9 < module.weight.std() / (bound / 3**0.5) < 1.1, name
            assert (module.bias == (0 if name in ("fc", "aux1.fc2", "aux2.fc2") else 0.2)).all(), name


def test_published_defaults():
    """Dropout of 40 %, and of 70 % in the auxiliary classifiers; none with batch normalisation's network."""
    network = cnnfast.create_model("googlenet", aux_logits=True)
    assert network.drop_rate == 0.4 and network.aux1.dropout.p == network.aux2.dropout.p == 0.7
    assert cnnfast.create_model("bn_inception").drop_rate == 0
