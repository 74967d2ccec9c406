"""An image file as a network's input: what each published network was trained to see.

Needs Pillow (`pip install "cnnfast[demo]"`) and nothing else beside torch.
"""

from __future__ import annotations

import math
import os
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cnnfast.models.registry import CROP_MODES, list_models, model_entry

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"}


@dataclass(frozen=True)
class Preprocessing:
    """A resize, a centre crop, and `(pixel - mean) / std` on pixels of 0..255.

    A call does all of it; other crops (cnnfast.evaluation, cnnfast.transforms) are made of its parts: `read` or
    `convert`, something else instead of `centre`, then `normalise`.

    Args:
        size: height and width of the network's input.
        crop: side of the square that is cut out of the centre, as a part of the image's short side.
        interpolation: a name of `PIL.Image.Resampling`, in lower case; "bicubic" or "bilinear" in mode "tensorflow".
        mean, std: per channel, in pixel values: three (R, G, B), or one for networks that see grey images.
        crop_mode: "center", the short side resized to size / crop, then the centre cut out (torchvision's and timm's);
            "squash", both sides resized to that; "tensorflow", the centre cut out, then resized by resize_as_tensorflow
            and rounded to 0..255 (the authors' of EfficientNet; timm's tf_preprocessing).
    """

    size: int
    crop: float
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (127.5, 127.5, 127.5)
    std: tuple[float, ...] = (127.5, 127.5, 127.5)
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if self.crop_mode not in CROP_MODES:
            raise ValueError(f"crop_mode must be one of {', '.join(map(repr, CROP_MODES))}, got {self.crop_mode!r}")

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """(1, C, size, size) float32, channels_last, of an image in any mode and orientation."""
        return self.normalise(self.centre(self.convert(image)))

    def load(self, path: str | os.PathLike[str]) -> torch.Tensor:
        """The image file `path` as a (1, C, size, size) float32 batch of one; raises as `read`."""
        return self.normalise(self.centre(self.read(path)))

    def read(self, path: str | os.PathLike[str]) -> Image.Image:
        """The image file `path`, upright and in the network's mode.

        Raises:
            ValueError: the file is there, but is no image or a damaged one.
            OSError: the file can't be read.
        """
        from PIL import Image, UnidentifiedImageError

        with open(path, "rb") as file:
            try:
                with warnings.catch_warnings():  # a damaged file is reported once, by the error
                    warnings.simplefilter("ignore")
                    image = Image.open(file)
                    image.load()
                    return self.convert(image)
            except UnidentifiedImageError:
                raise ValueError("not an image in a format that Pillow knows") from None
            except Exception as error:  # on damaged files Pillow's decoders raise whatever comes up
                raise ValueError(f"damaged image: {textwrap.shorten(str(error), 200)}") from None

    def convert(self, image: Image.Image) -> Image.Image:
        """Upright, as its EXIF data say, and 8-bit RGB, or grey where there is one mean."""
        from PIL import ImageOps

        image = _to_rgb(ImageOps.exif_transpose(image))
        return image if len(self.mean) == 3 else image.convert("L")

    def centre(self, image: Image.Image) -> Image.Image:
        """size x size, as `crop_mode` says."""
        if self.crop_mode == "tensorflow":
            side = max(1, int(min(image.size) * self.crop))
            left, top = ((length - side + 1) // 2 for length in image.size)
            return self._resized_as_tensorflow(image.crop((left, top, left + side, top + side)))
        side = self.short_side
        resized = image.resize((side, side), self.resampling) if self.crop_mode == "squash" else self.whole(image, side)
        left, top = (round((length - self.size) / 2) for length in resized.size)
        return resized.crop((left, top, left + self.size, top + self.size))

    def _resized_as_tensorflow(self, square: Image.Image) -> Image.Image:
        from PIL import Image

        pixels = resize_as_tensorflow(_pixels(square)[0], self.size, self.interpolation)
        rounded = pixels.round().clamp(0, 255).byte()
        return Image.frombytes(square.mode, (self.size, self.size), rounded.numpy().tobytes())

    def whole(self, image: Image.Image, short_side: int) -> Image.Image:
        """The whole image, resized to that short side, its proportions kept, as by torchvision's Resize."""
        width, height = (max(1, int(short_side * side / min(image.size))) for side in image.size)
        return image.resize((width, height), self.resampling)

    @property
    def short_side(self) -> int:
        """That an image is resized to before its centre is cut out: 256 for 224."""
        return math.floor(self.size / self.crop + 1e-6)

    def normalise(self, image: Image.Image) -> torch.Tensor:
        """(1, C, H, W) float32, channels_last, of an image in the network's mode."""
        x = (_pixels(image).float() - torch.tensor(self.mean)) / torch.tensor(self.std)
        return x.permute(0, 3, 1, 2)

    @property
    def resampling(self) -> Image.Resampling:
        from PIL import Image

        return Image.Resampling[self.interpolation.upper()]


def _pixels(image: Image.Image) -> torch.Tensor:
    """(1, H, W, C), 0 to 255."""
    width, height = image.size
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, height, width, -1)


