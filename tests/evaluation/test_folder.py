"""Class folders are matched with the network's outputs, or refused in one sentence.

Fails if a folder's images are counted for another class, or if folders that can't be matched are taken in any order.
"""

import pytest
from PIL import Image

from cnnfast.evaluation import read_folder
from cnnfast.pretrained import imagenet_labels, imagenet_synsets


@pytest.fixture
def make(tmp_path):
    """A folder with class folders of these names, of one image each."""

    def make_folder(*names):
        for name in names:
            (tmp_path / "data" / name).mkdir(parents=True)
            Image.new("RGB", (3, 2)).save(tmp_path / "data" / name / "x.PNG")
        return tmp_path / "data"

    return make_folder


def test_synsets_and_names_are_of_the_same_classes():
    """A few are known from elsewhere; sorted, as the order of outputs is defined."""
    synsets = imagenet_synsets()
    assert len(set(synsets)) == 1000 and list(synsets) == sorted(synsets)
    known = {"n01440764": "tench", "n02123394": "Persian cat", "n04285008": "sports car", "n15075141": "toilet tissue"}
    assert {synset: imagenet_labels()[synsets.index(synset)] for synset in known} == known


def test_imagenet_by_names_and_synsets(make):
    """Hidden folders and files beside the class folders don't count; images at any depth do."""
    folder = make("n02123394", "Golden_Retriever", "tiger-cat", "crane (bird)")
    make(".cache", "tiger-cat/deeper")
    (folder / "notes.txt").write_text("none")
    read = read_folder(folder, 1000)
    assert read.targets == {"n02123394": 283, "Golden_Retriever": 207, "tiger-cat": 282, "crane (bird)": 134}
    assert [(sample.path, sample.target) for sample in read.samples] == [
        ("Golden_Retriever/x.PNG", 207),
        ("crane (bird)/x.PNG", 134),
        ("n02123394/x.PNG", 283),
        ("tiger-cat/deeper/x.PNG", 282),
        ("tiger-cat/x.PNG", 282),
    ]
    assert read.names == imagenet_labels() and read.matched == "names"


def test_all_synsets_are_in_sorted_order(make):
    """What torchvision's ImageFolder makes of ImageNet's own folders."""
    read = read_folder(make(*imagenet_synsets()), 1000)
    assert [sample.target for sample in read.samples] == list(range(1000))


@pytest.mark.parametrize(
    "lines",
    [
        "n01 x\nb\nc",  # names of any kind
        "n00000001 apple, pome\nn00000002 bear\nn00000003 cat",
        "n00000001\tapple\tpome\nn00000002\tbear\nn00000003\tcat",
        "\napple\nbear,n00000002\n cat \n",
        "n00000001\tapple\tlittle pome\nn00000002\tbear\tbig bear\nn00000003\tcat\tsmall cat",
    ],
)
def test_labels_of_a_file(make, tmp_path, lines):
    (tmp_path / "labels.txt").write_text(lines)
    folders = {"n01 x": 0, "B": 1, "c": 2} if lines.startswith("n01 x") else {"n00000002": 1, "apple": 0, "CAT": 2}
    read = read_folder(make(*folders), 3, tmp_path / "labels.txt")
    assert read.targets == folders
    assert read.names == (("n01 x", "b", "c") if lines.startswith("n01 x") else ("apple", "bear", "cat"))


@pytest.mark.parametrize("line", ["n00000001 great shark, white shark", "n00000001\tgreat shark\twhite shark"])
@pytest.mark.parametrize("name", ["n00000001", "great_shark", "White shark"])
def test_synonyms(make, tmp_path, line, name):
    (tmp_path / "labels.txt").write_text(f"n00000002 bear\n{line}\n")
    read = read_folder(make(name, "bear"), 2, tmp_path / "labels.txt")
    assert read.targets == {name: 1, "bear": 0} and read.names == ("bear", "great shark")


def test_sorted_order_and_numbers(make):
    read = read_folder(make("daisy", "Rose", "ash"), 3, label_set="flowers")
    assert read.targets == {"Rose": 0, "ash": 1, "daisy": 2} and read.names == ("Rose", "ash", "daisy")


def test_numbers_are_outputs(make):
    assert read_folder(make("7", "12"), 20, label_set="").targets == {"7": 7, "12": 12}


@pytest.mark.parametrize(
    ("names", "num_classes", "said"),
    [
        ([], 3, "has no folders"),
        (["a", "b"], 3, "be 3, one for each class in sorted order, got 2, among them 'a', 'b'"),
        (
            ["espresso", "latte", "mocha", "ristretto", "lungo"],
            1000,
            "named for classes, got 'latte', 'lungo', 'mocha' and 1 more$",
        ),
        ([str(n) for n in range(11)], 11, "must sort as the numbers do"),
        (["3"], 3, "must be 0 to 2, got '3'"),
    ],
)
def test_refused(make, tmp_path, names, num_classes, said):
    (tmp_path / "data").mkdir()
    for name in names:
        (tmp_path / "data" / name).mkdir()
    with pytest.raises(ValueError, match=said):
        read_folder(tmp_path / "data", num_classes)


def test_refused_labels(make, tmp_path):
    (tmp_path / "labels.txt").write_text("apple\nbear\n")
    with pytest.raises(ValueError, match="labels must have 3 lines, one for each class, got 2"):
        read_folder(make("apple"), 3, tmp_path / "labels.txt")
    (tmp_path / "labels.txt").write_text("crane\napple\ncrane\n")
    with pytest.raises(ValueError, match=r"'crane': classes \[0, 2\]"):
        read_folder(make("crane"), 3, tmp_path / "labels.txt")


def test_limit_is_spread_over_the_classes(make):
    read = read_folder(make(*imagenet_synsets()[:100]), 1000)
    assert [sample.target for sample in read.limited(10)] == list(range(0, 100, 10))
    assert read.limited(100) == read.limited(101) == read.samples
