"""What of an image a network is shown, and the classifier at every position of a large image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from cnnfast.models.network import Network
from cnnfast.nn import GlobalPool
from cnnfast.preprocess import Preprocessing

if TYPE_CHECKING:
    from PIL import Image

MODES = ("single", "ten", "multi", "dense")
_BY_ITSELF = (nn.ReLU, nn.ReLU6, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.Hardswish, nn.Dropout, nn.Identity)  # each number


@dataclass(frozen=True)
class Views:
    """The network's inputs that an image is made into.

    Args:
        preprocessing: of the network; `size` is the side of a crop.
        mode: "single", the centre, as `cnnfast classify`; "ten", the four corners and the centre, and these mirrored
            (AlexNet's paper); "multi", GoogLeNet's: of each of three squares along the image the corners, the centre
            and the whole, and these mirrored, 36 at each size; "dense", the whole image, see `dense_form`.
        sizes: each is a view of its own (multi-scale evaluation): "single", of the input; otherwise the short side that
            the image is resized to first. () for the mode's own: "single", the network's input size; "ten" and "dense",
            preprocessing.short_side (256 for 224); "multi", the paper's 256, 288, 320 and 352 for an input of 224, in
            proportion for others.
        mirror: adds the mirrored images to "single" and "dense", which "ten" and "multi" have anyway.

    Raises:
        ValueError: an unknown mode, a crop that is larger than a size.
        ImportError: "ten" and "multi" need torchvision.
    """

    preprocessing: Preprocessing
    mode: str = "single"
    sizes: tuple[int, ...] = ()
    mirror: bool = False

    def __post_init__(self) -> None:
        side = self.preprocessing.size
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {self.mode!r}")
        if not self.sizes:
            own: dict[str, tuple[int, ...]] = {"single": (side,), "multi": googlenet_sizes(side)}
            object.__setattr__(self, "sizes", own.get(self.mode, (self.preprocessing.short_side,)))
        if self.crops and min(self.sizes) < side:
            raise ValueError(f"sizes must be at least {side}, the side of a crop, got {min(self.sizes)}")
        if self.crops and self.mirror:
            raise ValueError(f"mirror must be False in mode {self.mode!r}, which has mirrored crops, got True")

    @property
    def crops(self) -> bool:
        return self.mode in ("ten", "multi")

    def __len__(self) -> int:
        """How many inputs an image makes."""
        return len(self.sizes) * {"ten": 10, "multi": 36}.get(self.mode, 1 + self.mirror)

    def __call__(self, image: Image.Image) -> list[Tensor]:
        """(C, height, width) float32 each, of an image in the network's mode (Preprocessing.read)."""
        return [self.preprocessing.normalise(view)[0] for view in self._images(image)]

    def _images(self, image: Image.Image) -> Iterator[Image.Image]:
        from PIL import ImageOps

        for size in self.sizes:
            if self.crops:
                from cnnfast.transforms import crops_of

                yield from crops_of(image, self.preprocessing, self.mode, size)
                continue
            if self.mode == "single":
                view = replace(self.preprocessing, size=size).centre(image)
            else:
                view = self.preprocessing.whole(image, size)
            yield view
            if self.mirror:
                yield ImageOps.mirror(view)


def googlenet_sizes(side: int) -> tuple[int, ...]:
    """The short sides of GoogLeNet's paper, for crops of `side` pixels."""
    return tuple(round(side * size / 224) for size in (256, 288, 320, 352))


def dense_form(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """`model` with its classifier applied at every position of the last map, and the scores (before softmax) averaged
    over the positions, as in VGG's paper: (N, C, H, W) -> (N, num_classes).

    A linear classifier behind global average pooling is that by itself: the mean of its scores is its score of the
    mean. Fully connected layers behind a grid of pixels become a convolution with a kernel of that size and 1x1 ones.

    Raises:
        ValueError: the network ends in something else.
    """
    pool = getattr(model, "global_pool", None) if isinstance(model, Network) else None
    if type(pool) is GlobalPool and pool.pool_type == "avg":
        return model
    grid, classifier = getattr(pool, "grid", None), getattr(model, "classifier", None)
    if grid is None or not isinstance(classifier, nn.Sequential):
        raise ValueError(
            f"dense evaluation wants a network that ends in global average pooling or fully connected layers, got"
            f" {type(model).__name__}"
        )
    if foreign := [type(layer).__name__ for layer in classifier if type(layer) not in (nn.Linear, *_BY_ITSELF)]:
        raise ValueError(
            f"dense evaluation wants fully connected layers of {type(model).__name__} that are linear, got"
            f" {', '.join(foreign)}"
        )

    def scores(x: Tensor) -> Tensor:
        x = model.forward_features(x)  # type: ignore[operator]
        if min(x.shape[2:]) < grid:
            raise ValueError(
                f"x must be larger for dense evaluation: {grid} x {grid} pixels at the classifier, got"
                f" {x.shape[2]} x {x.shape[3]}"
            )
        kernel = grid
        for layer in classifier:
            if isinstance(layer, nn.Linear):
                x = F.conv2d(x, layer.weight.view(len(layer.weight), -1, kernel, kernel), layer.bias)
                kernel = 1
            else:
                x = layer(x)
        return x.mean((2, 3))

    return scores
