"""A whole network for inference: its blocks' fused functions and its head, joined to as few calls as there can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from cnnfast.nn import FusedModule, GlobalPool
from cnnfast.nn.fused import NotFusable
from cnnfast.nn.fusion import fuse_pool_and_linear
from cnnfast.nn.recording import Call, record


class PooledLinear(FusedModule):
    """The modules of a head, average pooling and a linear layer with dropout between, as one block: (N, C, H, W) ->
    (N, num_classes, 1, 1). Not one of the network's modules: it only has their packed form."""

    def __init__(self, modules: Sequence[nn.Module], backend: str):
        super().__init__()
        for n, module in enumerate(modules):
            self.add_module(str(n), module)
        self.training = False
        self.backend = backend

    def fuse(self) -> Call:
        pool, *rest = [module for child in self.children() for module in child.modules()]
        if type(pool) is not GlobalPool or pool.pool_type != "avg":
            raise NotFusable(f"{pool} isn't average pooling")
        layers = [module for module in rest if type(module) not in (nn.Sequential, nn.Dropout)]
        if len(layers) != 1 or type(layers[0]) is not nn.Linear:
            raise NotFusable(f"{layers} isn't one linear layer")
        return fuse_pool_and_linear(layers[0], self.backend)


class Plan:
    """What x goes through; the last call may be the head's."""

    def __init__(self, calls: Sequence[Callable[..., Any]], head: Call | None, flatten: bool):
        self.made_of = [*calls, head]
        self.flatten = flatten
        self.calls = record([*calls, *([] if head is None else [head])], lambda call: type(call) is FunctionType)

    def __call__(self, x: Tensor) -> Tensor:
        for call in self.calls:
            x = call(x)
        return x.flatten(1) if self.flatten else x


def wanted() -> bool:
    """Whether nobody looks at single ops: modes (FLOP counters, fake tensors, devices), the profiler; nor autocast,
    which works op by op."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.autograd._profiler_enabled()
        or torch.is_autocast_enabled("cpu")
    )
