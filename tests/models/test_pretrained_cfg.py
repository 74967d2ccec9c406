"""pretrained_cfg and the preparation of images by it, beside timm's and torchvision's own.

Fails if a network's input isn't what the weights of the package that has it want, or the pixels aren't those that
that package's own transform makes.
"""

import math

import pytest
import torch
from PIL import Image

from cnnfast import _peers
from cnnfast.models import list_models
from cnnfast.models.registry import CROP_MODES, model_entry
from cnnfast.preprocess import Preprocessing, preprocessing_for, resize_as_tensorflow

timm = _peers.import_timm()
FIELDS = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "num_classes", "fixed_input_size")
# What is other than timm's of the same name, and why.
DELIBERATE = {
    # the first published weights, torchvision's IMAGENET1K_V1, not timm's retrained ones
    **{f"resnet{depth}": {"crop_pct", "interpolation"} for depth in (18, 34, 50, 101, 152)},
    "mobilenet_v2": {"crop_pct", "interpolation"},  # torchvision's IMAGENET1K_V2, whose keys ours has
    # pixels less 127, by 128, as the authors' code has it; timm rounds both to 0.5
    **{f"tf_efficientnet_lite{n}": {"mean", "std"} for n in range(5)},
}
WEIGHTS = {"mobilenet_v2": "IMAGENET1K_V2"}
SHAPES = [(500, 375), (333, 500), (701, 257), (224, 224)]


def noise(size):
    width, height = size
    pixels = torch.randint(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name", [name for name in list_models() if "timm" in model_entry(name).peers])
def test_timms(name):
    entry = model_entry(name)
    ours, theirs = entry.pretrained_cfg, timm.models.get_pretrained_cfg(entry.peers["timm"]).to_dict()
    assert ours["crop_mode"] in CROP_MODES
    differ = {field for field in FIELDS if ours[field] != theirs[field]}
    tensorflow = {"crop_mode"} if name.startswith("tf_") else set()  # an option of timm's beside the table
    assert differ == DELIBERATE.get(name, set()) | tensorflow
    assert (ours["crop_mode"] == "tensorflow") == name.startswith("tf_")


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in list_models()
        if "torchvision" in model_entry(name).peers and _peers.key_source(name) == "torchvision"
    ],
)
def test_torchvisions(name):
    """The pixels that the transform of its published weights makes."""
    models = _peers.import_torchvision().models
    weights = models.get_model_weights(model_entry(name).peers["torchvision"])
    theirs = weights[WEIGHTS.get(name, "IMAGENET1K_V1")].transforms()
    preprocessing = preprocessing_for(name)
    size, mean, std = theirs.crop_size[0], *(torch.tensor(v).mul(255) for v in (theirs.mean, theirs.std))
    assert preprocessing.size == size and preprocessing.interpolation == theirs.interpolation.value
    assert preprocessing.short_side == theirs.resize_size[0]
    if name == "googlenet_bn":  # of the same pixels: theirs changes its input to that range itself (transform_input)
        mean, std = torch.full((3,), 127.5), torch.full((3,), 127.5)
    torch.testing.assert_close(torch.tensor(preprocessing.mean), mean)
    torch.testing.assert_close(torch.tensor(preprocessing.std), std)


@pytest.mark.parametrize("name", ["xception", "mobilenet_v1", "efficientnet_b2", "efficientnet_b5", "se_resnet50"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pixels_are_timms(name, shape):
    """Networks of several sizes, crops, interpolations and crop_modes."""
    torch.manual_seed(sum(shape))
    cfg = timm.models.get_pretrained_cfg(model_entry(name).peers["timm"]).to_dict()
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(cfg))
    image = noise(shape)
    ours = preprocessing_for(name)(image)[0]
    torch.testing.assert_close(ours, theirs(image), rtol=0, atol=1e-5)


def test_tensorflows_own_numbers():
    """What TensorFlow's tests expect of resize_images: bicubic (testResizeUpBicubic of ResizeImagesTest, rounded) and
    bilinear (testResizeUp)."""
    rows = [128, 128, 64, 64, 128, 128, 64, 64, 64, 64, 128, 128, 64, 64, 128, 128, 50, 50, 100, 100, 50, 50, 100, 100]
    x = torch.tensor([*rows, *[50, 50, 100, 100] * 3], dtype=torch.uint8).view(6, 6, 1)
    expected = """
        128 135 96 55 64 114 134 128  78 81 68 52 57 118 144 136  55 49 79 109 103 89 83 84  74 70 95 122 115 69 49 55
        100 105 75 43 50 89 105 100  57 54 74 96 91 65 55 58  70 69 75 81 80 72 69 70  105 112 75 36 45 92 111 105"""
    got = resize_as_tensorflow(x, 8)
    assert got.shape == (8, 8, 1) and got.dtype == torch.float32
    assert (got.flatten() - torch.tensor([*map(float, expected.split())])).abs().max() <= 1
    x = torch.tensor([[64.0, 32.0, 0.0], [32.0, 64.0, 0.0], [50.0, 100.0, 0.0]]).view(3, 3, 1)
    got = resize_as_tensorflow(x, 6, "bilinear")[:, :3, 0]
    torch.testing.assert_close(got[:, 0], torch.tensor([64.0, 48.0, 32.0, 41.0, 50.0, 50.0]))
    torch.testing.assert_close(got[:, 1], torch.tensor([48.0, 48.0, 48.0, 61.5, 75.0, 75.0]))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_smaller_in_tensorflow_is_not_smoothed(interpolation):
    """At a whole factor each pixel is one of the image's; and what isn't: one by one by the cubic's formula."""
    x = torch.rand(30, 30, 3) * 255
    torch.testing.assert_close(resize_as_tensorflow(x, 10, interpolation), x[::3, ::3])
    got = resize_as_tensorflow(x, 7, interpolation)
    for row, column in ((0, 0), (3, 5), (6, 6)):
        expected = torch.zeros(3)
        for i in range(-2, 34):
            for j in range(-2, 34):
                weights = [kernel(abs(n - at * 30 / 7), interpolation) for n, at in ((i, row), (j, column))]
                expected += x[min(max(i, 0), 29), min(max(j, 0), 29)] * math.prod(weights)
        torch.testing.assert_close(got[row, column], expected, rtol=1e-5, atol=1e-3)


def kernel(t, interpolation):
    if interpolation == "bilinear":
        return max(0.0, 1 - t)
    if t <= 1:
        return 1.25 * t**3 - 2.25 * t**2 + 1
    return -0.75 * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


@pytest.mark.parametrize("mode", CROP_MODES)
@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3, 2), (300, 200)], ids=str)
def test_modes_of_an_image_of_one_colour(mode, size):
    x = Preprocessing(32, 0.875, mean=(0.0,) * 3, std=(1.0,) * 3, crop_mode=mode)(Image.new("RGB", size, (9, 200, 77)))
    assert torch.equal(x, torch.tensor([9.0, 200.0, 77.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32))


def test_unknown_mode():
    with pytest.raises(ValueError, match="crop_mode must be one of 'center', 'squash', 'tensorflow', got 'border'"):
        Preprocessing(32, 1.0, crop_mode="border")
