"""Modules with two forms: for training layer by layer, or fused where the block says how (`fuse_training`); for
inference one packed kernel call.

A packing is a copy of the weights, so it must never outlive them. It is dropped by train() and eval(), by whatever goes
through `_apply` (to, cuda, half, ...), by load_state_dict, by a grad-enabled forward, and isn't carried by deepcopy or
pickle; what writes to parameters without any of these is seen by the check before each call (`_Packing.is_fresh`), or
else, `p.data.mul_(2)` and fused optimisers inside torch.no_grad(), wants `cnnfast.repack(model)`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from cnnfast.nn.sync_batch_norm import BATCH_NORMS
from cnnfast.nn.watch import HOOKS, watch
from cnnfast.ops.backends import BACKENDS

_log = logging.getLogger("cnnfast")
_drops = 0  # of packings, anywhere
_PLAIN_TENSORS = (Tensor, nn.Parameter)  # others (DTensor, quantised ones, ...) have no storage for kernels to read


def only_calls(module: nn.Module, forward: Any) -> bool:
    """Whether calling `module` does nothing but `forward`: no hook sees the call, nothing has been put around it."""
    return (
        type(module).forward is forward
        and "forward" not in vars(module)
        and module._compiled_call_impl is None
        and not any([getattr(module, attribute) for attribute in HOOKS])
        and not _has_any_global_hook()
    )


class NotFusable(Exception):
    """Why a block runs layer by layer: raised by `fuse`, logged, never seen by users."""


class FusedModule(nn.Module):
    """Base of every block that has a packed form.

    A subclass defines `layers(x)`, the differentiable form made of its children, and `fuse()`, which folds and packs
    the children's weights and returns the function that replaces `layers` in eval mode with grad disabled. It may
    define `fuse_training()`, which returns the one that replaces `layers` in training mode: differentiable, it reads
    the children's parameters and moves their running statistics at each call.

    torch.compile and torch.export record the folding and packing as ops on the parameters: a compiled network follows
    its weights. Inductor's freezing and AOTInductor compute them once; without freezing every call packs anew.

    The block is the unit for hooks, FSDP and parametrizations: the fused form doesn't call the children. Where a child
    carries a hook or a parametrization, or is of a kind that can't be folded, `layers` runs, and that is logged once.
    """

    _packing: _Packing | None = None
    _is_users: bool = True  # who is told why it runs layer by layer
    backend: str = "auto"

    def layers(self, *args: Any) -> Any:
        raise NotImplementedError

    def fuse(self) -> Any:
        raise NotImplementedError

    def fuse_training(self) -> Any:
        raise NotFusable("it has no such form")

    def folded_modules(self) -> list[nn.Module]:
        """The modules whose parameters `fuse` reads: by default the block and everything in it."""
        return list(self.modules())

    def forward(self, *args: Any) -> Any:
        return (self.fused() or self.training_form() or self.layers)(*args)

    def fused(self) -> Any:
        """What `fuse` returned, made anew if the weights changed; None where `layers` is to run."""
        if self.training or torch.is_grad_enabled() or self.backend == "reference":  # which has no packed form
            self.drop_packing()
            return None
        if torch.compiler.is_compiling():  # recorded as ops on the parameters, which freezing folds; nothing is cached
            return self._recorded()
        packing = self._packing
        if packing is None or not packing.is_fresh():
            packing = self._packing = self._pack()
        return None if packing is None else packing.function

    def training_form(self) -> Any:
        """What `fuse_training` returns; None where `layers` is to run, and in eval mode."""
        if not self.training or self.backend == "reference" or _has_any_global_hook():
            return None
        if type(self).fuse_training is FusedModule.fuse_training:
            return None
        reason = self._obstacle(training=True)  # before a weight is read: a parametrized one is computed at each look
        if reason is None:
            try:
                return self.fuse_training()
            except NotFusable as error:
                reason = str(error)
        if self._is_users and not torch.compiler.is_compiling():
            _log_once(f"{type(self).__name__} trains layer by layer: {reason}")
        return None

    def direct(self) -> Callable[..., Any]:
        """What a call of the block comes to now, for a network that looks at all its blocks before it runs the first.

        Between kernels, which sweep the caches, a packing is checked in twice the time that it takes after another.
        """
        if torch.compiler.is_compiling() or not only_calls(self, FusedModule.forward):
            return self
        return self.fused() or self.training_form() or self.layers

    def drop_packing(self) -> None:
        global _drops
        if self._packing is not None:
            self._packing = None
            _drops += 1

    def _recorded(self) -> Any:
        if self._obstacle():
            return None
        try:
            return self.fuse()
        except NotFusable:
            return None

    def _pack(self) -> _Packing | None:
        reason = self._obstacle()
        if reason is None:
            try:
                # outside inference mode: its tensors could not be used in a later grad-enabled call
                with torch.inference_mode(False), torch.no_grad():
                    return _Packing(self)
            except NotFusable as error:
                reason = str(error)
        if self._is_users:
            _log_once(f"{type(self).__name__} runs layer by layer: {reason}")
        return None

    def _obstacle(self, training: bool = False) -> str | None:
        for module in self.folded_modules():
            reason = _obstacle(module, module is not self, training)
            if reason:
                return reason
        return None

    # Everything below drops the packing.

    def train(self, mode: bool = True) -> FusedModule:
        self.drop_packing()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> FusedModule:
        self.drop_packing()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # called for each module of a loaded parent too
        self.drop_packing()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:  # deepcopy and pickle
        return {name: value for name, value in self.__dict__.items() if name != "_packing"}

    def _replicate_for_data_parallel(self) -> FusedModule:
        replica = super()._replicate_for_data_parallel()
        replica._packing = None
        return replica


class _Packing:
    """A fused function, and what tells whether it is still that of the weights: asked before every call."""

    def __init__(self, block: FusedModule):
        self.function: Callable[..., Any] = block.fuse()
        self.watch = watch(block.folded_modules(), block)

    def is_fresh(self) -> bool:
        return self.watch.unchanged()


def packings_dropped() -> int:
    """How many packings have been dropped so far, for what is made of several of them."""
    return _drops


def repack(model: nn.Module) -> None:
    """Drops every packing in `model`; the next forward packs the weights as they are then.

    Needed only after a change that nothing reports: `p.data.mul_(2)`, or a fused optimiser, in a model that stays in
    eval mode.
    """
    for module in model.modules():
        if isinstance(module, FusedModule):
            module.drop_packing()


def set_backend(model: nn.Module, backend: str) -> None:
    """Has every op of `model` run on `backend`, as that argument of the ops: "auto", "cpu", "cuda", "triton" or
    "reference" (plain torch, layer by layer)."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be one of 'auto', {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    for module in model.modules():
        if hasattr(type(module), "backend"):
            setattr(module, "backend", backend)  # noqa: B010 (nn.Module's own attributes are tensors to a type checker)
    repack(model)


