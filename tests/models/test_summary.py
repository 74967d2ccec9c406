"""What `cnnfast.summary` says of networks, against torch's counter, hand counts and the real forward.

Fails if a layer is left out or counted twice, if the meta device's calls aren't those of a real forward, if bytes are
other than the tensors', or if convolutions are called factorised that aren't one behind the other.
"""

import csv
import io
import json
import math

import pytest
import torch
from networks import ops_of
from rich.console import Console
from torch import nn
from torch.nn.modules import module as torch_module

import cnnfast
from cnnfast.models import register_model, registry
from cnnfast.models.figures import count_parameters, figures
from cnnfast.nn import set_backend
from cnnfast.summary import Ceilings, Report, summarize, to_csv, to_json
from cnnfast.summary.recorder import record
from cnnfast.summary.tables import print_report

FLOPS, RATE = 1e11, 1e10
CEILINGS = Ceilings("a machine", FLOPS, lambda nbytes: RATE, RATE)


QUICK = ("googlenet", "lenet5", "mobilenet_v2", "se_resnet18")


def every_network():
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in cnnfast.list_models()]


@pytest.fixture
def register(monkeypatch):
    """register_model for this test only."""
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))

    def register(name, factory, **cfg):
        register_model(name, **cfg)(factory)
        return name

    return register


def layers_of(summary):
    return [layer for block in summary.blocks for layer in block.layers]


@pytest.mark.parametrize("name", every_network())
def test_macs_are_those_of_torchs_counter(name):
    summary = summarize(name)
    assert sum(block.macs for block in summary.blocks) == figures(name)["macs"]  # test_list.py
    with torch.device("meta"):
        network = cnnfast.create_model(name)
    assert summary.parameters == count_parameters(network)
    auxiliary = sum(p.numel() for key, p in network.named_parameters() if "aux" in key.lower())
    assert summary.unread_parameters == auxiliary
    for layer in layers_of(summary):
        if layer.conv is not None:
            conv = layer.conv
            weights = conv.out_channels * conv.in_channels // conv.groups * math.prod(conv.kernel)
            assert layer.macs == weights * math.prod(conv.outputs), layer.path


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("efficientnet_b0", torch.float16),
        ("mobilenet_v1", torch.bfloat16),
        ("se_resnet18", torch.bfloat16),
        ("tf_efficientnet_lite0", torch.float32),
        pytest.param("se_resnet50", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("xception", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_calls_are_those_of_a_real_forward(name, dtype):
    """The same ops, reading and writing as many bytes, as with weights on the CPU."""
    network = cnnfast.create_model(name).eval().to(dtype)
    x = torch.randn(2, 3, 64, 64).to(dtype).contiguous(memory_format=torch.channels_last)
    summary = summarize(name, 64, 2, dtype)
    calls = record(network, x, fused=True)
    assert [call for block in summary.blocks for call in block.calls] == calls
    with torch.no_grad():
        assert [call.op for call in calls if call.op] == ops_of(network, x)
    set_backend(network, "reference")
    assert layers_of(summary) == record(network, x, fused=False)


def test_bytes_of_a_block():
    """An inverted residual of MobileNetV2 with its addition, 24 channels of 56 x 56, 144 in between."""
    summary = summarize("mobilenet_v2", batch=2, dtype=torch.float32)
    block = next(block for block in summary.blocks if block.name == "features.3")
    narrow, wide = 2 * 56 * 56 * 24 * 4, 2 * 56 * 56 * 144 * 4
    weights = [144 * 24, 4 * 144, 144 * 9, 4 * 144, 24 * 144, 4 * 24]
    moved = [narrow + wide, 2 * wide, 2 * wide, 2 * wide, 2 * wide, 2 * wide, wide + narrow, 2 * narrow, 3 * narrow]
    assert block.unfused == sum(moved) + 4 * sum(weights)
    assert block.parameters == sum(weights) - 2 * (144 + 144 + 24)  # running statistics are none
    (call,) = block.calls
    tensors = [torch.randn(144, 24, 1, 1), torch.randn(144, 1, 3, 3), torch.randn(24, 144, 1, 1)]
    biases = [torch.randn(tensor.shape[0]) for tensor in tensors]
    packed = cnnfast.ops.pack_inverted_residual(*tensors, *biases)
    assert (call.op, call.bytes) == ("inverted_residual_packed", 2 * narrow + packed.numel())
    assert block.runs == [("inverted_residual", "cpu packed")] and block.shape == (2, 24, 56, 56)


def test_on_a_gpu():
    """Where no weights are packed but a depthwise convolution's, seen from a machine without one: the plain ops, of
    Triton's or the C++ kernels, and PyTorch's convolution."""
    pytest.importorskip("triton")
    here, there = (summarize("mobilenet_v2", device_type=device) for device in ("cpu", "cuda"))
    assert layers_of(here) == layers_of(there)
    runs = dict(run for block in there.blocks for run in block.runs)
    assert runs["inverted_residual"] in ("triton", "cuda") and runs["convolution"] == "ATen"
    assert not any("packed" in backend for backend in runs.values())
    (call,) = next(block for block in there.blocks if block.name == "features.3").calls
    assert call.op == "inverted_residual"
    network = cnnfast.nn.DepthwiseConv2d(8, 8, 3, padding=1).eval().to("meta")
    x = torch.empty(1, 8, 9, 9, device="meta").contiguous(memory_format=torch.channels_last)
    for device, backends in (("cpu", ["cpu packed"]), ("cuda", ["triton packed"])):
        assert [one.backend.replace("cuda p", "triton p") for one in record(network, x, True, device)] == backends


def test_the_rate_of_a_gpus_copies():
    """Of one size for all."""
    report = Report(summarize("lenet5"), Ceilings("a GPU", FLOPS, None, RATE))
    assert report.total.floor == Report(summarize("lenet5"), CEILINGS).total.floor
    file = io.StringIO()
    print_report(report, Console(file=file, width=80))
    assert "of their size" not in file.getvalue()


def test_dtypes_halve_the_bytes():
    dtypes = torch.float32, torch.float16
    single, half = (Report(summarize("mobilenet_v1", dtype=dtype), CEILINGS).total for dtype in dtypes)
    assert single.unfused == 2 * half.unfused and single.macs == half.macs


class Twice(nn.Module):
    """Two products in one layer."""

    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, features))

    def forward(self, x):
        return x @ self.weight @ self.weight.t()


