"""The cases of `cnnfast bench models`: whole networks, against timm's or torchvision's of plain layers with the same
weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cnnfast
from cnnfast._peers import plain_network

from .measure import Problem, Settings


@dataclass(frozen=True)
class ModelCase:
    """Our `name` against the network that it takes the place of, the same weights in both."""

    name: str
    size: int
    group: str = "model"

    def build(self, settings: Settings) -> Problem:
        plain = _drawn(plain_network(self.name), self.size).to(settings.dtype)
        x = torch.randn(settings.batch, 3, self.size, self.size).to(settings.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        with FlopCounterMode(display=False) as counter:
            y = plain(x)
        weights = sum(p.numel() for p in plain.parameters())
        nbytes = (x.numel() + weights + y.numel()) * x.element_size()
        return Problem(lambda: self._ours(plain, x), plain, x, counter.get_total_flops(), nbytes)

    def _ours(self, plain: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        model = cnnfast.create_model(self.name)
        cnnfast.load_weights(model, plain.state_dict())
        model = model.to(x.dtype).eval()
        model(x)  # packs the weights
        return lambda: model(x)


def _drawn(model: nn.Module, size: int) -> nn.Module:
    """Weights as initialised; BN parameters drawn, its statistics those of random images: at initialisation BN does
    nothing, and logits of any size would pass."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.momentum = 1.0
    model.train()(torch.randn(2, 3, size, size))
    return model.eval().requires_grad_(False)


CASES: tuple[ModelCase, ...] = (
    ModelCase("tf_efficientnet_lite0", 224),
    ModelCase("efficientnet_b0", 224),
    ModelCase("mobilenet_v2", 224),
    ModelCase("mobilenet_v1", 224),
    ModelCase("se_resnet50", 224),
    ModelCase("xception", 299),
)
MODELS: tuple[str, ...] = tuple(case.name for case in CASES)


def select(names: list[str] | None = None, quick: bool = False) -> list[ModelCase]:
    """The networks `names` (all if None); `quick`: the first one."""
    return [case for case in CASES if not names or case.name in names][: 1 if quick else None]
