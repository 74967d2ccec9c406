"""The same plain PyTorch layers, run in the ways that a user would otherwise pick.

A peer takes a module in eval mode and its input, and returns a call that computes the output; all one-off work
(conversion, compilation) is done before it returns. Whatever it raises means that it can't run here: the row says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

Peer = Callable[[torch.nn.Module, torch.Tensor], Callable[[], torch.Tensor]]


def eager(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Layer by layer, NCHW."""
    module, x = _in_layout(module, x, torch.contiguous_format)
    return lambda: module(x)


def eager_channels_last(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Layer by layer, channels_last."""
    module, x = _in_layout(module, x, torch.channels_last)
    return lambda: module(x)


def inductor(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """torch.compile with freezing: weights become constants, BN is folded, convolutions get oneDNN's packed weights."""
    torch._dynamo.reset()  # or the cases before this one count against the limit of recompilations
    module, x = _in_layout(module, x, torch.channels_last)
    # No graph from the cache: its key doesn't tell the number of threads that the code was generated for.
    with torch._inductor.config.patch(freezing=True, fx_graph_cache=False):
        compiled = torch.compile(module, fullgraph=True, dynamic=False)
        compiled(x)
    return lambda: compiled(x)


def _in_layout(
    module: torch.nn.Module, x: torch.Tensor, layout: torch.memory_format
) -> tuple[torch.nn.Module, torch.Tensor]:
    """Copies in that memory format."""
    module = copy.deepcopy(module).to(memory_format=layout)  # type: ignore[call-overload]
    return module, x.contiguous(memory_format=layout)


PEERS: dict[str, Peer] = {"eager": eager, "eager_channels_last": eager_channels_last, "inductor": inductor}
TO_BEAT = ("eager_channels_last", "inductor")  # what is quoted is the ratio to the better of these
