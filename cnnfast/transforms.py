"""How the networks' images are prepared, as transforms of torchvision.transforms.v2 for a Dataset or a DataLoader.

The pieces are torchvision's where it has them. Everything random draws from torch's generator. Needs torchvision:
`pip install "cnnfast[transforms]"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cnnfast._peers import import_torchvision
from cnnfast.evaluation.views import Views
from cnnfast.preprocess import Preprocessing, preprocessing_for, resize_as_tensorflow

try:
    import_torchvision()
except ModuleNotFoundError as error:
    raise ImportError(f'{error.name} is not installed: pip install "cnnfast[transforms]"') from None

from PIL import Image
from torchvision.transforms import v2  # after import_torchvision, beside any torch
from torchvision.transforms.v2 import functional as F

# Of the colours of ImageNet's pixels (R, G, B in 0..1): the eigenvectors of their covariance, one a column, and the
# numbers that go with them. As Facebook's Torch7 training published them, from where everybody has them:
# https://github.com/facebookarchive/fb.resnet.torch/blob/master/datasets/imagenet.lua
PCA_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
PCA_VALUES = (0.2175, 0.0188, 0.0045)


class Compose(v2.Compose):
    """torchvision's Compose; unpickled in another process it imports torchvision as this package does."""


class PCALighting(v2.Transform):
    """AlexNet's colour augmentation (2012): adds to every pixel of an image the same colour,
    sum_i(alpha_i * value_i * vector_i), with alpha normal of deviation `std`, drawn for each call.

    For floating tensors (..., 3, H, W) of values 0 to 1, before they are normalised; the sum isn't clamped. A batch
    gets one colour, as in torchvision's transforms.

    Args:
        std: deviation of alpha.
        vectors: [c][i], channel c of eigenvector i of the covariance of colours; default ImageNet's.
        values: of each eigenvector, in units of pixels of 0 to 1.

    ImageNet Classification with Deep Convolutional Neural Networks, section 4.1,
    https://papers.nips.cc/paper/4824-imagenet-classification-with-deep-convolutional-neural-networks
    """

    _transformed_types = (Tensor,)

    def __init__(
        self,
        std: float = 0.1,
        vectors: Sequence[Sequence[float]] = PCA_VECTORS,
        values: Sequence[float] = PCA_VALUES,
    ):
        super().__init__()
        if std < 0:
            raise ValueError(f"std must be 0 or more, got {std}")
        self.std, self.vectors, self.values = std, tuple(map(tuple, vectors)), tuple(values)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        alpha = torch.randn(len(self.values)) * self.std
        return dict(colour=torch.tensor(self.vectors) @ (alpha * torch.tensor(self.values)))

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        if not inpt.is_floating_point():
            raise TypeError(f"image must be of floating values 0 to 1 (v2.ToDtype with scale=True), got {inpt.dtype}")
        if inpt.shape[-3] != len(self.vectors):
            raise ValueError(f"image must have {len(self.vectors)} channels, got shape {tuple(inpt.shape)}")
        return inpt + params["colour"].to(inpt).view(-1, 1, 1)


class GoogLeNetCrops(v2.Transform):
    """The 36 crops that GoogLeNet's paper (2014) takes of an image at each of four sizes, 144 in all: of the squares at
    the left, centre and right (top, centre and bottom) the four corners, the centre and the whole square resized, then
    the same mirrored. A tuple of images, as v2.TenCrop gives.

    Args:
        size: height and width of a crop.
        interpolation: of the resized square.

    https://arxiv.org/abs/1409.4842, section 7.
    """

    def __init__(self, size: int, interpolation: v2.InterpolationMode = v2.InterpolationMode.BILINEAR):
        super().__init__()
        self.size, self.interpolation = size, interpolation

    def transform(self, inpt: Any, params: dict[str, Any]) -> tuple[Any, ...]:
        height, width = F.get_size(inpt)
        side = min(height, width)
        crops: list[Any] = []
        for third in (0, 1, 2):
            top, left = (height - side) * third // 2, (width - side) * third // 2
            square = F.crop(inpt, top, left, side, side)
            whole = F.resize(square, [self.size, self.size], self.interpolation, antialias=True)
            plain = [*F.five_crop(square, [self.size]), whole]
            crops += [*plain, *(F.horizontal_flip(crop) for crop in plain)]
        return tuple(crops)


class TensorFlowResize(v2.Transform):
    """To size x size as tf.image.resize of TensorFlow 1 does, without antialiasing: what `tf_` networks were trained
    with and see in evaluation (see cnnfast.preprocess.resize_as_tensorflow).

    Of PIL images in modes L and RGB, and of tensors (..., H, W); what is of 8 bits stays so, rounded.

    Args:
        size: height and width of the result; the proportions aren't kept: crop a square first.
        interpolation: "bicubic" or "bilinear".
    """

    def __init__(self, size: int, interpolation: str = "bicubic"):
        super().__init__()
        self.size, self.interpolation = size, interpolation

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, Image.Image):
            return F.to_pil_image(self.transform(F.pil_to_tensor(inpt), params))
        planes = inpt.reshape(-1, *inpt.shape[-2:]).permute(1, 2, 0)
        resized = resize_as_tensorflow(planes, self.size, self.interpolation).permute(2, 0, 1)
        if inpt.dtype == torch.uint8:
            resized = resized.round().clamp(0, 255)
        return resized.reshape(*inpt.shape[:-2], self.size, self.size).to(inpt.dtype)