class Plain(nn.Module):
    """A user's: a module called twice, functions, an unused layer, no feature_info."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 5, bias=False)
        self.same = nn.Conv2d(6, 6, 3, padding=1)
        self.unused = nn.Linear(7, 3)
        self.fc = nn.Sequential(nn.Linear(6 * 12 * 12, num_classes), Twice(num_classes))

    def forward(self, x):
        x = nn.functional.max_pool2d(self.conv(x).relu(), 2)
        x = torch.cat([self.same(x)[:, :3], self.same(x)[:, 3:]], 1)
        x = torch.cat([x[:, 3:], x[:, :3]], 1)
        return self.fc(x.flatten(1))


def test_a_users_network(register):
    name = register("plain", Plain, input_size=(1, 28, 28), num_classes=10)
    summary = summarize(name, batch=3, num_classes=5)
    layers = layers_of(summary)
    x, conv, pooled = 3 * 28 * 28 * 4, 3 * 24 * 24 * 6 * 4, 3 * 12 * 12 * 6 * 4
    expected = [
        ("conv", "Conv2d", (3, 6, 24, 24), 150, 3 * 24 * 24 * 150, x + 4 * 150 + conv),
        ("", "relu", (3, 6, 24, 24), 0, 0, 2 * conv),
        ("", "max_pool2d_with_indices", (3, 6, 12, 12), 0, 0, conv + pooled),
        ("same", "Conv2d", (3, 6, 12, 12), 330, 3 * 144 * 324, 2 * pooled + 4 * 330),
        ("same", "Conv2d", (3, 6, 12, 12), 0, 3 * 144 * 324, 2 * pooled + 4 * 330),
        ("", "cat", (3, 6, 12, 12), 0, 0, 2 * pooled),
        ("", "cat", (3, 6, 12, 12), 0, 0, 2 * pooled),
        ("fc.0", "Linear", (3, 5), 864 * 5 + 5, 3 * 864 * 5, pooled + 4 * (864 * 5 + 5) + 3 * 5 * 4),
        ("fc.1", "Twice", (3, 5), 25, 2 * 3 * 25, 2 * 3 * 5 * 4 + 4 * 25),
    ]
    assert [(one.path, one.kind, one.shape, one.parameters, one.macs, one.bytes) for one in layers] == expected
    assert summary.unread_parameters == 7 * 3 + 3
    assert [block.fused for block in summary.blocks] == [block.unfused for block in summary.blocks]
    assert {backend for block in summary.blocks for _, backend in block.runs} == {"ATen"}
    assert summary.stages == ["conv", "relu", "max_pool2d_with_indices", "same", "cat", "fc"]
    file = io.StringIO()
    print_report(Report(summary, CEILINGS), Console(file=file, width=80))
    lines = file.getvalue().splitlines()
    assert "24 parameters are of layers that an eval forward doesn't run." in lines
    (total,) = [line for line in lines if line.startswith("total")]
    assert total.split()[:3] == ["total", "5", "4.85k"]  # 150 + 330 + 4325 + 25, and 24


def test_stages_end_where_maps_are_taken():
    summary = summarize("xception", 96)
    stages = {stage: [block.name for block in summary.blocks if block.stage == stage] for stage in summary.stages}
    assert stages == {
        "act2": ["conv1", "conv2"],
        "block1": ["block1"],  # where timm's block2.rep.0 is taken
        "block2": ["block2"],
        "block11": [f"block{i}" for i in range(3, 12)],
        "act4": ["block12", "conv3", "conv4"],
        "head": ["global_pool", "fc"],
    }


def test_separable_convolutions_of_xception():
    found = [one for one in summarize("xception").factorised if one.outputs == (19, 19) and one.channels[-1] == 728]
    assert len(found) == 25  # 8 x 3 of the middle flow, and the first of block12
    for one in found:
        assert one.ratio == pytest.approx(1 / 728 + 1 / 9, rel=1e-12) == one.expected
        assert (one.formula, one.dense, one.channels) == ("1/728 + 1/9", (3, 3), (728, 728, 728))


class Factors(nn.Module):
    """7 x 7 in two ways and 5 x 5 from 32 channels; then what isn't factorised, though it looks so."""

    def __init__(self):
        super().__init__()
        conv = lambda *args, **options: nn.Conv2d(*args, padding="same", **options)  # noqa: E731
        self.pair = nn.Sequential(
            conv(32, 32, (1, 7)), nn.BatchNorm2d(32), nn.ReLU(), conv(32, 32, (7, 1)), conv(32, 32, (1, 7))
        )
        self.three = nn.Sequential(conv(32, 32, 3), nn.ReLU(), conv(32, 32, 3), nn.ReLU(), conv(32, 48, 3))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(48, 48, 3))
        self.left, self.right = conv(48, 48, (1, 3)), conv(48, 48, (3, 1))
        self.wide, self.narrow = nn.Conv2d(48, 96, 3, padding=1, groups=48), nn.Conv2d(96, 40, 1)
        self.first, self.second = conv(40, 40, 3), conv(40, 40, 3)

    def forward(self, x):
        x = self.pooled(self.three(self.pair(x)))
        x = self.left(x) + self.right(x)  # side by side
        x = self.narrow(self.wide(x))
        return self.second(self.first(x) + x)  # with a shortcut between them


