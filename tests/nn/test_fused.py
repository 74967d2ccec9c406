"""The life of a packing: whatever changes the weights, the next forward uses the new ones.

Each change is checked against the same block unfused, in float64, after a forward that packed the old weights: it fails
if the packing survives the change, and if a block that should be one call isn't (or the other way round).
"""

import copy
import io
import logging
import pickle

import pytest
import torch
from networks import draw_batch_norms, in_float64, ops_of
from torch import nn
from torch.nn.utils import parametrize, prune

import cnnfast
from cnnfast.nn import InvertedResidual

FUSED = ["inverted_residual_packed"]


@pytest.fixture
def x():
    return torch.randn(2, 6, 5, 7, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def block(x):
    torch.manual_seed(2)
    block = InvertedResidual(6, 6, 3, expand_ratio=2).eval()
    draw_batch_norms(block, torch.randn(4, 6, 5, 7))
    return block


def run(block, x):
    with torch.no_grad():
        return block(x)


def unfused(block, x):
    block = in_float64(block)
    return block.layers(x.double())


def check_follows(block, x, change, fused=True):
    """Packs, changes, compares."""
    before = run(block, x)
    change(block)
    dtype = block.conv_pw.weight.dtype
    after = run(block, x.to(dtype))
    expected = unfused(block, x.to(dtype))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2}[dtype]
    torch.testing.assert_close(after.double(), expected, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(before.double(), expected, rtol=1e-3, atol=1e-3), "the change changes nothing"
    assert (ops_of(run, block, x.to(dtype)) == FUSED) == fused


def state_of_another(block):
    torch.manual_seed(3)
    other = InvertedResidual(6, 6, 3, expand_ratio=2)
    draw_batch_norms(other, torch.randn(4, 6, 5, 7), seed=3)
    return other.state_dict()


def train(block):
    block.train()
    block(torch.randn(4, 6, 5, 7) * 3 + 1)  # moves the running statistics
    block.eval()


def optimizer_step(block):
    """Fine-tuning with frozen statistics: the block stays in eval mode."""
    optimizer = torch.optim.SGD(block.parameters(), lr=0.5)
    block(torch.randn(2, 6, 5, 7)).square().mean().backward()
    optimizer.step()


def in_place(block):
    with torch.no_grad():
        block.conv_pw.weight.mul_(2)


def in_place_statistics(block):
    block.bn3.running_mean.add_(1)


def data_then_grad(block):
    block.conv_dw.weight.data.mul_(2)
    block(torch.randn(1, 6, 5, 7))


def new_data(block):
    block.conv_dw.weight.data = block.conv_dw.weight.data * 2


def fused_optimizer_then_grad(block):
    optimizer = torch.optim.Adam(block.parameters(), lr=0.1, fused=True)
    block(torch.randn(2, 6, 5, 7)).square().mean().backward()
    optimizer.step()
    block(torch.randn(1, 6, 5, 7))


def new_parameter(block):
    block.conv_pwl.weight = nn.Parameter(torch.randn(6, 12, 1, 1))


def new_child(block):
    block.bn3 = nn.BatchNorm2d(6).eval()


def removed_parameters(block):
    block.bn1.weight = None
    block.bn1.bias = None


def added_bias(block):
    block.conv_pwl.bias = nn.Parameter(torch.randn(6))


def data_then_repack(block):
    before = run(block, torch.ones(1, 6, 5, 7))
    block.conv_dw.weight.data.mul_(2)
    assert torch.equal(run(block, torch.ones(1, 6, 5, 7)), before), "nothing else reports this change"
    cnnfast.repack(nn.Sequential(block))


CHANGES = {
    "train": train,
    "load_state_dict": lambda block: block.load_state_dict(state_of_another(block)),
    "load_state_dict_assign": lambda block: block.load_state_dict(state_of_another(block), assign=True),
    "load_state_dict_of_parent": lambda block: nn.Sequential(block).load_state_dict(
        {f"0.{key}": value for key, value in state_of_another(block).items()}
    ),
    "load_state_dict_of_child": lambda block: block.conv_dw.load_state_dict({"weight": torch.randn(12, 1, 3, 3)}),
    "optimizer_step": optimizer_step,
    "fused_optimizer_then_grad": fused_optimizer_then_grad,
    "in_place": in_place,
    "in_place_statistics": in_place_statistics,
    "data_then_grad": data_then_grad,
    "new_data": new_data,
    "new_parameter": new_parameter,
    "new_child": new_child,
    "added_bias": added_bias,
    "removed_parameters": removed_parameters,
    "data_then_repack": data_then_repack,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_packing_follows(block, x, change):
    check_follows(block, x, change)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float32])
