"""What a network is shown of an image, and the classifier at every position.

Fails if a crop is elsewhere or missing, a view has another weight in the mean, or dense scores aren't the mean of what
the classifier says at each position.
"""

import pytest
import torch
from PIL import Image, ImageOps
from torch import nn

import cnnfast
from cnnfast.evaluation import Views, dense_form, predict
from cnnfast.evaluation.folder import Sample
from cnnfast.models.features import FeatureInfo
from cnnfast.models.network import Network
from cnnfast.nn import GlobalPool
from cnnfast.preprocess import Preprocessing, preprocessing_for

RAW = Preprocessing(8, 0.5, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.fixture
def image():
    """24 x 16 pixels, each of another value, of which a resize to the same size is the same."""
    values = torch.randperm(24 * 16 * 3) % 256
    return Image.frombytes("RGB", (24, 16), bytes(values.tolist()))


def pixels(image):
    return RAW.normalise(image)[0]


def test_single_is_what_classify_sees(image):
    preprocessing = preprocessing_for("mobilenet_v2")
    (view,) = Views(preprocessing)(image)
    assert torch.equal(view, preprocessing(image)[0])
    small, mirrored, large, _ = Views(preprocessing, sizes=(192, 256), mirror=True)(image)
    assert small.shape == mirrored.shape == (3, 192, 192) and large.shape == (3, 256, 256)
    assert torch.equal(small.flip(2), mirrored)


def test_ten(image):
    views = Views(RAW, "ten")
    assert views.sizes == (16,) and len(views) == 10  # the image keeps its size
    expected = []
    for x in (pixels(image), pixels(image).flip(2)):
        expected += [x[:, :8, :8], x[:, :8, -8:], x[:, -8:, :8], x[:, -8:, -8:], x[:, 4:12, 8:16]]
    assert all(map(torch.equal, views(image), expected))


@pytest.mark.parametrize("upright", [False, True])
def test_multi(image, upright):
    """GoogLeNet's 36 crops of an image at one size."""
    views = Views(RAW, "multi", (16,))
    x = pixels(image)
    if upright:
        image, x = image.transpose(Image.Transpose.TRANSPOSE), x.transpose(1, 2)
    got = views(image)
    assert len(got) == len(views) == 36
    for third in range(3):
        start = 4 * third  # 16 of 24 pixels: 0, 4, 8
        square = x[:, start : start + 16, :] if upright else x[:, :, start : start + 16]
        six = got[12 * third : 12 * third + 6]
        parts = [square[:, :8, :8], square[:, :8, -8:], square[:, -8:, :8], square[:, -8:, -8:], square[:, 4:12, 4:12]]
        assert all(map(torch.equal, six, parts))
        box = (0, start, 16, start + 16) if upright else (start, 0, start + 16, 16)
        assert torch.equal(six[5], pixels(image.crop(box).resize((8, 8), Image.Resampling.BICUBIC)))
        for plain, mirrored in zip(six, got[12 * third + 6 : 12 * third + 12], strict=True):
            assert torch.equal(plain.flip(2), mirrored)


def test_multi_is_144_by_default():
    views = Views(preprocessing_for("mobilenet_v1"), "multi")
    assert views.sizes == (256, 288, 320, 352) and len(views) == 144
    assert Views(preprocessing_for("xception"), "multi").sizes == (342, 384, 427, 470)


def test_dense_is_the_whole_image(image):
    views = Views(RAW, "dense", (16, 32), mirror=True)
    plain, mirrored, large, _ = views(image)
    assert torch.equal(plain, pixels(image)) and torch.equal(mirrored, pixels(ImageOps.mirror(image)))
    assert large.shape == (3, 32, 48)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("eleven",), "mode must be one of 'single', 'ten', 'multi', 'dense', got 'eleven'"),
        (("ten", (7, 9)), "sizes must be at least 8, the side of a crop, got 7"),
        (("multi", (), True), "mirror must be False in mode 'multi'"),
    ],
)
def test_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Views(RAW, *options)


class Grid(GlobalPool):
    grid = 2

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, self.grid).flatten(1)


