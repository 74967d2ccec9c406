"""What the ops register alike: fakes' tensors, gradients by the `_backward` op, autocast."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cnnfast import _library
from cnnfast.ops import backends, cuda_kernels

assert _library  # the schemas are loaded
library = torch.library.Library("cnnfast", "IMPL")
PACKED_OPS = {
    "depthwise_conv2d": 1,
    "pointwise_conv2d": 2,
    "separable_conv2d": 3,
    "inverted_residual": 4,
    "conv2d": 5,
    "squeeze_excite": 6,
    "separable_conv2d_pointwise_first": 7,
}

# Whose bfloat16 weights are packed as such.
_IN_PAIRS = ("conv2d", "pointwise_conv2d", "separable_conv2d", "separable_conv2d_pointwise_first", "inverted_residual")


def fake(op: str) -> Callable:
    """Decorator: registers the function as the fake (meta) kernel of cnnfast::<op>."""
    return torch.library.register_fake(f"cnnfast::{op}", lib=library)


def empty_image(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What every kernel allocates: channels_last where x's channels are side by side and it isn't plain NCHW too."""
    nhwc = not x.is_contiguous() and x.stride(1) == 1 and x.shape[1] > 1
    memory_format = torch.channels_last if nhwc else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def empty_gradients(
    output_mask: int, x: Tensor, parameters: tuple[Tensor | None, ...], residual: Tensor | None = None, images: int = 1
) -> tuple[Tensor, ...]:
    """A `_backward` op's outputs: of x and residual in their own memory format, of parameters contiguous.

    One that is not wanted, or whose argument is None, has 0 elements. images: 2 for an op that takes a residual.
    """
    inputs = (x, *parameters, residual)[: len(parameters) + images]
    gradients = []
    for i, tensor in enumerate(inputs):
        if tensor is None or not output_mask >> i & 1:
            gradients.append((x if tensor is None else tensor).new_empty((0,)))
        elif 0 < i <= len(parameters):
            gradients.append(torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device))
        else:
            gradients.append(empty_image(tensor, tensor.shape))
    return tuple(gradients)


def empty_packed(
    op: str,
    weight: Tensor,
    in_channels: int,
    mid_channels: int,
    out_channels: int,
    kernel: Sequence[int],
    squeezed_channels: int = 0,
    no_expansion: bool = False,
) -> Tensor:
    """What pack_<op> returns; the layout's sizes are csrc/packing.h's."""
    itemsize = {torch.float64: 8, torch.bfloat16: 2 if op in _IN_PAIRS else 4}.get(weight.dtype, 4)
    channels = int(in_channels), int(mid_channels), int(out_channels)
    sizes = *channels, *map(int, kernel), itemsize, int(squeezed_channels)
    size = _library._C.packed_bytes(PACKED_OPS[op], *sizes, no_expansion)
    return torch.empty((size,), dtype=torch.uint8, device=weight.device)


