"""Training made of ops with statistics: that it is what runs, what it keeps for backward, and how exact its statistics
are.

That blocks train as PyTorch's layers do is test_training.py's. Fails if a block that could be fused trains layer by
layer, if more than raw outputs of convolutions is kept, or if a sum's rounding shows in a variance.
"""

import copy
import logging

import pytest
import torch
from blocks import BLOCKS, SHAPE, Twin, pair
from networks import relative
from torch import nn

import cnnfast
from cnnfast.nn import fused, set_backend
from cnnfast.ops import backends

FUSED = [name for name in BLOCKS if name != "residual"]


def nodes(y):
    """Names of the graph's nodes."""
    names, seen, found = set(), set(), [y.grad_fn]
    while found:
        node = found.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.add(node.name().removeprefix("GeneratedBackwardFor_cnnfast_").removesuffix("_defaultBackward"))
        found += [child for child, _ in node.next_functions]
    return names


def kept_bytes(call):
    """Of tensors kept for backward, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call()
    del y
    return sum(storages.values())


@pytest.mark.parametrize("name", FUSED)
def test_no_batch_normalisation_of_its_own(name):
    _, ours = pair(name)
    found = nodes(ours(torch.randn(SHAPE, dtype=torch.float64).requires_grad_()))
    assert not any("BatchNorm" in node for node in found), found
    assert "batch_norm_scale_shift" in found and any(node.endswith("conv2d_stats") for node in found), found
    assert {node for node in found if "excite" in node} == ({"scale_shift_excite"} if "excite" in name else set())


@pytest.mark.parametrize("name", ("mobilenet_v2", "efficientnet_b0", "xception", "mobilenet_v1"))
def test_networks(name):
    """Every batch normalisation of theirs."""
    network = cnnfast.create_model(name, num_classes=5).train()
    found = nodes(network(torch.randn(2, 3, 65, 65)))
    assert not any("BatchNorm" in node or node.startswith(("Hardtanh", "Silu")) for node in found), found


@pytest.mark.parametrize("backend", ("auto", "triton", "cuda"))
@pytest.mark.parametrize("name", ("mobilenet_v2", "efficientnet_b0", "xception"))
def test_networks_on_a_gpu(name, backend):
    """As if on one: by Triton's kernels; csrc/cuda has none of these ops."""
    pytest.importorskip("triton")
    with torch.device("meta"), backends.meta_as("cuda"):
        network = cnnfast.create_model(name, num_classes=5).train()
        set_backend(network, backend)
        found = nodes(network(torch.empty(2, 3, 65, 65)))
    assert any("BatchNorm" in node for node in found) == (backend == "cuda")
    assert ("batch_norm_scale_shift" in found) == (backend != "cuda")


@pytest.mark.parametrize("name", ("mobilenet_v2", "efficientnet_b0", "xception"))
def test_less_is_kept_than_by_plain_layers(name):
    """By PyTorch's layers in the same network."""
    network = cnnfast.create_model(name, num_classes=5).train()
    plain = copy.deepcopy(network)
    set_backend(plain, "reference")
    x = torch.randn(2, 3, 129, 129).to(memory_format=torch.channels_last)
    ours, theirs = (kept_bytes(lambda module=module: module(x)) for module in (network, plain))
    parameters = 4 * sum(p.numel() for p in network.parameters())
    assert ours - parameters <= 0.7 * (theirs - parameters)


@pytest.mark.parametrize("what", ("hook", "global hook", "subclass", "parametrized", "reference"))
def test_layer_by_layer(what, caplog, monkeypatch):
    """Where somebody wants to see a layer, or it computes something else; said once, but of what is asked for."""
    _, ours = pair("inverted")  # which needs hooks
    monkeypatch.setattr(fused, "_log_once", fused._log_once.__wrapped__)
    caplog.clear()
    handle = None
    if what == "hook":
        ours.bn2.register_forward_hook(lambda *arguments: None)
    elif what == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda *arguments: None)
    elif what == "subclass":
        ours.bn2.__class__ = type(
            "Own", (nn.BatchNorm2d,), {"forward": lambda self, x: nn.BatchNorm2d.forward(self, x)}
        )
    elif what == "parametrized":
        nn.utils.parametrizations.weight_norm(ours.conv_dw)
    else:
        set_backend(ours, "reference")
    try:
        with caplog.at_level(logging.WARNING, "cnnfast"):
            found = nodes(ours(torch.randn(SHAPE, dtype=torch.float64)))
    finally:
        if handle is not None:
            handle.remove()
    assert any("BatchNorm" in node for node in found) and "batch_norm_scale_shift" not in found
    said = [record.message for record in caplog.records]
    assert len(said) == (0 if what in ("global hook", "reference") else 1), said
    assert all(message.startswith("InvertedResidual trains layer by layer: ") for message in said)


