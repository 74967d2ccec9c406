"""GoogLeNet, BN-Inception and SE-BN-Inception of plain layers, written from the papers' tables and Caffe's models."""

import torch
import torch.nn.functional as F
from torch import nn

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