def resize_as_tensorflow(pixels: torch.Tensor, size: int, interpolation: str = "bicubic") -> torch.Tensor:
    """(H, W, C) -> (size, size, C) float32: tf.image.resize of TensorFlow 1, with which EfficientNets were trained and
    evaluated. Output pixel i is read at i * H / size, not at its centre, and from its two ("bilinear") or four
    ("bicubic", cubic convolution with a = -0.75) neighbours alone, however much smaller the result is (no
    antialiasing); at the borders the last pixel is repeated."""
    if interpolation not in ("bicubic", "bilinear"):
        raise ValueError(f"interpolation must be 'bicubic' or 'bilinear', got {interpolation!r}")
    for dim in (0, 1):
        length = pixels.shape[dim]
        at = torch.arange(size) * (length / size)
        first = at.floor()
        taps = _cubic_taps(at - first) if interpolation == "bicubic" else _linear_taps(at - first)
        total: Any = 0.0
        for offset, weight in taps.items():
            near = pixels.index_select(dim, (first.long() + offset).clamp(0, length - 1)).float()
            total = total + near * weight.view((-1, 1, 1) if dim == 0 else (1, -1, 1))
        pixels = total
    return pixels


def _linear_taps(x: torch.Tensor) -> dict[int, torch.Tensor]:
    """The weights of the pixels at these offsets, for points `x` behind a pixel, 0 to 1."""
    return {0: 1 - x, 1: x}


def _cubic_taps(x: torch.Tensor, a: float = -0.75) -> dict[int, torch.Tensor]:
    near, far = (lambda t: ((a + 2) * t - (a + 3)) * t * t + 1), (lambda t: ((t - 5) * t + 8) * t * a - 4 * a)
    return {-1: far(x + 1), 0: near(x), 1: near(1 - x), 2: far(2 - x)}


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; transparency is dropped, not blended, as is usual when these networks are evaluated."""
    if image.mode.startswith("I;16"):  # convert() would clip 16-bit grey at 255 instead of scaling it
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def images_under(folder: Path) -> list[Path]:
    """The files in `folder`, however deep, that have an image's suffix, sorted."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())


def preprocessing_for(model_name: str) -> Preprocessing:
    """How images were prepared when the published weights of `model_name` were trained, by its pretrained_cfg.

    Raises:
        ValueError: no network has that name.
    """
    if model_name not in list_models():
        raise ValueError(f"model_name must be one of cnnfast.list_models(), got {model_name!r}")
    cfg = model_entry(model_name).pretrained_cfg
    mean, std = (tuple(255 * value for value in cfg[name]) for name in ("mean", "std"))
    return Preprocessing(cfg["input_size"][-1], cfg["crop_pct"], cfg["interpolation"], mean, std, cfg["crop_mode"])