class Small(Network):
    """Fully connected layers behind a grid of 2 x 2 pixels, as VGG's behind 7 x 7."""

    classifier_name = "classifier.3"

    def __init__(self, last=None):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU())
        self.steps = ["features"]
        self.feature_info = FeatureInfo([dict(num_chs=4, reduction=2, module="features.1")])
        self.global_pool = Grid()
        self.classifier = nn.Sequential(nn.Linear(16, 9), nn.ReLU(), nn.Dropout(0.5), last or nn.Linear(9, 5))

    def forward_head(self, x, pre_logits=False):
        return self.classifier(self.global_pool(x))


def windows(x, size):
    height, width = x.shape[2:]
    return [x[:, :, i : i + size, j : j + size] for i in range(height - size + 1) for j in range(width - size + 1)]


@torch.no_grad()
def test_dense_with_fully_connected_layers():
    """The mean of the scores of every 2 x 2 window of the last map; of a map of just that size, the network's."""
    model = Small().double().eval()
    x = torch.randn(2, 3, 10, 14, dtype=torch.float64)
    expected = torch.stack([model.forward_head(part) for part in windows(model.forward_features(x), 2)]).mean(0)
    torch.testing.assert_close(dense_form(model)(x), expected, rtol=1e-12, atol=1e-12)
    assert (expected - model(x)).abs().max() > 1e-3  # which averages the map instead
    torch.testing.assert_close(dense_form(model)(x[:, :, :4, :4]), model(x[:, :, :4, :4]), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="2 x 2 pixels at the classifier, got 1 x 2"):
        dense_form(model)(x[:, :, :2, :4])


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["mobilenet_v2", "tf_efficientnet_b0", "alexnet", "nin", "lenet1", pytest.param("vgg11", marks=pytest.mark.slow)],
)
def test_dense_of_the_networks(name):
    if name not in cnnfast.list_models():
        pytest.skip(f"no {name} here")
    channels, side, _ = cnnfast.models.registry.model_entry(name).pretrained_cfg["input_size"]
    model = cnnfast.create_model(name).eval()
    x = torch.randn(1, channels, side + 33, side + 65)
    dense = dense_form(model)(x)
    features = model.forward_features(x)
    expected = torch.stack([model.forward_head(p) for p in windows(features, getattr(model, "grid", 1))]).mean(0)
    torch.testing.assert_close(dense, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: Small(nn.Bilinear(1, 1, 1)), "fully connected layers of Small that are linear, got Bilinear"),
        (lambda: nn.Linear(3, 3), "ends in global average pooling or fully connected layers, got Linear"),
        (lambda: cnnfast.create_model("mobilenet_v2", global_pool="max"), "got MobileNetV2"),
    ],
)
def test_dense_is_refused(model, said):
    with pytest.raises(ValueError, match=said):
        dense_form(model())


def test_the_mean_of_the_softmax_outputs(image, tmp_path):
    """Each view the same weight, whatever its size and the batch; images of different shapes beside each other."""
    files = [tmp_path / f"{n}.png" for n in range(3)]
    image.save(files[0])
    image.resize((16, 16)).save(files[1])
    image.transpose(Image.Transpose.TRANSPOSE).save(files[2])
    samples = [Sample(file, file.name, n) for n, file in enumerate(files)]
    model = Small().eval()
    views = Views(Preprocessing(8, 0.5), "dense", (8, 16, 20), mirror=True)
    with torch.no_grad():
        logits = [[dense_form(model)(x[None])[0] for x in views(views.preprocessing.read(file))] for file in files]
    expected = [torch.stack(rows).softmax(-1).mean(0).sort(descending=True) for rows in logits]
    for batch in (1, 4, 100):
        predictions = [p for part in predict(model, views, samples, batch) for p in part]
        assert [p.path for p in predictions] == ["0.png", "1.png", "2.png"]
        for prediction, (values, indices) in zip(predictions, expected, strict=True):
            assert prediction.probabilities == pytest.approx(values.tolist(), abs=1e-6)
            assert prediction.indices == tuple(indices.tolist())


def test_an_output_that_is_not_finite(image, tmp_path):
    image.save(tmp_path / "x.png")
    model = Small().eval()
    model.classifier[3].bias.data[1] = float("nan")
    (((failure,)),) = predict(model, Views(RAW), [Sample(tmp_path / "x.png", "x.png", 0)])
    assert failure.reason == "the network's output is not finite"
