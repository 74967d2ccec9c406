"""A network of ours against the one that it takes the place of, with the same weights, stage by stage."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cnnfast._peers import checkpoint_source, first_peer, plain_network
from cnnfast.checkpoints import load_weights
from cnnfast.checkpoints.faults import find_faults
from cnnfast.checkpoints.recognise import Layout, layout_of, layouts
from cnnfast.exactness import FLOAT64_BOUND, Error, draw_batch_norms, errors, in_float64, relative
from cnnfast.imports import import_module, in_words
from cnnfast.models import create_model
from cnnfast.models.network import Network
from cnnfast.models.registry import model_entry
from cnnfast.nn import set_backend

LAST_MAP, LOGITS = "last map", "logits"
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Stage:
    """One output of both networks. Errors are of the worst channel, RMS, relative to its size, against float64."""

    name: str  # the module after which it is taken, or LAST_MAP or LOGITS
    shape: tuple[int, ...]
    error: float
    theirs: float  # PyTorch's own, in the same dtype
    bound_part: float  # the largest part of what the policy allows, over its measures
    agrees: bool


@dataclass(frozen=True)
class Report:
    name: str
    against: str
    weights: str
    stages: list[Stage]
    # The last layer to which the two agree (None: the input) and the first where they don't, if they have layers of one
    # form.
    layers: tuple[str | None, str] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def first_fault(self) -> Stage | None:
        return next((stage for stage in self.stages if not stage.agrees), None)


def verify(
    name: str,
    against: str | None = None,
    weights: str | os.PathLike | None = None,
    source: str | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    size: int | None = None,
    batch: int = 2,
    inputs: int = 8,
    seed: int = 0,
    memory_format: torch.memory_format = torch.channels_last,
    num_classes: int | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Report:
    """Gives both networks the same weights and compares their feature maps, last maps and logits.

    Args:
        name: of cnnfast.list_models; of a network that isn't a cnnfast Network the logits alone are compared.
        against: "timm", "torchvision", "module:factory" (called without arguments), or "reference", this network's own
            layers run by plain PyTorch; None for the package whose keys ours has, or "reference" if none has it.
        weights, source: load_weights's; None for fresh ones, with batch normalisation as after training.
        size: of the images, height and width; None for pretrained_cfg's.
        inputs: batches over which errors are averaged.
        memory_format: of PyTorch's network and of the inputs, see `compare`.
        num_classes: of both networks, as your weights have them; None for the network's own.
        progress: told what is being done.

    Raises:
        ValueError: a network, weights, size or package that there isn't, or outputs that aren't finite in `dtype`.
    """
    progress(f"building {name}")
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    entry, known = model_entry(name), layouts(_on_meta(name, options))
    size = size or entry.pretrained_cfg["input_size"][-1]
    shape = (batch, entry.pretrained_cfg["input_size"][0], size, size)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    against = against or first_peer(name) or "reference"
    ours: Any = create_model(name, **options).eval()
    if size < (least := getattr(ours, "min_size", 1)):
        raise ValueError(f"size must be at least {least} for {name}, got {size}")
    theirs = _other(name, against, options).eval()
    layout = _layout(name, ours, theirs, known, against)
    if weights is None:
        draw_batch_norms(theirs, torch.randn(max(batch, 2), *shape[1:], generator=generator))
        state, own = theirs.state_dict(), ours.state_dict()
        ours.load_state_dict({key: state[n].reshape(own[key].shape) for key, n in layout.names.items()})
    else:
        load_weights(ours, weights, source)
        own = theirs.state_dict()
        values = {layout.names[key]: value for key, value in ours.state_dict().items()}
        theirs.load_state_dict({key: values[key].reshape(value.shape) for key, value in own.items()})
    ours, theirs = (network.to(device, dtype) for network in (ours, theirs))
    set_backend(ours, backend)
    xs = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(inputs)]
    stages, layers = compare(ours, theirs, xs, layout.names, memory_format, progress)
    settings: dict[str, Any] = dict(device=str(device), dtype=str(dtype).removeprefix("torch."), backend=backend)
    layout_name = str(memory_format).removeprefix("torch.").removesuffix("_format")
    settings |= dict(size=size, batch=batch, inputs=inputs, seed=seed, memory_format=layout_name)
    title = checkpoint_source(name, against) if against in entry.peers else None
    return Report(name, title or against, str(weights) if weights else "drawn", stages, layers, settings)


def compare(
    ours: nn.Module,
    theirs: nn.Module,
    xs: list[Tensor],
    names: Mapping[str, str],
    memory_format: torch.memory_format = torch.channels_last,
    progress: Callable[[str], None] = lambda what: None,
) -> tuple[list[Stage], tuple[str | None, str] | None]:
    """The stages of two networks with the same weights, in eval mode, and between which layers they begin to disagree.

    Args:
        names: of each of our keys that in theirs.
        memory_format: of theirs and of the inputs. By default as ours is inside: the two formats add up in other
            orders, and PyTorch's own error in a dense 3x3 convolution of float32 is 2 (64 channels) to 4 times (512) as
            large in channels_last as in its default. Beside that ours reaches 0.98 of the bound (vgg16_bn at 224).
    """
    theirs = theirs.to(memory_format=memory_format)  # type: ignore[call-overload]
    xs = [x.contiguous(memory_format=memory_format) for x in xs]
    exact = in_float64(theirs)
    outputs: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    with torch.no_grad():
        for n, x in enumerate(xs, 1):
            progress(f"input {n} of {len(xs)}")
            mine = _our_stages(ours, x)
            other, ref = (_their_stages(net, y, ours, names) for net, y in ((theirs, x), (exact, x.double())))
            for stage in [stage for stage in mine if stage in other]:
                outputs.setdefault(stage, []).append((mine[stage], other[stage], ref[stage]))
        stages = [_stage(name, triples) for name, triples in outputs.items()]
        fault = next((stage for stage in stages if not stage.agrees), None)
        layers = None
        if fault and isinstance(ours, Network):
            layers = _first_layers(ours, theirs, exact, xs[:2], names, fault.name)
    return stages, layers


def _stage(name: str, triples: list[tuple[Tensor, Tensor, Tensor]]) -> Stage:
    ours, theirs, ref = triples[0]
    shape = tuple(ref.shape[1:])
    if ours.shape != ref.shape:
        raise ValueError(f"against must be a network of the same shapes, got {shape} for {tuple(ours.shape[1:])}")
    if not all(bool(output.isfinite().all()) for _, *both in triples for output in both):
        raise ValueError(f"dtype must be one that holds the network's outputs: {theirs.dtype} doesn't, at {name}")
    if ours.dtype == torch.float64:
        found = [Error("relative", 1.0, relative(o, r), 0.0, FLOAT64_BOUND) for o, _, r in triples]
    else:
        found = errors(triples)
    worst = next(error for error in found if error.rank == 1.0)
    part = max(error.part for error in found)
    return Stage(name, shape, worst.ours, worst.theirs, part, all(error.allowed for error in found))


# What is compared


def _our_stages(network: nn.Module, x: Tensor) -> Outputs:
    if not isinstance(network, Network):
        return {LOGITS: network(x)}
    last, maps = network.forward_intermediates(x)
    taps = [info["module"] for info in network.feature_info]
    return {**dict(zip(taps, maps, strict=True)), LAST_MAP: last, LOGITS: network(x)}


def _their_stages(network: nn.Module, x: Tensor, ours: nn.Module, names: Mapping[str, str]) -> Outputs:
    """Under our names; of a network without feature maps, what its modules of the same names give."""
    if not isinstance(ours, Network):
        return {LOGITS: network(x)}
    taps = [info["module"] for info in ours.feature_info]
    if hasattr(network, "forward_intermediates"):
        call: Callable[[Tensor], Any] = network.forward_intermediates  # type: ignore[assignment]
        last, maps = call(x)
        stages = dict(zip(taps, maps, strict=True)) if len(maps) == len(taps) else {}
        return {**stages, LAST_MAP: last, LOGITS: network(x)}
    same = {tap for tap in taps if ours._tap(tap) == (tap, None) and _has_same(network, tap, names)}
    outputs, logits = _outputs_of(network, x, {tap: tap for tap in taps if tap in same})
    return {**outputs, LOGITS: logits}


def _has_same(network: nn.Module, module: str, names: Mapping[str, str]) -> bool:
    """Whether `network` has the module under the same name."""
    own_names = all(name == key for key, name in names.items() if key.startswith(module + "."))
    return own_names and module in dict(network.named_modules())


def _outputs_of(network: nn.Module, x: Tensor, modules: Mapping[str, str]) -> tuple[Outputs, Tensor]:
    """What each of `modules` gives, by the name that it is mapped from; and what the network gives."""
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.setdefault(name, []).append(output.clone())  # a ReLU behind it may work in place

        return hook

    handles = [network.get_submodule(theirs).register_forward_hook(keep(name)) for name, theirs in modules.items()]
    try:
        y = network(x)
    finally:
        for handle in handles:
            handle.remove()
    return {name: found[0] for name, found in outputs.items() if len(found) == 1}, y  # not of a ReLU that many share


def _twin(module: str, theirs: nn.Module, names: Mapping[str, str]) -> str | None:
    """The module of theirs that has the parameters of our `module`, these and no others: of the same name, or else the
    outermost."""
    mine = [name for key, name in names.items() if key.startswith(module + ".")]
    if not mine:
        return None
    parts, known = mine[0].split("."), dict(theirs.named_modules())
    for twin in (module, *(".".join(parts[:n]) for n in range(1, len(parts)))):
        held = [name for name in names.values() if name.startswith(twin + ".")]
        if twin in known and sorted(held) == sorted(mine):
            return twin
    return None


def _first_layers(
    ours: Network, theirs: nn.Module, exact: nn.Module, xs: list[Tensor], names: Mapping[str, str], stage: str
) -> tuple[str | None, str] | None:
    """The last of our layers that agrees with its twin, and the first that doesn't; or before that the layer after
    which `stage`, which doesn't, is taken: a stem, of layers that are none of theirs, has no twin."""
    calls = [name for name, _ in ours._calls() if ours._tap(name) == (name, None)]
    twins = {name: twin for name in calls if (twin := _twin(name, theirs, names))}
    triples: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for x in xs if twins else ():
        mine = ours._run(x, list(twins))[1]
        other, ref = (_outputs_of(net, y, twins)[0] for net, y in ((theirs, x), (exact, x.double())))
        for name in [name for name in twins if name in other and other[name].shape == mine[name].shape]:
            triples.setdefault(name, []).append((mine[name], other[name], ref[name]))
    agree = None
    for name in calls:
        if (name == stage and name not in triples) or (name in triples and not _stage(name, triples[name]).agrees):
            return agree, name
        agree = name if name in triples else agree
    return None