def _tensor_slots(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    floating = [(module._parameters, name) for name, p in module._parameters.items() if p is not None]
    return floating + [
        (module._buffers, name) for name, b in module._buffers.items() if b is not None and b.is_floating_point()
    ]


def _obstacle(module: nn.Module, hooks: bool, training: bool) -> str | None:
    """Why `module` can't be folded, or for `training` replaced by ops on its parameters, or None."""
    name = type(module).__name__
    if hooks and any(getattr(module, attribute) for attribute in HOOKS):
        return f"a {name} in it carries a hook"
    if hooks and module.training and not training:
        return f"a {name} in it is in training mode"
    if "parametrizations" in module._modules:
        return f"a {name} in it is parametrized"
    if isinstance(module, BATCH_NORMS) and module.running_mean is None and not training:
        return f"a {name} in it has no running statistics"
    if isinstance(module, nn.Conv2d) and "weight" not in module._parameters:
        return f"the weight of a {name} in it is computed from other parameters"
    for holder, slot in _tensor_slots(module):
        # torch.export traces with fake tensors in the parameters' places
        if type(holder[slot]) not in _PLAIN_TENSORS and not torch.compiler.is_compiling():
            return f"{slot} of a {name} in it is a {type(holder[slot]).__name__}"
    return None


@functools.cache
def _log_once(message: str) -> None:
    _log.warning(message)