def test_factorised_convolutions(register):
    name = register("factors", Factors, input_size=(32, 16, 16))
    pair, three, separable = summarize(name).factorised
    assert (pair.paths, pair.formula, pair.dense) == (("pair.0", "pair.3"), "2/7", (7, 7))
    assert pair.ratio == pytest.approx(2 / 7) == pair.expected
    assert (three.paths, three.formula, three.dense) == (("three.0", "three.2", "three.4"), "27/49", (7, 7))
    assert three.expected == 27 / 49
    assert three.ratio == pytest.approx(9 * (2 * 32 + 48) * 32 / (49 * 32 * 48))  # its last one is wider
    assert (separable.paths, separable.formula) == (("wide", "narrow"), "2/40 + 2/9")
    assert separable.ratio == pytest.approx(2 / 40 + 2 / 9) == separable.expected


def test_floors_and_files():
    report = Report(summarize("mobilenet_v1"), CEILINGS)  # of whose first stage computing takes 0.7
    for row in report.blocks:
        compute, moving = 2 * row.macs / FLOPS, row.fused / RATE
        assert row.floor == pytest.approx(max(compute, moving))
        assert row.bound == ("compute" if compute >= moving else "memory")
        assert row.intensity == 2 * row.macs / row.fused
        assert row.unfused_floor >= max(compute, row.unfused / RATE) * (1 - 1e-9)
    assert {row.bound for row in report.blocks} == {"compute", "memory"}
    for stage, total in report.stages.items():
        computing = sum(row.floor for row in report.figures_of(stage) if row.bound == "compute")
        assert total.bound == ("compute" if computing >= total.floor / 2 else "memory")
    for rows in (report.blocks, report.stages.values()):
        assert sum(row.share for row in rows) == pytest.approx(1)
        assert sum(row.floor for row in rows) == pytest.approx(report.total.floor)
        assert sum(row.fused for row in rows) == report.total.fused

    lines = [*csv.DictReader(io.StringIO(to_csv(report)))]
    (total,) = [line for line in lines if line["level"] == "total"]
    for level in ("layer", "block", "stage"):
        of_level = [line for line in lines if line["level"] == level]
        for column in ("parameters", "macs", "bytes_unfused"):
            assert sum(int(line[column]) for line in of_level) == int(total[column]), (level, column)
    document = json.loads(to_json(report))
    assert document["total"]["macs"] == report.total.macs and document["input"] == [1, 3, 224, 224]
    calls = [call for stage in document["stages"] for block in stage["blocks"] for call in block["calls"]]
    assert {"op": "separable_conv2d", "backend": "cpu packed"} in calls
    assert document["factorised"][0]["formula"] == "1/64 + 1/9"


def test_what_cannot_be_summarized():
    with pytest.raises(ValueError, match=r"such as .*got 'mobilnet'"):
        summarize("mobilnet")
    with pytest.raises(ValueError, match="size must be one that xception takes, got 5 x 5: x must be at least 7 x 7"):
        summarize("xception", 5)
    assert not torch_module._global_forward_hooks and not torch_module._global_forward_pre_hooks
