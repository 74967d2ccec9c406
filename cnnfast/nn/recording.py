"""A network's packed calls as one: csrc/cpu/packed_sequence.cpp runs what is recorded here.

A fused function is called with a `Value` in x's place: a packed op called with one writes itself down and returns the
next. Whatever else is done to a Value (any function of torch's, any attribute) raises NotRecordable, and that function
is called as before, between two sequences.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Call = Callable[[Tensor], Tensor]
_CHANNELS_LAST, _MEAN = 0, 100  # steps that are no packed ops: packed_sequence.cpp's codes


class NotRecordable(Exception):
    """A function does more than packed ops."""


class Value:
    """What a step of a sequence takes and returns."""

    def __init__(self, recorder: Recorder, number: int):
        self.recorder, self.number = recorder, number

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotRecordable(str(function))

    def __getattr__(self, name: str) -> Any:
        raise NotRecordable(name)

    def contiguous(self, *, memory_format: torch.memory_format) -> Value:
        if memory_format is not torch.channels_last:
            raise NotRecordable("contiguous")
        return self.recorder.add(_CHANNELS_LAST, [self])

    def mean_of_pixels(self) -> Value:
        """(N, C, H, W) -> (N, C, 1, 1)"""
        return self.recorder.add(_MEAN, [self])


class Recorder:
    def __init__(self) -> None:
        self.steps: list[tuple[int, list[Any]]] = []
        self.packed: list[Tensor] = []

    def add(self, code: int | None, arguments: list[Any], packed: Tensor | None = None) -> Value:
        """arguments: the op's, without `packed`; a Value for each tensor. code None: what has no step."""
        if code is None:
            raise NotRecordable("not on a CPU")
        if packed is not None:
            self.packed.append(packed)
        self.steps.append((code, arguments))
        return Value(self, len(self.steps))

    def program(self) -> Tensor:
        last_read = {0: 0}
        for n, (_, arguments) in enumerate(self.steps):
            last_read.update({a.number: n for a in arguments if isinstance(a, Value)})
        words: list[int] = [len(self.steps)]
        for n, (code, arguments) in enumerate(self.steps):
            words.append(code)
            words.extend(itertools.chain.from_iterable(map(_words, arguments)))
            words.extend(_words([value for value, last in last_read.items() if last == n]))
        return torch.tensor(words, dtype=torch.int64)


def _words(argument: Any) -> list[int]:
    if isinstance(argument, Value):
        return [argument.number]
    if argument is None:
        return [-1]
    if isinstance(argument, (list, tuple)):
        return [len(argument), *argument]
    return [int(argument)]


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
    """`calls`, each run of at least two that are `recordable` and prove to be packed ops as one."""
    joined: list[Call] = []
    run: list[Call] = []
    recorder = Recorder()
    value = Value(recorder, 0)

    def end_run() -> None:
        joined.extend([Recorded(run, recorder)] if len(recorder.steps) > 1 else run)

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
            del recorder.steps[steps:], recorder.packed[packings:]
            end_run()
            joined.append(call)
            run, recorder = [], Recorder()
            value = Value(recorder, 0)
    end_run()
    return joined
