"""What EfficientNets have besides the other networks: scaling by two factors, two forms of a name, output strides.

Fails if a width or depth is rounded otherwise than the authors', if a form has the other's padding, if a dilated
network isn't timm's, or if what pretrained_cfg says isn't what timm's weights were trained for.
"""

import math

import pytest
import torch
from networks import (
    assert_as_exact_over,
    assert_same_gradients,
    draw_batch_norms,
    ops_of,
    relative,
    stages_of,
)

import cnnfast
from cnnfast._peers import import_timm
from cnnfast.models.figures import count_parameters, figures
from cnnfast.models.registry import model_entry

NAMES = cnnfast.list_models("*efficientnet_*")
# as published: millions of parameters, billions of multiply-adds (at 224, 240, 260, 300, 380, 456, 528, 600)
PAPER = {
    "b0": (5.3, 0.39),
    "b1": (7.8, 0.70),
    "b2": (9.2, 1.0),
    "b3": (12, 1.8),
    "b4": (19, 4.2),
    "b5": (30, 9.9),
    "b6": (43, 19),
    "b7": (66, 37),
    "l2": (480, None),
}
# of the authors' table of Lite: millions of parameters
LITE = {"lite0": 4.7, "lite1": 5.4, "lite2": 6.1, "lite3": 8.2, "lite4": 13.0}


def some(names):
    """The smallest, and one in the middle; the others are slow."""
    return [
        pytest.param(name, marks=[] if name.endswith(("b0", "b2", "lite0")) else [pytest.mark.slow]) for name in names
    ]


def macs_of(name):
    """As counted: test_list.py."""
    return figures(name)["macs"] / 1e9


def on_meta(name, **options):
    with torch.device("meta"):
        return cnnfast.create_model(name, **options)


@pytest.mark.parametrize("scale", some(PAPER))
def test_figures_of_the_paper(scale):
    """Within the rounding of the table (B2: 9.1); multiply-adds, which the authors count otherwise, within 6 %."""
    parameters, macs = PAPER[scale]
    name = f"tf_efficientnet_{scale}"
    assert count_parameters(on_meta(name)) / 1e6 == pytest.approx(parameters, abs=0.1 if parameters < 10 else 0.5)
    if macs is not None:
        assert macs_of(name) == pytest.approx(macs, rel=0.06)


@pytest.mark.parametrize("scale", some(LITE))
def test_lite(scale):
    """No squeeze-excite, the stem and the head of B0, and one block in the first and the last stage."""
    for name in (f"efficientnet_{scale}", f"tf_efficientnet_{scale}"):
        network = on_meta(name)
        assert count_parameters(network) / 1e6 == pytest.approx(LITE[scale], abs=0.05)
        assert network.conv_stem.out_channels == 32 and network.num_features == 1280
        assert len(network.blocks[0]) == len(network.blocks[6]) == 1
        kinds = {type(module).__name__ for module in network.modules()}
        assert "ReLU6" in kinds and not {"SiLU", "SqueezeExcite"} & kinds


def test_compound_scaling():
    """B7's stages by hand: 2.0 times the width, 3.1 times the depth, rounded up."""
    network = on_meta("efficientnet_b7")
    assert [len(stage) for stage in network.blocks] == [math.ceil(3.1 * n) for n in (1, 2, 2, 3, 3, 4, 1)]
    assert [stage[-1].bn3.num_features for stage in network.blocks[1:]] == [48, 80, 160, 224, 384, 640]
    assert network.blocks[3][0].se.conv_reduce.out_channels == 80 // 4  # of the block's input, not of the expanded
    assert network.conv_stem.out_channels == 64 and network.num_features == 2560


@pytest.mark.parametrize("name", NAMES)
def test_pretrained_cfg_is_that_of_timms_weights(name):
    cfg, expected = model_entry(name).pretrained_cfg, import_timm().get_pretrained_cfg(name)
    assert (cfg["input_size"], cfg["crop_pct"]) == (expected.input_size, expected.crop_pct)
    assert cfg["interpolation"] == expected.interpolation
    if name.startswith("tf_efficientnet_lite"):  # the authors': (x - 127) / 128
        assert (cfg["mean"], cfg["std"]) == ((127 / 255,) * 3, (128 / 255,) * 3)
    else:
        assert (cfg["mean"], cfg["std"]) == (expected.mean, expected.std)


@pytest.mark.parametrize("name", some(NAMES))
def test_docstring(name):
    """Figures as counted."""
    doc = model_entry(name).factory.__doc__
    macs, size = macs_of(name), model_entry(name).pretrained_cfg["input_size"][1]
    rounded = next(
        text for limit, text in ((0.995, f"{macs:.2f}"), (9.95, f"{macs:.1f}"), (1e9, f"{macs:.0f}")) if macs < limit
    )
    assert f"{count_parameters(on_meta(name)):,} parameters, {rounded} GMACs at {size} x {size}" in doc
    assert ("'same' padding" in doc) == name.startswith("tf_")