def register_gradients(op: str, activation_after_residual: bool = False) -> None:
    """Gradients of cnnfast::<op> by cnnfast::<op>_backward, which recomputes what it needs from the inputs.

    A residual that is added last (no activation after it) is not kept: its gradient is the output's. A `_backward`
    without an output_mask returns its one gradient as a tensor; one that takes y or taps is given the op's first or
    second output. Outputs beyond the gradients that it takes aren't differentiable.
    """
    overload = getattr(torch.ops.cnnfast, op).default
    backward_op = getattr(torch.ops.cnnfast, f"{op}_backward").default
    arguments = overload._schema.arguments
    tensors = sum("Tensor" in str(argument.type) for argument in arguments)
    residual = tensors - 1  # the last tensor, where the op takes one
    takes_residual = arguments[residual].name == "residual"
    taken = [argument.name for argument in backward_op._schema.arguments]
    takes_mask, kept = "output_mask" in taken, [i for name, i in (("y", 0), ("taps", 1)) if name in taken]
    differentiable = sum(name.startswith("grad") for name in taken)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        saved, options = list(inputs[:tensors]), inputs[tensors:-1]
        ctx.linear = takes_residual and not (activation_after_residual and options[-1])
        if ctx.linear:
            saved[residual] = None
        ctx.save_for_backward(*saved, *(output[i] for i in kept))
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(*output[differentiable:])
        ctx.options, ctx.backend = options, inputs[-1]

    def backward(ctx: Any, *of_outputs: Tensor) -> tuple[Any, ...]:
        of_outputs = of_outputs[:differentiable]
        wanted = list(ctx.needs_input_grad[:tensors])
        passed_on = ctx.linear and wanted[residual]
        if passed_on:
            wanted[residual] = False
        grads: list[Tensor | None] = [None] * tensors
        if not takes_mask:
            grads = [backward_op(*of_outputs, *ctx.saved_tensors, *ctx.options, ctx.backend)]
        elif any(wanted):
            mask = sum(1 << i for i, want in enumerate(wanted) if want)
            computed = backward_op(*of_outputs, *ctx.saved_tensors, *ctx.options, mask, ctx.backend)
            grads = [gradient if want else None for gradient, want in zip(computed, wanted, strict=True)]
        if passed_on:
            grads[residual] = of_outputs[0]
        return (*grads, *[None] * (len(ctx.options) + 1))

    def backward_twice(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f'{op} can be differentiated once; backend="reference" can be differentiated again')

    torch.library.register_autograd(f"cnnfast::{op}", backward, setup_context=setup_context, lib=library)
    torch.library.register_autograd(f"cnnfast::{op}_backward", backward_twice, lib=library)


def register_cuda(op: str, packed: bool = False) -> None:
    """cnnfast::<op> and its `_backward` on CUDA: C++ or Triton, which take the same arguments less `backend`.

    packed: its packed form, too, and the packing where it has one of its own.
    """
    for name in (op, f"{op}_backward", *([f"{op}_packed"] if packed else [])):
        library.impl(name, _cuda_kernel(op, name), "CUDA")
    if packed and hasattr(torch.ops.cnnfast, f"pack_{op}"):
        library.impl(f"pack_{op}", _cuda_packer(f"pack_{op}"), "CUDA")


def _cuda_kernel(op: str, name: str) -> Callable:
    names = [argument.name for argument in getattr(torch.ops.cnnfast, name).default._schema.arguments]
    backend_position = len(names) - 1

    def kernel(*args: Any) -> Any:
        backend = backends.NAMES[args[backend_position] if len(args) > backend_position else 0]  # a default is dropped
        args = args[:backend_position]
        if backends.choose_on_gpu(op, name, backend, dict(zip(names, args, strict=False))) == "cuda":
            tf32 = (cuda_kernels.tf32(),) if op in cuda_kernels.TAKES_TF32 else ()
            return getattr(torch.ops.cnnfast_cuda, name)(*args, *tf32)
        return getattr(importlib.import_module(backends.triton_module(op)), name)(*args)

    return kernel


def _cuda_packer(name: str) -> Callable:
    def pack(*weights: Tensor | None) -> Tensor:  # plain torch: one layout serves both GPU backends
        return getattr(importlib.import_module("cnnfast.kernels.packing"), name)(*weights)

    return pack


def register_autocast(op: str, to: torch.dtype | None = None) -> None:
    """Casts what autocast casts for torch's convs, to the dtype that the region asks for; biases become float32, and so
    do a prologue's scale and shift.

    to: a dtype for all tensors instead, for what autocast runs in float32.
    """
    overload = getattr(torch.ops.cnnfast, op).default
    is_bias = [argument.name.endswith(("bias", "scale", "shift")) for argument in overload._schema.arguments]

    def register(device_type: str, key: str) -> None:
        keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*args: Any) -> Any:
            dtype = to or torch.get_autocast_dtype(device_type)
            with torch._C._ExcludeDispatchKeyGuard(keyset):
                return overload(*(_cast(a, torch.float32 if b else dtype) for a, b in zip(args, is_bias, strict=False)))

        library.impl(op, kernel, key)

    register("cpu", "AutocastCPU")
    register("cuda", "AutocastCUDA")


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype is not torch.float64:
        return value.to(dtype)
    return value
