"""The same plain PyTorch layers, run in the ways that a user would otherwise pick.

A peer takes a module in eval mode and its input, and returns a call that computes the output; all one-off work
(conversion, compilation) is done before it returns. Whatever it raises means that it can't run here: the row says so.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch

Peer = Callable[[torch.nn.Module, torch.Tensor], Callable[[], Any]]


def eager(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Layer by layer, NCHW."""
    module, x = in_layout(module, x, torch.contiguous_format)
    return lambda: module(x)


def eager_channels_last(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Layer by layer, channels_last."""
    module, x = in_layout(module, x, torch.channels_last)
    return lambda: module(x)


def inductor(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """torch.compile with freezing: weights become constants, BN is folded, convolutions get oneDNN's packed weights."""
    torch._dynamo.reset()  # or the cases before this one count against the limit of recompilations
    module, x = in_layout(module, x, torch.channels_last)
    # No graph from the cache: its key doesn't tell the number of threads that the code was generated for.
    with torch._inductor.config.patch(freezing=True, fx_graph_cache=False):
        compiled = torch.compile(module, fullgraph=True, dynamic=False)
        compiled(x)
    return lambda: compiled(x)


def onnxruntime(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """ONNX Runtime's CPU provider with all its graph optimisations, on as many threads as torch."""
    import onnxruntime

    if x.dtype != torch.float32:
        raise TypeError(f"ONNX Runtime's CPU kernels compute no {str(x.dtype).removeprefix('torch.')}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    # Its threads spin while it runs, as they do by default, but not on into the next contender's time.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(_onnx(module, x), options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: x.contiguous().numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def openvino(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """OpenVINO's CPU plugin, tuned for latency, on as many threads as torch; in bfloat16 by its precision hint, as it
    does it: weights and x are given to it in float32."""
    from openvino import Core
    from openvino import properties as of

    if x.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"OpenVINO's precision hint has no {str(x.dtype).removeprefix('torch.')} here")
    core = Core()
    options = {
        of.hint.performance_mode(): of.hint.PerformanceMode.LATENCY,
        of.hint.inference_precision(): "bf16" if x.dtype == torch.bfloat16 else "f32",
        of.inference_num_threads(): torch.get_num_threads(),
    }
    request = core.compile_model(core.read_model(io.BytesIO(_onnx(module, x))), "CPU", options).create_infer_request()
    given = [x.float().contiguous().numpy()]
    return lambda: torch.from_numpy(request.infer(given, share_inputs=True, share_outputs=True)[0]).to(x.dtype)


def _onnx(module: torch.nn.Module, x: torch.Tensor) -> bytes:
    """The module in ONNX, its weights and x widened to float32."""
    module = copy.deepcopy(module).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the exporter's own
        program = torch.onnx.export(module, (x.float().contiguous(),), dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto.SerializeToString()


def in_layout(
    module: torch.nn.Module, x: torch.Tensor, layout: torch.memory_format
) -> tuple[torch.nn.Module, torch.Tensor]:
    """Copies in that memory format."""
    module = copy.deepcopy(module).to(memory_format=layout)  # type: ignore[call-overload]
    return module, x.contiguous(memory_format=layout)


ENGINES = ("onnxruntime", "openvino")  # packages of their own, of the extra `bench`
PEERS: dict[str, Peer] = {
    "eager": eager,
    "eager_channels_last": eager_channels_last,
    "inductor": inductor,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}
TO_BEAT = ("eager_channels_last", "inductor", "onnxruntime", "openvino")  # what is quoted: the ratio to their best