class ToMode(v2.Transform):
    """A PIL image upright and in the network's mode (Preprocessing.convert); tensors pass."""

    _transformed_types = (Image.Image,)

    def __init__(self, preprocessing: Preprocessing):
        super().__init__()
        self.preprocessing = preprocessing

    def transform(self, inpt: Image.Image, params: dict[str, Any]) -> Image.Image:
        return self.preprocessing.convert(inpt)


class ToViews(v2.Transform):
    """A PIL image in the network's mode as what the network is shown of it: (C, H, W), or (views, C, H, W)."""

    _transformed_types = (Image.Image,)

    def __init__(self, views: Views):
        super().__init__()
        if views.mode == "dense" and len(views.sizes) > 1:
            raise ValueError(f"sizes must be one in mode 'dense', whose views can't be stacked, got {views.sizes}")
        self.views = views

    def check_inputs(self, flat_inputs: list[Any]) -> None:
        if not any(isinstance(x, Image.Image) for x in flat_inputs):
            raise TypeError(f"image must be a PIL.Image.Image, got {', '.join(type(x).__name__ for x in flat_inputs)}")

    def transform(self, inpt: Image.Image, params: dict[str, Any]) -> Tensor:
        views = self.views(inpt)
        return views[0] if len(views) == 1 else torch.stack(views)


def crops_of(image: Image.Image, preprocessing: Preprocessing, mode: str, short_side: int) -> tuple[Image.Image, ...]:
    """The crops of `image`, resized to `short_side`, that the modes "ten" and "multi" of Views have."""
    interpolation = v2.InterpolationMode(preprocessing.interpolation)
    crops = {"ten": v2.TenCrop(preprocessing.size), "multi": GoogLeNetCrops(preprocessing.size, interpolation)}
    return crops[mode](preprocessing.whole(image, short_side))


def transforms_for(
    name: str,
    is_training: bool = False,
    *,
    size: int | None = None,
    crops: str | None = None,
    sizes: Sequence[int] = (),
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    pca_std: float = 0.0,
) -> Compose:
    """What prepares images for the network `name`, by its pretrained_cfg: a transform of PIL images in any mode.

    For evaluation it is what `cnnfast classify` and `cnnfast evaluate` do: (C, size, size) float32, normalised.

    Args:
        is_training: random crops and flips instead.
        size: height and width of the result; default the network's input.
        crops: for evaluation a mode of cnnfast.evaluation.Views: "single" (default), "ten", "multi", "dense"; all but
            the first give (views, C, H, W). For training "resized" (default), a random part of the image resized, as
            for GoogLeNet and later networks, or "random", AlexNet's: the short side resized to size / crop_pct (256 for
            224 and 227), the square in the centre, of which a random size x size.
        sizes: for evaluation, see cnnfast.evaluation.Views.
        scale, ratio: of "resized", see v2.RandomResizedCrop.
        hflip: how often images are mirrored in training.
        pca_std: in training, AlexNet's colour augmentation by PCALighting; the paper has 0.1, the default 0 none.

    Raises:
        ValueError: an unknown network or `crops`, pca_std for a network of grey images.
    """
    preprocessing = preprocessing_for(name)
    if size is not None:
        preprocessing = replace(preprocessing, size=size)
    if not is_training:
        return Compose([ToMode(preprocessing), ToViews(Views(preprocessing, crops or "single", tuple(sizes)))])
    mean, std = ([value / 255 for value in values] for values in (preprocessing.mean, preprocessing.std))
    if pca_std and len(mean) != 3:
        raise ValueError(f"pca_std must be 0 for {name!r}, whose images are grey, got {pca_std}")
    colour = [PCALighting(pca_std)] if pca_std else []
    return Compose(
        [
            ToMode(preprocessing),
            *_random_crop(preprocessing, crops or "resized", scale, ratio),
            v2.RandomHorizontalFlip(hflip),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            *colour,
            v2.Normalize(mean, std),
            v2.ToPureTensor(),
        ]
    )


def _random_crop(
    preprocessing: Preprocessing, crops: str, scale: tuple[float, float], ratio: tuple[float, float]
) -> list[nn.Module]:
    size, interpolation = preprocessing.size, v2.InterpolationMode(preprocessing.interpolation)
    if crops == "resized":
        return [v2.RandomResizedCrop(size, scale, ratio, interpolation)]
    if crops == "random":
        whole = preprocessing.short_side
        return [v2.Resize(whole, interpolation), v2.CenterCrop(whole), v2.RandomCrop(size)]
    raise ValueError(f"crops must be 'resized' or 'random' for training, got {crops!r}")
