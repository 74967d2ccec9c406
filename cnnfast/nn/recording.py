"""A network's packed calls as one: csrc/cpu/packed_sequence.cpp runs what is recorded here.

A fused function is called with a `Value` in x's place: a packed op called with one writes itself down and returns the
next, and so do pooling, local response normalisation and concatenation of channels. Whatever else is done to a Value
(any other function of torch's, any attribute) raises NotRecordable, and that function is called as before, between two
sequences.

What is only concatenated is written where it is to lie in the concatenation, by the ops that can. A residual that
nothing else reads may be written over by the result of the op that adds it: each element is read, then written.
"""

from __future__ import annotations

import collections
import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnfast.ops._registration import PACKED_OPS

Call = Callable[[Tensor], Tensor]
# Steps that are no packed ops: packed_sequence.cpp's codes.
_CHANNELS_LAST, _MEAN, _CONCATENATE, _MAX_POOL, _AVG_POOL, _LOCAL_RESPONSE_NORM = 0, 100, 101, 102, 103, 104
_DOUBLE, _BITS = struct.Struct("d"), struct.Struct("q")
_WRITE_PARTS = (PACKED_OPS["conv2d"], PACKED_OPS["pointwise_conv2d"], _MAX_POOL, _AVG_POOL)

# Which of an op's arguments its residual is.
_RESIDUALS = {PACKED_OPS["conv2d"]: 1, PACKED_OPS["pointwise_conv2d"]: 2, PACKED_OPS["squeeze_excite"]: 1}


class NotRecordable(Exception):
    """A function does more than packed ops."""


