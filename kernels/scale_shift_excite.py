"""Squeeze-and-excitation of z = activation(x * scale + shift), forward and gradients, z never in memory: y = z * gates.

Passes    Forward: z's sums by channel and image (channels.py), two small products (squeeze_excite.py), and x again,
          scaled, activated and gated. Backward: the sums of z and of grad * z in one pass, the products again, their
          gradients, then scale_shift.py's pass over x and grad.
Bytes     forward x twice, y once; backward x and grad twice, grad_x once.
Layout, tiles, numbers, repeats, addresses: those of squeeze_excite.py and scale_shift.py, whose kernels these are.
"""

import torch

from .channels import channel_sums
from .launch import dense
from .packing import accumulator
from .scale_shift import gradients, only
from .squeeze_excite import like, product, put_layer_gradients
from .squeeze_excite import scale as scale_channels

__all__ = ["scale_shift_excite", "scale_shift_excite_backward"]


def scale_shift_excite(
    x, scale, shift, reduce_weight, reduce_bias, expand_weight, expand_bias, activation, se_activation, gate_activation
):
    x, channels_last = dense(x)
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scale, shift = scale.contiguous(), shift.contiguous()
    sums = channel_sums(x, None, channels_last, scale=scale, shift=shift, activation=activation)
    hidden, _ = product(sums, None, reduce_weight, reduce_bias, 0, x.shape[2] * x.shape[3])
    gates, _ = product(hidden, None, expand_weight, expand_bias, se_activation, out_activation=gate_activation)
    return scale_channels(x, scale, shift, None, None, 0, activation, channels_last, x.dtype, gates)


def scale_shift_excite_backward(
    grad, x, scale, shift, reduce_weight, reduce_bias, expand_weight, expand_bias, activation, se_activation,
    gate_activation, output_mask,
):  # fmt: skip
    """Gradients of the tensors in that order: 0 elements for one that output_mask leaves out or that is None."""
    tensors = (x, scale, shift, reduce_weight, reduce_bias, expand_weight, expand_bias)
    wanted = [tensor is not None and output_mask >> i & 1 for i, tensor in enumerate(tensors)]
    x, channels_last = dense(x)
    grad, scale, shift = like(grad, x, channels_last), scale.contiguous(), shift.contiguous()
    N, C, H, W = x.shape
    z = share = mean = grad_z = torch.empty((N, C), dtype=accumulator(x), device=x.device)
    hidden = grad_hidden_z = mean.new_empty((N, reduce_weight.shape[0]))
    if N > 0:
        sums = channel_sums(x, grad, channels_last, True, scale, shift, activation)
        of_z, of_grad_z = sums[:, :, 0], sums[:, :, 1]
        hidden_z, mean = product(of_z, None, reduce_weight, reduce_bias, 0, divisor=H * W, keep=True)
        z, hidden = product(hidden_z, None, expand_weight, expand_bias, se_activation, keep=True)
        grad_hidden, grad_z = product(of_grad_z, z, expand_weight, None, gate_activation, transposed=True, keep=True)
        share, grad_hidden_z = product(
            grad_hidden, hidden_z, reduce_weight, None, se_activation, transposed=True, keep=True
        )
    of_x = [None] * 3
    if any(wanted[:3]):
        *of_x, _ = gradients(
            x, grad, None, scale, shift, activation, channels_last, [*wanted[:3], False], z, share, gate_activation
        )
    grads = [*of_x, None, None, None, None]
    put_layer_gradients(grads, wanted, 3, grad_hidden_z, mean, reduce_weight, reduce_bias)
    put_layer_gradients(grads, wanted, 5, grad_z, hidden, expand_weight, expand_bias)
    return only(wanted, tensors, grads)
