"""What tests of modules and networks share: drawn batch normalisation, recording of ops, the networks' numerics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cnnfast.models.registry import list_models, model_entry


def one_of_each_family() -> set[str]:
    """Of each family (file) of networks the one with the shortest name."""
    families: dict[str, list[str]] = {}
    for name in list_models():
        families.setdefault(model_entry(name).factory.__module__, []).append(name)
    return {min(family, key=lambda name: (len(name), name)) for family in families.values()}


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
    """The numerics policy for a network's output: against float64, each channel's RMS error is at most 1.5 times, its
    largest error at most 3 times PyTorch's own in the same dtype, plus a tenth of a rounding.

    Errors are relative to the channel's size. A channel has few pixels here, and PyTorch's error in it is near 0 by
    luck now and then; so the channels are compared as ranked: our median with 1.5 times theirs, the 99th percentile
    with twice theirs, the worst with 3 times their worst. A wrong channel is orders of magnitude above either.
    """
    assert_as_exact_over([(ours, theirs, ref)])


def assert_as_exact_over(outputs: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """The same for several inputs, by the geometric means of the errors over them.

    Where a network has gates (squeeze-excite), one input tells little: the error of a gate, a single number, is that of
    a whole channel, and what few of them happen to round to decides. PyTorch's own error in one memory format is 0.4 to
    2.7 times that in the other (tf_efficientnet_b0 and efficientnet_b0 at 224, 24 inputs).
    """
    got, bound = _mean_errors(outputs)
    for at, error in got.items():
        assert error <= bound[at], f"{at[0]} error of the channel at rank {at[1]}: {error:.3g}, bound {bound[at]:.3g}"


def _mean_errors(outputs: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[dict, dict]:
    """Ours and the bound, by (measure, rank)."""
    got: dict[tuple[str, float], float] = {}
    bound: dict[tuple[str, float], float] = {}
    for ours, theirs, ref in outputs:
        assert ours.dtype == theirs.dtype and ref.dtype == torch.float64 and ours.shape == theirs.shape == ref.shape
        if ref.dim() == 2:  # logits, of a few images: one channel
            ours, theirs, ref = (t.reshape(1, 1, 1, -1) for t in (ours, theirs, ref))
        rounding = torch.finfo(ours.dtype).eps / 20
        size = _rms(ref)
        size = size.clamp_min(size.median() / 10)  # dead channels have none
        for measure, ranks in ((_rms, {0.5: 1.5, 0.99: 2.0, 1.0: 3.0}), (_largest, {0.5: 3.0, 1.0: 3.0})):
            error, own = (measure(output.double() - ref) / size for output in (ours, theirs))
            for rank, factor in ranks.items():
                at = measure.__name__, rank
                allowed = factor * own.quantile(rank) + rounding * measure(ref).div(size).quantile(rank)
                got[at] = got.get(at, 1.0) * error.quantile(rank).item() ** (1 / len(outputs))
                bound[at] = bound.get(at, 1.0) * allowed.item() ** (1 / len(outputs))
    return got, bound


def assert_same_gradients(
    ours: nn.Module, theirs: nn.Module, tolerance: float, keys: Mapping[str, str] | None = None
) -> None:
    """Relative L2, parameter by parameter. Some are 0 but for rounding (of a bias before batch normalisation): what is
    less than 1e-4 of all gradients together counts as that. `keys`: the names of ours in theirs, where they differ."""
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    total = torch.stack([grad.norm() for grad in expected.values()]).norm().item()
    for name, parameter in ours.named_parameters():
        grad = expected[keys[name] if keys else name].reshape(parameter.shape)
        assert (parameter.grad - grad).norm().item() <= tolerance * max(grad.norm().item(), 1e-4 * total), name


def _rms(x: Tensor) -> Tensor:
    return x.square().mean((0, 2, 3)).sqrt()


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax((0, 2, 3))
