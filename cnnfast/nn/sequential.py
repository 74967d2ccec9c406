from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from cnnfast.nn.fusable import activation_name, is_activation
from cnnfast.nn.fused import FusedModule, NotFusable
from cnnfast.nn.fusion import fuse_conv2d, fuse_pointwise_conv2d
from cnnfast.nn.layers import PointwiseConv2d
from cnnfast.nn.sync_batch_norm import BATCH_NORMS
from cnnfast.nn.training import block

Call = Callable[[Tensor], Tensor]


class Chain:
    """Named functions, one after the other; a name is that of the layer whose output its function returns."""

    def __init__(self, steps: Sequence[tuple[str, Call]]):
        self.steps = steps

    def __call__(self, x: Tensor) -> Tensor:
        for _, call in self.steps:
            x = call(x)
        return x


class FusedSequential(FusedModule, nn.Sequential):
    """nn.Sequential, in which for inference each run of convolution (, BN) (, activation) is one call.

    (N, C, H, W) -> what its last layer makes. Keys as nn.Sequential's, so that networks whose layers lie flat in one
    (AlexNet, VGG) keep the keys of their checkpoints. The first convolution's output is channels_last.
    """

    def layers(self, x: Tensor) -> Tensor:
        return nn.Sequential.forward(self, x)

    def fuse(self) -> Chain:
        steps: list[tuple[str, Call]] = []
        for run in runs(list(self.named_children())):
            call = fuse_run([layer for _, layer in run], self.backend, channels_last=not steps)
            steps.append((run[-1][0], call))
        return Chain(steps)

    def fuse_training(self) -> Chain:
        steps = [
            (run[-1][0], train_run([layer for _, layer in run], self.backend)) for run in runs([*self.named_children()])
        ]
        return Chain(steps)

    def folded_modules(self) -> list[nn.Module]:
        """Its convolutions with what follows them; other layers are called, and may be in any state."""
        layers = list(self.named_children())
        return [self, *(layer for run in runs(layers) if _is_conv(run[0][1]) for _, layer in run)]


def runs(layers: Sequence[tuple[str, nn.Module]]) -> Iterator[list[tuple[str, nn.Module]]]:
    """Convolutions with the BN and the activation that follow them; every other layer by itself."""
    run: list[tuple[str, nn.Module]] = []
    for name, layer in layers:
        fits = bool(run) and _is_conv(run[0][1]) and _follows(run[-1][1], layer)
        if run and not fits:
            yield run
            run = []
        run.append((name, layer))
    if run:
        yield run


def _is_conv(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d)


def _follows(last: nn.Module, layer: nn.Module) -> bool:
    if isinstance(layer, BATCH_NORMS):
        return _is_conv(last)
    return is_activation(layer) and (_is_conv(last) or isinstance(last, BATCH_NORMS))


def fuse_run(layers: Sequence[nn.Module], backend: str, **options: Any) -> Callable[..., Tensor]:
    """One call for a convolution (, BN) (, activation), which takes a `residual`, too, added before the activation; a
    layer that isn't a convolution calls itself."""
    conv, *rest = layers
    if not _is_conv(conv):
        if rest:
            raise NotFusable(f"{type(conv).__name__} isn't a convolution")
        return conv
    bn = rest.pop(0) if rest and isinstance(rest[0], BATCH_NORMS) else None
    activation = activation_name(rest.pop(0)) if rest else None
    if rest:
        raise NotFusable(f"the kernels don't fuse {type(rest[0]).__name__} after an activation")
    options.update(activation=activation, backend=backend)
    if isinstance(conv, PointwiseConv2d):
        options.pop("channels_last", None)
        return fuse_pointwise_conv2d(conv, bn, **options)
    return fuse_conv2d(conv, bn, **options)


def train_run(layers: Sequence[nn.Module], backend: str) -> Call:
    """What `fuse_run` is in training: convolution, BN (, activation) one after the other, two passes over memory; other
    layers call themselves."""
    conv, *rest = layers
    if not _is_conv(conv) or not rest or not isinstance(rest[0], BATCH_NORMS):
        return Chain([("", layer) for layer in layers])
    bn, *activation = rest
    return block([(conv, bn, activation[0] if activation else None)], None, None, backend)
