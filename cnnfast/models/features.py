"""What is known of a network's feature maps, as timm's FeatureInfo, and which of them are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class FeatureInfo(Sequence):
    """Of each feature map a dict of `num_chs`, `reduction` (pixels of the input to a pixel of the map, along each
    side) and `module` (after which it is taken); `out_indices` are those that forward returns."""

    def __init__(self, info: Iterable[dict[str, Any]], out_indices: Sequence[int] | None = None):
        self.info = [dict(one, index=index) for index, one in enumerate(info)]
        self.out_indices = tuple(range(len(self.info)) if out_indices is None else out_indices)

    @classmethod
    def halving(cls, taps: Mapping[str, int]) -> FeatureInfo:
        """Of {module: channels}, the first at half the input's size and each at half that of the one before."""
        return cls(
            dict(num_chs=channels, reduction=2 << n, module=module) for n, (module, channels) in enumerate(taps.items())
        )

    def __len__(self) -> int:
        return len(self.info)

    def __getitem__(self, index: Any) -> Any:
        return self.info[index]

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """The value of `key` of the map `idx`, or a list for several; None for those of out_indices."""
        if isinstance(idx, int):
            return self.info[idx][key]
        return [self.info[i][key] for i in (self.out_indices if idx is None else idx)]

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("module", idx)

    def taken(self, indices: int | Sequence[int] | None, argument: str = "indices") -> list[int]:
        """Indices from 0, in ascending order: all for None, the last n for an int, those of a sequence, where negative
        ones count from the end."""
        count = len(self)
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            if not 0 < indices <= count:
                raise ValueError(f"{argument} must be 1 to {count} as a number of maps, got {indices}")
            return list(range(count - indices, count))
        if not indices or any(not isinstance(i, int) or not -count <= i < count for i in indices):
            raise ValueError(f"{argument} must be of {-count} to {count - 1}, the network's maps, got {indices!r}")
        return sorted({i % count for i in indices})


def strided_stages(
    strides: Sequence[int], output_stride: int, reduction: int, allowed: Sequence[int] = (8, 16, 32)
) -> list[tuple[int, int, int]]:
    """(stride, dilation of the first block, dilation of the others) of each stage, so that the network's reduction
    stays at `output_stride`: where a stride would exceed it, the filters of what follows are dilated instead.

    Args:
        strides: of the stages, at an output stride of 32.
        reduction: of the first stage's input.

    DeepLab, https://arxiv.org/abs/1606.00915.
    """
    if output_stride not in allowed:
        raise ValueError(f"output_stride must be one of {', '.join(map(str, allowed))}, got {output_stride}")
    stages, dilation = [], 1
    for stride in strides:
        first = dilation
        if reduction * stride > output_stride:
            dilation *= stride
            stride = 1
        reduction *= stride
        stages.append((stride, first, dilation))
    return stages
