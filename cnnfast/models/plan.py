"""A whole network for inference: its blocks' fused functions and its head, joined to as few calls as there can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from cnnfast.nn import FusedModule, GlobalPool, LocalResponseNorm
from cnnfast.nn.fused import NotFusable, only_calls, packings_dropped
from cnnfast.nn.fusion import fuse_pool_and_linear
from cnnfast.nn.recording import Call, record
from cnnfast.nn.sequential import Chain
from cnnfast.nn.watch import watch

_PLAIN = (nn.MaxPool2d, nn.AvgPool2d, LocalResponseNorm)  # layers without weights that are steps of a sequence


class PooledLinear(FusedModule):
    """The modules of a head, average pooling and a linear layer with dropout between, as one block: (N, C, H, W) ->
    (N, num_classes, 1, 1). Not one of the network's modules: it only has their packed form."""

    _is_users = False

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
    """What x goes through; `head` None: the last of `calls` is all of it. `first`: the network's first convolution."""

    def __init__(self, network: FusedModule, calls: Sequence[Callable[..., Any]], head: Call | None, first: Any):
        self.first = first
        self.made_of = [*calls, head]
        self.flatten = head is not None
        self.calls = record([call for call in self.made_of if call is not None], _is_recordable)
        self.children: list[Any] = list(network.modules())[1:]
        self.types: list[Any] = list(map(type, self.children))
        self.forwards = {kind: kind.forward for kind in self.types}
        self.plain: list[Any] = [child for child in self.children if type(child) in _PLAIN]
        self.options = self._options()
        self.watches = [watch([network], network), watch(self.children, network, calls=True)]
        self.packings_dropped = packings_dropped()
        # With a hook or a part in training there are calls that may come to something else every time.
        self.lasting = self._unchanged()

    def __call__(self, x: Tensor) -> Tensor:
        for call in self.calls:
            x = call(x)
        return x.flatten(1) if self.flatten else x

    def is_fresh(self) -> bool:
        """Whether it is sure to be made of what it would be made of now."""
        return self.lasting and self._unchanged()

    def is_of(self, made_of: list[Any]) -> bool:
        return self.made_of == made_of and self.options == self._options()

    def _options(self) -> list[Any]:
        """What layers without weights do, which isn't part of any packing: other layers' functions call them."""
        return [getattr(layer, name) for layer in self.plain for name in ("forward", *layer.__constants__)]

    def _unchanged(self) -> bool:
        return (
            self.packings_dropped == packings_dropped()
            and list(map(type, self.children)) == self.types
            and self._options() == self.options
            and all([kind.forward is forward for kind, forward in self.forwards.items()])
            and not _has_any_global_hook()
            and all([watched.unchanged() for watched in self.watches])
        )


class NetworkChain(Chain):
    """Steps, the head behind them, and the plans that were made of both."""

    def __init__(self, steps: Sequence[tuple[str, Call]], head: PooledLinear):
        super().__init__(steps)
        self.head = head
        self.plans: dict[str, Plan] = {}


def plan_of(network: Any, what: str) -> Plan | None:
    """The whole of "forward", or of forward's "head", for inference; None where layers or blocks are to be called one
    by one: for gradients, for torch.compile, and where somebody looks at single ops."""
    if network.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or _ops_are_watched():
        return None
    packing = network._packing
    plan = None if packing is None else packing.function.plans.get(what)
    return plan if plan is not None and plan.is_fresh() else _made_plan(network, what)


def _made_plan(network: Any, what: str) -> Plan | None:
    """Of what every block says now."""
    chain = network.fused()
    head = None if chain is None else chain.head.fused()
    if chain is None or (what == "head" and head is None):
        return None
    calls = [_direct(call) for _, call in network._calls()] if what == "forward" else []
    if head is None:
        calls.append(network.forward_head)
    plan = chain.plans.get(what)
    if plan is None or not plan.is_of([*calls, head]):
        plan = chain.plans[what] = Plan(network, calls, head, network._first_conv())
    return plan


def _direct(call: Any) -> Any:
    """Of layers without weights what a call comes to."""
    return call.forward if type(call) in _PLAIN and only_calls(call, type(call).forward) else call


def _is_recordable(call: Any) -> bool:
    return type(call) is FunctionType or type(getattr(call, "__self__", None)) in _PLAIN


def _ops_are_watched() -> bool:
    """By a mode (FLOP counters, fake tensors, devices) or the profiler; and autocast works op by op."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.autograd._profiler_enabled()
        or torch.is_autocast_enabled("cpu")
    )
