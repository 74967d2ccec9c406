"""What a forward runs, layer by layer or fused, seen on its way to PyTorch's dispatcher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cnnfast.models.network import Network
from cnnfast.nn import FusedModule, FusedSequential
from cnnfast.nn.sequential import Chain, runs
from cnnfast.ops import backends

# Neither read nor write, though the dispatcher doesn't call them views.
_NO_TRAFFIC = {"_unsafe_view", "_reshape_alias", "empty", "empty_like", "new_empty", "lift_fresh"}


@dataclass(frozen=True)
class Conv:
    """A convolution's shape; `inputs` and `outputs` are (height, width)."""

    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    inputs: tuple[int, int]
    outputs: tuple[int, int]


@dataclass
class Layer:
    """A plain layer, or a call of an op: all that a module without children does in one call, or an op outside of such.

    `block` names what an eval forward runs as one; `reads` and `writes` are bytes, every tensor once; `inputs` are the
    positions of the layers that made what it reads, and the shapes of that.
    """

    path: str
    kind: str
    block: str
    shape: tuple[int, ...] = ()
    parameters: int = 0
    macs: int = 0
    reads: int = 0
    writes: int = 0
    op: str = ""  # of cnnfast, if one runs
    backend: str = "ATen"  # or which of cnnfast's runs it, "cpu packed", "cpu", "cuda packed", "triton", ...
    conv: Conv | None = None
    inputs: dict[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return self.reads + self.writes


class Recorder(TorchDispatchMode):
    """Lists in `layers` what `network` runs inside the with block, in order, on a device of `device_type`."""

    def __init__(self, network: nn.Module, device_type: str = "cpu"):
        super().__init__()
        self.device_type = device_type
        self.layers: list[Layer] = []
        self._paths = {module: path for path, module in network.named_modules()}
        self._runs = dict(_runs(network))
        self._open: list[tuple[str, Any]] = []  # the modules being called, outermost first; or (block, None)
        self._layer: Layer | None = None  # being called, of one module
        self._made: set[int] = set()  # by it; ids of tensors, as those below
        self._seen: set[int] = set()  # by it, views by themselves
        self._taken: dict[int, int] = {}  # of each tensor that isn't a view the bytes that it has read
        self._kept: list[Any] = []  # alive, so that no id is given twice
        self._bases: dict[int, int] = {}  # id of a view -> id of the tensor that it looks at
        self._makers: dict[int, int] = {}  # id of a tensor -> position of the layer that wrote it last
        self._unread = {id(parameter): parameter.numel() for parameter in network.parameters()}

    def __enter__(self) -> Recorder:
        self._hooks = [register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave)]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    # modules

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module not in self._paths:
            return
        self._open.append((self._paths[module], module))
        if self._layer is None and not any(True for _ in module.children()):
            self._layer = self._begun(self._paths[module], type(module).__name__, self._block())

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if module not in self._paths:
            return
        if self._layer is not None and self._layer.path == self._paths[module]:
            if self._layer.shape:  # it computed something
                self.layers.append(self._layer)
            self._layer = None
        self._open.pop()

    @contextmanager
    def calling(self, block: str) -> Iterator[None]:
        """While the call that replaces the layers of `block` runs."""
        self._open.append((block, None))
        yield
        self._open.pop()

    def _block(self, op: str = "") -> str:
        """The outermost of the modules being called that an eval forward runs as one."""
        for path, module in self._open:
            if module is None or (
                isinstance(module, FusedModule) and not isinstance(module, Network | FusedSequential)
            ):
                return path
            if path in self._runs:
                return self._runs[path]
        return f"{self._open[-1][0]} {op}".strip()

    # ops

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs, outputs = _tensors((args, kwargs or {})), _tensors(result)
        self._kept += [inputs, outputs]
        namespace, _, name = function._schema.name.partition("::")
        if function.is_view or name == "_unsafe_view":
            for output in outputs:
                self._bases[id(output)] = self._base(inputs[0])
        if function.is_view or name in _NO_TRAFFIC or not outputs:
            return result
        kind = name.strip("_")
        layer = self._layer or self._begun(self._open[-1][0], kind, self._block(kind))
        self._read(layer, inputs)
        layer.shape = tuple(outputs[0].shape)
        layer.writes = _nbytes(outputs[0])  # others, the indices of a pooling, nobody reads
        count = flop_registry.get(function._overloadpacket)
        layer.macs += 0 if count is None else count(*args, **(kwargs or {}), out_val=result) // 2
        if namespace == "cnnfast":
            layer.op, layer.backend = name, self._backend(function, name, args)
        layer.conv = _conv(args, outputs[0]) if name == "convolution" else layer.conv
        for output in outputs:
            self._made.add(self._base(output))
            self._makers[self._base(output)] = len(self.layers)
        if layer is not self._layer:
            self.layers.append(layer)
        return result

    def _backend(self, function: Any, name: str, args: Any) -> str:
        op, names = name.removesuffix("_packed"), [argument.name for argument in function._schema.arguments]
        if self.device_type == "cuda":
            backend = backends.choose_on_gpu(op, name, "auto", dict(zip(names, args, strict=False)))
        else:
            backend = backends.choose(name, "auto", self.device_type)
        return f"{backend} packed" if name.endswith("_packed") else backend

    def _begun(self, path: str, kind: str, block: str) -> Layer:
        self._made, self._seen, self._taken = set(), set(), {}
        return Layer(path, kind, block)

    def _base(self, tensor: Tensor) -> int:
        return self._bases.get(id(tensor), id(tensor))

    def _read(self, layer: Layer, inputs: list[Tensor]) -> None:
        for tensor in inputs:
            base = self._base(tensor)
            if base in self._made or id(tensor) in self._seen:
                continue
            self._seen.add(id(tensor))
            before = self._taken.get(base, 0)  # through another view
            self._taken[base] = min(before + _nbytes(tensor), tensor.untyped_storage().nbytes())
            layer.reads += self._taken[base] - before
            layer.parameters += self._unread.pop(base, 0)
            if base in self._makers:
                layer.inputs[self._makers[base]] = tuple(tensor.shape)


