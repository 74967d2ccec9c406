"""Squeeze-and-excitation networks: the paper's figures and the fused calls. Equality with timm's is in test_twins.py.

Fails if a stage has another size, parameter or cost than the paper's, or if a block isn't the calls that it should be.
"""

import pytest
import torch
from networks import draw_batch_norms, ops_of, relative
from torch import nn

import cnnfast
from cnnfast.models.figures import count_macs, count_parameters
from cnnfast.models.senet import SEResNetBlock
from cnnfast.nn import set_backend

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


@pytest.mark.parametrize("layers", DEPTHS)
def test_parameters(layers):
    """Beyond the ResNet's: 2 / r of the sum of N C^2 over the stages (equation 5), and the products' biases."""
    with torch.device("meta"):
        ours, resnet = (cnnfast.create_model(f"{prefix}resnet{layers}") for prefix in ("se_", ""))
    widths = [64, 128, 256, 512] if layers < 50 else [256, 512, 1024, 2048]
    stages = list(zip(DEPTHS[layers], widths, strict=True))
    products = sum(blocks * 2 * width**2 // 16 for blocks, width in stages)
    biases = sum(blocks * (width + width // 16) for blocks, width in stages)
    assert count_parameters(ours) - count_parameters(resnet) == products + biases
    if layers == 50:
        assert f"{products / 1e6:.1f}" == "2.5"  # section 4


@pytest.mark.parametrize(
    "name, gflops",
    [
        ("se_resnet50", 3.87),
        ("se_resnet101", 7.60),
        pytest.param("se_resnet152", 11.32, marks=pytest.mark.slow),
        pytest.param("senet154", 20.7, marks=pytest.mark.slow),
    ],
)
def test_multiply_adds(name, gflops):
    """Table 2's; SENet-154's are those of the authors' repository, https://github.com/hujie-frank/SENet."""
    assert count_macs(name) / 1e9 == pytest.approx(gflops, rel=0.005)


def test_senet154():
    with torch.device("meta"):
        network = cnnfast.create_model("senet154", features_only=True)
        assert count_parameters(cnnfast.create_model("senet154")) == 115_088_984
        set_backend(network, "reference")
        with torch.no_grad():
            maps = network(torch.empty(1, 3, 224, 224))
    assert [tuple(y.shape[1:]) for y in maps] == [
        (128, 112, 112),
        (256, 56, 56),
        (512, 28, 28),
        (1024, 14, 14),
        (2048, 7, 7),
    ]
    weighted = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    blocks = [name for name in weighted if name.startswith("layer") and ".conv" in name and "layer0" not in name]
    assert len(blocks) == 3 * (3 + 8 + 36 + 3)


@pytest.mark.parametrize(
    "name, calls",
    [
        ("se_resnet18", {"conv2d_packed": 17, "pointwise_conv2d_packed": 3, "squeeze_excite_packed": 8}),
        ("se_resnet50", {"conv2d_packed": 17, "pointwise_conv2d_packed": 36, "squeeze_excite_packed": 16}),
        # its 3x3 convolutions are grouped, ATen's; three of the stem, three projections
        pytest.param(
            "senet154",
            {"conv2d_packed": 6, "pointwise_conv2d_packed": 101, "squeeze_excite_packed": 50},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_calls(name, calls):
    network, x = cnnfast.create_model(name).eval(), torch.randn(1, 3, 40, 33)
    with torch.no_grad():
        called = ops_of(network, x)
        assert {op: called.count(op) for op in called} == calls


@pytest.mark.parametrize("place, layer", [("relu", nn.Hardswish()), ("se_module", nn.Softplus())])
def test_a_changed_block_runs_as_it_is(place, layer):
    block, x = SEResNetBlock(16, 16, 1, None, 4), torch.randn(2, 16, 9, 7)
    draw_batch_norms(block, torch.randn(4, 16, 9, 7))
    with torch.no_grad():
        before = block.eval()(x)
        assert ops_of(block, x) == ["conv2d_packed"] * 2 + ["squeeze_excite_packed"]
        setattr(block, place, layer.eval())
        after = block(x)
        assert relative(after, before) > 1e-3 and not any("packed" in op for op in ops_of(block, x))
    torch.testing.assert_close(after, block.layers(x).detach())
