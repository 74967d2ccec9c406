"""How exact a network's outputs are, beside PyTorch's own in the same dtype: the numerics policy for whole networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Times PyTorch's own error, at a rank of the channels.
_RMS_BOUNDS = {0.5: 1.5, 0.99: 2.0, 1.0: 3.0}
_LARGEST_BOUNDS = {0.5: 3.0, 1.0: 3.0}
FLOAT64_BOUND = 1e-10  # relative L2 of two networks in float64, where nothing hides behind rounding


@dataclass(frozen=True)
class Error:
    """One measure of the error of an output, relative to its channels' sizes."""

    measure: str  # "rms" or "largest", of a channel
    rank: float  # of the channel among all: 0.5 is the median, 1.0 the worst
    ours: float
    theirs: float
    bound: float

    @property
    def allowed(self) -> bool:
        return self.ours <= self.bound  # not for NaN

    @property
    def part(self) -> float:
        """Of what is allowed; infinite where the error isn't a number, or nothing is allowed."""
        if self.bound > 0 and not math.isnan(self.ours):
            return self.ours / self.bound
        return 0.0 if self.allowed else math.inf


def draw_batch_norms(model: nn.Module, x: Tensor, seed: int = 0) -> None:
    """Affine parameters and running statistics as after training: at initialisation they hide mistakes.

    Statistics are those of each layer's input, moved at random, layer by layer: what lies behind sees activations as
    they will be in eval mode, and they keep their size through the deepest network. Biases are about 1. Around 0, half
    of what a ReLU gets is cut off and its mean is taken away by the next layer, so that each layer enlarges rounding
    1.2 times: in float32 PyTorch's logits of efficientnet_b7 at 65 x 65 were 0.5 off and inception_v4's maps 2e-3; so
    they are 2e-6 and 8e-6.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(norm: Any, inputs: tuple[Tensor]) -> None:
        norm.weight.uniform_(0.5, 1.5, generator=generator)
        norm.bias.normal_(1.0, 0.3, generator=generator)
        var, mean = torch.var_mean(inputs[0], (0, 2, 3))
        moved = torch.empty_like(mean).normal_(0, 0.2, generator=generator) * var.sqrt()
        norm.running_mean.copy_(mean + moved)
        norm.running_var.copy_(var * torch.empty_like(var).uniform_(0.7, 1.5, generator=generator))

    training, hooks = model.training, []
    model.train()  # layer by layer, auxiliary classifiers too
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            hooks.append(module.eval().register_forward_pre_hook(draw))
    with torch.no_grad():
        model(x)
    model.train(training)
    for hook in hooks:
        hook.remove()


def in_float64(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2 distance."""
    return ((ours - theirs).norm() / theirs.norm().clamp_min(torch.finfo(theirs.dtype).tiny)).item()


def errors(outputs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Error]:
    """Of (ours, PyTorch's in the same dtype, float64's) for one or several inputs, against what is allowed.

    Each channel's RMS error is to be at most 1.5 times, its largest error at most 3 times PyTorch's own, plus a tenth
    of a rounding. A channel has few pixels, and PyTorch's error in it is near 0 by luck now and then; so the channels
    are compared as ranked: our median with 1.5 times theirs, the 99th percentile with twice theirs, the worst with 3
    times their worst. A wrong channel is orders of magnitude above either. Logits, of a few images, are one channel.

    Over several inputs these are geometric means. Where a network has gates (squeeze-excite), one input tells less: the
    error of a gate, a single number, is that of a whole channel, and what few of them happen to round to decides.
    PyTorch's own error in one memory format is 0.7 to 1.3 times that in the other (efficientnet_b0, tf_efficientnet_b0
    and se_resnet50 at 224 in float32, drawn statistics, 8 inputs).
    """
    sums: dict[tuple[str, float], list[float]] = {}
    for ours, theirs, ref in outputs:
        if ref.dim() == 2:
            ours, theirs, ref = (t.reshape(1, 1, 1, -1) for t in (ours, theirs, ref))
        rounding = torch.finfo(ours.dtype).eps / 20
        size = _rms(ref)
        size = size.clamp_min(size.median() / 10)  # dead channels have none
        for name, measure, ranks in (("rms", _rms, _RMS_BOUNDS), ("largest", _largest, _LARGEST_BOUNDS)):
            error, own = (measure(output.double() - ref) / size for output in (ours, theirs))
            for rank, factor in ranks.items():
                its = own.quantile(rank).item()
                allowed = factor * its + rounding * measure(ref).div(size).quantile(rank).item()
                products = sums.setdefault((name, rank), [1.0, 1.0, 1.0])
                for n, value in enumerate((error.quantile(rank).item(), its, allowed)):
                    products[n] *= value ** (1 / len(outputs))
    return [Error(name, rank, *means) for (name, rank), means in sums.items()]


def _rms(x: Tensor) -> Tensor:
    return x.square().mean((0, 2, 3)).sqrt()


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax((0, 2, 3))