def name_calls(network: nn.Module, recorder: Recorder) -> None:
    """Has each call of a packed network that isn't a module's tell `recorder` whose layers it replaces."""
    for path, module in network.named_modules():
        chain = module.fused() if isinstance(module, Network | FusedSequential) else None
        if isinstance(chain, Chain):
            chain.steps = [(name, _named(name, call, path, recorder)) for name, call in chain.steps]


def _named(name: str, call: Any, path: str, recorder: Recorder) -> Any:
    if isinstance(call, nn.Module):
        return call
    block = recorder._runs[f"{path}.{name}".strip(".")]

    def named(x: Tensor) -> Tensor:
        with recorder.calling(block):
            return call(x)

    return named


def _runs(network: nn.Module) -> Iterator[tuple[str, str]]:
    """Of layers that lie flat in a network or Sequential and are one call for inference: (layer, first of them)."""
    for path, module in network.named_modules():
        if isinstance(module, Network):
            groups: Iterable[Any] = (step for step in module.steps if isinstance(step, tuple))
        elif isinstance(module, FusedSequential):
            groups = ([name for name, _ in run] for run in runs(list(module.named_children())))
        else:
            continue
        for names in groups:
            for name in names:
                yield f"{path}.{name}".strip("."), f"{path}.{names[0]}".strip(".")


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _nbytes(tensor: Tensor) -> int:
    """Less than its numbers' where it is expanded."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _conv(args: Any, y: Tensor) -> Conv | None:
    x, weight, _, stride, _, dilation, transposed, _, groups = args
    if transposed or x.dim() != 4:
        return None
    pair = lambda values: (values[0], values[-1])  # noqa: E731
    return Conv(
        in_channels=x.shape[1],
        out_channels=y.shape[1],
        kernel=(weight.shape[2], weight.shape[3]),
        stride=pair(stride),
        dilation=pair(dilation),
        groups=groups,
        inputs=(x.shape[2], x.shape[3]),
        outputs=(y.shape[2], y.shape[3]),
    )


def record(network: nn.Module, x: Tensor, fused: bool, device_type: str = "cpu") -> list[Layer]:
    """What an eval forward of `x` runs on a device of `device_type`; `network` and `x` may be on the meta device."""
    recorder = Recorder(network, device_type)
    with torch.no_grad(), backends.meta_as(device_type):
        if fused:
            network(x)  # packs the weights
            name_calls(network, recorder)
        with recorder:
            network(x)
    return recorder.layers
