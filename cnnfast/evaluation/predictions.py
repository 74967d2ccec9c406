"""A network's predictions for labelled images."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cnnfast.evaluation.folder import Sample
from cnnfast.evaluation.views import Views, dense_form

TOP = 5


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, likeliest first, at most five."""

    path: str
    target: int
    indices: tuple[int, ...]
    probabilities: tuple[float, ...]

    @property
    def right(self) -> bool:
        return self.indices[0] == self.target

    @property
    def in_top5(self) -> bool:
        return self.target in self.indices


@dataclass(frozen=True)
class Failure:
    """An image without a prediction, and why, for people."""

    path: str
    reason: str


def accuracy(predictions: Iterable[Prediction]) -> tuple[float | None, float | None]:
    """(top-1, top-5) as parts of 1; None without predictions."""
    hits = [(prediction.right, prediction.in_top5) for prediction in predictions]
    if not hits:
        return None, None
    return sum(first for first, _ in hits) / len(hits), sum(five for _, five in hits) / len(hits)


def predict(
    model: nn.Module, views: Views, samples: Sequence[Sample], batch: int = 32, workers: int = 0
) -> Iterator[list[Prediction | Failure]]:
    """The samples in order, some at a time, as they are ready; an image that can't be read doesn't stop the others.

    Args:
        model: in eval mode, with the device and dtype of its first parameter.
        batch: inputs of the network in one call. An image's views are spread over several calls if they are more.
        workers: processes that read and prepare images; 0 for none beside this one.

    Raises:
        ValueError: "dense" where the network can't be (see dense_form), or an input that it refuses.
        TypeError: a backend that can't run here.
    """
    scores = dense_form(model) if views.mode == "dense" else model
    parameter = next(model.parameters())
    with torch.no_grad():
        _try(scores, views, parameter)
    images = DataLoader(
        _Images(samples, views),
        batch_size=max(1, batch // len(views)),
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=_leave_interrupts_to_the_parent,
    )
    return _predictions(scores, images, batch, parameter)


def _predictions(
    scores: Callable[[Tensor], Tensor], images: DataLoader, batch: int, parameter: Tensor
) -> Iterator[list[Prediction | Failure]]:
    for loaded in images:
        readable = [inputs for _, inputs in loaded if not isinstance(inputs, str)]
        with torch.no_grad():  # not around the yield: it would hold in the caller
            probabilities = iter(_probabilities(scores, readable, batch, parameter))
        yield [
            Failure(sample.path, inputs) if isinstance(inputs, str) else _prediction(sample, next(probabilities))
            for sample, inputs in loaded
        ]


class _Images(Dataset):
    """(sample, its views, or why it has none)."""

    def __init__(self, samples: Sequence[Sample], views: Views):
        self.samples, self.views = samples, views

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, n: int) -> tuple[Sample, list[Tensor] | str]:
        sample = self.samples[n]
        try:
            return sample, self.views(self.views.preprocessing.read(sample.file))
        except (ValueError, OSError) as error:
            return sample, getattr(error, "strerror", None) or str(error)


def _leave_interrupts_to_the_parent(worker: int) -> None:
    """Ctrl-C goes to all processes of a terminal; the workers would each print a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _try(scores: Callable[[Tensor], Tensor], views: Views, parameter: Tensor) -> None:
    """One call for each size of input: what can't run is said before anything is read, and packing the weights isn't
    part of the images' time."""
    sides = {views.preprocessing.size} if views.crops else set(views.sizes)
    for side in sides:
        scores(parameter.new_zeros(1, side, side, len(views.preprocessing.mean)).permute(0, 3, 1, 2))


def _probabilities(
    scores: Callable[[Tensor], Tensor], images: list[list[Tensor]], batch: int, parameter: Tensor
) -> list[Tensor]:
    """The mean of the softmax outputs of each image's views."""
    by_shape: dict[Any, list[tuple[int, Tensor]]] = {}
    for n, views in enumerate(images):
        for view in views:
            by_shape.setdefault(view.shape, []).append((n, view))
    sums: list[Any] = [0.0] * len(images)
    for group in by_shape.values():
        for start in range(0, len(group), batch):
            part = group[start : start + batch]
            x = torch.stack([view for _, view in part]).to(parameter).contiguous(memory_format=torch.channels_last)
            for (n, _), row in zip(part, scores(x).float().cpu().softmax(-1), strict=True):
                sums[n] = sums[n] + row
    return [total / len(views) for total, views in zip(sums, images, strict=True)]


def _prediction(sample: Sample, probabilities: Tensor) -> Prediction | Failure:
    if not probabilities.isfinite().all():
        return Failure(sample.path, "the network's output is not finite")
    values, indices = probabilities.topk(min(TOP, len(probabilities)))
    return Prediction(sample.path, sample.target, tuple(indices.tolist()), tuple(values.tolist()))