def test_forms_differ():
    """Same keys and shapes; padding and eps are each form's own."""
    torch.manual_seed(1)
    symmetric, same = (cnnfast.create_model(f"{form}efficientnet_lite0").eval() for form in ("", "tf_"))
    draw_batch_norms(symmetric, torch.randn(4, 3, 64, 64))
    same.load_state_dict(symmetric.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert relative(symmetric(x), same(x)) > 0.05
    assert same.bn1.eps == 1e-3 and symmetric.bn1.eps == 1e-5


STRIDES = [("efficientnet_b0", 8), ("tf_efficientnet_b0", 16), ("efficientnet_b0", 16), ("tf_efficientnet_b0", 8)]
STRIDES += [("efficientnet_lite0", 8), ("tf_efficientnet_lite0", 8)]


@pytest.mark.parametrize(
    "name, output_stride", [pytest.param(*case, marks=[pytest.mark.slow] * (n > 0)) for n, case in enumerate(STRIDES)]
)
def test_output_stride(name, output_stride):
    """Maps, logits, gradients of timm's, in float64."""
    theirs = import_timm().create_model(name, output_stride=output_stride)
    draw_batch_norms(theirs, torch.randn(3, 3, 49, 49))
    ours = cnnfast.create_model(name, output_stride=output_stride)
    ours.load_state_dict(theirs.state_dict())
    theirs.double().eval(), ours.double().eval()
    x = torch.randn(2, 3, 57, 50, dtype=torch.float64)
    with torch.no_grad():
        last, maps = ours.forward_intermediates(x)
        their_last, their_maps = theirs.forward_intermediates(x)
        for got, expected in zip([*maps, last, ours(x)], [*their_maps, their_last, theirs(x)], strict=True):
            assert got.shape == expected.shape and relative(got, expected) <= 1e-11
        blocks = [op for op in ops_of(ours, x) if op.startswith(("inverted_residual", "separable"))]
        assert len(blocks) == 16  # dilated ones are fused too
    assert ours.feature_info.reduction() == [one["reduction"] for one in theirs.feature_info]
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [network.train()(i) for network, i in zip((ours, theirs), inputs, strict=True)]
    assert relative(*outputs) <= 1e-9
    for output in outputs:
        output.square().mean().backward()
    assert relative(inputs[0].grad, inputs[1].grad) <= 1e-8
    assert_same_gradients(ours, theirs, 1e-8)


def test_mistaken_output_stride():
    with pytest.raises(ValueError, match="output_stride must be one of 8, 16, 32, got 64"):
        on_meta("efficientnet_b0", output_stride=64)


@pytest.fixture(scope="module")
def l2():
    """timm's with drawn statistics, 480 million parameters, of which a test changes the dtype in place."""
    torch.manual_seed(2)
    theirs = import_timm().create_model("tf_efficientnet_l2", drop_rate=0.0)
    draw_batch_norms(theirs, torch.randn(8, 3, 33, 35))
    return theirs


def with_parameters_of(theirs):
    """Ours, with theirs's own parameters, and buffers like them."""
    ours = on_meta("tf_efficientnet_l2", drop_rate=0.0)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    for module in ours.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = buffer.clone()
    return ours


@pytest.mark.slow
def test_training_of_l2(l2):
    """Output, gradients and running statistics in float64. Gradients are compared as they come: two sets, and one of
    parameters, are 12 GB."""
    theirs = l2.double().train()
    ours = with_parameters_of(theirs).train()
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    outputs = [theirs(x), ours(x)]
    assert relative(*outputs) <= 1e-9
    grad = torch.randn_like(outputs[0])
    outputs[0].backward(grad)
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    total = torch.stack([one.norm() for one in expected.values()]).norm().item()
    distances = {}

    def compared(name, parameter):
        wanted = expected.pop(name)
        distances[name] = (parameter.grad - wanted).norm().item() / max(wanted.norm().item(), 1e-4 * total)
        parameter.grad = None

    for name, parameter in ours.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: compared(name, p))
    outputs[1].backward(grad)
    assert not expected and max(distances.values()) <= 1e-8
    buffers = dict(theirs.named_buffers())
    for key, buffer in ours.named_buffers():
        assert relative(buffer.double(), buffers[key].double()) <= 1e-9, key
    theirs.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_eval_of_l2(l2, dtype):
    theirs = l2.to(dtype).eval()
    taps = [one["module"] for one in on_meta("tf_efficientnet_l2").feature_info]
    xs = [torch.randn(shape).to(dtype) for shape in ((3, 3, 33, 35), (1, 3, 49, 33))]
    exact = [stages_of(theirs.double(), x.double(), taps) for x in xs]
    own = [stages_of(theirs.to(dtype), x, taps) for x in xs]
    ours = with_parameters_of(theirs).eval()
    got = [stages_of(ours, x, taps) for x in xs]
    for stage in exact[0]:
        assert_as_exact_over([(g[stage], o[stage], e[stage]) for g, o, e in zip(got, own, exact, strict=True)], stage)
