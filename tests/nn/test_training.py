"""Training of each block beside the same layers of torch.nn, in every state that training has.

In float64, over some steps of SGD: outputs, gradients, parameters, running statistics, then inference. Fails if a mode
of batch normalisation is treated as another, if what wants to see a layer (hooks, parametrizations) doesn't, or if eval
mode uses weights or statistics from before.
"""

import copy
import functools

import pytest
import torch
from blocks import BLOCKS, SHAPE, Twin, pair
from networks import assert_as_exact_as, assert_same_gradients, in_float64, relative
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

LAST_CONV = {
    "conv": "conv",
    "pointwise": "conv",
    "separable": "conv_pw",
    "inverted": "conv_pwl",
    "bottleneck": "conv.2",
}


def norms(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]


def set_all(**attributes):
    def change(module):
        for norm in norms(module):
            for name, value in attributes.items():
                setattr(norm, name, value)

    return change


def without_statistics(module):
    for norm in norms(module):
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def without_affine(module):
    for norm in norms(module):
        norm.weight = norm.bias = None


def frozen_statistics(module):
    for norm in norms(module):
        norm.eval()


def first_frozen(module):
    norms(module)[0].eval().requires_grad_(False)


def frozen_parameters(module):
    """What is trained is the last layer's."""
    module.requires_grad_(False)
    norms(module)[-1].requires_grad_(True)


STATES = {
    "as made": lambda module: None,
    "momentum": set_all(momentum=0.37),
    "cumulative": set_all(momentum=None),
    "untracked": without_statistics,  # made with track_running_stats=False
    "no longer tracked": set_all(track_running_stats=False),  # buffers stay
    "without affine": without_affine,
    "frozen statistics": frozen_statistics,
    "first frozen": first_frozen,
    "frozen parameters": frozen_parameters,
}


def assert_trains_alike(ours, plain, x, tolerance=1e-9, steps=3, call=lambda module, x: module(x)):
    """`steps` of SGD, and a look at eval mode after each."""
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1, 0.9) for m in (ours, plain)]
    modes = [[(module, module.training) for module in m.modules()] for m in (ours, plain)]
    for step in range(steps):
        inputs = [(x * (1 + step)).clone().requires_grad_() for _ in range(2)]
        outputs = [call(m, i) for m, i in zip((ours, plain), inputs, strict=True)]
        assert relative(*outputs) <= tolerance
        grad = torch.randn_like(outputs[0])
        for optimizer, output in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            output.backward(grad)
        assert relative(inputs[0].grad, inputs[1].grad) <= tolerance
        trained = {name for name, p in plain.named_parameters() if p.grad is not None}
        assert trained == {name for name, p in ours.named_parameters() if p.grad is not None}
        if len(trained) == len(list(plain.named_parameters())):
            assert_same_gradients(ours, plain, tolerance)
        for optimizer in optimizers:
            optimizer.step()
        theirs = plain.state_dict()
        assert theirs.keys() == ours.state_dict().keys()
        for key, value in ours.state_dict().items():
            assert relative(value.double(), theirs[key].double()) <= tolerance, key
        with torch.no_grad():
            assert relative(ours.eval()(x), plain.eval()(x)) <= tolerance
        for module, mode in (one for both in modes for one in both):
            module.training = mode


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", BLOCKS)
def test_states(name, state):
    plain, ours = pair(name)
    for module in (plain, ours):
        STATES[state](module)
    assert_trains_alike(ours, plain, torch.randn(SHAPE, dtype=torch.float64))


@pytest.mark.parametrize("name", BLOCKS)
def test_one_value_per_channel(name):
    """Raises as PyTorch does, and again with the next batch if that is as small; eval mode takes it."""
    plain, ours = pair(name)
    x = torch.randn(1, 6, 1, 1, dtype=torch.float64)
    for _ in range(2):
        messages = []
        for module in (plain, ours):
            with pytest.raises(ValueError, match="more than 1 value per channel when training") as error:
                module(x)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
    with torch.no_grad():
        assert relative(ours.eval()(x), plain.eval()(x)) <= 1e-9
    assert_trains_alike(ours.train(), plain.train(), torch.randn(2, 6, 1, 1, dtype=torch.float64))


