"""Whether modules are still as they were when something was made from their weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from cnnfast._C import Watch

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def watch(modules: Sequence[nn.Module], block: nn.Module, calls: bool = False) -> Watch:
    """Its `unchanged()` says whether `modules` hold the same parameters, buffers and children as now, the floating ones
    of these tensors with the same values as far as anything tells, and all but `block` are in eval mode, without hooks.

    Args:
        block: of `modules`, the one whose own call is not replaced: its hooks run, its mode is asked elsewhere.
        calls: whether every one's call, the block's too, has to be nothing but its class's `forward` (`only_calls`).
    """
    holders = [holder for module in modules for holder in (module._parameters, module._buffers)]
    held = [tensor for holder in holders for tensor in holder.values()]
    tensors: list[Tensor] = [t for t in held if t is not None and t.is_floating_point()]
    watched = [module for module in modules if calls or module is not block]
    members = [*holders, *(module._modules for module in modules)]
    return Watch(
        # What was empty stays so, or matters not: an activation with a parameter is no longer one that is folded.
        members=[dictionary for dictionary in members if dictionary],
        versioned=[tensor for tensor in tensors if not tensor.is_inference()],  # others count no versions
        unversioned=[tensor for tensor in tensors if tensor.is_inference()],
        # They keep the storage alive: no other tensor can get its address, so a changed pointer also tells a changed
        # dtype (`child.half().float()`).
        aliases=[tensor.detach() for tensor in tensors],
        hooks=[getattr(module, attribute) for module in watched for attribute in HOOKS],
        instances=[vars(module) for module in watched],
        calls=calls,
        version=Tensor._version,
        data_ptr=Tensor.data_ptr,
    )
