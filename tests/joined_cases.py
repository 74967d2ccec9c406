"""What test_sync_batch_norm.py runs in each process: on its part of a joined batch that every process draws alike."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import cnnfast
from cnnfast.exactness import draw_batch_norms
from cnnfast.nn import SyncBatchNorm2d, convert_sync_batchnorm, sync_batch_norm


def inputs(seed: int, sizes: list[int], shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], ...]:
    """Each process's x and the gradient of its y; channels of different means and sizes."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(sum(sizes), *shape, generator=generator, dtype=torch.float64) for _ in range(2))
    scale, shift = (10 ** (4 * torch.rand(shape[0], 1, 1, generator=generator) - 2) for _ in range(2))
    return (x * scale + shift).to(dtype).split(sizes), grad.to(dtype).split(sizes)


def normed(norm: nn.Module, x: Tensor, grad: Tensor, steps: int = 2) -> dict[str, Any]:
    """Results of some forward and backward passes, each on other values."""
    results: dict[str, Any] = {}
    for step in range(steps):
        part = (x * (step + 1)).requires_grad_()
        y = norm(part)
        norm.zero_grad()
        y.backward(grad)
        results[f"y{step}"], results[f"grad_x{step}"] = y.detach(), part.grad
        results |= {f"grad_{name}{step}": p.grad for name, p in norm.named_parameters()}
        results |= {f"{name}{step}": buffer.clone() for name, buffer in norm.named_buffers()}
    return results


def make_norm(channels: int, dtype: torch.dtype, options: dict[str, Any]) -> nn.BatchNorm2d:
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(channels, **options).to(dtype)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return norm


def sync_norm(rank: int, world: int, seed: int, sizes: list[int], shape: Any, dtype: Any, options: Any, layout: Any):
    """The results, and the strides of the first; or what was raised."""
    norm = convert_sync_batchnorm(make_norm(shape[0], dtype, options))
    assert type(norm) is SyncBatchNorm2d
    x, grad = (parts[rank].contiguous(memory_format=layout) for parts in inputs(seed, sizes, shape, dtype))
    try:
        results = normed(norm, x, grad)
    except ValueError as error:
        return str(error)
    assert results["y0"].is_contiguous(memory_format=layout)
    return results


def make_network(name: str, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(2)
    network = cnnfast.create_model(name, num_classes=5, **options).double()
    draw_batch_norms(network, torch.randn(4, 3, 64, 64, dtype=torch.float64))
    return network.train()


def steps_of(network: nn.Module, call: Any, parts: Any, whole: int, world: int) -> dict[str, Any]:
    """Three steps of SGD with the mean square distance of the joined batch from its targets."""
    optimizer = torch.optim.SGD(network.parameters(), 1e-4, momentum=0.9)
    losses = []
    for step in range(3):
        loss = (call(parts[0] * (1 + step)) - parts[1]).square().sum() / whole
        optimizer.zero_grad()
        (loss * world).backward()
        optimizer.step()
        losses.append(loss.item())
    network.eval()
    with torch.no_grad():
        return {
            "losses": torch.tensor(losses, dtype=torch.float64),
            "eval": network(parts[0][:1]),
            **network.state_dict(),
        }


def sync_network(rank: int, world: int, seed: int, sizes: list[int], name: str, options: Any, checkpointing: bool):
    network = convert_sync_batchnorm(make_network(name, options))
    if checkpointing:
        network.set_grad_checkpointing()
    x, _ = inputs(seed, sizes, (3, 64, 64), torch.float64)
    targets = inputs(seed, sizes, (5, 1, 1), torch.float64)[1]
    parallel = DistributedDataParallel(network)
    with mock.patch.object(sync_batch_norm._SyncBatchNorm, "apply", None):  # blocks train fused: no layer is called
        return steps_of(network, parallel, (x[rank], targets[rank][..., 0, 0]), sum(sizes), world)
