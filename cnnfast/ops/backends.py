"""Which backend runs an op where: the one table, the reasons against each, the choice.

`auto` takes the first of `PREFERENCE` that can run, on a GPU the one that cuda_kernels.py prefers for the arguments;
where none can, and where a backend named by the user can't, the call raises with every reason. There is no silent
fallback: `backend="reference"` (plain torch) has to be asked for. CNNFAST_LOG=1 prints each choice once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cnnfast import _library
from cnnfast.ops import cuda_kernels

CODES = {"auto": 0, "cpu": 1, "cuda": 2, "triton": 3}  # the schemas'
NAMES = tuple(CODES)
OPS = (
    "depthwise_conv2d",
    "pointwise_conv2d",
    "separable_conv2d",
    "inverted_residual",
    "squeeze_excite",
    "local_response_norm",
    "conv2d",
    "conv2d_stats",
    "depthwise_conv2d_squeeze",
    "depthwise_conv2d_stats",
    "pointwise_conv2d_stats",
    "separable_conv2d_stats",
    "scale_shift",
    "scale_shift_excite",
    "scale_shift_max_pool",
    "batch_norm_scale_shift",
)
PACKED_ON_GPU = ("depthwise_conv2d", "depthwise_conv2d_squeeze")
REFERENCE = -1  # never reaches a schema
BACKENDS = ("cpu", "cuda", "triton", "reference")
# By the device of x.
PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
DEVICE = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}  # where each backend's tensors live

_meta_as = ["meta"]

_LOG = os.environ.get("CNNFAST_LOG", "0") not in ("", "0")


def can_run(op: str, backend: str = "auto", x: Tensor | torch.device | str | None = None) -> list[str]:
    """Why `backend` can't run `op` (a name such as "depthwise_conv2d" or "depthwise_conv2d_packed"): empty if it can.

    `x` is the tensor or device meant; without it, the question is about this machine.
    """
    if x is None:
        own = DEVICE.get(backend) or ("cuda" if torch.cuda.is_available() else "cpu")
        reasons = _reasons(op, backend, own)
        if own == "cuda" and not torch.cuda.is_available():
            reasons.append("torch sees no CUDA device")
        return reasons
    return _reasons(op, backend, device_of(x))


def device_of(x: Tensor | torch.device | str) -> str:
    """The type of its device; for meta the one that `meta_as` names."""
    of = x.device.type if isinstance(x, Tensor) else torch.device(x).type
    return _meta_as[-1] if of == "meta" else of


@contextlib.contextmanager
def meta_as(device_type: str) -> Iterator[None]:
    """Inside the with block can_run and device_of answer for tensors on meta as for those on `device_type`: what runs
    there can be seen on a machine that has no such device, and without computing anything."""
    _meta_as.append(device_type)
    try:
        yield
    finally:
        _meta_as.pop()


@functools.cache
def available(op: str, device_type: str) -> tuple[str, ...]:
    """The backends among which `auto` chooses for tensors on `device_type`."""
    return tuple(name for name in PREFERENCE.get(device_type, ()) if not _reasons(op, name, device_type))


@functools.cache  # an exception is not kept
def choose(op: str, backend: str, device_type: str) -> str:
    """The backend that `backend` means for tensors on `device_type`; raises with every reason if there is none.

    Of several on a GPU the first; choose_on_gpu looks at the arguments, too.
    """
    reasons = _reasons(op, backend, device_type)
    if reasons:
        raise ValueError(
            f"backend must be one that can run {op} on {device_type}, got {backend!r}: {'; '.join(reasons)}"
            + ("" if op.endswith("_packed") else '; backend="reference" (plain torch) can run there')
        )
    chosen = backend
    if backend == "auto" and device_type != "meta":
        chosen = available(op, device_type)[0]
    if device_type != "cuda" or chosen == "reference":
        _log(op, backend, device_type, chosen)
    return chosen


def choose_on_gpu(op: str, name: str, backend: str, arguments: dict[str, Any]) -> str:
    """ "cuda" or "triton", for a call of cnnfast::<name>: the op, its packed form or its gradient.

    Raises with every reason if `backend` can't run it. A gradient without C++ kernels is Triton's, whoever was named.
    """
    form = name.removesuffix("_backward")
    chosen = choose(form, backend, "cuda")
    if chosen == "cuda" and not _in_cuda(name):
        chosen = choose(form, "triton", "cuda")
    elif chosen == "cuda":
        refusal = cuda_kernels.refusal(op, arguments)
        others = available(form, "cuda")[1:] if backend == "auto" else ()
        if others and (refusal or not cuda_kernels.preferred(op, arguments)):
            chosen = others[0]
        elif refusal:
            raise ValueError(refusal)
    _log(name, backend, "cuda", chosen)
    return chosen


@functools.cache
def _in_cuda(name: str) -> bool:
    return hasattr(torch.ops.cnnfast_cuda, name)


@functools.cache  # each choice once
def _log(name: str, backend: str, device_type: str, chosen: str) -> None:
    if _LOG:
        print(f"cnnfast: {name} on {device_type}: backend {backend} -> {chosen}", file=sys.stderr)


def code(op: str, backend: str, device_type: str) -> int:
    """What to pass as the schema's `backend`, once it is known that it can run; or REFERENCE."""
    try:
        return REFERENCE if choose(op, backend, device_type) == "reference" else CODES[backend]
    except TypeError:  # not hashable
        raise _unknown(backend) from None


