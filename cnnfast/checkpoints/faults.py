"""What of a checkpoint doesn't fit a network, all of it, as one readable line."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor


def is_counter(key: str) -> bool:
    """What PyTorch before 0.4.1 didn't have, and inference doesn't read."""
    return key.endswith("num_batches_tracked")


def same_numbers(shape: Sequence[int], own: Sequence[int]) -> bool:
    """Whether weights of `shape` are those of `own`: of that shape, or of a linear layer (O, I * h * w) where the other
    is a convolution (O, I, h, w) of the same numbers in the same order."""
    linear, conv = sorted((tuple(shape), tuple(own)), key=len)
    return linear == conv or ((len(linear), len(conv)) == (2, 4) and linear == (conv[0], math.prod(conv[1:])))


def find_faults(own: Mapping[str, Tensor], theirs: Mapping[str, str], state: Mapping[str, Tensor]) -> Iterator[str]:
    """A phrase for each kind of fault with which `state` can't be loaded.

    Args:
        own: the network's tensors.
        theirs: of each of their names that in the checkpoint.
        state: the checkpoint, less what the network doesn't want of it.
    """
    wanted = list(theirs.values())
    missing = [name for name in wanted if name not in state and not is_counter(name)]
    if missing:
        yield f"{len(missing)} missing ({_grouped(missing, wanted)})"
    unwanted = state.keys() - set(wanted)
    if unwanted:
        yield f"{len(unwanted)} not wanted ({_grouped([name for name in state if name in unwanted], list(state))})"
    pairs = {name: (state[name], own[key]) for key, name in theirs.items() if name in state}
    shapes = {
        name: f"{name} {tuple(tensor.shape)}, not {tuple(parameter.shape)}"
        for name, (tensor, parameter) in pairs.items()
        if not same_numbers(tensor.shape, parameter.shape)
    }
    if shapes:
        yield f"{len(shapes)} of another shape ({_grouped(shapes, pairs, shapes)})"
    types = {name: f"{name} {_form(tensor)}" for name, (tensor, like) in pairs.items() if not _is_dense(tensor, like)}
    if types:
        yield f"{len(types)} not dense floats ({_grouped(types, pairs, types)})"
    values = [name for name, pair in pairs.items() if not (shapes.get(name) or types.get(name)) and not _finite(*pair)]
    if values:
        dtype = pairs[values[0]][1].dtype
        yield f"{len(values)} not finite in {dtype} ({_grouped(values, pairs)})"


def _is_dense(tensor: Tensor, like: Tensor) -> bool:
    same_kind = tensor.is_floating_point() == like.is_floating_point() and not tensor.is_complex()
    return same_kind and not tensor.is_meta and tensor.layout == torch.strided and not tensor.is_quantized


def _form(tensor: Tensor) -> str:
    form = "on meta" if tensor.is_meta else "" if tensor.layout == torch.strided else f"as {tensor.layout}"
    return f"{tensor.dtype} {form}".strip()


def _finite(tensor: Tensor, like: Tensor) -> bool:
    """Whether it is in the network's dtype, which may hold less."""
    return not like.is_floating_point() or bool(tensor.to(like.dtype).isfinite().all())


def _grouped(names: Collection[str], among: Iterable[str], texts: Mapping[str, str] | None = None) -> str:
    """All of `names` by module: `blocks.3.*: 40` where they are all that `among` has there, `bn1.{weight,
    bias}` otherwise; with `texts`, which says more of each, that of the first and how many it stands for."""
    left = list(dict.fromkeys(names))
    total: defaultdict[str, int] = defaultdict(int)
    count: defaultdict[str, int] = defaultdict(int)
    for name in among:
        if not is_counter(name):
            for prefix in _prefixes(name):
                total[prefix] += 1
    for name in left:
        if not is_counter(name):
            for prefix in _prefixes(name):
                count[prefix] += 1
    groups: defaultdict[tuple[str, bool], list[str]] = defaultdict(list)
    for name in left:
        whole = next((p for p in _prefixes(name) if count[p] == total[p] > 1), None)
        module = name.rpartition(".")[0]
        is_whole = whole is not None and not (texts is None and whole == module)
        groups[(whole if is_whole and whole is not None else module, is_whole)].append(name)
    return ", ".join(_group(module, whole, found, texts) for (module, whole), found in groups.items())


def _group(module: str, whole: bool, names: Sequence[str], texts: Mapping[str, str] | None) -> str:
    if texts is not None and not (whole and len(names) > 2):
        return ", ".join(texts[name] for name in names)
    if whole:
        if not module:
            return f"all, {texts[names[0]]}, ..." if texts else f"all, {names[0]} to {names[-1]}"
        return f"{module}.*: {len(names)}, {texts[names[0]]}, ..." if texts else f"{module}.*: {len(names)}"
    leaves = [name.rpartition(".")[2] for name in names]
    if len(leaves) == 1:
        return names[0]
    return f"{module}.{{{', '.join(leaves)}}}" if module else ", ".join(leaves)


def _prefixes(name: str) -> Iterator[str]:
    """The modules that hold `name`, from the whole network, "", to the innermost."""
    yield ""
    parts = name.split(".")[:-1]
    for n in range(1, len(parts) + 1):
        yield ".".join(parts[:n])