# The two networks


def _on_meta(name: str, options: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **options)


def _other(name: str, against: str, options: dict[str, Any]) -> nn.Module:
    peers = model_entry(name).peers
    if against == "reference":
        network = create_model(name, **options)
        set_backend(network, "reference")
        return network
    if against in peers:
        return plain_network(name, against, **options)
    module, colon, factory = against.partition(":")
    if not colon:
        known = [*peers, "reference", "module:factory"]
        raise ValueError(f"against must be one of {', '.join(known)} for {name}, got {against!r}")
    try:
        network = getattr(import_module(module), factory)()
    except Exception as error:  # whatever the user's code raises
        what = str(error) if isinstance(error, ValueError) else in_words(error)
        raise ValueError(f"against must name a function that makes a network, got {against!r}: {what}") from None
    if not isinstance(network, nn.Module):
        raise ValueError(f"against must make a torch.nn.Module, got {type(network).__name__} of {against!r}")
    return network


def _layout(name: str, ours: nn.Module, theirs: nn.Module, known: list[Layout], against: str) -> Layout:
    """That of `theirs`."""
    if against in model_entry(name).peers:
        return layout_of(ours, checkpoint_source(name, against) or against)
    state = theirs.state_dict()
    best = max(known, key=lambda layout: len(state.keys() & set(layout.names.values())))
    faults = list(find_faults(ours.state_dict(), best.names, state))
    if faults:
        raise ValueError(f"against must have the weights of {name}, got {against!r}: {'; '.join(faults)}")
    return best
