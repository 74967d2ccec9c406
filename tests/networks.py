"""What tests of modules and networks share: drawn batch normalisation, recording of ops, the networks' numerics."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """Names of the cnnfast ops that run inside the with block, in order, less packing and folding."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "cnnfast" and not name.startswith("pack_"):
            self.ops.append(name)
        return function(*args, **(kwargs or {}))


def ops_of(function: Callable, *args) -> list[str]:
    with Recorder() as recorder:
        function(*args)
    return recorder.ops


def draw_batch_norms(model: nn.Module, x: Tensor, seed: int = 0) -> None:
    """Affine parameters and running statistics as after training: at initialisation they hide mistakes.

    Statistics are those of x, so that activations keep their size through the network, and then moved at random.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5, generator=generator)
            norm.bias.normal_(0, 0.3, generator=generator)
            norm.momentum = 1.0
        training = model.training
        model.train()(x)
        model.train(training)
        for norm in norms:
            norm.momentum = 0.1
            noise = torch.empty_like(norm.running_mean).normal_(0, 0.2, generator=generator)
            norm.running_mean.add_(noise * norm.running_var.sqrt())
            norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.7, 1.5, generator=generator))


def in_float64(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2 distance."""
    return ((ours - theirs).norm() / theirs.norm().clamp_min(torch.finfo(theirs.dtype).tiny)).item()


def assert_as_exact_as(ours: Tensor, theirs: Tensor, ref: Tensor) -> None:
    """The numerics policy for a network's output: per channel, our RMS error against float64 is at most 1.5 times, our
    largest at most 3 times PyTorch's own in the same dtype, plus a tenth of a rounding.

    PyTorch's own is estimated from few pixels, and by luck near 0 in some channels: the larger of the channel's and of
    what the median channel's relative error makes of this one.
    """
    assert ours.dtype == theirs.dtype and ref.dtype == torch.float64 and ours.shape == theirs.shape == ref.shape
    rounding = torch.finfo(ours.dtype).eps / 20
    axes = [axis for axis in range(ref.dim()) if axis != 1] if ref.dim() == 4 else [0, 1]  # logits: one channel
    for measure, factor in ((_rms, 1.5), (_largest, 3.0)):
        size = measure(ref, axes)
        own = measure(theirs.double() - ref, axes)
        typical = (own / size.clamp_min(torch.finfo(torch.float32).tiny)).median()
        bound = factor * torch.maximum(own, typical * size) + rounding * size
        error = measure(ours.double() - ref, axes)
        worst = (error / bound.clamp_min(torch.finfo(torch.float64).tiny)).max().item()
        assert worst <= 1, f"{measure.__name__} error of a channel is {worst:.2f} times the bound"


def _rms(x: Tensor, axes: list[int]) -> Tensor:
    return x.square().mean(axes).sqrt()


def _largest(x: Tensor, axes: list[int]) -> Tensor:
    return x.abs().amax(axes)
