"""Batch normalisation whose batch is that of all processes together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cnnfast import reference

# What isinstance asks for: torch's synchronised one is no BatchNorm2d, ours is.
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """`module` with every BatchNorm2d in it replaced by one with the statistics of all processes' images together.

    As torch.nn.SyncBatchNorm.convert_sync_batchnorm, and by it for layers on a GPU; those on a CPU, which it refuses,
    become SyncBatchNorm2d. So call it after `.to(device)`, before DistributedDataParallel. Parameters, buffers and
    state-dict keys stay the same ones; networks stay fused in eval mode.

    Args:
        module: changed in place; a BatchNorm2d itself is returned as another module.
        process_group: of torch.distributed; None for all processes.

    Raises:
        TypeError: no module; batch normalisation of other dimensions on a CPU.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        tensor = next((t for t in (*module.parameters(False), *module.buffers(False))), None)
        if tensor is not None and tensor.device.type not in ("cpu", "meta"):
            return nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
        if not isinstance(module, nn.BatchNorm2d):
            raise TypeError(f"module must have no batch normalisation but BatchNorm2d, got {type(module).__name__}")
        return SyncBatchNorm2d.of(module, process_group)
    for name, child in module.named_children():
        converted = convert_sync_batchnorm(child, process_group)
        if converted is not child:
            setattr(module, name, converted)
    return module


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that in training takes mean and variance over the images of all processes: (N, C, H, W) -> the same,
    with another N in each process, 0 too.

    The result, every gradient and the running statistics are those of one process on the joined batch; the parameters'
    gradients are each process's part of their sum, for DistributedDataParallel to add up. One all-gather of 2 C + 1
    numbers forward, one all-reduce of 2 C backward: every process has to run both. In eval mode, in a single process
    and without torch.distributed it is BatchNorm2d. It runs on any device; on a GPU torch.nn.SyncBatchNorm is faster.
    Blocks that train fused call neither: they add up their convolutions' sums, by an all-reduce each way.

    Args:
        process_group: of torch.distributed; None for all processes. The others are BatchNorm2d's.

    Raises:
        ValueError: a single value per channel in all processes together, as BatchNorm2d.
    """

    def __init__(self, num_features: int, *args: Any, process_group: Any = None, **options: Any):
        super().__init__(num_features, *args, **options)
        self.process_group = process_group

    @classmethod
    def of(cls, norm: nn.BatchNorm2d, process_group: Any = None) -> SyncBatchNorm2d:
        """With the parameters and buffers of `norm`."""
        shape: Any = (norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        module = cls(*shape, process_group=process_group, device="meta")
        module._parameters.update(norm._parameters)
        module._buffers.update(norm._buffers)
        return module.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        if not is_joined(self):
            return super().forward(x)
        self._check_input_dim(x)
        y, mean, var, count = _SyncBatchNorm.apply(x, self.weight, self.bias, self.eps, self.process_group)
        if self.track_running_stats:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            track_statistics(self, mean, var * (count / (count - 1)))
        return y


@torch.no_grad()
def track_statistics(norm: Any, mean: Tensor, unbiased_var: Tensor) -> None:
    """Moves the running statistics, rounded as nn.BatchNorm2d does in training; the batch is counted already."""
    part = norm.momentum
    if part is None:  # of all batches so far
        part = 1 / norm.num_batches_tracked.to(mean.dtype)
    for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased_var)):
        running.mul_(1 - part).add_(part * new)  # no lerp, which makes NaN of what is infinite


def is_joined(norm: Any) -> bool:
    """Whether a batch normalisation, torch's or ours, takes its statistics over several processes."""
    synchronised = isinstance(norm, (SyncBatchNorm2d, nn.SyncBatchNorm)) and norm.training
    if not synchronised or not dist.is_available() or not dist.is_initialized():
        return False
    return dist.get_world_size(norm.process_group) > 1


def joined_scale_and_shift(norm: Any, y: Tensor, total: Tensor, squares: Tensor) -> tuple[Tensor, ...]:
    """What ops.batch_norm_scale_shift returns of y and its sums by channel, of all processes' together.

    One all-reduce of 2 C + 1 numbers in float64, another in backward; between them operators of plain torch.
    """
    values = y.numel() // y.shape[1]
    own = torch.cat([total.double(), squares.double(), total.new_full((1,), values, dtype=torch.float64)])
    total, squares, count = _AllReduce.apply(own, norm.process_group).split((y.shape[1], y.shape[1], 1))
    if values <= 1 and count <= 1:  # a look that waits for the device, so only where this process can't know
        raise ValueError(f"Expected more than 1 value per channel when training, got {int(count)} in all processes")
    rows = reference.batch_norm_scale_shift(y, total, squares, norm.weight, norm.bias, norm.eps, count)
    return tuple(row.to(torch.promote_types(y.dtype, torch.float32)) for row in rows)


class _AllReduce(torch.autograd.Function):
    """The sum over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        ctx.group = group
        joined = own.clone()
        dist.all_reduce(joined, group=group)
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        joined = grad.contiguous().clone()
        dist.all_reduce(joined, group=ctx.group)
        return joined, None


class _SyncBatchNorm(torch.autograd.Function):
    """(y, mean, biased variance, values per channel), the last three over all processes and not differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, eps: float, group: Any) -> tuple[Tensor, ...]:
        channels = x.shape[1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        own = x.new_zeros(2 * channels + 1, dtype=torch.float64)  # mean, variance, values per channel
        if x.numel():
            own[:-1] = torch.cat(torch.batch_norm_update_stats(wide, None, None, 0.0))
            own[-1] = x.numel() // channels
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, own, group)
        means, variances, counts = torch.stack(gathered).split((channels, channels, 1), 1)
        count = counts.sum()
        if count <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got {int(count)} in all processes")
        mean = (counts * means).sum(0) / count
        var = (counts * (variances + (means - mean).square())).sum(0) / count
        mean, var = mean.to(wide.dtype), var.to(wide.dtype)
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(mean, var, count)
        weight, bias = (None if row is None else row.to(wide.dtype) for row in (weight, bias))
        return F.batch_norm(wide, mean, var, weight, bias, False, 0.0, eps).to(x.dtype), mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        wide, dtype = x.to(mean.dtype), mean.dtype
        gamma = torch.ones_like(mean) if weight is None else weight.to(dtype)
        grad_x, grad_weight, grad_bias = wide, torch.zeros_like(mean), torch.zeros_like(mean)
        if x.numel():  # as if the statistics were given; ATen divides by the values
            grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
                grad.to(dtype), wide, gamma, mean, var, None, None, False, ctx.eps, [True, True, True]
            )
        if ctx.needs_input_grad[0]:  # and what comes through the statistics, for which all processes' sums count
            sums = torch.cat([grad_weight, grad_bias])
            dist.all_reduce(sums, group=ctx.group)
            of_weight, of_bias = (sums / count).to(dtype).chunk(2)
            rstd = torch.rsqrt(var + ctx.eps)
            slope, constant = gamma * rstd.square() * of_weight, gamma * rstd * of_bias
            mean, slope, constant = (row[:, None, None] for row in (mean, slope, constant))
            grad_x = (grad_x - (wide - mean) * slope - constant).to(x.dtype)
        if weight is None:
            return grad_x, None, None, None, None
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None
