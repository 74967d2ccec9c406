"""The cases of `cnnfast bench models`: whole networks, against timm's or torchvision's of plain layers with the same
weights, or where neither has the network against its own layers run by plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cnnfast
from cnnfast._peers import checkpoint_source, plain_network
from cnnfast.exactness import draw_batch_norms
from cnnfast.models.registry import model_entry
from cnnfast.nn import set_backend

from .measure import Problem, Settings


@dataclass(frozen=True)
class ModelCase:
    """Our `name` against the network that it takes the place of, the same weights in both."""

    name: str
    size: int
    group: str = "model"

    def build(self, settings: Settings) -> Problem:
        channels = model_entry(self.name).pretrained_cfg["input_size"][0]
        x = torch.randn(settings.batch, channels, self.size, self.size)
        plain = plain_of(self.name)
        draw_batch_norms(plain, torch.randn(2, *x.shape[1:]))  # fresh ones do nothing: any logits would pass
        plain = plain.eval().requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            y = plain(x)  # in float32, which has every layer
        plain = plain.to(settings.dtype)
        x = x.to(settings.dtype).contiguous(memory_format=torch.channels_last)
        weights = sum(p.numel() for p in plain.parameters())
        nbytes = (x.numel() + weights + y.numel()) * x.element_size()
        return Problem(lambda: self._ours(plain, x), plain, x, counter.get_total_flops(), nbytes)

    def _ours(self, plain: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        model = cnnfast.create_model(self.name)
        cnnfast.load_weights(model, plain.state_dict(), checkpoint_source(self.name))
        model = model.to(x.dtype).eval()
        model(x)  # packs the weights
        return lambda: model(x)


def plain_of(name: str) -> nn.Module:
    """The network that our `name` takes the place of."""
    if model_entry(name).peers:
        return plain_network(name)
    network = cnnfast.create_model(name)
    set_backend(network, "reference")
    return network


# One of each family, or two where they differ; --model takes any.
FAMILIES = ("tf_efficientnet_lite0", "efficientnet_b0", "mobilenet_v2", "mobilenet_v1", "se_resnet50", "xception")


def case(name: str) -> ModelCase:
    return ModelCase(name, model_entry(name).pretrained_cfg["input_size"][-1])


def select(names: list[str] | None = None, quick: bool = False) -> list[ModelCase]:
    """The networks `names`, one of each family if None; `quick`: the first one."""
    return [case(name) for name in names or FAMILIES][: 1 if quick else None]
