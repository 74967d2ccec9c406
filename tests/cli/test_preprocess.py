"""Images of every mode and orientation become the same input; the crop is the centre.

Fails if EXIF orientation, a mode's conversion, the crop, the order of channels or the normalisation is wrong.
"""

import random

import pytest
import torch
from PIL import Image

from cnnfast.preprocess import Preprocessing, preprocessing_for
from cnnfast.pretrained import imagenet_labels

PLAIN = Preprocessing(32, 1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # (1, 3, 32, 32) of the pixels themselves


@pytest.fixture
def image():
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (4 * 3 * 3,), generator=generator, dtype=torch.uint8)
    return Image.frombytes("RGB", (4, 3), bytes(small.tolist())).resize((48, 36), Image.Resampling.BICUBIC)


def test_values_and_layout():
    image = Image.new("RGB", (50, 40), (127, 255, 63))
    x = preprocessing_for("tf_efficientnet_lite0")(image)
    assert x.shape == (1, 3, 224, 224) and x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x[0, :, 100, 100], torch.tensor([0.0, 1.0, -0.5]))


def test_values_of_each_channel():
    """ImageNet's mean and one standard deviation above."""
    image = Image.new("RGB", (50, 40), (124, 173, 104))
    x = preprocessing_for("mobilenet_v2")(image)
    expected = torch.tensor([(124 / 255 - 0.485) / 0.229, (173 / 255 - 0.456) / 0.224, (104 / 255 - 0.406) / 0.225])
    torch.testing.assert_close(x, expected.view(1, 3, 1, 1).expand(1, 3, 224, 224))


@pytest.mark.parametrize(
    ("name", "size", "side", "blur"),
    [
        ("tf_efficientnet_lite0", 224, 224, 0),  # cut before it is resized: nothing from outside is seen
        ("xception", 299, 229, 3),
        ("mobilenet_v1", 224, 224, 3),
        ("mobilenet_v2", 224, 247, 3),
    ],
)
def test_the_crop_is_the_centre(name, size, side, blur):
    """Of a 256 x 356 image, white in the middle only: everything inside the square of `side` is seen, nothing else but
    what the resize brings over its edge."""
    preprocessing = preprocessing_for(name)
    image = Image.new("L", (356, 256), 0)
    left, top = (356 - side + 1) // 2, (256 - side + 1) // 2
    image.paste(255, (left, top, left + side, top + side))
    x = preprocessing(image)
    white = x[..., size // 2, size // 2, None, None]
    inside = x[..., blur : size - blur, blur : size - blur]
    assert x.shape[-1] == size and torch.equal(inside, white.expand_as(inside))
    image.paste(0, (left, top, left + 4, top + 4))
    assert (preprocessing(image)[..., :6, :6] < white).any()


def test_orientation(image, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright, stored lying on its side
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "plain.png")
    assert torch.equal(PLAIN.load(tmp_path / "turned.png"), PLAIN.load(tmp_path / "plain.png"))


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "P", "L", "LA", "1", "I;16"])
def test_modes(image, mode, tmp_path):
    """Each as its own RGB; grey ones as grey."""
    if mode == "I;16":
        grey = image.convert("L")
        wide = Image.frombytes("I;16", grey.size, b"".join(bytes((v, v)) for v in grey.tobytes()))  # v * 257
        converted, expected = wide, grey
    else:
        converted = image.quantize(256) if mode == "P" else image.convert(mode)
        expected = {"RGBA": image, "CMYK": image, "P": converted.convert("RGB")}.get(mode, converted.convert("L"))
    suffix = "tif" if mode in ("CMYK", "I;16") else "png"
    converted.save(tmp_path / f"image.{suffix}")
    x = PLAIN.load(tmp_path / f"image.{suffix}")
    assert x.shape == (1, 3, 32, 32)
    assert (x - PLAIN(expected)).abs().max() <= 2
    if mode in ("L", "LA", "1", "I;16"):
        assert torch.equal(x[:, 0], x[:, 2])


def test_grey_networks(image, tmp_path):
    """One mean, one channel: of coloured images and grey ones."""
    image.save(tmp_path / "x.png")
    x = Preprocessing(32, 1.0, mean=(100.0,), std=(2.0,)).load(tmp_path / "x.png")
    assert x.shape == (1, 1, 32, 32)
    torch.testing.assert_close(x, (PLAIN(image.convert("L"))[:, :1] - 100) / 2)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3, 2)])
def test_tiny_images(size):
    assert torch.equal(PLAIN(Image.new("RGB", size, (9, 9, 9))), torch.full((1, 3, 32, 32), 9.0))


def test_unknown_model():
    with pytest.raises(ValueError, match=r"model_name must be one .*, got 'lenet'"):
        preprocessing_for("lenet")


def test_labels():
    """1000 different names; the indices of a few are known from elsewhere."""
    labels = imagenet_labels()
    assert len(labels) == len(set(labels)) == 1000
    known = {
        0: "tench",
        207: "golden retriever",
        282: "tiger cat",
        285: "Egyptian cat",
        657: "missile",
        967: "espresso",
    }
    assert {index: labels[index] for index in known} == known
    assert labels[134] == "crane (bird)" and labels[517] == "crane (machine)" and labels[999] == "toilet tissue"


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "tif", "webp"])
def test_damaged_files_are_value_errors(image, suffix, tmp_path):
    """Cut anywhere, or with any byte wrong, a file is read or is a ValueError, so that a run over a folder goes on."""
    image.save(tmp_path / f"whole.{suffix}")
    content = (tmp_path / f"whole.{suffix}").read_bytes()
    draw = random.Random(0)
    refused = 0
    for i in range(60):
        place = draw.randrange(len(content))
        changed = bytes([content[place] ^ draw.randrange(1, 256)])
        broken = content[:place] if i % 2 else content[:place] + changed + content[place + 1 :]
        (tmp_path / "broken").write_bytes(broken)
        try:
            assert PLAIN.load(tmp_path / "broken").shape == (1, 3, 32, 32)
        except ValueError:
            refused += 1
    assert refused >= 10
