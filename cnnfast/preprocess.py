"""An image file as a network's input: what each published network was trained to see.

Needs Pillow (`pip install "cnnfast[demo]"`) and nothing else beside torch.
"""

from __future__ import annotations

import os
import textwrap
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cnnfast.models.registry import list_models, model_entry

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Preprocessing:
    """A centre crop, a resize, and `(pixel - mean) / std` on pixels of 0..255.

    Args:
        size: height and width of the network's input.
        crop: side of the square that is cut out of the centre, as a part of the image's short side.
        interpolation: a name of `PIL.Image.Resampling`, in lower case.
        mean, std: per channel (R, G, B), in pixel values.
    """

    size: int
    crop: float
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    std: tuple[float, float, float] = (127.5, 127.5, 127.5)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """(1, 3, size, size) float32, channels_last, of an image in any mode and orientation."""
        from PIL import Image, ImageOps

        image = _to_rgb(ImageOps.exif_transpose(image))
        width, height = image.size
        side = max(1, int(min(width, height) * self.crop))  # rounded as in EfficientNet's own evaluation
        left, top = (width - side + 1) // 2, (height - side + 1) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((self.size, self.size), Image.Resampling[self.interpolation.upper()])
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, self.size, self.size, 3)
        x = (pixels.float() - torch.tensor(self.mean)) / torch.tensor(self.std)
        return x.permute(0, 3, 1, 2)

    def load(self, path: str | os.PathLike[str]) -> torch.Tensor:
        """The image file `path` as a (1, 3, size, size) float32 batch of one.

        Raises:
            ValueError: the file is there, but is no image or a damaged one.
            OSError: the file can't be read.
        """
        from PIL import Image, ImageOps, UnidentifiedImageError

        with open(path, "rb") as file:
            try:
                with warnings.catch_warnings():  # a damaged file is reported once, by the error
                    warnings.simplefilter("ignore")
                    image = Image.open(file)
                    image.load()
                    ImageOps.exif_transpose(image, in_place=True)
            except UnidentifiedImageError:
                raise ValueError("not an image in a format that Pillow knows") from None
            except Exception as error:  # on damaged files Pillow's decoders raise whatever comes up
                raise ValueError(f"damaged image: {textwrap.shorten(str(error), 200)}") from None
            return self(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; transparency is dropped, not blended, as is usual when these networks are evaluated."""
    if image.mode.startswith("I;16"):  # convert() would clip 16-bit grey at 255 instead of scaling it
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


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