class Value:
    """What a step of a sequence takes and returns; `channels` None where nothing tells them."""

    def __init__(self, recorder: Recorder, number: int, channels: int | None = None):
        self.recorder, self.number, self.channels = recorder, number, channels

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in _FUNCTIONS:
            raise NotRecordable(str(function))
        return _FUNCTIONS[function](*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        raise NotRecordable(name)

    def contiguous(self, *, memory_format: torch.memory_format) -> Value:
        if memory_format is not torch.channels_last:
            raise NotRecordable("contiguous")
        return self.recorder.add(_CHANNELS_LAST, [self], channels=self.channels)

    def mean_of_pixels(self) -> Value:
        """(N, C, H, W) -> (N, C, 1, 1)"""
        return self.recorder.add(_MEAN, [self], channels=self.channels)

    def local_response_norm(self, size: int, alpha: float, beta: float, k: float, backend: str) -> Value:
        if backend not in ("auto", "cpu"):
            raise NotRecordable(f"local_response_norm on {backend}")
        numbers = [float(alpha), float(beta), float(k)]
        return self.recorder.add(_LOCAL_RESPONSE_NORM, [self, int(size), *numbers, 0], channels=self.channels)


# What a Value goes through of torch's, by torch's signatures.


def _max_pool2d(
    x: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Value:
    if _pair(dilation) != [1, 1] or return_indices:
        raise NotRecordable("dilated pooling, or pooling with indices")
    sizes = [_pair(kernel_size), _pair(kernel_size if stride is None else stride), _pair(padding)]
    return x.recorder.add(_MAX_POOL, [x, *sizes, ceil_mode], channels=x.channels)


def _avg_pool2d(
    x: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    if divisor_override is not None:
        raise NotRecordable("pooling with a divisor")
    sizes = [_pair(kernel_size), _pair(kernel_size if stride is None else stride), _pair(padding)]
    return x.recorder.add(_AVG_POOL, [x, *sizes, ceil_mode, count_include_pad], channels=x.channels)


def _concatenate(values: Sequence[Any], dim: int = 0) -> Value:
    if dim != 1 or not all(type(value) is Value for value in values):
        raise NotRecordable("concatenation of anything but channels")
    channels = [value.channels for value in values]
    total = None if None in channels else sum(channels)
    return values[0].recorder.add(_CONCATENATE, [list(values)], channels=total)


def _pair(sizes: Any) -> list[int]:
    pair = [sizes, sizes] if isinstance(sizes, int) else list(sizes)
    if len(pair) != 2:
        raise NotRecordable(f"{sizes} where two sizes are wanted")
    return pair


_FUNCTIONS: dict[Any, Callable[..., Value]] = {
    F.max_pool2d: _max_pool2d,
    F.avg_pool2d: _avg_pool2d,
    torch.cat: _concatenate,
}


class Recorder:
    def __init__(self) -> None:
        self.steps: list[tuple[int, list[Any]]] = []
        self.values = [Value(self, 0)]
        self.packed: list[Tensor] = []

    def add(
        self, code: int | None, arguments: list[Any], packed: Tensor | None = None, channels: int | None = None
    ) -> Value:
        """arguments: the op's, without `packed`; a Value for each tensor. code None: what has no step."""
        if code is None:
            raise NotRecordable("not on a CPU")
        if packed is not None:
            self.packed.append(packed)
        self.steps.append((code, arguments))
        self.values.append(Value(self, len(self.steps), channels))
        return self.values[-1]

    def drop(self, steps: int, packings: int) -> None:
        """What is behind that many."""
        del self.steps[steps:], self.values[steps + 1 :], self.packed[packings:]

    def program(self) -> Tensor:
        last_read = {0: 0}
        for n, (_, arguments) in enumerate(self.steps):
            last_read.update({value.number: n for value in _values(arguments)})
        places = self._places()
        words: list[int] = [len(self.steps)]
        for n, (code, arguments) in enumerate(self.steps):
            words.append(code)
            words.extend(_words(places.get(n + 1, [])))
            words.extend(itertools.chain.from_iterable(map(_words, arguments)))
            words.extend(_words([value for value, last in last_read.items() if last == n]))
        return torch.tensor(words, dtype=torch.int64)

    def _places(self) -> dict[int, list[int]]:
        """Of the values that are written into a concatenation: its number, their first channel, its channels. Of those
        that may be written over another: its number."""
        reads = collections.Counter(value.number for _, arguments in self.steps for value in _values(arguments))
        places = self._residuals_last_read()
        for number, (code, arguments) in enumerate(self.steps, 1):
            total = self.values[number].channels
            if code != _CONCATENATE or total is None:
                continue
            first = 0
            for value in _values(arguments):
                assert value.channels is not None  # or there were no total
                if reads[value.number] == 1 and value.number and self.steps[value.number - 1][0] in _WRITE_PARTS:
                    places[value.number] = [number, first, total]
                first += value.channels
        return places

    def _residuals_last_read(self) -> dict[int, list[int]]:
        """By the value of the op that adds it, the residual that nothing reads after it, nor it in another place."""
        last_read = {value.number: n for n, (_, arguments) in enumerate(self.steps, 1) for value in _values(arguments)}
        found = {}
        for n, (code, arguments) in enumerate(self.steps, 1):
            residual = arguments[_RESIDUALS[code]] if code in _RESIDUALS else None
            if residual is None or last_read[residual.number] > n:
                continue
            if [value.number for value in _values(arguments)].count(residual.number) == 1:
                found[n] = [residual.number]
        return found


def _values(arguments: Sequence[Any]) -> Iterator[Value]:
    for argument in arguments:
        if isinstance(argument, Value):
            yield argument
        elif isinstance(argument, list):
            yield from _values(argument)


def _words(argument: Any) -> list[int]:
    if isinstance(argument, Value):
        return [argument.number]
    if argument is None:
        return [-1]
    if isinstance(argument, (list, tuple)):
        return [len(argument), *itertools.chain.from_iterable(map(_words, argument))]
    return [_BITS.unpack(_DOUBLE.pack(argument))[0] if isinstance(argument, float) else int(argument)]


class Recorded:
    """Calls one after the other, as one op where they are packed ops only."""

    def __init__(self, calls: Sequence[Call], recorder: Recorder):
        self.calls = list(calls)
        self.packed, self.program = recorder.packed, recorder.program()
        self.op = torch.ops.cnnfast.packed_sequence.default

    def __call__(self, x: Tensor) -> Tensor:
        try:
            return self.op(x, self.packed, self.program)
        except (RuntimeError, TypeError):
            for call in self.calls:  # one of these says in one sentence what doesn't fit
                x = call(x)
            return x


def record(calls: Sequence[Call], recordable: Callable[[Call], bool]) -> list[Call]:
    """`calls`, each run of at least two steps that are `recordable` and prove to be packed ops, with pooling and
    concatenation between them, as one."""
    joined: list[Call] = []
    run: list[Call] = []
    recorder = Recorder()
    value = recorder.values[0]

    def end_run() -> None:
        joined.extend([Recorded(run, recorder)] if recorder.packed and len(recorder.steps) > 1 else run)

    for call in calls:
        steps, packings = len(recorder.steps), len(recorder.packed)
        try:
            if not recordable(call):
                raise NotRecordable(str(call))
            after: Any = call(value)  # type: ignore[arg-type]
            if not isinstance(after, Value):
                raise NotRecordable(str(call))
            value = after
            run.append(call)
        except (NotRecordable, TypeError):  # of Python's own operations on a Value
            recorder.drop(steps, packings)
            end_run()
            joined.append(call)
            run, recorder = [], Recorder()
            value = recorder.values[0]
    end_run()
    return joined