@pytest.mark.parametrize("name", FUSED)
def test_compiled(name):
    """A step in one graph, whose statistics move."""
    torch._dynamo.reset()
    _, ours = pair(name)
    eager = copy.deepcopy(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(SHAPE, dtype=torch.float64)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [module(i) for module, i in zip((compiled, eager), inputs, strict=True)]
        grad = torch.randn_like(outputs[1])
        for y in outputs:
            y.backward(grad)
        assert relative(*outputs) <= 1e-9 and relative(inputs[0].grad, inputs[1].grad) <= 1e-9
    for (key, value), other in zip(ours.state_dict().items(), eager.state_dict().values(), strict=True):
        assert relative(value.double(), other.double()) <= 1e-9, key


def test_cumulative_statistics_compile():
    """The number of batches is a tensor: no graph for each."""
    torch._dynamo.reset()
    _, ours = pair("inverted")
    for norm in ours.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    eager = copy.deepcopy(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(SHAPE, dtype=torch.float64)
        compiled(x), eager(x)
    for (key, value), other in zip(ours.state_dict().items(), eager.state_dict().values(), strict=True):
        assert relative(value.double(), other.double()) <= 1e-9, key


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_statistics(name, dtype):
    """Running statistics as exact as PyTorch's, in float32 a relative 1e-5 of the exact ones."""
    plain, ours = pair(name, torch.float32)
    exact, x = copy.deepcopy(plain).double(), torch.randn(16, *SHAPE[1:])
    for module in (plain, ours, exact):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16 and module is not exact):
            module(x.double() if module is exact else x)
    for (key, value), other, ref in zip(ours.named_buffers(), plain.buffers(), exact.buffers(), strict=True):
        error, theirs = relative(value.double(), ref.double()), relative(other.double(), ref.double())
        assert error <= 2 * theirs + (1e-5 if dtype is torch.float32 else 2**-9), key


@pytest.mark.parametrize("ratio", (0.0, 3.0, 30.0))
def test_means_far_from_zero(ratio):
    """The mean of squares less the square of the mean: 900 times the rounding at 30 deviations, of sums that are kept
    in float32. A relative 2^-23 ratio^2 of the variance, and what PyTorch's own is off."""
    plain = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)).train()
    ours = cnnfast.nn.PointwiseConvBN(4, 8).train()
    ours.conv.bias = plain[0].bias
    with torch.no_grad():
        plain[0].bias.copy_(ratio * plain[0].weight.flatten(1).norm(dim=1))
    ours.load_state_dict({f"{('conv', 'bn')[int(k[0])]}{k[1:]}": v for k, v in plain.state_dict().items()})
    x = torch.randn(8, 4, 40, 40)
    exact = copy.deepcopy(plain).double()
    outputs = [module(x.to(next(module.parameters()).dtype)).double() for module in (ours, plain, exact)]
    variances = [module.running_var.double() for module in (ours.bn, plain[1], exact[1])]
    for values in (outputs, variances):
        error, theirs = relative(values[0], values[2]), relative(values[1], values[2])
        assert error <= 2 * theirs + 2**-23 * max(1, ratio**2)


def test_no_images():
    """As PyTorch's: counted, nothing else."""
    plain, ours = pair("inverted")
    for module in (plain, ours):
        module(torch.randn(0, *SHAPE[1:], dtype=torch.float64)).sum().backward()
    for key, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


def test_twins_are_plain():
    """Or test_training.py compares ours with ours."""
    _, ours = pair("inverted")
    found = nodes(Twin(ours)(torch.randn(SHAPE, dtype=torch.float64)))
    assert any("BatchNorm" in node for node in found) and "batch_norm_scale_shift" not in found
