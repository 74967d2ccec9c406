"""cnnfast.transforms: the networks' preparation of images for a DataLoader.

Fails if evaluation's is not what `cnnfast classify` does, if training's values are normalised otherwise than
evaluation's, if colours are not drawn with the published covariance, or if a seed doesn't determine the result.
"""

import pickle
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import cnnfast
from cnnfast import _peers, transforms
from cnnfast.evaluation import Views
from cnnfast.preprocess import preprocessing_for
from cnnfast.transforms import PCA_VALUES, PCA_VECTORS, PCALighting, transforms_for

NAME = "mobilenet_v2"
tv_tensors, v2 = _peers.import_torchvision().tv_tensors, transforms.v2


def noise(width=300, height=260, mode="RGB"):
    size = width * height * len(mode)
    return Image.frombytes(mode, (width, height), bytes(torch.randint(0, 256, (size,), dtype=torch.uint8).tolist()))


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", NAME, "xception"])
def test_evaluation_is_classifys(name):
    image = noise()
    assert torch.equal(cnnfast.transforms_for(name)(image), preprocessing_for(name)(image)[0])
    for mode in ("RGBA", "L"):
        converted = image.convert(mode)
        assert torch.equal(transforms_for(name)(converted), preprocessing_for(name)(converted)[0])


def test_of_a_size():
    assert transforms_for(NAME, size=160)(noise()).shape == (3, 160, 160)
    assert transforms_for(NAME, is_training=True, size=160)(noise()).shape == (3, 160, 160)


@pytest.mark.parametrize(("crops", "views"), [("ten", 10), ("multi", 36)])
def test_several_crops(crops, views):
    image = noise(280, 260)
    x = transforms_for(NAME, crops=crops, sizes=[256])(image)
    assert x.shape == (views, 3, 224, 224) and x.dtype == torch.float32
    assert torch.equal(x, torch.stack(Views(preprocessing_for(NAME), crops, (256,))(image)))


def test_labels_pass():
    image = noise()
    for training in (False, True):
        x, label = transforms_for(NAME, is_training=training, pca_std=0.1)(image, 7)
        assert label == 7 and x.shape == (3, 224, 224)


@pytest.mark.parametrize("crops", ["resized", "random"])
def test_training_has_evaluations_values(crops):
    """Of an image of one colour every crop is the same, normalised as for evaluation."""
    image = Image.new("RGB", (300, 400), (124, 173, 104))
    x = transforms_for(NAME, is_training=True, crops=crops)(image)
    assert type(x) is torch.Tensor
    torch.testing.assert_close(x, transforms_for(NAME)(image), rtol=0, atol=1e-5)


def test_alexnets_random_crops():
    """Of the 256 x 256 in the centre of the image at short side 256: any 224 x 224, mirrored or not, and nothing else.
    The pixels tell their place."""
    places = torch.arange(256)
    pixels = torch.zeros(256, 320, 3, dtype=torch.uint8)
    pixels[:, 32:288, 0], pixels[:, 32:288, 1] = places[:, None], places[None, :]
    pixels[:, :32, 2] = pixels[:, 288:, 2] = 255
    image = Image.fromarray(pixels.numpy())
    transform = transforms_for("mobilenet_v1", is_training=True, crops="random")  # (x - 127.5) / 127.5, 256 -> 224
    corners = set()
    for _ in range(300):
        x = (transform(image) * 127.5 + 127.5).round().long()
        mirrored = bool(x[1, 0, 0] > x[1, 0, -1])
        x = x.flip(2) if mirrored else x
        top, left = x[0, 0, 0].item(), x[1, 0, 0].item()
        assert torch.equal(x[0], places[top : top + 224, None].expand(224, 224))
        assert torch.equal(x[1], places[None, left : left + 224].expand(224, 224)) and not x[2].any()
        corners.add((top, left, mirrored))
    tops, lefts, mirrored = zip(*corners, strict=True)
    assert min(tops) <= 2 and max(tops) >= 30 and min(lefts) <= 2 and max(lefts) >= 30 and set(mirrored) == {0, 1}


def test_published_colours():
    """Orthonormal to the digits printed; the covariance's deviations are near 0.28 in every channel, the channels
    strongly correlated, as those of photos; its eigenvectors by computation are the published ones."""
    vectors, values = torch.tensor(PCA_VECTORS).double(), torch.tensor(PCA_VALUES).double()
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(3).double(), rtol=0, atol=3e-4)
    covariance = vectors @ values.diag() @ vectors.T
    assert ((covariance.diagonal().sqrt() - 0.28).abs() < 0.012).all()
    computed, again = torch.linalg.eigh(covariance)
    torch.testing.assert_close(computed.flip(0), values, rtol=2e-3, atol=0)
    torch.testing.assert_close((again.flip(1).T @ vectors).abs(), torch.eye(3).double(), rtol=0, atol=1e-3)


def test_pca_lighting_has_that_covariance():
    """Of 20,000 draws, to 4 standard errors; one colour for a whole image."""
    torch.manual_seed(0)
    image = torch.rand(3, 4, 5)
    lighting = PCALighting(0.1)
    changes = [lighting(image) - image for _ in range(20000)]
    assert all(((c - c[:, :1, :1]).abs() < 1e-6).all() for c in changes[:20])
    colours = torch.stack([c[:, 0, 0] for c in changes]).double()
    vectors, values = torch.tensor(PCA_VECTORS).double(), torch.tensor(PCA_VALUES).double()
    expected = vectors @ (0.1 * values).square().diag() @ vectors.T
    spread = (expected.diagonal()[:, None] * expected.diagonal()[None, :] + expected.square()).sqrt()  # of one draw
    assert ((colours.T @ colours / 20000 - expected).abs() < 4 * spread / 20000**0.5).all()
    assert (colours.mean(0).abs() < 4 * (expected.diagonal() / 20000).sqrt()).all()