@pytest.mark.parametrize("name", BLOCKS)
def test_channels_last_end_to_end(name):
    """Results and gradients of x have the layout of x, and the values of the other."""
    _, ours = pair(name)
    x, grads = torch.randn(SHAPE, dtype=torch.float64), []
    grad = torch.randn_like(copy.deepcopy(ours)(x))
    for layout in (torch.channels_last, torch.contiguous_format):
        part = x.clone(memory_format=layout).requires_grad_()
        y = copy.deepcopy(ours)(part)
        y.backward(grad.contiguous(memory_format=layout))
        assert y.is_contiguous(memory_format=layout) and part.grad.is_contiguous(memory_format=layout)
        grads.append(part.grad)
    assert relative(*grads) <= 1e-12


@pytest.mark.parametrize("name", BLOCKS)
def test_autocast(name):
    """bfloat16 as PyTorch's autocast: of parameters, statistics and their gradients in float32 what is as exact. Few
    numbers are near the exact ones by luck now and then: over 8 draws."""
    errors = {}
    for _ in range(8):
        plain, ours = pair(name, torch.float32)
        exact, x = in_float64(plain).train(), torch.randn(64, 6, 9, 7)
        results = []
        grad = torch.randn_like(ours.eval()(x).detach())
        for module in (ours.train(), plain, exact):
            part = x.to(next(module.parameters()).dtype, copy=True).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=module is not exact):
                y = module(part)
            y.backward(grad.to(y.dtype))
            grads = {f"{n} gradient": p.grad for n, p in module.named_parameters()}
            results.append((y.detach(), part.grad, grads | dict(module.named_buffers())))
        (y, grad_x, values), theirs, ref = results
        assert y.dtype == theirs[0].dtype and grad_x.dtype == torch.float32
        assert_as_exact_as(y, theirs[0], ref[0])
        assert_as_exact_as(grad_x, theirs[1], ref[1])
        for key, value in values.items():
            assert value.dtype == theirs[2][key].dtype, key
            pairs = (relative(v.double(), ref[2][key].double()) for v in (value, theirs[2][key]))
            errors.setdefault(key, []).append(torch.tensor(list(pairs)))
    for key, found in errors.items():
        error, bound = torch.stack(found).mean(0)
        assert error <= 2 * bound + 2**-9, key


def test_grad_scaler():
    """Steps with a scaled loss are those without; one whose gradients overflow is left out."""
    plain, ours = pair("inverted")
    x, scaler = torch.randn(SHAPE, dtype=torch.float64), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (ours, plain)]
    scaler.scale(ours(x).square().mean()).backward()
    plain(x).square().mean().backward()
    scaler.step(optimizers[0])
    optimizers[1].step()
    scaler.update()
    for (key, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert relative(p, q) <= 1e-9, key
    before = copy.deepcopy(ours.state_dict())
    scaler.scale((ours(x) * torch.inf).sum()).backward()
    scaler.step(optimizers[0])
    scaler.update()
    assert scaler.get_scale() == 2.0**9 and torch.equal(ours.conv_pw.weight, before["conv_pw.weight"])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_checkpoint(name, use_reentrant):
    """torch.utils.checkpoint around a block: the gradients of the whole graph, statistics moved twice as PyTorch's."""
    plain, ours = pair(name)
    call = functools.partial(checkpoint, use_reentrant=use_reentrant)
    assert_trains_alike(ours, plain, torch.randn(SHAPE, dtype=torch.float64), call=call)


@pytest.mark.parametrize("name", LAST_CONV)
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "own"])
def test_parametrizations(name, kind):
    """The parameters behind the weight are trained; removed again, the block is fused with what they made of it."""
    plain, ours = pair(name)
    for module in (plain, ours):
        torch.manual_seed(4)
        conv = module.get_submodule(LAST_CONV[name])
        if kind == "own":
            parametrize.register_parametrization(conv, "weight", Doubled())
        else:
            getattr(parametrizations, kind)(conv)
    assert_trains_alike(ours, plain, torch.randn(SHAPE, dtype=torch.float64))
    for module in (plain, ours):
        parametrize.remove_parametrizations(module.get_submodule(LAST_CONV[name]), "weight")
    x = torch.randn(SHAPE, dtype=torch.float64)
    with torch.no_grad():
        assert relative(ours.eval()(x), plain.eval()(x)) <= 1e-9
    assert ours._packing is not None


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("name", LAST_CONV)
def test_pruning(name):
    plain, ours = pair(name)
    for module in (plain, ours):
        torch.manual_seed(4)
        prune.random_unstructured(module.get_submodule(LAST_CONV[name]), "weight", 0.5)
    assert_trains_alike(ours, plain, torch.randn(SHAPE, dtype=torch.float64))


