"""An image file as a network's input: what each published network was trained to see.

Needs Pillow (`pip install "cnnfast[demo]"`) and nothing else beside torch.
"""

from __future__ import annotations

import os
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cnnfast.models.registry import list_models, model_entry

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"}


@dataclass(frozen=True)
class Preprocessing:
    """A centre crop, a resize, and `(pixel - mean) / std` on pixels of 0..255.

    A call does all of it; other crops (cnnfast.evaluation, cnnfast.transforms) are made of its parts: `read` or
    `convert`, something else instead of `centre`, then `normalise`.

    Args:
        size: height and width of the network's input.
        crop: side of the square that is cut out of the centre, as a part of the image's short side.
        interpolation: a name of `PIL.Image.Resampling`, in lower case.
        mean, std: per channel, in pixel values: three (R, G, B), or one for networks that see grey images.
    """

    size: int
    crop: float
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (127.5, 127.5, 127.5)
    std: tuple[float, ...] = (127.5, 127.5, 127.5)

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
        """size x size: the square in the centre, resized. EfficientNet's own evaluation crops before it resizes, and
        its int(size / (size + 32) * short side) is what `crop` size / (size + 32) gives."""
        width, height = image.size
        side = max(1, int(min(width, height) * self.crop))
        left, top = (width - side + 1) // 2, (height - side + 1) // 2
        return image.crop((left, top, left + side, top + side)).resize((self.size, self.size), self.resampling)

    def whole(self, image: Image.Image, short_side: int) -> Image.Image:
        """The whole image, resized to that short side, its proportions kept."""
        width, height = image.size
        scale = short_side / min(width, height)
        return image.resize((max(1, round(width * scale)), max(1, round(height * scale))), self.resampling)

    def normalise(self, image: Image.Image) -> torch.Tensor:
        """(1, C, H, W) float32, channels_last, of an image in the network's mode."""
        width, height = image.size
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, height, width, -1)
        x = (pixels.float() - torch.tensor(self.mean)) / torch.tensor(self.std)
        return x.permute(0, 3, 1, 2)

    @property
    def resampling(self) -> Image.Resampling:
        from PIL import Image

        return Image.Resampling[self.interpolation.upper()]


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
    return Preprocessing(cfg["input_size"][-1], cfg["crop_pct"], cfg["interpolation"], mean, std)
