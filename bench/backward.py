"""The cases of `cnnfast bench ops` for the backward pass of depthwise convolutions alone, by autograd, at the shapes of
the networks that are trained: gradients of x and weight from that of y."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._functorch import config as functorch_config

from cnnfast import ops

from .measure import Problem, Settings, mismatch
from .peers import Peer, in_layout

Gradients = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class DepthwiseBackwardCase:
    network: str
    channels: int
    size: int
    kernel: int = 3
    stride: int = 1
    group: str = "depthwise_conv2d_backward"

    @property
    def name(self) -> str:
        stride = f" s{self.stride}" if self.stride > 1 else ""
        return f"{self.channels} @{self.size} k{self.kernel}{stride} ({self.network})"

    def build(self, settings: Settings) -> Problem:
        c, k = self.channels, self.kernel
        plain = nn.Conv2d(c, c, k, self.stride, k // 2, groups=c, bias=False).to(settings.dtype)
        x = torch.randn(settings.batch, c, self.size, self.size).to(settings.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        grad = torch.randn_like(plain(x))
        exact = _backward(nn.Conv2d.forward, _in(plain, torch.float64), x.double(), grad.double())()

        def peer(layout: torch.memory_format, compiled: bool = False) -> Peer:
            def prepare(module: nn.Module, x: torch.Tensor) -> Callable[[], Gradients]:
                module, x = in_layout(module, x, layout)
                forward: Any = nn.Conv2d.forward
                if compiled:
                    torch._dynamo.reset()
                    forward = torch.compile(forward, fullgraph=True, dynamic=False)
                return _backward(forward, module, x, grad.contiguous(memory_format=layout))

            return prepare

        def check(gradients: Gradients) -> str | None:
            of_x, of_weight = map(partial(mismatch, dtype=settings.dtype), gradients, exact)
            return of_x or of_weight

        def ours(conv: Any, x: torch.Tensor) -> torch.Tensor:
            return ops.depthwise_conv2d(x, conv.weight, None, self.stride, k // 2)

        ways = {"eager": peer(torch.contiguous_format), "eager_channels_last": peer(torch.channels_last)}
        peers = ways | {"inductor": peer(torch.channels_last, compiled=True)}
        flops = 4 * grad.numel() * k * k
        elements = grad.numel() + 2 * x.numel() + 2 * plain.weight.numel()
        prepare = partial(_backward, ours, _in(plain, settings.dtype), x, grad)
        return Problem(prepare, plain, x, flops, elements * x.element_size(), peers, check)


def _in(plain: nn.Conv2d, dtype: torch.dtype) -> nn.Module:
    """A copy."""
    return in_layout(plain, plain.weight, torch.channels_last)[0].to(dtype)


@torch.enable_grad()
def _backward(forward: Callable[..., torch.Tensor], conv: Any, x: torch.Tensor, grad: torch.Tensor) -> Any:
    """A call of backward alone: the graph is kept."""
    leaves = x.clone().requires_grad_(), conv.weight
    with functorch_config.patch(donated_buffer=False):  # or a compiled graph is good for one call
        y = forward(conv, leaves[0])
        torch.autograd.grad(y, leaves, grad, retain_graph=True)
    return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)


_V2, _B0, _XCEPTION = "mobilenetv2", "efficientnet_b0", "xception"
CASES = (
    DepthwiseBackwardCase(_V2, 96, 112, stride=2),
    DepthwiseBackwardCase(_V2, 144, 56),
    DepthwiseBackwardCase(_V2, 192, 28),
    DepthwiseBackwardCase(_V2, 384, 14),
    DepthwiseBackwardCase(_V2, 960, 7),
    DepthwiseBackwardCase(_B0, 144, 56, 5, 2),
    DepthwiseBackwardCase(_B0, 240, 28, 5),
    DepthwiseBackwardCase(_B0, 672, 14, 5),
    DepthwiseBackwardCase(_B0, 1152, 7, 5),
    DepthwiseBackwardCase(_XCEPTION, 128, 147),
    DepthwiseBackwardCase(_XCEPTION, 256, 74),
    DepthwiseBackwardCase(_XCEPTION, 728, 37),
    DepthwiseBackwardCase(_XCEPTION, 728, 19),
)