def test_pca_lighting_on_other_inputs():
    batch = tv_tensors.Image(torch.rand(2, 3, 4, 4, dtype=torch.float64))
    change = PCALighting(0.1)(batch) - batch
    assert change.dtype == torch.float64 and torch.allclose(change[0], change[1])
    assert torch.equal(PCALighting(0.0)(batch), batch)
    with pytest.raises(TypeError, match=r"floating values 0 to 1 .* got torch.uint8"):
        PCALighting()(torch.zeros(3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="image must have 3 channels"):
        PCALighting()(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="std must be 0 or more, got -1"):
        PCALighting(-1)


def test_training_uses_pca():
    image = noise()
    results = []
    for std in (0.0, 0.1):
        torch.manual_seed(3)
        results.append(transforms_for(NAME, is_training=True, hflip=0.0, pca_std=std)(image))
    difference = results[1] - results[0]
    constant = difference.mean((1, 2), keepdim=True)
    assert (difference - constant).abs().max() < 1e-5 and constant.abs().max() > 1e-4


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_lite3"])  # bicubic, bilinear
def test_tensorflows_resize_is_that_of_the_networks(name):
    """Of the square that evaluation cuts out; of images, tensors and batches the same."""
    preprocessing, image = preprocessing_for(name), noise(640, 500)
    side = int(500 * preprocessing.crop)
    left, top = (640 - side + 1) // 2, (500 - side + 1) // 2
    square = image.crop((left, top, left + side, top + side))
    resize = transforms.TensorFlowResize(preprocessing.size, preprocessing.interpolation)
    assert resize(square).tobytes() == preprocessing.centre(image).tobytes()
    batch = v2.functional.pil_to_tensor(square).expand(2, -1, -1, -1)
    assert torch.equal(resize(batch)[1], v2.functional.pil_to_tensor(resize(square)))
    floats = resize(batch.float())
    assert floats.dtype == torch.float32 and (floats - resize(batch)).abs().amax() > 0.1
    with pytest.raises(ValueError, match="interpolation must be 'bicubic' or 'bilinear', got 'box'"):
        transforms.TensorFlowResize(8, "box")(square)


class Photos(Dataset):
    def __init__(self, transform):
        self.transform, self.image = transform, noise()

    def __len__(self):
        return 8

    def __getitem__(self, n):
        return self.transform(self.image), n


@pytest.mark.parametrize("crops", ["resized", "random"])
def test_a_seed_determines_it(crops):
    """And pickling changes nothing; the next draw is another."""
    transform = transforms_for(NAME, is_training=True, crops=crops, pca_std=0.1)
    image = noise()
    torch.manual_seed(5)
    first = transform(image)
    assert not torch.equal(first, transform(image))
    torch.manual_seed(5)
    assert torch.equal(first, pickle.loads(pickle.dumps(transform))(image))


def test_workers():
    dataset = Photos(transforms_for(NAME, is_training=True, size=32, pca_std=0.1))
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(torch.cat([x for x, _ in DataLoader(dataset, 4, num_workers=2)]))
    assert runs[0].shape == (8, 3, 32, 32) and torch.equal(*runs)


@pytest.mark.slow
def test_a_new_process_unpickles_it(tmp_path):
    """As a worker that is spawned: it has imported nothing, torchvision not in any way."""
    (tmp_path / "t").write_bytes(pickle.dumps(transforms_for(NAME, is_training=True, pca_std=0.1)))
    code = "import pickle, sys; from PIL import Image; t = pickle.load(open(sys.argv[1], 'rb'));"
    code += "print(tuple(t(Image.new('RGB', (300, 300))).shape))"
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "t"], capture_output=True, text=True)
    assert (run.stdout, run.returncode) == ("(3, 224, 224)\n", 0), run.stderr


def test_torchvisions_pieces_are_used():
    kinds = [type(step) for step in transforms_for(NAME, is_training=True).transforms]
    assert {v2.RandomResizedCrop, v2.RandomHorizontalFlip, v2.Normalize} < set(kinds)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (dict(name="mobilenet_v9"), ValueError, "'mobilenet_v9'"),
        (dict(name=NAME, crops="random"), ValueError, "mode must be one of"),
        (dict(name=NAME, crops="ten", is_training=True), ValueError, "crops must be 'resized' or 'random'"),
        (dict(name=NAME, crops="dense", sizes=[200, 300]), ValueError, "sizes must be one in mode 'dense'"),
    ],
)
def test_refused(options, error, said):
    with pytest.raises(error, match=said):
        transforms_for(**options)
    with pytest.raises(TypeError, match=r"image must be a PIL.Image.Image, got Tensor"):
        transforms_for(NAME)(torch.zeros(3, 8, 8))


@pytest.mark.slow
def test_torchvision_is_optional():
    """The package and evaluation import without it; what needs it names the extra."""
    code = """if True:
        import sys
        sys.modules["torchvision"] = None
        import cnnfast, cnnfast.evaluation, cnnfast.cli.main
        from cnnfast import *
        try:
            cnnfast.transforms_for
        except ImportError as error:
            print(error)
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.stdout, run.returncode) == ('torchvision is not installed: pip install "cnnfast[transforms]"\n', 0)
    assert transforms.transforms_for is cnnfast.transforms_for
