"""Comparing a network with a build of plain layers: a function plain(state, x) that returns the feature maps and then
the logits, where `state` is the network's state dict. It is written from the paper, with torch's functions."""

import torch
import torch.nn.functional as F
from networks import assert_as_exact_over, relative
from torch import nn


def drawn(network: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that keep the size of activations through the network, and biases, as after training: at initialisation
    these are 0, or so much larger than the sums that they are added to that they hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=generator)
            elif parameter.dim() > 1:
                parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=generator)
            else:
                parameter.uniform_(0.2, 0.6, generator=generator)
    return network


def outputs_of(network: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    last, maps = network.forward_intermediates(x)
    return [*maps, network.forward_head(last)]


def assert_same(ours: nn.Module, plain, shapes) -> None:
    """For inference and, layer by layer, in training, in float64, where nothing hides behind rounding."""
    ours.double().eval()
    state = ours.state_dict()
    for shape in shapes:
        x = torch.randn(shape, dtype=torch.float64)
        with torch.no_grad():
            compare(outputs_of(ours, x), plain(state, x))
    theirs = {key: value.detach().clone().requires_grad_() for key, value in ours.named_parameters()}
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    got, expected = outputs_of(ours.train(), inputs[0]), plain(state | theirs, inputs[1])
    compare(got, expected)
    grads = [torch.randn_like(output) for output in got]
    torch.autograd.backward(got, grads)
    torch.autograd.backward(expected, grads)
    assert relative(inputs[0].grad, inputs[1].grad) <= 1e-9
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, theirs[name].grad) <= 1e-9, name


def compare(got, expected) -> None:
    assert [tuple(output.shape) for output in got] == [tuple(output.shape) for output in expected]
    for ours, theirs in zip(got, expected, strict=True):
        assert relative(ours, theirs) <= 1e-11


def assert_as_exact_as_plain(ours: nn.Module, plain, shapes, dtype: torch.dtype) -> None:
    """The numerics policy, each output over all shapes. Both in channels_last, in which ours runs whatever x's layout:
    there PyTorch's own error in float32 is up to four times that of its blocked sums in NCHW (3 x 3, 512 channels: 5e-7
    and 1.2e-7; ours 1.8e-7)."""
    ours.to(dtype).eval()
    state = ours.to(memory_format=torch.channels_last).state_dict()
    exact = {key: value.double() if value.is_floating_point() else value for key, value in state.items()}
    outputs = []
    for shape in shapes:
        x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            triples = zip(outputs_of(ours, x), plain(state, x), plain(exact, x.double()), strict=True)
            outputs.append(list(triples))
    for stage in zip(*outputs, strict=True):
        assert_as_exact_over(list(stage))


def response_normalised(x: torch.Tensor) -> torch.Tensor:
    """AlexNet's formula (section 3.3): in float64 as it stands there, with alpha 1e-4; in others by torch, which
    divides alpha by the five channels, and has no bfloat16 here."""
    if x.dtype != torch.float64:
        return F.local_response_norm(x.float(), 5, alpha=5e-4, beta=0.75, k=2).to(x.dtype)
    squares = F.pad(x.square(), (0, 0, 0, 0, 2, 2))
    around = sum(squares[:, j : j + x.shape[1]] for j in range(5))
    return x / (2 + 1e-4 * around) ** 0.75
