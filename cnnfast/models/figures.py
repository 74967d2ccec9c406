"""What a network costs, without its weights: parameters and multiply-adds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cnnfast.models.registry import create_model, model_entry
from cnnfast.nn import set_backend


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(name: str, size: int | None = None, **options: Any) -> int:
    """Multiply-adds of convolutions and matrix products for one image, as torch's FlopCounterMode counts them (two
    FLOPs each), on the meta device: nothing is computed.

    Args:
        size: height and width of the image; None for pretrained_cfg's.
        options: create_model's.
    """
    with torch.device("meta"):
        network = create_model(name, **options).eval()
        set_backend(network, "reference")
        channels, height, width = model_entry(name).pretrained_cfg["input_size"]
        shape = (1, options.get("in_chans", channels), size or height, size or width)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty(shape))
    return counter.get_total_flops() // 2