def watched(module):
    """Everything that hooks on leaves and parameters see of one step, by name."""
    seen = {}
    for name, layer in module.named_modules():
        if name and next(layer.children(), None) is None:
            layer.register_forward_pre_hook(lambda m, args, name=name: seen.update({f"{name} in": args[0].clone()}))
            layer.register_forward_hook(lambda m, args, y, name=name: seen.update({f"{name} out": y.clone()}))
            layer.register_full_backward_hook(
                lambda m, gx, gy, name=name: seen.update({f"{name} grad": gx[0], f"{name} grad out": gy[0]})
            )
    for name, parameter in module.named_parameters():
        parameter.register_hook(lambda grad, name=name: seen.update({f"{name} tensor": grad}))
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: seen.update({f"{name} after": p.grad.clone()})
        )
    return seen


@pytest.mark.parametrize("name", [name for name in BLOCKS if "excite" not in name])
def test_hooks(name):
    """Every layer's hooks, forward and backward, are called with what PyTorch's are."""
    plain, ours = pair(name)
    for module in (*plain.modules(), *ours.modules()):
        if hasattr(module, "inplace"):
            module.inplace = False  # torch refuses full backward hooks beside in-place layers
    seen = [watched(module) for module in (ours, plain)]
    x = torch.randn(SHAPE, dtype=torch.float64)
    for module in (ours, plain):
        module(x.clone().requires_grad_()).square().sum().backward()
    assert seen[1].keys() <= seen[0].keys()
    for key, value in seen[1].items():
        assert relative(seen[0][key], value) <= 1e-9 or value.norm() < 1e-9, key


def test_hooks_may_change_what_passes():
    plain, ours = pair("inverted")
    for module in (plain, ours):
        module.bn1.register_forward_hook(lambda m, args, y: y * 1.5)
        module.conv_dw.register_forward_pre_hook(lambda m, args: (args[0] + 0.25,))
        module.conv_pwl.weight.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
    assert_trains_alike(ours, plain, torch.randn(SHAPE, dtype=torch.float64))


@pytest.mark.parametrize("optimizer", [dict(fused=True), dict(foreach=True)])
@pytest.mark.parametrize("name", BLOCKS)
def test_eval_after_steps_of_other_optimizers(name, optimizer):
    """Fused ones change weights without counting a version."""
    _, ours = pair(name, torch.float32)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        before = ours.eval()(x)
    stepper = torch.optim.AdamW(ours.parameters(), 0.05, **optimizer)
    ours.train()(x).square().sum().backward()
    stepper.step()
    with torch.no_grad():
        after = ours.eval()(x)
        expected = Twin(ours).double().eval()(x.double())
    assert relative(after.double(), expected) <= 1e-5 and relative(before, after) > 1e-2


def test_weight_averaging():
    """torch.optim.swa_utils: an averaged copy, whose statistics update_bn makes anew (momentum None for a while)."""
    plain, ours = pair("inverted")
    batches = [torch.randn(SHAPE, dtype=torch.float64) for _ in range(3)]
    averages = []
    for module in (ours, plain):
        average = torch.optim.swa_utils.AveragedModel(module)
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for x in batches:
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
            average.update_parameters(module)
        with torch.no_grad():
            average.eval()(batches[0])
        torch.optim.swa_utils.update_bn(batches, average)
        averages.append(average.eval())
    with torch.no_grad():
        assert relative(averages[0](batches[0]), averages[1](batches[0])) <= 1e-9
