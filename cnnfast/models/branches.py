"""What Inception modules are made of: convolutions with batch normalisation, branches side by side, and classifiers on
the way that train them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnnfast.models.network import Network
from cnnfast.nn import ConvBN, FusedModule
from cnnfast.nn.sequential import Call, Chain

Ends = tuple[str, ...]
Branch = Sequence[str | Ends]


def conv_bn(
    in_channels: int,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    stride: int = 1,
    padding: int | tuple[int, int] | None = None,
    **options: Any,
) -> ConvBN:
    """A ConvBN of eps 1e-3, ReLU; `padding` None keeps the size where the stride is 1, and is 0 where it is 2."""
    if padding is None:
        rows, columns = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        padding = (rows // 2, columns // 2) if stride == 1 else 0
    return ConvBN(in_channels, out_channels, kernel_size, stride, padding, eps=1e-3, **options)


def conv_chain(in_channels: int, *convs: tuple[Any, ...], **options: Any) -> nn.Sequential:
    """conv_bn's, one after the other; of each the arguments after in_channels."""
    layers = nn.Sequential()
    for out_channels, *geometry in convs:
        layers.append(conv_bn(in_channels, out_channels, *geometry, **options))
        in_channels = out_channels
    return layers


class Branches(FusedModule):
    """What several branches make of x, side by side: (N, C, H, W) -> (N, sum of their channels, H', W').

    For inference each convolution is one call, with what follows it.

    Args:
        modules: the layers by name; their keys.
        branches: of each the names of its layers, in the order of calls and of the result; a tuple at the end: layers
            that read the same map, whose outputs lie side by side too. None: each layer is a branch.
    """

    def __init__(self, modules: Mapping[str, nn.Module], branches: Sequence[Branch] | None = None):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.branches: Sequence[Branch] = [[name] for name in modules] if branches is None else branches

    def layers(self, x: Tensor) -> Tensor:
        return self._side_by_side(self.get_submodule)(x)

    def fuse(self) -> Call:
        return self._side_by_side(lambda name: fused_call(self.get_submodule(name)))

    def _side_by_side(self, call_of: Callable[[str], Call]) -> Call:
        branches = []
        for *names, last in self.branches:
            ends = last if isinstance(last, tuple) else (last,)
            branches.append(([call_of(str(name)) for name in names], [call_of(end) for end in ends]))

        def call(x: Tensor) -> Tensor:
            outputs = []
            for calls, ends in branches:
                y = x
                for one in calls:
                    y = one(y)
                outputs += [end(y) for end in ends]
            return torch.cat(outputs, 1)

        return call


def fused_call(module: nn.Module) -> Call:
    """What a layer of a block comes to for inference."""
    if isinstance(module, FusedModule):
        return module.fuse()
    if type(module) is nn.Sequential:
        return Chain([(name, fused_call(child)) for name, child in module.named_children()])
    return module


class AuxiliaryNetwork(Network):
    """A Network with `aux_logits`: classifiers on the way, which pass gradients to the layers before them.

    In training, with aux_logits, forward returns `outputs`: the logits and theirs. They play no part in inference. A
    subclass defines `auxiliary` and `outputs`, and sets each of the classifiers, None without aux_logits.
    """

    auxiliary: tuple[tuple[str, str, str], ...]  # (layer, classifier on its output, its field of `outputs`)
    outputs: Callable[..., tuple[Tensor, ...]]  # a namedtuple with the field `logits`
    aux_logits: bool
    published_options = {"aux_logits": True}  # noqa: RUF012
    aux_sizes: tuple[int, int] = (1, 1 << 30)  # least and largest height and width of x that the classifiers take

    def forward(self, x: Tensor) -> Any:
        if not (self.aux_logits and self.training):
            return super().forward(x)
        self._check_input(x, self._first_conv())
        least, largest = self.aux_sizes
        if min(x.shape[2:]) < least or max(x.shape[2:]) > largest:
            raise ValueError(
                f"x must be {least} to {largest} high and wide for the auxiliary classifiers, got shape"
                f" {tuple(x.shape)}"
            )
        y, maps = self._run(x, [layer for layer, _, _ in self.auxiliary])
        found = {field: getattr(self, name)(maps[layer]) for layer, name, field in self.auxiliary}
        return self.outputs(logits=self.forward_head(y), **found)

    @property
    def classifiers(self) -> tuple[str, ...]:
        present = [(name, getattr(self, name)) for _, name, _ in self.auxiliary]
        return (self.classifier_name, *(f"{name}.{aux.classifier_name}" for name, aux in present if aux is not None))

    def keep_features(self, out_indices: int | Sequence[int] | None = None) -> None:
        self.aux_logits = False
        for _, name, _ in self.auxiliary:
            setattr(self, name, None)
        super().keep_features(out_indices)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Also of the auxiliary classifiers."""
        super().reset_classifier(num_classes, global_pool)
        for _, name, _ in self.auxiliary:
            classifier = getattr(self, name)
            if classifier is not None:
                classifier.reset_classifier(num_classes)
                classifier.train(self.training)