# torch.compile calls it while tracing and keeps the result; what torch.compiler.assume_constant_result sets, without
# the second that importing torch._dynamo takes.
code._dynamo_marked_constant = True  # type: ignore[attr-defined]


def triton_module(op: str) -> str:
    """The module with the op's Triton launchers."""
    return f"cnnfast.kernels.{'stats' if op.endswith(('_stats', '_squeeze')) else op}"


def _unknown(backend: object) -> ValueError:
    return ValueError(f"backend must be one of 'auto', {', '.join(map(repr, BACKENDS))}, got {backend!r}")


def _reasons(op: str, backend: str, device_type: str) -> list[str]:
    if backend not in CODES and backend != "reference":
        raise _unknown(backend)
    packed = op.endswith("_packed")
    if op.removesuffix("_packed") not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)} (or one with _packed after it), got {op!r}")
    if op == "local_response_norm_packed":
        return ["local_response_norm has no weights to pack: its plain form is the only one"]
    if op.endswith("_stats_packed"):
        return [f"{op.removesuffix('_packed')} is for training: its plain form is the only one"]
    if backend == "reference":
        return ["reference takes plain weights, not packed ones"] if packed else []
    if device_type == "meta":
        return []
    if backend == "auto":
        if device_type not in PREFERENCE:
            return [f"no backend takes tensors on {device_type}"]
        per_backend = {name: _reasons(op, name, device_type) for name in PREFERENCE[device_type]}
        if not all(per_backend.values()):
            return []
        return [f"{name}: {', '.join(reasons)}" for name, reasons in per_backend.items()]

    reasons = []
    if device_type != DEVICE[backend]:
        reasons.append(f"{backend} takes tensors on {DEVICE[backend]}, not {device_type}")
    if backend == "cpu":
        return reasons
    plain_op = op.removesuffix("_packed")
    if packed and plain_op not in PACKED_ON_GPU:
        reasons.append(f"{plain_op} has no packed form on the GPU yet")
    elif backend == "cuda":
        if _library.cuda_missing is not None:
            reasons.append(_library.cuda_missing)
        elif not hasattr(torch.ops.cnnfast_cuda, op):
            reasons.append(f"{op} has no CUDA C++ kernel yet")
    elif importlib.util.find_spec("cnnfast.kernels") is None or (
        importlib.util.find_spec(triton_module(plain_op)) is None
    ):
        reasons.append(f"{op} has no Triton kernel yet")
    elif importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed")
    return reasons