def test_packing_follows_dtype(block, x, dtype):
    """A packing of float32 weights serves neither a block in another dtype nor weights that were rounded since."""
    run(block, x)
    if dtype == torch.float32:
        for child in block.children():  # through the children: the block doesn't hear of it
            child.half().float()
    else:
        block.to(dtype)
    expected = unfused(block, x.to(dtype))
    after = run(block, x.to(dtype))
    assert after.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-2}[dtype]
    torch.testing.assert_close(after.double(), expected, rtol=tolerance, atol=tolerance)
    assert ops_of(run, block, x.to(dtype)) == FUSED


def test_eval_and_to_drop_it(block, x):
    for drop in (block.eval, lambda: block.to(torch.float32), lambda: block.to(memory_format=torch.channels_last)):
        run(block, x)
        assert block._packing is not None
        drop()
        assert block._packing is None


def test_it_is_made_once(block, x):
    run(block, x)
    first = block._packing
    run(block, x)
    assert block._packing is first


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "save"])
def test_copies_carry_none(block, x, copied):
    before = run(block, x)
    if copied == "deepcopy":
        other = copy.deepcopy(block)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(block))
    else:
        file = io.BytesIO()
        torch.save(block, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert block._packing is not None and "_packing" not in vars(other)
    with torch.no_grad():
        other.conv_dw.weight.mul_(2)
    torch.testing.assert_close(run(other, x).double(), unfused(other, x), rtol=1e-5, atol=1e-5)
    assert torch.equal(run(block, x), before)


HOOKS = {
    "forward": lambda child, seen: child.register_forward_hook(lambda *_: seen.append(1)),
    "forward_pre": lambda child, seen: child.register_forward_pre_hook(lambda *_: seen.append(1)),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS.keys())
@pytest.mark.parametrize("child", ["conv_pw", "bn2", "act1", "conv_pwl"])
def test_hook_on_a_child_runs(block, x, hook, child, caplog):
    expected = run(block, x)
    seen = []
    handle = hook(getattr(block, child), seen)
    with caplog.at_level(logging.WARNING, logger="cnnfast"):
        torch.testing.assert_close(run(block, x), expected, rtol=1e-5, atol=1e-5)
        assert len(seen) == 1
        run(block, x)
    assert sum("hook" in record.message for record in caplog.records) <= 1  # once in the life of the process
    handle.remove()
    assert ops_of(run, block, x) == FUSED and len(seen) == 2


def test_hook_on_the_block_leaves_it_fused(block, x):
    seen = []
    block.register_forward_hook(lambda *_: seen.append(1))
    assert ops_of(run, block, x) == FUSED and seen


def test_backward_hook_on_a_child(block, x):
    run(block, x)
    block.conv_pw.register_full_backward_hook(lambda *_: None)
    assert ops_of(run, block, x) != FUSED


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_parametrization(block, x):
    def register(block):
        parametrize.register_parametrization(block.conv_pw, "weight", Doubled())

    check_follows(block, x, register, fused=False)
    parametrize.remove_parametrizations(block.conv_pw, "weight")
    assert ops_of(run, block, x) == FUSED


def test_pruning(block, x):
    check_follows(block, x, lambda block: prune.random_unstructured(block.conv_dw, "weight", 0.5), fused=False)


def test_child_in_training_mode(block, x):
    run(block, x)
    block.bn1.train()
    assert ops_of(run, block, x) != FUSED


def other_activation(block):
    block.act2 = nn.SiLU()


def batch_statistics(block):
    block.bn2 = nn.BatchNorm2d(12, track_running_stats=False).eval()


def other_normalisation(block):
    block.bn1 = nn.GroupNorm(2, 12)


def other_convolution(block):
    block.conv_pwl = nn.Conv2d(12, 6, 3, padding=1)


@pytest.mark.parametrize("change", [other_activation, batch_statistics, other_normalisation, other_convolution])
def test_what_cannot_be_folded_runs_layer_by_layer(block, x, change, caplog):
    with caplog.at_level(logging.WARNING, logger="cnnfast"):
        check_follows(block, x, change, fused=False)
    assert sum("layer by layer" in record.message for record in caplog.records) <= 1


def test_inference_mode(block, x):
    """What was packed there is usable outside, and training afterwards is as if nothing had been."""
    with torch.inference_mode():
        first = block(x)
    assert ops_of(run, block, x) == FUSED
    assert torch.equal(run(block, x), first)
    block.train()(x).sum().backward()
    assert block.conv_pw.weight.grad is not None


def test_grad_enabled_forward_is_differentiable(block, x):
    y = block(x)
    assert y.requires_grad and block._packing is None
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_set_backend(block, x):
    cnnfast.nn.set_backend(block, "reference")
    assert ops_of(run, block, x) == []
    cnnfast.nn.set_backend(block, "cpu")
    assert ops_of(run, block, x) == FUSED
    cnnfast.nn.set_backend(block, "triton")
    with pytest.raises(ValueError, match="triton"):
        run(block, x)
    with pytest.raises(ValueError, match="backend must be one of"):
        cnnfast.nn.set_backend(block, "tpu")
