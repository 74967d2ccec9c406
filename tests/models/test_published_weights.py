"""The real ImageNet weights on real photos, against the package that they were published for.

Fails if the logits leave 1e-4 of the original implementation's (PyTorch's own error is about 1e-5), or if the photos
aren't what they show.
"""

from pathlib import Path

import pytest
import torch

import cnnfast
from cnnfast.preprocess import Preprocessing
from cnnfast.pretrained import find_weights, imagenet_labels

efficientnet_lite_pytorch = pytest.importorskip("efficientnet_lite_pytorch")
PHOTOS = Path(__file__).parents[2] / "examples" / "photos"
SHOWN = {"chelsea": ("tabby", "tiger cat", "Egyptian cat"), "coffee": ("espresso",), "rocket": ("missile",)}


@pytest.fixture(scope="module")
def photos():
    preprocess = Preprocessing(224, 224 / 256, mean=(127.0,) * 3, std=(128.0,) * 3, crop_mode="tensorflow")
    return torch.cat([preprocess.load(PHOTOS / f"{name}.jpg") for name in SHOWN])


@pytest.fixture(scope="module")
def original():
    path = str(find_weights("tf_efficientnet_lite0"))
    return efficientnet_lite_pytorch.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


@pytest.fixture(scope="module")
def ours():
    network = cnnfast.create_model("tf_efficientnet_lite0").eval()
    cnnfast.load_weights(network, find_weights("tf_efficientnet_lite0"))
    return network


def test_logits(ours, original, photos):
    with torch.no_grad():
        expected = original(photos)
        for x in (photos, photos.to(memory_format=torch.channels_last)):
            assert (ours(x) - expected).abs().max() <= 1e-4
        for i in range(len(photos)):
            assert (ours(photos[i : i + 1]) - expected[i]).abs().max() <= 1e-4


def test_layers_too(ours, original, photos):
    with torch.no_grad():
        expected = original(photos[:1])
    assert (ours(photos[:1]) - expected).abs().max() <= 1e-4


def test_what_the_photos_show(ours, photos):
    with torch.no_grad():
        probabilities, best = ours(photos).softmax(1).max(1)
    for (name, labels), probability, label in zip(SHOWN.items(), probabilities, best, strict=True):
        shown = imagenet_labels()[label]
        assert any(word in shown for word in labels), f"{name} is taken for {shown}"
        assert probability > 0.2, name
