"""Convolutions that stand in for one dense convolution, and what they cost beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cnnfast.summary.recorder import Conv, Layer


@dataclass(frozen=True)
class Factorised:
    """Convolutions one behind the other, with nothing but normalisation, activations and gates between them.

    `ratio` is their MACs / those of the `dense` convolution (height, width of its filter) with the first one's input
    and the last one's output channels; `formula` and `expected` what that comes to by the paper, where all channels in
    between are as many.
    """

    paths: tuple[str, ...]
    kind: str
    channels: tuple[int, ...]
    outputs: tuple[int, int]
    dense: tuple[int, int]
    ratio: float
    formula: str
    expected: float


def factorised(layers: Sequence[Layer]) -> list[Factorised]:
    """Depthwise separable convolutions, 1/M + 1/K^2 of a dense one (M output channels, a K x K filter): in Xception's
    middle flow, 728 channels at 19 x 19, 1/728 + 1/9; n x 1 and 1 x n in place of n x n: 2/n; m filters of k x k for
    one of as many pixels as they see together: m k^2 / (m (k - 1) + 1)^2.
    """
    found = [*_separable(layers), *_asymmetric(layers), *_stacked(layers)]
    position = {layer.path: i for i, layer in reversed([*enumerate(layers)])}
    return sorted(found, key=lambda one: position[one.paths[0]])


def _separable(layers: Sequence[Layer]) -> Iterator[Factorised]:
    for layer, before in _pairs(layers):
        dw, pw = before.conv, layer.conv
        assert dw and pw
        depthwise = 1 < dw.groups == dw.in_channels and dw.kernel != (1, 1)
        if depthwise and (pw.kernel, pw.stride, pw.groups) == ((1, 1), (1, 1), 1):
            times, taps = dw.out_channels // dw.in_channels, math.prod(dw.kernel)
            formula, expected = f"{times}/{pw.out_channels} + {times}/{taps}", times / pw.out_channels + times / taps
            yield _made([before, layer], "depthwise, 1×1", dw.kernel, formula, expected)


def _asymmetric(layers: Sequence[Layer]) -> Iterator[Factorised]:
    taken: set[int] = set()
    for layer, before in _pairs(layers):
        first, second = before.conv, layer.conv
        assert first and second
        n = max(second.kernel)
        if id(before) in taken or n == 1 or min(second.kernel) != 1 or first.kernel != second.kernel[::-1]:
            continue
        if _plain(first) and _plain(second):
            taken.add(id(layer))
            kind = f"{_times(first.kernel)}, {_times(second.kernel)}"
            yield _made([before, layer], kind, (n, n), f"2/{n}", 2 / n)


def _stacked(layers: Sequence[Layer]) -> Iterator[Factorised]:
    links = {}  # the convolution before each, both of one square filter
    for layer, before in _pairs(layers):
        first, second = before.conv, layer.conv
        assert first and second
        k = second.kernel[0]
        if first.kernel == second.kernel == (k, k) and k > 1 and _plain(first) and _plain(second):
            links[id(layer)] = before
    followed = {id(before) for before in links.values()}
    for layer in layers:
        if id(layer) in links and id(layer) not in followed:
            stack = [layer]
            while id(stack[0]) in links:
                stack.insert(0, links[id(stack[0])])
            assert layer.conv
            m, k = len(stack), layer.conv.kernel[0]
            side = m * (k - 1) + 1
            formula, expected = f"{m * k * k}/{side * side}", m * k * k / side**2
            yield _made(stack, f"{m} × {k}×{k}", (side, side), formula, expected)


def _made(convs: list[Layer], kind: str, dense: tuple[int, int], formula: str, expected: float) -> Factorised:
    shapes = [layer.conv for layer in convs if layer.conv]
    first, last = shapes[0], shapes[-1]
    numbers = convs[-1].shape[0] * math.prod(last.outputs)
    ratio = sum(layer.macs for layer in convs) / (numbers * first.in_channels * last.out_channels * math.prod(dense))
    paths, channels = tuple(layer.path for layer in convs), (first.in_channels, *(conv.out_channels for conv in shapes))
    return Factorised(paths, kind, channels, last.outputs, dense, ratio, formula, expected)


def _plain(conv: Conv) -> bool:
    return (conv.stride, conv.dilation, conv.groups) == ((1, 1), (1, 1), 1)


def _times(kernel: tuple[int, int]) -> str:
    return f"{kernel[0]}×{kernel[1]}"


def _pairs(layers: Sequence[Layer]) -> Iterator[tuple[Layer, Layer]]:
    """Each convolution whose input another one made, and that one."""
    for layer in layers:
        if layer.conv is not None and len(layer.inputs) == 1:
            before = _convolution_behind(layers, next(iter(layer.inputs)))
            if before is not None:
                yield layer, before


def _convolution_behind(layers: Sequence[Layer], i: int) -> Layer | None:
    """The convolution whose numbers, each by itself changed, are the output of layer `i`."""
    while layers[i].conv is None:
        layer = layers[i]
        whole = [maker for maker, shape in layer.inputs.items() if shape == layer.shape]
        if layer.macs or "pool" in layer.kind.lower() or len(whole) != 1:
            return None
        i = whole[0]
    return layers[i]
