"""The cases of `cnnfast bench train`: a step of training (forward, backward, SGD) of whole networks, against timm's or
torchvision's with the same weights, trained by eager PyTorch and by torch.compile.

Weights are float32; bfloat16 and float16 are autocast, float16 with its loss scaled. Before a step is timed, loss and
gradients of one are compared with the plain network's in float64, on a few images.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cnnfast
from cnnfast._peers import checkpoint_source
from cnnfast.exactness import draw_batch_norms
from cnnfast.models.registry import model_entry
from cnnfast.ops.cuda_kernels import tf32

from .measure import Problem, Settings, WrongResult
from .models import plain_of
from .peers import Peer, in_layout

NETWORKS = ("mobilenet_v2", "efficientnet_b0", "xception")
CLASSES = 1000
CHECKED = 4  # images of the step that is compared
# Of all gradients together by their norm, and of the loss: batch normalisation of few images makes much of rounding.
ALLOWED = {torch.float32: (1e-2, 1e-3), torch.float16: (0.3, 3e-2), torch.bfloat16: (1.0, 1e-1)}
LOSS_SCALE = {torch.float16: 4096.0}  # or gradients would be below its smallest numbers


@dataclass(frozen=True)
class TrainingCase:
    """A step of our `name` and of the network that it takes the place of."""

    name: str
    size: int
    device: str = "cpu"
    group: str = "training step"

    def build(self, settings: Settings) -> Problem:
        channels = model_entry(self.name).pretrained_cfg["input_size"][0]
        x = torch.randn(settings.batch, channels, self.size, self.size).contiguous(memory_format=torch.channels_last)
        plain = plain_of(self.name)
        draw_batch_norms(plain, torch.randn(2, *x.shape[1:]))
        _without_dropout(plain.train())
        plain, x = plain.to(self.device), x.to(self.device)
        few = x[:CHECKED]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            copy.deepcopy(plain)(few)
        expected = _loss_and_gradients(copy.deepcopy(plain).double(), few.double(), torch.float64)
        weights = sum(p.numel() for p in plain.parameters())
        ways = {"eager": torch.contiguous_format, "eager_channels_last": torch.channels_last}

        def ready(network: nn.Module, compiled: bool = False) -> Callable[[], torch.Tensor]:
            _check(copy.deepcopy(network), few, settings.dtype, expected)
            return _step(network, x, settings.dtype, compiled)

        def peer(layout: torch.memory_format, compiled: bool = False) -> Peer:
            return lambda network, x: ready(in_layout(network, x, layout)[0], compiled)

        peers = {name: peer(layout) for name, layout in ways.items()} | {"inductor": peer(torch.channels_last, True)}
        # Backward: two products for each of forward's. (Counted, grouped convolutions would be dense.)
        flops = 3 * counter.get_total_flops() * len(x) // len(few)
        nbytes = x.element_size() * (x.numel() + 3 * weights)  # weights, their gradients, weights again
        return Problem(lambda: ready(self._ours(plain)), plain, x, flops, nbytes, peers, _not_finite)

    def _ours(self, plain: nn.Module) -> nn.Module:
        model = cnnfast.create_model(self.name)
        cnnfast.load_weights(model, plain.state_dict(), checkpoint_source(self.name))
        _without_dropout(model.train())
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _without_dropout(network: nn.Module) -> None:
    """No two steps would be alike."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("drop_rate", "drop_prob"):
            if hasattr(module, name):
                setattr(module, name, 0.0)


@torch.enable_grad()
def _loss(network: nn.Module, x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    classes = torch.arange(len(x), device=x.device) % CLASSES
    with torch.autocast(x.device.type, dtype if dtype.itemsize == 2 else None, enabled=dtype.itemsize == 2):
        return F.cross_entropy(network(x).to(torch.promote_types(x.dtype, torch.float32)), classes)


def _loss_and_gradients(network: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> tuple[float, dict[str, Any]]:
    loss, scale = _loss(network, x, dtype), LOSS_SCALE.get(dtype, 1.0)
    loss.backward(torch.full_like(loss, scale))
    return loss.item(), {n: p.grad.double() / scale for n, p in network.named_parameters() if p.grad is not None}


def _check(
    network: nn.Module, x: torch.Tensor, dtype: torch.dtype, expected: tuple[float, dict[str, torch.Tensor]]
) -> None:
    """Raises WrongResult where a step's loss or gradients aren't the `expected` ones of the plain network."""
    loss, gradients = _loss_and_gradients(network, x, dtype)
    wanted_loss, wanted = expected
    if missing := sorted(wanted.keys() ^ gradients.keys()):
        raise WrongResult(f"gradients of other parameters, such as {missing[0]}")
    of_gradients, of_loss = ALLOWED[torch.float16 if x.is_cuda and dtype == torch.float32 and tf32() else dtype]
    size = math.hypot(*(gradient.norm().item() for gradient in wanted.values()))
    error = math.hypot(*((gradients[name] - gradient).norm().item() for name, gradient in wanted.items())) / size
    if not error <= of_gradients:  # also where it is NaN
        raise WrongResult(f"gradients off by {error:.1e} of their norm, allowed {of_gradients:.0e}")
    if not abs(loss - wanted_loss) <= of_loss * abs(wanted_loss):
        raise WrongResult(f"a loss of {loss:.6g} instead of {wanted_loss:.6g}")


def _step(network: nn.Module, x: torch.Tensor, dtype: torch.dtype, compiled: bool) -> Callable[[], torch.Tensor]:
    """A call that trains `network` by one step and returns its loss."""
    run: Any = network
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(network, fullgraph=True, dynamic=False)
    scale = LOSS_SCALE.get(dtype, 1.0)
    # So small a rate that thousands of steps on the same images leave numbers as they are in training.
    optimizer = torch.optim.SGD(network.parameters(), 1e-5 / scale, momentum=0.9)

    def step() -> torch.Tensor:
        loss = _loss(run, x, dtype)
        loss.backward(torch.full_like(loss, scale))
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    step()
    return step


def _not_finite(loss: torch.Tensor) -> str | None:
    return None if loss.isfinite() else f"wrong output: a loss of {loss.item()}"


def select(names: list[str] | None = None, quick: bool = False) -> list[TrainingCase]:
    """The networks `names`, those that are slow elsewhere if None; `quick`: the first one."""
    chosen = [(name, model_entry(name).pretrained_cfg["input_size"][-1]) for name in names or NETWORKS]
    return [TrainingCase(name, size) for name, size in chosen][: 1 if quick else None]
